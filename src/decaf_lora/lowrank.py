"""How do I add, measure and truncate low-rank products without building them?

A low-rank product is a pair of factors, `A (..., r, d_in)` and `B (..., d_out, r)`, standing for the matrix
`B @ A (..., d_out, d_in)`. A weighted sum of m such products is another, of rank R = m r,

    Z = sum_j w_j B_j A_j = Bs diag(w) As,    Bs = [B_1 .. B_m] (d_out, R),    As = [A_1; ..; A_m] (R, d_in),

so its truncated SVD follows from an R x R core at the cost of the factors, exactly (Eckart-Young):

    Bs = Qb Rb,    As^T = Qa Ra,    Rb diag(w) Ra^T = U S V^T,    U <- Qb U,    V <- Qa V

    "qr":    the Q and R of two thin QR factorizations
    "gram":  Ga = As As^T = E L E^T gives Ra = L^1/2 E^T and Qa = As^T E L^-1/2; likewise Qb, Rb from Bs^T Bs

Both work in float64 whatever the factors' dtype. "gram" takes only matrix products in the long dimensions,
but a Gram matrix squares the condition number: directions of As or Bs below about sqrt(eps) of the largest
are noise, and are cut.

With the same R factors `||Z||_F = ||Rb diag(w) Ra^T||_F`, and `<B1 A1, B2 A2> = trace((B1^T B2)(A2 A1^T))`.
Averaging factors instead of products is off by the consensus interference (weights that sum to 1)

    sum_j w_j B_j A_j - Bbar Abar = sum_j w_j (B_j - Bbar)(A_j - Abar),   Abar = sum_j w_j A_j, Bbar likewise.

Nothing here is differentiated: every function runs without autograd. Results are float64 if a factor is, else
float32.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import eigen
from .errors import UserError, unknown
from .precision import double, work_device

Gauge = Literal["balanced", "balanced_rotated", "orthonormal", "orthonormal_rotated", "anchored"]
Method = Literal["auto", "qr", "gram"]

FRESH_ROW_NORM = 1 / math.sqrt(3)
"""Expected norm of a row of a fresh LoRA A (PEFT: kaiming-uniform, a = sqrt(5); variance 1 / (3 d_in))."""

ANCHOR_CONDITION = 1e4
"""Above this condition number of Aref V, "anchored" gives way to "orthonormal_rotated"."""

CHUNK = 2**20
"""Numbers of a batch worked on at a time on a CPU, 8 MB in float64: measured twice as fast as all at once."""


class Truncated(NamedTuple):
    """The best rank-`rank` approximation of a sum of low-rank products, as factors again."""

    A: Tensor
    """(..., rank, d_in)"""
    B: Tensor
    """(..., d_out, rank)"""
    tail: Tensor
    """(...) Frobenius norm of what was cut, sqrt(sum_{l > rank} sigma_l^2)."""
    rest_a: Tensor
    """(..., rest, d_in): A of the best rank-`rest` approximation of what was cut, balanced, filled with zeros."""
    rest_b: Tensor
    """(..., d_out, rest): B of it."""


@torch.no_grad()
def mix_truncate(
    A: Tensor,
    B: Tensor,
    weights: Tensor,
    rank: int,
    *,
    gauge: Gauge = "balanced",
    reference: tuple[Tensor, Tensor] | None = None,
    a_scale: float | Tensor | None = None,
    method: Method = "auto",
    null_tolerance: float | None = None,
    carried: tuple[Tensor, Tensor] | None = None,
    rest: int = 0,
) -> Truncated:
    """The rank-`rank` truncated SVD of `sum_j w_j B_j A_j`, split into factors by `gauge`.

    With Z ~ U S V^T, c = `a_scale` and (Aref, Bref) = `reference`, the new factors are

    - "balanced":             A = S^1/2 V^T,      B = U S^1/2
    - "balanced_rotated":     the same, turned (A <- R^T A, B <- B R) to be nearest to Aref and Bref
    - "orthonormal":          A = c V^T,          B = U S / c
    - "orthonormal_rotated":  the same, turned for A to be nearest to Aref
    - "anchored":             A = (Aref V) V^T,   B = U S (Aref V)^-1; a batch element with cond(Aref V) above
                              `ANCHOR_CONDITION` falls back to "orthonormal_rotated"

    The largest entry (in magnitude) of each column of U is positive. Null directions, sigma_l <=
    `null_tolerance` sigma_1, or all of them when Z = 0, get a zero column of B and a live row of A, so that
    training can grow them again: a unit vector orthogonal to the other rows, taken from what Aref has outside
    the live rows, else from the coordinate axes; times c, then turned as the gauge says. So the untrained
    adapters of a common start (B = 0) keep A itself in "anchored", and its nearest orthogonal frame in the
    rotated gauges.

    Args:
        A: (..., m, r, d_in), the contributors' factors; float16 and bfloat16 give a float32 result.
        B: (..., m, d_out, r)
        weights: (..., m) of any float dtype; leading axes broadcast with those of A and B.
        rank: of the result; what exceeds m r is filled with null directions.
        gauge: how U S V^T is split.
        reference: Aref (..., rank, d_in) and Bref (..., d_out, rank). None: the weighted average of the
            factors, cut or filled with zeros to `rank`.
        a_scale: positive, a number or (...). None: root mean square of the norms of Aref's nonzero rows, or
            `FRESH_ROW_NORM` if it has none. Prefer a constant: an average of unrelated frames shrinks.
        method: "qr" is right to about 1e-15 sum_j ||w_j B_j|| ||A_j||, "gram" to 1e-7, which suffices for
            float32 unless the contributions cancel each other; "auto" is "qr" for float64, else the faster.
        null_tolerance: None: 1e-6, or 1e-12 for float64.
        carried: (..., q, d_in), (..., d_out, q), one more product, of any rank q, that is added to Z with weight 1 and
            is no part of the reference.
        rest: how many singular directions after the first `rank` to return as `rest_a`, `rest_b`; they come from the
            same core.

    Raises:
        UserError: shapes that do not fit, `rank` not in 1 .. min(d_out, d_in), an unknown gauge or method.
        FloatingPointError: NaN or infinity in the factors, the weights or the reference.

    Source: the product consensus of DeCAF (arXiv 2505.21382); "qr" is the usual recompression of low-rank
    matrices (Bebendorf, Hierarchical Matrices, 2008). The paper gives no gauge and no null directions: ours.
    """
    _check_factors(A, B, weights, contributors=True)
    d_out, d_in = B.shape[-2], A.shape[-1]
    if not 1 <= rank <= min(d_out, d_in):
        raise UserError(f"rank: {rank} is not in 1 .. {min(d_out, d_in)}, the ranks of a ({d_out}, {d_in}) matrix.")
    if gauge not in get_args(Gauge):
        raise unknown("gauge", gauge, get_args(Gauge))
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    if reference is not None:
        _check_reference(*reference, rank, d_in, d_out)
    if carried is not None:
        _check_reference(*carried, carried[0].shape[-2], d_in, d_out, "carried")
    dtype = _result_dtype(A, B)
    if method == "auto":
        method = _faster(A, B)
    if null_tolerance is None:
        null_tolerance = 1e-12 if dtype == torch.float64 else 1e-6

    # From here on in float64, and with B transposed: contiguous rows (rank, d_out) are far faster to work on.
    Ut, s, Vt, tail = _svd(*_with_carried(A, B.mT, weights, carried), rank + rest, method)
    rest_s, s = s[..., rank:], s[..., :rank]
    if rest:
        tail = tail.hypot(torch.linalg.vector_norm(rest_s, dim=-1))
    rest_a, rest_bt = (rest_s.sqrt().unsqueeze(-1) * x[..., rank:, :] for x in (Vt, Ut))
    Ut, Vt = Ut[..., :rank, :], Vt[..., :rank, :]
    null = s <= null_tolerance * s[..., :1]
    any_null = bool(null.any())
    if any_null or gauge != "balanced":
        A_ref = _average(A, weights, rank) if reference is None else double(reference[0])
        c = _scale(a_scale, A_ref)
    if any_null:
        s = s.masked_fill(null, 0)
        Vt = _revive(Vt, null, A_ref)

    if gauge in ("balanced", "balanced_rotated"):
        root = s.sqrt()
        A_new = (torch.where(null, c, root) if any_null else root).unsqueeze(-1) * Vt
        Bt_new = root.unsqueeze(-1) * Ut
        if gauge == "balanced_rotated":
            Bt_ref = _average(B.mT, weights, rank) if reference is None else double(reference[1].mT)
            Rt = _polar(A_ref @ A_new.mT + Bt_ref @ Bt_new.mT)
            A_new, Bt_new = Rt @ A_new, Rt @ Bt_new
    elif gauge == "orthonormal":
        A_new, Bt_new = c.unsqueeze(-1) * Vt, (s / c).unsqueeze(-1) * Ut
    else:
        # Aref V = Q sigma P^T has the polar factor Q P^T: either gauge is A = Q h P^T V^T, h = c or sigma.
        Q, sigma, Pt = torch.linalg.svd(_finite(A_ref @ Vt.mT))
        h = c.expand_as(sigma)
        if gauge == "anchored":
            h = torch.where(sigma[..., -1:] * ANCHOR_CONDITION > sigma[..., :1], sigma, h)
        A_new = (Q * h.unsqueeze(-2)) @ (Pt @ Vt)
        Bt_new = (Q / h.unsqueeze(-2)) @ (Pt * s.unsqueeze(-2)) @ Ut
    results = A_new, Bt_new.mT, tail, rest_a, rest_bt.mT
    return Truncated(*(x.to(A.device, dtype, memory_format=torch.contiguous_format) for x in results))


@torch.no_grad()
def product_inner(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    """The Frobenius inner product (...) of `B1 A1` and `B2 A2`; ranks may differ, leading axes broadcast.

    Args:
        A1: (..., r1, d_in)
        B1: (..., d_out, r1)
        A2: (..., r2, d_in)
        B2: (..., d_out, r2)

    Raises:
        UserError: shapes that do not fit.
    """
    _check_pairs(A1, B1, A2, B2)
    a1, b1, a2, b2 = map(double, (A1, B1, A2, B2))
    inner = ((b1.mT @ b2) * (a1 @ a2.mT)).sum((-2, -1))
    return inner.to(A1.device, _result_dtype(A1, B1, A2, B2))


@torch.no_grad()
def product_norm(A: Tensor, B: Tensor) -> Tensor:
    """The Frobenius norm (...) of `B A`; the absolute error is about 1e-15 ||B|| ||A||, before rounding.

    Args:
        A: (..., r, d_in)
        B: (..., d_out, r)

    Raises:
        UserError: shapes that do not fit.
    """
    _check_factors(A, B)
    return _norm(double(A), double(B.mT)).to(A.device, _result_dtype(A, B))


@torch.no_grad()
def product_distance(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    """The Frobenius norm (...) of `B1 A1 - B2 A2`; ranks may differ, leading axes broadcast.

    Near-equal products keep their digits: the absolute error is about 1e-15 (||B1|| ||A1|| + ||B2|| ||A2||),
    before rounding; the square root of `||X||^2 - 2 <X, Y> + ||Y||^2` would be off by 1e-8.

    Args:
        A1: (..., r1, d_in)
        B1: (..., d_out, r1)
        A2: (..., r2, d_in)
        B2: (..., d_out, r2)

    Raises:
        UserError: shapes that do not fit.
    """
    _check_pairs(A1, B1, A2, B2)
    lead = torch.broadcast_shapes(A1.shape[:-2], A2.shape[:-2])
    a1, b1, a2, b2 = (double(x).expand(*lead, -1, -1) for x in (A1, B1.mT, A2, B2.mT))
    distance = _norm(torch.cat((a1, a2), -2), torch.cat((b1, -b2), -2))
    return distance.to(A1.device, _result_dtype(A1, B1, A2, B2))


@torch.no_grad()
def interference(A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
    """The norm (...) of the consensus interference, `sum_j w_j B_j A_j - (sum_j w_j B_j)(sum_j w_j A_j)`.

    It is what averaging the factors gets wrong about the average product. Computed in the form that does not
    cancel, as the Frobenius norm of sum_j w_j (B_j - Bbar)(A_j - Abar).

    Args:
        A: (..., m, r, d_in)
        B: (..., m, d_out, r)
        weights: (..., m), summing to 1; leading axes broadcast with those of A and B.

    Raises:
        UserError: shapes that do not fit, weights that do not sum to 1.
    """
    _check_factors(A, B, weights, contributors=True)
    a, b = double(A), double(B.mT)
    w = weights.to(a)[..., None, None]
    if bool(((w.sum(-3) - 1).abs() > 1e-5).any()):
        raise UserError("weights: must sum to 1 over the contributors; otherwise there is no average.")
    a, b = a - (w * a).sum(-3, keepdim=True), b - (w * b).sum(-3, keepdim=True)
    return _norm((w * a).flatten(-3, -2), b.flatten(-3, -2)).to(A.device, _result_dtype(A, B))


@torch.no_grad()
def polar(M: Tensor) -> Tensor:
    """The orthogonal polar factor of M (..., r, r): the orthogonal R that maximises trace(R^T M).

    Raises:
        UserError: M is not square.
        FloatingPointError: NaN or infinity in M.
    """
    if M.dim() < 2 or M.shape[-2] != M.shape[-1]:
        raise UserError(f"M: need the shape (..., r, r), got {tuple(M.shape)}.")
    return _polar(double(M)).to(M.device, _result_dtype(M))


@torch.no_grad()
def frame_change(A_old: Tensor, B_old: Tensor, A_new: Tensor, B_new: Tensor) -> Tensor:
    """The orthogonal P (..., r, r) with `A_new ~ P A_old`, `B_new ~ B_old P^T`: turns optimizer moments.

    P minimises ||A_new - P A_old||_F^2 + ||B_new - B_old P^T||_F^2 (orthogonal Procrustes).

    Args:
        A_old: (..., r, d_in)
        B_old: (..., d_out, r)
        A_new: (..., r, d_in)
        B_new: (..., d_out, r)

    Raises:
        UserError: shapes that do not fit.
        FloatingPointError: NaN or infinity in the factors.
    """
    _check_pairs(A_old, B_old, A_new, B_new)
    if A_old.shape[-2] != A_new.shape[-2]:
        raise UserError(f"A_new: its rank is {A_new.shape[-2]}, that of A_old {A_old.shape[-2]}; they must agree.")
    a0, b0, a1, b1 = map(double, (A_old, B_old, A_new, B_new))
    return _polar(a1 @ a0.mT + b1.mT @ b0).to(A_old.device, _result_dtype(A_old, B_old, A_new, B_new))


def pieces_of(numbers: int, device: torch.device) -> int:
    """How many pieces of so many numbers each to work on at a time: what a CPU's caches hold; on a GPU far more."""
    return max(1, (CHUNK if device.type == "cpu" else 64 * CHUNK) // max(1, numbers))


# --- the two factorizations ---


def _faster(A: Tensor, B: Tensor) -> Method:
    """The faster method, by measurements on one core of an AMD EPYC: d 64 to 4096, m r 4 to 80, batches of 1 to 120.

    "gram" is up to 2.6 times faster on long factors, "qr" up to 2.2 times on short ones; they tie at about
    d = 256. The batch size must not decide: an agent's result would depend on which others share its process. For
    GPUs, where QR is a long chain of small kernels, "gram" is a guess.
    """
    if torch.float64 in (A.dtype, B.dtype):
        return "qr"
    return "qr" if A.device.type == "cpu" and A.shape[-1] + B.shape[-2] <= 384 else "gram"


def _svd(A: Tensor, Bt: Tensor, weights: Tensor, rank: int, method: Method) -> tuple[Tensor, ...]:
    """U^T (..., rank, d_out), S (..., rank), V^T (..., rank, d_in) of Z, filled with zeros; tail (...)."""
    m, r, d_in = A.shape[-3:]
    lead = A.shape[:-3]
    svd = _svd_gram if method == "gram" else _svd_qr
    step = pieces_of(m * r * (d_in + Bt.shape[-1]), A.device)
    if lead.numel() <= step or torch.broadcast_shapes(weights.shape[:-1], lead) != lead:
        Ut, s, Vt = svd(_rows(A), _rows(Bt), _per_row(weights, A), rank)
    else:
        flat = A.flatten(0, -4), Bt.flatten(0, -4), weights.expand(*lead, m).flatten(0, -2)
        parts = [
            svd(_rows(a), _rows(b), _per_row(w, a), rank)
            for a, b, w in zip(*(x.split(step) for x in flat), strict=True)
        ]
        Ut, s, Vt = (torch.cat(x).unflatten(0, lead) for x in zip(*parts, strict=True))
    tail = torch.linalg.vector_norm(s[..., rank:], dim=-1)
    s = s[..., :rank]
    if s.shape[-1] < rank:
        Ut, s, Vt = _pad(Ut, -2, rank), _pad(s, -1, rank), _pad(Vt, -2, rank)
    largest = Ut.gather(-1, Ut.abs().argmax(-1, keepdim=True))
    sign = torch.ones_like(largest).copysign(largest)
    return Ut * sign, s, Vt * sign, tail


def _with_carried(
    A: Tensor, Bt: Tensor, weights: Tensor, carried: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A, B^T and weights with `carried` as more contributors of weight 1, of the same rank as the others."""
    if carried is None:
        return A, Bt, weights
    weights, r = weights.expand(*A.shape[:-2]), A.shape[-2]
    more = -(-carried[0].shape[-2] // r)
    a, bt = (_pad(x, -2, more * r).unflatten(-2, (more, r)) for x in (carried[0], carried[1].mT))
    return (
        torch.cat((A, a.to(A)), -3),
        torch.cat((Bt, bt.to(Bt)), -3),
        torch.cat((weights, weights.new_ones(*weights.shape[:-1], more)), -1),
    )


def _svd_qr(As: Tensor, Bs: Tensor, w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U^T (..., k, d_out), all of S, V^T (..., k, d_in) of Bs^T diag(w) As; k = min(rank, len S).

    As (..., R, d_in), Bs (..., R, d_out), w (..., R)
    """
    Qa, Ra = torch.linalg.qr(As.mT)
    Qb, Rb = torch.linalg.qr(Bs.mT)
    U, s, Vt = torch.linalg.svd(_finite((Rb * w.unsqueeze(-2)) @ Ra.mT), full_matrices=False)
    return U.mT[..., :rank, :] @ Qb.mT, s, Vt[..., :rank, :] @ Qa.mT


def _svd_gram(As: Tensor, Bs: Tensor, w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_svd_qr`, from the two Gram matrices."""
    G = torch.stack((As @ As.mT, Bs @ Bs.mT))
    # With rows of norm 1 a Gram matrix is as well conditioned as scaling makes it; the norms go to the core.
    norms = _finite(G.diagonal(dim1=-2, dim2=-1).sqrt())
    inverse = norms.clamp_min(1e-150).reciprocal().unsqueeze(-1)
    eigenvalues, E = eigen.eigh(G * inverse * inverse.mT)
    # Below this eigenvalues are rounding noise (measured: 2 R eps at d 4096, 15 at 200 000): rsqrt(inf) = 0.
    noise = 16 * E.shape[-1] * torch.finfo(E.dtype).eps
    rsqrt = torch.where(eigenvalues > noise, eigenvalues, math.inf).rsqrt()
    Ra, Rb = E * (eigenvalues * rsqrt).unsqueeze(-2)
    Wa, Wb = E * rsqrt.unsqueeze(-2) * inverse
    core = (Rb * (norms[0] * norms[1] * w).unsqueeze(-1)).mT @ Ra
    U, s, Vt = eigen.svd(_finite(core))
    return (U.mT[..., :rank, :] @ Wb.mT) @ Bs, s, (Vt[..., :rank, :] @ Wa.mT) @ As


def _norm(A: Tensor, Bt: Tensor) -> Tensor:
    """||B A||_F (...) by two thin QR factorizations; A (..., R, d_in), Bt (..., R, d_out)."""
    Ra, Rb = torch.linalg.qr(A.mT, mode="r").R, torch.linalg.qr(Bt.mT, mode="r").R
    return torch.linalg.matrix_norm(Rb @ Ra.mT)


def _polar(M: Tensor) -> Tensor:
    U, _, Vt = torch.linalg.svd(_finite(M))
    return U @ Vt


# --- the pieces of the gauges ---


def _average(X: Tensor, weights: Tensor, rank: int) -> Tensor:
    """The weighted average of X (..., m, r, d) over m, cut or zero-filled to (..., rank, d), in float64."""
    w = double(weights)
    total = w.sum(-1, keepdim=True)
    if bool((total == 0).any()):
        raise UserError("weights: they sum to 0, so the factors have no average to refer to; pass reference=.")
    # The average is only a frame to turn towards. float32 suffices and spares a float64 copy of all contributors.
    X = X[..., :rank, :].to(_result_dtype(X))
    mean = (w / total).to(X).unsqueeze(-2) @ X.flatten(-2)
    return _pad(double(mean.squeeze(-2).unflatten(-1, X.shape[-2:])), -2, rank)


def _scale(a_scale: float | Tensor | None, Aref: Tensor) -> Tensor:
    """The row norm c of A, as (..., 1)."""
    if a_scale is None:
        norms = torch.linalg.vector_norm(Aref, dim=-1)
        rms = torch.linalg.vector_norm(norms, dim=-1) / (norms > 0).sum(-1).clamp_min(1).sqrt()
        return torch.where(rms > 0, rms, FRESH_ROW_NORM).unsqueeze(-1)
    c = torch.as_tensor(a_scale).to(Aref).unsqueeze(-1)
    if not bool((c > 0).all()):
        raise UserError("a_scale: must be positive; it is the norm of a row of A.")
    return c


def _revive(Vt: Tensor, null: Tensor, Aref: Tensor) -> Tensor:
    """Vt (..., rank, d_in) with its null rows, a trailing run, replaced by unit rows orthogonal to the rest.

    They are the leading right singular vectors of what [Aref; delta I] has outside the live rows: a small
    delta puts the reference first, and `rank` coordinate axes always suffice for what it lacks.
    """
    rank, d_in = Vt.shape[-2:]
    live = Vt.masked_fill(null.unsqueeze(-1), 0)
    size = torch.linalg.matrix_norm(Aref)[..., None, None]
    axes = torch.eye(rank, d_in, dtype=Vt.dtype, device=Vt.device) * torch.where(size > 0, 1e-6 * size, 1.0)
    lead = live.shape[:-2]
    pool = torch.cat((Aref.expand(*lead, -1, -1), axes.expand(*lead, -1, -1)), -2)
    Q, R = torch.linalg.qr((pool - (pool @ live.mT) @ live).mT)
    spare = torch.linalg.svd(_finite(R)).U.mT[..., :rank, :] @ Q.mT
    # The first null row takes the first spare one, and so on.
    take = (null.cumsum(-1) - 1).clamp_min(0).unsqueeze(-1)
    return torch.where(null.unsqueeze(-1), spare.gather(-2, take.expand_as(spare)), Vt)


# --- shapes and dtypes ---


def _rows(x: Tensor) -> Tensor:
    """(..., m, r, d) -> (..., m r, d) in float64."""
    return double(x).flatten(-3, -2)


def _per_row(weights: Tensor, A: Tensor) -> Tensor:
    """(..., m) -> (..., m r) in float64."""
    w = double(weights).to(work_device(A.device))
    return w.unsqueeze(-1).expand(*w.shape, A.shape[-2]).flatten(-2)


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    if x.shape[dim] == size:
        return x
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim)


def _finite(x: Tensor) -> Tensor:
    # LAPACK may fail on anything else; a sum is finite only if all its terms are.
    if not math.isfinite(x.sum().item()):
        raise FloatingPointError("lowrank: non-finite factors (NaN, infinity, or too large for float64).")
    return x


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _check_factors(
    A: Tensor, B: Tensor, weights: Tensor | None = None, *, contributors: bool = False, names: str = "A, B"
) -> None:
    needed = 3 if contributors else 2
    m = "m, " if contributors else ""
    fits = A.dim() >= needed and A.shape[:-2] == B.shape[:-2] and A.shape[-2:-1] == B.shape[-1:]
    if not fits or 0 in A.shape[-needed:] or B.shape[-2] == 0:
        raise UserError(
            f"{names}: need the shapes (..., {m}r, d_in) and (..., {m}d_out, r), none of them 0, "
            f"got {tuple(A.shape)} and {tuple(B.shape)}."
        )
    if not (A.is_floating_point() and B.is_floating_point()):
        raise UserError(f"{names}: need floating-point factors, got {A.dtype} and {B.dtype}.")
    if weights is None:
        return
    lead, got = A.shape[:-3], weights.shape
    if got[-1:] != A.shape[-3:-2] or (got[:-1] != lead and not _broadcastable(got[:-1], lead)):
        raise UserError(
            f"weights: need the shape (..., {A.shape[-3]}), one weight a contributor, with leading axes that "
            f"broadcast with {tuple(lead)}; got {tuple(got)}."
        )


def _check_pairs(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> None:
    _check_factors(A1, B1, names="first A, B")
    _check_factors(A2, B2, names="second A, B")
    if A1.shape[-1] != A2.shape[-1] or B1.shape[-2] != B2.shape[-2]:
        raise UserError(
            f"A, B: the products have different shapes, ({B1.shape[-2]}, {A1.shape[-1]}) and "
            f"({B2.shape[-2]}, {A2.shape[-1]})."
        )
    if not _broadcastable(A1.shape[:-2], A2.shape[:-2]):
        raise UserError(f"A, B: the leading axes {tuple(A1.shape[:-2])} and {tuple(A2.shape[:-2])} do not broadcast.")


def _check_reference(Aref: Tensor, Bref: Tensor, rank: int, d_in: int, d_out: int, name: str = "reference") -> None:
    if Aref.shape[-2:] != (rank, d_in) or Bref.shape[-2:] != (d_out, rank):
        raise UserError(
            f"{name}: need the shapes (..., {rank}, {d_in}) and (..., {d_out}, {rank}), "
            f"got {tuple(Aref.shape)} and {tuple(Bref.shape)}."
        )


def _broadcastable(one: torch.Size, other: torch.Size) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(reversed(one), reversed(other), strict=False))
