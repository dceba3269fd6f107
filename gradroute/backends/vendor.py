"""The attention kernels that PyTorch brings, called below autograd: for their log-sum-exp, and with a masked d_o.

What the CUDA kernels can do was read in PyTorch's sources of 2026: sdp_utils.cpp, attention.cu, attention_backward.cu
and flash_attn/flash_api.cpp in aten/src/ATen/native/transformers/cuda, MHA.cpp in aten/src/ATen/native/cudnn, and
torch/nn/attention/_fa3.py and _fa4.py; what the CPU's can do was found by experiment. Where a kernel depends on a
version that Python cannot see, or is known to be wrong in some versions, the call is refused.

The user's switches (`torch.nn.attention.sdpa_kernel`, deterministic algorithms) and the GPU are read at every call, and
under torch.compile when a function is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from ..primitives.attention_pattern import Pattern

aten = torch.ops.aten

Gradients = tuple[Tensor, Tensor, Tensor]
Saved = tuple[Tensor, ...]


class Vendor(NamedTuple):
    """An attention kernel that PyTorch brings. q `[B, H, S_q, D]`; k, v `[B, G, S_k, D]`; any strides.

    Attributes:
        why_not: (q, k, v, pattern) → why it cannot run the call's forward and backward; None when it can.
        forward: (q, k, v, pattern) → o `[B, H, S_q, D]`, lse `[B, H, S_q]` (natural logarithm, in fp32, fp64 for fp64;
            0 where a query sees no key), then what else backward needs.
        backward: (d_o, q, k, v, what forward returned, pattern) → dq, dk, dv, which the caller may write to.
    """

    why_not: Callable[[Tensor, Tensor, Tensor, Pattern], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, Pattern], Saved]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Saved, Pattern], Gradients]


def choose(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[str | None, str]:
    """The name of the vendor kernel that runs a call fastest, or None, and the reason.

    The reason says why the device's kernels are tried in their order, and why each that was tried before was rejected.
    """
    names, why = _preference(q)
    reasons = [why]
    for name in names:
        reason = VENDORS[name].why_not(q, k, v, pattern)
        if reason is None:
            return name, "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons[1:])


def _preference(q: Tensor) -> tuple[tuple[str, ...], str]:
    """The kernels of q's device, fastest first, and why in this order; by others' measurements so far."""
    if q.device.type in ("cpu", "meta"):
        return ("cpu_flash",), "cpu_flash is the CPU's only vendor kernel"
    if not q.is_cuda:
        return tuple(VENDORS), f"no vendor kernel is known on {q.device}"
    flash_first = ("flash", "cudnn", "efficient")
    active, capability = _activated_flash(), _capability(q.device.index)
    if active is not None:
        return flash_first, f"{active} was activated in place of FlashAttention 2"
    if capability is not None and capability[0] in (9, 10):  # where PyTorch, too, prefers it
        why = f"on compute capability {capability[0]}.{capability[1]} cuDNN's backward is 1.7 to 2.3 times as fast as "
        return ("cudnn", "flash", "efficient"), why + "FlashAttention 2's"
    return flash_first, "off Hopper and Blackwell FlashAttention 2 is preferred, as PyTorch prefers it"


# --------------------------------------------------------------------------------------------------------------------
# State of the process and the machine, which traced code cannot read itself.

Read = TypeVar("Read", bound=Callable[..., Any])


def _constant_when_traced(read: Read) -> Read:
    """As torch.compiler.assume_constant_result, which would import the compiler (and Triton) for its mark alone."""
    read._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return read


_SWITCHES = {
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
}

# PyTorch 2.11 brought implementations that can be activated.
_activated_flash: Callable[[], str | None] = getattr(
    torch.nn.attention, "current_flash_attention_impl", lambda: None
)


@_constant_when_traced
def _switched_on(switch: str) -> bool:
    return _SWITCHES[switch]()


@_constant_when_traced
def _determinism_only_warns() -> bool:
    return torch.is_deterministic_algorithms_warn_only_enabled()


@_constant_when_traced
def _capability(index: int | None) -> tuple[int, int] | None:
    """The GPU's compute capability; None where none is visible, as when tracing for another machine."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@_constant_when_traced
def _cudnn_version() -> int | None:
    """The version of cuDNN, 0 without one; None where no GPU is visible."""
    return (torch.backends.cudnn.version() or 0) if torch.cuda.is_available() else None


@_constant_when_traced
def _flash_is_missing() -> bool:
    return torch.cuda.is_available() and not torch.backends.cuda.is_flash_attention_available()


# --------------------------------------------------------------------------------------------------------------------
# Reasons for a refusal that several kernels share. None names a number of queries, keys or sequences: traced code would
# be specialised to it.


def _why_not_inputs(
    q: Tensor, k: Tensor, v: Tensor, devices: tuple[str, ...], dtypes: tuple[torch.dtype, ...]
) -> str | None:
    if q.device.type not in devices:
        return f"it takes tensors on {devices[0]}; these are on {q.device}"
    if q.dtype not in dtypes or k.dtype != q.dtype or v.dtype != q.dtype:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        return f"it takes q, k and v of one dtype out of {expected}; got {q.dtype}, {k.dtype} and {v.dtype}"
    if q.numel() == 0 or k.numel() == 0:  # the CPU's divides by 0
        return f"it takes no empty tensors; got q {list(q.shape)} and k {list(k.shape)}"
    return None


def _why_not_features(
    pattern: Pattern,
    *,
    window: bool = False,
    cu_seqlens: bool = False,
    key_mask: bool = False,
    dropout: bool = False,
) -> str | None:
    """Which of the features that the call asks for the kernel lacks; True: the kernel has it."""
    if pattern.window is not None and not window:
        return "it has no window"
    if pattern.cu_seqlens is not None and not cu_seqlens:
        return "it takes no cu_seqlens"
    if pattern.key_mask is not None and not key_mask:
        return "it takes no key_mask"
    if pattern.dropout != 0.0 and not dropout:
        return "it has no dropout that can be relied on"
    return None


def _why_not_aligned_top_left(q: Tensor, k: Tensor, pattern: Pattern) -> str | None:
    if pattern.causal and q.shape[2] != 1 and q.shape[2] != k.shape[2]:
        return "its causal mask is aligned at the top left, not at the bottom right, which differs where S_q ≠ S_k"
    return None


def _why_not_switched_on(switch: str) -> str | None:
    if _switched_on(switch):
        return None
    return f"it is switched off (torch.nn.attention.sdpa_kernel or torch.backends.cuda.enable_{switch}_sdp)"


def _why_not_on_gpu(q: Tensor, lowest: tuple[int, int]) -> str | None:
    if torch.version.hip is not None:
        return "on ROCm it is another kernel, with other rules"
    capability = _capability(q.device.index)
    if capability is not None and capability < lowest:
        return f"it needs compute capability {lowest[0]}.{lowest[1]}; {q.device} has {capability[0]}.{capability[1]}"
    if q.shape[0] > 65535 or q.shape[1] > 65535:
        return "a grid of CUDA has room for 65535 sequences and 65535 heads"
    return None


def _why_not_deterministic_on_request() -> str | None:
    """For kernels that are deterministic when deterministic algorithms are demanded, and only then."""
    if torch.are_deterministic_algorithms_enabled() and _determinism_only_warns():
        return "its backward is deterministic only under torch.use_deterministic_algorithms(True, warn_only=False)"
    return None


# --------------------------------------------------------------------------------------------------------------------
# Inputs as the kernels read them.


def _is_causal(q: Tensor, pattern: Pattern) -> bool:
    """For masks aligned at the top left: aligned at the bottom right, a single query sees every key."""
    return pattern.causal and q.shape[2] != 1


def _key_bias(pattern: Pattern, dtype: torch.dtype) -> Tensor | None:
    """`[B, 1, 1, S_k]`, 0 for keys and -inf for padding, in q's dtype: others may be read as if they were q's.

    Both kernels that take it give 0, with lse 0 and gradients 0, to a query that sees no key; were padding finite, such
    a query would attend to it. Rows begin at multiples of 16 elements, for 16-byte loads.
    """
    if pattern.key_mask is None:
        return None
    batch, keys = pattern.key_mask.shape
    rows = torch.zeros(batch, keys + -keys % 16, dtype=dtype, device=pattern.key_mask.device)
    return (
        rows.narrow(1, 0, keys)
        .masked_fill_(pattern.key_mask.logical_not(), -torch.inf)
        .view(batch, 1, 1, keys)
    )


def _dense_rows(t: Tensor) -> Tensor:
    """t with the last dimension dense: kernels for the CPU do not look at its stride."""
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def _readable(t: Tensor) -> Tensor:
    """t `[B, H, S, D]` as CUDA kernels read it, 16 bytes at a time.

    D is padded with zeros, which change no score and no value; rows begin at multiples of 16 bytes and do not overlap.
    PyTorch checks the last stride only. Traced code cannot see where a tensor begins: it is taken to be aligned.
    """
    step = 16 // t.element_size()
    if t.shape[-1] % step:
        return F.pad(t, (0, -t.shape[-1] % step))
    rows = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    is_readable = (
        t.stride(-1) == 1
        and all(extent == 1 or (stride > 0 and stride % step == 0) for extent, stride in rows)
        and (torch.compiler.is_compiling() or t.storage_offset() % step == 0)
    )
    return t if is_readable else t.clone(memory_format=torch.contiguous_format)


def _repeated(t: Tensor, group: int) -> Tensor:
    """`[B, G, S, D]` → `[B, H, S, D]`, each key and value head for all query heads of its group."""
    return t.repeat_interleave(group, 1) if group > 1 else t


def _summed(gradient: Tensor, group: int) -> Tensor:
    """`[B, H, S, D]` → `[B, G, S, D]`: summed in fp32 over each group, and rounded once."""
    return gradient.unflatten(1, (-1, group)).sum(2) if group > 1 else gradient


def _unpadded(t: Tensor, head_dim: int) -> Tensor:
    return t if t.shape[-1] == head_dim else t.narrow(-1, 0, head_dim)


# --------------------------------------------------------------------------------------------------------------------
# cpu_flash. Found by experiment with 2.13: a causal mask aligned at the top left, also together with a mask of keys,
# which broadcasts; grouped heads; all strides of q, k and v but the last, any of d_o. The same bits for
# the same number of threads; on Intel's CPUs, where its products are MKL's, other bits for another number.

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _cpu_flash_why_not(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
    return (
        _why_not_inputs(q, k, v, ("cpu", "meta"), _CPU_DTYPES)
        or _why_not_switched_on("flash")
        or _why_not_features(pattern, key_mask=True)
        or _why_not_aligned_top_left(q, k, pattern)
    )


def _cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Saved:
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
        _dense_rows(q),
        _dense_rows(k),
        _dense_rows(v),
        0.0,
        _is_causal(q, pattern),
        attn_mask=_key_bias(pattern, q.dtype),
        scale=pattern.scale,
    )
    return o, lse


def _cpu_flash_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, pattern: Pattern
) -> Gradients:
    o, lse = saved
    # With grouped heads the kernel rounds dk and dv to the dtype after every head and block of queries. In bf16 and
    # fp16 a head of its own for every query head halves that error (dv at S = 700, H = 8, G = 1: 2.4e-2 → 7.7e-3 of
    # its largest value) for 2 to 6 % more time; in fp32 it would bring nothing.
    group = q.shape[1] // k.shape[1] if q.dtype.itemsize == 2 else 1
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        d_o,
        _dense_rows(q),
        _dense_rows(_repeated(k, group)),
        _dense_rows(_repeated(v, group)),
        o,
        lse,
        0.0,
        _is_causal(q, pattern),
        attn_mask=_key_bias(pattern, q.dtype),
        scale=pattern.scale,
    )
    return dq, _summed(dk, group), _summed(dv, group)


# --------------------------------------------------------------------------------------------------------------------
# cudnn. Grouped heads natively; the causal mask is aligned at the top left. D = 256 is left to flash: whether cuDNN has
# it depends on the version of its frontend that PyTorch was built with.

_HALVES = (torch.float16, torch.bfloat16)


def _cudnn_why_not(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
    return (
        _why_not_inputs(q, k, v, ("cuda",), _HALVES)
        or _why_not_on_gpu(q, (8, 0))
        or _why_not_switched_on("cudnn")
        # key_mask: rows of padding alone give NaN before cuDNN 9.25. Dropout: in sixteenths, broken from 9.11 to 9.13.
        or _why_not_features(pattern)
        or _why_not_aligned_top_left(q, k, pattern)
        or _cudnn_why_not_shape(q, k)
        or _cudnn_why_not_version()
    )


def _cudnn_why_not_shape(q: Tensor, k: Tensor) -> str | None:
    if q.shape[3] > 128:
        return f"its backward is certain for head dimensions up to 128; got {q.shape[3]}"
    # pytorch#193893: a single query is silently wrong on Blackwell; pytorch#138529: it is refused by cuDNN's frontend.
    if q.shape[2] == 1 or k.shape[2] == 1:
        return f"single queries and keys are wrong in some of its versions; got {q.shape[2]} and {k.shape[2]}"
    return None


def _cudnn_why_not_version() -> str | None:
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic, and deterministic algorithms are asked for"
    version = _cudnn_version()
    if version is not None and version <= 91500:  # pytorch#169849: lengths that 128 does not divide
        return f"before version 9.15.1 it is wrong for some lengths; got version number {version}"
    return None


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Saved:
    o, stats, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention.default(
        _readable(q),
        _readable(k),
        _readable(v),
        None,  # attn_bias
        True,  # compute_log_sumexp
        0.0,
        _is_causal(q, pattern),
        scale=pattern.scale,
    )
    # Backward takes the log-sum-exp as it was returned: [B, H, S_q, 1], in some versions [B, H, S_q].
    return _unpadded(o, q.shape[3]), stats.view(q.shape[:3]), stats, seed, offset


def _cudnn_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, pattern: Pattern
) -> Gradients:
    o, _, stats, seed, offset = saved
    o, d_o = _readable(o), _readable(d_o)
    # PyTorch finds the graph that cuDNN compiled by the strides of q, k and v, but in older versions not by those of
    # d_o, and would run it on a layout that it was not made for. With o's strides there is one layout.
    if d_o.stride() != o.stride():
        d_o = torch.empty_like(o).copy_(d_o)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward.default(
        d_o,
        _readable(q),
        _readable(k),
        _readable(v),
        o,
        stats,
        seed,
        offset,
        None,  # attn_bias
        None,  # cum_seq_q
        None,  # cum_seq_k
        q.shape[2],
        k.shape[2],
        0.0,
        _is_causal(q, pattern),
        scale=pattern.scale,
    )
    return _unpadded(dq, q.shape[3]), _unpadded(dk, q.shape[3]), _unpadded(dv, q.shape[3])


# --------------------------------------------------------------------------------------------------------------------
# flash: FlashAttention 2, or what the user activated in its place (torch.nn.attention.activate_flash_attention_impl),
# which overrides the same ops. Grouped heads natively; masks are aligned at the bottom right; a window counts the keys
# on either side of a query's own; documents are packed as [T, H, D].

# What can be activated: the longest head dimension and the compute capabilities (major) that are certain. Beyond 128
# FA4's backward depends on its version and the chip.
_ACTIVATED = {"FA3": (256, (9,)), "FA4": (128, (9, 10))}


def _flash_why_not(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
    return (
        _why_not_inputs(q, k, v, ("cuda",), _HALVES)
        or _why_not_on_gpu(q, (8, 0))
        or _why_not_switched_on("flash")
        or _why_not_features(pattern, window=True, cu_seqlens=True, dropout=True)
        or _flash_why_not_mask(q, k, pattern)
        or _flash_why_not_active(q, pattern)
    )


def _flash_why_not_mask(q: Tensor, k: Tensor, pattern: Pattern) -> str | None:
    if q.shape[2] > k.shape[2] and (pattern.causal or pattern.window is not None):
        return "with S_q > S_k the first queries see no key, and not every version gives them 0"
    if pattern.cu_seqlens is not None and q.shape[2] != k.shape[2]:
        return "cu_seqlens are those of the queries and of the keys, and S_q ≠ S_k"
    return None


def _flash_why_not_active(q: Tensor, pattern: Pattern) -> str | None:
    active, head_dim = _activated_flash(), q.shape[3]
    if active is None:
        return _flash2_why_not(q, pattern)
    if pattern.dropout != 0.0:
        return f"the activated {active} has no dropout"
    # flash-attention#1596: FA3 ignored the flag; flash-attention#2244: with it, gradients still differed.
    if torch.are_deterministic_algorithms_enabled():
        return f"the backward of the activated {active} is not deterministic in all of its versions"
    if active not in _ACTIVATED:
        return f"the activated {active} is not known"
    longest, capabilities = _ACTIVATED[active]
    if head_dim > longest:
        return f"the activated {active} is certain for head dimensions up to {longest}; got {head_dim}"
    capability = _capability(q.device.index)
    if capability is not None and capability[0] not in capabilities:
        return f"the activated {active} does not run on compute capability {capability[0]}.{capability[1]}"
    return None


def _flash2_why_not(q: Tensor, pattern: Pattern) -> str | None:
    if _flash_is_missing():
        return "this build of PyTorch has no FlashAttention"
    head_dim = q.shape[3]
    if head_dim > 256:
        return f"it has head dimensions up to 256; got {head_dim}"
    capability = _capability(q.device.index)
    is_small = capability is not None and (capability[0] == 12 or (8, 6) <= capability <= (8, 9))
    if is_small and head_dim > 192 and (head_dim <= 224 or pattern.dropout != 0.0):
        return f"its backward needs more shared memory than {q.device} has for head dimension {head_dim}"
    return _why_not_deterministic_on_request()


def _flash_layout(t: Tensor, pattern: Pattern) -> Tensor:
    """`[B, H, S, D]` → `[B, S, H, D]`, with documents, which come in a batch of one, `[T, H, D]`."""
    t = _readable(t).transpose(1, 2)
    return t if pattern.cu_seqlens is None else t.squeeze(0)


def _from_flash_layout(t: Tensor, pattern: Pattern, head_dim: int) -> Tensor:
    t = t if pattern.cu_seqlens is None else t.unsqueeze(0)
    return _unpadded(t.transpose(1, 2), head_dim)


def _flash_window(pattern: Pattern) -> tuple[int | None, int | None]:
    """How many keys before and after its own a query sees."""
    if pattern.window is None:
        return None, None
    return pattern.window - 1, 0 if pattern.causal else pattern.window - 1


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Saved:
    left, right = _flash_window(pattern)
    o, lse, seed, offset, _ = aten._flash_attention_forward.default(
        _flash_layout(q, pattern),
        _flash_layout(k, pattern),
        _flash_layout(v, pattern),
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
    return _from_flash_layout(o, pattern, q.shape[3]), lse.view(q.shape[:3]), seed, offset


def _flash_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, pattern: Pattern
) -> Gradients:
    o, lse, seed, offset = saved
    left, right = _flash_window(pattern)
    dq, dk, dv = aten._flash_attention_backward.default(
        _flash_layout(d_o, pattern),
        _flash_layout(q, pattern),
        _flash_layout(k, pattern),
        _flash_layout(v, pattern),
        _flash_layout(o, pattern),
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
        _from_flash_layout(dq, pattern, q.shape[3]),
        _from_flash_layout(dk, pattern, q.shape[3]),
        _from_flash_layout(dv, pattern, q.shape[3]),
    )


# --------------------------------------------------------------------------------------------------------------------
# efficient: fp32 too. Takes a head of its own for every query head; the causal mask is aligned at the top left, also
# together with a mask of keys, which must be expanded. Asked for determinism it does not split the keys of a head.


def _efficient_why_not(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
    return (
        _why_not_inputs(q, k, v, ("cuda",), (*_HALVES, torch.float32))
        or _why_not_on_gpu(q, (8, 0))
        or _why_not_switched_on("mem_efficient")
        or _why_not_features(pattern, key_mask=True, dropout=True)
        or _why_not_aligned_top_left(q, k, pattern)
        or _why_not_deterministic_on_request()
    )


def _efficient_bias(q: Tensor, k: Tensor, pattern: Pattern) -> Tensor | None:
    """`[B, H, S_q, S_k]`, of strides 0 along H and S_q."""
    bias = _key_bias(pattern, q.dtype)
    return None if bias is None else bias.expand(-1, q.shape[1], q.shape[2], k.shape[2])


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Saved:
    group = q.shape[1] // k.shape[1]
    o, stats, seed, offset = aten._scaled_dot_product_efficient_attention.default(
        _readable(q),
        _readable(_repeated(k, group)),
        _readable(_repeated(v, group)),
        _efficient_bias(q, k, pattern),
        True,  # compute_log_sumexp
        pattern.dropout,
        _is_causal(q, pattern),
        scale=pattern.scale,
    )
    # Backward takes the log-sum-exp as it was returned: [B, H, S_q rounded up to a multiple of 32].
    return _unpadded(o, q.shape[3]), stats.narrow(-1, 0, q.shape[2]), stats, seed, offset


def _efficient_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, pattern: Pattern
) -> Gradients:
    o, _, stats, seed, offset = saved
    group = q.shape[1] // k.shape[1]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward.default(
        _readable(d_o),
        _readable(q),
        _readable(_repeated(k, group)),
        _readable(_repeated(v, group)),
        _efficient_bias(q, k, pattern),
        _readable(o),
        stats,
        seed,
        offset,
        pattern.dropout,
        [True, True, True, False],  # none for the bias
        _is_causal(q, pattern),
        scale=pattern.scale,
    )
    return (
        _unpadded(dq, q.shape[3]),
        _unpadded(_summed(dk, group), q.shape[3]),
        _unpadded(_summed(dv, group), q.shape[3]),
    )


#: The kernels by name: for CUDA, and the last for the CPU.
VENDORS: dict[str, Vendor] = {
    "cudnn": Vendor(_cudnn_why_not, _cudnn_forward, _cudnn_backward),
    "flash": Vendor(_flash_why_not, _flash_forward, _flash_backward),
    "efficient": Vendor(_efficient_why_not, _efficient_forward, _efficient_backward),
    "cpu_flash": Vendor(_cpu_flash_why_not, _cpu_flash_forward, _cpu_flash_backward),
}
