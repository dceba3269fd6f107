"""The attention kernels that PyTorch brings, called below autograd: for their log-sum-exp, and with a masked d_o.

Each has a module here, which satisfies `VendorKernel`. What the CUDA kernels can do was read in PyTorch's sources of
2026: sdp_utils.cpp, attention.cu, attention_backward.cu and flash_attn/flash_api.cpp in
aten/src/ATen/native/transformers/cuda, MHA.cpp in aten/src/ATen/native/cudnn, and torch/nn/attention/_fa3.py and
_fa4.py; what the CPU's can do was found by experiment. Where a kernel depends on a version that Python cannot see, or
is known to be wrong in some versions, the call is refused.

The user's switches (`torch.nn.attention.sdpa_kernel`, deterministic algorithms) and the GPU are read at every call, and
under torch.compile when a function is traced.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...machine import answers
from ...primitives.attention_pattern import Pattern
from . import cpu_flash, cudnn, efficient, flash, machine
from .contract import VendorKernel

#: The kernels by name: three for CUDA, and the last for the CPU.
VENDORS: dict[str, VendorKernel] = {
    "cudnn": cudnn,
    "flash": flash,
    "efficient": efficient,
    "cpu_flash": cpu_flash,
}


def choose(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[str | None, str]:
    """The name of the vendor kernel that runs a call fastest, or None, and the reason.

    The reason says why the device's kernels are tried in their order, and why each that was tried before was rejected.
    """
    names, why = preference(q)
    reasons = [why]
    for name in names:
        reason = VENDORS[name].why_not(q, k, v, pattern)
        if reason is None:
            return name, "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons[1:])


def preference(q: Tensor) -> tuple[tuple[str, ...], str]:
    """The kernels of q's device, fastest first, and why in this order: measured here, else by others' measurements."""
    if q.device.type in ("cpu", "meta"):
        return ("cpu_flash",), "cpu_flash is the CPU's only vendor kernel"
    if not q.is_cuda:
        return tuple(VENDORS), f"no vendor kernel is known on {q.device}"
    flash_first = ("flash", "cudnn", "efficient")
    active, capability = machine.activated_flash(), machine.capability(q.device.index)
    if active is not None:
        return flash_first, f"{active} was activated in place of FlashAttention 2"
    measured = answers.vendors(q.device, q.dtype)
    if measured is not None:
        others = tuple(name for name in VENDORS if name not in measured and name != "cpu_flash")
        why = "the vendors' kernels are tried in the order of their speed measured here"
        return (*measured, *others), why
    if capability is not None and capability[0] in (9, 10):  # where PyTorch, too, prefers it
        why = f"on compute capability {capability[0]}.{capability[1]} cuDNN's backward is 1.7 to 2.3 times as fast as "
        return ("cudnn", "flash", "efficient"), why + "FlashAttention 2's"
    return flash_first, "off Hopper and Blackwell FlashAttention 2 is preferred, as PyTorch prefers it"


def _read_vendors(what: answers.What, value: Any) -> tuple[str, ...]:
    answers.check_what(what, answers.DTYPES)
    return answers.order(value, VENDORS)


answers.read_by("vendors", _read_vendors)
