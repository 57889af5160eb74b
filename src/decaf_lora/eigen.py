"""How are many small matrices decomposed at once, where the library takes one after the other?

cuSOLVER decomposes a batch in one call up to n = 32; above that PyTorch calls it once a matrix. Measured on an H100 in
float64, 600 matrices: `eigh` takes 0.7 ms at n = 32 and 282 ms at n = 33 (here 19), `svd` 1.9 and 719 (20). So larger
ones are brought down to 32 by a block Jacobi method. Of the blocks of 16 rows, every two are diagonalized together,

    G <- Q^T G Q,    V <- V Q,    Q: eigenvectors of the 32 x 32 matrix that the rows and columns of both cut out,

all disjoint pairs in one call and every pair once in a sweep (round robin), until nothing is left beside the diagonal.
A step takes away what its pairs have beside the diagonal and adds nothing elsewhere, so the rest shrinks, quadratically
at the end (Golub and Van Loan, Matrix Computations, section 8.5). On other devices the library does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {"cuda": 32}
"""Type of a device -> the largest n of which its library takes a batch in one call; even."""
SWEEPS = 30
"""At most; four to seven are usual."""


def eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) of positive semi-definite matrices G (..., n, n).

    The error is that of `torch.linalg.eigh`, a few n eps ||G||.
    """
    return _in_blocks(G) if _too_large(G) else torch.linalg.eigh(G)


def svd(C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., n, n), S (..., n), V^T (..., n, n) of square matrices C (..., n, n), descending.

    Large n on a GPU: C^T C = V L V^T, S = |C V|, U = C V / S, and columns of U are 0 where S is. Then V is orthogonal
    to eps, and S right to sqrt(eps) = 1.5e-8 of the largest, within what the "gram" form of `lowrank` promises.
    """
    if not _too_large(C):
        return torch.linalg.svd(C)
    scale = C.abs().amax((-2, -1), keepdim=True)
    scaled = C / torch.where(scale > 0, scale, 1)
    V = eigh(scaled.mT @ scaled)[1].flip(-1)
    W = scaled @ V
    S = torch.linalg.vector_norm(W, dim=-2, keepdim=True)
    U = torch.where(S > 0, W / S, 0)
    return U, (S * scale).squeeze(-2), V.mT


def _too_large(X: Tensor) -> bool:
    """Whether the library would take the matrices of X one after the other."""
    return X.shape[-1] > LARGEST.get(X.device.type, X.shape[-1])


def _in_blocks(G: Tensor) -> tuple[Tensor, Tensor]:
    """`eigh` by pairs of blocks, of which two are as large as the library takes them."""
    n, lead, block = G.shape[-1], G.shape[:-2], LARGEST[G.device.type] // 2
    pairs = -(-n // (2 * block))
    size = 2 * block * pairs
    scale = G.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    scale = torch.where(scale > 0, scale, 1)
    # What fills up the last block has the eigenvalue -1, so that it mixes with no other, not with zeros either.
    M = torch.diag_embed(G.new_full((*lead, size), -1.0))
    M[..., :n, :n] = G / scale
    Vt = torch.eye(size, dtype=G.dtype, device=G.device).expand(*lead, size, size)
    rounds = [order.to(G.device) for order in _rounds(2 * pairs, block)]
    M, Vt = M[..., rounds[-1], :][..., rounds[-1]], Vt[..., rounds[-1], :]
    moves = [rounds[place - 1].argsort()[order] for place, order in enumerate(rounds)]
    for _ in range(SWEEPS):
        beside = (M - torch.diag_embed(M.diagonal(dim1=-2, dim2=-1))).abs().amax()
        if float(beside) <= n * torch.finfo(M.dtype).eps:
            break
        for move in moves:
            M, Vt = M[..., move, :][..., move], Vt[..., move, :]
            cut = M.unflatten(-2, (pairs, -1)).unflatten(-1, (pairs, -1)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
            # The larger eigenvalues go to the block that stands first, so that columns find a place and keep it.
            Qt = torch.linalg.eigh(cut)[1].flip(-1).mT
            M, Vt = _rows(Qt, _rows(Qt, M).mT), _rows(Qt, Vt)
    else:
        return torch.linalg.eigh(G)
    values, order = M.diagonal(dim1=-2, dim2=-1).sort(descending=True)
    order = order[..., :n].flip(-1)
    V = Vt.gather(-2, order.unsqueeze(-1).expand(*order.shape, size)).mT[..., :n, :]
    return values[..., :n].flip(-1) * scale.squeeze(-1), V


def _rows(Qt: Tensor, X: Tensor) -> Tensor:
    """Every matrix of Qt (..., k, p, p) times its rows of X (..., k p, m)."""
    return (Qt @ X.unflatten(-2, Qt.shape[-3:-1])).flatten(-3, -2)


def _rounds(blocks: int, block: int) -> list[Tensor]:
    """Orders of all rows, one a round, in which the blocks that meet stand side by side; every two meet once."""
    found, circle = [], list(range(1, blocks))
    for _ in range(blocks - 1):
        around = [0, *circle]
        met = [sorted((around[k], around[-1 - k])) for k in range(blocks // 2)]
        found.append(torch.tensor([b * block + i for pair in met for b in pair for i in range(block)]))
        circle = [circle[-1], *circle[:-1]]
    return found
