"""Attention over short sequences in a bfloat16 pass on a CPU: against float64, and where it stays as it is."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from decaf_lora.precision import SHORT, short_attention

plain = functional.scaled_dot_product_attention
CPU = torch.device("cpu")
HALF = (CPU, {torch.bfloat16})


class Backward(TorchDispatchMode):
    """Formats in which the backward pass of attention was computed."""

    def __init__(self):
        super().__init__()
        self.formats = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in str(func) and "backward" in str(func):
            self.formats.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def masked(kind, tokens):
    """What `scaled_dot_product_attention` is told of padding: the last two keys of the second sequence."""
    seen = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
    seen[1, ..., -2:] = False
    added = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, float("-inf"))
    return {
        "nothing": {},
        "causal": {"is_causal": True},
        "true or false": {"attn_mask": seen},
        "added": {"attn_mask": added},
        "scale": {"scale": 0.3},
        "fewer keys": {"enable_gqa": True},
    }[kind]


def draw(tokens, keys=4, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, tokens, 8), (2, keys, tokens, 8), (2, keys, tokens, 8)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def gradients(tensors, named, autocast=False):
    """The result of attention, and the gradients of a weighted sum of it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = functional.scaled_dot_product_attention(*tensors, **named)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, weights)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["nothing", "causal", "true or false", "added", "scale", "fewer keys"])
def test_a_short_attention_is_nearer_to_float64_and_bfloat16_outside(kind, autocast):
    tensors, named = draw(20, keys=2 if kind == "fewer keys" else 4), masked(kind, 20)
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in named.items()}
    truth = gradients([t.detach().double().requires_grad_() for t in tensors], exact)
    before = gradients(tensors, named, autocast)
    with short_attention(*HALF), Backward() as seen:
        ours = gradients(tensors, named, autocast)
    assert seen.formats == [torch.float32]
    for true, rounded, now in zip(truth, before, ours, strict=True):
        assert now.dtype == torch.bfloat16
        assert (now - true).norm() <= (rounded - true).norm()
        # Rounded once, at the end: half a unit in the last of bfloat16's 8 binary digits.
        torch.testing.assert_close(now.double(), true.double(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "dtype", "computed"),
    [(SHORT, torch.bfloat16, torch.float32), (SHORT + 1, torch.bfloat16, torch.bfloat16), (20, torch.float32, None)],
)
def test_long_and_float32_attention_keep_their_bits(tokens, dtype, computed):
    tensors = draw(tokens, dtype=dtype)
    before = gradients(tensors, {})
    with short_attention(*HALF), Backward() as seen:
        ours = gradients(tensors, {})
    assert seen.formats == [computed or dtype]
    assert all(map(torch.equal, ours, before)) == (computed != torch.float32)


@pytest.mark.parametrize(
    ("device", "formats", "replaced"),
    [
        (CPU, {torch.float32}, False),
        (CPU, {torch.float32, torch.bfloat16}, True),
        (torch.device("cuda"), {torch.bfloat16}, False),
        (torch.device("mps"), {torch.bfloat16}, False),
    ],
)
def test_only_cpus_and_bfloat16_need_it(device, formats, replaced):
    with short_attention(device, formats):
        assert (functional.scaled_dot_product_attention is not plain) == replaced
    assert functional.scaled_dot_product_attention is plain


def test_pytorch_has_its_function_back_when_the_last_pass_ends():
    """Passes of two threads overlap, and the first fails."""
    first, second = short_attention(*HALF), short_attention(*HALF)
    first.__enter__()
    second.__enter__()
    error = ValueError("in the pass")
    assert not first.__exit__(ValueError, error, None)
    assert functional.scaled_dot_product_attention is not plain
    second.__exit__(None, None, None)
    assert functional.scaled_dot_product_attention is plain


def test_attention_of_autocast_inputs_and_of_float64():
    """Autocast rounds float32 inputs, as of rotary embeddings, to bfloat16, and leaves float64 alone."""
    for dtype, computed in ((torch.float32, torch.float32), (torch.float64, torch.float64)):
        tensors = draw(20, dtype=dtype)
        with short_attention(*HALF), Backward() as seen:
            out, *_ = gradients(tensors, {}, autocast=True)
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
        assert seen.formats == [computed]
