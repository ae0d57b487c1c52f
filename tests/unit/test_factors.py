import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from trawl.errors import LoadError, ShapeError
from trawl.factors import Factors


def make(kind: str) -> Factors:
    torch.manual_seed(0)
    left, right = torch.randn(7, 3), torch.randn(5, 3)
    if kind == "cp":
        return Factors(left, right, torch.randn(4, 3), relative_error=0.25, iterations=6, converged=False)
    if kind == "tucker":
        return Factors(left, torch.randn(5, 2), torch.randn(4, 3, 2), relative_error=0.5)
    return Factors(left, torch.randn(5, 2), torch.randn(2, 3, 2), stack=torch.randn(4, 2), relative_error=0.5)


@pytest.mark.parametrize("kind", ["cp", "tucker", "compressed"])
def test_slices_are_the_sums_that_the_formula_says(kind):
    factors = make(kind)
    core = torch.diag_embed(factors.core) if factors.core.dim() == 2 else factors.core
    stack = torch.eye(4) if factors.stack is None else factors.stack
    expected = torch.einsum("ip,sa,apq,hq->sih", factors.left, stack, core, factors.right)
    torch.testing.assert_close(factors.dense(), expected)
    assert factors.shape == (4, 7, 5)
    assert factors.parameters == sum(tensor.numel() for tensor in factors.tensors().values())
    with pytest.raises(IndexError):
        factors.slice(4)


@pytest.mark.parametrize("kind", ["cp", "tucker", "compressed"])
def test_a_file_gives_back_what_was_saved(kind, tmp_path):
    factors = make(kind)
    factors.save(tmp_path / "f.safetensors", {"stack": {"name": "fc.1"}})
    loaded, metadata = Factors.load(tmp_path / "f.safetensors")
    assert metadata == {"stack": {"name": "fc.1"}}
    for name, tensor in factors.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    stats = ("relative_error", "iterations", "converged")
    assert [getattr(loaded, name) for name in stats] == [getattr(factors, name) for name in stats]
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]


def test_moving_keeps_the_record():
    moved = make("compressed").to(dtype=torch.float64)
    assert {tensor.dtype for tensor in moved.tensors().values()} == {torch.float64}
    assert moved.relative_error == 0.5


def test_factors_that_do_not_fit_together_are_refused():
    factors = make("tucker")
    with pytest.raises(ShapeError, match="left needs 3 columns and right 2"):
        replace(factors, right=torch.randn(5, 4))
    with pytest.raises(ShapeError, match=r"expected \(S, 4\)"):
        replace(factors, stack=torch.randn(6, 3))
    with pytest.raises(ShapeError, match="factor left has 1 axes"):
        replace(factors, left=torch.randn(3))


def write(path, header, **tensors):
    save_file(tensors, path, metadata={"trawl": header} if header is not None else None)


GOOD = {"format_version": 1, "relative_error": 0.1, "iterations": 1, "converged": True, "metadata": {}}
PARTS = {"left": torch.ones(2, 1), "right": torch.ones(3, 1), "core": torch.ones(1, 1)}


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (None, PARTS, "not a readable factor file"),
        ("{", PARTS, "not a readable factor file"),
        (json.dumps(GOOD | {"format_version": 9}), PARTS, "format version 9; this trawl reads 1"),
        (json.dumps(GOOD), {"left": PARTS["left"]}, "does not hold one set of factors"),
        (json.dumps(GOOD), PARTS | {"core": torch.ones(1, 2)}, "do not fit together"),
    ],
)
def test_a_file_that_is_not_factors_is_refused(header, tensors, message, tmp_path):
    path = tmp_path / "f.safetensors"
    write(path, header, **tensors)
    with pytest.raises(LoadError, match=message):
        Factors.load(path)


def test_a_truncated_or_absent_file_is_refused(tmp_path):
    make("cp").save(tmp_path / "f.safetensors", {})
    data = (tmp_path / "f.safetensors").read_bytes()
    (tmp_path / "f.safetensors").write_bytes(data[:-3])
    for name in ("f.safetensors", "absent.safetensors"):
        with pytest.raises(LoadError, match=name):
            Factors.load(tmp_path / name)
