"""MoESites: where a mixture of experts masks, and what its parts make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..arguments import ordinary_tensors
from ..linear import LinearSites
from ..mlp import ActivationSites
from ..routes import MAX_ROUTES
from ..sites import Site, Sites, given, site
from ..tables import Table


@dataclass(frozen=True, eq=False, repr=False)
class MoESites(Sites):
    """Where a mixture of experts masks. Each site is a table or None.

    The first six are about hidden units: `[R, d_expert]` is for the units of every expert alike, `[R, E * d_expert]`
    says them expert by expert, `[R, 1]` is for all. Those of experts and of the router are `[R, E]` or `[R, 1]`. A
    token is sent to several experts, and in each of them its route's row counts.

    Attributes:
        pre: the gradient of the pre-activations (of both branches) in the experts.
        hidden: the gradient of the hidden activations in the experts.
        forward: the hidden activations themselves, in forward, and so their gradient.
        update: shorthand for `update_in` and `update_out`, where they are not given.
        update_in: which rows of the experts' input weights (and biases) a token may update.
        update_out: which columns of the experts' output weights a token may update.
        update_output_bias: which entries of the experts' output biases a token may update, `[R, d_model]`.
        output: the gradient that arrives at the mixture's output, before everything else, `[R, d_model]`.
        experts: the gradient that enters an expert at its output: where it is 0, a token teaches the expert nothing,
            and nothing flows through it to what lies below. The router's weight of that expert still learns.
        forward_experts: an expert's output itself, in forward, and so its gradient and that of the router's weight of
            it. Where it is 0, a token does not see the expert. The router's choice and its weights stay what they are:
            the others are not scaled up, and the place among the chosen is lost. This is what `ablate` makes permanent.
        update_experts: which experts' parameters, all of them, a token may update; its gradient passes on.
        router: the gradient of the router's logits, and so of all that lies below by way of the router.
        update_router: which rows of the router's weight (and bias) a token may update.
        choice: which experts a token may be sent to, in forward: 0 and 1 alone. The router's softmax is over those of
            weight 1 then, at least as many as a token visits.
    """

    pre: Site = site("units")
    hidden: Site = site("units")
    forward: Site = site("units")
    update: Site = site("units")
    update_in: Site = site("units", default="update")
    update_out: Site = site("units", default="update")
    update_output_bias: Site = site("output_bias")
    output: Site = site("d_model")
    experts: Site = site("experts")
    forward_experts: Site = site("experts")
    update_experts: Site = site("experts")
    router: Site = site("experts")
    update_router: Site = site("experts")
    choice: Site = site("experts")


@dataclass(frozen=True)
class Experts:
    """The extents of a mixture of experts.

    Attributes:
        count: E, the number of experts.
        units: the hidden units of each.
        d_model: width of the residual stream.
        chosen: how many experts a token visits.
        has_output_bias: whether the experts' outputs have biases.
    """

    count: int
    units: int
    d_model: int
    chosen: int
    has_output_bias: bool


@dataclass(frozen=True, eq=False, repr=False)
class _RowSites(Sites):
    """The sites of the rows of a mixture, one row for each expert that a token visits.

    Attributes:
        experts: see MoESites.
        forward_experts: see MoESites.
        pre: the same as that of the middle, for the outputs of the layer that makes gate and up.
        update_input_bias: which entries of the experts' input biases a row updates.
        update_output_bias: which entries of their output biases.
    """

    experts: Site = site("one")
    forward_experts: Site = site("one")
    pre: Site = site("inner")
    update_input_bias: Site = site("inner")
    update_output_bias: Site = site("d_model")


class ExpertOps(NamedTuple):
    """The sites of the ops that experts run as, on the rows of tokens sorted by expert.

    Where `by_expert`, a table has a row for each route and expert, route by route: `[R * E, F]`.

    Attributes:
        inner: of the linear layers that make gate and up: `update_rows`.
        middle: of the activation.
        outer: of the linear layers that read the hidden units: `update_cols`, or `update_rows` of whole experts.
        rows: of whole rows.
    """

    inner: LinearSites | None
    middle: ActivationSites | None
    outer: LinearSites | None
    rows: _RowSites | None


def check(sites: MoESites, experts: Experts) -> None:
    """Raises ValueError unless every table fits a mixture of experts."""
    widths: dict[str, int | str] = {
        "units": experts.units,
        "experts": experts.count,
        "d_model": experts.d_model,
        "output_bias": experts.d_model if experts.has_output_bias else "the experts have no output bias",
    }
    for name, table in sites.tables.items():
        if sites.declared[name]["width"] == "units" and table.features == experts.count * experts.units:
            widths[name] = table.features
    sites.check(None, widths)
    if sites.choice is not None:
        _check_choice(sites.choice, experts)


def _check_choice(choice: Table, experts: Experts) -> None:
    if not choice.binary:
        raise ValueError(f"MoESites.choice: got {choice} of weights other than 0 and 1, expected those alone")
    eligible = (choice.weights.expand(-1, experts.count) != 0).sum(1)
    few = int(eligible.argmin())
    if eligible[few] < experts.chosen:
        raise ValueError(
            f"MoESites.choice: got {int(eligible[few])} experts for route {few}, expected at least the "
            f"{experts.chosen} that a token visits"
        )


@ordinary_tensors()
def ops_of(sites: MoESites, experts: Experts, is_interleaved: bool) -> tuple[ExpertOps, bool]:
    """The ops' sites, and whether their tables have a row for each route and expert.

    Args:
        sites: those of a mixture.
        experts: its extents.
        is_interleaved: whether gate and up take turns in the rows of the input weight, or stand one after the other.

    Raises:
        ValueError: more routes and experts than a Routes may have.
    """
    laid = _Layout(experts, _tells_experts_apart(sites, experts))
    tables = sites.effective
    whole = laid.of_experts(tables.update_experts)
    inner = _table(_both_branches(_product(laid.of_units(tables.table("update_in")), whole), is_interleaved))
    # Where nothing is said of units, whole rows of the gradient are masked: 0 times what is not finite is no 0.
    update_out = laid.of_units(tables.table("update_out"))
    outer = {
        "update_rows": None if update_out is not None else _table(whole),
        "update_cols": None if update_out is None else _table(_product(update_out, whole)),
    }
    middle = {name: _table(laid.of_units(getattr(tables, name))) for name in ("pre", "hidden", "forward")}
    rows = given(
        _RowSites,
        experts=_table(laid.of_experts(tables.experts)),
        forward_experts=_table(laid.of_experts(tables.forward_experts)),
        pre=_table(_both_branches(laid.of_units(tables.pre), is_interleaved)),
        update_input_bias=inner,
        update_output_bias=_table(_product(laid.of_features(tables.update_output_bias), whole)),
    )
    _check_count(sites, experts, laid)
    ops = ExpertOps(
        given(LinearSites, update_rows=inner),
        given(ActivationSites, **middle),
        given(LinearSites, **outer),
        rows,
    )
    return ops, laid.by_expert


def base_differs(ops: ExpertOps, count: int) -> bool:
    """Whether the base route's weights, from which a strength interpolates, differ from expert to expert."""
    tables = [table for sites in ops if sites is not None for table in sites.effective.tables.values()]
    with unset_fake_temporarily():  # tables have values also where a model without memory is routed
        return any(bool((table.weights[:count] != table.weights[:1]).any()) for table in tables)


def _tells_experts_apart(sites: MoESites, experts: Experts) -> bool:
    """Whether a table says something of single experts."""
    if experts.count == 1:
        return False
    tables = sites.effective.tables
    whole = ("experts", "forward_experts", "update_experts")
    by_unit = experts.count * experts.units
    return any(
        table.features == (by_unit if sites.declared[name]["width"] == "units" else experts.count)
        for name, table in tables.items()
        if name in whole or sites.declared[name]["width"] == "units"
    )


def _check_count(sites: MoESites, experts: Experts, laid: _Layout) -> None:
    num_routes = next((table.num_routes for table in sites.tables.values()), 1)
    if laid.by_expert and num_routes * experts.count > MAX_ROUTES:
        raise ValueError(
            f"MoESites: got {num_routes} routes and {experts.count} experts, expected at most {MAX_ROUTES} in all for "
            "tables that differ from expert to expert"
        )


class _Layout(NamedTuple):
    """How the tables of a mixture become `[R, E, F]`, or `[R, 1, F]` where nothing differs from expert to expert."""

    experts: Experts
    by_expert: bool

    def of_units(self, table: Table | None) -> Tensor | None:
        """A table of hidden units, of all experts alike or expert by expert."""
        count, units = self.experts.count, self.experts.units
        if table is not None and self.by_expert and table.features == count * units:
            return table.weights.view(-1, count, units)
        return self.of_features(table)

    def of_features(self, table: Table | None) -> Tensor | None:
        """A table of features that are the same in all experts."""
        if table is None:
            return None
        return table.weights[:, None].expand(-1, self.experts.count if self.by_expert else 1, -1)

    def of_experts(self, table: Table | None) -> Tensor | None:
        """A table of whole experts, as one of a single feature."""
        if table is None:
            return None
        return table.weights.expand(-1, self.experts.count if self.by_expert else 1)[..., None]


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one * other


def _both_branches(weights: Tensor | None, is_interleaved: bool) -> Tensor | None:
    """Weights of hidden units for the rows of the one weight that makes gate and up."""
    if weights is None or weights.shape[-1] == 1:
        return weights
    return weights.repeat_interleave(2, dim=-1) if is_interleaved else torch.cat((weights, weights), dim=-1)


def _table(weights: Tensor | None) -> Table | None:
    return None if weights is None else Table(weights.flatten(0, 1))
