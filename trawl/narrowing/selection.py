"""Which units of a layer's inner side to keep, and the best output matrix on what they compute.

A unit is one neuron of an FC, or the query heads of one key-value group. Selecting units commutes with whatever is done
to each of them alone, an activation function or attention, so that all matrices around them really shrink.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PANEL = 64  # removals between two full updates
RIDGE = 1e-3  # of each input's own second moment
DEAD = 1e-9  # of the mean ridge, for inputs that are always zero
FLOOR = 1e-3  # of the mean weight of outputs


@dataclass(frozen=True, eq=False)
class Problem:
    """A least-squares problem: outputs y wanted from inputs a, over all tokens.

    Attributes:
        second: E[a aᵀ], (n, n), float64.
        cross: E[a yᵀ], (n, hidden), float64.
        energy: E‖y‖².
        stored: the matrix that ridge terms draw the solution to, (n, hidden), float64.
        ridge: what is added to the diagonal of ``second``, (n,).
    """

    second: Tensor
    cross: Tensor
    energy: float
    stored: Tensor
    ridge: Tensor

    def solve(self, kept: Tensor) -> Tensor:
        """Return the matrix that gives y best from some inputs.

        ``stored_S + (C_SS + Λ_S)⁻¹ (C_Sy − C_SS stored_S)``: exactly ``stored`` where all inputs are kept and y is what
        ``stored`` makes of them.

        Args:
            kept: S, ascending (k,).
        Returns: (k, hidden).
        Cost: O(k³ + k² hidden).
        """
        second, stored = self.second[kept][:, kept], self.stored[kept]
        missing = self.cross[kept] - second @ stored
        second.diagonal().add_(self.ridge[kept])
        return stored + torch.cholesky_solve(missing, torch.linalg.cholesky(second))

    def error(self, kept: Tensor, solution: Tensor) -> float:
        """Return the relative error of the outputs, √(E‖y − solutionᵀ a_S‖² / E‖y‖²)."""
        explained = 2 * self.cross[kept] - self.second[kept][:, kept] @ solution
        left = self.energy - float((solution * explained).sum())
        return (max(left, 0.0) / self.energy) ** 0.5 if self.energy else 0.0


def weigh_outputs(problem: Problem, outputs: Tensor) -> Problem:
    """Return a problem in which a miss e of the outputs counts by ``eᵀ G e``: the same solutions, other losses.

    Args:
        problem: what is wanted.
        outputs: G, (hidden, hidden) and positive semi-definite, or its diagonal (hidden,). Directions that count less
            than a thousandth of the mean count so much.
    """
    turned = root_of(outputs)
    return replace(problem, cross=problem.cross @ turned, stored=problem.stored @ turned)


def root_of(outputs: Tensor) -> Tensor:
    """Return R with R Rᵀ = G, (hidden, hidden) float64, from what misses of outputs count by, G or its diagonal."""
    weight = outputs.double()
    if weight.dim() == 1:
        return weight.clamp_min(FLOOR * float(weight.mean())).sqrt().diag()
    values, vectors = torch.linalg.eigh((weight + weight.T) / 2)
    turned: Tensor = vectors * values.clamp_min(FLOOR * float(values.mean())).sqrt()
    return turned


def make_problem(
    matrix: Tensor,
    second: Tensor,
    cross: Tensor | None = None,
    energy: float | None = None,
    mean: Tensor | None = None,
    *,
    ridge: float = RIDGE,
) -> Problem:
    """Put a problem together.

    Args:
        matrix: the stored output matrix, canonical (n, hidden).
        second: E[a aᵀ], not centred.
        cross: E[a yᵀ], where y is another output than ``matrixᵀ a``, such as that of an uncompressed model.
        energy: E‖y‖², together with ``cross``.
        mean: E[a], where a bias takes up what the mean changes; the problem is centred then.
        ridge: of each input's own second moment, what draws the solution to ``matrix``.
    Returns: the problem in float64.
    """
    stored, moment = matrix.double(), second.double()
    moment = (moment + moment.T) / 2
    own = ridge * moment.diagonal()
    own = torch.where(own > 0, own, DEAD * float(own.mean()) or 1.0)
    if mean is not None:
        moment = moment - torch.outer(mean.double(), mean.double())
    if cross is None:
        cross = moment @ stored
        energy = float((stored * cross).sum())
    assert energy is not None
    return Problem(moment, cross.double(), energy, stored, own)


@dataclass(frozen=True, eq=False)
class Elimination:
    """Inputs in the order in which they are removed.

    Attributes:
        order: removed inputs, the one that costs least first (removed,).
        costs: what each adds to the loss E‖y − ŷ‖², ridge terms included (removed,), float64.
        count: inputs that there were.
    """

    order: Tensor
    costs: Tensor
    count: int

    def kept(self, keep: int) -> Tensor:
        """Return the inputs that are left when so many are kept, ascending (keep,)."""
        stays = torch.ones(self.count, dtype=torch.bool, device=self.order.device)
        stays[self.order[: self.count - keep]] = False
        return stays.nonzero()[:, 0]


def eliminate(problem: Problem, keep: int) -> Elimination:
    """Choose inputs one by one to remove, always the one whose loss, after the others take over, costs least.

    Removing input j of those left costs ``‖B_j‖² / P_jj`` with ``P = (C_SS + Λ)⁻¹`` and B the best matrix; then
    ``P -= p_j p_jᵀ / P_jj`` and ``B -= p_j B_jᵀ / P_jj``. Both updates are made a panel of removals at a time.

    Args:
        problem: what is wanted of the inputs.
        keep: how many stay.
    Returns: those that do not, in order; all smaller numbers of removals are its beginnings.
    Cost: O(n³ + removed · n (n + hidden)); memory for two (n, n) and one (n, hidden) in float64.
    Reference: backward elimination; the formula is that of Hassibi & Stork 1992, Optimal Brain Surgeon, for one
        output, and of SparseGPT, arXiv:2301.00774, for rows of several.
    """
    left = torch.arange(len(problem.second), device=problem.second.device)
    inverse, best = _full_solution(problem)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    while len(left) > keep:
        removed, lost = _remove_panel(inverse, best, min(PANEL, len(left) - keep))
        order.append(left[removed])
        costs.append(lost)
        alive = torch.ones(len(left), dtype=torch.bool, device=left.device)
        alive[removed] = False
        left, inverse, best = left[alive], inverse[alive][:, alive], best[alive]
    none = left[:0]
    return Elimination(torch.cat([none, *order]), torch.cat([none.double(), *costs]), len(problem.second))


def _full_solution(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return P and B of all inputs."""
    regular = problem.second.clone()
    regular.diagonal().add_(problem.ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular))
    best = problem.stored + inverse @ (problem.cross - problem.second @ problem.stored)
    return inverse, best


def _remove_panel(inverse: Tensor, best: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Remove some inputs, update P and B of the others in place, and return which were removed at what cost."""
    size, outputs = best.shape
    diagonal, losses = inverse.diagonal().clone(), best.square().sum(1)
    columns, rows = inverse.new_zeros(size, count), best.new_zeros(count, outputs)
    alive = torch.ones(size, dtype=torch.bool, device=best.device)
    removed, lost = inverse.new_zeros(count, dtype=torch.long), inverse.new_zeros(count)
    for step in range(count):
        cost = torch.where(alive & (diagonal > 0), losses / diagonal, torch.inf)
        chosen = int(cost.argmin())
        removed[step], lost[step] = chosen, cost[chosen]
        root = diagonal[chosen].sqrt()
        column = (inverse[chosen] - columns[:, :step] @ columns[chosen, :step]) / root
        row = (best[chosen] - columns[chosen, :step] @ rows[:step]) / root
        overlap = best @ row - columns[:, :step] @ (rows[:step] @ row)  # B · row, with B as it stands now
        losses += column.square() * row.square().sum() - 2 * column * overlap
        diagonal -= column.square()
        columns[:, step], rows[step], alive[chosen] = column, row, False
    inverse.addmm_(columns, columns.T, alpha=-1)
    best.addmm_(columns, rows, alpha=-1)
    return removed, lost


def select_groups(problem: Problem, groups: int, keep: int) -> Tensor:
    """Choose groups of neighbouring inputs to keep, removing always the one that costs least.

    Removing group G of those left costs ``tr(B_Gᵀ (P_GG)⁻¹ B_G)``, with P and B as in :func:`eliminate`.

    Args:
        problem: what is wanted of the inputs.
        groups: how many groups the inputs divide into, each of as many.
        keep: how many stay.
    Returns: the kept groups, ascending (keep,).
    Cost: O(n³ + removed · n² width), with width = n / groups.
    """
    left = torch.arange(groups, device=problem.second.device)
    inverse, best = _full_solution(problem)
    width = len(best) // groups
    while len(left) > keep:
        parts = [slice(number * width, (number + 1) * width) for number in range(len(left))]
        costs = [float((best[at] * torch.linalg.solve(inverse[at, at], best[at])).sum()) for at in parts]
        gone = parts[min(range(len(parts)), key=costs.__getitem__)]
        alive = torch.ones(len(best), dtype=torch.bool, device=best.device)
        alive[gone] = False
        share = torch.linalg.solve(inverse[gone, gone], inverse[gone][:, alive]).T  # (rest, width)
        inverse, best = inverse[alive][:, alive] - share @ inverse[gone][:, alive], best[alive] - share @ best[gone]
        left = left[alive[::width]]
    return left
