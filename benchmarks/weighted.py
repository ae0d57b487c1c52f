"""Weighted decompositions against plain ones of the same ranks: every stack's weighted error, and perplexity.

    python benchmarks/weighted.py MODEL --calibrate train.txt --text valid.txt --method svd --keep 0.8
    python benchmarks/weighted.py MODEL --moments FOLDER --text valid.txt --method tucker --rank 64 --alone

Plain and weighted factors go into the same loaded model in turn: all stacks at once and, with ``--alone``, each stack
by itself. The weighted error is the one that is minimized, relative to the outputs' size. ``--alone`` also takes the
divergence of the predictions from the original model's on the same text, in thousandths of a nat a token: perplexity
tells what the text says of a model, and may fall by chance where its predictions change; divergence may not. Exits
with 1 where plain factors are better at anything.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer

import trawl
from trawl.budget.damage import Damage, Gauge
from trawl.calibration import Moments, make_moments, open_moments
from trawl.calibration.streaming import open_chain
from trawl.calibration.text import cut_windows
from trawl.calibration.weights import stack_weights
from trawl.checkpoint import Checkpoint
from trawl.decompose import Method
from trawl.decompose.weighing import measured
from trawl.factors import Factors
from trawl.hub import open_checkpoint
from trawl.planned import PlannedStack
from trawl.planning import match_checkpoint
from trawl.stacking import StoredSlices
from trawl.sweeps.editing import WeightEditor
from trawl.tokens import encode_plain, prefix_tokens
from trawl.writing import DenseWriter, SquaredErrors

KINDS = ("plain", "weighted")
CHARACTERS = 8 * 1024  # of text that hold 1024 tokens, and more


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model whose weights are exchanged, what it was loaded from, and the text that scores it."""

    checkpoint: Checkpoint
    editor: WeightEditor
    tokenizer: Any
    text: Path
    windows: int  # of 1024 tokens

    @contextmanager
    def gauged(self) -> Iterator[Gauge]:
        """Hold what measures divergences on the text."""
        chain = open_chain(self.checkpoint, match_checkpoint(self.checkpoint), torch.device("cpu"))
        vocabulary = self.editor.model.get_input_embeddings().weight.shape[0]
        ids = encode_plain(self.tokenizer, self.text.read_text(encoding="utf-8"), vocabulary)
        windows = cut_windows(ids, prefix_tokens(self.tokenizer), 1024, self.windows, self.text.name)
        with Gauge(chain, windows).ready() as gauge:
            yield gauge

    def perplexity(self, stacks: Sequence[PlannedStack], factors: Mapping[str, Factors]) -> float:
        """Return the model's perplexity with stacks replaced by their factors."""
        with self.editor.applied(stacks, lambda item: factors[item.stack.name]):
            (result,) = trawl.evaluate(
                self.editor.model,
                f"ppl:{self.text}",
                tokenizer=self.tokenizer,
                limit=self.windows,
                context=1024,
                stride=1024,
            )
        return result.figure("perplexity").value


def divergences(gauge: Gauge, editor: WeightEditor, item: PlannedStack, found: Mapping[str, Factors]) -> list[Damage]:
    """Return what each kind of factors of one stack, alone in the model, does to its predictions."""
    name, absmax = item.stack.name, {item.stack.name: editor.absmax(item.stack)}
    changes = []
    for kind in KINDS:
        writer = DenseWriter(editor.checkpoint, (item.stack,), {name: found[kind]}.__getitem__, absmax)
        changes.append({each: writer.replaced(each, SquaredErrors()) for each in dict.fromkeys(item.stack.tensors)})
    return gauge.measure(min(item.stack.layers), changes)


def ranked(method: Method, shape: tuple[int, int, int], keep: float | None) -> Method:
    """Return the method at the rank that keeps a share of each matrix's entries, or as it is."""
    if keep is None:
        return method
    return replace(method, rank=int(keep * shape[1] * shape[2] / (shape[1] + shape[2])))  # type: ignore[type-var]


def decomposed(
    editor: WeightEditor, moments: Moments, item: PlannedStack, method: Method
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Return plain and weighted factors, with both errors, and their seconds."""
    source = StoredSlices(editor.checkpoint, item.stack, editor.absmax(item.stack), torch.device("cpu"))
    weights = stack_weights(moments, item.stack)
    found, seconds = {}, {}
    for kind, given in zip(KINDS, (None, weights), strict=True):
        started = time.perf_counter()
        found[kind] = method.decompose(source, weights=given)
        seconds[kind] = time.perf_counter() - started
    found["plain"] = measured(source, found["plain"], weights)
    return found, seconds


def load_moments(options: argparse.Namespace, scratch: Path) -> Moments:
    """Open the folder of moments, or make one."""
    checkpoint = open_checkpoint(str(options.model), None)
    match = trawl.planning.match_checkpoint(checkpoint)
    source = open_moments(
        checkpoint,
        match,
        options.calibrate,
        folder=options.moments,
        output_weighting=options.output_weighting,
        compute=options.compute,
    )
    if source is None:
        raise SystemExit("give --calibrate TEXT or --moments FOLDER")
    moments = make_moments(source, options.moments or scratch)
    assert moments is not None
    return moments


def compare(
    subject: Subject, moments: Moments, recipe: trawl.Recipe, options: argparse.Namespace, gauge: Gauge | None
) -> bool:
    """Print the tables, with divergences where there is a gauge; return whether weighted factors always win."""
    planned = subject.editor.plan(recipe)
    factors: dict[str, dict[str, Factors]] = {kind: {} for kind in KINDS}
    columns = ["stack", "shape", "rank", "relative error", "weighted error", "ratio", "seconds"]
    print_row([*columns, *(["perplexity alone", "divergence alone"] if gauge else [])])
    lost: list[str] = []
    for item in planned.stacks:
        method = ranked(recipe.decomposition(), item.stack.shape, options.keep)
        found, seconds = decomposed(subject.editor, moments, item, method)
        plain, weighted = (found[kind].weighted_error or 0.0 for kind in KINDS)
        if not weighted < plain:
            lost.append(f"{item.stack.name} (weighted error)")
        cells = [f"{found[kind].relative_error:.4f}" for kind in KINDS], [f"{plain:.4f}", f"{weighted:.4f}"]
        row = [item.stack.name, str(item.stack.shape), str(found["plain"].rank[2]), *map(" / ".join, cells)]
        row += [f"{weighted / plain:.3f}", " / ".join(f"{seconds[kind]:.2f}" for kind in KINDS)]
        for kind in KINDS:
            factors[kind][item.stack.name] = found[kind]
        if gauge:
            scores = [subject.perplexity([item], factors[kind]) for kind in KINDS]
            if not scores[1] < scores[0]:
                lost.append(f"{item.stack.name} (perplexity)")
            row.append(f"{scores[0]:.2f} / {scores[1]:.2f}")
            plain_damage, weighted_damage = divergences(gauge, subject.editor, item, found)
            if not weighted_damage.mean < plain_damage.mean:
                lost.append(f"{item.stack.name} (divergence)")
            row.append(
                " / ".join(f"{1e3 * d.mean:.2f} ± {1e3 * d.stderr:.2f}" for d in (plain_damage, weighted_damage))
            )
        print_row(row)
    dense = subject.perplexity([], {})
    scores = [subject.perplexity(planned.stacks, factors[kind]) for kind in KINDS]
    print(f"perplexity: dense {dense:.2f}, all stacks plain {scores[0]:.2f}, weighted {scores[1]:.2f}")
    print(f"plain is better: {', '.join(lost) or 'nowhere'}, of {len(planned.stacks)} stacks")
    return not lost and scores[1] < scores[0]


def print_row(cells: Sequence[str]) -> None:
    """Print a row of a table as it is known."""
    print(" | ".join(cells), flush=True)


def main() -> None:
    """Compare, and exit with 1 where plain factors are better."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="scored by perplexity")
    parser.add_argument("--calibrate", help="text to take moments on")
    parser.add_argument("--moments", type=Path, help="folder that has them, or is to keep them")
    parser.add_argument("--output-weighting", default="none", help="gradients on the output side: fisher or kronecker")
    parser.add_argument("--compute", default="float32", help="of the calibration: float32 or bf16")
    parser.add_argument("--method", choices=("svd", "tucker", "cp"), default="svd")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--keep", type=float, help="share of each matrix's entries that its rank keeps (svd)")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--roles", default="all")
    parser.add_argument("--group-layers", default="1")
    parser.add_argument("--windows", type=int, default=12, help="of 1024 tokens, to score")
    parser.add_argument("--alone", action="store_true", help="score each stack by itself too")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    recipe = trawl.Recipe(
        method=options.method,
        rank=options.rank,
        layers=options.layers,
        roles=options.roles,
        group_layers=options.group_layers if options.group_layers == "all" else int(options.group_layers),
    )
    editor = WeightEditor(trawl.load(options.model, dtype=options.dtype))
    with TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"  # short, as it is tokenized for each score
        text.write_text(options.text.read_text(encoding="utf-8")[: options.windows * CHARACTERS], encoding="utf-8")
        subject = Subject(
            open_checkpoint(str(options.model)),
            editor,
            AutoTokenizer.from_pretrained(options.model),
            text,
            options.windows,
        )
        found = load_moments(options, Path(scratch) / "moments")
        with subject.gauged() if options.alone else nullcontext() as gauge:
            better = compare(subject, found, recipe, options, gauge)
    raise SystemExit(0 if better else 1)


if __name__ == "__main__":
    main()
