"""Cached factor files: made once, the same in any order, refused when damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trawl
from tests.zoo import build_zoo
from trawl.decompose import nested_chain
from trawl.errors import LoadError, PlanError
from trawl.factor_library import FactorLibrary, digest
from trawl.hf.apply import in_memory
from trawl.planning import make_plan
from trawl.stacking import StoredSlices
from trawl.views import View

LADDER = (2, 8, 4)


def planned_for(model, rank, **options):
    return trawl.plan(model, trawl.Recipe(rank=rank, roles="fc", group_layers=1, layers="1", **options))


def fetch(library, planned):
    return {item.stack.name: library.fetch(planned, item) for item in planned.stacks}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(("method", "stacks"), [("cp", 1), ("tucker", 1), ("svd", 3)])
def test_the_order_of_asking_changes_no_byte(method, stacks, zoo, tmp_path):
    made = []
    for name, order in (("up", (2, 4, 8)), ("down", (8, 4, 2)), ("mixed", (4, 8, 2))):
        library = FactorLibrary.create(tmp_path / name, order)
        found = {rank: fetch(library, planned_for(zoo("llama"), rank, method=method)) for rank in order}
        made.append(bytes_of(tmp_path / name))
        assert {rank: {part.rank[2] for part in parts.values()} for rank, parts in found.items()} == {
            2: {2},
            4: {4},
            8: {8},
        }
    assert made[0] == made[1] == made[2]
    assert len(made[0]) == 3 * stacks


def test_factors_are_those_of_the_chain(zoo, tmp_path):
    planned = planned_for(zoo("llama"), 8)
    (item,) = planned.stacks
    library = FactorLibrary.create(tmp_path, LADDER)
    found = library.fetch(planned, item)
    start = None
    for method in nested_chain(item.method, item.stack.shape, LADDER):
        source = StoredSlices(planned.checkpoint, item.stack, 1.0, torch.device("cpu"))
        start = method.decompose(source, start).balanced()
    assert digest(found) == digest(start)
    assert (found.relative_error, found.iterations) == (start.relative_error, start.iterations)


def test_what_is_there_is_not_made_again(zoo, tmp_path, monkeypatch):
    library = FactorLibrary.create(tmp_path, LADDER)
    stages = []
    planned = planned_for(zoo("llama"), 4)
    first = library.fetch(planned, planned.stacks[0], observer=lambda stage, _d, _t: stages.append(stage))
    assert set(stages) == {"decomposing fc.1"}
    stages.clear()
    again = FactorLibrary.open(tmp_path).fetch(
        planned, planned.stacks[0], observer=lambda stage, _d, _t: stages.append(stage)
    )
    assert stages == []
    assert digest(again) == digest(first)
    assert len(bytes_of(tmp_path)) == 2  # rank 2, where rank 4 starts, and rank 4
    library.fetch(planned_for(zoo("llama"), 2), planned.stacks[0])
    assert len(bytes_of(tmp_path)) == 2


def test_whatever_decides_the_bytes_tells_files_apart(zoo, tmp_path):
    library = FactorLibrary.create(tmp_path, LADDER)
    options = [
        {},
        {"seed": 1},
        {"tol": 1e-3},
        {"n_iter_max": 3},
        {"compute": "bf16"},
        {"engine": "tensorly"},
        {"method": "tucker"},
    ]
    for count, option in enumerate(options, start=1):
        fetch(library, planned_for(zoo("llama"), 2, **option))
        starts = 1 if options[-1] is option else 0  # Tucker starts from rank 8
        assert len(bytes_of(tmp_path)) == count + starts
    before = len(bytes_of(tmp_path))
    fetch(library, planned_for(zoo("llama"), 2, write="factored"))  # the same factors, written in another way
    assert len(bytes_of(tmp_path)) == before
    fetch(library, planned_for(zoo("llama", 1, torch.bfloat16), 2))
    fetch(library, planned_for(zoo("mistral"), 2))
    assert len(bytes_of(tmp_path)) == before + 2
    many = trawl.plan(zoo("llama"), trawl.Recipe(rank=2, roles="fc"))
    fetch(library, many)
    assert len(bytes_of(tmp_path)) == before + 3


def test_slices_of_one_fused_tensor_are_told_apart(zoo, tmp_path):
    library = FactorLibrary.create(tmp_path, (2,))
    for role in ("gate", "up"):
        fetch(library, trawl.plan(zoo("phi3"), trawl.Recipe(rank=2, roles=role, layers="1")))
    assert len(bytes_of(tmp_path)) == 2


def test_another_view_of_the_same_tensor_is_another_stack(zoo, tmp_path):
    library = FactorLibrary.create(tmp_path, (2,))
    planned = planned_for(zoo("llama"), 2)
    (item,) = planned.stacks
    library.fetch(planned, item)
    view = View("inner hidden", sizes=(("inner", 48),), take=(("inner", 0, 48),))
    slices = (replace(item.stack.slices[0], view=view), *item.stack.slices[1:])
    with pytest.raises(PlanError, match=r"differs in slices\."):
        library.find(planned, replace(item, stack=replace(item.stack, slices=slices)))


def test_only_the_weights_of_the_stack_count(zoo, tmp_path):
    library = FactorLibrary.create(tmp_path, (2,))
    recipe = trawl.Recipe(rank=2, roles="fc", layers="1")
    model = build_zoo("llama")

    def count() -> int:
        fetch(library, make_plan(in_memory(model, dict(model.state_dict())), recipe))
        return len(bytes_of(tmp_path))

    fetch(library, trawl.plan(zoo("llama"), recipe))
    assert count() == 1  # in memory, the same weights
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.zero_()
    assert count() == 1
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert count() == 2


def test_ranks_above_what_a_stack_can_have_are_left_out(zoo, tmp_path):
    library = FactorLibrary.create(tmp_path, (2, 4, 1000))
    found = fetch(library, planned_for(zoo("llama"), 2, method="svd"))
    assert len(bytes_of(tmp_path)) == 6  # each matrix at rank 4, which is cut
    assert {part.rank for part in found.values()} == {(1, 2, 2)}


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_a_damaged_file_is_refused_by_name(damage, zoo, tmp_path):
    library = FactorLibrary.create(tmp_path, LADDER)
    planned = planned_for(zoo("llama"), 2)
    fetch(library, planned)
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-9] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-10], "other": b"{}"}[damage])
    with pytest.raises(LoadError, match=rf"{path.name}.*delete it"):
        fetch(library, planned)
    with pytest.raises(LoadError, match=path.name):
        fetch(library, planned_for(zoo("llama"), 4))  # starts from it
    path.unlink()
    fetch(library, planned)


def test_a_folder_has_one_ladder(zoo, tmp_path):
    FactorLibrary.create(tmp_path / "library", LADDER)
    assert FactorLibrary.create(tmp_path / "library", (8, 4, 2, 2)).ladder == (2, 4, 8)
    with pytest.raises(PlanError, match=r"is for ranks 2, 4, 8, not 2, 4; .* folder of its own"):
        FactorLibrary.create(tmp_path / "library", (2, 4))
    with pytest.raises(PlanError, match="empty"):
        FactorLibrary.create(tmp_path / "none", ())
    with pytest.raises(PlanError, match=r"fc\.1 for cp rank 3: it is for ranks 2, 4, 8"):
        fetch(FactorLibrary.open(tmp_path / "library"), planned_for(zoo("llama"), 3))
    with pytest.raises(PlanError, match=r"has no library\.json"):
        FactorLibrary.open(tmp_path)
    (tmp_path / "library" / "library.json").write_text("[]")
    with pytest.raises(LoadError, match=r"library\.json"):
        FactorLibrary.open(tmp_path / "library")
    triple = FactorLibrary.create(tmp_path / "triples", ((2, 4, 4), 4))
    assert FactorLibrary.open(tmp_path / "triples").ladder == triple.ladder == ((2, 4, 4), 4)


def test_what_is_missing_is_told_from_what_is_there(zoo, tmp_path):
    library = FactorLibrary.create(tmp_path, LADDER)
    planned = planned_for(zoo("llama"), 4)
    with pytest.raises(PlanError, match=r"no factors of stack fc\.1 for cp rank 4; of its 0 files none is of that"):
        library.find(planned, planned.stacks[0])
    fetch(library, planned_for(zoo("llama"), 2))
    fetch(library, planned_for(zoo("llama"), 4, seed=1))
    with pytest.raises(PlanError, match=r"it has that stack for cp rank 2, cp rank 4, .* differs in method\.seed\. "):
        library.find(planned, planned.stacks[0])
    fetch(library, planned)
    assert library.find(planned, planned.stacks[0]).name.startswith("fc.1-cp-r4-")
