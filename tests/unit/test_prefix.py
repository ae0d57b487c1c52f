"""Replayed prefixes: the same numbers as full runs, to the last bit, from the first changed layer on."""

import itertools

import pytest
import torch
from torch import nn

from tests.zoo import LAYERS, ZOO, build_zoo
from trawl.checkpoint import Checkpoint
from trawl.errors import FamilyError
from trawl.evaluation.reading import prompt_batches, read, write
from trawl.evaluation.scoring import Request, log_likelihoods
from trawl.evaluation.subject import Subject
from trawl.families import match_family
from trawl.hf.apply import in_memory
from trawl.models import find_layers
from trawl.planning import match_checkpoint
from trawl.sweeps.prefix import PrefixCache, least_missed

DECODERS = [name for name, entry in ZOO.items() if entry.auto == "AutoModelForCausalLM"]
ENOUGH = 1 << 30
LENGTHS = (3, 9, 5, 9, 12, 4)


class Spelling:
    """A tokenizer that only writes token numbers."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


def described(model) -> Checkpoint:
    return in_memory(model, {name: tensor.detach() for name, tensor in model.state_dict().items()})


def layers_of(model):
    return find_layers(model, match_checkpoint(described(model)))


def make(name, *, max_memory=ENOUGH, starts=None, **settings):
    """Return a tiny model as a subject, and its prefix cache."""
    model = build_zoo(name)
    for key, value in settings.items():
        setattr(model.config, key, value)
    subject = Subject(model, Spelling(), 64, 40)  # batches of a few rows
    return subject, PrefixCache(model, layers_of(model), max_memory, starts)


def scored(subject, shift=0):
    """Return log-likelihoods and what the model writes: calls without and with a key-value cache."""
    rows = [tuple((7 * i + shift + length) % 90 + 3 for i in range(length)) for length in LENGTHS]
    requests = [Request(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]
    found = [log_likelihoods(subject, requests, bool)]
    for batch in prompt_batches([request.context for request in requests], subject, 4):
        prompts, texts = zip(*((requests[n].context, [requests[n].continuation]) for n in batch), strict=True)
        reading = read(subject, prompts, texts)
        found += [reading.likelihoods, write(subject, reading, 4)]
    return found


def change(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.25)


class Runs(list):
    """Counts which layers really run."""

    def __init__(self, prefixes):
        for number, layer in enumerate(prefixes.layers):
            watched = next(
                child for child in layer.modules() if isinstance(child, nn.LayerNorm) or "Norm" in type(child).__name__
            )
            watched.register_forward_hook(lambda *_, number=number: self.append(number))


@pytest.mark.parametrize("name", DECODERS)
def test_replay_gives_the_bits_of_a_full_run(name):
    subject, prefixes = make(name)
    base = scored(subject)
    with prefixes.recording():
        assert scored(subject) == base
    assert prefixes.reason == ""
    assert prefixes.kept == (1, 2)
    for changed in range(LAYERS):
        full, cache = make(name)
        change(cache.layers[changed])
        change(prefixes.layers[changed])
        runs = Runs(prefixes)
        expected = scored(full)
        with prefixes.replaying(changed):
            found = scored(subject)
        assert found == expected
        assert found != base
        decoding = min(runs.count(layer) for layer in range(LAYERS))
        assert (runs.count(0) < runs.count(LAYERS - 1)) == (changed > 0), (changed, decoding)
        subject, prefixes = make(name)
        with prefixes.recording():
            scored(subject)


@pytest.mark.parametrize("name", ["gemma3_text", "gemma2", "mistral", "phi3"])
def test_sliding_windows_are_refilled(name):
    subject, prefixes = make(name, sliding_window=4)
    if name in ("gemma3_text", "gemma2"):
        assert "sliding_attention" in subject.model.config.layer_types
    with prefixes.recording():
        scored(subject)
    assert prefixes.reason == ""
    change(prefixes.layers[2])
    expected = scored(subject)
    with prefixes.replaying(2):
        assert scored(subject) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype):
    model = build_zoo("llama", dtype)
    subject, prefixes = Subject(model, Spelling(), 64, 40), PrefixCache(model, layers_of(model), ENOUGH)
    with prefixes.recording():
        scored(subject)
    change(prefixes.layers[2])
    expected = scored(subject)
    with prefixes.replaying(2):
        assert scored(subject) == expected


def test_encoders_have_prefixes_too():
    model = build_zoo("bert")
    prefixes = PrefixCache(model, layers_of(model), ENOUGH)
    ids = torch.arange(3, 19).reshape(2, 8)
    with prefixes.recording(), torch.inference_mode():
        model.base_model(input_ids=ids)
    change(prefixes.layers[2])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        with prefixes.replaying(2):
            runs = Runs(prefixes)
            assert torch.equal(model(input_ids=ids).logits, expected)
    assert set(runs) == {2}


def test_unknown_calls_run_as_ever():
    subject, prefixes = make("llama")
    with prefixes.recording():
        scored(subject)
    calls = prefixes.calls
    change(prefixes.layers[0])  # a replay would not see this
    expected = scored(subject, shift=1)
    ids = torch.arange(3, 19).reshape(2, 8)
    with prefixes.replaying(2):
        assert scored(subject, shift=1) == expected
        assert prefixes.calls == calls
    subject, prefixes = make("llama")
    with prefixes.recording(), torch.no_grad():
        scored(subject)
        subject.model(input_ids=ids, use_cache=False)
        known = prefixes.calls
        subject.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        with torch.enable_grad():
            subject.model(input_ids=ids[:1], use_cache=False)
        subject.model.train()
        subject.model(input_ids=ids + 1, use_cache=False)
        subject.model.eval()
        assert prefixes.calls == known == calls + 1
    with prefixes.replaying(2):
        subject.model(input_ids=ids, use_cache=False).logits.sum().backward()
        assert prefixes.layers[0].mlp.up_proj.weight.grad is not None


def test_a_replay_starts_at_the_nearest_layer_kept():
    subject, prefixes = make("llama", starts=[2])
    with prefixes.recording():
        scored(subject)
    assert prefixes.kept == (2,)
    change(prefixes.layers[1])
    expected = scored(subject)
    with prefixes.replaying(1):
        runs = Runs(prefixes)
        assert scored(subject) == expected
    assert runs.count(0) == runs.count(2)


def test_memory_is_bounded():
    subject, prefixes = make("llama")
    with prefixes.recording():
        scored(subject)
    whole, calls = prefixes.nbytes, prefixes.calls
    assert whole == prefixes._held()
    for budget in (whole, whole - 1, whole // 2, whole // 4, whole // 10, 1):
        subject, prefixes = make("llama", max_memory=budget)
        with prefixes.recording():
            scored(subject)
        assert prefixes.nbytes == prefixes._held() <= budget
        assert prefixes.calls + prefixes.missed == calls
        change(prefixes.layers[2])
        expected = scored(subject)
        with prefixes.replaying(2):
            assert scored(subject) == expected
        if budget < whole:
            assert len(prefixes.kept) < 2
    assert prefixes.calls == 0


@pytest.mark.parametrize(
    ("kept", "starts", "dropped"),
    [
        (range(1, 9), range(1, 9), [1, 3, 5, 7, 8, 2, 6]),
        (range(20, 26), range(20, 26), [21, 23, 25, 22, 24]),
        ([3, 9], [3, 9], [3]),
    ],
)
def test_what_is_missed_least_goes_first(kept, starts, dropped):
    kept = list(kept)
    for layer in dropped:
        assert least_missed(kept, list(starts)) == layer
        kept.remove(layer)

    def cost(kept):
        return sum(start - max((layer for layer in kept if layer <= start), default=0) for start in starts)

    assert cost(kept) <= 3 * min(cost(each) for each in itertools.combinations(starts, len(kept)))


def test_an_error_while_recording_leaves_nothing():
    subject, prefixes = make("llama")
    before = [vars(layer).keys() for layer in prefixes.layers]
    with pytest.raises(ZeroDivisionError), prefixes.recording():
        fail(scored(subject))
    assert (prefixes.calls, prefixes.nbytes) == (0, 0)
    assert [vars(layer).keys() for layer in prefixes.layers] == before
    with prefixes.recording():
        handle = prefixes.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            scored(subject)
        assert prefixes.nbytes == 0
        handle.remove()
        scored(subject)
    assert prefixes.calls
    assert "forward" not in vars(prefixes.layers[0])


def fail(*_):
    raise ZeroDivisionError


class Leaky(nn.Module):
    """A layer around a layer that does one thing which cannot be replayed."""

    def __init__(self, inner, act):
        super().__init__()
        self.inner, self.act = inner, act

    def forward(self, *args, **kwargs):
        return self.act(self.inner, *args, **kwargs)


def counting_cache(inner, *args, **kwargs):
    """Keep something in the cache by the side of ``update``."""
    if kwargs.get("past_key_values") is not None:
        layer = kwargs["past_key_values"].layers[0]
        layer.count = getattr(layer, "count", 0) + 1
    return inner(*args, **kwargs)


def with_router(inner, *args, **kwargs):
    return inner(*args, **kwargs), torch.ones(3)


def unwrapping(inner, *args, **kwargs):
    """Use what a neighbour returned beside the hidden state."""
    hidden, *rest = args
    return inner(hidden[0] * hidden[1].mean() if isinstance(hidden, tuple) else hidden, *rest, **kwargs)


def leaky(acts):
    subject, _ = make("llama")
    layers = subject.model.model.layers
    for number, act in acts.items():
        layers[number] = Leaky(layers[number], act)
    return subject, PrefixCache(subject.model, tuple(layers), ENOUGH)


@pytest.mark.parametrize(
    ("acts", "reason"),
    [
        ({1: counting_cache}, "its outputs differ when layers before 2 are left out"),
        ({0: with_router, 1: unwrapping}, "layer 1 runs out of turn, or without a hidden state"),
        ({1: lambda inner, *args, **kwargs: inner(*args, **kwargs) + 0}, ""),
    ],
)
def test_what_cannot_be_repeated_is_refused(acts, reason):
    subject, prefixes = leaky(acts)
    expected = scored(subject)
    with prefixes.recording():
        assert scored(subject) == expected
    assert prefixes.reason == (reason and f"LlamaForCausalLM: {reason}")
    with prefixes.replaying(2):
        assert scored(subject) == expected
    assert bool(prefixes.calls) == (not reason)
    with prefixes.recording():
        scored(subject)
    assert bool(prefixes.nbytes) == (not reason)


def test_work_between_layers_is_refused():
    subject, prefixes = make("llama")
    prefixes.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    with prefixes.recording():
        scored(subject)
    assert prefixes.reason == "LlamaForCausalLM: something happens to the hidden state between layers 0 and 1"


def test_layers_out_of_turn_are_refused():
    subject, prefixes = make("llama")
    turned = PrefixCache(subject.model, prefixes.layers[::-1], ENOUGH)
    with turned.recording():
        scored(subject)
    assert "layer 2 runs out of turn" in turned.reason
    subject.model.config.num_hidden_layers = 2
    with prefixes.recording():
        scored(subject)
    assert "2 of 3 layers ran in a call" in prefixes.reason
    assert "more than once" in PrefixCache(subject.model, (prefixes.layers[0],) * 2, ENOUGH).reason
    assert "ever the first" in PrefixCache(subject.model, prefixes.layers, ENOUGH, starts=[0]).reason


@pytest.mark.parametrize("name", ZOO)
def test_layers_are_found(name):
    model = build_zoo(name)
    found = layers_of(model)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == LAYERS)
    assert found == tuple(blocks)


def test_layers_of_another_place_are_refused():
    model = build_zoo("gpt2")
    checkpoint = described(model)
    shapes = {name.removeprefix("transformer."): info.shape for name, info in checkpoint.tensors.items()}
    with pytest.raises(FamilyError, match=r"GPT2LMHeadModel has no module h\.0"):
        find_layers(model, match_family(checkpoint.config, shapes))
