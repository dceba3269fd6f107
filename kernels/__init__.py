"""Backend `triton`: the leaf computations of the autograd.Functions as Triton kernels with their launchers."""

from .attention import attention_backward, attention_forward
from .embedding import embedding_backward
from .gated_mlp import glu_backward
from .launch import INTERPRETED, record, recording
from .linear import bias_grad, input_grad, weight_grad
from .mlp import activation_backward
from .norm import layer_norm_backward, rms_norm_backward
from .optim import adamw_step
from .route_grad import masked_product, masked_product_

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
    "layer_norm_backward",
    "masked_product",
    "masked_product_",
    "record",
    "recording",
    "rms_norm_backward",
    "weight_grad",
]
