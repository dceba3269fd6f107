"""One step of one parameter: by a dozen operations of torch, or by the primitive `adamw_step`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..primitives.arguments import AdamWOptions
from ..primitives.protocol import Primitives
from .arithmetic import (
    INTEGERS,
    average_touched,
    bits,
    factor_dtype,
    flat,
    power,
    quotient,
    split,
    where_touched,
    write_touched,
)
from .options import fused_backend
from .state import MOMENTS


class Update(NamedTuple):
    """The update of one parameter by a step. All tensors are this rank's parts.

    Attributes:
        group: the parameter's options.
        parameter: θ.
        gradient: g.
        state: the moments, and the counts of steps, which include this step.
        touched: u, one bool for every block.
    """

    group: Mapping[str, Any]
    parameter: Tensor
    gradient: Tensor
    state: Mapping[str, Tensor]
    touched: Tensor

    @property
    def changed(self) -> list[Tensor]:
        """The tensors that the step writes: the parameter and its moments."""
        names = MOMENTS[: 3 if self.group["amsgrad"] else 2]
        return [self.parameter, *(self.state[name] for name in names)]

    def is_fused(self) -> bool:
        """Whether a kernel takes the step. Warns where the group asks for it and kernels do not take the tensors."""
        if not self.group["fused"]:
            return False
        reason = self._why_not_fused()
        if reason is not None and not torch.compiler.is_compiling():
            warnings.warn(
                f"RoutedAdamW(fused=True): a parameter of shape {list(self.parameter.shape)} is updated by a dozen "
                f"operations instead of one kernel: {reason}",
                RuntimeWarning,
                stacklevel=5,
            )
        return reason is None

    def _why_not_fused(self) -> str | None:
        """The reason why no kernel can take the step, in words; None: a kernel can."""
        dtypes = {tensor.dtype for tensor in (self.gradient, *self.changed)}
        if len(dtypes) > 1:
            return f"it, its gradient and its moments are of {', '.join(sorted(map(str, dtypes)))}"
        if self.parameter.dim() > 2 and not all(tensor.is_contiguous() for tensor in self.changed):
            return "its elements, or those of its moments, do not lie in order; make it contiguous"
        return None

    def apply_fused(self, primitives: Primitives, factors: Tensor, options: AdamWOptions) -> None:
        """Moves the touched blocks by one kernel; `factors [4, blocks]` are those of the primitive `adamw_step`."""
        parameter = self.parameter
        if parameter.numel() == 0:
            return
        dims, block_dim = parameter.dim(), self.group["block_dim"]
        gradient = self.gradient if dims <= 2 else self.gradient.contiguous()
        if dims > 2 and block_dim == 1:  # each block is several columns of the matrix
            factors = factors.repeat_interleave(parameter[0, 0].numel(), dim=1)
        theta, *moments, g = (
            tensor if dims == 2 else tensor.view(len(tensor) if dims > 2 else 1, -1)  # [N, M]
            for tensor in (*self.changed, gradient)
        )
        largest = moments[2] if self.group["amsgrad"] else None
        by_column = block_dim == (1 if dims >= 2 else 0)
        primitives.adamw_step(theta, g, moments[0], moments[1], largest, factors, by_column, options)

    def apply(self, factors: Factors) -> None:
        """Moves the touched blocks, by the operations of torch's loop over tensors, which round at the same places."""
        group, state, parameter = self.group, self.state, self.parameter
        gradient = -self.gradient if group["maximize"] else self.gradient
        beta1, beta2 = group["betas"]
        if group["weight_decay"] != 0:
            parameter.mul_(factors.decay)
        spent = average_touched(state["exp_avg"], gradient, 1 - beta1, factors.mask)
        # Blocks that are not touched are multiplied by 1, and 0 is added. That keeps every bit: v is never -0.
        second = state["exp_avg_sq"].mul_(factors.second).addcmul_(gradient, gradient, value=1 - beta2)
        if group["amsgrad"]:
            write_touched(
                torch.maximum(state["max_exp_avg_sq"], second), state["max_exp_avg_sq"], factors.mask
            )
            second = state["max_exp_avg_sq"]
        # Dynamo does not know an `out` that is not contiguous.
        root = second.sqrt() if torch.compiler.is_compiling() else torch.sqrt(second, out=spent)
        denominator = root.div_(factors.root).add_(group["eps"])
        change = torch.mul(state["exp_avg"], factors.size).div_(denominator)
        bits(change).bitwise_and_(factors.change_mask)
        parameter.sub_(change)


class Corrections(NamedTuple):
    """Factors of the blocks of all parameters with one group, device and dtype, one after the other: `[blocks]`.

    They are computed for all of these parameters at once: one by one, these twenty small operations were a third of the
    time that a step of 39 tiny parameters took on the CPU.

    Attributes:
        touched: whether the block is touched, bool.
        decay: 1 - lr λ; 1 for blocks that are not touched.
        size: lr / (1 - β₁^t).
        root: √(1 - β₂^t).
    """

    touched: Tensor
    decay: Tensor
    size: Tensor
    root: Tensor

    @classmethod
    def of(cls, updates: Sequence[Update]) -> Corrections:
        """The factors of parameters with one group, device and dtype."""
        group = updates[0].group
        dtype = factor_dtype(updates[0].parameter)
        touched = flat([update.touched for update in updates])
        counts = flat([update.state["step"] for update in updates]).double()
        exact = dtype == torch.float64
        first, second = (1 - power(beta, counts, exact) for beta in group["betas"])
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        return cls(
            touched,
            where_touched(touched, 1 - lr * group["weight_decay"], dtype),
            quotient(lr, first).to(dtype),
            power(second, torch.full_like(second, 0.5), exact).to(dtype),
        )


class Factors(NamedTuple):
    """The factors of one parameter's blocks, each of a shape that broadcasts against the parameter.

    Attributes:
        decay: the parameter's part of `Corrections.decay`.
        second: β₂; 1 for blocks that are not touched.
        size: the parameter's part of `Corrections.size`.
        root: the parameter's part of `Corrections.root`.
        mask: all bits for touched blocks and none for others, as wide as the parameter's elements.
        change_mask: the same mask, as wide as a product with `size`.
    """

    decay: Tensor
    second: Tensor
    size: Tensor
    root: Tensor
    mask: Tensor
    change_mask: Tensor

    @classmethod
    def of(cls, updates: Sequence[Update], corrections: Corrections) -> Iterator[Factors]:
        """The factors of parameters with one group, device and dtype."""
        group, parameter = updates[0].group, updates[0].parameter
        touched, decay, size, root = corrections
        masks = (touched.to(INTEGERS[width]).neg_() for width in (parameter.itemsize, decay.itemsize))
        of_all = [decay, where_touched(touched, group["betas"][1], decay.dtype), size, root, *masks]
        # A factor without dimensions would take the dtype of the other operand.
        like = [
            update.touched if update.touched.dim() else update.touched.view([1] * update.parameter.dim())
            for update in updates
        ]
        of_each = (split(values, like) for values in of_all)
        return (cls(*factors) for factors in zip(*of_each, strict=True))


def apply_fused(updates: Sequence[Update], corrections: Corrections) -> None:
    """Takes the steps of parameters with one group, device and dtype, each by one kernel."""
    group, parameter = updates[0].group, updates[0].parameter
    primitives = backends.primitives(fused_backend(parameter.device, parameter.dtype))
    beta1, beta2 = group["betas"]
    options = AdamWOptions(beta1, beta2, group["eps"], group["maximize"])
    touched, decay, size, root = corrections
    factors = torch.stack([decay, size, root.reciprocal(), touched.to(decay.dtype)])  # [4, blocks]
    of_each = factors.split([update.touched.numel() for update in updates], dim=1)
    for update, its_factors in zip(updates, of_each, strict=True):
        update.apply_fused(primitives, its_factors, options)
