"""The state of the process and the machine that a choice of kernel depends on, and traced code cannot read itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.attention

from ...tracing import constant_when_traced

_SWITCHES = {
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
}

# PyTorch 2.11 brought implementations of flash attention that can be activated in place of FlashAttention 2.
activated_flash: Callable[[], str | None] = getattr(
    torch.nn.attention, "current_flash_attention_impl", lambda: None
)


@constant_when_traced
def switched_on(switch: str) -> bool:
    """Whether the user lets a kernel of this name run."""
    return _SWITCHES[switch]()


@constant_when_traced
def determinism_only_warns() -> bool:
    """Whether deterministic algorithms, where they are asked for, are asked for with warn_only."""
    return torch.is_deterministic_algorithms_warn_only_enabled()


@constant_when_traced
def capability(index: int | None) -> tuple[int, int] | None:
    """The GPU's compute capability; None where none is visible, as when tracing for another machine."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@constant_when_traced
def cudnn_version() -> int | None:
    """The version of cuDNN, 0 without one; None where no GPU is visible."""
    return (torch.backends.cudnn.version() or 0) if torch.cuda.is_available() else None


@constant_when_traced
def flash_is_missing() -> bool:
    """Whether there is a GPU, and this build of PyTorch has no FlashAttention for it."""
    return torch.cuda.is_available() and not torch.backends.cuda.is_flash_attention_available()
