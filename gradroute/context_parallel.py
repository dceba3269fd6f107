"""torch's context parallelism, in which attention with routes would see a rank's part of the sequence alone."""

from __future__ import annotations

import sys
from typing import Any

from .tracing import constant_when_traced

_TORCHS = "torch.distributed.tensor.experimental._context_parallel._attention"


def refuse_context_parallel() -> None:
    """Raises where torch's context parallelism is on: it shards torch's own attention, and no other.

    Raises:
        RuntimeError: it is.
    """
    if _is_on():
        raise RuntimeError(
            "routed_attention: got a call under torch's context_parallel, whose ranks hold parts of the sequence, of "
            "which gradroute's attention would see this rank's alone; expected a plan of whose AttentionSites only "
            "updates are given (update, update_q, update_kv, update_out), so that the model keeps torch's attention, "
            "or whole sequences on every rank"
        )


@constant_when_traced
def _is_on() -> bool:
    """Whether torch has put its ring attention in the place of its attention kernels, for DTensors."""
    theirs: Any = sys.modules.get(_TORCHS)  # imported by whoever uses it
    if theirs is None:
        return False
    on: Any = getattr(theirs, "custom_ops", {})
    handlers: Any = theirs.DTensor._op_dispatcher._custom_op_handlers
    return bool(on) and all(handlers.get(op) is handler for op, handler in on.items())
