"""Backend `triton`: the leaf computations of the autograd.Functions as Triton kernels with their launchers."""

from .launch import INTERPRETED, record, recording
from .linear import bias_grad, input_grad, weight_grad
from .route_grad import masked_product, masked_product_

__all__ = [
    "INTERPRETED",
    "bias_grad",
    "input_grad",
    "masked_product",
    "masked_product_",
    "record",
    "recording",
    "weight_grad",
]
