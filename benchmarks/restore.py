"""Put random interventions into a model and take them out again, many times; the weights must be the same bits.

python benchmarks/restore.py MODEL --trials 1000
"""

from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import trawl
from trawl.factor_library import FactorLibrary
from trawl.sweeps.editing import WeightEditor

RANKS = (1, 8)


def digest(model: torch.nn.Module) -> str:
    """Hash every tensor of a model, apart from the editor's own bookkeeping."""
    found = hashlib.blake2b()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Print whether the digest before equals the one after, and the time of one trial's edit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--trials", type=int, default=1000)
    options = parser.parse_args()
    model = trawl.load(options.model)
    editor, before = WeightEditor(model), digest(model)
    draw = random.Random(0)  # noqa: S311 (not for secrets)
    layers, changed = editor.match.layers, 0
    with tempfile.TemporaryDirectory() as folder:
        library = FactorLibrary.create(Path(folder), RANKS)
        began = time.perf_counter()
        for _ in range(options.trials):
            recipe = trawl.Recipe(
                method=draw.choice(("cp", "tucker")),
                rank=draw.choice(RANKS),
                layers=str(draw.randrange(layers)),
                roles=draw.choice(("fc", "attn")),
            )
            plan = editor.plan(recipe)
            with editor.applied(plan.stacks, partial(library.fetch, plan)):
                name = plan.stacks[0].stack.tensors[0]
                changed += not torch.equal(model.state_dict()[name], editor.checkpoint.read(name))
        seconds = time.perf_counter() - began
    same = digest(model) == before
    each = 1000 * seconds / options.trials
    print(f"{options.trials} trials, {changed} seen to change the model, {each:.0f} ms each with decompositions")
    print(f"weights bit-identical afterwards: {same}")
    if not same or changed < options.trials:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
