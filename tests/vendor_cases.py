"""Calls of PyTorch's attention kernels: inputs, patterns, layouts, and what their results are compared with."""

import torch

from gradroute import AttentionSites, Routes, reference
from gradroute.backends.vendor import VENDORS
from gradroute.primitives.attention_pattern import Pattern
from gradroute.testing import Result, assert_result_within_budget

HEADS = 8
CPU = VENDORS["cpu_flash"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
TOP_LEFT = (
    "its causal mask is aligned at the top left, not at the bottom right, which differs where S_q ≠ S_k"
)


def pattern(**fields):
    return Pattern(**{"causal": True, "window": None, "scale": 0.3} | fields)


def inputs(queries=37, keys=None, kv_heads=2, head_dim=16, batch=2, dtype=torch.float32, device="cpu"):
    """q, k, v and d_o."""
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(queries + kv_heads)
    shapes = [(HEADS, queries), (kv_heads, keys), (kv_heads, keys), (HEADS, queries)]
    return [torch.randn(batch, *shape, head_dim, generator=generator).to(device, dtype) for shape in shapes]


def run(vendor, q, k, v, d_o, pattern):
    """The vendor's o, dq, dk, dv, and the log-sum-exp."""
    assert vendor.why_not(q, k, v, pattern) is None
    o, lse, *rest = vendor.forward(q, k, v, pattern)
    dq, dk, dv = vendor.backward(d_o, q, k, v, (o, lse, *rest), pattern)
    return Result(o, {"q": dq, "k": dk, "v": dv}), lse


def visible(q, k, pattern):
    return reference.visible_keys(
        q.shape[2], k.shape[2], q.device, pattern.causal, pattern.window, pattern.cu_seqlens, pattern.key_mask
    )


def exact(q, k, v, d_o, pattern):
    """The reference in float64, and the log-sum-exp."""
    leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (q, k, v)]
    routes = Routes.of(
        torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32, device=q.device), 1, validate=False
    )
    o = reference.routed_attention(
        *leaves,
        routes,
        AttentionSites(),
        pattern.causal,
        pattern.window,
        pattern.scale,
        pattern.cu_seqlens,
        pattern.key_mask,
    )
    gradients = torch.autograd.grad(o, leaves, d_o.double())
    q, k, _ = (leaf.detach() for leaf in leaves)
    scores = pattern.scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    lse = scores.masked_fill(~visible(q, k, pattern), -torch.inf).logsumexp(-1)
    return Result(o.detach(), dict(zip("qkv", gradients, strict=True))), lse


def plain(q, k, v, d_o, pattern):
    """Eager PyTorch at the inputs' dtype."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    keys, values = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in leaves[1:])
    seen = visible(q, k, pattern)
    scores = (leaves[0] @ keys.mT * pattern.scale).masked_fill(~seen, torch.finfo(q.dtype).min)
    o = (scores.softmax(-1) * seen.any(-1, keepdim=True)) @ values
    return Result(o.detach(), dict(zip("qkv", torch.autograd.grad(o, leaves, d_o), strict=True)))


def assert_within_budget(vendor, tensors, pattern, name):
    (actual, lse), (expected, exact_lse) = run(vendor, *tensors, pattern), exact(*tensors, pattern)
    assert_result_within_budget(actual, expected, plain(*tensors, pattern), name)
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    assert lse.dtype == wide
    sees = exact_lse > -torch.inf
    # Sums of at most 300 exponentials of scores that are sums of at most 256 products.
    torch.testing.assert_close(lse[sees].double(), exact_lse[sees], rtol=0, atol=1e3 * torch.finfo(wide).eps)
    assert not lse[~sees].any()


def same_bits(actual, expected):
    return torch.equal(actual.output, expected.output) and all(
        torch.equal(gradient, expected.gradients[name]) for name, gradient in actual.gradients.items()
    )


def sliced(t, before, after):
    wide = t.new_full((*t.shape[:-1], before + t.shape[-1] + after), torch.nan)
    return wide.narrow(-1, before, t.shape[-1]).copy_(t)


def strided(t):
    wide = t.new_full((*t.shape, 2), torch.nan)
    return wide.select(-1, 0).copy_(t)


LAYOUTS = {
    "contiguous": lambda t: t,
    "sliced": lambda t: sliced(t, 0, 3),
    "shifted": lambda t: sliced(t, 1, 7),
    "strided": strided,
    "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "features first": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t.select(1, 0).unsqueeze(1).expand_as(t),
}


def empty(queries=128, keys=None, kv_heads=2, head_dim=64, batch=2, dtype=torch.bfloat16, device="cuda"):
    keys = queries if keys is None else keys
    shapes = [(HEADS, queries), (kv_heads, keys), (kv_heads, keys), (HEADS, queries)]
    return [torch.empty(batch, *shape, head_dim, dtype=dtype, device=device) for shape in shapes]


def bytes_of_its_own(name, q):
    """How many bytes a vendor's kernel saves for its backward beside q, k, v, o and the log-sum-exp.

    Args:
        name: the kernel's name in VENDORS, or None.
        q: `[B, H, S, D]`.
    """
    rows = q.shape[0] * q.shape[1]
    padded = -(-q.shape[2] // 32) * 32
    return {
        None: 0,
        "cpu_flash": 0,
        "efficient": 4 * rows * padded
        + 2 * 8,  # the log-sum-exp again, as the kernel padded it; seed and offset
        "flash": 2 * 8 + 8,  # the generator's state, and a number that is not used
        "cudnn": 4 * rows * q.shape[2] + 2 * 8,  # the log-sum-exp again, in another shape; seed and offset
    }[name]
