"""The suite `launch`: the time of a routed call beyond its arithmetic, on tensors too small to take any."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import gradroute
from gradroute import backends, testing

from . import ops
from .cases import ADDED, FORWARD, FULL, Case, Limit, Plan, Step, Variant
from .op_table import OPS

BASE = "unrouted"  # the public function without routes: the ordinary op behind one test
CALLS = 100  # calls in a row, which the host's clock times together
TOKENS, WIDTH = 4, 8
MOST_MICROSECONDS = (
    15.0  # the target: how much longer the forward of a routed call takes than the ordinary one
)


def plans(device: torch.device) -> list[Plan]:
    """A case for every op."""
    axes = {"tokens": TOKENS, "d_model": WIDTH, "d_ff": WIDTH, "dtype": "float32"}
    return [Plan("launch", f"{op}, launch", op, axes, partial(case, op, device)) for op in backends.OPS]


def case(op: str, device: torch.device) -> Case:
    """One small call of an op with one site, routed and ordinary, on the automatic backend."""
    sizes = testing.Sizes(d_model=WIDTH, d_ff=WIDTH, vocabulary=WIDTH, heads=2, kv_heads=1, head_dim=WIDTH)
    entry = OPS.get(op)
    sites = (entry.activation or entry.update) if entry is not None else ("heads",)
    tokens = (1, TOKENS) if op == "routed_attention" else TOKENS
    # oneDNN takes 8 µs for a GELU of any size, more than all else here, and now and then twice as long.
    keywords = {"activation": "silu"} if testing.variants(op)[0].get("activation") else {}
    call = testing.sample(
        op,
        tokens=tokens,
        tables="blocks",
        sites=sites,
        num_routes=2,
        sizes=sizes,
        device=device,
        bias=False,
        **keywords,
    )
    made = {
        BASE: ops.Way([call.with_routes(None)], _function(call.with_routes(None).with_sites(None))),
        "routed": ops.Way([call], _function(call), is_rival=False),
    }
    return Case(
        variants={name: Variant(partial(_steps, way), is_rival=way.is_rival) for name, way in made.items()},
        rivals=(BASE,),
        examine=partial(ops.examine, made),
        checked=ops.CHECKED,
        modes=(FORWARD, FULL),
        limits=(Limit("routed", BASE, MOST_MICROSECONDS, ADDED, FORWARD),),
        calls=CALLS,
    )


def _function(call: testing.Sample) -> Callable[..., torch.Tensor]:
    """The public function with all but the tensors; without routes and sites it is the ordinary op."""
    sites = {"table" if call.op == "route_grad" else "sites": call.sites}
    return partial(getattr(gradroute, call.op), routes=call.routes, **sites, **call.keywords)


def _steps(way: ops.Way, mode: str) -> list[Step]:
    return [partial(_in_a_row, step) for step in way.steps(mode)]


def _in_a_row(step: Step) -> None:
    for _ in range(CALLS):
        step()
