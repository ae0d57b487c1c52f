"""The scoreboard: ways to make a model smaller, at the same share of its layers' weights.

    python benchmarks/quality.py MODEL --data DATA --calibrate train.txt --keep 0.9 --keep 0.8 --work FOLDER

Rows, all from one calibration: plain SVD; ASVD's scaling (arXiv:2312.05821, inputs by the root of their root mean
square); whitened SVD of each matrix (SVD-LLM, arXiv:2403.07378); Basis Sharing over two layers (arXiv:2410.03765);
joint whitened SVD of q,k,v and of gate,up; the same for attention, with Tucker of each {gate,up,down}; uniform narrow;
trawl --plain; trawl; and int8, every matrix of the whole model rounded to int8 with a scale for each row. Ranks are
the same for all matrices of a role, at which whole factors, which the published methods store, hold the share that is
kept; whitened SVD stands twice, the second time in interpolative form, which trawl stores, at the ranks at which that
does. Perplexity is over windows of 1,024 tokens of WikiText-2 valid and of the second
half of the C4 sample; accuracies are `trawl eval`'s.

trawl's two rows are what `trawl compress --keep` writes, loaded from disk. In all others weights are replaced in the
loaded model by what each row's factors multiply out to, so that a row takes seconds; parameters and bytes are those of
the plan, which are those on disk, with whole factors in the published methods' rows. `--speed` times decoding at batch
1 and prefill of 512 tokens, in turns with the dense model, of the factored or narrow checkpoint that each row would be,
as trawl stores it. `--raw FILE` keeps every figure as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from speed import PREFILL, decode, prefill, seconds
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import trawl
from trawl.calibration import Moments, make_moments, open_moments
from trawl.calibration.weights import stack_weights
from trawl.checkpoint import BITS, Checkpoint
from trawl.decompose.weights import Weights
from trawl.factors import Factors
from trawl.hub import open_checkpoint
from trawl.interpolation import stored_entries, stored_shapes
from trawl.narrowing import narrow_stack, padded_tensors
from trawl.options import pick_device
from trawl.planning import Plan, make_plan, match_checkpoint
from trawl.stacking import Stack, StoredSlices
from trawl.writing import DenseWriter, SquaredErrors

TASKS = (
    "choice:arc_easy.jsonl",
    "choice:piqa.jsonl",
    "choice:hellaswag.jsonl",
    "qa:lambada_openai.jsonl",
    "qa:qa_wikidata.jsonl",
)
TURNS = 7  # of timing
ACCURACY = {"choice": "accuracy", "qa": "exact"}
Weigh = Callable[[Stack], Weights | None]


@dataclass(frozen=True, eq=False)
class Bench:
    """What all rows share.

    Attributes:
        checkpoint: the model on disk.
        model: the same, loaded; its weights are replaced and put back.
        tokenizer: its tokenizer.
        moments: of the calibration text, with those of gradients.
        device: where to compute.
        options: the command line's.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    tokenizer: Any
    moments: Moments
    device: torch.device
    options: argparse.Namespace

    def tensors(self, planned: Plan, weigh: Weigh) -> dict[str, torch.Tensor]:
        """Return stored tensors as a plan's factors multiply out."""
        changed: dict[str, torch.Tensor] = {}
        for cut in planned.narrowed.cuts if planned.narrowed else ():
            moment = self.moments.input(cut.reader)
            assert moment is not None
            outputs = self.moments.outputs.matrix(cut.reader) if planned.recipe.output_weighting != "none" else None  # type: ignore[union-attr]
            found = narrow_stack(self.checkpoint, cut, moment, self.device, outputs=outputs)
            changed |= padded_tensors(self.checkpoint, cut, found)
        factors: dict[str, Factors] = {}
        for item in planned.factored:
            source = StoredSlices(self.checkpoint, item.stack, 1.0, self.device)
            assert item.method is not None
            found_factors = item.method.decompose(source, weights=weigh(item.stack))
            factors[item.stack.name] = found_factors.to(device="cpu")
        stacks = tuple(item.stack for item in planned.factored)
        writer = DenseWriter(self.checkpoint, stacks, factors.__getitem__, dict.fromkeys(factors, 1.0))
        names = dict.fromkeys(name for stack in stacks for name in stack.tensors)
        return changed | {name: writer.replaced(name, SquaredErrors()) for name in names}

    @torch.no_grad()
    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put stored tensors into the model."""
        state = self.model.state_dict()
        for name, tensor in tensors.items():
            state[name].copy_(tensor)

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return perplexities and accuracies of a model."""
        figures: dict[str, Any] = {}
        data, limit = self.options.data, self.options.limit
        for name, text in self.texts.items():
            result = trawl.evaluate(
                model,
                f"ppl:{text}",
                tokenizer=self.tokenizer,
                limit=self.options.windows,
                context=self.options.context,
                stride=self.options.context,
                batch_tokens=self.options.batch_tokens,
            )[0].figure("perplexity")
            figures[name] = {"value": result.value, "stderr": result.stderr}
        if not self.options.accuracy:
            return figures
        for task in TASKS:
            kind, file = task.split(":")
            result = trawl.evaluate(
                model,
                f"{kind}:{data / file}",
                tokenizer=self.tokenizer,
                limit=limit,
                batch_tokens=self.options.batch_tokens,
            )[0].figure(ACCURACY[kind])
            figures[file.removesuffix(".jsonl")] = {"value": result.value, "stderr": result.stderr}
        return figures

    def speeds(self, made: PreTrainedModel | trawl.Recipe) -> dict[str, float]:
        """Return how much faster than the dense model a compressed one decodes and reads a prompt, by CPU time.

        Args:
            made: the model, or a recipe of one of the same shapes, which is written and loaded.
        """
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(made, trawl.Recipe):
                trawl.compress(self.options.model, made, Path(folder) / "out", moments=self.options.work)
                made = trawl.load(Path(folder) / "out")
            else:
                made = deepcopy(made)
            made = made.float().to(self.device).eval()
            prompt = torch.randint(3, made.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(0))
            prompt = prompt.to(self.device)
            ratios = {}
            for run in (decode, prefill):
                turns = [(seconds(run, self.exact, prompt), seconds(run, made, prompt)) for _ in range(TURNS + 1)][1:]
                ratios[run.__name__] = statistics.median(dense / own for dense, own in turns)
        return ratios

    @cached_property
    def exact(self) -> PreTrainedModel:
        """The dense model in float32."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32)
        return model.to(self.device).eval()

    @property
    def texts(self) -> dict[str, Path]:
        """The texts whose perplexity is taken."""
        return {"WikiText": self.options.data / "wikitext2raw-valid.txt", "C4": self.options.c4}


def ranks_of(stack: Stack, keep: float, *, interpolative: bool) -> int:
    """Return the rank at which a matrix's factors, whole or in interpolative form, hold a share of its parameters."""
    _, inner, hidden = stack.shape
    whole = max(1, int(keep * stack.parameters / (inner + hidden + 1)))
    if not interpolative:
        return whole
    fitting = (
        rank
        for rank in range(min(inner, hidden), whole, -1)
        if stored_entries(stack.shape, (1, rank, rank), full=False) <= keep * stack.parameters
    )
    return next(fitting, whole)


def whole_size(planned: Plan) -> tuple[int, int]:
    """Return parameters and bytes of a plan's output if none of its factors were in interpolative form."""
    assert planned.descriptor is not None
    parameters, nbytes = planned.output_parameters, planned.output_bytes
    for stack in planned.descriptor.stacks:
        bits = {name: BITS[stack.dtype_of(name)] for name in stack.factor_shapes}
        stored = {name: math.prod(shape) for name, shape in stack.factor_shapes.items()}
        whole = stored_shapes(stack.shape, stack.rank, full=stack.core == "full", sides=())
        entries = sum(math.prod(shape) for shape in whole.values())
        parameters += entries - sum(stored.values())
        nbytes += (entries * bits["left"] - sum(stored[name] * bits[name] for name in stored)) // 8
    return parameters, nbytes


def svd_recipe(
    checkpoint: Checkpoint, keep: float, share: str, group: int, *, interpolative: bool = False
) -> trawl.Recipe:
    """Return a factored recipe in which every matrix, joined or not, keeps the same share of its parameters."""
    base = trawl.Recipe(method="svd", rank=1, share=share, group_layers=group, write="factored")
    parts: dict[tuple[str, ...], list[Stack]] = {}
    for item in make_plan(checkpoint, base).stacks:
        parts.setdefault((*item.stack.roles, str(len(item.stack.layers))), []).append(item.stack)
    recipes = []
    for stacks in parts.values():
        layers = ",".join(str(layer) for stack in stacks for layer in stack.layers)
        joined = stacks[0].joined
        values = {"method": "svd", "rank": ranks_of(stacks[0], keep, interpolative=interpolative), "layers": layers}
        values["roles"] = ",".join(stacks[0].roles)
        recipes.append(trawl.Recipe(**values, share=share if joined else "none", group_layers=group if joined else 1))
    return trawl.Recipe(method="mixed", parts=tuple(recipes), write="factored")


def tucker_recipe(checkpoint: Checkpoint, keep: float) -> trawl.Recipe:
    """Return a factored recipe with {gate, up, down} of each layer by Tucker, and attention by joint SVDs."""
    attention = svd_recipe(checkpoint, keep, "input", 1).parts
    fc = make_plan(checkpoint, trawl.Recipe(method="tucker", rank=1, roles="fc", group_layers=1)).stacks[0].stack
    size, inner, hidden = fc.shape
    budget, sides = keep * fc.parameters, inner + hidden
    right = min(hidden, int((math.sqrt(sides**2 + 4 * size * budget) - sides) / (2 * size)))  # of size r² + sides · r
    left = min(inner, int((budget - hidden * right) / (size * right + inner)))
    parts = [part for part in attention if set(part.roles.split(",")) & {"q", "k", "v", "o"}]
    parts.append(trawl.Recipe(method="tucker", rank=(size, left, right), roles="fc", group_layers=1))
    return trawl.Recipe(method="mixed", parts=tuple(parts), write="factored")


def narrow_recipe(checkpoint: Checkpoint, keep: float) -> trawl.Recipe:
    """Return a recipe that narrows all FCs alike, to a share of all layers' weights."""
    match = match_checkpoint(checkpoint)
    total = sum(math.prod(part.shape) for part in match.placements)
    fc = [part for part in match.placements if part.role in ("gate", "up", "down")]
    of_fc = sum(math.prod(part.shape) for part in fc)
    units = fc[0].shape[0]
    return trawl.Recipe(method="narrow", width=int(units * (keep * total - (total - of_fc)) / of_fc))


def stored_size(folder: Path) -> tuple[int, int]:
    """Return entries and bytes of all tensors in a folder's shards."""
    tensors = [tensor for shard in folder.glob("*.safetensors") for tensor in load_file(shard).values()]
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def asvd_weights(moments: Moments) -> Weigh:
    """Return ASVD's scaling: each input by the root of its root mean square."""

    def weigh(stack: Stack) -> Weights:
        weights = stack_weights(replace(moments, outputs=None), stack)
        inner, hidden = (_root_of_diagonal(side[0]) for side in (weights.inner, weights.hidden))
        return Weights((inner,), (hidden,))

    return weigh


def _root_of_diagonal(moment: torch.Tensor | None) -> torch.Tensor | None:
    return None if moment is None else moment.diagonal().clamp_min(0).sqrt()


def int8(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return every matrix rounded to int8 with a scale for each row."""
    rounded = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            scale = tensor.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            rounded[name] = (tensor / scale).round() * scale
    return rounded


Row = tuple[dict[str, torch.Tensor] | PreTrainedModel, int, int, trawl.Recipe | None]
"""What is scored, tensors to put into the model or a model of its own; parameters of the whole, bytes of its shards; a
recipe that gives modules of the same shapes."""


def rows(bench: Bench, keep: float, work: Path) -> dict[str, Callable[[], Row]]:
    """Return by name what makes each row."""
    plain_moments = replace(bench.moments, outputs=None)

    def of(recipe: trawl.Recipe, weigh: Weigh, *, whole: bool = False) -> Row:
        planned = make_plan(bench.checkpoint, recipe)
        size = whole_size(planned) if whole else (planned.output_parameters, planned.output_bytes)
        return bench.tensors(planned, weigh), *size, recipe

    def svd(share: str, group: int, weigh: Weigh) -> Callable[[], Any]:
        return lambda: of(svd_recipe(bench.checkpoint, keep, share, group), weigh, whole=True)

    def whitened(stack: Stack) -> Weights:
        return stack_weights(plain_moments, stack)

    def found(*, plain: bool) -> Row:
        options = bench.options
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            asked = {} if options.refit is None else {"refit": options.refit}
            recipe = trawl.Recipe(keep=keep, plain=plain, **asked)
            trawl.compress(
                options.model, recipe, out, calibrate=options.calibrate, moments=work, device=str(bench.device)
            )
            parameters, nbytes = stored_size(out)
            model = trawl.load(out, dtype=getattr(torch, options.dtype)).to(bench.device).eval()
            return model, parameters, nbytes, None

    return {
        "whitened SVD": svd("none", 1, whitened),
        "whitened SVD, interpolative": lambda: of(
            svd_recipe(bench.checkpoint, keep, "none", 1, interpolative=True), whitened
        ),
        "trawl": lambda: found(plain=False),
        "trawl --plain": lambda: found(plain=True),
        "uniform narrow": lambda: of(narrow_recipe(bench.checkpoint, keep), whitened),
        "joint whitened SVD": svd("input", 1, whitened),
        "Tucker of each FC": lambda: of(tucker_recipe(bench.checkpoint, keep), whitened),
        "Basis Sharing": svd("role", 2, whitened),
        "ASVD scaling": svd("none", 1, asvd_weights(bench.moments)),
        "plain SVD": svd("none", 1, lambda _: None),
    }


def run(bench: Bench, work: Path, raw: Path | None, console: Console) -> None:
    """Make and score every row, and print a table for each share kept."""
    original = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    dense = {"parameters": bench.checkpoint.parameters, "bytes": bench.checkpoint.nbytes, "seconds": 0.0}
    figures: dict[str, Any] = {"dense": dense | bench.score(bench.model)}
    began = time.perf_counter()
    bench.put(int8(bench.model))
    size = sum(t.numel() + 4 * len(t) if t.dim() == 2 else 4 * t.numel() for t in _stored(bench))
    seconds = time.perf_counter() - began
    figures["int8"] = {"parameters": bench.checkpoint.parameters, "bytes": size, "seconds": seconds} | bench.score(
        bench.model
    )
    bench.put(original)
    for keep in bench.options.keep:
        for name, make in rows(bench, keep, work).items():
            if bench.options.row and name not in bench.options.row:
                continue
            began = time.perf_counter()
            made, parameters, nbytes, recipe = make()
            row = {"parameters": parameters, "bytes": nbytes, "seconds": time.perf_counter() - began}
            if bench.options.speed:
                row |= bench.speeds(made if isinstance(made, PreTrainedModel) else recipe)
            if isinstance(made, PreTrainedModel):
                figures[f"{keep}: {name}"] = row | bench.score(made)
            else:
                bench.put(made)
                figures[f"{keep}: {name}"] = row | bench.score(bench.model)
                bench.put({key: original[key] for key in made})
            console.print(f"{keep}: {name}", {key: _shown(value) for key, value in figures[f"{keep}: {name}"].items()})
            if raw:
                raw.write_text(json.dumps(figures, indent=1))
        console.print(table(figures, keep))


def _stored(bench: Bench) -> list[torch.Tensor]:
    state = bench.model.state_dict()
    return [state[name] for name in bench.checkpoint.tensors if name in state]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.4g}"
    return f"{value:,.0f}" if value > 99 else f"{value:.3g}"


def table(figures: Mapping[str, Any], keep: float) -> Table:
    """Return one share's rows, with excess perplexity relative to whitened SVD's."""
    base, reference = figures["dense"], figures.get(f"{keep}: whitened SVD")
    names = [name for name in base if isinstance(base[name], dict)]
    accuracies = [name for name in names if name not in ("WikiText", "C4")]
    chosen = ["dense", "int8", *(name for name in figures if name.startswith(f"{keep}: "))]
    timed = ("decode", "prefill") if any("decode" in figures[name] for name in chosen) else ()
    columns = ("parameters", "MB", "WikiText", "C4", "of whitened's excess", *accuracies, "mean", *timed, "minutes")
    shown = Table(f"keep {keep}", *columns)
    for name in chosen:
        row = figures[name]
        ratios = ""
        if reference and name not in ("dense", "int8"):
            parts = [
                (row[text]["value"] - base[text]["value"]) / (reference[text]["value"] - base[text]["value"])
                for text in ("WikiText", "C4")
            ]
            ratios = " / ".join(f"{part:.3f}" for part in parts)
        mean = sum(row[task]["value"] for task in accuracies) / len(accuracies) if accuracies else math.nan
        shown.add_row(
            name.removeprefix(f"{keep}: "),
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['WikiText']['value']:.2f}",
            f"{row['C4']['value']:.2f}",
            ratios,
            *(f"{100 * row[task]['value']:.1f} ± {100 * row[task]['stderr']:.1f}" for task in accuracies),
            f"{100 * mean:.1f}" if accuracies else "",
            *(f"{row[name]:.2f}" if name in row else "" for name in timed),
            f"{row['seconds'] / 60:.1f}",
        )
    return shown


def main() -> None:
    """Print the scoreboard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of texts and task files")
    parser.add_argument("--calibrate", type=Path, required=True, action="append", help="text of the calibration")
    parser.add_argument("--work", type=Path, required=True, help="keeps moments and damages for another run")
    parser.add_argument("--keep", type=float, action="append", required=True, help="of the layers' linear weights")
    parser.add_argument("--row", action="append", help="rows to make; by default all")
    parser.add_argument("--windows", type=int, default=24, help="of each text")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window of a text")
    parser.add_argument("--limit", type=int, default=500, help="records of each task")
    parser.add_argument("--no-accuracy", dest="accuracy", action="store_false", help="perplexities only")
    parser.add_argument("--speed", action="store_true", help="time decoding and prefill against dense, in float32")
    parser.add_argument("--refit", action=argparse.BooleanOptionalAction, help="trawl's rows; by default as compress")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="to score in")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--raw", type=Path, help="JSON file of all figures")
    options = parser.parse_args()
    logging.disable_progress_bar()
    console = Console(width=200)
    device = pick_device(options.device)
    checkpoint = open_checkpoint(str(options.model))
    match = match_checkpoint(checkpoint)
    options.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    source = open_moments(
        checkpoint,
        match,
        options.calibrate,
        folder=options.work,
        device=device,
        output_weighting="kronecker",
        compute="bf16",
    )
    moments = make_moments(source, options.work)
    assert moments is not None
    console.print(f"calibrated in {(time.perf_counter() - began) / 60:.1f} minutes")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(device).eval()
    with tempfile.TemporaryDirectory() as scratch:
        text = (options.data / "c4val.txt").read_text(encoding="utf-8")
        options.c4 = Path(scratch) / "c4-second-half.txt"
        options.c4.write_text(text[len(text) // 2 :], encoding="utf-8")
        bench = Bench(checkpoint, model, AutoTokenizer.from_pretrained(options.model), moments, device, options)
        run(bench, options.work, options.raw, console)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {device}"
    print(json.dumps({"torch": torch.__version__, "machine": machine}))


if __name__ == "__main__":
    main()
