"""Anchored runs: each block fitted to what the original model computes, on what the compressed one feeds it."""

import contextlib
import json
import shutil

import pytest
import trawl_cli
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import trawl
from tests.integration.test_calibrate import damage
from tests.integration.test_compress import weights_hash
from tests.integration.test_eval import make_tokenizer, sentence
from tests.zoo import GROUPED, randomize, save_model
from trawl.anchoring import blocks
from trawl.errors import PlanError
from trawl.factors import Factors

RECIPES = {
    "single": {"method": "svd", "rank": 10},
    "joined": {"method": "svd", "rank": 12, "share": "input"},
    "cp": {"method": "cp", "rank": 28, "roles": "fc", "n_iter_max": 5, "tol": 0.1},
    "tucker": {"method": "tucker", "rank": 14, "roles": "fc", "n_iter_max": 5, "tol": 0.1},
    "narrow": {"method": "narrow", "width": 32},
    "factored": {"method": "svd", "rank": 8, "write": "factored"},
}


def with_tokenizer(source, folder):
    """Copy a checkpoint and lay a tokenizer beside it."""
    shutil.copytree(source, folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "sea.txt"
    path.write_text(sentence(3, 3000), encoding="utf-8")
    return path


def run(folder, recipe, calibrate, out, **options):
    return trawl.compress(folder, trawl.Recipe(**recipe), out, calibrate=calibrate, calibration_tokens=2048, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_stays_nearer_than_by_moments_of_the_original(model, text, tmp_path, name):
    run(model, {"group_layers": 1} | RECIPES[name], text, tmp_path / "calibrated")
    run(model, {"anchored": True} | RECIPES[name], text, tmp_path / "anchored")
    assert damage(tmp_path / "anchored", model, text) < 0.99 * damage(tmp_path / "calibrated", model, text)
    record = json.loads((tmp_path / "anchored" / "trawl.json").read_text())
    assert record["identity"]["recipe"]["anchored"]
    assert record["identity"]["moments"] == record["calibration"]["fingerprint"]
    assert "fitted to what the original model computes on 2,048" in (tmp_path / "anchored" / "README.md").read_text()


def test_what_nothing_was_replaced_before_has_not_drifted(model, text, tmp_path):
    recipe = {"method": "svd", "rank": 8, "layers": "1"}
    calibrated = run(model, recipe, text, tmp_path / "calibrated").stacks
    anchored = run(model, recipe | {"anchored": True}, text, tmp_path / "anchored").stacks
    for one, other in zip(calibrated, anchored, strict=True):
        same = other.weighted_error == pytest.approx(one.weighted_error, rel=1e-4)
        assert same == (one.roles[0] in ("q", "k", "v")), one.name


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2", "gptj", "opt"])
def test_at_full_rank_the_model_is_the_same(zoo, text, tmp_path, family):
    source = with_tokenizer(zoo(family), tmp_path / "model")
    recipe = {"method": "svd", "roles": "q,o,fc", "anchored": True}
    run(source, {**recipe, "rank": 31}, text, tmp_path / "less")
    run(source, {**recipe, "rank": 32}, text, tmp_path / "full")
    assert damage(tmp_path / "full", source, text) < 1e-2 * damage(tmp_path / "less", source, text)


def test_a_planted_rank_is_found(model, text, tmp_path):
    trawl.compress(model, trawl.Recipe(method="svd", rank=6), tmp_path / "planted")
    report = run(tmp_path / "planted", {"method": "svd", "rank": 6, "anchored": True}, text, tmp_path / "out")
    assert max(stack.relative_error for stack in report.stacks) < 1e-4


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "olmo2", "gemma2"])
def test_only_what_is_added_to_the_stream_repairs_it(zoo, text, tmp_path, monkeypatch, family):
    """Where a norm stands behind a sublayer, its matrix keeps its own function as its target."""
    source = with_tokenizer(zoo(family), tmp_path / "model")
    seen, observe = [], blocks.observe
    monkeypatch.setattr(blocks, "observe", lambda *args, stream: seen.append(stream) or observe(*args, stream=stream))
    run(source, {"method": "svd", "rank": 8, "layers": "0", "anchored": True}, text, tmp_path / "out")
    added = family in ("gpt_neox", "gpt2")
    assert seen == [False, added, False, added]


def test_experts_keep_their_function_on_the_tokens_they_now_get(text, tmp_path):
    config = MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    save_model(randomize(MixtralForCausalLM(config)).eval(), tmp_path / "plain")
    source = with_tokenizer(tmp_path / "plain", tmp_path / "model")
    recipe = {"method": "svd", "rank": 10}
    run(source, recipe, text, tmp_path / "calibrated")
    run(source, recipe | {"anchored": True}, text, tmp_path / "anchored")
    assert damage(tmp_path / "anchored", source, text) < damage(tmp_path / "calibrated", source, text)


@pytest.mark.parametrize("name", ["joined", "cp", "narrow"])
def test_an_interrupted_run_is_gone_on_with_to_the_same_bytes(model, text, tmp_path, monkeypatch, name):
    recipe = RECIPES[name] | {"anchored": True}
    run(model, recipe, text, tmp_path / "whole")
    left = 2
    target = trawl.narrowing.Narrowing if name == "narrow" else Factors
    save = target.save

    def stop(*args):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        save(*args)

    monkeypatch.setattr(target, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, recipe, text, tmp_path / "out")
    sealed = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "factors").iterdir()}
    assert len(sealed) == 2
    left = 99
    resumed = run(model, recipe, text, tmp_path / "out", resume=True)
    assert [stack.seconds == 0.0 for stack in resumed.stacks].count(True) == 2
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibrate": None}, "pass --calibrate TEXT"),
        ({"calibrate": None, "moments": "moments"}, "moments of the original alone know nothing"),
        ({"moments": "moments"}, "--moments does not go with --anchored"),
        ({"factors": "library"}, "--factors does not go with --anchored"),
        ({"ray": "local"}, "--ray does not go with --anchored"),
        ({"recipe": {"share": "role", "group_layers": 3}}, "stack q.0-2 lies in 3 layers.* --group-layers 1"),
        ({"recipe": {"method": "cp", "group_layers": "all"}}, "stack attn-qo.0-2 lies in 3 layers.* --group-layers 1"),
        ({"recipe": {"engine": "tensorly"}}, "use the default engine"),
    ],
)
def test_what_cannot_be_anchored_is_refused(model, text, tmp_path, change, message):
    recipe = {"method": "svd", "rank": 4, "anchored": True} | change.get("recipe", {})
    options = {"calibrate": text} | {name: value for name, value in change.items() if name != "recipe"}
    with pytest.raises(PlanError, match=message):
        trawl.compress(model, trawl.Recipe(**recipe), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_in_memory_is_not_anchored(model):
    with pytest.raises(PlanError, match=r"use trawl\.compress with calibrate"):
        trawl.apply(AutoModelForCausalLM.from_pretrained(model), trawl.Recipe(method="svd", rank=4, anchored=True))


def test_gradients_of_the_original_do_not_weigh_an_anchored_run():
    with pytest.raises(PlanError, match="leave one of the two out"):
        trawl.Recipe(method="svd", rank=4, anchored=True, output_weighting="fisher")


def test_an_anchored_run_as_typed(model, text, tmp_path, monkeypatch, capsys):
    options = ["--method", "svd", "--rank", "8", "--layers", "1", "--anchored", "--calibrate", str(text)]
    for command in (["plan"], ["compress", "-o", str(tmp_path / "out"), "--calibration-tokens", "640"]):
        monkeypatch.setattr("sys.argv", ["trawl", *command, str(model), *options])
        with contextlib.suppress(SystemExit):
            trawl_cli.main()
    out = " ".join(capsys.readouterr().out.split())
    assert "the original and the compressed model are run on up to 131,072 tokens of sea.txt" in out
    assert "weighted error" in out
    assert json.loads((tmp_path / "out" / "trawl.json").read_text())["identity"]["recipe"]["anchored"]
