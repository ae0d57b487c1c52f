"""CP decomposition of a small core tensor in memory: several starts, then tensorly's alternating least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class CoreSolution:
    """A CP of a core of unit norm.

    Attributes:
        factors: (S, R), (s1, R), (s2, R).
        error: its relative error, by direct subtraction.
        sweeps: iterations made.
        change: of the error in the last of them.
        converged: whether that fell under the tolerance before the cap.
    """

    factors: Triple
    error: float
    sweeps: int
    change: float
    converged: bool


@dataclass(frozen=True)
class CoreLimits:
    """When to stop.

    Attributes:
        n_iter_max: cap on iterations from the chosen start.
        tol: change of relative error under which they stop.
        trial_sweeps: iterations given to each of several starts, in float64, before the best goes on; 0 takes the one
            start that suits trained weights.
    """

    n_iter_max: int
    tol: float
    trial_sweeps: int


def solve_core(core: Tensor, rank: int, limits: CoreLimits, seed: int) -> CoreSolution:
    """Return a CP of a core.

    Minimizes ‖core − Σ_r a_r ∘ b_r ∘ c_r‖.

    Args:
        core: (S, s1, s2), of unit norm.
        rank: number of components.
        limits: when to stop.
        seed: for the random start.
    Cost: 4 S s1 s2 rank operations an iteration, in products of matrices. Memory: twice S s1 rank entries.
    Reference: Kolda & Bader 2009, section 3.4, doi:10.1137/07070111X
    """
    if not limits.trial_sweeps:
        return _alternate(core, leading_triplets(core, rank, seed), limits.n_iter_max, limits.tol)
    exact = core.double()
    starts = [leading_triplets(exact, rank, seed), random_start(exact, rank, seed), unfolding_start(exact, rank, seed)]
    if rank <= min(core.shape[1:]):
        starts.append(pencil_start(exact, rank, seed))
    trials = [_alternate(exact, start, limits.trial_sweeps, limits.tol) for start in starts]
    best = min(trials, key=lambda trial: trial.error)
    return best if best.converged else _alternate(exact, best.factors, limits.n_iter_max, limits.tol)


def _alternate(core: Tensor, start: Triple, n_iter_max: int, tol: float) -> CoreSolution:
    """Run tensorly's parafac from a start; where a normal equation is singular, the start itself is the solution."""
    import tensorly  # noqa: PLC0415 (half a second that `trawl plan` need not pay)
    from tensorly.decomposition import parafac  # noqa: PLC0415 (likewise)
    from tensorly.tenalg.core_tenalg import CoreTenalgBackend  # noqa: PLC0415 (likewise)

    weights = torch.ones(start[0].shape[1], dtype=core.dtype, device=core.device)
    algebra = CoreTenalgBackend()
    algebra.unfolding_dot_khatri_rao = KhatriRao()  # of this object alone
    with (
        tensorly.backend_context("pytorch", local_threadsafe=True),
        tensorly.tenalg.backend_context(algebra, local_threadsafe=True),
    ):
        try:
            (_, solved), errors = parafac(
                core,
                weights.numel(),
                n_iter_max=n_iter_max,
                tol=max(tol, 1e-15),
                init=(weights, list(start)),
                return_errors=True,
            )
        except RuntimeError:  # torch's LinAlgError, which it does not export to type checkers
            solved, errors = start, []
    a, b, c = solved
    if not all(bool(torch.isfinite(part).all()) for part in (a, b, c)):
        (a, b, c), errors = start, []
    change = float(errors[-2] - errors[-1]) if len(errors) > 1 else float("inf")
    return CoreSolution((a, b, c), core_error(core, a, b, c), len(errors), change, abs(change) < tol)


@dataclass(eq=False)
class KhatriRao:
    """The unfoldings of a core, times the Khatri-Rao products of two factor matrices each, which are not formed.

    tensorly forms them. That of the first mode has s1 s2 rows, and in a core of a few large slices it is larger than
    all else: writing and reading it takes longer than multiplying. Modes 0 and 1 share a product, as long as the third
    factor matrix is the same tensor.
    """

    _last: Tensor | None = field(default=None, init=False)
    _along: Tensor | None = field(default=None, init=False)  # the core times that

    def __call__(self, core: Tensor, weighted: tuple[Tensor, Sequence[Tensor]], mode: int) -> Tensor:
        """Return the product for a mode.

        Args:
            core: (S, s1, s2), the same at each call.
            weighted: weights (R,) of the components, and their factor matrices (S, R), (s1, R), (s2, R).
            mode: 0, 1 or 2.
        Returns: (S, R), (s1, R) or (s2, R).
        """
        weights, (a, b, c) = weighted
        if mode == 2:
            return core.flatten(0, 1).T @ (a[:, None, :] * b).flatten(0, 1) * weights
        if self._along is None or self._last is not c:
            self._last, self._along = c, core @ c  # (S, s1, R)
        return (self._along * (b if mode == 0 else a[:, None, :])).sum(1 - mode) * weights


def core_error(core: Tensor, a: Tensor, b: Tensor, c: Tensor) -> float:
    """Return ‖core − Σ_r a_r ∘ b_r ∘ c_r‖."""
    return float(torch.linalg.vector_norm((core - (b * a[:, None, :]) @ c.T).double()))


def leading_triplets(core: Tensor, rank: int, seed: int) -> Triple:
    """Start from the largest singular triplets of all slices: no two components alike, each within one slice.

    Trained weights have flat spectra and little in common between slices, so that this is close to their best CP.
    """
    size = core.shape[0]
    u, sigma, vt = torch.linalg.svd(core, full_matrices=False)  # (S, s1, m), (S, m), (S, m, s2)
    order = torch.argsort(sigma.flatten(), descending=True, stable=True)[:rank]
    of, which = order // sigma.shape[1], order % sigma.shape[1]
    a = torch.nn.functional.one_hot(of, size).to(core.dtype) * sigma.flatten()[order, None]
    return _padded((a.T, u[of, :, which].T, vt[of, which].T), rank, seed)


def random_start(core: Tensor, rank: int, seed: int) -> Triple:
    """Start from Gaussian factor matrices."""
    return _padded((core.new_empty(core.shape[0], 0), core[0, :, :0], core[0, :0].T), rank, seed)


def unfolding_start(core: Tensor, rank: int, seed: int) -> Triple:
    """Start from the leading left singular vectors of the three unfoldings, padded by Gaussian columns."""
    bases = []
    for mode in range(3):
        unfolding = core.movedim(mode, 0).flatten(1)
        bases.append(torch.linalg.eigh(unfolding @ unfolding.T)[1].flip(1)[:, :rank])
    return _padded((bases[0], bases[1], bases[2]), rank, seed)


def pencil_start(core: Tensor, rank: int, seed: int) -> Triple:
    """Start from the eigenvectors of a pencil of two mixtures of slices: exact where the core has this CP.

    With slices ``B diag(a_s) Cᵀ``, two mixtures M₁ and M₂ give ``M₁ M₂⁻¹ = B diag(λ) B⁻¹`` within the modes' leading
    subspaces; B known, each component is a rank-one matrix.

    Reference: Leurgans, Ross & Abel 1993, doi:10.1137/0614071
    """
    rows, columns = core.transpose(0, 1).flatten(1), core.flatten(0, 1)
    u = torch.linalg.eigh(rows @ rows.T)[1][:, -rank:]
    v = torch.linalg.eigh(columns.T @ columns)[1][:, -rank:]
    small = u.T @ core @ v  # (S, R, R)
    mixing = torch.randn(core.shape[0], 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second = torch.tensordot(mixing.T.to(core), small, dims=1)
    b = torch.linalg.eig(first @ torch.linalg.pinv(second, rtol=1e-12))[1].real
    parts = (torch.linalg.pinv(b) @ small).transpose(0, 1)  # (R, S, R): component r is a_r c_rᵀ
    left, sigma, right = torch.linalg.svd(parts, full_matrices=False)
    return (left[:, :, 0] * sigma[:, :1]).T.contiguous(), u @ b, v @ right[:, 0].T


def _padded(parts: Triple, rank: int, seed: int) -> Triple:
    """Append Gaussian columns, seeded, to factor matrices of fewer than ``rank`` columns."""
    generator = torch.Generator().manual_seed(seed)
    full = []
    for part in parts:
        missing = rank - part.shape[1]
        noise = torch.randn(part.shape[0], missing, generator=generator, dtype=torch.float64)
        full.append(torch.cat([part, noise.to(part)], dim=1).contiguous())
    return full[0], full[1], full[2]
