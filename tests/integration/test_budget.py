"""Budgets end to end: met on disk and never exceeded, loadable, resumed, and refused where they cannot be."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trawl
from tests.integration.test_calibrate import cli, model, text  # noqa: F401 (fixtures)
from tests.integration.test_compress import weights_hash
from tests.integration.test_zoo import logits
from trawl.budget import SEARCH_RECORD, Question, finding, searching
from trawl.budget import damage as damage_module
from trawl.budget.ledger import Measured
from trawl.calibration import gathering
from trawl.errors import CheckpointError, PlanError
from trawl.hub import open_checkpoint
from trawl.output import write_shards
from trawl.planning import match_checkpoint

TOKENS = 512


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level("ERROR", "trawl")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of moments and damages that tests share; each part is measured once."""
    return tmp_path_factory.mktemp("search")


def compress(source, out, words, kept=None, *, resume=False, **options):
    recipe = trawl.Recipe(**options)
    return trawl.compress(source, recipe, out, calibrate=words, calibration_tokens=TOKENS, moments=kept, resume=resume)


def of_layers(folder):
    checkpoint = open_checkpoint(folder)
    return sum(math.prod(part.shape) for part in match_checkpoint(checkpoint).placements)


def stored(folder):
    return sum(tensor.numel() for path in folder.glob("*.safetensors") for tensor in load_file(path).values())


@pytest.mark.parametrize("keep", [0.5, 0.71, 0.9])
def test_a_share_is_met_on_disk_and_never_exceeded(keep, model, text, kept, tmp_path):  # noqa: F811
    report = compress(model, tmp_path / "out", text, kept, keep=keep)
    lost = stored(model) - stored(tmp_path / "out")
    share = 1 - lost / of_layers(model)
    step = 40 * 8 / of_layers(model)  # of one rank step, of matrices that are tiny
    assert keep - step <= share <= keep
    found = json.loads((tmp_path / "out" / SEARCH_RECORD).read_text())
    assert found["kept"] == pytest.approx(share)
    made = {stack.name for stack in report.stacks}
    assert made == {name for piece in found["pieces"] for name in names_of(piece)}


def test_a_share_of_bfloat16_is_met_in_bytes_with_the_orders_of_rows(model, text, tmp_path):  # noqa: F811
    """An order's integers have eight bytes each, four times what an entry of a matrix has."""
    source = tmp_path / "model"
    shutil.copytree(model, source)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(source)
    compress(source, tmp_path / "out", text, keep=0.8)
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (source, tmp_path / "out")
    )
    assert any(name.endswith("_order") for name in after)
    lost = sum(tensor.nbytes for tensor in before.values()) - sum(tensor.nbytes for tensor in after.values())
    assert 0.77 <= 1 - lost / (2 * of_layers(source)) <= 0.8


def names_of(piece):
    """Names of the stacks that a piece becomes; a rank of 0 is a matrix that stays dense."""
    if piece["structure"] in ("dense", "narrow"):
        return [piece["name"]] * (piece["structure"] == "narrow")
    if piece["structure"] in ("tucker", "cp"):
        return [piece["name"]]
    groups = piece["roles"]
    if piece["structure"] == "joint":
        groups = ["gateup", "down"] if "gate" in groups else [piece["name"].partition(".")[0]]
    return [f"{group}.{piece['layer']}" for group, rank in zip(groups, piece["sizes"], strict=True) if rank]


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
def test_matrices_that_are_stored_in_one_tensor_are_decomposed_together(family, zoo, tmp_path):
    """Factors stand in for whole tensors, and q, k and v, or gate and up, are parts of one here."""
    source = zoo(family)
    for keep in (0.6, 0.8):
        options = {"calibration_tokens": TOKENS, "moments": tmp_path / "moments"}
        trawl.compress(source, trawl.Recipe(keep=keep), tmp_path / str(keep), **options)
        assert 1 - (stored(source) - stored(tmp_path / str(keep))) / of_layers(source) <= keep
        assert torch.isfinite(logits(family, tmp_path / str(keep))).all()
    pieces = json.loads((tmp_path / "0.6" / SEARCH_RECORD).read_text())["pieces"]
    assert {piece["structure"] for piece in pieces if "q" in piece["roles"]} <= {"dense", "joint", "shared"}
    with pytest.raises(PlanError, match=r"roles 'q' leave out k, and .* holds q, k, v in one; a budget takes whole"):
        trawl.compress(source, trawl.Recipe(keep=0.8, roles="q"), tmp_path / "out")


def test_one_width_and_nothing_else_is_an_ordinary_checkpoint(model, text, tmp_path, monkeypatch):  # noqa: F811
    """As a search may find it: with nothing to describe, the config says nothing of trawl."""
    recipe = trawl.Recipe(method="mixed", write="factored", parts=({"method": "narrow", "width": 32},))
    trawl.compress(model, recipe, tmp_path / "out", calibrate=text, calibration_tokens=TOKENS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["intermediate_size"] == 32
    whole, narrow = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    assert narrow.num_parameters() < whole.num_parameters()


def test_a_size_is_met_on_disk_and_never_exceeded(model, text, kept, tmp_path):  # noqa: F811
    before = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    size = int(0.8 * before)
    compress(model, tmp_path / "out", text, kept, size=size)
    after = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0.97 * size <= after <= size


def test_the_output_loads_and_does_what_search_json_says(model, text, kept, tmp_path):  # noqa: F811
    compress(model, tmp_path / "out", text, kept, keep=0.7)
    found = json.loads((tmp_path / "out" / SEARCH_RECORD).read_text())
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt", verbose=False)["input_ids"]
    with torch.no_grad():
        p, q = (
            each(ids[:, :60]).logits.log_softmax(-1)
            for each in (AutoModelForCausalLM.from_pretrained(model), trawl.load(tmp_path / "out"))
        )
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert divergence == pytest.approx(found["real_damage"], rel=0.6)  # other windows of the same text
    trawl.densify(tmp_path / "out", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(ids[:, :60]).logits.log_softmax(-1), q, rtol=1e-4, atol=1e-4)


def test_plain_is_an_ordinary_checkpoint_of_one_width(model, text, kept, tmp_path):  # noqa: F811
    compress(model, tmp_path / "out", text, kept, keep=0.75, plain=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.intermediate_size == loaded.model.layers[0].mlp.up_proj.out_features < 48
    share = 1 - (stored(model) - stored(tmp_path / "out")) / of_layers(model)
    assert 0.75 - 4 * 3 * 3 * 32 / of_layers(model) <= share <= 0.75


def test_damages_that_were_measured_are_used_again_and_an_interrupted_search_goes_on(
    model,  # noqa: F811
    text,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    original, measured = damage_module.Gauge.measure, []

    def stop_at_layer(number):
        def measure(self, block, changes):
            if block == number:
                raise KeyboardInterrupt
            measured.append(block)
            return original(self, block, changes)

        monkeypatch.setattr(damage_module.Gauge, "measure", measure)

    stop_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", text, keep=0.8)
    assert measured == [0, 1]  # where structures are tried: two layers that could share
    assert (tmp_path / "out.search").is_dir()
    measured.clear()
    stop_at_layer(-1)
    compress(model, tmp_path / "out", text, keep=0.8)
    assert measured[0] == 2
    assert not (tmp_path / "out.search").exists()
    monkeypatch.setattr(damage_module.Gauge, "measure", original)
    compress(model, tmp_path / "undisturbed", text, keep=0.8)
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "undisturbed")


def test_what_a_budget_finds_does_not_depend_on_what_was_measured_before(model, text, tmp_path, monkeypatch):  # noqa: F811
    """Of one budget twice, what was chosen measured each time, and of others in between."""
    monkeypatch.setattr(searching, "MISSED", 0.0)

    def find(keep, folder):
        found = trawl.find_recipe(model, trawl.Recipe(keep=keep), folder, calibrate=text, calibration_tokens=TOKENS)
        return found.to_json() | {"recipe": found.recipe}

    first = find(0.5, tmp_path / "one")
    find(0.85, tmp_path / "other")
    for keep in (0.85, 0.4):
        find(keep, tmp_path / "one")
    assert find(0.5, tmp_path / "one") == find(0.5, tmp_path / "other") == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1000}, r"size 1,000 is out of reach: of the [\d,]+ bytes of the shards.*at least about [\d,]+ stay"),
        ({"size": 1000, "plain": True}, "stay, by FCs of one smaller width"),
        ({"size": 10**9}, "nothing to compress"),
        ({"size": 10**9, "plain": True}, "nothing to compress"),
        ({"size": 60_000, "plain": True, "roles": "attn"}, "roles 'attn' are not all of an FC"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_before_the_model_is_run(options, message, model, text, tmp_path):  # noqa: F811
    with pytest.raises(PlanError, match=message):
        trawl.compress(model, trawl.Recipe(**options), tmp_path / "out", calibrate=text, observer=_no_work)
    assert list(tmp_path.iterdir()) == []


def _no_work(stage, *_):
    raise AssertionError(stage)


def test_a_recipe_without_a_budget_is_refused(model, text, tmp_path):  # noqa: F811
    with pytest.raises(PlanError, match="method svd and no budget to search for; give it keep or size"):
        trawl.find_recipe(model, trawl.Recipe(method="svd", rank=8), tmp_path / "folder", calibrate=text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokens", [2, 3])
def test_a_text_of_hardly_a_token_is_enough_to_run(tokens, model, text, tmp_path):  # noqa: F811
    trawl.compress(model, trawl.Recipe(keep=0.8), tmp_path / "out", calibrate=text, calibration_tokens=tokens)
    assert 1 - (stored(model) - stored(tmp_path / "out")) / of_layers(model) <= 0.8
    assert torch.isfinite(logits("llama", tmp_path / "out")).all()


def test_a_run_that_was_killed_right_after_its_output_appeared_is_complete(model, text, tmp_path, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setattr("trawl.pipeline.shutil", SimpleNamespace(rmtree=_no_work))
        with pytest.raises(AssertionError):
            compress(model, tmp_path / "out", text, keep=0.8)
    before = (tmp_path / "out" / "trawl.json").stat().st_mtime_ns
    compress(model, tmp_path / "out", text, keep=0.8, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "trawl.json").stat().st_mtime_ns == before


def test_the_least_size_that_is_named_can_be_met(model, text, kept, tmp_path):  # noqa: F811
    """First that of any model, and where that is less than matrices of such ranks take, that of this one."""
    least = 1000
    for _ in range(2):
        with pytest.raises(PlanError) as caught:
            compress(model, tmp_path / "out", text, kept, size=least)
        least = int(re.search(r"at least about ([\d,]+) stay", str(caught.value))[1].replace(",", ""))
    compress(model, tmp_path / "out", text, kept, size=int(1.05 * least))
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) <= 1.05 * least


def test_what_stopped_on_another_text_is_replaced_where_that_is_asked_for(model, text, tmp_path, monkeypatch):  # noqa: F811
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    monkeypatch.setattr(damage_module.Gauge, "measure", _no_work)
    with pytest.raises(AssertionError):
        compress(model, tmp_path / "out", text, keep=0.8)
    monkeypatch.undo()
    with pytest.raises(PlanError, match=r"out\.search holds moments of another text .*; repeat .*pass --overwrite"):
        compress(model, tmp_path / "out", other, keep=0.8)
    recipe, options = trawl.Recipe(keep=0.8), {"calibrate": other, "calibration_tokens": TOKENS}
    trawl.compress(model, recipe, tmp_path / "out", overwrite=True, **options)
    trawl.compress(model, recipe, tmp_path / "anew", **options)
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "anew")
    assert not (tmp_path / "out.search").exists()


@pytest.mark.parametrize("given", [True, False], ids=["moments", "no moments"])
def test_a_budget_holds_its_folder_until_its_output_is_there(given, model, text, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    folder = tmp_path / "kept" if given else out.with_name("out.search")

    def write(*args):
        with pytest.raises(PlanError, match="another run is working in"):
            trawl.find_recipe(model, trawl.Recipe(keep=0.8), folder, calibrate=text, calibration_tokens=TOKENS)
        return write_shards(*args)

    monkeypatch.setattr("trawl.compressing.write_shards", write)
    compress(model, out, text, folder if given else None, keep=0.8)
    assert out.is_dir()


def test_a_budget_that_was_measured_again_is_gone_on_with(model, text, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(searching, "MISSED", 0.0)
    kept, out = tmp_path / "kept", tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trawl.compressing.write_shards", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(model, out, text, kept, keep=0.5)
    compress(model, out, text, kept, keep=0.5, resume=True)
    before = (out / "trawl.json").stat().st_mtime_ns
    compress(model, out, text, kept, keep=0.5, resume=True)
    assert (out / "trawl.json").stat().st_mtime_ns == before


def test_a_finished_budget_is_not_made_again_where_its_damages_are_kept(
    model,  # noqa: F811
    text,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    kept, out = tmp_path / "kept", tmp_path / "out"
    compress(model, out, text, kept, keep=0.8)
    before = (out / "trawl.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("trawl.compressing.decompose_stacks", None)
        compress(model, out, text, kept, keep=0.8, resume=True)
    assert (out / "trawl.json").stat().st_mtime_ns == before
    with pytest.raises(PlanError, match="exists; pass --overwrite"):
        compress(model, out, text, kept, keep=0.7, resume=True)
    (out / "trawl.json").unlink()
    monkeypatch.setattr("trawl.pipeline.find", None)  # refused before anything is measured
    with pytest.raises(PlanError, match="exists; pass --overwrite"):
        compress(model, out, text, kept, keep=0.8, resume=True)


def test_a_damage_is_measured_until_its_error_suffices(
    model,  # noqa: F811
    text,  # noqa: F811
    kept,
    tmp_path,
    monkeypatch,
):
    original, found = damage_module.Gauge.measure, []

    def measure(self, block, changes):
        found.extend(original(self, block, changes))
        return found[-len(changes) :]

    monkeypatch.setattr(damage_module.Gauge, "measure", measure)
    for share, negligible, windows in ((1e9, 1e-7, 3), (0.0, -1.0, 6)):  # 1e-7: the error of no damage is rounding
        found.clear()
        monkeypatch.setattr(damage_module, "SUFFICES", share)
        monkeypatch.setattr(damage_module, "NEGLIGIBLE", negligible)
        folder = tmp_path / str(windows)
        shutil.copytree(kept, folder, ignore=shutil.ignore_patterns("damage-*"))
        trawl.find_recipe(model, trawl.Recipe(keep=0.8), folder, calibrate=text, calibration_tokens=TOKENS)
        assert {damage.windows for damage in found} == {windows}


def test_a_change_of_two_layers_does_all_of_its_damage(model, text, kept, monkeypatch):  # noqa: F811
    monkeypatch.setattr(damage_module, "NEGLIGIBLE", -1.0)
    monkeypatch.setattr(damage_module, "SUFFICES", 0.0)  # all windows, as a check of the whole takes
    question = Question(str(model), trawl.Recipe(keep=0.8), kept, calibrate=str(text), calibration_tokens=TOKENS)
    with question.searcher() as searcher:
        parts = {part.layer: part for piece in searcher.pieces for part in piece.slices if part.role == "o"}
        first, second = ({parts[layer].tensor: torch.zeros(parts[layer].shape[::-1])} for layer in (0, 1))
        alone, both = searcher.gauge.measure(0, [first, first | second])
        whole = searcher.gauge.measure_all(first | second)
    assert both.mean == pytest.approx(whole.mean, rel=1e-4)
    assert both.mean != pytest.approx(alone.mean, rel=1e-2)


def test_a_form_that_computes_nan_is_named_as_such(model, text, kept):  # noqa: F811
    question = Question(str(model), trawl.Recipe(keep=0.8), kept, calibrate=str(text), calibration_tokens=TOKENS)
    with question.searcher() as searcher:
        part = searcher.pieces[0].slices[0]
        changed = {part.tensor: torch.full_like(searcher.checkpoint.read(part.tensor), math.nan)}
        with pytest.raises(CheckpointError, match="a compressed form of the model computes NaN or Inf"):
            searcher.gauge.measure(part.layer, [changed])


def test_a_worker_refuses_another_model(model, text, kept, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(finding, "begin_work", lambda *_: None)
    question = Question(str(model), trawl.Recipe(keep=0.8), kept, calibrate=str(text), calibration_tokens=TOKENS)
    with pytest.raises(PlanError, match=r"has another model under .*give all machines of the Ray cluster the same"):
        finding._measure_blocks(question, [0], frozenset(), "another", 1, str(tmp_path))


def test_predicted_and_real_damage_go_together(model, text, kept):  # noqa: F811
    found = [
        trawl.find_recipe(model, trawl.Recipe(keep=keep), kept, calibrate=text, calibration_tokens=TOKENS)
        for keep in (0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    predicted, real = (torch.tensor([getattr(one, name) for one in found]).log() for name in ("predicted", "real"))
    assert float(torch.corrcoef(torch.stack([predicted, real]))[0, 1]) > 0.9
    assert real.tolist() == sorted(real.tolist(), reverse=True)


def test_the_recipe_that_was_found_gives_the_same_bytes(cli, model, text, kept, tmp_path):  # noqa: F811
    code, out, err = cli(
        *("plan", model, "--keep", 0.7, "--calibrate", text, "--calibration-tokens", TOKENS, "--moments", kept),
        "--save-recipe",
    )
    assert code == 0, err
    (tmp_path / "recipe.yaml").write_text(out)
    options = (
        "--recipe",
        tmp_path / "recipe.yaml",
        "--moments",
        kept,
        "--calibrate",
        text,
        "--calibration-tokens",
        TOKENS,
    )
    code, _, err = cli("compress", model, *options, "-o", tmp_path / "a")
    assert code == 0, err
    compress(model, tmp_path / "b", text, kept, keep=0.7)
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")


def test_a_budget_as_typed(cli, model, text, kept, tmp_path):  # noqa: F811
    calibration = ("--calibrate", text, "--calibration-tokens", TOKENS, "--moments", kept)
    code, out, err = cli("plan", model, "--keep", 0.7, *calibration)
    assert code == 0, err
    assert "predicted damage" in out
    assert "KL divergence from the original" in out
    code, out, err = cli("compress", model, "--keep", 0.7, *calibration, "-o", tmp_path / "out")
    assert code == 0, err
    assert "nats a token" in out
    code, out, err = cli("compress", model, "--size", "40kB", *calibration, "-o", tmp_path / "small")
    assert code == 2
    assert "out of reach" in err
    assert not (tmp_path / "small").exists()


MISTAKES = [
    (("--keep", "0.05"), "keep 0.05 is out of reach"),
    (("--keep", "1.5"), "keep is 1.5"),
    (("--keep", "0.8", "--rank", "4"), "leave one of the two out"),
    (("--keep", "0.8", "--method", "cp"), "leave --method out"),
    (("--keep", "0.8", "--size", "1MB"), "one of keep, size and parts"),
    (("--size", "1GB"), "is no less than"),
    (("--keep", "0.8", "--plain", "--layers", "1"), "one FC width in all its layers"),
    (("--keep", "0.8", "--roles", "q,lm_head"), "lm_head"),
    (("--keep", "0.8", "--kv-heads", "1"), "kv_heads is for method narrow, and a budget chooses widths"),
    (("--keep", "0.8", "--engine", "tensorly"), "engine is 'tensorly', and a budget chooses how"),
    (("--keep", "0.8", "--group-layers", "1"), "group_layers is 1, and a budget chooses how"),
    (("--size", f"{'9' * 400}GB"), "is not a size"),
    (("--keep", "0.42", "--plain"), "no FC width meets the budget, down to 8 of 48 units"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(  # noqa: PLR0917 (fixtures)
    options,
    message,
    cli,  # noqa: F811
    model,  # noqa: F811
    text,  # noqa: F811
    kept,
    tmp_path,
):
    calibration = ("--calibrate", text, "--calibration-tokens", TOKENS, "--moments", kept)
    code, _, err = cli("compress", model, *options, *calibration, "-o", tmp_path / "out")
    assert code == 2, err
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "message"), [({"keep": 0.05}, "out of reach"), ({"keep": 0.8}, "no such")])
def test_a_search_that_never_began_leaves_nothing(options, message, model, tmp_path):  # noqa: F811
    with pytest.raises(PlanError, match=message):
        compress(model, tmp_path / "out", tmp_path / "absent.txt", **options)
    assert list(tmp_path.iterdir()) == []


def test_moments_without_their_text_are_refused(cli, model, text, kept, tmp_path):  # noqa: F811
    trawl.find_recipe(model, trawl.Recipe(keep=0.8), kept, calibrate=text, calibration_tokens=TOKENS)
    code, _, err = cli("compress", model, "--keep", 0.8, "--moments", kept, "-o", tmp_path / "out")
    assert code == 2
    assert "also measures damages on it; pass it with --calibrate" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_without_a_text_random_tokens_stand_in_and_are_used_again(model, tmp_path, monkeypatch):  # noqa: F811
    passes, measured = [], []
    gather, measure = gathering.gather, damage_module.Gauge.measure
    monkeypatch.setattr(gathering, "gather", lambda *args: passes.append(1) or gather(*args))
    monkeypatch.setattr(damage_module.Gauge, "measure", lambda *args: measured.append(1) or measure(*args))
    reports = [
        trawl.compress(
            model, trawl.Recipe(keep=keep), tmp_path / str(keep), moments=tmp_path / "m", calibration_tokens=TOKENS
        )
        for keep in (0.7, 0.8)
    ]
    assert all(report.stacks for report in reports)
    assert len(passes) == 1
    assert len(measured) == 3  # each block once, for the first budget
    assert not (tmp_path / "m" / "kronecker.json").exists()  # gradients of random tokens say nothing


def test_parts_that_overlap_are_refused(model, tmp_path):  # noqa: F811
    parts = ({"method": "svd", "rank": 4, "roles": "q"}, {"method": "cp", "rank": 4, "roles": "attn"})
    with pytest.raises(PlanError, match="parts of the mixed recipe overlap"):
        trawl.compress(model, trawl.Recipe(method="mixed", parts=parts, write="factored"), tmp_path / "out")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ({"method": "narrow", "width": 24}, {"method": "tucker", "rank": 6, "roles": "fc", "group_layers": 1}),
            "two of them hold gate of layer 0",
        ),
        (
            ({"method": "narrow", "width": 24, "layers": "0-1"}, {"method": "narrow", "width": 16, "layers": "1"}),
            "two of them narrow layer 1",
        ),
        (({"method": "svd", "rank": 4, "roles": "q"}, {"method": "svd", "rank": 6, "roles": "q"}), "overlap"),
        (({"method": "narrow", "kv_heads": 1},), "takes a width, and neither kv_heads nor roles"),
        (({"method": "narrow", "width": 24, "roles": "attn"},), "takes a width, and neither kv_heads nor roles"),
        (({"method": "svd", "rank": 4, "roles": "q", "seed": 1},), "seed of a part is 1; give it to the mixed recipe"),
        (({"method": "svd", "rank": 4, "roles": "q", "anchored": True},), "anchored of a part is True"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_by_plan(parts, message, model):  # noqa: F811
    with pytest.raises(PlanError, match=message):
        trawl.plan(model, trawl.Recipe(method="mixed", parts=parts, write="factored"))


def test_what_each_part_has_for_itself_is_not_given_to_the_whole():
    part = {"method": "svd", "rank": 4, "roles": "q"}
    for name, value in (("layers", "0"), ("roles", "q"), ("group_layers", 1)):
        with pytest.raises(PlanError, match=f"{name} is .*, and each part of a mixed recipe has its own"):
            trawl.Recipe(method="mixed", write="factored", parts=(part,), **{name: value})
    whole = trawl.Recipe(method="mixed", write="factored", parts=(part,), n_iter_max=3, tol=0.5)
    assert [(one.n_iter_max, one.tol) for one in whole.members()] == [(3, 0.5)]


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_parts_of_one_stored_tensor_may_be_given_by_hand(family, zoo, tmp_path):
    parts = ({"method": "svd", "rank": 6, "roles": "q,k,v", "group_layers": 1},)
    trawl.compress(zoo(family), trawl.Recipe(method="mixed", parts=parts, write="factored"), tmp_path / "out")
    assert torch.isfinite(logits(family, tmp_path / "out")).all()


def test_a_mixed_recipe_with_every_method_writes_loads_and_densifies(model, tmp_path):  # noqa: F811
    parts = (
        {"method": "svd", "rank": 8, "roles": "q,k,v", "share": "input", "layers": "0"},
        {"method": "tucker", "rank": 12, "roles": "fc", "layers": "0"},
        {"method": "cp", "rank": 8, "roles": "attn", "layers": "1-2"},
        {"method": "narrow", "width": (40, 24), "layers": "1-2"},
    )
    recipe = trawl.Recipe(method="mixed", parts=parts, write="factored")
    report = trawl.compress(model, recipe, tmp_path / "out", calibration_tokens=TOKENS)
    assert len(report.stacks) == 6
    trawl.densify(tmp_path / "out", tmp_path / "dense")
    ids = torch.randint(3, 60, (2, 9))
    one, other = (
        each(ids).logits
        for each in (trawl.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("best", ["shared", "tucker", "cp"])
def test_a_trial_that_is_the_best_is_chosen_written_and_loaded(best, cli, model, text, kept, tmp_path, monkeypatch):  # noqa: F811, PLR0917 (fixtures)
    folder = shutil.copytree(kept, tmp_path / "moments", ignore=shutil.ignore_patterns("damage-*", "lock"))
    predict = Measured.predict

    def favour(self, point):
        return predict(self, point) * (1e-6 if point.form.structure == best else 1.0)

    monkeypatch.setattr(Measured, "predict", favour)
    compress(model, tmp_path / "out", text, folder, keep=0.6)
    found = json.loads((tmp_path / "out" / SEARCH_RECORD).read_text())
    chosen = [piece for piece in found["pieces"] if piece["structure"] == best]
    expected = {"shared": {("fc", 0), ("fc", 1), ("qkv", 0), ("qkv", 1)}}.get(best, {("fc", 0), ("fc", 1), ("fc", 2)})
    assert {(piece["name"].partition(".")[0], piece["layer"]) for piece in chosen} <= expected
    assert len(chosen) >= 2
    assert found["kept"] <= 0.6
    before, after = (sum(piece[f"parameters_{when}"] for piece in found["pieces"]) for when in ("before", "after"))
    assert before == of_layers(model)
    assert after == before - (stored(model) - stored(tmp_path / "out"))
    assert found["kept"] == pytest.approx(after / before)
    loaded = trawl.load(tmp_path / "out")
    assert torch.isfinite(loaded(torch.randint(3, 60, (2, 9))).logits).all()
    code, _, err = cli("report", tmp_path / "out")
    assert code == 0, err
    words = {"shared": "2 shared by two layers", "tucker": "t Tucker", "cp": "c CP"}[best]
    assert words in (tmp_path / "out" / "report.html").read_text()


def test_the_report_draws_the_choice_and_the_damage(cli, model, text, kept, tmp_path):  # noqa: F811
    compress(model, tmp_path / "out", text, kept, keep=0.7)
    code, _, err = cli("report", tmp_path / "out")
    assert code == 0, err
    page = (tmp_path / "out" / "report.html").read_text()
    found = json.loads((tmp_path / "out" / SEARCH_RECORD).read_text())
    assert "Choice for the budget" in page
    assert f"{found['real_damage']:.4f} ± {found['real_damage_stderr']:.4f}" in page
    for piece in found["pieces"]:
        assert f"{piece['name'].split('.')[0]} of layer {piece['layer']}: {piece['structure']}" in page
    (tmp_path / "out" / SEARCH_RECORD).write_text("{}")
    code, _, err = cli("report", tmp_path / "out")
    assert code == 2
    assert "is not what a search writes" in " ".join(err.split())
