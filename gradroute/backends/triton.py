"""Backend `triton`: the primitives as Triton kernels with their launchers."""

from ..kernels.attention import attention_backward, attention_forward
from ..kernels.embedding import embedding_backward
from ..kernels.gated_mlp import glu_backward
from ..kernels.launch import INTERPRETED, record, recording
from ..kernels.linear import bias_grad, input_grad, weight_grad
from ..kernels.mlp import activation_backward
from ..kernels.norm import norm_backward
from ..kernels.optim import adamw_step
from ..kernels.route_grad import masked_product

__all__ = [
    "INTERPRETED",
    "activation_backward",
    "adamw_step",
    "attention_backward",
    "attention_forward",
    "bias_grad",
    "embedding_backward",
    "glu_backward",
    "input_grad",
    "masked_product",
    "norm_backward",
    "record",
    "recording",
    "weight_grad",
]
