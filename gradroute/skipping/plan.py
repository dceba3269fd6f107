"""How a backward makes its products, for users who ask: the `explain` of linear layers and MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .. import backends
from ..machine.answers import SHIPPED
from ..routes import Routes
from .parts import Product
from .rule import PRODUCTS, WHOLE, Decision, decide


class ProductPlan(NamedTuple):
    """How a backward makes a product, or several that have one form.

    Attributes:
        form: "whole"; "rectangles": the tokens of a route × the features with its gradient, one product each;
            "grouped": the same in one call, for tokens that the device alone has counted.
        reason: why.
        work: the share of the whole product's work that is done, grouped as for routes with as many tokens; 1 where it
            is made whole.
        run: how many tokens are taken at once; None: all.
        evidence: what the form rests on: "measured here" (by `python -m gradroute tune`) or "shipped estimate".
        run_evidence: likewise what run rests on; None where all tokens are taken at once.
    """

    form: str
    reason: str
    work: float
    run: int | None
    evidence: str
    run_evidence: str | None = None


class Plan(NamedTuple):
    """What runs a call of a linear layer or an MLP.

    Attributes:
        backend: a name of `gradroute.backends.BACKENDS`; "torch" where nothing is masked.
        reason: why it runs there.
        evidence: what the order of the backends rests on: "measured here" (by `python -m gradroute tune`) or "shipped
            estimate".
        products: how the backward makes its products: of a linear layer "dx" and "dW", of an MLP "all".
    """

    backend: str
    reason: str
    evidence: str
    products: Mapping[str, ProductPlan]


def plan(
    name: str,
    x: Tensor,
    routes: Routes,
    products: Mapping[str, Product[Any]],
    requested: str | None,
) -> Plan:
    """What runs a call whose arguments were checked.

    Args:
        name: what the rule for its products is called, one of `PRODUCTS`.
        x: the activation, as the op computes with it.
        routes: the batch's routes.
        products: the products of the backward.
        requested: the argument `backend`.

    Raises:
        BackendError: the requested backend, or none, can run it.
    """
    choice = backends.explain(PRODUCTS[name], x, requested)
    if choice.backend == "reference":
        whole = ProductPlan(WHOLE, "backend reference leaves nothing out", 1.0, None, SHIPPED)
        return Plan(*choice, dict.fromkeys(products, whole))
    return Plan(
        *choice,
        {key: _of(name, decide(name, product, routes, x.dtype)) for key, product in products.items()},
    )


def unmasked(products: tuple[str, ...], requested: str | None) -> Plan:
    """What runs a call without routes or sites: the ordinary op."""
    backends.check_backend(requested)
    why = "nothing is masked, so that it is PyTorch's own op"
    whole = ProductPlan(WHOLE, why, 1.0, None, SHIPPED)
    return Plan("torch", why, SHIPPED, dict.fromkeys(products, whole))


def _of(name: str, decision: Decision) -> ProductPlan:
    # A linear layer's whole products are single calls, whose tokens nothing holds in a cache for the next.
    run = None if name == "linear" and decision.form == WHOLE else decision.run
    work = 1.0 if decision.form == WHOLE else decision.left
    run_evidence = None if decision.rule is None or run is None else decision.rule.run_evidence
    return ProductPlan(decision.form, decision.reason, work, run, decision.evidence, run_evidence)
