"""The norm in front of the head after a refit: scaled as the original model's predictions say, whatever its form."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import trawl
from tests.integration.test_anchored import with_tokenizer
from tests.integration.test_compress import StopError, weights_hash
from tests.zoo import GROUPED, VOCABULARY, save_model
from trawl.calibration.streaming import open_chain
from trawl.checkpoint import open_folder
from trawl.errors import CheckpointError
from trawl.planning import match_checkpoint
from trawl.refitting import fitting, last_norm, running
from trawl.refitting.last_norm import scale_last_norm

NORMS = {  # the stored weight, and what is added to it before it multiplies
    "llama": ("model.norm.weight", 0.0),
    "gemma2": ("model.norm.weight", 1.0),
    "gpt2": ("transformer.ln_f.weight", 0.0),
    "gpt_neox": ("gpt_neox.final_layer_norm.weight", 0.0),
}


def chain_of(folder):
    checkpoint = open_folder(folder)
    return open_chain(checkpoint, match_checkpoint(checkpoint), torch.device("cpu"))


def streams(chain, noise, seed=0):
    """What leaves the last block of a model, and what leaves a disturbed one, two batches each."""
    generator = torch.Generator().manual_seed(seed)
    batches = chain.enter([torch.randint(3, 90, (2, 16), generator=generator) for _ in range(2)])
    for number in range(len(chain)):
        with chain.loaded(number) as block:
            batches = [block.run(batch) for batch in batches]
    scale = noise * batches[0].hidden.std()
    errors = [scale * torch.randn(batch.hidden.shape, generator=generator) for batch in batches]
    return batches, [replace(one, hidden=one.hidden + error) for one, error in zip(batches, errors, strict=True)]


@torch.no_grad()
def divergence(folder, name, shift, gain, pairs):
    """KL of a loaded model's predictions from disturbed streams, with its last norm scaled, every other position."""
    model = trawl.load(folder, dtype=torch.float32).eval()
    norm = model.get_submodule(name.removesuffix(".weight"))
    head = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None) or 0.0

    def predictions(hidden):
        logits = head(norm(hidden[:, ::2]))
        return (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)

    p = [predictions(one.hidden) for one, _ in pairs]
    for parameter, values in list(norm.named_parameters()):
        own = shift if parameter == "weight" else 0.0
        values.data = gain * (values.data + own) - own
    q = [predictions(other.hidden) for _, other in pairs]
    return float(torch.stack([(a.exp() * (a - b)).sum(-1).mean() for a, b in zip(p, q, strict=True)]).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", NORMS)
def test_the_scale_is_the_one_of_least_divergence(family, dtype, zoo):
    name, shift = NORMS[family]
    folder = zoo(family, dtype=dtype)
    chain = chain_of(folder)
    original, disturbed = streams(chain, 0.2)
    gain, found = scale_last_norm(chain, original, disturbed)
    assert 1 - last_norm.MOST < gain < 1 - last_norm.LEAST
    stored = load_file(folder / "model.safetensors")
    assert set(found) == {key for key in stored if key.startswith(name.removesuffix("weight"))}
    assert {values.dtype for values in found.values()} == {dtype}
    torch.testing.assert_close(found[name], (gain * (stored[name].float() + shift) - shift).to(dtype))
    pairs = list(zip(original, disturbed, strict=True))
    tried = {step: divergence(folder, name, shift, gain + step, pairs) for step in (-0.04, 0.0, 0.04)}
    assert min(tried, key=tried.__getitem__) == 0.0
    assert tried[0.0] < divergence(folder, name, shift, 1.0, pairs)


def test_a_scale_is_at_most_a_fifth_from_one(zoo):
    chain = chain_of(zoo("gpt2"))
    gain, _ = scale_last_norm(chain, *streams(chain, 4.0))
    assert gain == 1 - last_norm.MOST


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_predicts_what_it_did_keeps_its_norm(family, seed, zoo):
    chain = chain_of(zoo(family))
    assert scale_last_norm(chain, *streams(chain, 0.0, seed)) == (1.0, {})


@pytest.mark.parametrize(("reached", "kept"), [(0.1, False), (10.0, True)])
def test_what_comes_no_nearer_as_stored_is_dropped(reached, kept, zoo, monkeypatch):
    chain = chain_of(zoo("llama"))
    original, disturbed = streams(chain, 0.3)
    values = iter([[1.0, 1.1, 1.3], [reached]])
    monkeypatch.setattr(last_norm, "_divergences", lambda *_: next(values))
    gain, found = scale_last_norm(chain, original, disturbed)
    assert gain == (1.0 if kept else pytest.approx(1 - 0.02 * 0.3 / 0.2))
    assert (found == {}) == kept
    assert not list(values)


def test_predictions_that_are_no_numbers_are_an_error(zoo):
    chain = chain_of(zoo("llama"))
    original, disturbed = streams(chain, 0.3)
    disturbed[0].hidden[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="the refitted model predicts NaN or Inf; pass --no-refit"):
        scale_last_norm(chain, original, disturbed)


def test_a_head_that_cannot_be_run_alone_leaves_the_norm_and_says_why(zoo, monkeypatch, caplog):
    chain = chain_of(zoo("llama"))
    original, disturbed = streams(chain, 0.3)

    def refuse(*_):
        raise ValueError("no inputs_embeds")

    monkeypatch.setattr(type(chain), "leave", refuse)
    with caplog.at_level("INFO", "trawl"):
        assert scale_last_norm(chain, original, disturbed) == (1.0, {})
    assert "the head cannot be run alone: no inputs_embeds" in caplog.text


def test_what_is_wrong_with_the_head_shows_before_any_fc_is_fitted(zoo, text, tmp_path, monkeypatch):
    model = with_tokenizer(zoo("llama"), tmp_path / "model")

    def broken(*_):
        raise CheckpointError("no head")

    monkeypatch.setattr(running, "find_last_norm", broken)
    monkeypatch.setattr(fitting.Refit, "solve", lambda _: pytest.fail("an FC was fitted"))
    with pytest.raises(CheckpointError, match="no head"):
        refit(model, text, tmp_path / "out")


def test_a_model_that_predicts_no_tokens_keeps_its_norm(tmp_path):
    config = transformers.LlamaConfig(**GROUPED, num_labels=VOCABULARY)
    save_model(transformers.LlamaForSequenceClassification(config), tmp_path / "model")
    chain = chain_of(tmp_path / "model")
    assert scale_last_norm(chain, *streams(chain, 0.3)) == (1.0, {})


def test_beside_a_decomposed_head_the_norm_stays(zoo, text, tmp_path):
    model = with_tokenizer(zoo("llama"), tmp_path / "model")
    head = {"method": "svd", "rank": 8, "roles": "lm_head"}
    recipe = trawl.Recipe(method="mixed", parts=({"method": "narrow", "width": 32}, head), refit=True, write="factored")
    report = trawl.compress(model, recipe, tmp_path / "out", calibrate=text, calibration_tokens=4096)
    assert report.last_norm == 1.0


@pytest.mark.parametrize("family", ["bert", "gemma2", "olmo2", "opt"])
def test_only_what_was_run_with_all_that_is_compressed_is_scaled(family, zoo, text, tmp_path):
    """Where a norm stands behind an FC it is fitted on the original's inputs; bert's has one behind its last block."""
    source = with_tokenizer(zoo(family), tmp_path / "model")
    recipe = trawl.Recipe(method="narrow", width=32, refit=True)
    report = trawl.compress(source, recipe, tmp_path / "out", calibrate=text, calibration_tokens=2048)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, report.out))
    changed = {
        name for name in before if before[name].shape != after[name].shape or (before[name] != after[name]).any()
    }
    fcs = {tensor.rpartition(".")[0] for stack in report.stacks for tensor in stack.tensors}
    others = {name for name in changed if name.rpartition(".")[0] not in fcs}
    assert bool(others) == (report.last_norm != 1.0) == (family == "opt")


def refit(model, text, out, **options):
    recipe = trawl.Recipe(method="narrow", width=32, refit=True)
    return trawl.compress(model, recipe, out, calibrate=text, calibration_tokens=4096, **options)


def test_the_output_has_it_and_says_so(zoo, text, tmp_path, monkeypatch):
    model = with_tokenizer(zoo("llama", 3), tmp_path / "model")
    gain = refit(model, text, tmp_path / "out").last_norm
    monkeypatch.setattr(running, "scale_last_norm", lambda *_: (1.0, {}))
    assert refit(model, text, tmp_path / "plain").last_norm == 1.0
    found = {name: tensors(tmp_path / name) for name in ("out", "plain")}
    name = "model.norm.weight"
    torch.testing.assert_close(found["out"].pop(name), gain * found["plain"].pop(name))
    assert all(torch.equal(found["out"][name], found["plain"][name]) for name in found["plain"])
    said = {name: (tmp_path / name / "README.md").read_text() for name in found}
    assert f"the norm in front of the head gives was scaled by {gain:.4f}" in said["out"]
    others = "Every other tensor, but for biases of the modules above"
    assert f"{others}, and the norm in front of the head, is byte-identical" in said["out"]
    assert f"{others} is byte-identical" in said["plain"]
    assert "in front of the head" not in said["plain"]
    assert refit(model, text, tmp_path / "plain", resume=True).last_norm == 1.0
    assert refit(model, text, tmp_path / "out", resume=True).last_norm == gain
    record = json.loads((tmp_path / "plain" / "trawl.json").read_text())
    assert record.pop("last_norm") == 1.0  # as outputs were before there was such a step
    (tmp_path / "plain" / "trawl.json").write_text(json.dumps(record))
    assert refit(model, text, tmp_path / "plain", resume=True).last_norm == 1.0


def tensors(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_a_run_that_stops_before_the_norm_goes_on_with_it(zoo, text, tmp_path, monkeypatch):
    model = with_tokenizer(zoo("llama"), tmp_path / "model")
    refit(model, text, tmp_path / "whole")

    def stop(*_):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(running, "scale_last_norm", stop)
        with pytest.raises(StopError):
            refit(model, text, tmp_path / "out")
    monkeypatch.setattr(fitting.Refit, "solve", stop)
    refit(model, text, tmp_path / "out", resume=True)
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "trawl.json").read_text())["last_norm"] != 1.0
