"""``trawl sweep`` on a tiny model: the numbers it gives, and what it makes of a kill, of company and of mistakes."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trawl_cli
from safetensors.torch import load_file, save_file

import trawl
from tests.integration.test_eval import make_tokenizer, sentence
from trawl.errors import PlanError, ResumeError
from trawl.evaluation import parse_task
from trawl.sweeps.planner import Planner
from trawl.sweeps.records import OutcomeFiles, rebuild_commands
from trawl.sweeps.scores import estimate
from trawl.sweeps.setup import Setup
from trawl.sweeps.space import Intervention, Space
from trawl.sweeps.split import split_task

optuna = pytest.importorskip("optuna", reason="needs the extra: pip install 'trawl-llm[sweep]'")

GRID = {"methods": ("cp", "svd"), "ranks": (2, 6), "objectives": ("log_loss", "accuracy"), "validation": 0.5}
MANY = {"methods": ("cp", "svd"), "ranks": (1, 2, 5), "objectives": ("log_loss",)}  # 18 interventions
FEW = {"methods": ("svd",), "ranks": (2,), "objectives": ("log_loss",), "layers": "2"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Let this process, in the fixtures below too, and the others compute with the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(zoo, tmp_path_factory):
    """A tiny model with a tokenizer, never to be written to."""
    folder = shutil.copytree(zoo("llama"), tmp_path_factory.mktemp("sweep") / "model")
    make_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """SPECs of small task files, by kind."""
    folder = tmp_path_factory.mktemp("tasks")
    qa = [{"prompt": sentence(i, 3 + i % 7), "answers": [sentence(50 + i, 1 + i % 2)]} for i in range(40)]
    choice = [
        {"query": sentence(i, 2 + i % 5), "choices": [sentence(90 + i + j, 1 + j) for j in range(3)], "gold": i % 3}
        for i in range(240)
    ]
    for name, records in (("qa", qa), ("choice", choice), ("small", choice[:40])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (folder / "text.txt").write_text("".join(sentence(seed, 8) + "\n" for seed in range(120)))
    return {
        "qa": f"qa:{folder / 'qa.jsonl'}?tokens=3",
        "choice": f"choice:{folder / 'choice.jsonl'}",
        "small": f"choice:{folder / 'small.jsonl'}",
        "ppl": f"ppl:{folder / 'text.txt'}",
    }


@pytest.fixture(scope="module")
def grid(model, tasks, tmp_path_factory):
    """A finished sweep over two methods, two ranks and three layers, with a composition."""
    folder = tmp_path_factory.mktemp("grid") / "study"
    specs = [tasks["qa"], tasks["small"]]
    return trawl.sweep(model, specs, folder, **GRID, compose_most=2, noise=0.0)


@pytest.fixture(scope="module")
def undisturbed(model, tasks, tmp_path_factory):
    """A finished sweep over many interventions, which nothing has come between."""
    return trawl.sweep(model, tasks["small"], tmp_path_factory.mktemp("many") / "study", **MANY)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``trawl ARGS`` in this process: (exit code, standard output, standard error)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["trawl", *map(str, args)])
        capsys.readouterr()
        try:
            trawl_cli.main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    return run


def comparable(result, *, numbers=True):
    """Return a sweep's rows without their seconds, in an order of their own; without numbers where they may differ."""
    left_out = {"seconds"} if numbers else {"seconds", "number", "test"}
    rows = [
        {name: value for name, value in trial.items() if name not in left_out} for trial in result.results["trials"]
    ]
    return sorted(rows, key=lambda row: json.dumps([row[name] for name in ("method", "roles", "layers", "rank")]))


def tried(result):
    """Count how often each intervention stands among the rows."""
    names = ("method", "roles", "layers", "rank")
    return Counter(tuple(trial[name] for name in names) for trial in result.results["trials"])


def test_the_grid_is_tried_once_and_everything_is_recorded(grid):
    results = grid.results
    assert results == json.loads((grid.folder / "results.json").read_text())
    assert (results["state"], results["sampler"], results["left_out"]) == ("complete", "grid", [])
    assert set(tried(grid)) == {(m, "fc", str(n), r) for m in ("cp", "svd") for n in range(3) for r in (2, 6)}
    assert set(tried(grid).values()) == {1}
    for trial in results["trials"]:
        assert trial["state"] == "complete"
        assert set(trial["validation"]["objectives"]) == {"log_loss", "accuracy"}
        assert trial["validation"]["records"] == trial["validation"]["of"] == 40
        assert 0 < trial["kept_targeted"] < 1
        assert trial["kept"] < 1
        assert all(stack["shape"][1:] == [48, 32] for stack in trial["stacks"])
    gains = {trial["number"]: trial["validation"]["objectives"]["log_loss"]["gain"] for trial in results["trials"]}
    assert results["best"] == grid.best["number"] == max(gains, key=gains.get)
    assert set(results["best_of_layer"]) == {"0", "1", "2"}
    tested = {trial["number"] for trial in results["trials"] if trial["test"]}
    assert tested == {results["best"], *results["best_of_layer"].values()}
    assert [task["validation"] for task in results["tasks"]] == [20, 20]
    assert [task["test"] for task in results["tasks"]] == [20, 20]
    with (grid.folder / "trials.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [row["method"] for row in grid.rows]


def test_the_front_holds_what_nothing_beats_in_gain_and_size(grid):
    points = {
        trial["number"]: (trial["kept"], -trial["validation"]["objectives"]["log_loss"]["gain"])
        for trial in grid.results["trials"]
    }
    beaten = {
        one
        for one, (kept, loss) in points.items()
        for other in points.values()
        if other != (kept, loss) and other[0] <= kept and other[1] <= loss
    }
    assert set(grid.results["front"]) == set(points) - beaten


def test_the_same_sweep_elsewhere_gives_the_same_rows(grid, model, tasks, tmp_path):
    again = trawl.sweep(model, [tasks["qa"], tasks["small"]], tmp_path / "again", **GRID, compose_most=2, noise=0.0)
    assert comparable(again) == comparable(grid)
    for name in ("best", "front", "best_of_layer", "composition", "base", "tasks"):
        assert again.results[name] == grid.results[name]


def validation_records(spec):
    """Return a task of the grid with its validation records alone, and one with the others."""
    task = parse_task(spec)
    parts = split_task(task, GRID["validation"], 0, None)
    return replace(task, records=parts.validation[0].task.records), parts.test[0].task


def assert_scores_are_those_of(folder, grid, name, part, tasks):
    stored = OutcomeFiles(grid.folder).read(name, part)
    for spec, own in zip((tasks["qa"], tasks["small"]), stored.scores.tasks, strict=True):
        (result,) = trawl.evaluate(folder, validation_records(spec)[part == "test"])
        assert set(own.values) == set(result.scores)
        for figure, values in own.values.items():
            assert values == pytest.approx(result.scores[figure], rel=1e-4, abs=1e-5)


def test_a_trial_scores_as_its_rebuilt_checkpoint_does(grid, model, tasks, tmp_path):
    assert_scores_are_those_of(model, grid, "base", "validation", tasks)
    for trial in (grid.results["trials"][0], grid.results["trials"][-1]):
        names = ("method", "roles", "layers", "group_layers", "rank")
        recipe = Intervention(**{name: trial[name] for name in names}).recipe(0, None, None)
        out = tmp_path / str(trial["number"])
        (stack, *_) = trawl.compress(model, recipe, out).stacks
        assert stack.relative_error == pytest.approx(trial["stacks"][0]["relative_error"], rel=1e-5)
        assert_scores_are_those_of(out, grid, str(trial["number"]), "validation", tasks)


def test_the_commands_rebuild_the_composition_from_the_sweeps_own_factors(grid, model, tasks, run):
    found = grid.results["composition"]
    assert found["trials"][0] == grid.results["best"]
    assert len(grid.results["commands"]) == len(found["trials"]) > 1
    for command in grid.results["commands"]:
        code, _, err = run(*shlex.split(command)[1:])
        assert code == 0, err
    name = "-".join(map(str, found["trials"]))
    assert_scores_are_those_of(grid.folder / "winner", grid, name, "validation", tasks)
    assert_scores_are_those_of(grid.folder / "winner", grid, name, "test", tasks)


def test_a_composition_adds_what_shares_no_matrix_and_improves(grid):
    found, trials = grid.results["composition"], {trial["number"]: trial for trial in grid.results["trials"]}
    layers = [trials[step["trial"]]["layers"] for step in found["steps"]]
    assert layers == sorted(set(layers) - {grid.best["layers"]}, reverse=True)  # last first, each place once
    kept = [step["trial"] for step in found["steps"] if step["kept"]]
    assert found["trials"] == [grid.best["number"], *kept]
    for step in found["steps"]:
        assert step["kept"] is (step["improvement"] > 0)
    total = grid.best["validation"]["objectives"]["log_loss"]["gain"]
    total += sum(step["improvement"] for step in found["steps"] if step["kept"])
    assert found["validation"]["objectives"]["log_loss"]["gain"] == pytest.approx(total)


def test_the_report_draws_it(grid, run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'trawl-llm[plot]'")
    code, _, err = run("report", grid.folder, "-o", tmp_path / "page")
    assert code == 0, err
    page = (tmp_path / "page" / "report.html").read_text()
    assert f"{grid.best['validation']['objectives']['log_loss']['value']:.4f}"[:5] in page


def test_the_command_line_does_the_same(grid, model, tasks, run, tmp_path):
    args = ["sweep", model, "--method", "cp,svd", "--ranks", "2,6", "--validation", "0.5"]
    args += ["--task", tasks["qa"], "--task", tasks["small"], "--objective", "log_loss", "--objective", "accuracy"]
    args += ["--compose", 2, "--noise", 0]
    code, text, err = run(*args, "-o", grid.folder)
    assert code == 0, err
    assert "12 complete trials" in text
    assert f"{grid.best['validation']['objectives']['log_loss']['value']:.4f}" in text
    assert all(command in text for command in grid.results["commands"])
    code, text, err = run(*args, "-o", grid.folder, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["best"] == grid.results["best"]


SIGNED = r'{"worker": ?"([^"]+)"'  # a trial, by the worker that claimed it, in the journal
WORKER = """
import json, re, sys, time, torch, trawl
from pathlib import Path
from trawl.sweeps.study import TrialQueue
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
model, task, out, options, together, signed = json.loads(sys.argv[1])
finish, deadline = TrialQueue.finish, time.monotonic() + 100
def wait(*arguments):  # no trial ends before every process has one, or a slow one would find none left
    while len(set(re.findall(signed, (Path(out) / "study.journal").read_text()))) < together:
        assert time.monotonic() < deadline, "the others claimed no trial"
        time.sleep(0.01)
    finish(*arguments)
TrialQueue.finish = wait
trawl.sweep(model, task, out, **options)
"""


def start(model, task, out, options, together=1):
    """Start a sweep in a process of its own, one of some, which waits until it is told to begin."""
    words = [sys.executable, "-c", WORKER, json.dumps([str(model), task, str(out), options, together, SIGNED])]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begin(process):
    process.stdin.write("\n")
    process.stdin.flush()


def finished(folder):
    """Return the files of finished trials, each with what a new writing would change."""
    files = sorted((folder / "scores").glob("validation-[0-9]*.json"))
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_a_killed_sweep_goes_on_and_repeats_nothing(undisturbed, model, tasks, tmp_path):
    out = tmp_path / "study"
    process = start(model, tasks["small"], out, MANY)
    process.stdout.readline()
    begin(process)
    while len(finished(out)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = finished(out)
    assert 3 <= len(before) < 18
    result = trawl.sweep(model, tasks["small"], out, **MANY)
    after = finished(out)
    assert {name: after[name] for name in before} == before
    assert len(after) <= 18 + 1  # the one that was under way, where it was written but not told
    assert comparable(result, numbers=False) == comparable(undisturbed, numbers=False)
    assert result.results["state"] == "complete"
    assert not list((out / "workers").glob(f"*-{os.getpid()}-*"))
    names = ("method", "roles", "layers", "rank", "validation", "test")
    assert [result.best[name] for name in names] == [undisturbed.best[name] for name in names]


@pytest.mark.slow
def test_two_processes_share_the_work(undisturbed, model, tasks, tmp_path):
    out = tmp_path / "study"
    processes = [start(model, tasks["small"], out, MANY, together=2) for _ in range(2)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        begin(process)
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert len(finished(out)) == 18
    result = trawl.sweep(model, tasks["small"], out, **MANY)
    assert comparable(result) == comparable(undisturbed)
    workers = Counter(re.findall(SIGNED, (out / "study.journal").read_text()))
    assert len(workers) == 2, workers
    assert sum(workers.values()) == 18


def test_an_unfinished_sweep_has_a_page(model, tasks, run, tmp_path, monkeypatch):
    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr("trawl.sweeps.sweeping._Run._test", stop)
    with pytest.raises(InterruptedError):
        trawl.sweep(model, tasks["small"], tmp_path / "study", **FEW, validation=0.5)
    code, _, err = run("report", tmp_path / "study")
    assert code == 0, err
    assert "test records not scored yet" in next((tmp_path / "study").rglob("*.html")).read_text()


def test_what_a_process_died_on_giving_back_is_tried(model, tasks, tmp_path, monkeypatch):
    from trawl.sweeps.study import TrialQueue

    options = FEW | {"ranks": (2, 3), "validation": 0.5}

    def stop(*_):
        raise InterruptedError

    for owner, name in (
        (TrialQueue, "finish"),
        (optuna.Study, "enqueue_trial"),
    ):  # a worker dies, then who takes its trial back
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises(InterruptedError):
                trawl.sweep(model, tasks["small"], tmp_path / "study", **options)
    result = trawl.sweep(model, tasks["small"], tmp_path / "study", **options)
    assert {trial["rank"]: trial["state"] for trial in result.results["trials"]} == {2: "complete", 3: "complete"}


def test_a_torn_line_of_the_journal_is_cut_off(grid, model, tasks, tmp_path):
    specs, out = [tasks["qa"], tasks["small"]], tmp_path / "study"
    trawl.sweep(model, specs, out, **GRID, trials=3)
    before = finished(out)
    with (out / "study.journal").open("a") as file:
        file.write('{"op_code": 6, "worker_id": "x", "tri')
    trawl.sweep(model, specs, out, **GRID, trials=5)
    result = trawl.sweep(model, specs, out, **GRID)
    assert comparable(result, numbers=False) == comparable(grid, numbers=False)
    assert {name: finished(out)[name] for name in before} == before


def test_a_trial_that_was_written_but_not_told_is_one_row(model, tasks, tmp_path, monkeypatch):
    from trawl.sweeps.study import TrialQueue

    def lost(*_):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(TrialQueue, "finish", lost)
        with pytest.raises(InterruptedError):
            trawl.sweep(model, tasks["small"], tmp_path / "study", **GRID)
    assert len(finished(tmp_path / "study")) == 1
    result = trawl.sweep(model, tasks["small"], tmp_path / "study", **GRID)
    assert len(result.results["trials"]) == 12
    assert set(tried(result).values()) == {1}


def test_a_corrupt_journal_is_told_in_one_line(grid, model, tasks, run, tmp_path):
    out = shutil.copytree(grid.folder, tmp_path / "study")
    lines = (out / "study.journal").read_text().splitlines()
    lines[len(lines) // 2] = "garbage\x00"
    (out / "study.journal").write_text("\n".join(lines) + "\n")
    args = ["--task", tasks["qa"], "--task", tasks["small"], "--objective", "log_loss", "--objective", "accuracy"]
    code, text, err = run("sweep", model, "--method", "cp,svd", "--ranks", "2,6", "--validation", 0.5, *args, "-o", out)
    assert (code, text) == (2, "")
    assert re.fullmatch(r"PlanError: cannot open the study in \S+study\.journal: .*\n", err)


def test_a_sweep_goes_on_when_its_task_files_lie_elsewhere(grid, model, tasks, tmp_path):
    out, moved = shutil.copytree(grid.folder, tmp_path / "study"), tmp_path / "moved"
    folder = Path(tasks["small"].partition(":")[2]).parent
    shutil.copytree(folder, moved)
    there = [tasks[name].replace(str(folder), str(moved)) for name in ("qa", "small")]
    again = trawl.sweep(model, there, out, **GRID)
    assert again.results["trials"] == grid.results["trials"]
    file = Path(there[0].partition(":")[2].partition("?")[0])
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    with pytest.raises(ResumeError, match="differs in tasks;"):
        trawl.sweep(model, there, out, **GRID)


def test_another_tokenizer_is_another_sweep(model, tasks, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    trawl.sweep(tmp_path / "model", tasks["small"], tmp_path / "study", **FEW, validation=0.5)
    make_tokenizer(bos=False).save_pretrained(tmp_path / "model")
    with pytest.raises(ResumeError, match="a sweep that differs in tokenizer"):
        trawl.sweep(tmp_path / "model", tasks["small"], tmp_path / "study", **FEW, validation=0.5)


def test_what_is_given_twice_is_tried_once(model, tasks, tmp_path):
    options = FEW | {"ranks": (2, 2), "roles": ("q", "q"), "methods": ("svd", "svd"), "validation": 0.5}
    assert len(trawl.sweep(model, tasks["small"], tmp_path / "study", **options).rows) == 1


def test_factors_of_any_number_of_ranks_have_a_folder_of_their_own(model, tasks, tmp_path):
    names = set()
    for most in (3, 4, 100, 101):
        setup = Setup(str(model), Space(tuple(range(1, most + 1))), (tasks["small"],))
        names.add(Planner(setup, tmp_path).library_folder("cp").name)
    assert "cp-1-2-3" in names
    assert len(names) == 4
    assert max(map(len, names)) < 200


def test_a_winners_command_names_the_revision_that_it_starts_from():
    item = Intervention("svd", "q", "2", 1, 4)
    options = {"libraries": {"svd": "lib"}, "seed": 0, "n_iter_max": None, "tol": None, "revision": "v2"}
    first, second = rebuild_commands("org/model", [item, item], Path("study"), options)
    assert "trawl compress org/model " in first
    assert "--revision v2 " in first
    assert "--revision" not in second


def test_another_sweeps_folder_is_refused_with_what_differs(grid, model, tasks, tmp_path):
    out = shutil.copytree(grid.folder, tmp_path / "study")
    with pytest.raises(ResumeError, match="differs in seed, space;"):
        trawl.sweep(model, [tasks["qa"], tasks["small"]], out, **GRID | {"ranks": (2, 3), "seed": 1})
    assert json.loads((out / "results.json").read_text())["trials"] == grid.results["trials"]


def test_scores_that_are_deleted_are_made_again(grid, model, tasks, tmp_path):
    out = shutil.copytree(grid.folder, tmp_path / "study")
    name = f"validation-{grid.results['best']}.json"
    (out / "scores" / name).unlink()
    result = trawl.sweep(model, [tasks["qa"], tasks["small"]], out, **GRID, compose_most=2, noise=0.0)
    assert comparable(result) == comparable(grid)
    (out / "scores" / name).write_text("{")
    with pytest.raises(trawl.TrawlError, match=f"{name} is not readable: .*delete it to make it again"):
        trawl.sweep(model, [tasks["qa"], tasks["small"]], out, **GRID)


def test_a_grid_may_grow_by_its_number_of_trials(model, tasks, tmp_path):
    first = trawl.sweep(model, tasks["small"], tmp_path / "study", **GRID, trials=2)
    assert len(first.results["trials"]) == 2
    before = finished(first.folder)
    second = trawl.sweep(model, tasks["small"], tmp_path / "study", **GRID, trials=5)
    assert len(second.results["trials"]) == 5
    assert {name: finished(first.folder)[name] for name in before} == before


def test_tpe_tries_so_many_different_interventions_and_finds_a_front(model, tasks, tmp_path):
    options = GRID | {"objectives": ("log_loss", "kept"), "ranks": (1, 2, 4, 8)}
    result = trawl.sweep(model, tasks["small"], tmp_path / "study", **options, sampler="tpe", trials=5)
    assert [trial["state"] for trial in result.results["trials"]] == ["complete"] * 5
    assert set(tried(result).values()) == {1}
    assert set(result.results["front"]) <= {trial["number"] for trial in result.results["trials"]}
    assert result.results["front"]
    again = trawl.sweep(model, tasks["small"], tmp_path / "again", **options, sampler="tpe", trials=5)
    assert comparable(again) == comparable(result)


def test_tpe_ends_when_everything_is_tried(model, tasks, tmp_path):
    result = trawl.sweep(model, tasks["small"], tmp_path / "study", **GRID, sampler="tpe")
    assert len(result.results["trials"]) == 12
    assert set(tried(result).values()) == {1}


def test_a_trial_whose_loss_is_surely_hopeless_is_stopped(model, tasks, tmp_path):
    options = GRID | {"objectives": ("log_loss",)}
    whole = trawl.sweep(model, tasks["choice"], tmp_path / "whole", **options, patience=None)
    files = OutcomeFiles(whole.folder)
    base = files.read("base", "validation").scores.tasks[0].values["log_loss"]
    hopes = {}
    for trial in whole.results["trials"]:
        losses = files.read(str(trial["number"]), "validation").scores.tasks[0].values["log_loss"]
        assert len(losses) == 120
        mean, error = estimate([b - a for a, b in zip(losses[:50], base[:50], strict=True)], (1.0,) * 50)
        hopes[trial["number"]] = mean + 3 * error
    patience = -sorted(hopes.values())[len(hopes) // 2]
    result = trawl.sweep(model, tasks["choice"], tmp_path / "study", **options, patience=patience)
    states = {trial["number"]: trial["state"] for trial in result.results["trials"]}
    assert states == {n: "complete" if hope > -patience else "stopped" for n, hope in hopes.items()}
    assert set(states.values()) == {"complete", "stopped"}
    for trial in result.results["trials"]:
        assert trial["validation"]["records"] == (120 if trial["state"] == "complete" else 50)
        assert trial["test"] is None or trial["state"] == "complete"


def test_a_sweep_whose_every_trial_is_stopped_has_no_winner(model, tasks, tmp_path, run):
    args = ["sweep", model, "--ranks", 2, "--task", tasks["choice"], "--validation", 0.5, "--patience", "-100"]
    code, text, err = run(*args, "--compose", 2, "-o", tmp_path / "study")
    assert code == 0, err
    assert "3 trials stopped early" in text
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert (results["best"], results["front"], results["commands"]) == (None, [], [])


def test_a_rank_that_no_stack_allows_is_left_out_with_a_note(model, tasks, tmp_path):
    result = trawl.sweep(model, tasks["small"], tmp_path / "study", **FEW | {"ranks": (4, 40), "validation": 0.5})
    assert [trial["rank"] for trial in result.results["trials"]] == [4]
    (note,) = result.results["left_out"]
    assert re.match("svd rank 40 of fc in layers 2 left out: .*40.* rank up to 32", note)
    with pytest.raises(
        PlanError, match=r"no intervention fits the model: svd rank 40 .*\(and 2 other runs of layers\)"
    ):
        trawl.sweep(model, tasks["small"], tmp_path / "none", **FEW | {"ranks": (40,), "layers": "all"})


def test_tucker_triples_and_runs_of_layers_are_tried(model, tasks, tmp_path):
    options = {"ranks": (4, (2, 4, 5)), "methods": ("svd", "tucker"), "group_layers": (2,), "objectives": ("log_loss",)}
    result = trawl.sweep(model, tasks["small"], tmp_path / "study", **options, validation=0.5)
    assert [trial["layers"] for trial in result.results["trials"]] == ["0-1"] * 3 + ["2"] * 3
    assert {row["rank"] for row in result.rows} == {"4", "2,4,5"}
    assert result.results["trials"][2]["stacks"][0]["shape"] == [6, 48, 32]
    again = trawl.sweep(model, tasks["small"], tmp_path / "study", **options, validation=0.5)
    assert comparable(again) == comparable(result)


def test_the_loss_of_a_text_is_an_objective(model, tasks, tmp_path):
    result = trawl.sweep(model, tasks["ppl"], tmp_path / "study", **FEW, patience=None)
    (trial,) = result.results["trials"]
    found = trial["validation"]["objectives"]["log_loss"]
    base = result.results["base"]["validation"]["objectives"]["log_loss"]["value"]
    assert found["gain"] == pytest.approx(base - found["value"])
    assert found["gain_stderr"] > 0
    assert trial["test"]["records"] == result.results["tasks"][0]["test"] > trial["validation"]["records"]


def broken(model, folder, pattern):
    """Copy a model and put NaN into the tensors whose name matches."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if re.search(pattern, name):
            tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_base_model_without_scores_is_refused(model, tasks, tmp_path):
    folder = broken(model, tmp_path / "model", r"layers\.0\.mlp\.up")
    with pytest.raises(PlanError, match="the base model's log_loss is not a number"):
        trawl.sweep(folder, tasks["small"], tmp_path / "study", **FEW)


def test_a_trial_without_scores_is_stopped(model, tasks, tmp_path, monkeypatch):
    """A change that makes every logit NaN must neither win nor end the sweep."""
    from trawl.sweeps.scorer import Scorer

    score = Scorer.score

    def faulty(self, interventions, part, **options):
        outcome = score(self, interventions, part, **options)
        if [item.rank for item in interventions] != [2]:
            return outcome
        (task,) = outcome.scores.tasks
        values = {name: (float("nan"),) * len(own) for name, own in task.values.items()}
        return replace(outcome, scores=replace(outcome.scores, tasks=(replace(task, values=values),)))

    monkeypatch.setattr(Scorer, "score", faulty)
    for number in range(2):  # read from its file the second time
        result = trawl.sweep(
            model, tasks["small"], tmp_path / "study", **FEW | {"ranks": (2, 3)}, validation=0.5, compose_most=1
        )
        states = {trial["rank"]: trial["state"] for trial in result.results["trials"]}
        assert states == {2: "stopped", 3: "complete"}, number
    assert result.best["rank"] == 3
    json.dumps(result.results, allow_nan=False)


MISTAKES = [
    (["--ranks", "4", "--task", "{small}", "--objective", "acuracy"], "PlanError: .*did you mean 'accuracy'"),
    (["--ranks", "4", "--task", "lm:arc_easy"], "PlanError: task lm:arc_easy: lm-eval scores a task whole"),
    (["--ranks", "4", "--task", "{small}", "--limit", "1"], r"PlanError: .*1 record\(s\) cannot be split"),
    (["--ranks", "4", "--task", "{small}", "--layers", "9"], "the model has layers 0-2, so 9 is outside it"),
    (["--ranks", "4", "--task", "{small}", "--roles", "gat"], "unknown role 'gat'; did you mean 'gate'"),
    (["--ranks", "4", "--task", "{small}", "--method", "tuckr"], "unknown method 'tuckr'; did you mean 'tucker'"),
    (["--ranks", "4", "--task", "{small}", "--sampler", "gird"], "unknown sampler 'gird'; did you mean 'grid'"),
    (["--ranks", "4", "--task", "{small}", "--order", "first"], "unknown order 'first'"),
    (["--ranks", "four", "--task", "{small}"], "'four' is not a rank"),
    (["--ranks", "", "--task", "{small}"], "'' is not a rank"),
    (["--ranks", "0", "--task", "{small}"], "rank.* 0"),
    (["--ranks", "4", "--task", "{small}", "--group-layers", "some"], "'some' is no number of layers"),
    (["--ranks", "4", "--task", "{small}", "--group-layers", "0"], "group_layers holds 0"),
    (["--ranks", "4", "--task", "{small}", "--patience", "ages"], "'ages' is no number; expected 0.5 or none"),
    (["--ranks", "4", "--task", "{small}", "--validation", "1"], "validation share is 1.0"),
    (["--ranks", "4", "--task", "{small}", "--dtype", "flaot32"], "did you mean 'float32'"),
    (["--ranks", "4", "--task", "{small}", "--storage", "nosql://x"], "PlanError: cannot open the study in nosql"),
    (["--ranks", "2x2x2", "--task", "{small}"], "rank triples are for method tucker, and the methods are cp"),
    (["--ranks", "4", "--task", "{small}", "--group-layers", "²"], "'²' is no number of layers"),
    (["--ranks", "4", "--task", "{small}", "--patience", "nan"], "patience is not a number"),
    (["--ranks", "4", "--task", "{small}", "--noise", "nan"], "noise is nan; expected a number from 0"),
    (["--ranks", "4", "--task", "{small}", "--compose", "-1"], "compose is -1; expected a number from 0"),
    (["--ranks", "4", "--task", "{small}", "--batch-tokens", "0"], "batch_tokens is 0; expected at least 1"),
    (["--ranks", "4", "--task", "{small}", "--device", "gpu"], "unknown device 'gpu'"),
    (["--ranks", "4", "--task", "{small}", "--device", "mps"], "device 'mps' is none that this runs on"),
    (["--ranks", "4"], "Missing option.*--task"),
    (["--task", "{small}"], "Missing option.*--ranks"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES)
def test_a_mistake_gives_exit_code_two(args, message, run, tasks, request):
    model, folder = (request.getfixturevalue(name) for name in ("model", "tmp_path"))
    code, out, err = run("sweep", model, *(arg.format(**tasks) for arg in args), "-o", folder / "study")
    assert code == 2, err
    assert out == ""
    assert (folder / "study").exists() == ("--storage" in args)
    assert re.search(message, re.sub(r"[\s│]+", " ", err)), err
    assert "Traceback" not in err


def test_a_database_takes_the_place_of_the_journal(model, tasks, tmp_path):
    options = FEW | {"storage": f"sqlite:///{tmp_path / 'study.db'}", "validation": 0.5}
    first = trawl.sweep(model, tasks["small"], tmp_path / "study", **options)
    assert not (tmp_path / "study" / "study.journal").exists()
    assert comparable(trawl.sweep(model, tasks["small"], tmp_path / "study", **options)) == comparable(first)
    elsewhere = trawl.sweep(model, tasks["small"], tmp_path / "elsewhere", **options)  # without the first one's scores
    assert comparable(elsewhere) == comparable(first)
    other = trawl.sweep(model, tasks["small"], tmp_path / "other", **options | {"ranks": (3, 4)})  # of its own study
    assert [row["rank"] for row in other.rows] == ["3", "4"]


def test_seeds_draw_different_parts(model, tasks, tmp_path):
    results = [
        trawl.sweep(model, tasks["small"], tmp_path / str(seed), **FEW, validation=0.5, seed=seed) for seed in (0, 1)
    ]
    one, other = (result.results["base"]["validation"]["objectives"]["log_loss"]["value"] for result in results)
    assert one != other
