"""``trawl compress --factors``: an output from a library's factors, to the byte; processes that share a library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trawl_cli
from safetensors.torch import load_file

import trawl
from tests.zoo import build_zoo
from trawl.errors import LoadError, PlanError, ResumeError
from trawl.factor_library import FactorLibrary, digest
from trawl.hf.apply import in_memory
from trawl.planning import make_plan
from trawl.stacking import scan
from trawl.writing import DenseWriter, SquaredErrors

RECIPE = trawl.Recipe(rank=4, roles="fc", group_layers=1, layers="1-2")


def filled(folder: Path, model: Path, recipe: trawl.Recipe = RECIPE, ladder=(2, 4, 8)) -> dict[str, trawl.Factors]:
    library, planned = FactorLibrary.create(folder, ladder), trawl.plan(model, recipe)
    return {item.stack.name: library.fetch(planned, item) for item in planned.stacks}


@pytest.mark.parametrize("method", ["cp", "tucker", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_that_of_the_same_factors_in_memory(method, dtype, zoo, tmp_path):
    source, recipe = zoo("llama", 1, dtype), RECIPE.model_copy(update={"method": method})
    factors = filled(tmp_path / "library", source, recipe)
    report = trawl.compress(source, recipe, tmp_path / "out", factors=tmp_path / "library")
    assert {stack.seconds for stack in report.stacks} == {0.0}
    written = load_file(tmp_path / "out" / "model.safetensors")

    state = {name: tensor.detach() for name, tensor in build_zoo("llama", dtype).state_dict().items()}
    planned = make_plan(in_memory(build_zoo("llama", dtype), state), recipe)
    absmax = {
        item.stack.name: max(scan(planned.checkpoint, name) for name in item.stack.tensors) for item in planned.stacks
    }
    writer = DenseWriter(planned.checkpoint, tuple(item.stack for item in planned.stacks), factors.__getitem__, absmax)
    for name in planned.changed_tensors:
        assert torch.equal(written[name], writer.replaced(name, SquaredErrors()))
    trawl.compress(source, recipe, tmp_path / "anew")
    anew = load_file(tmp_path / "anew" / "model.safetensors")
    same = all(torch.equal(anew[name], written[name]) for name in written)
    assert same == (method == "svd")  # matrices this small have an exact SVD, which a cut of one is too


def test_one_change_is_built_on_another(zoo, tmp_path):
    first, second = (RECIPE.model_copy(update={"layers": layer}) for layer in "12")
    filled(tmp_path / "library", zoo("llama"))
    trawl.compress(zoo("llama"), first, tmp_path / "one", factors=tmp_path / "library")
    trawl.compress(tmp_path / "one", second, tmp_path / "both", factors=tmp_path / "library")
    trawl.compress(zoo("llama"), RECIPE, tmp_path / "at-once", factors=tmp_path / "library")
    both, at_once = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("both", "at-once"))
    assert both == at_once


def test_a_factored_output_holds_the_library_s_factors(zoo, tmp_path):
    recipe = RECIPE.model_copy(update={"write": "factored"})
    factors = filled(tmp_path / "library", zoo("llama"))
    trawl.compress(zoo("llama"), recipe, tmp_path / "out", factors=tmp_path / "library")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for part in factors.values():
        for tensor in part.tensors().values():
            assert any(other.shape == tensor.shape and torch.equal(other, tensor) for other in stored.values())


def test_the_record_names_the_factors_and_resume_heeds_them(zoo, tmp_path):
    factors = filled(tmp_path / "library", zoo("llama"))
    trawl.compress(zoo("llama"), RECIPE, tmp_path / "out", factors=tmp_path / "library")
    identity = json.loads((tmp_path / "out" / "trawl.json").read_text())["identity"]
    assert identity["factors"] == {name: digest(part) for name, part in factors.items()}

    class StopError(Exception):
        pass

    def stop(stage, done, total):
        if stage == "writing":
            raise StopError

    with pytest.raises(StopError):
        trawl.compress(zoo("llama"), RECIPE, tmp_path / "other", observer=stop)
    with pytest.raises(ResumeError, match=r"factors"):
        trawl.compress(zoo("llama"), RECIPE, tmp_path / "other", factors=tmp_path / "library", resume=True)


def test_missing_and_damaged_factors_are_refused_before_anything_is_written(zoo, tmp_path):
    library = tmp_path / "library"
    filled(library, zoo("llama"))
    for recipe, found in (
        (RECIPE.model_copy(update={"seed": 1}), r"fc\.1 for cp rank 4; .* differs in method\.seed"),
        (RECIPE.model_copy(update={"layers": "0"}), r"fc\.0 for cp rank 4; of its 4 files none is of that stack"),
        (RECIPE.model_copy(update={"rank": 5}), r"fc\.1 for cp rank 5: it is for ranks 2, 4, 8"),
    ):
        with pytest.raises(PlanError, match=found):
            trawl.compress(zoo("llama"), recipe, tmp_path / "out", factors=library)
    with pytest.raises(PlanError, match=r"has no library\.json"):
        trawl.compress(zoo("llama"), RECIPE, tmp_path / "out", factors=tmp_path)
    path = next(library.glob("fc.2-cp-r4-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LoadError, match=path.name):
        trawl.compress(zoo("llama"), RECIPE, tmp_path / "out", factors=library)
    assert [entry.name for entry in tmp_path.iterdir()] == ["library"]


def test_the_command_takes_a_library(zoo, tmp_path, monkeypatch, capsys):
    filled(tmp_path / "library", zoo("llama"))
    options = ["--rank", "4", "--roles", "fc", "--group-layers", "1", "--layers", "1-2"]
    command = ["trawl", "compress", zoo("llama"), *options, "--factors", tmp_path / "library"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "-o", str(tmp_path / "out")])
    trawl_cli.main()
    trawl.compress(zoo("llama"), RECIPE, tmp_path / "same", factors=tmp_path / "library")
    out, same = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "same"))
    assert all(torch.equal(out[name], same[name]) for name in same)
    monkeypatch.setattr(sys, "argv", [*map(str, command), "-o", str(tmp_path / "none"), "--seed", "1"])
    with pytest.raises(SystemExit, match="2"):
        trawl_cli.main()
    assert "method.seed" in capsys.readouterr().err


FETCH_ALL = """
import sys
from dataclasses import replace
from pathlib import Path
import trawl
from trawl.factor_library import FactorLibrary

def observer(stage, done, total):
    if done == 1:
        print("decomposed")

folder, model, *ranks = sys.argv[1:]
library = FactorLibrary.create(Path(folder), (2, 8, 4))
for rank in ranks:
    for layer in range(3):
        planned = trawl.plan(model, trawl.Recipe(rank=int(rank), roles="fc", layers=str(layer)))
        library.fetch(planned, planned.stacks[0], observer=observer)
"""


def start_fetching(folder: Path, model: Path, ranks: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH_ALL, folder, model, *ranks],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_processes_share_the_work_and_make_the_same_files(zoo, tmp_path):
    jobs = [
        start_fetching(tmp_path / folder, zoo("llama"), ranks)
        for folder, ranks in (("shared", "248"), ("shared", "842"), ("alone", "482"))
    ]
    texts = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0]
    decomposed = [text.count("decomposed") for text in texts]
    assert (decomposed[0] + decomposed[1], decomposed[2]) == (9, 9)  # three layers, three ranks
    shared, alone = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")} for name in ("shared", "alone")
    )
    assert not [name for name in shared if name.endswith(".partial")]
    assert shared == alone
