"""Factored checkpoints in the real transformers: every family x method, through each Auto class, and every way to fail."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import trawl.hf
from tests.zoo import ZOO, build_zoo
from trawl.checkpoint import open_folder
from trawl.descriptor import describe, describe_stack
from trawl.errors import LoadError
from trawl.factors import Factors
from trawl.hf import FactoredLinear, FactorStack
from trawl.planning import match_checkpoint
from trawl.stacking import make_stacks

METHODS = ("cp", "tucker", "mixed", "svd")
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
TOKENS = torch.arange(3, 35).reshape(2, 16)


def random_factors(method, shape, generator, dtype):
    """Small random factors: ranks differ, so that a mix-up of sides shows."""
    size, inner, hidden = shape
    r1, r2, mixed = (5, 6, 2 if method == "mixed" else size) if method in ("tucker", "mixed") else (4, 4, size)
    draw = partial(torch.randn, generator=generator)
    core = draw(mixed, r1, r2) if method in ("tucker", "mixed") else draw(mixed, r1)
    factors = Factors(
        draw(inner, r1) * 0.1, draw(hidden, r2) * 0.3, core, draw(size, mixed) if method == "mixed" else None
    )
    return factors.to(dtype=dtype)


def write_pair(source, method, out, roles=None, dtype=torch.float32):
    """Write the same random factors into a factored and a dense folder, and return both."""
    checkpoint = open_folder(source)
    placements = [
        part
        for part in match_checkpoint(checkpoint).placements
        if part.layer in (1, 2) and (roles is None or part.role in roles)
    ]
    generator = torch.Generator().manual_seed(7)
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    dense, described = dict(tensors), []
    for stack in make_stacks(placements, None, single=method == "svd"):
        factors = random_factors(method, stack.shape, generator, dtype)
        core = "diagonal" if factors.core.dim() == 2 else "full"
        mixed = factors.stack is not None
        item = describe_stack(
            stack, factors.rank, core, tensors=checkpoint.tensors, stack_factor=mixed, dtype=DTYPE_NAMES[dtype]
        )
        described.append(item)
        for factor, name in item.factor_names.items():
            tensors[name] = factors.tensors()[factor]
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


def outputs(model):
    with torch.no_grad():
        return model.eval()(TOKENS)[0]


def close(one, other, tolerance=1e-4):
    assert (one - other).abs().max() <= tolerance * (other.max() - other.min())


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
def test_every_auto_class_loads(name, auto, pair, tmp_path):
    factored, dense = pair(name)
    torch.manual_seed(0)  # a new classification head is random
    model = trawl.hf.load(factored, auto)
    torch.manual_seed(0)
    reference = getattr(transformers, auto).from_pretrained(dense)
    assert len(factored_modules(model)) == sum(".trawl." not in key for key in model.state_dict() if empty(model, key))
    states = [module.state_dict() for module in (model, reference)]
    head = next((key for key in states[1] if key.endswith(("score.weight", "classifier.weight", "out_proj.weight"))), None)
    if head:
        states[0][head].copy_(states[1][head])
    close(outputs(model), outputs(reference))
    model.save_pretrained(tmp_path / "again")  # under the names of this class
    close(outputs(trawl.hf.load(tmp_path / "again", auto)), outputs(model), 1e-6)


def empty(model, key):
    return model.state_dict()[key].numel() == 0
