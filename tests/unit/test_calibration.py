"""Calibration: texts and their windows, the block-by-block pass against hooks on the whole model, moments on disk."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.zoo import HIDDEN, INNER, LAYERS, VOCABULARY, ZOO, build_zoo, randomize, save_model
from trawl.calibration import Moments, gathering
from trawl.calibration import text as texts
from trawl.calibration.gathering import MomentSum, gather
from trawl.calibration.moments import RECORD, Identity, write_record
from trawl.calibration.streaming import open_chain
from trawl.calibration.text import cut_windows, read_text
from trawl.calibration.weights import stack_weights
from trawl.checkpoint import open_folder
from trawl.errors import CheckpointError, LoadError, PlanError
from trawl.families import Placement
from trawl.planning import match_checkpoint
from trawl.stacking import make_stacks
from trawl.views import View

CPU = torch.device("cpu")
EXPERTS = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "head_dim": 8,
}


def windows(count=5, length=16):
    return torch.randint(3, VOCABULARY, (count, length))


def calibrated(folder, ids, out):
    """Run token ids through a checkpoint and open the moments."""
    checkpoint = open_folder(folder)
    chain = open_chain(checkpoint, match_checkpoint(checkpoint), CPU)
    identity = Identity(checkpoint.fingerprint, "text.txt", "text", "tokens", *ids.shape)
    write_record(out, identity, *gather(chain, ids, out))
    return Moments.open(out, checkpoint)


# Texts


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "the sea"}, "the sea"),
        ({"prompt": "the sea is", "answers": ["blue", "wide"]}, "the sea is blue"),
        ({"query": "the sea is", "choices": ["red", "blue"], "gold": 1}, "the sea is blue"),
    ],
)
def test_records_of_each_shape_give_their_text(tmp_path, record, text):
    path = tmp_path / "records.jsonl"
    path.write_text(f"{json.dumps(record)}\n\n{json.dumps(record)}\n", encoding="utf-8")
    assert read_text(str(path), 10)[1] == f"{text}\n\n{text}"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b" \n", "is empty"),
        ("empty.jsonl", b"\n", "is empty"),
        ("binary.txt", b"the\nsea\0is", r"binary\.txt:2: holds NUL bytes, so it is binary"),
        ("latin.txt", b"the\nsea \xe9t\xe9", r"latin\.txt:2: byte 8 is not UTF-8"),
        ("torn.jsonl", b'{"text": "the sea"}\n{"text": ', r"torn\.jsonl:2: not JSON"),
        ("other.jsonl", b'{"words": "the sea"}', r"other\.jsonl:1: a record of another shape"),
        ("null.jsonl", b'{"text": null}', r"null\.jsonl:1: a record of another shape"),
        ("number.jsonl", b"5", r"number\.jsonl:1: a record of another shape"),
        ("gold.jsonl", b'{"query": "a", "choices": ["b"], "gold": 1}', r"gold\.jsonl:1: a record of another shape"),
    ],
)
def test_unusable_texts_are_refused_with_their_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PlanError, match=message):
        read_text(str(tmp_path / name), 10)


def test_an_absent_text_is_told_with_the_nearest_name(tmp_path):
    (tmp_path / "wiki.txt").write_text("the sea")
    with pytest.raises(PlanError, match=r"did you mean 'wiki\.txt'"):
        read_text(str(tmp_path / "wikis.txt"), 10)


@pytest.fixture
def hub(monkeypatch):
    """A data set of endless records in place of the hub's; returns what was asked of it."""
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "absent/set":
            raise FileNotFoundError("no data set of that name")
        return ({"text": f"the sea {number}", "number": number} for number in range(1_000_000))

    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("hub:wiki/train/text", ("wiki/train", None)),
        ("hub:org/wiki/train/text", ("org/wiki", None)),
        ("hub:org/wiki/raw/train/text", ("org/wiki", "raw")),
    ],
)
def test_a_stream_is_read_only_as_far_as_needed(hub, spec, asked):
    if spec == "hub:wiki/train/text":
        asked = ("wiki", None)
    name, text = read_text(spec, 10)
    assert hub == [(*asked, "train", True)]
    assert name == spec
    assert text.startswith("the sea 0\n\nthe sea 1\n\n")
    assert 160 <= len(text) < 320


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:wiki", "malformed; expected hub:DATASET/SPLIT/FIELD"),
        ("hub:wiki//text", "malformed"),
        ("hub:wiki/train/texts", "no text under 'texts'; did you mean 'text'"),
        ("hub:wiki/train/number", "no text under 'number'"),
        ("hub:absent/set/train/text", "FileNotFoundError: no data set of that name"),
    ],
)
def test_streams_that_cannot_be_read_are_told(hub, spec, message):
    with pytest.raises(PlanError, match=message):
        read_text(spec, 10)


def test_a_stream_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install 'trawl-llm\[calib\]'"):
        read_text("hub:wiki/train/text", 10)


def test_windows_are_spread_evenly_and_begin_with_the_prefix():
    found = cut_windows(range(100, 200), (1, 2), 12, 5, "text")
    assert found[:, :2].tolist() == [[1, 2]] * 5
    assert found[:, 2].tolist() == [100, 122, 145, 167, 190]  # from the first token to the last
    assert found[:, 2:].diff().unique().tolist() == [1]
    assert cut_windows(range(100), (), 12, 1, "text").tolist() == [list(range(12))]


def test_a_short_text_gives_what_it_has_or_is_refused(caplog):
    with caplog.at_level(logging.WARNING, "trawl.calibration"):
        assert cut_windows(range(35), (), 10, 8, "text").shape == (3, 10)
    assert "enough for 3 windows of the 8 asked for" in caplog.text
    with pytest.raises(PlanError, match="it has 8 tokens, and one window takes 9"):
        cut_windows(range(8), (1,), 10, 8, "text")


# The pass


def test_a_sum_by_panels_is_the_whole_product(monkeypatch):
    monkeypatch.setattr(gathering, "PANEL", 5)
    x = torch.randn(40, 12) * torch.logspace(-2, 2, 12) + 1.0
    found = MomentSum.of_width(12, CPU)
    for part in x.split(16):
        found.add(part)
    wide = x.double()
    torch.testing.assert_close(found.mean(), wide.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.matrix().double(), wide.T @ wide / 40, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_moments_are_those_of_the_whole_model(zoo, tmp_path, monkeypatch, name):
    """Against hooks on the model as transformers loads it, which see each linear module's own input."""
    monkeypatch.setattr(gathering, "BATCH_TOKENS", 32)
    folder, ids = zoo(name, 2), windows()
    moments = calibrated(folder, ids, tmp_path / "moments")
    model = build_zoo(name)
    given = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | transformers.Conv1D):
            hook = lambda _, args, path=path: given.update({f"{path}.weight": args[0].double().flatten(0, -2)})  # noqa: E731
            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=ids)
    match = match_checkpoint(open_folder(folder))
    assert len(match.placements) == LAYERS * len(ZOO[name].roles)
    for part in match.placements:
        x, found = given[part.tensor], moments.input(part)
        assert found.tokens == ids.numel() == len(x)
        torch.testing.assert_close(found.matrix.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-4, atol=1e-5)


def test_what_is_given_one_tensor_shares_one_moment(zoo, tmp_path):
    ids = windows(2)
    moments = calibrated(zoo("llama"), ids, tmp_path / "llama")
    keys = {part.role: moments.key(part) for part in match_checkpoint(open_folder(zoo("llama"))).placements[:7]}
    assert keys["q"] == keys["k"] == keys["v"]
    assert keys["gate"] == keys["up"]
    assert len(set(keys.values())) == 4
    assert len(moments.infos) == 4 * LAYERS + 2  # tokens and the head's
    assert len(calibrated(zoo("gptj"), ids, tmp_path / "gptj").infos) == 3 * LAYERS + 2  # attention and FC side by side


def test_a_stored_dtype_changes_the_weights_only(zoo, tmp_path):
    """Bfloat16 weights are computed with in float32, as a model that is loaded so does."""
    folder, ids = zoo("llama", dtype=torch.bfloat16), windows(2)
    moments = calibrated(folder, ids, tmp_path / "moments")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = []
    model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(lambda _, args: given.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=ids)
    down = match_checkpoint(open_folder(folder)).placements[-1]
    expected = given[0].double().T @ given[0].double() / ids.numel()
    torch.testing.assert_close(moments.input(down).matrix.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_blocks_that_multiply_in_bfloat16_give_nearly_the_same_moments(zoo, tmp_path, name):
    checkpoint = open_folder(zoo(name))
    chain, ids = open_chain(checkpoint, match_checkpoint(checkpoint), CPU), windows(4)
    for low in (False, True):
        gather(replace(chain, low=low), ids, tmp_path / str(low))
    stored, rounded = (load_file(tmp_path / f"{low}" / "block-0001.safetensors") for low in (False, True))
    assert stored.keys() == rounded.keys()
    matrices = [key for key in stored if key.endswith(".matrix")]
    assert any(not torch.equal(stored[key], rounded[key]) for key in matrices)
    for key in matrices:
        difference = torch.linalg.matrix_norm(stored[key] - rounded[key])
        assert difference <= 0.02 * torch.linalg.matrix_norm(stored[key]), key


def test_only_the_block_itself_multiplies_in_bfloat16(zoo):
    """Not what is done with what it gives its weights, nor what is made of what leaves it."""
    checkpoint = open_folder(zoo("llama"))
    chain = replace(open_chain(checkpoint, match_checkpoint(checkpoint), CPU), low=True)
    (batch,), seen = chain.enter([windows(2)]), []

    def see(name, *tensors):
        seen.append((tensors[0] @ tensors[0].transpose(-1, -2)).dtype)
        assert not torch.is_autocast_enabled("cpu")

    with chain.loaded(0) as block:
        leaving = block.run(batch, see).hidden
        entering = block.back(batch, torch.ones_like(leaving), see)
    assert leaving.dtype == entering.dtype == torch.float32
    assert set(seen) == {torch.float32, torch.bfloat16}  # each its own dtype: an FC's activations are in bfloat16


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("config", ["MixtralConfig", "Qwen3MoeConfig", "GptOssConfig"])
def test_experts_have_moments_of_the_tokens_that_are_routed_to_them(tmp_path, config, low):
    """Each token goes to two experts, so that their sums add up to twice that of all tokens."""
    made = getattr(transformers, config)(**EXPERTS)
    folder = save_model(randomize(transformers.AutoModelForCausalLM.from_config(made)).eval(), tmp_path / "model")
    checkpoint = open_folder(folder)
    chain = replace(open_chain(checkpoint, match_checkpoint(checkpoint), CPU), low=low)
    ids = windows(4)
    infos, inputs = gather(chain, ids, tmp_path / "moments")
    stored = load_file(tmp_path / "moments" / "block-0001.safetensors")
    (every,) = (name for name in stored if name.endswith(("router.weight.matrix", "gate.weight.matrix")))
    for side in ("gate_up_proj", "down_proj"):
        names = [name for name in infos if f".{side}[" in name and name.startswith("1.")]
        assert sum(infos[name].tokens for name in names) == 2 * ids.numel()
        if side == "gate_up_proj":
            total = sum(infos[name].tokens * stored[f"{infos[name].name}.matrix"].double() for name in names)
            torch.testing.assert_close(total, 2 * ids.numel() * stored[every].double(), rtol=1e-4, atol=1e-4)
    listed = {name: found for name, found in inputs.items() if ".experts." in name and "bias" not in name}
    fused = config == "GptOssConfig"  # it stores its experts in one tensor
    assert len(listed) == 2 * (2 if fused else 4 * 3)
    for tensor, found in listed.items():
        side = "down_proj" if "down" in tensor or ".w2." in tensor else "gate_up_proj"
        numbers = range(4) if fused else [next(int(part) for part in tensor.split(".")[4:] if part.isdigit())]
        expected = tuple(f"{tensor.split('.')[2]}.mlp.experts.{side}[{number}]" for number in numbers)
        assert all(one in ("", other) for one, other in zip(found, expected, strict=True)), (tensor, found)
    if fused:
        write_record(tmp_path / "moments", Identity(checkpoint.fingerprint, "", "", "", *ids.shape), infos, inputs)
        moments, tensor = Moments.open(tmp_path / "moments", checkpoint), "model.layers.1.mlp.experts.down_proj"
        for expert, key in enumerate(inputs[tensor]):
            view = View("experts inner hidden", "(experts inner) hidden", take=(("experts", expert, expert + 1),))
            found = moments.input(Placement(1, "down", tensor, view, (INNER, HIDDEN)))
            assert (found is None) if key == "" else found.tokens == infos[key].tokens


def test_a_tensor_that_changes_between_two_products_is_not_shared():
    found, x = gathering.Gathering(), torch.ones(3, 4)
    found._see("one", x)
    found._see("same", x.view(3, 4))
    x.mul_(2.0)
    found._see("other", x)
    assert found.first == {"one": "one", "same": "one", "other": "other"}
    assert float(found.sums["other"].mean().sum()) == 8.0


def test_other_weights_may_stand_in_a_block(zoo):
    """A second stream goes through the same blocks with weights of its own; then the first ones are back."""
    checkpoint = open_folder(zoo("llama"))
    chain = open_chain(checkpoint, match_checkpoint(checkpoint), CPU)
    (batch,) = chain.enter([windows(2)])
    name = "model.layers.0.mlp.down_proj.weight"
    with chain.loaded(0) as block:
        plain = block.run(batch).hidden
        again = block.run(batch).hidden
    with chain.loaded(0, {name: torch.zeros(HIDDEN, INNER)}) as block:
        changed = block.run(batch).hidden
    with chain.loaded(0) as block:
        after = block.run(batch).hidden
    assert torch.equal(plain, again)
    assert torch.equal(plain, after)
    assert not torch.allclose(plain, changed)
    assert all(parameter.is_meta for parameter in chain.model.parameters())


# Bad input


def test_activations_that_are_not_finite_name_their_layer(tmp_path):
    model = build_zoo("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e25)
        model.model.layers[1].mlp.up_proj.weight.mul_(1e25)
    folder = save_model(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match="layer 1 gives NaN or Inf"):
        calibrated(folder, windows(1), tmp_path / "moments")
    assert not (tmp_path / "moments" / RECORD).exists()


def test_an_input_that_is_not_finite_names_its_weight():
    found = gathering.Gathering()
    found.sums["mlp.down_proj.weight"] = MomentSum.of_width(4, CPU)
    found.sums["mlp.down_proj.weight"].add(torch.tensor([[1.0, float("inf"), 0.0, 2.0]]))
    with pytest.raises(CheckpointError, match=r"layer 3: the input of mlp\.down_proj\.weight holds NaN or Inf"):
        found.check(3)


def test_a_missing_weight_is_named(zoo, tmp_path):
    tensors = load_file(zoo("llama") / "model.safetensors")
    for number, name in enumerate(["model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_bytes((zoo("llama") / "config.json").read_bytes())
        save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"has no tensor for {name}"):
            calibrated(folder, windows(1), tmp_path / "moments")


def test_models_that_are_no_chain_of_blocks_are_refused(zoo, monkeypatch):
    checkpoint = open_folder(zoo("llama"))
    chain = open_chain(checkpoint, match_checkpoint(checkpoint), CPU)

    def forward(input_ids):
        hidden = chain.model.model.embed_tokens(input_ids)
        for layer in chain.layers:
            hidden = layer(hidden) + 1.0
        return hidden

    monkeypatch.setattr(chain.model, "forward", forward)
    with pytest.raises(PlanError, match=r"cannot be run block by block.*between its blocks 0 and 1"):
        chain.enter([windows(1)])
    changed = {**checkpoint.config, "is_encoder_decoder": True}
    monkeypatch.setattr(
        "trawl.calibration.streaming.empty_model", lambda *_: SimpleNamespace(config=SimpleNamespace(**changed))
    )
    with pytest.raises(PlanError, match="encoder-decoder"):
        open_chain(checkpoint, match_checkpoint(checkpoint), CPU)


def test_few_tokens_are_told_with_the_number_needed(zoo, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trawl.calibration"):
        calibrated(zoo("llama"), windows(2, 16), tmp_path / "few")
        assert "down_proj.weight has 48 and was given 32" in caplog.text
        assert "about 48 --calibration-tokens are needed" in caplog.text
        caplog.clear()
        calibrated(zoo("llama"), windows(3, 16), tmp_path / "enough")
        assert not caplog.text


def test_moments_of_anything_else_are_refused(zoo, tmp_path):
    folder = tmp_path / "moments"
    checkpoint = open_folder(zoo("llama"))
    with pytest.raises(PlanError, match=r"holds no moments \(no moments\.json\)"):
        Moments.open(folder, checkpoint)
    calibrated(zoo("llama"), windows(3), folder)
    with pytest.raises(PlanError, match="are of another model"):
        Moments.open(folder, open_folder(zoo("qwen2")))
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | {"format_version": 2}))
    with pytest.raises(LoadError, match="format version 2; this trawl reads 1"):
        Moments.open(folder, checkpoint)
    (folder / RECORD).write_text(json.dumps(record)[:-40])
    with pytest.raises(LoadError, match="damaged moments"):
        Moments.open(folder, checkpoint)
    (folder / RECORD).write_text(json.dumps(record))
    data = (folder / "block-0001.safetensors").read_bytes()
    (folder / "block-0001.safetensors").write_bytes(data[:-8])
    with pytest.raises(LoadError, match="truncated"):
        Moments.open(folder, checkpoint)
    (folder / "block-0001.safetensors").write_bytes((folder / "block-0000.safetensors").read_bytes())
    Moments.open(folder, checkpoint)
    (folder / "block-0001.safetensors").unlink()
    with pytest.raises(LoadError, match=r"incomplete: no block-0001\.safetensors"):
        Moments.open(folder, checkpoint)


# Weights of a stack


def test_each_slice_is_weighed_on_the_side_that_it_reads(zoo, tmp_path):
    moments = calibrated(zoo("llama"), windows(3), tmp_path / "moments")
    parts = match_checkpoint(open_folder(zoo("llama"))).placements
    (fc,) = (stack for stack in make_stacks(parts, 1) if stack.name == "fc.1")
    weights = stack_weights(moments, fc)
    assert fc.roles == ("gate", "up", "down")
    assert weights.hidden[0] is weights.hidden[1]
    assert weights.hidden[2] is weights.inner[0] is weights.inner[1] is None
    weights.check(fc.shape)
    assert torch.equal(weights.inner[2], moments.input(fc.slices[2]).matrix)


def test_a_joined_stack_has_the_mean_moment_of_its_slices(zoo, tmp_path):
    moments = calibrated(zoo("llama"), windows(3), tmp_path / "moments")
    parts = match_checkpoint(open_folder(zoo("llama"))).placements
    one, *_ = make_stacks([part for part in parts if part.role in "qkv"], 1, single=True, share="input")
    (hidden,) = stack_weights(moments, one).hidden
    assert torch.equal(hidden, moments.input(one.slices[0]).matrix)
    (over,) = make_stacks([part for part in parts if part.role == "q"], None, single=True, share="role")
    (hidden,) = stack_weights(moments, over).hidden
    each = [moments.input(part).matrix for part in over.slices]
    torch.testing.assert_close(hidden, sum(each) / LAYERS)
    stack_weights(moments, over).check(over.shape)
