"""A step of parameters: by a dozen operations of torch each, or all by one call of the primitive `adamw_step`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..fake_tensors import has_data
from ..primitives.arguments import AdamWOptions
from .arithmetic import (
    INTEGERS,
    adjacent,
    average_touched,
    bias_corrections,
    bits,
    factor_dtype,
    flat,
    split,
    where_touched,
    write_touched,
)
from .matrices import Division, as_matrices
from .quantised import Quantised
from .state import block_shape


class Update(NamedTuple):
    """The update of one parameter by a step. All tensors are this rank's parts.

    Attributes:
        group: the parameter's options.
        parameter: θ.
        gradient: g.
        division: how θ, g and the moments, which are of one shape, are divided into blocks.
        steps: t for every block, which counts this step from `Corrections.of` on.
        moments: m, v and with amsgrad the largest v.
        touched: u, one bool for every block: `[blocks]`.
        state: the parameter's state, as the optimizer holds it.
        quantised: the same moments where they are stored in one byte an element. `moments` is then empty, until
            `with_moments` makes copies.
    """

    group: Mapping[str, Any]
    parameter: Tensor
    gradient: Tensor
    division: Division
    steps: Tensor
    moments: Sequence[Tensor]
    touched: Tensor
    state: MutableMapping[str, Any]
    quantised: Sequence[Quantised] = ()

    def moment_dtype(self) -> torch.dtype:
        """The dtype of the moments that the step computes with."""
        return torch.float32 if self.quantised else self.moments[0].dtype

    def with_moments(self) -> Update:
        """The update with copies of quantised moments in fp32."""
        if not self.quantised:
            return self
        return self._replace(moments=[stored.values() for stored in self.quantised])

    def store_moments(self) -> None:
        """Quantises the copies that `with_moments` made, where blocks are touched."""
        if self.quantised:
            touched = self.touched.view(block_shape(self.parameter.shape, self.group["block_dim"]))
            for stored, values in zip(self.quantised, self.moments, strict=True):
                stored.write(values, touched)

    def way(self) -> str:
        """What takes the step: "kernel", "composition" (of the same formula) or "loop" (of torch's operations).

        Warns where the group asks for a kernel, and kernels do not take the tensors.
        """
        if self.group["fused"]:
            reason = self._why_not_one_pass()
            if reason is None:
                return "kernel"
            if not torch.compiler.is_compiling():
                warnings.warn(
                    f"RoutedAdamW(fused=True): a parameter of shape {list(self.parameter.shape)} is updated by a "
                    f"dozen operations instead of one kernel: {reason}",
                    RuntimeWarning,
                    stacklevel=5,
                )
        return "loop" if self.group["state_dtype"] is None and not self.quantised else "composition"

    def _why_not_one_pass(self) -> str | None:
        """The reason why `adamw_step` cannot take the step, in words; None: it can."""
        parameter, moments, dtype = self.parameter, self.moments, self.parameter.dtype
        of_moments = [moment.dtype for moment in moments] or [self.moment_dtype()]
        one = dtype if self.group["state_dtype"] is None and moments else of_moments[0]
        if self.gradient.dtype != dtype or of_moments != [one] * len(of_moments):
            dtypes = {dtype, self.gradient.dtype, *of_moments}
            return f"it, its gradient and its moments are of {', '.join(sorted(map(str, dtypes)))}"
        if not self.division.is_matrix and not all(
            tensor.is_contiguous() for tensor in (parameter, *moments)
        ):
            return "its elements, or those of its moments, do not lie in order; make it contiguous"
        return None

    def apply(self, factors: Factors) -> None:
        """Moves the touched blocks, by the operations of torch's loop over tensors, which round at the same places."""
        group, parameter = self.group, self.parameter
        exp_avg, exp_avg_sq = self.moments[:2]
        gradient = -self.gradient if group["maximize"] else self.gradient
        beta1, beta2 = group["betas"]
        if group["weight_decay"] != 0:
            parameter.mul_(factors.decay)
        spent = average_touched(exp_avg, gradient, 1 - beta1, factors.mask)
        # Blocks that are not touched are multiplied by 1, and 0 is added. That keeps every bit: v is never -0.
        second = exp_avg_sq.mul_(factors.second).addcmul_(gradient, gradient, value=1 - beta2)
        if group["amsgrad"]:
            largest = self.moments[2]
            write_touched(torch.maximum(largest, second), largest, factors.mask)
            second = largest
        # Dynamo does not know an `out` that is not contiguous.
        root = second.sqrt() if torch.compiler.is_compiling() else torch.sqrt(second, out=spent)
        denominator = root.div_(factors.root).add_(group["eps"])
        change = torch.mul(exp_avg, factors.size).div_(denominator)
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
        counts: t, in fp32.
    """

    touched: Tensor
    decay: Tensor
    size: Tensor
    root: Tensor
    counts: Tensor

    @classmethod
    def of(cls, updates: Sequence[Update]) -> Corrections:
        """Counts a step of the touched blocks of parameters with one group, device and dtype: the factors of it."""
        group = updates[0].group
        dtype = factor_dtype(updates[0].parameter)
        each = [update.touched for update in updates]
        touched = adjacent(each)
        if touched is None:
            touched = torch.cat(each)
        counts = _count(updates, touched)
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        decay = where_touched(touched, 1 - lr * group["weight_decay"], dtype)
        return cls(touched, decay, *bias_corrections(counts, group["betas"], lr, dtype), counts)


def _count(updates: Sequence[Update], touched: Tensor) -> Tensor:
    """Counts a step of the touched blocks: the new counts of all parameters' blocks, one after the other.

    Counts that are no shards are replaced by ones that lie side by side, where the next step finds them.
    """
    steps = [update.steps for update in updates]
    counts = adjacent(steps)
    if counts is not None:
        return counts.add_(touched)
    counts = flat(steps).add_(touched)
    parts = split(counts, steps)
    if _may_replace(updates):
        for update, part in zip(updates, parts, strict=True):
            update.state["step"] = part
    else:
        torch._foreach_copy_(steps, parts)
    return counts


def _may_replace(updates: Sequence[Update]) -> bool:
    """Whether later steps look their counts up anew: no compiled step does, and no graph of CUDA's."""
    steps = updates[0].steps
    if torch.compiler.is_compiling() or not has_data(steps):
        return False
    if steps.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return all(update.state["step"] is update.steps for update in updates)


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
        touched, decay, size, root, _ = corrections
        masks = (touched.to(INTEGERS[width]).neg_() for width in (parameter.itemsize, decay.itemsize))
        of_all = [decay, where_touched(touched, group["betas"][1], decay.dtype), size, root, *masks]
        # A factor without dimensions would take the dtype of the other operand.
        steps = [(update.steps, update.parameter.dim()) for update in updates]
        like = [step if step.dim() else step.view([1] * dimensions) for step, dimensions in steps]
        of_each = (split(values, like) for values in of_all)
        return (cls(*factors) for factors in zip(*of_each, strict=True))


def step_by_primitive(updates: Sequence[Update], corrections: Corrections, backend: str) -> None:
    """Takes the steps of parameters with one group, device, dtype and dtype of moments, all by one call."""
    updates = [update.with_moments() for update in updates]
    group = updates[0].group
    beta1, beta2 = group["betas"]
    is_stochastic = group["state_dtype"] == torch.bfloat16
    options = AdamWOptions(beta1, beta2, group["eps"], group["maximize"], is_stochastic)
    divisions = [update.division for update in updates]
    parameters = as_matrices([update.parameter for update in updates], divisions)
    gradients = as_matrices([update.gradient for update in updates], divisions)
    exp_avgs, exp_avg_sqs, *most = (
        as_matrices(moments, divisions)
        for moments in zip(*[update.moments for update in updates], strict=True)
    )
    kinds = [division.blocks for division in divisions]
    factors = _factors_of_matrices(divisions, corrections)
    backends.primitives(backend).adamw_step(
        parameters, gradients, exp_avgs, exp_avg_sqs, most[0] if most else [], factors, kinds, options
    )
    for index, update in enumerate(updates):
        if update.division.is_matrix:
            update.store_moments()
            continue
        changed = [matrices[index] for matrices in (parameters, exp_avgs, exp_avg_sqs, *most)]
        for tensor, matrix in zip((update.parameter, *update.moments), changed, strict=True):
            if not tensor.is_contiguous():  # the matrix is a copy
                tensor.copy_(matrix.view(tensor.shape))
        update.store_moments()


def _factors_of_matrices(divisions: Sequence[Division], corrections: Corrections) -> Tensor:
    """`[5, n]`: the factors of `adamw_step`."""
    touched, decay, size, root, counts = corrections
    factors = decay.new_empty(5, len(decay))
    for own, values in zip(factors, (decay, size, root, touched, counts), strict=True):
        own.copy_(values)
    factors[2].reciprocal_()
    widths = [division.width for division in divisions]
    if all(width == 1 for width in widths):
        return factors
    parts = factors.split([division.number // division.width for division in divisions], dim=1)
    repeated = [part.repeat_interleave(width, dim=1) for part, width in zip(parts, widths, strict=True)]
    return torch.cat(repeated, dim=1)
