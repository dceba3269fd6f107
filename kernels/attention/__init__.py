"""gradroute's own attention kernels: forward with its log-sum-exp, and a backward without atomics.

Masks are folded in where gradients are loaded and stored; edges between routes are tests of bits. Memory grows with
the sequence. What has no weight is left out exactly: a tile of queries whose heads learn nothing, a tile of keys, and,
from lists made on the device, pairs of tiles without an edge.

Passes: forward; delta, dkdv and dq, which backward calls in this order. What they share: visibility (who sees whom),
documents (their bounds), loads (heads and their weights), edges, softmax, tiles (the lists), schedule (the order of
programs), configurations.
"""

from .backward import attention_backward
from .documents import document_bounds
from .forward import attention_forward, saved_with

__all__ = ["attention_backward", "attention_forward", "document_bounds", "saved_with"]
