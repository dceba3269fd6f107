"""Reasons for a refusal that several kernels share.

Only the refusal of empty tensors names a number of queries, keys or sequences: traced code would be specialised to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...primitives.attention_pattern import Pattern
from . import machine

HALVES = (torch.float16, torch.bfloat16)

# CUDA's limit on a grid's second and third dimension.
MAX_GRID = 65535


def why_not_inputs(
    q: Tensor, k: Tensor, v: Tensor, devices: tuple[str, ...], dtypes: tuple[torch.dtype, ...]
) -> str | None:
    """Refuses other devices (the first one is named), other dtypes, and empty tensors."""
    if q.device.type not in devices:
        return f"it takes tensors on {devices[0]}; these are on {q.device}"
    if q.dtype not in dtypes or k.dtype != q.dtype or v.dtype != q.dtype:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        return f"it takes q, k and v of one dtype out of {expected}; got {q.dtype}, {k.dtype} and {v.dtype}"
    if q.numel() == 0 or k.numel() == 0:  # the CPU's kernel divides by 0
        return f"it takes no empty tensors; got q {list(q.shape)} and k {list(k.shape)}"
    return None


def why_not_features(
    pattern: Pattern,
    *,
    window: bool = False,
    cu_seqlens: bool = False,
    key_mask: bool = False,
    dropout: bool = False,
) -> str | None:
    """Refuses a pattern that asks for a feature which the kernel lacks; True: the kernel has it."""
    if pattern.window is not None and not window:
        return "it has no window"
    if pattern.cu_seqlens is not None and not cu_seqlens:
        return "it takes no cu_seqlens"
    if pattern.key_mask is not None and not key_mask:
        return "it takes no key_mask"
    if pattern.dropout != 0.0 and not dropout:
        return "it has no dropout that can be relied on"
    return None


def why_not_aligned_top_left(q: Tensor, k: Tensor, pattern: Pattern) -> str | None:
    """Refuses a causal call whose meaning depends on where the mask is aligned."""
    if pattern.causal and q.shape[2] != 1 and q.shape[2] != k.shape[2]:
        return "its causal mask is aligned at the top left, not at the bottom right, which differs where S_q ≠ S_k"
    return None


def why_not_switched_on(switch: str) -> str | None:
    """Honours the user's switches."""
    if machine.switched_on(switch):
        return None
    return f"it is switched off (torch.nn.attention.sdpa_kernel or torch.backends.cuda.enable_{switch}_sdp)"


def why_not_on_gpu(q: Tensor, lowest: tuple[int, int]) -> str | None:
    """Refuses ROCm, compute capabilities below `lowest`, and calls too large for a grid."""
    if torch.version.hip is not None:
        return "on ROCm it is another kernel, with other rules"
    capability = machine.capability(q.device.index)
    if capability is not None and capability < lowest:
        return f"it needs compute capability {lowest[0]}.{lowest[1]}; {q.device} has {capability[0]}.{capability[1]}"
    if q.shape[0] > MAX_GRID or q.shape[1] > MAX_GRID:
        return f"a grid of CUDA has room for {MAX_GRID} sequences and {MAX_GRID} heads"
    return None


def why_not_deterministic_on_request() -> str | None:
    """For kernels that are deterministic when deterministic algorithms are demanded, and only then."""
    if torch.are_deterministic_algorithms_enabled() and machine.determinism_only_warns():
        return "its backward is deterministic only under torch.use_deterministic_algorithms(True, warn_only=False)"
    return None
