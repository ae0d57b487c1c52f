"""Which units stay, what they are refitted to, and where they lie in stored tensors."""

import pytest
import torch

from tests.zoo import INNER
from trawl.calibration import Moment
from trawl.calibration.text import random_windows
from trawl.checkpoint import open_folder
from trawl.errors import LoadError
from trawl.narrowing import Narrowing, narrow, narrow_stack, selection
from trawl.narrowing.cuts import positions, stored_axis
from trawl.narrowing.selection import eliminate, make_problem, select_groups, weigh_outputs
from trawl.planning import match_checkpoint
from trawl.views import View

SIZE, OUTPUTS = 24, 5


def activations(tokens=400, size=SIZE, rank=None):
    inputs = torch.randn(tokens, rank or size) @ torch.randn(rank or size, size)
    return inputs * torch.logspace(-2, 2, size)  # badly scaled


def moment(inputs):
    return inputs.double().T @ inputs.double() / len(inputs)


def error(matrix, inputs, kept, solution):
    wanted = inputs.double() @ matrix.double()
    return float((wanted - inputs[:, kept].double() @ solution).norm() / wanted.norm())


def test_the_solution_is_least_squares_and_its_error_is_measured():
    matrix, inputs = torch.randn(SIZE, OUTPUTS), activations()
    problem = make_problem(matrix, moment(inputs), ridge=1e-12)
    kept = torch.tensor([0, 3, 4, 9, 17, 20, 23])
    reference = torch.linalg.lstsq(inputs[:, kept].double(), inputs.double() @ matrix.double()).solution
    torch.testing.assert_close(problem.solve(kept), reference, rtol=1e-4, atol=1e-6)
    assert problem.error(kept, reference) == pytest.approx(error(matrix, inputs, kept, reference), rel=1e-6)


def test_another_target_is_fitted_on_the_same_inputs():
    inputs, wanted = activations(), torch.randn(400, OUTPUTS)
    cross, energy = inputs.double().T @ wanted.double() / 400, float(wanted.square().sum()) / 400
    problem = make_problem(torch.randn(SIZE, OUTPUTS), moment(inputs), cross, energy, ridge=1e-12)
    kept = eliminate(problem, 12).kept(12)
    reference = torch.linalg.lstsq(inputs[:, kept].double(), wanted.double()).solution
    torch.testing.assert_close(problem.solve(kept), reference, rtol=1e-3, atol=1e-6)


def test_all_units_give_back_the_matrix_to_the_last_bit():
    matrix, inputs = torch.randn(SIZE, OUTPUTS), activations(rank=6)
    problem = make_problem(matrix, moment(inputs), mean=inputs.double().mean(0))
    kept = eliminate(problem, SIZE).kept(SIZE)
    assert torch.equal(problem.solve(kept), matrix.double())
    assert problem.error(kept, matrix.double()) < 1e-6


def test_units_that_repeat_others_are_left_out_without_loss():
    inputs = torch.randn(400, 8)
    mixed = torch.cat([inputs, inputs @ torch.randn(8, 4)], dim=1)
    mixed[:, [2, 9]] = 0  # dead
    matrix = torch.randn(12, OUTPUTS)
    problem = make_problem(matrix, moment(mixed))
    kept = eliminate(problem, 7 + 3).kept(7 + 3)
    assert not set(kept.tolist()) & {2, 9}
    assert error(matrix, mixed, kept, problem.solve(kept)) < 0.02


@pytest.mark.parametrize("panel", [1, 3, 64])
def test_panels_remove_the_units_that_cost_least_one_by_one(panel, monkeypatch):
    monkeypatch.setattr(selection, "PANEL", panel)
    problem = make_problem(torch.randn(SIZE, OUTPUTS), moment(activations()), torch.randn(SIZE, OUTPUTS), 1.0)

    def cost(kept):
        second = problem.second[kept][:, kept] + torch.diag(problem.ridge[kept])
        target = problem.cross[kept] + problem.ridge[kept, None] * problem.stored[kept]
        return -float((target * torch.linalg.solve(second, target)).sum())

    left = list(range(SIZE))
    for _ in range(10):  # by trying every removal
        left = min(([each for each in left if each != unit] for unit in left), key=cost)
    assert eliminate(problem, SIZE - 10).kept(SIZE - 10).tolist() == left


@pytest.mark.parametrize("diagonal", [True, False])
def test_weighed_outputs_change_what_is_chosen_and_not_what_is_solved(diagonal):
    inputs = torch.diag(torch.linspace(1, 2, SIZE, dtype=torch.float64)).repeat(4, 1)
    problem = make_problem(torch.eye(SIZE), moment(inputs))
    wanted = torch.arange(SIZE // 2)  # outputs of the smaller inputs
    counts = torch.full((SIZE,), 0.1).index_fill(0, wanted, 10.0)
    weighed = weigh_outputs(problem, counts if diagonal else torch.diag(counts))
    torch.testing.assert_close(eliminate(weighed, SIZE // 2).kept(SIZE // 2), wanted)
    torch.testing.assert_close(eliminate(problem, SIZE // 2).kept(SIZE // 2), wanted + SIZE // 2)
    same = weigh_outputs(problem, torch.full((SIZE,), 3.0))
    torch.testing.assert_close(same.solve(wanted), problem.solve(wanted) * 3.0**0.5)


def test_groups_are_chosen_as_a_whole():
    matrix, inputs = torch.randn(SIZE, OUTPUTS), torch.randn(400, SIZE)
    inputs[:, 8:12] *= 1e-3
    matrix[16:20] *= 1e-3
    problem = make_problem(matrix, moment(inputs))
    assert select_groups(problem, 6, 4).tolist() == [0, 1, 3, 5]
    assert select_groups(problem, 6, 6).tolist() == [0, 1, 2, 3, 4, 5]
    singly = select_groups(problem, SIZE, 9)
    assert singly.tolist() == eliminate(problem, 9).kept(9).tolist()


def test_nothing_computed_leaves_the_matrix_as_it_was():
    matrix = torch.randn(SIZE, OUTPUTS)
    problem = make_problem(matrix, torch.zeros(SIZE, SIZE))
    kept = eliminate(problem, 8).kept(8)
    assert torch.equal(problem.solve(kept), matrix.double()[kept])
    assert problem.error(kept, problem.solve(kept)) == 0.0


@pytest.mark.parametrize(
    ("view", "shape", "axis", "expected"),
    [
        (View("inner hidden", sizes=(("inner", 4), ("hidden", 3))), (4, 3), 0, [0, 1, 2, 3]),
        (View("hidden inner", "inner hidden"), (3, 4), 1, [0, 1, 2, 3]),
        (View("(part inner) hidden", sizes=(("part", 2), ("inner", 3)), take=(("part", 1, 2),)), (6, 2), 0, [3, 4, 5]),
        (
            View("(heads part dim) hidden", sizes=(("heads", 2), ("part", 3), ("dim", 2)), take=(("part", 1, 2),)),
            (12, 5),
            0,
            [2, 3, 8, 9],
        ),
        (View("rows hidden", take=(("rows", 4, 6),)), (8, 2), 0, [4, 5]),
    ],
)
def test_rows_of_a_slice_are_found_on_its_stored_axis(view, shape, axis, expected):
    assert stored_axis(view) == axis
    assert positions(view, shape).tolist() == expected


def test_a_bias_takes_up_what_the_mean_changes(zoo):
    checkpoint = open_folder(zoo("gpt2"))
    (cut, *_) = narrow(checkpoint, match_checkpoint(checkpoint), (0, 1, 2), width=16).cuts
    inputs = torch.randn(400, INNER) + 3 * torch.randn(INNER)
    found = narrow_stack(checkpoint, cut, Moment(moment(inputs), inputs.double().mean(0), 400), torch.device("cpu"))
    name = cut.reader.tensor
    weight, bias = cut.reader.view.apply(checkpoint.read(name)), checkpoint.read(name.replace("weight", "bias"))
    before, after = inputs @ weight + bias, inputs[:, found.kept] @ found.reader + found.bias
    torch.testing.assert_close(before.mean(0), after.mean(0), rtol=1e-4, atol=1e-4)
    spread = (inputs - inputs.mean(0)) @ weight
    assert found.relative_error == pytest.approx(float((before - after).norm() / spread.norm()), rel=1e-3)


def test_random_tokens_are_the_same_for_everyone_and_few_are_rare():
    windows = random_windows(8, 64, 1000)
    assert torch.equal(windows, random_windows(8, 64, 1000))
    assert windows.shape == (8, 64)
    assert 0 <= int(windows.min()) < int(windows.max()) < 1000
    counts = [int((windows < bound).sum()) for bound in (20, 60, 140)]
    assert counts == pytest.approx([90, 181, 271], rel=0.2)  # of 512, each doubling of id + 20 alike
    assert int(random_windows(8, 64, 1).max()) == 0


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "fc.0.safetensors"
    narrowing = Narrowing(torch.arange(3), torch.randn(3, 4, dtype=torch.bfloat16), None, 0.25, 0.0)
    narrowing.save(path, {"stack": {}})
    again = Narrowing.load(path)
    assert torch.equal(again.reader, narrowing.reader)
    assert (again.bias, again.relative_error) == (None, 0.25)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(LoadError, match="not a readable file of kept units"):
        Narrowing.load(path)
