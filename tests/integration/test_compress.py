"""What a run promises: one rename, resume, same bytes, nothing written on a mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import trawl
from tests.integration.test_zoo import folder_hash
from trawl.errors import CheckpointError, PlanError, ResumeError
from trawl.workspace import Workspace

RECIPE = trawl.Recipe(rank=4, roles="fc", group_layers=1)


def weights_hash(folder: Path) -> str:
    return folder_hash_of(sorted(folder.glob("*.safetensors")))


def folder_hash_of(files: list[Path]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("method", ["cp", "tucker", "svd"])
def test_same_input_seed_and_threads_give_the_same_bytes(method, zoo, tmp_path):
    recipe = trawl.Recipe(method=method, rank=3, seed=7)
    for out in ("a", "b"):
        trawl.compress(zoo("llama", 3), recipe, tmp_path / out)
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")


def test_records_say_what_was_done(zoo, tmp_path):
    report = trawl.compress(zoo("llama"), RECIPE, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "trawl.json").read_text())
    assert [stack["name"] for stack in record["stacks"]] == ["fc.0", "fc.1", "fc.2"]
    assert record["stacks"][1]["relative_error"] == report.stacks[1].relative_error
    assert record["identity"]["recipe"]["rank"] == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{report.stacks[1].relative_error:.5f}" in card
    assert "base_model:" in card
    assert str(tmp_path) not in card


def test_the_source_card_metadata_is_carried_over(zoo, tmp_path):
    import shutil

    source = tmp_path / "source"
    shutil.copytree(zoo("llama"), source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Title\n")
    trawl.compress(source, RECIPE, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "# Title" not in card


class StopError(Exception):
    """Stands for a kill at a stage."""


def stop_at(stage: str):
    def observer(name: str, done: int, total: int | None) -> None:
        if name.startswith(stage) and done:
            raise StopError

    return observer


@pytest.mark.parametrize("stage", ["decomposing fc.1", "writing"])
def test_resume_goes_on_from_sealed_files(stage, zoo, tmp_path, monkeypatch):
    source, out = zoo("llama", 3), tmp_path / "out"
    trawl.compress(source, RECIPE, tmp_path / "undisturbed")
    with pytest.raises(StopError):
        trawl.compress(source, RECIPE, out, observer=stop_at(stage))
    assert not out.exists()
    sealed = {path.name: path.stat().st_mtime_ns for path in Workspace(out).factors.glob("*.safetensors")}
    assert "fc.0.safetensors" in sealed

    decomposed = []
    report = trawl.compress(source, RECIPE, out, resume=True, observer=lambda name, _d, _t: decomposed.append(name))
    assert "decomposing fc.0" not in decomposed
    assert report.stacks[0].seconds == 0
    assert not Workspace(out).partial.exists()
    assert weights_hash(out) == weights_hash(tmp_path / "undisturbed")
    again = trawl.compress(source, RECIPE, out, resume=True)
    assert again.stacks == report.stacks


def test_resume_refuses_stacks_that_a_family_file_takes_elsewhere_by_now(zoo, tmp_path):
    """Of the same names and shapes: gate and up are swapped in between."""
    source, out, file = zoo("llama"), tmp_path / "out", tmp_path / "family.yaml"
    family = (Path(trawl.__file__).parent / "families" / "llama.yaml").read_text()
    file.write_text(family)
    recipe = trawl.Recipe(method="svd", rank=4, roles="gate")
    with pytest.raises(StopError):
        trawl.compress(source, recipe, out, family_file=file, observer=stop_at("writing"))
    names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    file.write_text(re.sub("gate_proj|up_proj", lambda found: names[found[0]], family))
    with pytest.raises(ResumeError, match="differs in slices"):
        trawl.compress(source, recipe, out, family_file=file, resume=True)
    file.write_text(family)
    assert trawl.compress(source, recipe, out, family_file=file, resume=True).stacks


def test_resume_refuses_another_run(zoo, tmp_path):
    source, out = zoo("llama"), tmp_path / "out"
    with pytest.raises(StopError):
        trawl.compress(source, RECIPE, out, observer=stop_at("writing"))
    with pytest.raises(ResumeError, match=r"recipe\.seed \(0 then, 1 now\)"):
        trawl.compress(source, RECIPE.model_copy(update={"seed": 1}), out, resume=True)
    with pytest.raises(ResumeError, match="source"):
        trawl.compress(zoo("llama", 3), RECIPE, out, resume=True)
    with pytest.raises(PlanError, match="--resume"):
        trawl.compress(source, RECIPE, out)
    trawl.compress(source, RECIPE.model_copy(update={"seed": 1}), out, overwrite=True)


def test_overwrite_keeps_the_old_output_until_the_new_one_is_complete(zoo, tmp_path):
    source, out = zoo("llama"), tmp_path / "out"
    trawl.compress(source, RECIPE, out)
    before = folder_hash(out)
    with pytest.raises(PlanError, match="--overwrite"):
        trawl.compress(source, RECIPE, out)
    other = RECIPE.model_copy(update={"rank": 2})
    with pytest.raises(StopError):
        trawl.compress(source, other, out, overwrite=True, observer=stop_at("writing"))
    assert folder_hash(out) == before
    trawl.compress(source, other, out, overwrite=True)
    assert folder_hash(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_run_on_the_same_output_is_refused(zoo, tmp_path):
    def second(name: str, done: int, total: int | None) -> None:
        if name == "writing":
            with pytest.raises(PlanError, match="another run"):
                trawl.compress(zoo("llama"), RECIPE, tmp_path / "out", resume=True)

    trawl.compress(zoo("llama"), RECIPE, tmp_path / "out", observer=second)


def test_a_killed_process_leaves_no_output_and_can_be_resumed(zoo, tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys, time, trawl\n"
        "def slow(stage, done, total):\n"
        "    if stage.startswith('decomposing fc.1'): time.sleep(60)\n"
        "recipe = trawl.Recipe(rank=4, roles='fc', group_layers=1)\n"
        "trawl.compress(sys.argv[1], recipe, sys.argv[2], observer=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(zoo("llama")), str(out)])
    deadline = time.monotonic() + 60
    while not (Workspace(out).factors / "fc.0.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert (Workspace(out).partial / "run.json").exists()
    report = trawl.compress(zoo("llama"), RECIPE, out, resume=True)
    assert [stack.seconds == 0 for stack in report.stacks] == [True, False, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_weights_are_named_and_nothing_is_written(value, zoo, tmp_path):
    import shutil

    source = tmp_path / "source"
    shutil.copytree(zoo("llama"), source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}.*1 NaN or Inf"):
        trawl.compress(source, RECIPE, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    trawl.compress(source, trawl.Recipe(rank=2, roles="attn"), tmp_path / "out")  # the stack without it is fine


def test_output_places_that_cannot_be_are_refused(zoo, tmp_path, monkeypatch):
    source = zoo("llama")
    for out in (source, source / "inside"):
        with pytest.raises(PlanError, match="equals or lies inside"):
            trawl.compress(source, RECIPE, out, overwrite=True)
    with pytest.raises(PlanError, match="contains the source"):
        trawl.compress(source, RECIPE, source.parent, overwrite=True)
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(PlanError, match=r"too small: [\d,]+ bytes needed, 1,000 free"):
        trawl.compress(source, RECIPE, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_planned_parameters_are_those_of_the_factors(zoo, tmp_path):
    for method, rank in (("cp", 5), ("tucker", (2, 4, 6)), ("tucker", 5), ("svd", 7)):
        recipe = trawl.Recipe(method=method, rank=rank)
        planned = trawl.plan(zoo("llama"), recipe)
        for item in planned.stacks:
            size, inner, hidden = item.stack.shape
            factors = trawl.decompose(torch.randn(size, inner, hidden), recipe.decomposition())
            assert factors.parameters == item.parameters_after
            assert factors.rank == item.rank
