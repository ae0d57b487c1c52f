"""Hostile files: every kind of file that a stranger may hand over, and a watch over what reading them does.

Each kind has valid seeds and a reader. A case is one mutated seed; it passes when the reader returns or raises
TrawlError, in time, without touching anything outside its folder. ``benchmarks/fuzz.py`` runs many of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import trawl
from tests.mutations import mutate_bytes, mutate_json, mutate_lines, mutate_shard, mutate_yaml
from trawl.checkpoint import INDEX_NAME, SINGLE_NAME, open_folder
from trawl.densifying import open_factored
from trawl.errors import TrawlError
from trawl.evaluation.tasks import parse_task
from trawl.factors import Factors
from trawl.families import match_family
from trawl.layout import dense_layout
from trawl.planning import make_plan
from trawl.recipe_reader import make_recipe, read_recipe
from trawl.report.reading import read_folder

LIMIT = 5.0  # seconds of the processor for one case; an ordinary one takes a thousandth
PATIENCE = 60.0  # seconds by the clock, for a case that waits; beside other processes work takes several times its own
HIDDEN, INNER, LAYERS = 8, 12, 2
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}
SHAPES = {
    "self_attn.q_proj": (8, HIDDEN),
    "self_attn.k_proj": (4, HIDDEN),
    "self_attn.v_proj": (4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 8),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
RECIPE_YAML = (
    "method: tucker\nrank: [2, 3, 4]\nlayers: 0-1\nroles: [gate, up]\ngroup_layers: 2\nwrite: factored\nseed: 1\n"
    "tol: 0.001\nn_iter_max: 5\n"
)
FAMILY_YAML = """\
model_types: [llama]
prefixes: ["model.", ""]
layer: "layers.{layer}."
layers: [num_hidden_layers, "hidden_size // 4"]
sizes:
  hidden: hidden_size
  head_dim: [head_dim, hidden // num_attention_heads]
roles:
  q: {tensor: self_attn.q_proj.weight, view: (heads head_dim) hidden}
  o: {tensor: [self_attn.o_proj.weight, out.weight], view: hidden width -> width hidden}
  up: {tensor: mlp.up_proj.weight, view: inner hidden, take: {inner: [0, 2 * head_dim]}, optional: true}
outside:
  embed: embed_tokens.weight
"""
TASKS = {
    "qa": b'{"prompt": "1 + 1 =", "answers": ["2", "two"]}\n\n{"prompt": "2 + 2 =", "answers": ["4"]}\n',
    "choice": b'{"query": "a", "choices": ["b", "c"], "gold": 1}\n{"query": "d", "choices": ["e", "f"], "gold": 0}\n',
    "pairs": b'{"sentence1": "a", "sentence2": "b", "score": 1.5}\n{"sentence1": "c", "sentence2": "d", "score": 2}\n',
    "ppl": b"A text, no more.\n",
}


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: of the kind.
        file: the name that each case is given.
        seed: a valid file.
        mutate: makes a case of a seed.
        read: reads the folder that holds the case, whose path it is given too.
    """

    name: str
    file: str
    seed: bytes
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path, Path], object]


RECIPES = (
    trawl.Recipe(rank=2),
    trawl.Recipe(method="svd", rank=2, roles="all,embed,lm_head", write="factored"),
    trawl.Recipe(method="narrow", width=0.5),
)


def read_checkpoint(folder: Path, _case: Path) -> None:
    """Open, plan, and read every tensor of a checkpoint."""
    checkpoint = open_folder(folder)
    failed = None
    for recipe in RECIPES:
        try:
            make_plan(checkpoint, recipe)
        except TrawlError as e:
            failed = e
    assert checkpoint.fingerprint
    assert checkpoint.state()
    for name in checkpoint.tensors:
        checkpoint.read(name)
    if failed:
        raise failed


def read_for_recipe(folder: Path, case: Path) -> None:
    """Read a recipe, and plan with it."""
    make_plan(open_folder(folder), make_recipe(read_recipe(case), str(case)))


def read_for_family(folder: Path, case: Path) -> None:
    """Match a checkpoint with a family file."""
    checkpoint = open_folder(folder)
    match_family(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()}, case)


def read_for_layout(folder: Path, _case: Path) -> None:
    """Open a factored checkpoint, and lay out the dense one."""
    dense_layout(*open_factored(folder))


def read_for_report(folder: Path, _case: Path) -> None:
    """Read a compress output's record, as a report does."""
    read_folder(folder)


@dataclass
class Watch:
    """What cases did that none may do: an audit hook, on for the length of a case.

    Attributes:
        roots: folders that may be read; the first may be written to.
        seen: what was done outside.
    """

    roots: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)
    on: bool = False

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """Note an event, while a case runs."""
        if not self.on:
            return
        if event == "open" and isinstance(args[0], str | bytes):
            path, flags = os.path.realpath(os.fsdecode(args[0])), args[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not path.startswith(self.roots[:1] if writes else self.roots):
                self.seen.append(f"open {path}{' to write' if writes else ''}")
        elif event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {args!r:.80}")


FORBIDDEN = ("pickle.find_class", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
WATCH = Watch()
sys.addaudithook(WATCH.hook)


class TooSlowError(Exception):
    """A case worked longer than ``LIMIT`` or waited longer than ``PATIENCE``."""


def _alarm(_signal: int, _frame: object) -> None:
    raise TooSlowError


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Run one case: bounded in time, noting what it does outside ``folder``."""
    shipped = (str(Path(trawl.__file__).parents[1]), sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"))
    WATCH.roots, WATCH.seen = (str(folder.resolve()) + os.sep, *(os.path.realpath(path) for path in shipped)), []
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, LIMIT), (signal.ITIMER_REAL, signal.SIGALRM, PATIENCE))
    before = [signal.signal(number, _alarm) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    WATCH.on = True
    try:
        yield WATCH.seen
    finally:
        WATCH.on = False
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def outcome(kind: Kind, folder: Path, content: bytes) -> str:
    """Put a case into a folder of valid files, read it, and return what came of it in words.

    Returns: ``read``, the name of a TrawlError, or a text that begins with ``FAULT``.
    """
    case = folder / kind.file
    case.write_bytes(content)
    try:
        with watched(folder) as seen:
            kind.read(folder, case)
        found = "read"
    except TrawlError as e:
        line = str(e)
        found = type(e).__name__ if len(line) < 20_000 else f"FAULT: a message of {len(line)} characters"
    except BaseException as e:  # noqa: BLE001 (what a case must never do, interrupts of the alarm included)
        found = f"FAULT: {type(e).__name__}: {e!s:.200}"
    return f"FAULT: outside the folder: {seen[0]}" if seen else found


def checkpoint_files(dtype: torch.dtype = torch.float32) -> dict[str, bytes]:
    """Return the files of a tiny checkpoint."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.randn(shape, generator=generator).to(dtype)
        for layer in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    for name, shape in (("model.embed_tokens", (16, HIDDEN)), ("lm_head", (16, HIDDEN)), ("model.norm", (HIDDEN,))):
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator).to(dtype)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, SINGLE_NAME)}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        SINGLE_NAME: save(tensors, metadata={"format": "pt"}),
        INDEX_NAME: json.dumps(index).encode(),
    }


def factored_files() -> dict[str, bytes]:
    """Return the files of the same checkpoint, factored, and its record."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        write_files(source, checkpoint_files())
        recipe = trawl.Recipe(method="tucker", rank=(2, 2, 2), roles="fc", write="factored")
        trawl.compress(source, recipe, Path(scratch) / "out")
        return {path.name: path.read_bytes() for path in (Path(scratch) / "out").iterdir()}


def factor_file() -> bytes:
    """Return a factor file."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "fc.safetensors"
        Factors(torch.ones(4, 2), torch.ones(3, 2), torch.ones(5, 2), relative_error=0.5).save(path, {"stack": {}})
        return path.read_bytes()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def make_kinds(root: Path) -> dict[str, tuple[Kind, Path]]:
    """Make every kind, each with a folder of its own whose files are valid."""
    dense, factored = checkpoint_files(), factored_files()
    kinds = (
        Kind("safetensors header", SINGLE_NAME, dense[SINGLE_NAME], mutate_shard, read_checkpoint),
        Kind("index", INDEX_NAME, dense[INDEX_NAME], mutate_json, read_checkpoint),
        Kind("config.json", "config.json", dense["config.json"], mutate_json, read_checkpoint),
        Kind("recipe YAML", "recipe.yaml", RECIPE_YAML.encode(), mutate_yaml, read_for_recipe),
        Kind("family YAML", "family.yaml", FAMILY_YAML.encode(), mutate_yaml, read_for_family),
        Kind("factored descriptor", "config.json", factored["config.json"], mutate_json, read_for_layout),
        Kind("factored shard", SINGLE_NAME, factored[SINGLE_NAME], mutate_shard, read_for_layout),
        Kind("factor file", "fc.safetensors", factor_file(), mutate_shard, lambda _, case: Factors.load(case)),
        Kind("trawl.json", "trawl.json", factored["trawl.json"], mutate_json, read_for_report),
        *(
            Kind(
                f"{task} task",
                task,
                seed,
                mutate_bytes if task == "ppl" else mutate_lines,
                lambda _, case: parse_task(f"{case.name}:{case}"),
            )
            for task, seed in TASKS.items()
        ),
    )
    folders = {}
    for kind in kinds:
        files = factored if kind.name.startswith("factored") else dense
        folders[kind.name] = kind, write_files(root / kind.name.replace(" ", "-"), {**files, kind.file: kind.seed})
    return folders


def cases(kind: Kind, seed: int) -> Iterator[bytes]:
    """Yield cases of a kind without end; the same seed gives the same ones."""
    rng = random.Random(f"{kind.name} {seed}")
    while True:
        yield kind.mutate(kind.seed, rng)
