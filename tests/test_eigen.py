"""Many small decompositions at once, against LAPACK's; on the CPU the method for large ones is switched on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_lora import eigen, lowrank


@pytest.fixture
def blocks(monkeypatch):
    """The CPU's library is said to take batches up to n = 8."""
    monkeypatch.setitem(eigen.LARGEST, "cpu", 8)


def gram(n: int, rank: int, lead: tuple[int, ...] = (), seed: int = 0, spread: float = 0.0) -> torch.Tensor:
    """A positive semi-definite matrix of a rank, with eigenvalues over so many powers of ten."""
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(*lead, n, rank, generator=draw, dtype=torch.float64)
    X = X * torch.logspace(0, -spread / 2, rank, dtype=torch.float64)
    return X @ X.mT


def check_eigh(G: torch.Tensor) -> None:
    values, V = eigen.eigh(G)
    n, size = G.shape[-1], torch.linalg.matrix_norm(G, 2).clamp(min=1e-300)[..., None]
    tolerance = 8 * n * torch.finfo(G.dtype).eps
    assert values.shape == G.shape[:-1]
    assert V.shape == G.shape
    assert bool((values.diff(dim=-1) >= 0).all())
    assert float(((values - torch.linalg.eigvalsh(G)) / size).abs().max()) <= tolerance
    assert float(((G @ V - V * values.unsqueeze(-2)) / size[..., None]).abs().max()) <= tolerance
    assert float((V.mT @ V - torch.eye(n, dtype=G.dtype)).abs().max()) <= tolerance


@pytest.mark.parametrize("n", [1, 2, 8, 9, 16, 17, 33, 40, 80])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_eigenvalues_and_vectors_are_lapacks(blocks, n, lead):
    check_eigh(gram(n, n, lead, seed=n))


@pytest.mark.parametrize("rank", [1, 3, 20])
@pytest.mark.parametrize("spread", [0.0, 12.0])
def test_deficient_and_badly_scaled_matrices(blocks, rank, spread):
    check_eigh(gram(20, rank, (4,), seed=rank, spread=spread))


@pytest.mark.parametrize("size", [0.0, 1e-200, 1e200])
def test_the_size_of_the_numbers_does_not_matter(blocks, size):
    check_eigh(gram(12, 12, (2,)) * size)


def test_equal_eigenvalues(blocks):
    check_eigh(torch.eye(20, dtype=torch.float64).expand(3, 20, 20))
    check_eigh(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(10)))


def test_what_does_not_converge_is_left_to_the_library(blocks, monkeypatch):
    monkeypatch.setattr(eigen, "SWEEPS", 1)
    check_eigh(gram(40, 40))


def test_a_batch_is_as_its_members(blocks):
    """Who shares the call changes rounding alone."""
    G = gram(24, 24, (5,), seed=3)
    together, alone = eigen.eigh(G)[0], torch.stack([eigen.eigh(one)[0] for one in G])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@given(st.integers(9, 40), st.integers(1, 40), st.integers(0, 2**31), st.floats(0, 14))
@settings(max_examples=40, deadline=None)
def test_singular_values_and_products(n, rank, seed, spread):
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(2, n, min(rank, n), generator=draw, dtype=torch.float64) for _ in range(2))
    C = left * torch.logspace(0, -spread, left.shape[-1], dtype=torch.float64) @ right.mT
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(eigen.LARGEST, "cpu", 8)
        U, S, Vt = eigen.svd(C)
    size = torch.linalg.matrix_norm(C, 2)
    assert float(((S - torch.linalg.svdvals(C)) / size[:, None]).abs().max()) <= 1e-7
    assert float(((U * S.unsqueeze(-2)) @ Vt - C).abs().amax((-2, -1)).div(size).max()) <= 1e-12
    assert float((Vt @ Vt.mT - torch.eye(n, dtype=C.dtype)).abs().max()) <= 1e-12


def test_a_zero_matrix_has_no_directions(blocks):
    U, S, _ = eigen.svd(torch.zeros(2, 9, 9, dtype=torch.float64))
    assert not bool(S.any())
    assert not bool(U.any())


@pytest.mark.parametrize("gauge", ["balanced", "balanced_rotated", "orthonormal", "anchored"])
@pytest.mark.parametrize(("m", "r", "rank"), [(5, 8, 8), (3, 16, 4), (10, 2, 3)])
def test_the_truncated_average_is_that_of_the_dense_svd(blocks, gauge, m, r, rank):
    draw = torch.Generator().manual_seed(m)
    A, B = torch.randn(4, m, r, 70, generator=draw), torch.randn(4, m, 50, r, generator=draw)
    weights = torch.full((m,), 1 / m, dtype=torch.float64)
    dense = (B.double() @ A.double()).mean(1)
    U, S, Vt = torch.linalg.svd(dense, full_matrices=False)
    wanted = U[..., :rank] * S[..., None, :rank] @ Vt[..., :rank, :]
    found = lowrank.mix_truncate(A, B, weights, rank, gauge=gauge, method="gram")
    size = torch.linalg.matrix_norm(dense)[..., None, None]
    assert float(((found.B.double() @ found.A.double() - wanted) / size).abs().max()) <= 1e-6
    tail = torch.linalg.vector_norm(S[..., rank:], dim=-1)
    torch.testing.assert_close(found.tail.double(), tail, rtol=1e-6, atol=1e-6)
