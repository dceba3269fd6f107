"""route_grad: the identity whose gradient is masked."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from . import backends, reference
from .checks import check_tensor, flat, unrouted
from .function import Context, Function
from .primitives.protocol import Primitives
from .routes import Routes
from .sites import check_table
from .tables import Table, TableLike
from .transforms import first_order


def route_grad(
    x: Tensor, routes: Routes | None, table: TableLike | None, *, backend: str | None = None
) -> Tensor:
    """y is x, without a copy; the gradient is dx = m ⊙ dy (Cloud et al. 2024, arXiv 2410.04332, section 3).

    Args:
        x: `[*tokens, F]`, fp32, bf16, fp16 or fp64.
        routes: the batch's routes; None: no mask.
        table: `[R, F]` or `[R, 1]`; None: no mask.
        backend: see `gradroute.use_backend`; default: the fastest that supports the call.

    Returns:
        `[*tokens, F]`, an alias of x.

    Raises:
        ValueError: shapes, devices or table do not fit.
        BackendError: the requested backend cannot run the call.
        RuntimeError: in backward with create_graph=True.
    """
    return _route(x, routes, table, backend, False)


def route_own(x: Tensor, routes: Routes, table: Table, backend: str | None) -> Tensor:
    """route_grad of a tensor that nobody else holds, whose result may be written in place like any other.

    A view that an autograd.Function returned may not. What it aliases is not a view to autograd here, so a write would
    change x and leave its gradient: that is why nobody else may hold it. Both count the same version.
    """
    return _route(x, routes, table, backend, True)


def _route(
    x: Tensor, routes: Routes | None, table: TableLike | None, backend: str | None, is_own: bool
) -> Tensor:
    if table is not None:
        table = Table.of(table)
    if unrouted(routes, table, Table):
        backends.check_backend(backend)
        return x
    assert routes is not None and table is not None
    check_tensor("x", x)
    routes.check(x, "x")
    check_table(table, routes.num_routes, x.shape[-1], "table")
    chosen = backends.choose("route_grad", backend, x)
    if chosen == "reference":
        return reference.route_grad(x, routes, table)
    if table.kind == "ones":
        return x
    return RouteGradFunction.apply(x, routes, table, backends.primitives(chosen), is_own)


class RouteGradContext(Context, Protocol):
    """The context of route_grad: its arguments, less x."""

    routes: Routes
    table: Table
    primitives: Primitives


class RouteGradFunction(Function):
    """route_grad on the primitives of a backend."""

    @staticmethod
    def forward(x: Tensor, routes: Routes, table: Table, primitives: Primitives, is_own: bool) -> Tensor:
        return x.detach() if is_own else x.view_as(x)

    @staticmethod
    def setup_context(ctx: RouteGradContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.routes, ctx.table, ctx.primitives, _ = inputs

    @staticmethod
    @first_order("route_grad")
    def backward(ctx: RouteGradContext, dy: Tensor) -> tuple[Any, ...]:
        dx = ctx.primitives.masked_product(flat(dy), ctx.routes, ctx.table).view(dy.shape)
        return (
            dx,
            None,  # routes
            None,  # table
            None,  # primitives
            None,  # is_own
        )
