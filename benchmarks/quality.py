"""The scoreboard: ways to make a model smaller, at the same share of its layers' weights.

    python benchmarks/quality.py MODEL --data DATA --calibrate train.txt --keep 0.9 --keep 0.8 --work FOLDER

Rows, all from one calibration: plain SVD; ASVD's scaling (arXiv:2312.05821, inputs by the root of their root mean
square); whitened SVD of each matrix (SVD-LLM, arXiv:2403.07378); Basis Sharing over two layers (arXiv:2410.03765);
joint whitened SVD of q,k,v and of gate,up; the same for attention, with Tucker of each {gate,up,down}; uniform narrow;
trawl --plain; trawl; and int8, every matrix of the whole model rounded to int8 with a scale for each row. Ranks are
the same for all matrices of a role, at which whole factors, which the published methods store, hold the share that is
kept; whitened SVD stands twice, the second time in interpolative form, which trawl stores, at the ranks at which that
does. Perplexity is over windows of 1,024 tokens of WikiText-2 valid and of the second half of the C4 sample; accuracies
are `trawl eval`'s.

trawl's two rows are what `trawl compress --keep` writes, loaded from disk; with `--sampled FILE`, a text that `trawl
sample` let the model write, they are calibrated on that too, and are rows of their own. In all others weights are
replaced in the loaded model by what each row's factors multiply out to, so that a row takes seconds; parameters and
bytes are those of the plan, which are those on disk, with whole factors in the published methods' rows. `--raw FILE`
keeps every figure as JSON, after each row: the same command goes on where it was interrupted, on any machine that has
the same model, texts and tasks, and more rows or shares may be asked for. Tables are Markdown, and `--plot FILE` draws
all rows. `--work` keeps moments, damages and trawl's outputs; minutes are those of the run that finished a row, so that
with an empty `--work` they hold all but the calibration; with `--sampled` that too, on all texts.

`--speed` times, when all rows are scored, decoding at batch 1 and prefill of 512 tokens on the CPU, in turns with the
dense model: of the factored or narrow checkpoint of each row's structures and sizes, as trawl stores it, which is all
that speed depends on. Rows that another machine scored may so be timed here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from baselines import Weigh, asvd_weights, int8, narrow_recipe, svd_recipe, tucker_recipe, whole_size
from rich.console import Console
from safetensors.torch import load_file
from scoreboard import commit, earlier, save, settings, shown, table
from speed import PREFILL, decode, prefill, seconds
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import trawl
from trawl.calibration import Moments, make_moments, open_moments
from trawl.calibration.weights import stack_weights
from trawl.checkpoint import Checkpoint
from trawl.decompose.weights import Weights
from trawl.factors import Factors
from trawl.hub import open_checkpoint
from trawl.narrowing import narrow_stack, padded_tensors
from trawl.options import pick_device
from trawl.planned import Plan
from trawl.planning import make_plan, match_checkpoint
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
ABOUT = ("commit", "machine", "recipe")  # of a row, what is no figure
CPU = torch.device("cpu")


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

    def speeds(self, recipe: trawl.Recipe) -> dict[str, float]:
        """Return how much faster than the dense model a recipe's checkpoint decodes and reads a prompt, by CPU time."""
        with tempfile.TemporaryDirectory() as folder:
            out, options = Path(folder) / "out", self.options
            trawl.compress(options.model, recipe.model_copy(update={"refit": False}), out, moments=options.work)
            made = trawl.load(out, dtype=torch.float32).eval()
            prompt = torch.randint(3, made.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(0))
            ratios = {}
            for run in (decode, prefill):
                turns = [(seconds(run, self.exact, prompt), seconds(run, made, prompt)) for _ in range(TURNS + 1)][1:]
                ratios[run.__name__] = statistics.median(dense / own for dense, own in turns)
        return ratios

    def found(self, keep: float, *, plain: bool) -> Made:
        """Return what `trawl compress --keep` writes; an interrupted run of this commit is gone on with."""
        options = self.options
        dirty = options.commit.endswith("-dirty")
        kind = f"{'plain' if plain else 'any'}{options.suffix.replace(' ', '')}"
        out: Path = options.work / f"{options.commit}-{keep}-{kind}"
        asked = {} if options.refit is None else {"refit": options.refit}
        texts, device = [*options.calibrate, *options.sampled], str(self.device)
        kept = options.work / "-".join(text.stem for text in options.sampled)
        budget = trawl.Recipe(keep=keep, plain=plain, **asked)
        recipe = trawl.find_recipe(options.model, budget, kept, calibrate=texts, device=device).recipe
        trawl.compress(
            options.model,
            recipe,
            out,
            calibrate=texts if recipe.refit else None,
            moments=kept,
            device=device,
            resume=not dirty,
            overwrite=dirty,
        )
        model = trawl.load(out, dtype=getattr(torch, options.dtype)).to(self.device).eval()
        return Made(model, *stored_size(out), recipe)

    @property
    def int8_bytes(self) -> int:
        """Bytes of the model with a byte for each entry of its matrices, and a scale for each of their rows."""
        state = self.model.state_dict()
        stored = [state[name] for name in self.checkpoint.tensors if name in state]
        return sum(t.numel() + 4 * len(t) if t.dim() == 2 else 4 * t.numel() for t in stored)

    @cached_property
    def exact(self) -> PreTrainedModel:
        """The dense model in float32, on the CPU."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32)
        return model.eval()

    @property
    def texts(self) -> dict[str, Path]:
        """The texts whose perplexity is taken."""
        return {"WikiText": self.options.data / "wikitext2raw-valid.txt", "C4": self.options.c4}


def scored_files(options: argparse.Namespace) -> list[Path]:
    """Return the files that rows are scored on; of the C4 sample its second half."""
    tasks = [task.split(":")[1] for task in TASKS if options.accuracy]
    return [options.data / name for name in ("wikitext2raw-valid.txt", "c4val.txt", *tasks)]


def machine(device: torch.device) -> str:
    """Say what computes."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads{gpu}"
    )


def stored_size(folder: Path) -> tuple[int, int]:
    """Return entries and bytes of all tensors in a folder's shards."""
    tensors = [tensor for shard in folder.glob("*.safetensors") for tensor in load_file(shard).values()]
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, eq=False)
class Made:
    """What a row scores.

    Attributes:
        weights: tensors to put into the model, or a model of its own.
        parameters: of the whole.
        nbytes: of its shards.
        recipe: of a checkpoint of the same structures and sizes; None for a row that is no checkpoint of trawl's.
    """

    weights: dict[str, torch.Tensor] | PreTrainedModel
    parameters: int
    nbytes: int
    recipe: trawl.Recipe | None = None


def rows(bench: Bench, keep: float) -> dict[str, Callable[[], Made]]:
    """Return by name what makes each row."""
    plain_moments = replace(bench.moments, outputs=None)

    def of(recipe: trawl.Recipe, weigh: Weigh, *, whole: bool = False) -> Made:
        planned = make_plan(bench.checkpoint, recipe)
        size = whole_size(planned) if whole else (planned.output_parameters, planned.output_bytes)
        return Made(bench.tensors(planned, weigh), *size, recipe)

    def svd(share: str, group: int, weigh: Weigh) -> Callable[[], Made]:
        return lambda: of(svd_recipe(bench.checkpoint, keep, share, group), weigh, whole=True)

    def whitened(stack: Stack) -> Weights:
        return stack_weights(plain_moments, stack)

    return {
        "whitened SVD": svd("none", 1, whitened),
        "whitened SVD, interpolative": lambda: of(
            svd_recipe(bench.checkpoint, keep, "none", 1, interpolative=True), whitened
        ),
        f"trawl{bench.options.suffix}": lambda: bench.found(keep, plain=False),
        f"trawl --plain{bench.options.suffix}": lambda: bench.found(keep, plain=True),
        "uniform narrow": lambda: of(narrow_recipe(bench.checkpoint, keep), whitened),
        "joint whitened SVD": svd("input", 1, whitened),
        "Tucker of each FC": lambda: of(tucker_recipe(bench.checkpoint, keep), whitened),
        "Basis Sharing": svd("role", 2, whitened),
        "ASVD scaling": svd("none", 1, asvd_weights(bench.moments)),
        "plain SVD": svd("none", 1, lambda _: None),
    }


def run(bench: Bench, console: Console) -> None:
    """Make and score every row that has no figures yet, and print a table for each share kept."""
    options = bench.options
    original = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    figures = earlier(options)
    whole = bench.checkpoint.parameters
    makers: dict[str, Callable[[], Made]] = {
        "dense": lambda: Made({}, whole, bench.checkpoint.nbytes),
        "int8": lambda: Made(int8(bench.model), whole, bench.int8_bytes),
    }
    for keep in options.keep:
        offered = rows(bench, keep)
        if unknown := {*(options.row or ())} - {name.removesuffix(options.suffix) for name in offered}:
            sys.exit(f"no such row: {', '.join(sorted(unknown))}; the rows are {', '.join(offered)}")
        for name, make in offered.items():
            if not options.row or name.removesuffix(options.suffix) in options.row:
                makers[f"{keep}: {name}"] = make
    for name, make in makers.items():
        if name in figures:
            continue
        began = time.perf_counter()
        made = make()
        row: dict[str, Any] = {"parameters": made.parameters, "bytes": made.nbytes}
        row |= {"seconds": time.perf_counter() - began, "commit": options.commit, "machine": machine(bench.device)}
        row["recipe"] = made.recipe and made.recipe.model_dump(mode="json")
        if isinstance(made.weights, PreTrainedModel):
            row |= bench.score(made.weights)
        else:
            bench.put(made.weights)
            row |= bench.score(bench.model)
            bench.put({key: original[key] for key in made.weights})
        del made
        figures[name] = row
        console.print(name, {key: shown(value) for key, value in row.items() if key not in ABOUT})
        save(options, figures)
    if options.speed:
        time_rows(bench, {name: figures[name] for name in makers}, partial(save, options, figures), console)
    show(figures, options)


def show(figures: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print a table for each share, and draw all rows if that is asked for."""
    wide = Console(width=300)  # a row of Markdown is one line
    for keep in options.keep:
        wide.print(table(figures, keep))
    if options.plot:
        from scoreboard_picture import draw  # noqa: PLC0415 (matplotlib, of the extra `plot`)

        draw(figures, options.plot)


def time_rows(bench: Bench, figures: Mapping[str, dict[str, Any]], store: Callable[[], None], console: Console) -> None:
    """Time every row of a checkpoint that has no speeds yet, and store all rows after each."""
    for name, row in figures.items():
        if row["recipe"] and "decode" not in row:
            row.update(bench.speeds(trawl.Recipe.model_validate(row["recipe"])), timed=machine(CPU))
            console.print(name, {key: shown(row[key]) for key in ("decode", "prefill")})
            store()


def main() -> None:
    """Print the scoreboard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of texts and task files")
    parser.add_argument("--calibrate", type=Path, required=True, action="append", help="text of the calibration")
    parser.add_argument("--work", type=Path, required=True, help="keeps moments, damages and outputs for another run")
    parser.add_argument("--keep", type=float, action="append", required=True, help="of the layers' linear weights")
    parser.add_argument("--row", action="append", help="rows to make; by default all")
    parser.add_argument("--windows", type=int, default=24, help="of each text")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window of a text")
    parser.add_argument("--limit", type=int, default=500, help="records of each task")
    parser.add_argument("--no-accuracy", dest="accuracy", action="store_false", help="perplexities only")
    parser.add_argument("--speed", action="store_true", help="time decoding and prefill against dense, in float32, too")
    parser.add_argument("--sampled", type=Path, action="append", default=[], help="text of the model, for trawl's rows")
    parser.add_argument("--refit", action=argparse.BooleanOptionalAction, help="trawl's rows; by default as compress")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="to score in")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--plot", type=Path, help="PNG file for a picture of all rows")
    parser.add_argument("--raw", type=Path, help="JSON file of all figures; rows that it has are not made again")
    options = parser.parse_args()
    logging.disable_progress_bar()
    console = Console(width=200)
    device = options.device = pick_device(options.device)
    options.commit = commit()  # what was loaded, whatever is committed while this runs
    refit = {None: "", True: " --refit", False: " --no-refit"}[options.refit]
    also = "".join(f" + {text.name}" for text in options.sampled)
    options.suffix = refit + also  # of the names of trawl's rows
    checkpoint = open_checkpoint(str(options.model))
    options.settings = settings(options, checkpoint.fingerprint, scored_files(options))
    earlier(options)
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
        run(bench, console)
    print(json.dumps({"torch": torch.__version__, "machine": machine(device)}))


if __name__ == "__main__":
    main()
