"""Backends `cpu` and `cuda`: the primitives of the autograd.Functions, launched from the native module.

The tensors' device selects the backend. The module takes addresses, shapes and strides. Sums over tokens come in runs,
which are added in order: results do not depend on the number of threads.
"""

from .activation_forward import activation_forward
from .attention import (
    attention_backward,
    attention_forward,
    attention_output_grad,
    masked_heads,
)
from .embedding import embedding_backward
from .gated_mlp import glu_backward
from .launch import launch
from .linear import bias_grad, input_grad, weight_grad
from .loading import load_error, module, why_not, why_not_on
from .mlp import activation_backward
from .norm import norm_backward
from .optim import adamw_step, touched_blocks
from .route_grad import masked_product

__all__ = [
    "masked_product",
    "bias_grad",
    "input_grad",
    "weight_grad",
    "activation_forward",
    "activation_backward",
    "glu_backward",
    "norm_backward",
    "embedding_backward",
    "masked_heads",
    "attention_forward",
    "attention_output_grad",
    "attention_backward",
    "adamw_step",
    "touched_blocks",
    "launch",
    "load_error",
    "module",
    "why_not",
    "why_not_on",
]
