"""Which kernels run a call of attention, as the primitives of attention take it."""

from __future__ import annotations

from typing import Literal, NamedTuple

#: Whose kernels run the backward: the vendor's whose forward ran, FlashAttention-4's, the backend's own, or tiles of
#: torch's products.
BackwardKernels = Literal["vendor", "fa4", "own", "tiles"]


class AttentionKernels(NamedTuple):
    """The kernels that run a call of attention.

    Attributes:
        forward: the vendor's kernel that runs the forward, by its name in `gradroute.backends.vendor.VENDORS`; None:
            the backend's own, which on backends torch and cpu are tiles of torch's products.
        backward: whose kernels run the backward.
    """

    forward: str | None
    backward: BackwardKernels
