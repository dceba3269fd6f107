"""aten's attention ops for CUDA, emulated on the CPU."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from gradroute.backends import vendor
from gradroute.backends.vendor import machine, refusals

CUDA_KERNELS = ("cudnn", "flash", "efficient")


def use_on_the_cpu(monkeypatch, capability=(9, 0), cudnn=91900):
    """Calls on tensors of the CPU are planned as on a GPU, and run by emulated ops.

    Args:
        monkeypatch: pytest's.
        capability: the GPU's compute capability.
        cudnn: the number of cuDNN's version.
    """
    monkeypatch.setattr(machine, "capability", lambda index: capability)
    monkeypatch.setattr(machine, "cudnn_version", lambda: cudnn)
    with FakeTensorMode():
        preference = vendor.preference(torch.empty(1, device="cuda"))
    monkeypatch.setattr(vendor, "preference", lambda q: preference)
    replace_ops(monkeypatch, EmulatedOps())
    for name in CUDA_KERNELS:
        monkeypatch.setattr(vendor.VENDORS[name], "why_not_inputs", _why_not_inputs)


def replace_ops(monkeypatch, ops):
    """The vendors' kernels for CUDA find `ops` in the place of torch.ops.aten."""
    for name in CUDA_KERNELS:
        monkeypatch.setattr(vendor.VENDORS[name], "aten", ops)


def _why_not_inputs(q, k, v, devices, dtypes):
    return refusals.why_not_inputs(q, k, v, (*devices, "cpu", "meta"), dtypes)


def product_of(dtype):
    """The product of matrices that a vendor's kernel makes of operands of a dtype, with sums in fp32."""
    return product_of_3xtf32 if dtype == torch.float32 else torch.matmul


def product_of_3xtf32(a, b):
    """a @ b of fp32 matrices as CUTLASS makes it on tensor cores: three products of TF32, the smallest left out."""
    (big_a, small_a), (big_b, small_b) = in_two_parts(a), in_two_parts(b)
    return small_a @ big_b + big_a @ small_b + big_a @ big_b


def in_two_parts(x):
    """x in TF32, whose mantissa has 10 bits: rounded toward zero, and what that leaves, rounded to nearest."""
    lost = 13  # bits of fp32's mantissa
    x = x.resolve_neg()
    big = (x.contiguous().view(torch.int32) >> lost << lost).view(torch.float32)
    rest = (x - big).view(torch.int32) + (1 << lost - 1)
    return big, (rest >> lost << lost).view(torch.float32)


class EmulatedOps:
    """aten's CUDA ops on the CPU, as their sources and their documentation have them: layouts, alignment, windows."""

    def __init__(self):
        for name, function in vars(EmulatedOps).items():
            if name.startswith("op_"):
                setattr(self, name.removeprefix("op"), SimpleNamespace(default=function.__func__))

    @staticmethod
    def forward(q, k, v, scale, visible, bias=None):
        """o [B, H, S_q, D] and lse [B, H, S_q], 0 where a query sees no key, in fp32."""
        assert q.shape[-1] * q.element_size() % 16 == 0
        product = product_of(q.dtype)
        q, k, v = q.float(), *(t.float().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = (product(scale * q, k.mT) + (0 if bias is None else bias)).masked_fill(~visible, -torch.inf)
        lse = scores.logsumexp(-1)
        p = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0)
        return product(p, v), lse.masked_fill(lse == -torch.inf, 0)

    @staticmethod
    def backward(d_o, q, k, v, o, lse, scale, visible, bias=None):
        dtype, heads, kv_heads = q.dtype, q.shape[1], k.shape[1]
        product = product_of(dtype)
        d_o, q, k, v, o = (t.float() for t in (d_o, q, k, v, o))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = (product(scale * q, k.mT) + (0 if bias is None else bias)).masked_fill(~visible, -torch.inf)
        p = (scores - lse.unsqueeze(-1)).exp()
        ds = scale * p * (product(d_o, v.mT) - (d_o * o).sum(-1, keepdim=True))
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(2) for t in (product(ds.mT, q), product(p.mT, d_o)))
        return [t.to(dtype) for t in (product(ds, k), dk, dv)]

    @staticmethod
    def seen(q, k, causal, aligned=0, left=None, right=None):
        """Keys from `left` before to `right` after a query's own, which lies `aligned` after its number."""
        far = torch.arange(q.shape[2])[:, None] + aligned - torch.arange(k.shape[2])
        seen = far >= 0 if causal else torch.ones_like(far, dtype=torch.bool)
        seen = seen if left is None else seen & (far <= left)
        return seen if right is None else seen & (-far <= right)

    @staticmethod
    def op_scaled_dot_product_cudnn_attention(q, k, v, bias, with_lse, dropout, causal, *, scale):
        assert with_lse
        assert bias is None
        o, lse = EmulatedOps.forward(q, k, v, scale, EmulatedOps.seen(q, k, causal))
        seed = torch.zeros((), dtype=torch.long)
        return o.to(q.dtype), lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], seed, seed, None

    @staticmethod
    def op_scaled_dot_product_cudnn_attention_backward(d_o, q, k, v, o, lse, *rest, scale):
        *_, queries, keys, dropout, causal = rest
        assert (lse.dim(), queries, keys, dropout) == (4, q.shape[2], k.shape[2], 0)
        return EmulatedOps.backward(d_o, q, k, v, o, lse.squeeze(-1), scale, EmulatedOps.seen(q, k, causal))

    @staticmethod
    def op_scaled_dot_product_efficient_attention(q, k, v, bias, with_lse, dropout, causal, *, scale):
        assert with_lse
        assert q.shape[1] == k.shape[1] == v.shape[1]
        assert bias is None or bias.dtype == q.dtype
        rows = [] if bias is None else zip(bias.shape[:-1], bias.stride()[:-1], strict=True)
        assert all(extent == 1 or stride % 16 == 0 for extent, stride in rows)
        o, lse = EmulatedOps.forward(q, k, v, scale, EmulatedOps.seen(q, k, causal), bias)
        seed, offset = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
        return o.to(q.dtype), F.pad(lse, (0, -q.shape[2] % 32), value=torch.inf), seed, offset

    @staticmethod
    def op_scaled_dot_product_efficient_attention_backward(d_o, q, k, v, bias, o, lse, *rest, scale):
        _, _, dropout, wanted, causal = rest
        assert (lse.shape[-1] % 32, dropout, wanted) == (0, 0, [True, True, True, False])
        assert q.shape[1] == k.shape[1] == v.shape[1]
        lse, seen = lse[..., : q.shape[2]], EmulatedOps.seen(q, k, causal)
        return *EmulatedOps.backward(d_o, q, k, v, o, lse, scale, seen, bias), None

    @staticmethod
    def flash(tensors, cu_seqlens, longest, causal, left, right):
        """The tensors heads first, and which keys a query sees."""
        tensors = [(t if cu_seqlens is None else t.unsqueeze(0)).transpose(1, 2) for t in tensors]
        q, k = tensors[:2]
        assert longest == (q.shape[2], k.shape[2])
        seen = EmulatedOps.seen(q, k, causal, k.shape[2] - q.shape[2], left, right)
        if cu_seqlens is not None:
            document = torch.searchsorted(cu_seqlens[1:], torch.arange(q.shape[2]), right=True)
            seen = seen & (document[:, None] == document)
        return tensors, seen

    @staticmethod
    def op_flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, **window
    ):
        left, right = window["window_size_left"], window["window_size_right"]
        tensors, seen = EmulatedOps.flash([q, k, v], cu_q, (max_q, max_k), causal, left, right)
        o, lse = EmulatedOps.forward(*tensors, scale, seen)
        o, lse = o.transpose(1, 2), lse if cu_q is None else lse[0]
        seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
        return (o if cu_q is None else o[0]).to(q.dtype), lse, seed, unused, unused

    @staticmethod
    def op_flash_attention_backward(d_o, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, *rest, scale, **window):
        dropout, causal, _, _ = rest
        assert dropout == 0
        left, right = window["window_size_left"], window["window_size_right"]
        tensors, seen = EmulatedOps.flash([q, k, v, d_o, o], cu_q, (max_q, max_k), causal, left, right)
        q, k, v, d_o, o = tensors
        assert lse.dim() == (3 if cu_q is None else 2)
        gradients = EmulatedOps.backward(d_o, q, k, v, o, lse, scale, seen)
        return [t.transpose(1, 2) if cu_q is None else t.transpose(1, 2)[0] for t in gradients]
