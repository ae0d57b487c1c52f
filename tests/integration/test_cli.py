"""The command line as a user types it: output, exit codes, one line for a mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trawl_cli
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``trawl ARGS`` in this process: (exit code, standard output, standard error)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trawl", *map(str, args)])
        try:
            trawl_cli.main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_compress_then_diff_then_plan(run, zoo, tmp_path):
    source, out = zoo("llama", 3), tmp_path / "out"
    code, text, err = run("compress", source, "--rank", 4, "--layers", "1-2", "--roles", "fc", "-o", out)
    assert code == 0, err
    assert re.search(r"fc\.1-2 .* 6 x 48 x 32 .* 6 x 4 x 4 ", text)
    assert "kept energy" in text
    assert f"wrote {out} in" in text

    code, text, _ = run("diff", source, out)
    assert code == 0
    equal, total = map(int, re.search(r"(\d+) of (\d+) tensors are byte-identical, 6 differ", text).groups())
    assert total - equal == 6
    code, text, _ = run("diff", source, out, "--json")
    changed = {entry["name"]: entry for entry in json.loads(text) if entry["change"] != "equal"}
    assert len(changed) == 6
    record = json.loads((out / "trawl.json").read_text())
    (stack,) = record["stacks"]
    assert sorted(changed) == sorted(stack["tensors"])
    norms = {name: float(tensor.double().norm()) for name, tensor in load_all(source).items()}
    total_error = sum((changed[name]["relative_error"] * norms[name]) ** 2 for name in changed) ** 0.5
    total_norm = sum(norms[name] ** 2 for name in changed) ** 0.5
    assert stack["relative_error"] == pytest.approx(total_error / total_norm, rel=1e-5)
    assert run("diff", source, source)[1].strip().endswith("0 differ")


def load_all(folder: Path) -> dict:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_json_is_the_whole_standard_output(run, zoo, tmp_path):
    source = zoo("llama")
    for args in (
        ("inspect", source),
        ("plan", source, "--rank", 4),
        ("compress", source, "--rank", 4, "-o", tmp_path / "out"),
    ):
        run("--version")  # takes what making the zoo has printed
        code, out, err = run(*args, "--json")
        assert code == 0
        assert json.loads(out)
        assert err == ""


def test_inspect_says_what_the_model_is(run, zoo):
    code, text, _ = run("inspect", zoo("llama"))
    assert code == 0
    assert "family llama, 3 layers" in text
    assert re.search(r"down\s.* 48 x 32 .* F32 ", text)
    assert re.search(r"attn-qo\.0-2 .* 6 x 32 x 32", text)
    assert re.search(r"attn-kv\.0-2 .* 6 x 16 x 32", text)


def test_plan_reads_no_weights_and_is_the_same_every_time(run, zoo, tmp_path):
    source = shutil.copytree(zoo("llama"), tmp_path / "model")
    path = source / "model.safetensors"
    size = path.stat().st_size
    length = int.from_bytes(path.read_bytes()[:8], "little") + 8
    header = path.read_bytes()[:length]
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)  # zeros in place of weights
    os.chdir(tmp_path)
    code, out, _ = run("plan", "model", "--rank", 4, "--layers", "1-2", "--json")
    assert code == 0
    check_golden("plan_llama.json", out)


HELPS = ("", "inspect", "plan", "compress", "densify", "diff", "eval", "report", "sample", "sweep")


@pytest.mark.parametrize("command", HELPS)
def test_help_is_as_it_was_reviewed(command, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    code, out, _ = run(*([command] if command else []), "--help")
    assert code == 0
    assert "xample:" in out
    check_golden(f"help_{command or 'trawl'}.txt", out)


def check_golden(name: str, text: str) -> None:
    """Compare with the reviewed file; ``TRAWL_GOLDEN=write`` writes it anew."""
    path = GOLDEN / name
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if os.environ.get("TRAWL_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_save_recipe_and_recipe_give_the_same_plan(run, zoo, tmp_path):
    options = ("--method", "tucker", "--rank", "2,3,4", "--layers", "1", "--roles", "up,gate", "--seed", 3)
    code, text, _ = run("plan", zoo("llama"), *options, "--save-recipe")
    assert code == 0
    (tmp_path / "recipe.yaml").write_text(text)
    _, by_options, _ = run("plan", zoo("llama"), *options, "--json")
    _, by_file, _ = run("plan", zoo("llama"), "--recipe", tmp_path / "recipe.yaml", "--json")
    assert by_options == by_file
    _, overridden, _ = run("plan", zoo("llama"), "--recipe", tmp_path / "recipe.yaml", "--layers", "2", "--json")
    assert json.loads(overridden)["stacks"][0]["layers"] == [2]


MISTAKES = [
    (["{model}"], "no rank given; pass --rank"),
    (["{tmp}/absent", "--rank", "4"], "no such folder: .*absent"),
    (["./absent", "--rank", "4"], "no such folder: ./absent"),
    (["nobody/nothing", "--rank", "4"], "no such folder: nobody/nothing; as a hub id .* HF_HUB_OFFLINE is set"),
    (["{tmp}/absent.gguf", "--rank", "4"], "no such file: .*absent.gguf"),
    (["{model}", "--rank", "0"], "rank.* 0"),
    (["{model}", "--rank", "-3"], "rank.* -3"),
    (["{model}", "--rank", "4.5"], "'4.5' is not a rank; .*; see trawl compress --help"),
    (["{model}", "--rank", "4,4"], "has 2 parts"),
    (["{model}", "--rank", "33", "--method", "svd"], "stack q.0: .*33.* rank up to 32"),
    (["{model}", "--rank", "100000", "--layers", "1"], "100000 .* give a rank up to 64"),
    (["{model}", "--rank", "4,33,2", "--method", "tucker"], "inner rank 33 .* up to 32"),
    (["{model}", "--rank", "2,2,2", "--method", "cp"], "is a triple; cp takes one integer"),
    (["{model}", "--rank", "4", "--layers", "9"], "the model has layers 0-2, so 9 is outside it"),
    (["{model}", "--rank", "4", "--layers", "2-1"], "reversed; write 1-2"),
    (["{model}", "--rank", "4", "--roles", "gat"], "unknown role 'gat'; did you mean 'gate'"),
    (["{model}", "--rank", "4", "--method", "tuckr"], "unknown method 'tuckr'; did you mean 'tucker'"),
    (["{model}", "--rank", "4", "--group-layers", "0"], "group_layers is 0"),
    (["{model}", "--rank", "4", "--share", "input"], "the method is cp; pass --method svd, or leave --share out"),
    (
        ["{model}", "--rank", "31", "--write", "factored", "--layers", "1"],
        r"stack attn-kv\.1: at rank 31 .* 1,550 parameters, its matrices 1,024; use a rank up to 20, the break-even",
    ),
    (["{model}", "--rank", "4", "--recipe", "{tmp}/absent.yaml"], "cannot read recipe .*absent.yaml"),
    (["{model}", "--rank", "4", "--recipe", "{tmp}/bad.yaml"], "unknown key 'rnak'; did you mean 'rank'"),
    (["{model}", "--rank", "4", "--family", "{tmp}/absent.yaml"], "absent.yaml"),
    (["{model}", "--rank", "4", "--revision", "main"], "--revision main goes with a hub id"),
    (["{model}", "--rank", "4", "--device", "cuda:0"], "not on this machine"),
    (["{model}", "--rank", "4", "--device", "gpu"], "unknown device 'gpu'"),
    (
        ["{model}", "--rank", "4", "--nonsense"],
        "trawl compress: No such option '--nonsense'.*; see trawl compress --help",
    ),
    (["{model}", "{model}", "--rank", "4"], "trawl compress: Got unexpected extra argument"),
    (["{model}", "--rank", "4", "--factor-dtype", "bfloat16"], "a dense output stores no factors; pass --write"),
]


@pytest.mark.parametrize(
    ("args", "message"), MISTAKES, ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else ""
)
def test_a_mistake_gives_one_line_exit_code_two_and_writes_nothing(args, message, run, zoo, tmp_path):
    import torch

    if "cuda:0" in args and torch.cuda.is_available():
        pytest.skip("the machine has the GPU whose absence is tested")
    (tmp_path / "bad.yaml").write_text("rnak: 4\n")
    model = zoo("llama")
    filled = [arg.format(model=model, tmp=tmp_path) for arg in args]
    code, out, err = run("compress", *filled, "-o", tmp_path / "out")
    assert code == 2
    assert out == ""
    assert re.search(message, err), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_debug_shows_the_traceback(run, tmp_path):
    code, _, err = run("compress", tmp_path / "absent", "--rank", 4, "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("CheckpointError: ")


def test_an_existing_output_and_a_default_name(run, zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = zoo("llama")
    assert run("compress", source, "--rank", 4)[0] == 0
    out = tmp_path / f"{source.name}-cp-r4"
    assert (out / "trawl.json").exists()
    code, _, err = run("compress", source, "--rank", 4)
    assert code == 2
    assert "pass --overwrite" in err
    assert run("compress", source, "--rank", 4, "--overwrite")[0] == 0


def test_ctrl_c_says_how_to_go_on(zoo, tmp_path):
    code = (
        "import sys, trawl.compressing as p, trawl_cli\n"
        "def stop(*a): raise KeyboardInterrupt\n"
        "p.write_shards = stop\n"
        "sys.argv = ['trawl', 'compress', sys.argv[1], '--rank', '4', '-o', sys.argv[2]]\n"
        "trawl_cli.main()\n"
    )
    command = [sys.executable, "-c", code, str(zoo("llama")), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out.partial" / "factors").exists()


def test_help_imports_nothing_heavy():
    code = (
        "import sys, trawl_cli; print([m for m in ('torch', 'transformers', 'tensorly', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
