"""The contract of a vendor's kernel: each module of this package that has one satisfies `VendorKernel`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...primitives.attention_pattern import Pattern

Gradients = tuple[Tensor, Tensor, Tensor]
Saved = tuple[Tensor, ...]


class VendorKernel(Protocol):
    """An attention kernel that PyTorch brings. q `[B, H, S_q, D]`; k, v `[B, G, S_k, D]`; any strides."""

    def why_not(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
        """Why it cannot run the call's forward and backward; None when it can."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Saved:
        """Runs attention.

        Returns:
            o `[B, H, S_q, D]`; lse `[B, H, S_q]`, the natural log-sum-exp of the scores in fp32 (fp64 for fp64), which
            is 0 where a query sees no key; then whatever else backward needs.
        """

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, pattern: Pattern
    ) -> Gradients:
        """The gradients of q, k and v, in their shapes, which the caller may write to.

        Args:
            d_o: `[B, H, S_q, D]`, masked already, in any layout.
            q: as forward had it, like k and v.
            k: see q.
            v: see q.
            saved: everything that forward returned.
            pattern: as forward had it.
        """
