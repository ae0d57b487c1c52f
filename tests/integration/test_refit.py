"""Refitted narrowings: the units that stay take over what was left out, in every family with a narrow form."""

import contextlib
import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import trawl_cli
from safetensors.torch import load_file, save_file

import trawl
from tests.integration.test_anchored import with_tokenizer
from tests.integration.test_calibrate import damage
from tests.integration.test_compress import StopError, weights_hash
from tests.integration.test_zoo import logits
from trawl.calibration import gathering, open_moments
from trawl.checkpoint import open_folder
from trawl.errors import CheckpointError, PlanError
from trawl.planning import match_checkpoint
from trawl.refitting import fitting

FAMILIES = ("gemma2", "phi3", "gpt2", "gpt_neox", "opt", "bert")


def run(folder, text, out, recipe=None, **options):
    values = {"method": "narrow", "width": 32} | (recipe or {})
    return trawl.compress(folder, trawl.Recipe(**values), out, calibrate=text, calibration_tokens=8192, **options)


def errors(report):
    return [stack.relative_error for stack in report.stacks if stack.roles[-1] == "down"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_fc_comes_nearer_to_what_it_computed(zoo, text, tmp_path, family):
    """Later ones are fitted on other inputs, so that their errors do not compare."""
    source = with_tokenizer(zoo(family), tmp_path / "model")
    plain = run(source, text, tmp_path / "plain")
    refitted = run(source, text, tmp_path / "refitted", {"refit": True})
    assert errors(refitted)[0] < 0.97 * errors(plain)[0]
    assert torch.isfinite(logits(family, tmp_path / "refitted")).all()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "refitted"))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}


@pytest.mark.parametrize("compute", ["float32", "bf16"])
def test_the_model_as_a_whole_stays_nearer(model, text, tmp_path, compute, monkeypatch):
    monkeypatch.setattr("trawl.refitting.running.multiplies_bfloat16", lambda _: True)
    run(model, text, tmp_path / "plain", {"compute": compute})
    run(model, text, tmp_path / "refitted", {"compute": compute, "refit": True})
    assert damage(tmp_path / "refitted", model, text) < 0.98 * damage(tmp_path / "plain", model, text)


def test_the_error_is_that_of_what_was_written(model, text, tmp_path):
    """The FC of layer 0 is run as stored, on what enters it in the original model; a token counts by its stream."""
    report = run(model, text, tmp_path / "out", {"refit": True, "layers": "0", "write": "factored"})
    given, streams = [], []
    original, narrow = (trawl.load(folder) for folder in (model, tmp_path / "out"))
    original.model.layers[0].mlp.register_forward_hook(lambda _, x, y: given.append((x[0], y)))
    original.model.layers[0].register_forward_hook(lambda _, x, y: streams.append(y))
    windows = open_moments(open_folder(model), match_checkpoint(open_folder(model)), text, 8192).windows
    with torch.no_grad():
        original(windows)
        (x, y), stream = given[0], streams[0]
        weight = 1 / (stream.square().mean(-1, keepdim=True) + 1e-6)
        missed = float((weight * (y - narrow.model.layers[0].mlp(x)).square()).sum())
    assert errors(report) == [pytest.approx((missed / float((weight * y.square()).sum())) ** 0.5, rel=1e-3)]


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_of_two_windows_one_judges(model, text, tmp_path, monkeypatch, windows):
    """They would fit into one batch, which would judge what was fitted to itself."""
    seen = []
    original = fitting.Refit.solve
    monkeypatch.setattr(fitting.Refit, "solve", lambda fc: seen.append((fc.fitted, fc.judged)) or original(fc))
    length = open_moments(open_folder(model), match_checkpoint(open_folder(model)), text, 8192).windows.shape[1]
    recipe = trawl.Recipe(method="narrow", width=32, refit=True, layers="0", write="factored")
    trawl.compress(model, recipe, tmp_path / "out", calibrate=text, calibration_tokens=windows * length)
    ((fitted, judged),) = seen
    assert (len(fitted), len(judged)) == (max(windows - 1, 1) * length, length)
    assert (fitted is judged) == (windows == 1)


def test_units_are_chosen_by_weighted_tokens(model, text, tmp_path, monkeypatch):
    """What chooses them is E[a aᵀ], each token by 1 / mean(h²) of the stream h behind the FC."""
    found, given, streams = [], [], []
    original = fitting.Refit.solve
    monkeypatch.setattr(fitting.Refit, "solve", lambda fc: found.append(fc.second) or original(fc))
    run(model, text, tmp_path / "out", {"refit": True, "layers": "0", "write": "factored"})
    source = trawl.load(model)
    source.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, x: given.append(x[0].flatten(0, -2)))
    source.model.layers[0].register_forward_hook(lambda _, x, y: streams.append(y.flatten(0, -2)))
    with torch.no_grad():
        source(open_moments(open_folder(model), match_checkpoint(open_folder(model)), text, 8192).windows)
    weight = 1 / (streams[0].square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(found[0], (weight * given[0]).T @ given[0] / weight.sum(), rtol=1e-3, atol=1e-6)


def test_a_later_fc_repairs_half_of_what_the_stream_misses(model, text, tmp_path, monkeypatch):
    """With none of it the whole model is further from the original."""
    found = {}
    for share in (0.0, 0.5):
        monkeypatch.setattr(fitting, "REPAIRED", share)
        run(model, text, tmp_path / str(share), {"refit": True})
        found[share] = damage(tmp_path / str(share), model, text)
    assert found[0.5] < 0.98 * found[0.0]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "bert"])
def test_only_an_fc_that_is_added_to_the_stream_repairs_it(zoo, text, tmp_path, monkeypatch, family):
    adds = family in ("llama", "gpt_neox")
    source = with_tokenizer(zoo(family), tmp_path / "model")
    for share in (0.0, 0.5):
        monkeypatch.setattr(fitting, "REPAIRED", share)
        run(source, text, tmp_path / str(share), {"refit": True})
    assert (weights_hash(tmp_path / "0.0") != weights_hash(tmp_path / "0.5")) == adds


def test_other_stacks_of_the_plan_are_part_of_what_feeds_an_fc(model, text, tmp_path):
    """With q cut to nothing, the FC behind it is fitted to other inputs than with q whole."""
    narrow, q = {"method": "narrow", "width": 32, "layers": "1"}, {"method": "svd", "rank": 1, "roles": "q"}
    written = []
    for name, parts in (("alone", [narrow]), ("together", [narrow, q])):
        recipe = {"method": "mixed", "parts": parts, "refit": True, "write": "factored"}
        trawl.compress(model, trawl.Recipe(**recipe), tmp_path / name, calibrate=text, calibration_tokens=8192)
        written.append(load_file(tmp_path / name / "model.safetensors")["model.layers.1.mlp.down_proj.weight"])
    assert not torch.equal(*written)


def test_output_weighting_trades_one_output_for_another(model, text, tmp_path):
    recipe = {"refit": True, "output_weighting": "kronecker"}
    weighted = run(model, text, tmp_path / "weighted", recipe)
    even = run(model, text, tmp_path / "even", {"refit": True})
    assert errors(weighted) != errors(even)


def test_what_does_not_help_on_the_rest_of_the_text_is_dropped(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting.Linearised, "changes", lambda problem: [-10.0 * problem.reader] * 2)
    run(model, text, tmp_path / "refitted", {"refit": True})
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "refitted" / "model.safetensors")
    for layer in range(3):
        for role in ("gate", "up"):
            name = f"model.layers.{layer}.mlp.{role}_proj.weight"
            rows = {tuple(row) for row in before[name].tolist()}
            assert all(tuple(row) in rows for row in after[name].tolist())


@pytest.mark.parametrize("draws", [False, True])
def test_the_tokens_that_judge_choose_the_ridge(model, text, tmp_path, monkeypatch, draws):
    """Where they are what the reader had given, the ridge that draws to it stays, however it fits the others."""
    chosen, original = [], fitting.Refit.solve

    def solve(fc):
        kept, low = torch.arange(32), torch.randn(32, 32, dtype=torch.float64)
        rows = {part: fc._stored(part)[kept].double() for part in fc.inner.writers}
        if draws:
            ((_, pre),) = fc._pre(rows, fc.judged, kept)
            fc.judged = replace(fc.judged, y=fc.inner(pre) @ low.float())
        chosen.append(fc._with_reader(rows, low, kept).ridge)
        return original(fc)

    monkeypatch.setattr(fitting.Refit, "solve", solve)
    run(model, text, tmp_path / "out", {"refit": True, "layers": "0", "write": "factored"})
    assert chosen == [max(fitting.RIDGES) if draws else min(fitting.RIDGES)]


def test_the_reader_of_all_tokens_has_the_ridge_that_was_chosen(model, text, tmp_path, monkeypatch):
    """Where all batches are fitted to and judge, solving once more must give the same."""
    readers, original = [], fitting.Refit._narrowing
    monkeypatch.setattr(fitting, "RIDGES", (1.0,))
    monkeypatch.setattr(fitting, "judging", lambda batches: set(range(batches)))
    monkeypatch.setattr(
        fitting.Refit,
        "_narrowing",
        lambda fc, weights, *rest: readers.append((weights, found := original(fc, weights, *rest))) or found,
    )
    recipe = trawl.Recipe(method="narrow", width=32, refit=True)
    trawl.compress(model, recipe, tmp_path / "out", calibrate=text, calibration_tokens=2048)
    assert len(readers) == 3
    for weights, found in readers:
        assert not torch.equal(weights.reader, weights.towards)
        torch.testing.assert_close(found.reader.double(), weights.reader)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_slopes_are_those_of_the_model_s_own_code(zoo, text, tmp_path, monkeypatch, family):
    """By central differences, for each writer; each unit depends on its own pre-activation alone."""
    checked, original = [], fitting.Refit.solve

    def solve(fc):
        pre = {part: torch.randn(7, 48) for part in fc.inner.writers}
        units, slopes = fc.inner.slopes(pre)
        torch.testing.assert_close(units, fc.inner(pre))
        for part, slope in zip(fc.inner.writers, slopes, strict=True):
            up, down = (fc.inner({**pre, part: pre[part] + step}) for step in (1e-2, -1e-2))
            torch.testing.assert_close(slope, (up - down) / 2e-2, rtol=1e-2, atol=1e-3)
            checked.append(part.role)
        return original(fc)

    monkeypatch.setattr(fitting.Refit, "solve", solve)
    run(with_tokenizer(zoo(family), tmp_path / "model"), text, tmp_path / "out", {"refit": True})
    assert set(checked) == ({"up"} if family == "gpt2" else {"gate", "up"})


def test_what_writes_the_units_really_changes(model, text, tmp_path):
    run(model, text, tmp_path / "refitted", {"refit": True})
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "refitted" / "model.safetensors")
    for name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        rows = {tuple(row) for row in before[name].tolist()}
        assert not any(tuple(row) in rows for row in after[name].tolist())


def test_units_that_depend_on_one_another_are_refused(model, text, tmp_path, monkeypatch):
    original = fitting.InnerFunction.__call__
    normed = lambda inner, pre: torch.nn.functional.normalize(original(inner, pre), dim=-1)  # noqa: E731 (a patch)
    monkeypatch.setattr(fitting.InnerFunction, "__call__", normed)
    with pytest.raises(PlanError, match="FC of layer 0 cannot be refitted: its units depend on one another; pass"):
        run(model, text, tmp_path / "out", {"refit": True})
    assert not (tmp_path / "out").exists()


def test_an_interrupted_refit_is_gone_on_with(model, text, tmp_path, monkeypatch):
    run(model, text, tmp_path / "whole", {"refit": True})

    def stop(stage, done, total):
        if stage == "refitting" and done == 1:
            raise StopError

    with pytest.raises(StopError):
        run(model, text, tmp_path / "out", {"refit": True}, observer=stop)
    solved = []
    original = fitting.Refit.solve
    monkeypatch.setattr(fitting.Refit, "solve", lambda fc: solved.append(fc) or original(fc))
    run(model, text, tmp_path / "out", {"refit": True}, resume=True)
    assert [fc.inner.block.number for fc in solved] == [1, 2]
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")


def test_only_a_plain_budget_refits_by_itself():
    assert trawl.Recipe(keep=0.8, plain=True).refit
    assert not trawl.Recipe(keep=0.8).refit
    assert trawl.Recipe(keep=0.8, refit=True).refit


def test_a_plain_budget_refits_unless_told_otherwise(model, text, tmp_path):
    for name, more in (("with", {}), ("without", {"refit": False})):
        recipe = trawl.Recipe(keep=0.8, plain=True, **more)
        trawl.compress(model, recipe, tmp_path / name, calibrate=text, calibration_tokens=8192)
        assert json.loads((tmp_path / name / "trawl.json").read_text())["identity"]["recipe"]["refit"] == (not more)
    assert damage(tmp_path / "with", model, text) < damage(tmp_path / "without", model, text)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"method": "svd", "rank": 4}, "refit is for units that narrow keeps, and the method is svd"),
        ({"method": "narrow", "width": 32, "anchored": True}, "refit fits to what the original model computes, and an"),
    ],
)
def test_a_recipe_that_a_refit_does_not_go_with_is_refused(recipe, message):
    with pytest.raises(PlanError, match=message):
        trawl.Recipe(**recipe, refit=True)


def test_a_refit_without_a_text_is_refused(model, tmp_path):
    narrow = trawl.Recipe(method="narrow", width=32, refit=True)
    budget, plain = trawl.Recipe(keep=0.8, refit=True), trawl.Recipe(keep=0.8, plain=True, refit=True)
    search = partial(trawl.find_recipe, folder=tmp_path / "search")
    starts = (
        (trawl.plan, narrow),
        (trawl.compress, narrow),
        (trawl.compress, budget),
        (search, budget),
        (search, plain),
    )
    for start, recipe in starts:
        with pytest.raises(PlanError, match="a refit needs what the model computes on a text"):
            start(model, recipe)
    assert not (tmp_path / "search").exists()


def test_a_plain_budget_without_a_text_says_that_nothing_is_refitted(model, tmp_path, caplog):
    trawl.compress(model, trawl.Recipe(keep=0.9, plain=True), tmp_path / "out")
    assert "on random tokens, and nothing is refitted. Expect" in caplog.text
    assert not json.loads((tmp_path / "out" / "trawl.json").read_text())["identity"]["recipe"]["refit"]


def test_a_recipe_that_narrows_nothing_needs_no_text(model, tmp_path):
    parts = ({"method": "svd", "rank": 4, "roles": "q", "group_layers": 1},)
    recipe = trawl.Recipe(method="mixed", parts=parts, write="factored", refit=True)  # as a budget may find it
    assert trawl.compress(model, recipe, tmp_path / "out").stacks


def test_plan_says_what_a_refit_takes(model, text):
    recipe = trawl.Recipe(method="narrow", width=32, refit=True)
    notes = trawl.plan(model, recipe, calibrate=text, calibration_tokens=8192).notes
    assert any("both models run on up to 8,192 tokens of sea.txt, and FCs are refitted to" in note for note in notes)


def test_a_layer_that_overflows_is_named(model, text, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(model, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="layer 1 gives NaN or Inf on the calibration text; check its weights"):
        run(source, text, tmp_path / "out", {"refit": True})


@pytest.mark.parametrize("kept", [True, False], ids=["moments", "no moments"])
def test_moments_that_nothing_reads_are_made_only_to_be_kept(model, text, tmp_path, monkeypatch, kept):
    """A refit runs the model itself."""
    passes, gather = [], gathering.gather
    monkeypatch.setattr(gathering, "gather", lambda *args: passes.append(1) or gather(*args))
    more = {"moments": tmp_path / "moments"} if kept else {}
    recipe = trawl.Recipe(method="narrow", width=32, refit=True)
    run(model, text, tmp_path / "out", {"refit": True}, **more)
    assert len(passes) == kept
    notes = trawl.plan(model, recipe, calibrate=text, calibration_tokens=8192, **more).notes
    assert any("GB of work files" in note for note in notes) == kept
    record = json.loads((tmp_path / "out" / "trawl.json").read_text())
    assert record["calibration"]["tokens"] == 8192
    assert record["calibration"]["fingerprint"] == record["identity"]["moments"]


def test_the_command_line(model, text, tmp_path, monkeypatch):
    command = ["trawl", "compress", str(model), "--method", "narrow", "--width", "32", "--calibrate", str(text)]
    monkeypatch.setattr("sys.argv", [*command, "--calibration-tokens", "2048", "--refit", "-o", str(tmp_path / "out")])
    with contextlib.suppress(SystemExit):
        trawl_cli.main()
    assert "refitted on 2,048 tokens of sea.txt" in (tmp_path / "out" / "README.md").read_text()
