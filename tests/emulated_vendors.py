"""aten's attention ops for CUDA, emulated on the CPU."""

import torch
import torch.nn.functional as F


class EmulatedOps:
    """aten's CUDA ops on the CPU, as their sources and their documentation have them: layouts, alignment, windows."""

    def __getattr__(self, name):
        return type(name, (), {"default": staticmethod(getattr(type(self), "op" + name))})

    @staticmethod
    def forward(q, k, v, scale, visible, bias=None):
        """o [B, H, S_q, D] and lse [B, H, S_q], 0 where a query sees no key, in fp32."""
        assert q.shape[-1] % 8 == 0
        q, k, v = q.float(), *(t.float().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = (scale * q @ k.mT + (0 if bias is None else bias)).masked_fill(~visible, -torch.inf)
        lse = scores.logsumexp(-1)
        return (scores - lse.unsqueeze(-1)).exp().nan_to_num(0) @ v, lse.masked_fill(lse == -torch.inf, 0)

    @staticmethod
    def backward(d_o, q, k, v, o, lse, scale, visible, bias=None):
        dtype, heads, kv_heads = q.dtype, q.shape[1], k.shape[1]
        d_o, q, k, v, o = (t.float() for t in (d_o, q, k, v, o))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = (scale * q @ k.mT + (0 if bias is None else bias)).masked_fill(~visible, -torch.inf)
        p = (scores - lse.unsqueeze(-1)).exp()
        ds = scale * p * (d_o @ v.mT - (d_o * o).sum(-1, keepdim=True))
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(2) for t in (ds.mT @ q, p.mT @ d_o))
        return [t.to(dtype) for t in (ds @ k, dk, dv)]

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
        assert bias is None or all(stride % 16 == 0 for stride in bias.stride()[:-1])
        o, lse = EmulatedOps.forward(q, k, v, scale, EmulatedOps.seen(q, k, causal), bias)
        seed = torch.zeros((), dtype=torch.long)
        return o.to(q.dtype), F.pad(lse, (0, -q.shape[2] % 32), value=torch.inf), seed, seed

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
        seed = torch.zeros(2, dtype=torch.long)
        return (o if cu_q is None else o[0]).to(q.dtype), lse, seed, seed, seed

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
