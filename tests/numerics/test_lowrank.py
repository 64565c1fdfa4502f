"""Subspace iteration and the exact SVD against a float64 SVD."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loftq_cli.numerics import lowrank
from loftq_cli.numerics.lowrank import Basis, LowRank, exact
from loftq_cli.numerics.quantizers.methods import make_quantizer
from tests.support.quantizing import fit, gaussian
from tests.support.synthetic import llm_like

MATRICES = {
    "llm-like": llm_like(384, 320),
    "gaussian": gaussian(320, 384),
    "quantization-residual": (lambda w: w - fit(make_quantizer("nf", 2, 64, "mse"), w).values)(
        llm_like(320, 320, seed=1)
    ),
    "tall": gaussian(768, 96),
    "wide": gaussian(96, 768),
}
every_matrix = pytest.mark.parametrize("name", MATRICES)
every_dtype = pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def subspace(
    matrix: torch.Tensor,
    rank: int,
    generator: torch.Generator,
    warm: Basis | None = None,
    products: torch.dtype = torch.float32,
) -> LowRank:
    """As the alternation calls it."""
    if not lowrank.is_thin(rank, matrix.shape):
        return exact(matrix, rank)
    norm = float(matrix.double().norm())
    return lowrank.subspace(matrix.to(products), norm, rank, generator, warm)


def distance(matrix: torch.Tensor, low: LowRank) -> float:
    return float((matrix.double() - low.B.double() @ low.A.double()).norm())


@functools.cache
def spectrum(name: str) -> torch.Tensor:
    return torch.linalg.svdvals(MATRICES[name].double())


def smallest_distance(sigma: torch.Tensor, rank: int) -> float:
    """Of any rank-r approximation of a matrix with these singular values (Eckart-Young)."""
    return float(sigma[rank:].norm())


def rank_deficient(rows: int, columns: int, rank: int) -> torch.Tensor:
    return gaussian(rows, rank, seed=1) @ gaussian(rank, columns, seed=2)


@every_matrix
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_exact_is_the_best_approximation(name, rank):
    low, sigma = exact(MATRICES[name], rank), spectrum(name)
    assert distance(MATRICES[name], low) == pytest.approx(smallest_distance(sigma, rank), rel=1e-6)
    torch.testing.assert_close(low.sigma.double(), sigma[:rank], rtol=1e-5, atol=0)


@every_matrix
@every_dtype
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_cold_subspace_is_close_to_the_best(name, rank, products):
    low = subspace(MATRICES[name], rank, generator(), products=products)
    assert distance(MATRICES[name], low) <= 1.003 * smallest_distance(spectrum(name), rank)


@every_matrix
def test_one_warm_call_follows_a_matrix_that_changed(name):
    matrix, rank = MATRICES[name], 16
    first = subspace(matrix, rank, generator())
    changed = matrix + 0.6 * matrix.std() * gaussian(*matrix.shape, seed=9)
    low = subspace(changed, rank, generator(), first.basis)
    sigma = torch.linalg.svdvals(changed.double())
    assert distance(changed, low) <= 1.003 * smallest_distance(sigma, rank)


@every_matrix
def test_later_calls_keep_up_with_small_changes(name):
    """As an alternation's residual changes after its second step."""
    matrix, rank = MATRICES[name], 16
    low = subspace(matrix, rank, generator())
    for step in range(4):
        matrix = matrix + 0.2 * matrix.std() * gaussian(*matrix.shape, seed=20 + step)
        low = subspace(matrix, rank, generator(), low.basis)
        sigma = torch.linalg.svdvals(matrix.double())
        assert distance(matrix, low) <= 1.003 * smallest_distance(sigma, rank)


@pytest.mark.parametrize("shape", [(200, 150), (64, 300), (300, 64)], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 33])
@pytest.mark.parametrize("method", [exact, subspace])
def test_a_matrix_of_exactly_the_rank_is_recovered(shape, rank, method):
    rows, columns = shape
    matrix = rank_deficient(rows, columns, rank)
    low = exact(matrix, rank) if method is exact else subspace(matrix, rank, generator())
    assert distance(matrix, low) < 1e-5 * float(matrix.norm())


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (1, 50), (50, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("method", [exact, subspace])
def test_rank_of_the_smaller_side_reproduces_the_matrix(shape, method):
    matrix, rank = gaussian(*shape), min(shape)
    low = exact(matrix, rank) if method is exact else subspace(matrix, rank, generator())
    assert low.B.shape == (shape[0], rank)
    assert low.A.shape == (rank, shape[1])
    assert distance(matrix, low) < 1e-5 * float(matrix.norm())


@every_matrix
@pytest.mark.parametrize("method", [exact, subspace])
def test_factors_share_sigma_evenly_and_have_orthogonal_directions(name, method):
    matrix = MATRICES[name]
    low = exact(matrix, 16) if method is exact else subspace(matrix, 16, generator())
    assert bool((low.sigma.diff() <= 0).all())
    diagonal = torch.diag(low.sigma.double())
    tolerance = 1e-4 * float(low.sigma[0])
    for gram in (low.B.double().T @ low.B.double(), low.A.double() @ low.A.double().T):
        torch.testing.assert_close(gram, diagonal, rtol=0, atol=tolerance)


@every_matrix
@every_dtype
def test_carried_basis_is_orthonormal(name, products):
    carried = subspace(MATRICES[name], 16, generator(), products=products).basis
    assert carried is not None
    basis = carried.left.double()
    assert basis.shape[1] == MATRICES[name].shape[0]
    assert basis.shape[0] >= 16
    identity = torch.eye(basis.shape[0], dtype=torch.float64)
    torch.testing.assert_close(basis @ basis.T, identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_what_a_deficient_matrix_leaves_behind_does_no_harm(rank):
    """Directions without weight are noise: they must not be blown up, nor spoil the next call."""
    first = subspace(rank_deficient(100, 80, rank), 16, generator())
    assert bool(torch.isfinite(first.A).all() & torch.isfinite(first.B).all())
    assert first.basis is not None
    assert float(first.basis.left.norm(dim=1).max()) < 1.001
    matrix = gaussian(100, 80)
    low = subspace(matrix, 16, generator(), first.basis)
    assert bool(torch.isfinite(low.A).all() & torch.isfinite(low.B).all())
    assert distance(matrix, low) <= float(matrix.norm())


def test_the_same_generator_gives_the_same_bytes():
    matrix = llm_like(128, 96)
    first, second = (subspace(matrix, 8, generator(5)) for _ in range(2))
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15, 1e30])
def test_magnitude_does_not_matter(factor):
    matrix = llm_like(128, 96)
    low = subspace(matrix * factor, 8, generator())
    expected = smallest_distance(torch.linalg.svdvals(matrix.double()), 8) * factor
    assert distance(matrix * factor, low) <= 1.003 * expected


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: values read from it, and factorisations that
    look whether they succeeded."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "_linalg_eigh", "_linalg_svd", "equal", "nonzero"):
            self.read.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_the_host_waits_for_one_small_factorisation_a_call(calls):
    matrix = MATRICES["llm-like"]
    norm = float(matrix.norm())
    basis = None
    for _ in range(calls):
        basis = lowrank.subspace(matrix, norm, 16, generator(), basis).basis
    with Waits() as waits:
        lowrank.subspace(matrix, norm, 16, generator(), basis)
    assert waits.read == ["_linalg_eigh"]
