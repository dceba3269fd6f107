"""The products of an MLP's backward as grouped products, for tokens that the host has not counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..arguments import ordinary_tensors
from ..primitives.arguments import ActivationMasks, product_dtype
from ..primitives.overwriting import plus
from ..primitives.products import plus_product, product
from .entries import Entries, entries_of
from .grouped import grouped_rows
from .sums import GroupedTotal
from .tiling import ALIGNMENT, Tiling, live_features, masks_of_tiles, may_be_tiled, tiling_of

if TYPE_CHECKING:
    from .mlp import Branch, MLPBackward

# What dH and dX, the input weights' gradients, and the output weight's are of the products of an MLP of one branch or
# two, as shares: gated they are three, two and one.
SHARES = (0.5, 0.33, 0.17)


class MLPTilings(NamedTuple):
    """How an MLP's products are grouped over its hidden features; None where one is made whole.

    Attributes:
        gradient: of dH, dX and, with them, the input weights' gradients.
        gradient_masks: the masks on each of its strata.
        updates: of the input weights' gradients alone, where the gradient is whole.
        update_masks: the masks on each of its strata.
        outputs: of the output weight's gradient, where it has not the tiling of the gradient.
        output_masks: the masks on each of its strata.
        shares_gradient: whether the output weight's gradient has the tiling of the gradient.
        work: the share of the whole products' work that is done where every route has as many tokens.
    """

    gradient: Tiling | None
    gradient_masks: tuple[ActivationMasks, ...]
    updates: Tiling | None
    update_masks: tuple[ActivationMasks, ...]
    outputs: Tiling | None
    output_masks: tuple[ActivationMasks, ...]
    shares_gradient: bool
    work: float


@ordinary_tensors()
def tilings_of(masks: ActivationMasks) -> MLPTilings | None:
    """The tilings of an MLP with these masks; None where no product of it is worth grouping."""
    tables = [table for group in masks for table in group]
    if not may_be_tiled(tables):
        return None
    size = tables[0].num_routes, max(table.features for table in tables)
    of_gradient = live_features((*masks.dh, *masks.da), *size)
    of_updates = of_gradient & live_features(masks.update, *size)
    of_outputs = live_features(masks.z, *size)
    gradient = tiling_of(of_gradient)
    updates = tiling_of(of_updates) if gradient is None else None
    shares_gradient = gradient is not None and torch.equal(of_gradient, of_outputs)
    outputs = None if shares_gradient else tiling_of(of_outputs)
    if gradient is None and updates is None and outputs is None:
        return None
    gradient_work, update_work = _work(gradient), _work(updates if gradient is None else gradient)
    output_work = gradient_work if shares_gradient else _work(outputs)
    works = zip(SHARES, (gradient_work, update_work, output_work), strict=True)
    return MLPTilings(
        gradient,
        _masks(gradient, masks),
        updates,
        _masks(updates, ActivationMasks(update=masks.update)),
        outputs,
        _masks(outputs, ActivationMasks(z=masks.z)),
        shares_gradient,
        sum(share * work for share, work in works),
    )


def _work(tiling: Tiling | None) -> float:
    return 1.0 if tiling is None else tiling.work


def _masks(tiling: Tiling | None, masks: ActivationMasks) -> tuple[ActivationMasks, ...]:
    return () if tiling is None else tuple(masks_of_tiles(stratum, masks) for stratum in tiling.strata)


class GroupedMLP:
    """The grouped products of one backward.

    Attributes:
        backward: the backward.
        tilings: those of its sites.
        x: `[T, d_model]`, where an input weight's gradient is needed.
        w_out: `[d_out, d_ff]`, where any gradient before it is needed.
    """

    def __init__(
        self, backward: MLPBackward, tilings: MLPTilings, x: Tensor | None, w_out: Tensor | None
    ) -> None:
        self.backward = backward
        self.tilings = tilings
        self.x = x
        self.w_out = w_out

    def gradients(self, need_w_out: bool) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x `[T, d_model]` and of the output weight `[d_out, d_ff]`; the branches get theirs."""
        tilings, dx, dw_out, z = self.tilings, None, None, None
        shares = need_w_out and tilings.shares_gradient
        if self.w_out is not None and tilings.gradient is not None:
            dx, dw_out = self._gradient(tilings.gradient, self.w_out, shares)
        elif self.w_out is not None:
            dx, z = self._whole_gradient(self.w_out, need_w_out)
        if need_w_out and dw_out is None:
            dw_out = self._output_grad(z)
        return dx, dw_out

    def _gradient(self, tiling: Tiling, w_out: Tensor, want_z: bool) -> tuple[Tensor | None, Tensor | None]:
        """dx, the branches' gradients and, where it has the same tiling, the output weight's, by strata."""
        backward = self.backward
        g, branches = backward.g, backward.branches
        dw_out = self._sum_of_outputs(tiling) if want_z else None
        sums = [self._sums_of_branch(branch, tiling) for branch in branches]
        needs_x = branches[0].weight is not None
        is_sum = sum(stratum.slots for stratum in tiling.strata) > 1
        dx: Tensor | None = None
        for stratum, masks in zip(tiling.strata, self.tilings.gradient_masks, strict=True):
            entries = entries_of(backward.routes, stratum)
            g_rows = entries.rows(g)
            tiles = w_out.unflatten(1, (stratum.tiles, -1)).transpose(0, 1)
            dz = grouped_rows(g_rows, tiles, entries.ends, False)
            grads, z = self._middle(dz, entries, masks, want_z)
            if dw_out is not None and z is not None:
                dw_out.add_columns(g_rows, z, entries.ends)
            if needs_x:
                rows = self._input_rows(grads, entries, is_sum)
                dx = entries.sum_of_tokens(rows, dx, product_dtype(g.dtype) if is_sum else g.dtype)
            self._add_updates(sums, grads, entries, masks)
        self._set_updates(sums)
        if needs_x:
            dx = self._zeros_of_x() if dx is None else dx.to(g.dtype)
        return dx, None if dw_out is None else dw_out.result()

    def _middle(
        self, dz: Tensor | None, entries: Entries, masks: ActivationMasks, want_z: bool
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """Each branch's gradient of its pre-activations at the entries, and z there."""
        a = [entries.features(branch.a) for branch in self.backward.branches]
        grads, z, _ = self.backward.middle(
            dz, a, entries.routes, masks, want_z=want_z, want_bias=False, overwrite=True
        )
        return grads, z

    def _input_rows(self, grads: tuple[Tensor | None, ...], entries: Entries, is_sum: bool) -> Tensor:
        """What each entry gives to its token's dx `[E, d_model]`, which may be the sum of several."""
        rows: Tensor | None = None
        for branch, grad in zip(self.backward.branches, grads, strict=True):
            assert branch.weight is not None and grad is not None
            weight = branch.weight.unflatten(0, (entries.stratum.tiles, -1))
            summand = grouped_rows(grad, weight, entries.ends, is_sum)
            rows = summand if rows is None else plus(rows, summand)
        assert rows is not None
        return rows

    def _zeros_of_x(self) -> Tensor:
        weight, g = self.backward.branches[0].weight, self.backward.g
        assert weight is not None
        return g.new_zeros(g.shape[0], weight.shape[1])

    def _sums_of_branch(
        self, branch: Branch, tiling: Tiling
    ) -> tuple[GroupedTotal | None, GroupedTotal | None]:
        """The sums of a branch's weight and of its bias, None for what is not needed."""
        g, d_ff = self.backward.g, branch.a.shape[1]
        weight = bias = None
        if branch.need_weight:
            assert self.x is not None
            weight = GroupedTotal(g, (d_ff, self.x.shape[1]), tiling)
        if branch.need_bias:
            bias = GroupedTotal(g, (d_ff, ALIGNMENT), tiling)
        return weight, bias

    def _add_updates(
        self,
        sums: list[tuple[GroupedTotal | None, GroupedTotal | None]],
        grads: tuple[Tensor | None, ...],
        entries: Entries,
        masks: ActivationMasks,
    ) -> None:
        """Adds the updates at the entries: their gradients `[E, width]`, which have served dx, and are masked."""
        x_rows = None if self.x is None else entries.rows(self.x)
        for (weight, bias), grad in zip(sums, grads, strict=True):
            if grad is None or (weight is None and bias is None):
                continue
            for table in masks.update:
                grad = self.backward.primitives.masked_product(grad, entries.routes, table, overwrite=True)
            if weight is not None:
                assert x_rows is not None
                weight.add_rows(grad, x_rows, entries.ends)
            if bias is not None:  # a product with ones, as wide as torch's grouped product takes
                bias.add_rows(grad, grad.new_ones(grad.shape[0], ALIGNMENT), entries.ends)

    def _set_updates(self, sums: list[tuple[GroupedTotal | None, GroupedTotal | None]]) -> None:
        for branch, (weight, bias) in zip(self.backward.branches, sums, strict=True):
            branch.weight_grad = None if weight is None else weight.result()
            branch.bias_grad = None if bias is None else bias.result()[:, 0].contiguous()

    def _whole_gradient(self, w_out: Tensor, want_z: bool) -> tuple[Tensor | None, Tensor | None]:
        """dx and z, made whole; the branches' gradients are, or their updates are grouped."""
        backward, masks = self.backward, self.backward.sites.masks
        a = [branch.a for branch in backward.branches]
        tiling = self.tilings.updates
        grads, z, biases = backward.middle(
            product(backward.g, w_out), a, backward.routes, masks, want_z=want_z, want_bias=tiling is None
        )
        dx: Tensor | None = None
        for branch, grad in zip(backward.branches, grads, strict=True):
            if branch.weight is not None:
                assert grad is not None
                dx = plus_product(dx, grad, branch.weight)
        if tiling is None:
            self._whole_updates(grads, biases)
            return dx, z
        sums = [self._sums_of_branch(branch, tiling) for branch in backward.branches]
        for stratum, update_masks in zip(tiling.strata, self.tilings.update_masks, strict=True):
            entries = entries_of(backward.routes, stratum)
            at = tuple(None if grad is None else entries.features(grad) for grad in grads)
            self._add_updates(sums, at, entries, update_masks)
        self._set_updates(sums)
        return dx, z

    def _whole_updates(self, grads: tuple[Tensor | None, ...], biases: tuple[Tensor | None, ...]) -> None:
        backward = self.backward
        for branch, grad, bias in zip(backward.branches, grads, biases, strict=True):
            if branch.need_weight:
                assert grad is not None and self.x is not None
                for table in backward.sites.masks.update:
                    grad = backward.primitives.masked_product(grad, backward.routes, table, overwrite=True)
                branch.weight_grad = product(grad.T, self.x)
            branch.bias_grad = bias if branch.need_bias else None

    def _sum_of_outputs(self, tiling: Tiling) -> GroupedTotal:
        g = self.backward.g
        return GroupedTotal(g, (g.shape[1], self.backward.branches[0].a.shape[1]), tiling)

    def _output_grad(self, z: Tensor | None) -> Tensor:
        """The output weight's gradient, of z `[T, d_ff]` where it is made already."""
        backward, tiling = self.backward, self.tilings.outputs
        if tiling is None:
            if z is None:
                a, masks = [branch.a for branch in backward.branches], backward.sites.masks
                _, z, _ = backward.middle(None, a, backward.routes, masks, want_z=True, want_bias=False)
            assert z is not None
            return product(backward.g.T, z)
        total = self._sum_of_outputs(tiling)
        for stratum, masks in zip(tiling.strata, self.tilings.output_masks, strict=True):
            entries = entries_of(backward.routes, stratum)
            at = self._middle(None, entries, masks, True)[1] if z is None else entries.features(z)
            assert at is not None
            total.add_columns(entries.rows(backward.g), at, entries.ends)
        return total.result()
