"""Refitted narrowings: the units that stay take over what was left out, in every family with a narrow form."""

import contextlib
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import trawl_cli
from safetensors.torch import load_file
from transformers import AutoTokenizer

import trawl
from tests.integration.test_anchored import with_tokenizer
from tests.integration.test_calibrate import damage
from tests.integration.test_compress import StopError, weights_hash
from tests.integration.test_eval import sentence
from tests.integration.test_zoo import logits
from trawl.calibration import open_moments
from trawl.checkpoint import open_folder
from trawl.errors import PlanError
from trawl.narrowing import NarrowedTensors, Narrowing, cuts, padded_tensors
from trawl.planning import match_checkpoint
from trawl.refitting import fitting, outputs

FAMILIES = ("gemma2", "phi3", "gpt2", "gpt_neox", "opt", "bert")


@pytest.fixture(scope="module")
def model(zoo, tmp_path_factory):
    """A tiny llama with its tokenizer, never to be written to."""
    return with_tokenizer(zoo("llama"), tmp_path_factory.mktemp("refit") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "sea.txt"
    path.write_text(sentence(3, 9000), encoding="utf-8")
    return path


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


@pytest.mark.parametrize("biased", [False, True])
def test_o_takes_over_half_of_what_the_stream_misses_by_weighted_least_squares(model, text, monkeypatch, biased):
    monkeypatch.setattr(outputs, "RIDGES", (0.1,))
    calibration = open_moments(open_folder(model), match_checkpoint(open_folder(model)), text, 8192)
    original = calibration.chain.enter(calibration.windows.split(1))
    torch.manual_seed(0)
    shift = 0.1 * torch.randn(original[0].hidden.shape[-1], original[0].hidden.shape[-1])
    compressed = [replace(batch, hidden=batch.hidden + batch.hidden @ shift) for batch in original]
    with calibration.chain.loaded(1) as block:
        name, o = "self_attn.o_proj.weight", block.layer.self_attn.o_proj
        stored = o.weight.detach().T.clone()
        bias = torch.randn(stored.shape[1]) if biased else None
        found = outputs.refit_o(block, name, stored, original, compressed, bias=bias)
        read = []
        hook = o.register_forward_pre_hook(lambda _, x: read.append(x[0].flatten(0, -2).double()))
        for batch in (*original, *compressed):
            block.run(batch)
        hook.remove()
    before, now = (torch.cat(read[part]) for part in (slice(len(original)), slice(len(original), None)))
    entered = [torch.cat([batch.hidden.flatten(0, -2) for batch in batches]) for batches in (original, compressed)]
    wanted = entered[0] + before @ stored.double()
    missing = wanted - entered[1] - now @ stored.double()
    stream = wanted if bias is None else wanted + bias
    weighed = now / (stream.square().mean(1, keepdim=True) + 1e-6)
    gram = weighed.T @ now
    change = torch.linalg.solve(gram + 0.1 * gram.diagonal().diag(), weighed.T @ missing / 2)
    assert float((missing - now @ change).norm()) < 0.9 * float(missing.norm())
    torch.testing.assert_close(found.double() - stored, change, rtol=1e-3, atol=1e-5)


def test_o_stays_where_the_judging_tokens_miss_something_else(model, text):
    calibration = open_moments(open_folder(model), match_checkpoint(open_folder(model)), text, 8192)
    original = calibration.chain.enter(calibration.windows.split(1))[:16]
    compressed = [replace(batch, hidden=batch.hidden + 0.1) for batch in original]
    other = [*original[:15], replace(original[15], hidden=original[15].hidden + 0.2)]  # the last one judges
    with calibration.chain.loaded(1) as block:
        stored = block.layer.self_attn.o_proj.weight.detach().T.clone()
        find = partial(outputs.refit_o, block, "self_attn.o_proj.weight", stored)
        assert find(original, compressed) is not None
        assert find(other, compressed) is None
        assert find(original, original) is None

        assert find(original[:1], compressed[:1]) is None  # nothing is left to judge


@pytest.mark.parametrize("alike", [True, False])
def test_the_tokens_that_judge_choose_how_far_o_goes(model, text, monkeypatch, alike):
    """Where they miss half of what the others do, the ridge that lets it grow least."""
    tried, grown = [], outputs._grown
    monkeypatch.setattr(outputs, "_grown", lambda o, problem: tried.append(problem) or grown(o, problem))
    calibration = open_moments(open_folder(model), match_checkpoint(open_folder(model)), text, 8192)
    original = calibration.chain.enter(calibration.windows.split(1))[:16]
    compressed = [replace(batch, hidden=batch.hidden + 0.1) for batch in original]
    near = replace(original[15], hidden=original[15].hidden + (0 if alike else 0.05))
    with calibration.chain.loaded(1) as block:
        stored = block.layer.self_attn.o_proj.weight.detach().T.clone()
        outputs.refit_o(block, "self_attn.o_proj.weight", stored, [*original[:15], near], compressed)
    ridges = [float((problem.ridge / problem.second.diagonal()).median()) for problem in tried]
    assert ridges[:-1] == pytest.approx(outputs.RIDGES)
    assert ridges[-1] == pytest.approx(min(outputs.RIDGES) if alike else max(outputs.RIDGES))


def test_what_is_kept_of_o_is_run_and_written(model, text):
    recipe = trawl.Recipe(method="narrow", width=32, refit=True)
    planned = trawl.plan(model, recipe, calibrate=text, calibration_tokens=8192)
    cut = planned.narrowed.cuts[1]
    found = Narrowing(torch.arange(32), torch.zeros(32, 32), None, 0.0, 0.0, o=torch.randn(cut.o.shape))
    for given in (
        padded_tensors(planned.checkpoint, cut, found)[cut.o.tensor],
        NarrowedTensors(planned.checkpoint, planned.narrowed, lambda _: found).get(cut.o.tensor),
    ):
        torch.testing.assert_close(given, found.o.T, rtol=0, atol=0)


def changed_o(source, out):
    """Layers whose o is another."""
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    o = {part.layer: part.tensor for part in match_checkpoint(open_folder(source)).placements if part.role == "o"}
    return {layer for layer in o if not torch.equal(before[o[layer]], after[o[layer]])}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "opt", "gemma2", "bert"])
def test_o_changes_behind_the_first_fc_where_it_is_added_to_the_stream(zoo, text, tmp_path, family):
    source = with_tokenizer(zoo(family), tmp_path / "model")
    run(source, text, tmp_path / "out", {"refit": True})
    changed = changed_o(source, tmp_path / "out")
    assert 0 not in changed
    assert (2 in changed) == (family not in ("gemma2", "bert"))


@pytest.mark.parametrize(
    "recipe",
    [
        {"kv_heads": 1},
        {"roles": "fc"},
        {"method": "mixed", "width": None, "write": "factored", "parts": [{"method": "narrow", "width": 32}]},
    ],
)
def test_o_stays_where_it_is_cut_itself_or_not_of_the_recipe(model, text, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr("trawl.refitting.running.refit_o", None)
    run(model, text, tmp_path / "out", {"refit": True} | recipe)


def test_a_layer_without_an_o_leaves_the_others_theirs(model, text, tmp_path, monkeypatch):
    found = cuts._own_outputs
    monkeypatch.setattr(cuts, "_own_outputs", lambda match: {2: found(match)[2]})
    run(model, text, tmp_path / "out", {"refit": True})
    assert changed_o(model, tmp_path / "out") == {2}


def test_o_in_bfloat16_and_in_front_of_narrower_fcs_alone(zoo, text, tmp_path):
    source = with_tokenizer(zoo("llama", dtype=torch.bfloat16), tmp_path / "model")
    run(source, text, tmp_path / "out", {"refit": True, "width": (32, 48, 40), "write": "factored"})
    assert changed_o(source, tmp_path / "out") == {2}
    assert torch.isfinite(trawl.load(tmp_path / "out")(torch.arange(9)[None]).logits).all()


def test_what_a_refit_changed_is_named(model, text, tmp_path):
    run(model, text, tmp_path / "out", {"refit": True})
    layers = changed_o(model, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "trawl.json").read_text())
    named = {stack["layers"][0]: stack["refitted_o"] for stack in record["stacks"] if stack["refitted_o"]}
    assert named == {layer: f"model.layers.{layer}.self_attn.o_proj.weight" for layer in layers}
    assert "FCs, and o of layers 1-2 were refitted on 8,192 tokens" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("roles", ["all", "fc"])
def test_a_plain_budget_changes_o_where_it_is_selected(model, text, tmp_path, roles):
    recipe = trawl.Recipe(keep=0.8, plain=True, roles=roles)
    trawl.compress(model, recipe, tmp_path / "out", calibrate=text, calibration_tokens=8192)
    assert changed_o(model, tmp_path / "out") == ({1, 2} if roles == "all" else set())


def test_with_o_the_model_stays_nearer_on_other_text(model, text, tmp_path, monkeypatch):
    run(model, text, tmp_path / "with", {"refit": True})
    monkeypatch.setattr("trawl.refitting.running.refit_o", lambda *_, **__: None)
    run(model, text, tmp_path / "without", {"refit": True})
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer(sentence(seed, 200), return_tensors="pt")["input_ids"][:, :60] for seed in range(5, 25)]
    with torch.no_grad():
        whole, with_o, without = (
            torch.stack([loaded(ids).logits for ids in texts])
            for loaded in map(trawl.load, (model, tmp_path / "with", tmp_path / "without"))
        )
    assert float((with_o - whole).norm()) < 0.997 * float((without - whole).norm())


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
    """A single batch is fitted to and judges, so that solving once more must give the same."""
    readers, original = [], fitting.Refit._narrowing
    monkeypatch.setattr(fitting, "RIDGES", (1.0,))
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


@pytest.mark.parametrize("layers", [1, 2])
def test_an_interrupted_refit_is_gone_on_with(model, text, tmp_path, monkeypatch, layers):
    run(model, text, tmp_path / "whole", {"refit": True})

    def stop(stage, done, total):
        if stage == "refitting" and done == layers:
            raise StopError

    with pytest.raises(StopError):
        run(model, text, tmp_path / "out", {"refit": True}, observer=stop)
    solved = []
    original = fitting.Refit.solve
    monkeypatch.setattr(fitting.Refit, "solve", lambda fc: solved.append(fc) or original(fc))
    run(model, text, tmp_path / "out", {"refit": True}, resume=True)
    assert [fc.inner.block.number for fc in solved] == [1, 2][layers - 1 :]
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
    narrow, budget = trawl.Recipe(method="narrow", width=32, refit=True), trawl.Recipe(keep=0.8, refit=True)
    search, plain = (
        partial(trawl.find_recipe, folder=tmp_path / "search"),
        trawl.Recipe(keep=0.8, plain=True, refit=True),
    )
    starts = [
        (trawl.compress, narrow),
        (trawl.plan, narrow),
        (trawl.compress, budget),
        (search, budget),
        (search, plain),
    ]
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
    assert any(
        "both models run on up to 8,192 tokens of sea.txt, and FCs, and o in front of them, are refitted to" in note
        for note in notes
    )


def test_the_command_line(model, text, tmp_path, monkeypatch):
    command = ["trawl", "compress", str(model), "--method", "narrow", "--width", "32", "--calibrate", str(text)]
    monkeypatch.setattr("sys.argv", [*command, "--calibration-tokens", "2048", "--refit", "-o", str(tmp_path / "out")])
    with contextlib.suppress(SystemExit):
        trawl_cli.main()
    assert "refitted on 2,048 tokens of that text" in (tmp_path / "out" / "README.md").read_text()
