"""Against dense float64 linear algebra in NumPy and SciPy, which knows nothing of factors."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_lora import lowrank
from decaf_lora.errors import UserError
from decaf_lora.lowrank import (
    FRESH_ROW_NORM,
    frame_change,
    interference,
    mix_truncate,
    polar,
    product_distance,
    product_inner,
    product_norm,
)

GAUGES = ["balanced", "balanced_rotated", "orthonormal", "orthonormal_rotated", "anchored"]
ROTATED = ["balanced_rotated", "orthonormal_rotated"]
METHODS = ["qr", "gram"]
gauges = pytest.mark.parametrize("gauge", GAUGES)
methods = pytest.mark.parametrize("method", METHODS)


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def factors(*lead, m=3, r=2, d_in=17, d_out=13, seed=0, dtype=torch.float32):
    """m factor pairs and positive weights that sum to 1."""
    A, B = (
        draw(*lead, m, r, d_in, seed=seed, dtype=dtype),
        draw(*lead, m, d_out, r, seed=seed + 1, dtype=dtype),
    )
    weights = torch.rand(*lead, m, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64) + 0.1
    return A, B, weights / weights.sum(-1, keepdim=True)


def dense(A, B):
    return B.double().numpy() @ A.double().numpy()


def dense_sum(A, B, weights):
    return (weights.double().numpy()[..., None, None] * dense(A, B)).sum(-3)


def dense_tsvd(Z, rank):
    """The truncated matrix, what was cut, and the singular values."""
    U, s, Vh = np.linalg.svd(Z, full_matrices=False)
    return (U[..., :rank] * s[..., None, :rank]) @ Vh[..., :rank, :], np.sqrt((s[..., rank:] ** 2).sum(-1)), s


def norm(X):
    return np.linalg.norm(X, axis=(-2, -1))


def assert_is_tsvd(result, Z, rank, tolerance):
    """`result` is the truncated SVD of the dense Z, within tolerance ||Z_r|| (and ||Z|| for the tail)."""
    expected, tail, _ = dense_tsvd(Z, rank)
    assert (norm(dense(result.A, result.B) - expected) <= tolerance * norm(expected)).all()
    np.testing.assert_allclose(result.tail.double().numpy(), tail, rtol=1e-4, atol=tolerance * norm(Z).max())


# --- truncation -------------------------------------------------------------------------------------------


@st.composite
def spectra(draw_from):
    """Contributors B_j A_j to a Z with a clear gap at sigma_rank: (A, B, weights, rank)."""
    m, r = draw_from(st.integers(1, 6)), draw_from(st.integers(1, 4))
    d_in, d_out = draw_from(st.integers(1, 40)), draw_from(st.integers(1, 40))
    lead = draw_from(st.sampled_from([(), (1,), (3,), (2, 3)]))
    dtype = draw_from(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    rank = draw_from(st.integers(1, min(d_in, d_out)))
    A, B, weights = factors(*lead, m=m, r=r, d_in=d_in, d_out=d_out, seed=draw_from(st.integers(0, 10**6)), dtype=dtype)
    kind = draw_from(st.sampled_from(["random", "duplicated", "deficient", "some zero", "zero"]))
    if kind == "duplicated":
        A, B = A[..., :1, :, :].expand_as(A), B[..., :1, :, :].expand_as(B)
    elif kind == "deficient":
        A = A[..., :1, :].expand_as(A)
    elif kind == "some zero":
        B = B * (torch.arange(m) % 2).to(B)[:, None, None]
    elif kind == "zero":
        B = B * 0
    # Scales that leave every product alone, one contributor apart from the others.
    scale = draw_from(st.sampled_from([0, 15, -20]))
    if scale and dtype != torch.bfloat16:
        scales = torch.ones(m, 1, 1, dtype=dtype)
        scales[0] = 10.0**scale
        A, B = A * scales, B / scales
    return A, B, weights, rank


@settings(deadline=None, max_examples=400)
@given(case=spectra(), method=st.sampled_from(["auto", *METHODS]), gauge=st.sampled_from(GAUGES))
def test_is_the_dense_truncated_svd(case, method, gauge):
    A, B, weights, rank = case
    Z = dense_sum(A, B, weights)
    _, best, s = dense_tsvd(Z, rank)
    result = mix_truncate(A, B, weights, rank, method=method, gauge=gauge, a_scale=1.0)
    assert result.A.shape == (*A.shape[:-3], rank, A.shape[-1])
    assert result.B.shape == (*B.shape[:-3], B.shape[-2], rank)
    assert result.A.dtype == result.B.dtype == (torch.float64 if A.dtype == torch.float64 else torch.float32)
    tolerance = 1e-10 if A.dtype == torch.float64 and method != "gram" else 1e-5
    # Without a gap at sigma_rank the best approximation is not unique, but its distance from Z is.
    if rank == s.shape[-1] or (s[..., rank] <= 0.95 * s[..., rank - 1]).all():
        assert_is_tsvd(result, Z, rank, tolerance)
    error = norm(Z - dense(result.A, result.B))
    assert (error <= best + tolerance * norm(Z)).all()


@methods
@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize(("d_in", "d_out"), [(30, 20), (5, 40), (40, 5), (4, 4)])
def test_more_stacked_directions_than_dimensions(method, m, d_in, d_out):
    A, B, weights = factors(m=m, r=4, d_in=d_in, d_out=d_out, dtype=torch.float64)
    for rank in (1, 4):
        result = mix_truncate(A, B, weights, rank, method=method)
        assert_is_tsvd(result, dense_sum(A, B, weights), rank, 1e-10 if method == "qr" else 1e-7)


@methods
@pytest.mark.parametrize(("a", "b"), [(1e-20, 1e15), (1e15, 1e15), (1e-20, 1e-15), (1e-12, 1e-20)])
def test_badly_scaled_factors(method, a, b):
    A, B, weights = factors()
    A, B = A * a, B * b
    assert_is_tsvd(mix_truncate(A, B, weights, 2, method=method), dense_sum(A, B, weights), 2, 1e-5)


def test_contributions_that_cancel_keep_their_digits_with_qr():
    A = draw(1, 2, 30, dtype=torch.float64).repeat(2, 1, 1)
    B = draw(1, 20, 2, seed=1, dtype=torch.float64).repeat(2, 1, 1)
    A[1] += 1e-7 * draw(2, 30, seed=2, dtype=torch.float64)
    weights = torch.tensor([1.0, -1.0], dtype=torch.float64)
    result = mix_truncate(A, B, weights, 2, method="qr", reference=(A[0], B[0]))
    assert_is_tsvd(result, dense_sum(A, B, weights), 2, 1e-7)


def test_qr_and_gram_agree_on_the_factors_themselves():
    A, B, weights = factors(4, 3)
    for gauge in GAUGES:
        one, other = (mix_truncate(A, B, weights, 2, gauge=gauge, method=method) for method in METHODS)
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_batches_equal_single_calls_also_when_worked_in_pieces(monkeypatch):
    A, B, weights = factors(2, 5)
    for method in METHODS:
        whole = mix_truncate(A, B, weights, 2, method=method)
        monkeypatch.setattr(lowrank, "CHUNK", 4 * A[0, 0].numel() + 1)
        pieces = mix_truncate(A, B, weights, 2, method=method)
        monkeypatch.undo()
        for i in range(2):
            for j in range(5):
                single = mix_truncate(A[i, j], B[i, j], weights[i, j], 2, method=method)
                for x, y, z in zip(whole, pieces, single, strict=True):
                    torch.testing.assert_close(x[i, j], z)
                    torch.testing.assert_close(y[i, j], z)


@methods
@gauges
def test_weights_broadcast(method, gauge):
    A, B, _ = factors(4, dtype=torch.float64)
    shared = torch.tensor([0.5, 0.3, 0.2])
    result = mix_truncate(A, B, shared, 2, method=method, gauge=gauge)
    expected = mix_truncate(A, B, shared.expand(4, 3), 2, method=method, gauge=gauge)
    assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
    # Every agent's own weights for the same contributors.
    rows = torch.softmax(draw(5, 3), -1)
    result = mix_truncate(A[0], B[0], rows, 2, method=method, gauge=gauge)
    for i in range(5):
        torch.testing.assert_close(result.A[i], mix_truncate(A[0], B[0], rows[i], 2, method=method, gauge=gauge).A)


@methods
@gauges
def test_two_calls_give_the_same_bits(method, gauge):
    A, B, weights = factors(7, m=4, r=3)
    one, other = (mix_truncate(A, B, weights, 3, gauge=gauge, method=method) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@methods
def test_no_dense_matrix_is_built(method):
    # The dense matrix would take 160 GB.
    A, B, weights = factors(m=3, r=2, d_in=200_000, d_out=200_000)
    result = mix_truncate(A, B, weights, 2, method=method)
    norm_of_sum = product_norm(A.flatten(0, 1), (weights.to(B)[:, None, None] * B).transpose(0, 1).flatten(1))
    kept = product_norm(result.A, result.B)
    assert torch.hypot(kept, result.tail).item() == pytest.approx(norm_of_sum.item(), rel=1e-5)
    assert product_distance(A[0], B[0], A[0], B[0]) < 1e-12 * norm_of_sum


@methods
def test_the_largest_entry_of_each_left_vector_is_positive(method):
    for seed in range(5):
        A, B, weights = factors(seed=seed)
        U = mix_truncate(A, B, weights, 2, method=method).B.numpy()
        assert (np.take_along_axis(U, np.abs(U).argmax(-2, keepdims=True), -2) > 0).all()


def test_results_carry_no_graph():
    A, B, weights = factors()
    result = mix_truncate(A.requires_grad_(), B.requires_grad_(), weights, 2)
    assert not any(x.requires_grad for x in result)


# --- gauges -----------------------------------------------------------------------------------------------


@methods
@gauges
def test_every_gauge_has_the_same_product(method, gauge):
    A, B, weights = factors(3, m=3, r=3, dtype=torch.float64)
    reference = draw(3, 3, 17, seed=8, dtype=torch.float64), draw(3, 13, 3, seed=9, dtype=torch.float64)
    for chosen in (None, reference):
        result = mix_truncate(A, B, weights, 3, gauge=gauge, method=method, reference=chosen)
        assert_is_tsvd(result, dense_sum(A, B, weights), 3, 1e-9)


@pytest.mark.parametrize("gauge", ["balanced", "balanced_rotated"])
def test_balanced_factors_share_their_gram_matrix(gauge):
    A, B, weights = factors(2, dtype=torch.float64)
    result = mix_truncate(A, B, weights, 2, gauge=gauge)
    torch.testing.assert_close(result.A @ result.A.mT, result.B.mT @ result.B)
    if gauge == "balanced":
        s = dense_tsvd(dense_sum(A, B, weights), 2)[2][..., :2]
        torch.testing.assert_close(result.A @ result.A.mT, torch.diag_embed(torch.from_numpy(s)))


@pytest.mark.parametrize("gauge", ["orthonormal", "orthonormal_rotated"])
@pytest.mark.parametrize("a_scale", [None, 0.7, torch.tensor([0.1, 2.0])])
def test_orthonormal_rows_at_the_given_scale(gauge, a_scale):
    A, B, weights = factors(2, dtype=torch.float64)
    result = mix_truncate(A, B, weights, 2, gauge=gauge, a_scale=a_scale)
    mean = (weights[..., None, None] * A).sum(-3)
    scale = (mean.square().sum((-2, -1)) / 2).sqrt() if a_scale is None else torch.as_tensor(a_scale).expand(2)
    expected = scale.double().square()[:, None, None] * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(result.A @ result.A.mT, expected)


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("gauge", ROTATED)
def test_rotation_is_the_procrustes_solution(gauge, r):
    A, B, weights = factors(m=3, r=r, dtype=torch.float64)
    reference = draw(r, 17, seed=8, dtype=torch.float64), draw(13, r, seed=9, dtype=torch.float64)
    plain = mix_truncate(A, B, weights, r, gauge=gauge.removesuffix("_rotated"), reference=reference)
    turned = mix_truncate(A, B, weights, r, gauge=gauge, reference=reference)
    # Columns side by side: (A^T, B) R should be near (Aref^T, Bref).
    source, target = np.vstack([plain.A.T, plain.B]), np.vstack([reference[0].T, reference[1]])
    if gauge == "orthonormal_rotated":
        source, target = plain.A.numpy().T, reference[0].numpy().T
    R, _ = scipy.linalg.orthogonal_procrustes(source, target)
    np.testing.assert_allclose(turned.A.numpy(), R.T @ plain.A.numpy(), atol=1e-10)
    np.testing.assert_allclose(turned.B.numpy(), plain.B.numpy() @ R, atol=1e-10)

    def distance(A, B):
        far = (A - reference[0]).square().sum()
        return far + (B - reference[1]).square().sum() * (gauge == "balanced_rotated")

    best = distance(turned.A, turned.B)
    for seed in range(20):
        Q = torch.linalg.qr(draw(r, r, seed=seed, dtype=torch.float64)).Q
        assert best <= distance(Q.mT @ plain.A, plain.B @ Q) + 1e-9


@methods
def test_anchored_is_its_formula_and_falls_back_when_ill_conditioned(method):
    A, B, weights = factors(2, dtype=torch.float64)
    reference = draw(2, 2, 17, seed=8, dtype=torch.float64), draw(2, 13, 2, seed=9, dtype=torch.float64)
    reference[0][1, 1] = reference[0][1, 0] * (1 + 1e-7)
    result = mix_truncate(A, B, weights, 2, gauge="anchored", reference=reference, method=method)
    U, s, Vh = np.linalg.svd(dense_sum(A[0], B[0], weights[0]))
    frame = reference[0][0].numpy() @ Vh[:2].T
    np.testing.assert_allclose(result.A[0].numpy(), frame @ Vh[:2], atol=1e-7)
    np.testing.assert_allclose(result.B[0].numpy(), U[:, :2] * s[:2] @ np.linalg.inv(frame), atol=1e-7)
    fallback = mix_truncate(A, B, weights, 2, gauge="orthonormal_rotated", reference=reference, method=method)
    assert torch.equal(result.A[1], fallback.A[1])
    assert torch.equal(result.B[1], fallback.B[1])


@pytest.mark.parametrize("gauge", [*ROTATED, "anchored"])
def test_agreeing_agents_stay_where_they_are(gauge):
    """Contributors that are equal and in the gauge are a fixed point: the optimizer is not disturbed."""
    A, B, weights = factors(m=1, dtype=torch.float64)
    start = mix_truncate(A, B, weights, 2, gauge=gauge, reference=(A[0], B[0]))
    repeat = start.A.expand(3, -1, -1), start.B.expand(3, -1, -1)
    again = mix_truncate(*repeat, torch.full((3,), 1 / 3), 2, gauge=gauge)
    torch.testing.assert_close(again.A, start.A, rtol=0, atol=1e-6)
    torch.testing.assert_close(again.B, start.B, rtol=0, atol=1e-6)


def test_default_reference_is_the_weighted_average_cut_or_filled_to_the_rank():
    A, B, weights = factors(m=3, r=2, dtype=torch.float64)
    mean_A, mean_B = (weights[:, None, None] * A).sum(0), (weights[:, None, None] * B).sum(0)
    for rank in (1, 2, 3):
        Aref, Bref = torch.zeros(rank, 17).double(), torch.zeros(13, rank).double()
        k = min(rank, 2)
        Aref[:k], Bref[:, :k] = mean_A[:k], mean_B[:, :k]
        for gauge in ROTATED:
            result = mix_truncate(A, B, weights, rank, gauge=gauge)
            expected = mix_truncate(A, B, weights, rank, gauge=gauge, reference=(Aref, Bref))
            torch.testing.assert_close(result.A, expected.A)
        # The zeros it is filled with do not count for the scale.
        rows = mix_truncate(A, B, weights, rank, gauge="orthonormal").A.norm(dim=-1)
        torch.testing.assert_close(rows, (mean_A[:k].square().sum() / k).sqrt().expand(rank))


# --- null directions --------------------------------------------------------------------------------------


@methods
@gauges
@pytest.mark.parametrize("zero", ["B", "A", "both"])
def test_a_zero_product_stays_trainable(method, gauge, zero):
    A, B, weights = factors(2, r=2)
    A, B = A * (zero == "B"), B * (zero == "A")
    result = mix_truncate(A, B, weights, 2, gauge=gauge, method=method)
    assert (result.B == 0).all()
    assert (result.tail == 0).all()
    norms = torch.linalg.vector_norm(result.A, dim=-1)
    if zero != "B":
        torch.testing.assert_close(norms, torch.full((2, 2), FRESH_ROW_NORM))
    assert (torch.linalg.svdvals(result.A)[..., -1] > 0.1 * norms.max()).all()
    # The gradient of any loss for B is (dL/dW) A^T: not zero.
    new_A, new_B = result.A.requires_grad_(), result.B.requires_grad_()
    ((new_B @ new_A) * draw(2, 13, 17, seed=5)).sum().backward()
    assert (torch.linalg.vector_norm(new_B.grad, dim=-2) > 0).all()


@methods
def test_a_fresh_adapter_keeps_its_frame(method):
    """B = 0 and a common A, as at the start of every run."""
    A = draw(1, 2, 300).expand(3, -1, -1) / 300**0.5
    B, weights = torch.zeros(3, 200, 2), torch.full((3,), 1 / 3)
    anchored = mix_truncate(A, B, weights, 2, gauge="anchored", method=method)
    torch.testing.assert_close(anchored.A, A[0], rtol=0, atol=1e-6)
    left, s, right = np.linalg.svd(A[0].double().numpy(), full_matrices=False)
    nearest = left @ right * np.sqrt((s**2).mean())
    for gauge in ROTATED:
        turned = mix_truncate(A, B, weights, 2, gauge=gauge, method=method)
        np.testing.assert_allclose(turned.A.numpy(), nearest, atol=1e-6)


@methods
@gauges
@pytest.mark.parametrize("live", [1, 2, 3])
@pytest.mark.parametrize("reference", ["average", "none", "inside"])
def test_missing_directions_get_orthogonal_rows(method, gauge, live, reference):
    """Rank 4 asked of a sum of rank `live`; the reference offers new directions, none, or only a live one."""
    A, B, weights = factors(2, m=3, r=live, dtype=torch.float64)
    A = A[:, :1].repeat(1, 3, 1, 1)
    zeros = torch.zeros(2, 4, 17).double(), torch.zeros(2, 13, 4).double()
    chosen = {"average": None, "none": zeros, "inside": (A[:, 0, :1].expand(2, 4, 17), zeros[1])}[reference]
    result = mix_truncate(A, B, weights, 4, gauge=gauge, method=method, reference=chosen, a_scale=0.5)
    assert_is_tsvd(result, dense_sum(A, B, weights), 4, 1e-7)
    assert (torch.linalg.svdvals(result.A)[..., -1] > 1e-2).all()
    if gauge in ("balanced", "orthonormal"):
        null_A, null_B = result.A[:, live:], result.B[..., live:]
        assert (null_B == 0).all()
        identity = torch.eye(4, dtype=torch.float64)[live:].expand(2, -1, -1)
        unit = result.A / torch.linalg.vector_norm(result.A, dim=-1, keepdim=True)
        torch.testing.assert_close(unit[:, live:] @ unit.mT, identity, rtol=0, atol=1e-7)
        torch.testing.assert_close(torch.linalg.vector_norm(null_A, dim=-1), torch.full((2, 4 - live), 0.5).double())


@methods
def test_null_rows_come_from_the_reference(method):
    A, B, weights = factors(m=1, r=1, d_in=50, d_out=40)
    Aref, Bref = draw(2, 50, seed=7), draw(40, 2, seed=8)
    row = mix_truncate(A, B, weights, 2, method=method, reference=(Aref, Bref), a_scale=1.0).A[1]
    basis = torch.linalg.qr(torch.cat([A[0], Aref]).T).Q
    torch.testing.assert_close(basis @ (basis.T @ row), row, rtol=0, atol=1e-5)


def test_null_tolerance_decides_what_is_null():
    A = torch.eye(2, 5).unsqueeze(0)
    B = torch.zeros(1, 4, 2)
    B[0, 0, 0], B[0, 1, 1] = 1.0, 1e-4
    weights = torch.ones(1)
    assert mix_truncate(A, B, weights, 2).B[1, 1] == pytest.approx(1e-2)
    assert (mix_truncate(A, B, weights, 2, null_tolerance=1e-3).B[:, 1] == 0).all()


# --- measures ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    r1=st.integers(1, 5),
    r2=st.integers(1, 5),
    d_in=st.integers(1, 20),
    d_out=st.integers(1, 20),
    lead=st.sampled_from([(), (3,), (2, 2)]),
    seed=st.integers(0, 10**6),
)
def test_inner_norm_and_distance_are_those_of_the_products(r1, r2, d_in, d_out, lead, seed):
    A1, B1 = draw(*lead, r1, d_in, seed=seed), draw(*lead, d_out, r1, seed=seed + 1)
    A2, B2 = draw(r2, d_in, seed=seed + 2), draw(d_out, r2, seed=seed + 3)
    X, Y = dense(A1, B1), dense(A2, B2)
    close = {"rtol": 1e-6, "atol": 1e-6 * (norm(X).max() * norm(Y))}
    np.testing.assert_allclose(product_inner(A1, B1, A2, B2).numpy(), (X * Y).sum((-2, -1)), **close)
    np.testing.assert_allclose(product_norm(A1, B1).numpy(), norm(X), rtol=1e-6)
    np.testing.assert_allclose(product_distance(A1, B1, A2, B2).numpy(), norm(X - Y), rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0, 1e-3, 1e-7, 1e-11])
def test_distance_of_nearly_equal_products(epsilon):
    A1, B1 = draw(3, 40, dtype=torch.float64), draw(30, 3, seed=1, dtype=torch.float64)
    turn = torch.linalg.qr(draw(3, 3, seed=2, dtype=torch.float64)).Q
    A2, B2 = turn @ A1, B1 @ turn.mT
    A2 = A2 + epsilon * draw(3, 40, seed=3, dtype=torch.float64)
    exact = epsilon * norm(dense(draw(3, 40, seed=3, dtype=torch.float64), B2))
    assert product_distance(A1, B1, A2, B2).item() == pytest.approx(exact, abs=1e-14 * norm(dense(A1, B1)))


@pytest.mark.parametrize("m", [1, 2, 3, 10])
@pytest.mark.parametrize("lead", [(), (4,)])
def test_interference_is_the_dense_difference(m, lead):
    A, B, weights = factors(*lead, m=m, r=3, dtype=torch.float64)
    w = weights[..., None, None]
    exact = norm(dense_sum(A, B, weights) - dense((w * A).sum(-3), (w * B).sum(-3)))
    np.testing.assert_allclose(interference(A, B, weights).numpy(), exact, rtol=1e-10, atol=1e-13)


def test_interference_is_second_order_and_keeps_its_digits():
    A0, B0 = draw(2, 30, dtype=torch.float64), draw(20, 2, seed=1, dtype=torch.float64)
    dA, dB = draw(3, 2, 30, seed=2, dtype=torch.float64), draw(3, 20, 2, seed=3, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    unit = interference(dA, dB, weights)
    for epsilon in (1e-2, 1e-5):
        near = interference(A0 + epsilon * dA, B0 + epsilon * dB, weights)
        torch.testing.assert_close(near, epsilon**2 * unit, rtol=1e-8, atol=0)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_polar_is_the_dense_polar_factor(r):
    M = draw(4, r, r, dtype=torch.float64)
    for one, R in zip(M, polar(M), strict=True):
        np.testing.assert_allclose(R.numpy(), scipy.linalg.polar(one.numpy())[0], atol=1e-12)


def test_frame_change_finds_the_rotation():
    A, B = draw(4, 3, 17, dtype=torch.float64), draw(4, 13, 3, seed=1, dtype=torch.float64)
    P = torch.linalg.qr(draw(4, 3, 3, seed=2, dtype=torch.float64)).Q
    noise = 1e-3 * draw(4, 3, 17, seed=3, dtype=torch.float64)
    torch.testing.assert_close(frame_change(A, B, P @ A, B @ P.mT), P)
    found = frame_change(A, B, P @ A + noise, B @ P.mT)
    torch.testing.assert_close(found, P, rtol=0, atol=1e-2)
    source, target = np.vstack([A[0].T, B[0]]), np.vstack([(P @ A + noise)[0].T, (B @ P.mT)[0]])
    np.testing.assert_allclose(found[0].numpy().T, scipy.linalg.orthogonal_procrustes(source, target)[0], atol=1e-10)


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank: 0"),
        ({"rank": 14}, r"rank: 14 is not in 1 \.\. 13"),
        ({"gauge": "balanced_rotatd"}, "gauge: .*balanced_rotated"),
        ({"method": "svd"}, "method: 'svd'"),
        ({"A": torch.zeros(3, 3, 17)}, "A, B: need the shapes"),
        ({"A": torch.zeros(2, 17)}, "A, B: need the shapes"),
        ({"A": torch.zeros(3, 0, 17), "B": torch.zeros(3, 13, 0)}, "A, B: need the shapes.* none of them 0"),
        ({"A": torch.zeros(3, 2, 0)}, "A, B: need the shapes.* none of them 0"),
        ({"B": torch.zeros(3, 0, 2)}, "A, B: need the shapes.* none of them 0"),
        ({"A": torch.zeros(3, 2, 17, dtype=torch.int64)}, "A, B: need floating-point"),
        ({"weights": torch.ones(2)}, "weights: need the shape"),
        ({"weights": torch.tensor(1.0)}, "weights: need the shape"),
        ({"weights": torch.zeros(3), "gauge": "anchored"}, "weights: they sum to 0"),
        ({"reference": (torch.zeros(3, 17), torch.zeros(13, 2))}, "reference: need the shapes"),
        ({"a_scale": 0.0, "gauge": "orthonormal"}, "a_scale: must be positive"),
    ],
)
def test_mistakes_are_named(change, message):
    A, B, weights = factors()
    arguments = {"A": A, "B": B, "weights": weights, "rank": 2} | change
    with pytest.raises(UserError, match=message):
        mix_truncate(**arguments)


def test_mistakes_in_the_measures_are_named():
    A, B, weights = factors()
    with pytest.raises(UserError, match="weights: must sum to 1"):
        interference(A, B, 2 * weights)
    with pytest.raises(UserError, match="different shapes"):
        product_distance(A[0], B[0], A[0, :, :-1], B[0])
    with pytest.raises(UserError, match="leading axes"):
        product_inner(A, B, A[:2], B[:2])
    with pytest.raises(UserError, match="rank"):
        frame_change(A[0], B[0], A[0, :1], B[0, :, :1])
    with pytest.raises(UserError, match="M: need"):
        polar(A)


non_finite = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])


@methods
@gauges
@non_finite
@pytest.mark.parametrize("where", ["A", "B", "weights"])
def test_non_finite_input_is_refused(method, gauge, value, where):
    A, B, weights = factors(2)
    {"A": A, "B": B, "weights": weights}[where].view(-1)[-1] = value
    with pytest.raises(FloatingPointError, match="non-finite factors"):
        mix_truncate(A, B, weights, 2, gauge=gauge, method=method)


@pytest.mark.parametrize("gauge", [*ROTATED, "anchored"])
@non_finite
def test_non_finite_reference_is_refused(gauge, value):
    A, B, weights = factors()
    with pytest.raises(FloatingPointError, match="non-finite factors"):
        mix_truncate(A, B, weights, 2, gauge=gauge, reference=(A[0] * value, B[0]))
    with pytest.raises(FloatingPointError, match="non-finite factors"):
        polar(torch.full((2, 2), value))
