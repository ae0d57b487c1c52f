"""Every family x method x shard layout, all the way: compress, compare bytes, load in plain transformers."""

import hashlib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import trawl
from tests.zoo import EVERY, MORE, SWEEPS, ZOO, answer, build_zoo
from trawl.calibration.streaming import open_chain
from trawl.checkpoint import Checkpoint, open_folder
from trawl.errors import PlanError
from trawl.families import EXPERTS
from trawl.planning import match_checkpoint, summarize
from trawl.stacking import Place
from trawl.tokens import position_limit
from trawl.writing import multiply_out

RANKS = {"cp": 4, "tucker": (2, 5, 6), "svd": 4}


def load(name: str, folder: Path) -> torch.nn.Module:
    model, info = getattr(transformers, EVERY[name].auto).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits(name: str, folder: Path) -> torch.Tensor:
    tokens = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        return load(name, folder)(tokens).logits


def stored_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    info = checkpoint.tensors[name]
    with (checkpoint.folder / info.shard).open("rb") as file:
        file.seek(info.start)
        return file.read(info.nbytes)


def folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("name", ZOO)
def test_denoised_checkpoint_loads_and_keeps_the_rest(name, method, shards, zoo, tmp_path):
    source = zoo(name, shards)
    before = folder_hash(source)
    recipe = trawl.Recipe(method=method, rank=RANKS[method], layers="1-2", n_iter_max=SWEEPS[method])
    report = trawl.compress(source, recipe, tmp_path / "out")
    assert folder_hash(source) == before

    old, new = open_folder(source), open_folder(tmp_path / "out")
    assert [shard.header for shard in new.shards] == [shard.header for shard in old.shards]
    changed = {tensor for stack in report.stacks for tensor in stack.tensors}
    for tensor in old.tensors:
        same = stored_bytes(old, tensor) == stored_bytes(new, tensor)
        assert same == (tensor not in changed), tensor
    assert {str(file) for file in old.side_files} == {str(file) for file in new.side_files}
    for file in old.side_files:
        assert (source / file).read_bytes() == (tmp_path / "out" / file).read_bytes()

    assert torch.isfinite(logits(name, tmp_path / "out")).all()
    for stack in report.stacks:
        assert 0.01 < stack.relative_error < 1.0
        assert stack.kept_energy == pytest.approx(1 - stack.relative_error**2)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ZOO)
def test_full_tucker_rank_gives_the_same_logits(name, shards, zoo, tmp_path):
    source = zoo(name, shards)
    for kind in ("fc", "attn"):  # a triple names one stack's shape, so kinds go one after the other
        planned = trawl.plan(source, trawl.Recipe(method="tucker", rank=1, roles=kind))
        for item in planned.stacks:
            out = tmp_path / item.stack.name
            recipe = trawl.Recipe(method="tucker", rank=item.stack.shape, roles=item.stack.roles)
            (report,) = trawl.compress(source, recipe, out).stacks
            assert report.relative_error < 1e-5
            assert report.shape == report.rank == item.stack.shape
            torch.testing.assert_close(logits(name, out), logits(name, source), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ZOO)
def test_stack_and_unstack_is_bit_exact(name, dtype, zoo):
    checkpoint = open_folder(zoo(name, 1, dtype))
    rebuilt = {}
    for part in match_checkpoint(checkpoint).placements:
        original = checkpoint.read(part.tensor)
        target = rebuilt.setdefault(part.tensor, torch.full_like(original, float("nan")))
        part.view.scatter(part.view.apply(original).clone(), target)
    assert rebuilt
    for tensor, target in rebuilt.items():
        assert torch.equal(target, checkpoint.read(tensor)), tensor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_stored_dtype_is_kept_and_measured_as_written(dtype, zoo, tmp_path):
    source = zoo("llama", 1, dtype)
    report = trawl.compress(source, trawl.Recipe(rank=6, roles="fc"), tmp_path / "out")
    old, new = open_folder(source), open_folder(tmp_path / "out")
    (stack,) = report.stacks
    reference = torch.cat([old.read(name).double().flatten() for name in stack.tensors])
    written = torch.cat([new.read(name).double().flatten() for name in stack.tensors])
    assert all(new.read(name).dtype == dtype for name in stack.tensors)
    measured = float((reference - written).norm() / reference.norm())
    assert stack.relative_error == pytest.approx(measured, rel=1e-6)


def test_an_unlisted_llama_like_family_goes_through_the_fallback(tmp_path):
    from tests.zoo import save_unlisted

    source = save_unlisted(tmp_path / "source")
    planned = trawl.plan(source, trawl.Recipe(rank=4))
    assert planned.match.assumed
    trawl.compress(source, trawl.Recipe(rank=4, roles="fc"), tmp_path / "out")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


def test_multiply_out_measures_transposed_and_plain_outputs_alike():
    torch.manual_seed(0)
    factors = trawl.Factors(torch.randn(40, 3), torch.randn(24, 4), torch.randn(2, 3, 4))
    original = torch.randn(40, 24)
    plain, turned = torch.empty(40, 24), torch.empty(24, 40).T
    first = multiply_out(factors, Place(1), original, plain, 2.0)
    second = multiply_out(factors, Place(1), original, turned, 2.0)
    torch.testing.assert_close(plain, factors.slice(1))
    torch.testing.assert_close(turned, plain)
    assert first == pytest.approx(second)
    assert first[0] == pytest.approx(float((original - plain).square().sum()) / 4)


# ---- every other architecture: fewer runs each, because there are many


def changed_tensors(old: Checkpoint, new: Checkpoint) -> set[str]:
    assert [shard.header for shard in new.shards] == [shard.header for shard in old.shards]
    return {tensor for tensor in old.tensors if stored_bytes(old, tensor) != stored_bytes(new, tensor)}


@pytest.mark.parametrize("name", MORE)
def test_full_rank_in_every_stack_gives_the_same_answer(name, zoo, tmp_path):
    source = zoo(name)
    out, expected = source, set()
    planned = trawl.plan(source, trawl.Recipe(method="tucker", rank=1))
    assert set(planned.match.roles) == set(EVERY[name].roles)
    by_shape = {}
    for item in planned.stacks:  # a triple fits one shape, so shapes go one after the other, each from the last output
        key = item.stack.shape, item.stack.roles
        by_shape.setdefault(key, []).extend(item.stack.layers)
        expected |= set(item.stack.tensors)
    for number, ((shape, roles), layers) in enumerate(by_shape.items()):
        recipe = {"method": "tucker", "rank": shape, "roles": roles, "group_layers": "all"}
        for tower in {part.tower for part in planned.match.placements if part.layer in layers}:
            chosen = [layer for layer in planned.match.towers[tower] if layer in layers]
            target = tmp_path / f"{number}-{tower}"
            for stack in trawl.compress(out, trawl.Recipe(**recipe, layers=chosen), target).stacks:
                assert stack.relative_error < 1e-5
                assert stack.shape == stack.rank == shape
            out = target
    assert changed_tensors(open_folder(source), open_folder(out)) <= expected
    mine, base = answer(name, load(name, out)), answer(name, load(name, source))
    assert float((mine - base).abs().max()) < 1e-4 * float(base.abs().max())


@pytest.mark.parametrize("name", MORE)
def test_rank_one_changes_exactly_the_chosen_roles(name, zoo, tmp_path):
    source, chosen = zoo(name), EVERY[name].roles[1::2]
    trawl.compress(source, trawl.Recipe(method="svd", rank=1, roles=chosen), tmp_path / "out")
    old, new = open_folder(source), open_folder(tmp_path / "out")
    holders = set()
    for part in match_checkpoint(old).placements:
        before, after = (part.view.apply(each.read(part.tensor)) for each in (old, new))
        assert torch.equal(before, after) == (part.role not in chosen), part
        if part.role in chosen:
            holders.add(part.tensor)
            assert torch.linalg.matrix_rank(after, rtol=1e-4) == 1
    assert changed_tensors(old, new) == holders


@pytest.mark.parametrize("name", MORE)
def test_factored_answers_as_dense_does_and_experts_are_refused(name, zoo, tmp_path):
    source, roles = zoo(name), EVERY[name].roles
    recipe = {"method": "tucker", "rank": 2, "allow_larger": True}
    if set(EXPERTS) & set(roles):
        with pytest.raises(PlanError, match=r"holds experts.*--write dense"):
            trawl.plan(source, trawl.Recipe(**recipe, write="factored"))
        roles = tuple(role for role in roles if role not in EXPERTS)
    for write in ("dense", "factored"):
        trawl.compress(source, trawl.Recipe(**recipe, roles=roles, write=write), tmp_path / write)
    model = load(name, tmp_path / "factored")
    dense, factored = answer(name, load(name, tmp_path / "dense")), answer(name, model)
    assert float((dense - factored).abs().max()) < 1e-4 * float(dense.abs().max())
    assert float((dense - answer(name, load(name, source))).abs().max()) > 1e-3 * float(dense.abs().max())


def test_the_experts_of_a_layer_are_one_stack(zoo):
    for name, count in (("mixtral", 15), ("granitemoe", 15), ("gpt_oss", 15), ("deepseek_v3", 18)):
        planned = trawl.plan(zoo(name), trawl.Recipe(rank=2, roles="experts"))
        layers = [1] if name == "deepseek_v3" else [0, 1]
        assert [item.stack.name for item in planned.stacks] == [f"experts.{layer}" for layer in layers]
        assert {item.stack.shape[0] for item in planned.stacks} == {count}
    shared = trawl.plan(zoo("mixtral"), trawl.Recipe(method="svd", rank=2, roles="experts", share="input", layers=0))
    names = [item.stack.name for item in shared.stacks]
    assert names[:2] == ["expert_gate-expert_up.0.0", "expert_gate-expert_up.0.1"]
    assert names[-1] == "expert_down.0.4"
    assert len(names) == 10


RENAMED = ["mixtral", "qwen2_moe", "granitemoe", "vit", "gemma3"]


@pytest.mark.parametrize("name", RENAMED)
def test_either_way_of_storing_gives_the_same_model_and_keeps_its_layout(name, zoo, tmp_path):
    """What transformers renames and fuses while loading may lie on disk under either name, or be in memory."""
    model, recipe = build_zoo(name), trawl.Recipe(method="tucker", rank=2)
    raw = tmp_path / "raw"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(raw)
    save_file(
        {key: tensor for key, tensor in model.state_dict().items() if key not in model.all_tied_weights_keys},
        raw / "model.safetensors",
        {"format": "pt"},
    )
    stored, named = ({part.tensor for part in trawl.plan(each, recipe).match.placements} for each in (raw, zoo(name)))
    assert stored - named
    answers = []
    for number, source in enumerate((zoo(name), raw)):
        trawl.compress(source, recipe, tmp_path / f"{number}")
        answers.append(answer(name, load(name, tmp_path / f"{number}")))
    trawl.apply(model, recipe)
    answers.append(answer(name, model))
    for other in answers[1:]:
        assert float((answers[0] - other).abs().max()) < 1e-4 * float(other.abs().max())
    assert open_folder(tmp_path / "1").shards[0].header == open_folder(raw).shards[0].header


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit", "has layers that read no tokens"),
        ("clip", "has text, vision: calibration"),
        ("blt", "has patcher, encoder, encoder_cross, global, decoder, decoder_cross: calibration"),
        ("t5", "encoder-decoder model: two chains of blocks"),
    ],
)
def test_a_model_that_is_no_chain_of_blocks_behind_tokens_is_not_calibrated(name, reason, zoo):
    checkpoint = open_folder(zoo(name))
    with pytest.raises(PlanError, match=rf"{reason}.*; give cp, tucker or svd a --rank without --calibrate"):
        open_chain(checkpoint, match_checkpoint(checkpoint), torch.device("cpu"))


def test_a_text_is_cut_to_the_positions_that_mpt_has():
    assert position_limit(build_zoo("mpt"), None) == 64


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixtral", "has no role down"),
        ("qwen3_moe", "layer 0 of family qwen2_moe has no role down.*leave that layer out of --layers"),
        ("qwen2_moe", "has FCs of unequal width here, 48 to 56"),
        ("bart", "has FCs of unequal width here, 48 to 56"),
    ],
)
def test_narrow_refuses_what_it_cannot_cut(name, reason, zoo):
    with pytest.raises(PlanError, match=reason):
        trawl.plan(zoo(name), trawl.Recipe(method="narrow", width=0.5, write="factored"))


def test_inspect_says_which_layers_each_tower_has(zoo):
    checkpoint = open_folder(zoo("bart"))
    summary = summarize(checkpoint, match_checkpoint(checkpoint))
    assert (summary["layers"], summary["towers"]) == (5, {"encoder": "0-1", "decoder": "2-4"})
    names = [group["name"] for group in summary["groups"]]
    assert names == ["attn.0-1", "fc.0-1", "attn.2-4", "cross.2-4", "fc.2-4"]


def test_layers_without_the_chosen_roles_are_refused(zoo):
    with pytest.raises(PlanError, match=r"layers '1' have none of the roles 'experts', which are in layers 0;"):
        trawl.plan(zoo("qwen2_moe"), trawl.Recipe(rank=2, roles="experts", layers=1))
    with pytest.raises(PlanError, match=r"have none of the roles 'cross', which are in layers 2-4"):
        trawl.plan(zoo("bart"), trawl.Recipe(rank=2, roles="cross", layers="0-1"))
