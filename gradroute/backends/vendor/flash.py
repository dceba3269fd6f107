"""FlashAttention 2, or what the user activated in its place (torch.nn.attention.activate_flash_attention_impl).

Whatever is activated overrides the same ops. Grouped heads natively; masks are aligned at the bottom right; a window
counts the keys on either side of a query's own; documents are packed as `[T, H, D]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...primitives.attention_pattern import Pattern
from . import machine
from .contract import Gradients, Saved
from .layout import readable, unpadded
from .refusals import (
    HALVES,
    why_not_deterministic_on_request,
    why_not_features,
    why_not_inputs,
    why_not_on_gpu,
    why_not_switched_on,
)

aten = torch.ops.aten

# For each implementation that can be activated, the longest head dimension and the compute capabilities (major) that
# are certain. Beyond 128 FA4's backward depends on its version and the chip.
ACTIVATED = {"FA3": (256, (9,)), "FA4": (128, (9, 10))}


def why_not(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
    """See `VendorKernel`."""
    return (
        why_not_inputs(q, k, v, ("cuda",), HALVES)
        or why_not_on_gpu(q, (8, 0))
        or why_not_switched_on("flash")
        or why_not_features(pattern, window=True, cu_seqlens=True, dropout=True)
        or _why_not_mask(q, k, pattern)
        or _why_not_active(q, pattern)
    )


def _why_not_mask(q: Tensor, k: Tensor, pattern: Pattern) -> str | None:
    if q.shape[2] > k.shape[2] and (pattern.causal or pattern.window is not None):
        return "with S_q > S_k the first queries see no key, and not every version gives them 0"
    if pattern.cu_seqlens is not None and q.shape[2] != k.shape[2]:
        return "cu_seqlens are those of the queries and of the keys, and S_q ≠ S_k"
    return None


def _why_not_active(q: Tensor, pattern: Pattern) -> str | None:
    active, head_dim = machine.activated_flash(), q.shape[3]
    if active is None:
        return _why_not_version_2(q, pattern)
    if pattern.dropout != 0.0:
        return f"the activated {active} has no dropout"
    # flash-attention#1596: FA3 ignored the flag; flash-attention#2244: with it, gradients still differed.
    if torch.are_deterministic_algorithms_enabled():
        return f"the backward of the activated {active} is not deterministic in all of its versions"
    if active not in ACTIVATED:
        return f"the activated {active} is not known"
    longest, capabilities = ACTIVATED[active]
    if head_dim > longest:
        return f"the activated {active} is certain for head dimensions up to {longest}; got {head_dim}"
    capability = machine.capability(q.device.index)
    if capability is not None and capability[0] not in capabilities:
        return f"the activated {active} does not run on compute capability {capability[0]}.{capability[1]}"
    return None


def _why_not_version_2(q: Tensor, pattern: Pattern) -> str | None:
    if machine.flash_is_missing():
        return "this build of PyTorch has no FlashAttention"
    head_dim = q.shape[3]
    if head_dim > 256:
        return f"it has head dimensions up to 256; got {head_dim}"
    capability = machine.capability(q.device.index)
    is_small = capability is not None and (capability[0] == 12 or (8, 6) <= capability <= (8, 9))
    if is_small and head_dim > 192 and (head_dim <= 224 or pattern.dropout != 0.0):
        return f"its backward needs more shared memory than {q.device} has for head dimension {head_dim}"
    return why_not_deterministic_on_request()


def _tokens_first(t: Tensor, pattern: Pattern) -> Tensor:
    """`[B, H, S, D]` → `[B, S, H, D]`, with documents, which come in a batch of one, `[T, H, D]`."""
    t = readable(t).transpose(1, 2)
    return t if pattern.cu_seqlens is None else t.squeeze(0)


def _heads_first(t: Tensor, pattern: Pattern, head_dim: int) -> Tensor:
    """The inverse of `_tokens_first`."""
    t = t if pattern.cu_seqlens is None else t.unsqueeze(0)
    return unpadded(t.transpose(1, 2), head_dim)


def _window(pattern: Pattern) -> tuple[int | None, int | None]:
    """How many keys before and after its own a query sees."""
    if pattern.window is None:
        return None, None
    return pattern.window - 1, 0 if pattern.causal else pattern.window - 1


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Saved:
    """See `VendorKernel`."""
    left, right = _window(pattern)
    o, lse, seed, offset, _ = aten._flash_attention_forward.default(
        _tokens_first(q, pattern),
        _tokens_first(k, pattern),
        _tokens_first(v, pattern),
        pattern.cu_seqlens,
        pattern.cu_seqlens,
        q.shape[2],  # as long as the longest document or longer: its length is on the device
        k.shape[2],
        pattern.dropout,
        pattern.causal,
        False,  # return_debug_mask
        scale=pattern.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return _heads_first(o, pattern, q.shape[3]), lse.view(q.shape[:3]), seed, offset


def backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, pattern: Pattern) -> Gradients:
    """See `VendorKernel`."""
    o, lse, seed, offset = saved
    left, right = _window(pattern)
    dq, dk, dv = aten._flash_attention_backward.default(
        _tokens_first(d_o, pattern),
        _tokens_first(q, pattern),
        _tokens_first(k, pattern),
        _tokens_first(v, pattern),
        _tokens_first(o, pattern),
        lse if pattern.cu_seqlens is None else lse.squeeze(0),
        pattern.cu_seqlens,
        pattern.cu_seqlens,
        q.shape[2],
        k.shape[2],
        pattern.dropout,
        pattern.causal,
        seed,
        offset,
        scale=pattern.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return (
        _heads_first(dq, pattern, q.shape[3]),
        _heads_first(dk, pattern, q.shape[3]),
        _heads_first(dv, pattern, q.shape[3]),
    )
