"""What a checkpoint can do: held-out losses, generations, differences from another one, tasks of lm-evaluation-harness.

All of it runs routed models without routes, and returns plain figures that JSON takes.
"""

from .comparison import differences, token_differences
from .generation import generations
from .held_out import DocumentLosses, document_losses, losses, token_losses
from .lm_eval_tasks import harness, harness_unavailable
from .weights import weight_differences

__all__ = [
    "losses",
    "document_losses",
    "DocumentLosses",
    "token_losses",
    "generations",
    "token_differences",
    "differences",
    "weight_differences",
    "harness",
    "harness_unavailable",
]
