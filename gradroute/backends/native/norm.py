"""The backward of RMS norm and layer norm: dx, and the masked gradients of weight and bias, in one pass."""

from __future__ import annotations

from torch import Tensor

from ...primitives.arguments import NORM_SCHEMA, NormArguments, tokens_of, wanted, weights_on
from ...primitives.registration import kernel_op
from ...routes import Routes
from ...tables import Table
from .launch import launch, new_like, new_sums, summed
from .operands import Mask, NormOperands


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    routes: Routes,
    update: Table | None,
    norm: NormArguments,
    *,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    masks = (*tokens_of(routes), *weights_on(x.device, update))
    dx, dweight, dbias = norm_backward_op(dy, x, weight, *masks, *norm, want_weight, want_bias)
    return wanted((dx, weight is not None), (dweight, want_weight), (dbias, want_bias))


@kernel_op(
    "native_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor ids, Tensor? strength, Tensor? update, "
    f"{NORM_SCHEMA}, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)"
)
def norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    strength: Tensor | None,
    update: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
    round_x_hat: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    dx = new_like(x, weight is not None)
    weight_sums, bias_sums = new_sums(x) if want_weight else None, new_sums(x) if want_bias else None
    launch(
        "norm_backward",
        NormOperands(
            dy,
            x,
            weight,
            dx if weight is not None else None,
            weight_sums,
            bias_sums,
            Mask.of(ids, strength, update),
            eps,
            offset,
            centered,
            round_x_hat,
        ),
    )
    return dx, summed(weight_sums, x), summed(bias_sums, x)
