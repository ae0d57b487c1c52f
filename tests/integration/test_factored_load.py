"""Factored checkpoints in the real transformers: every family x method, each Auto class, and every way to fail."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from functools import partial
from math import isqrt

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import trawl.hf
from tests.zoo import ZOO
from trawl.checkpoint import open_folder
from trawl.descriptor import Descriptor, describe, describe_stack
from trawl.errors import LoadError
from trawl.factors import Factors
from trawl.families import match_family
from trawl.hf import FactoredLinear, FactorStack
from trawl.hf.replacement import stacks_of
from trawl.interpolation import PAYS
from trawl.stacking import make_stacks

METHODS = ("cp", "tucker", "mixed", "svd", "high tucker", "high svd")  # high: ranks of the interpolative form
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
TOKENS = torch.arange(3, 35).reshape(2, 16)


def random_factors(method, shape, generator, dtype):
    """Small random factors, as they are stored: ranks differ, so that a mix-up of sides shows."""
    size, inner, hidden = shape
    mixed = 2 if method == "mixed" else size
    high_inner, high_hidden = (isqrt(PAYS * rows) + 1 for rows in (inner, hidden))
    r1, r2 = {
        "tucker": (5, 6),
        "mixed": (5, 6),
        "high tucker": (high_inner, high_hidden),
        "high svd": 2 * (min(inner, high_hidden),),
    }.get(method, (4, 4))
    draw = partial(torch.randn, generator=generator)
    core = draw(mixed, r1, r2) if method in ("tucker", "mixed", "high tucker") else draw(mixed, r1)
    factors = Factors(
        draw(inner, r1) * 0.1, draw(hidden, r2) * 0.3, core, draw(size, mixed) if method == "mixed" else None
    )
    return factors.interpolated().to(dtype=dtype)


def write_pair(source, method, out, dtype=torch.float32, layers=(1, 2)):
    """Write the same random factors into a factored and a dense folder, and return both."""
    checkpoint = open_folder(source)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    placements = [part for part in match_family(checkpoint.config, shapes).placements if part.layer in layers]
    generator = torch.Generator().manual_seed(7)
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    dense, described = dict(tensors), []
    for stack in make_stacks(placements, None, single=method in ("svd", "high svd")):
        factors = random_factors(method, stack.shape, generator, dtype)
        core = "diagonal" if factors.core.dim() == 2 else "full"
        mixed = factors.stack is not None
        item = describe_stack(
            stack, factors.rank, core, tensors=checkpoint.tensors, stack_factor=mixed, dtype=DTYPE_NAMES[dtype]
        )
        described.append(item)
        for factor, name in item.factor_names.items():
            tensors[name] = factors.stored()[factor]
        for index, part in enumerate(stack.slices):
            tensors[part.tensor] = torch.empty(0, dtype=dense[part.tensor].dtype)
            part.view.scatter(factors.to(dtype=torch.float32).slice(index), dense[part.tensor])
    descriptor = describe(described)
    config = json.loads((source / "config.json").read_bytes())
    for folder, kept, extra in (
        (out / "factored", tensors, {"quantization_config": descriptor.to_json()}),
        (out / "dense", dense, {}),
    ):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        (folder / "config.json").write_text(json.dumps(config | extra))
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return out / "factored", out / "dense"


@pytest.fixture(scope="module")
def pair(zoo, tmp_path_factory):
    """Return a function that gives the two folders of a family and method, made once."""
    made = {}

    def folders(name, method="tucker", dtype=torch.float32):
        key = name, method, dtype
        if key not in made:
            made[key] = write_pair(zoo(name, 1, dtype), method, tmp_path_factory.mktemp("pair"), dtype=dtype)
        return made[key]

    return folders


def factored_modules(model):
    return [module for module in model.modules() if isinstance(module, FactoredLinear)]


def outputs(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(tokens)[0]


def close(one, other, tolerance=1e-4):
    assert (one - other).abs().max() <= tolerance * other.abs().max()  # two classes of a new head may lie close


def same(one, other):
    """Two models have the same weights; where these lie in memory may choose another kernel, so outputs only agree."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    close(outputs(one), outputs(other), 1e-5 if one.dtype == torch.float32 else 0.02)


AUTO = [
    pytest.param(name, auto, id=f"{name}-{auto}")
    for name, entry in ZOO.items()
    for auto in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification")
    if getattr(transformers, entry.config) in getattr(transformers, auto)._model_mapping
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ZOO)
def test_factored_logits_equal_dense_logits(name, method, pair):
    factored, dense = pair(name, method)
    auto = getattr(transformers, ZOO[name].auto)
    model, info = auto.from_pretrained(factored, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert factored_modules(model)
    assert not model.training
    close(outputs(model), outputs(auto.from_pretrained(dense)))


@pytest.mark.parametrize(("name", "auto"), AUTO)
def test_every_auto_class_loads_and_saves_under_its_own_names(name, auto, pair, tmp_path):
    factored, dense = pair(name)
    reference, info = getattr(transformers, auto).from_pretrained(dense, output_loading_info=True)
    model = trawl.hf.load(factored, auto)
    assert type(model) is type(reference)
    new = {key: value for key, value in reference.state_dict().items() if key in info["missing_keys"]}
    assert not model.load_state_dict(new, strict=False).unexpected_keys  # a new head or pooler is random
    close(outputs(model, TOKENS[:1]), outputs(reference, TOKENS[:1]))
    model.save_pretrained(tmp_path)
    close(outputs(trawl.hf.load(tmp_path), TOKENS[:1]), outputs(model, TOKENS[:1]), 1e-5)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("name", ZOO)
def test_save_pretrained_gives_back_an_equal_folder(name, dtype, pair, tmp_path):
    factored, _ = pair(name, "mixed", dtype)
    trawl.hf.load(factored).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (factored / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "config.json").read_bytes()) == json.loads((factored / "config.json").read_bytes())


def test_a_cast_model_saves_a_folder_that_describes_the_cast(pair, tmp_path):
    model = trawl.hf.load(pair("llama")[0], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    again = trawl.hf.load(tmp_path)
    same(again, model)
    same(model.to(torch.float32), again.float())


def test_many_shards_load(pair, tmp_path):
    model = trawl.hf.load(pair("llama")[0])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same(trawl.hf.load(tmp_path), model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_bfloat16_stays_within_its_rounding(name, pair):
    factored, dense = pair(name, "tucker", torch.bfloat16)
    model = trawl.hf.load(factored)
    assert model.dtype == torch.bfloat16
    exact = outputs(trawl.hf.load(factored, dtype=torch.float32))
    reference = trawl.hf.load(dense)
    rounding = (outputs(reference) - outputs(reference.float())).abs().max()
    assert (outputs(model) - exact).abs().max() <= 3 * rounding


def test_arguments_of_from_pretrained_are_respected(pair):
    factored, _ = pair("llama")
    model = trawl.hf.load(factored, device_map="cpu", attn_implementation="eager", dtype="float16")
    assert model.config._attn_implementation == "eager"
    assert model.device == torch.device("cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_the_class_to_load_with(pair):
    factored, _ = pair("llama")
    assert type(trawl.hf.load(factored)).__name__ == "LlamaForCausalLM"
    assert type(trawl.hf.load(factored, "AutoModel")).__name__ == "LlamaModel"
    assert type(trawl.hf.load(str(factored), transformers.AutoModelForCausalLM)).__name__ == "LlamaForCausalLM"
    with pytest.raises(LoadError, match="no model class AutoModelForNothing"):
        trawl.hf.load(factored, "AutoModelForNothing")
    with pytest.raises(LoadError, match="no such folder"):
        trawl.hf.load(factored / "elsewhere")


def test_dense_folders_load_too(pair):
    model = trawl.hf.load(pair("llama")[1])
    assert not factored_modules(model)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_generate_gives_the_tokens_of_the_dense_model(name, pair):
    factored, dense = pair(name)
    tokens = [
        trawl.hf.load(folder).generate(TOKENS[:1, :5], max_new_tokens=8, do_sample=False, pad_token_id=0)
        for folder in (factored, dense)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_torch_compile_traces_the_model_whole(name, pair):
    model = trawl.hf.load(pair(name, "mixed")[0])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(outputs(compiled), outputs(model), 1e-5)
    torch.compiler.reset()


def test_copies_and_pickles_own_their_factors(pair):
    model = trawl.hf.load(pair("phi3")[0])
    before = outputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(other, model)
        owned = {id(module) for module in other.modules() if isinstance(module, FactorStack)}
        assert {id(part.stack) for module in factored_modules(other) for part in module.parts} == owned
        for module in other.modules():
            if isinstance(module, FactorStack):
                module.core.data.zero_()
        assert not torch.allclose(outputs(other), before, atol=1e-3)
    close(outputs(model), before, 1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "bert"])
def test_modules_that_read_the_same_input_are_neighbours(name, pair):
    model = trawl.hf.load(pair(name)[0])
    found = set()
    for module in factored_modules(model):
        for part in module.parts:
            if near := part.neighbours:
                tensors = [each.tensor for each in part.stack.description.slices[near.first : near.stop]]
                found.add(" ".join(tensor.split(".")[-2] for tensor in tensors))
    assert (
        found
        == {
            "llama": {"k_proj v_proj", "gate_proj up_proj"},
            "phi3": {"qkv_proj qkv_proj", "gate_up_proj gate_up_proj"},
            "gpt_neox": {"query_key_value query_key_value query_key_value"},
            "bert": {"query key value"},
        }[name]
    )


def test_factors_lie_in_memory_by_their_longer_axis_and_survive_copies_so(pair):
    model = trawl.load(pair("llama")[0])
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to(torch.bfloat16)
    for made in (model, *copies):
        for stack in stacks_of(made).values():
            for factor in (stack.left, stack.right):
                assert factor.shape[0] > factor.shape[1]
                assert factor.stride() == (1, factor.shape[0])


def test_state_dict_loads_back(pair):
    one, other = (trawl.hf.load(pair("llama", "cp")[0]) for _ in range(2))
    for parameter in other.parameters():
        parameter.data.normal_()
    other.load_state_dict(one.state_dict())
    same(one, other)
    assert sum(key.endswith(".left") for key in one.state_dict()) == len(stacks_of(one))


@pytest.mark.parametrize("name", ZOO)
def test_weight_reads_as_the_dense_matrix(name, pair):
    factored, dense = pair(name, "tucker", torch.bfloat16)
    model = trawl.hf.load(factored)
    reference = trawl.hf.load(dense)
    for path, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            expected = reference.get_submodule(path).weight
            assert (module.weight.shape, module.weight.dtype) == (expected.shape, expected.dtype)
            assert torch.equal(module.weight, expected)


def test_dequantize_gives_the_dense_model(pair, tmp_path):
    factored, dense = pair("gpt2")
    model = trawl.hf.load(factored).dequantize()
    assert not factored_modules(model)
    model.save_pretrained(tmp_path)
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path, dense))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name]) for name in one)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_bytes())


class Allocations(TorchDispatchMode):
    """Collects the shapes of all tensors that are made on the CPU."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                self.shapes.add(tuple(sorted(each.shape)))
        return result


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loading_and_running_never_form_a_replaced_matrix(name, zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # dispatch modes see their own thread only
    factored, dense = write_pair(zoo(name), "tucker", tmp_path, layers=(0, 1, 2))
    config = json.loads((factored / "config.json").read_bytes())["quantization_config"]
    replaced = {tuple(sorted(part["stored_shape"])) for stack in config["stacks"] for part in stack["slices"]}
    kept = load_file(factored / "model.safetensors").values()
    replaced -= {tuple(sorted(tensor.shape)) for tensor in kept}  # gpt2: c_attn looks like an embedding
    seen = {}
    for folder in (factored, dense):
        with Allocations() as allocations:
            outputs(trawl.hf.load(folder), TOKENS[:1, :7])
        seen[folder] = allocations.shapes & replaced
    assert not seen[factored]
    assert seen[dense] == replaced


def test_plain_transformers_raises(pair, zoo, tmp_path):
    """Without trawl imported: the real library, in a process of its own, must not return random weights."""
    cases = [(str(pair(name)[0]), auto) for name, auto in (("llama", "AutoModelForCausalLM"), ("gpt2", "AutoModel"))]
    cases.append((str(pair("bert")[0]), "AutoModelForSequenceClassification"))
    joined = trawl.Recipe(method="svd", rank=5, share="input", write="factored")
    cases.append((str(trawl.compress(zoo("llama"), joined, tmp_path / "joined").out), "AutoModelForCausalLM"))
    code = (
        "import json, sys, transformers\n"
        "for folder, auto in json.loads(sys.argv[1]):\n"
        "    try: getattr(transformers, auto).from_pretrained(folder)\n"
        "    except RuntimeError as e: print('raised', 'mismatch' in str(e) or 'ignore_mismatched_sizes' in str(e))\n"
        "    else: print('loaded')\n"
        "assert not [name for name in sys.modules if name.startswith('trawl')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(cases)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split("\n")[:-1] == ["raised True"] * len(cases)


def edit_config(folder, change):
    """Copy a folder's files beside it with a changed quantization_config."""
    config = json.loads((folder / "config.json").read_bytes())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


GATE = "model.layers.1.mlp.gate_proj.weight"
LEFT = "model.layers.1.trawl.fc_1_2.left"


def rename_everywhere(folder, old, new):
    edit_tensors(folder, lambda tensors: tensors.update({new: tensors.pop(old)}))
    path = folder / "config.json"
    path.write_text(path.read_text().replace(old, new))


def huge(config):
    for stack in config["stacks"]:
        stack["shape"] = [stack["shape"][0], 1 << 38, 1 << 38]
        stack["rank"] = [stack["rank"][0], 1 << 37, 1 << 37]
        for part in stack["slices"]:
            part["stored_shape"] = [1 << 38, 1 << 38]
            part["view"] = {"stored": "rows columns", "canonical": "rows columns"}


BROKEN = {
    "missing factor": (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(LEFT)), f"{LEFT}, is in none"),
    "wrong shape": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({LEFT: torch.zeros(47, 5)})),
        r"fc_1_2.left in model.safetensors is \(47, 5\) F32; config.json describes \(48, 5\)",
    ),
    "wrong dtype": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({LEFT: tensors[LEFT].half()})),
        "fc_1_2.left .* F16; config.json describes",
    ),
    "stand-in missing": (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(GATE)), f"{GATE}, is in none"),
    "stand-in not empty": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({GATE: torch.zeros(48, 32)})),
        "gate_proj.weight .* says that it is factored",
    ),
    "stray factor": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({"a.1.trawl.b.left": torch.zeros(2)})),
        "a.1.trawl.b.left .* belongs to no stack",
    ),
    "version": (
        lambda folder: edit_config(folder, lambda config: config.update(format_version=3)),
        "format_version is 3",
    ),
    "ranks": (
        lambda folder: edit_config(folder, lambda config: config["stacks"][0].update(rank=[4, 7, 6])),
        r"config.json describes \(.*7\)",
    ),
    "huge": (lambda folder: edit_config(folder, huge), "config.json describes .*137438953472"),
    "path": (
        lambda folder: edit_config(folder, lambda config: config["stacks"][0].update(name="../fc")),
        r"stacks\[0\]: name is '../fc'",
    ),
    "no module": (
        lambda folder: rename_everywhere(folder, GATE, GATE.replace("gate_proj", "extra_proj")),
        "extra_proj.weight, but LlamaForCausalLM has no module model.layers.1.mlp.extra_proj",
    ),
    "no linear module": (
        lambda folder: rename_everywhere(folder, GATE, "model.layers.1.input_layernorm.weight"),
        "input_layernorm.weight, which in LlamaForCausalLM belongs to a LlamaRMSNorm",
    ),
    "another model": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 40')
        ),
        r"mlp.*shape \(.*48.*\), but module .* has a weight of",
    ),
    "no description": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace("quantization_config", "something_else")
        ),
        "holds the factor .* no quantization_config",
    ),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8]),
        "model.safetensors is truncated",
    ),
    "no shard": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "not an object": (lambda folder: (folder / "config.json").write_text("[]"), "expected an object"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_say_what_and_where(kind, pair, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(pair("llama")[0], folder)
    assert trawl.hf.check_folder(folder)
    change, message = BROKEN[kind]
    change(folder)
    with pytest.raises(LoadError, match=message) as caught:
        trawl.hf.load(folder)
    assert "\n" not in str(caught.value)
    if kind not in ("no module", "no linear module", "another model"):  # all else is known before there is a model
        with pytest.raises(LoadError, match=message):
            trawl.hf.check_folder(folder)


@pytest.mark.parametrize("kind", ["missing factor", "wrong shape", "version", "ranks", "huge", "no module", "path"])
def test_from_pretrained_checks_as_load_does(kind, pair, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(pair("llama")[0], folder)
    change, message = BROKEN[kind]
    change(folder)
    with pytest.raises(LoadError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_factor_that_did_not_arrive_is_an_error(pair, tmp_path, monkeypatch):
    """Were headers and names right and a factor still not loaded, transformers would initialise it at random."""
    monkeypatch.setattr(Descriptor, "check_tensors", lambda *_: None)
    folder = tmp_path / "broken"
    shutil.copytree(pair("llama")[0], folder)
    edit_tensors(folder, lambda tensors: tensors.pop(LEFT))
    with pytest.raises(LoadError, match=f"factor {LEFT} of stack fc.1-2 was not loaded"):
        trawl.hf.load(folder)


def test_registering_twice_does_no_harm():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    trawl.hf.register()
    trawl.hf.register()
    assert AUTO_QUANTIZER_MAPPING["trawl"] is trawl.hf.TrawlQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["trawl"] is trawl.hf.TrawlConfig
