"""Which kernels run a call of attention: the rules, in one place, each with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .. import backends
from ..machine import answers
from ..primitives.attention_pattern import Pattern
from ..primitives.protocol import AttentionTables
from ..routes import Routes
from ..tables import Table
from . import vendor as vendors

if TYPE_CHECKING:
    from ..attention import AttentionCall

# Below this share of a dense backward's work, kernels that leave out what has no weight beat the fastest dense ones:
# a split Triton backward takes 1.5 to 1.9 times as long as a vendor's (published figures for Hopper; not yet measured
# with these kernels).
SKIP_BELOW = 0.6

# Four of a backward's seven products of a tile make dK and dV, three make dQ.
KEY_VALUE_SHARE = 4 / 7

# The largest head dimension on backend triton, whose tiles have whole rows.
MAX_HEAD_DIM = 256


# Backends whose attention is all their own; the others mask around a vendor's kernel.
OWN = ("triton", "reference")
# Backends that compute in tiles of torch's products where no vendor's kernel does what a call asks for.
TILED = ("cpu", "torch")


class Plan(NamedTuple):
    """The kernels that run a call.

    Attributes:
        backend: a name of `gradroute.backends.BACKENDS`.
        vendor: the vendor's kernel, by its name in `gradroute.backends.vendor.VENDORS` (with edges its forward alone);
            None: the backend's own kernels, which on backends torch and cpu are tiles of torch's products.
        reason: why it runs there.
        evidence: what the choice rests on: "measured here" (by `python -m gradroute tune`) or "shipped estimate".
    """

    backend: str
    vendor: str | None
    reason: str
    evidence: str = answers.SHIPPED


def plan(call: AttentionCall, requested: str | None) -> Plan:
    """Chooses what runs a call.

    Vendors' kernels are the fastest where their whole backward is needed and no edges are; own kernels can do all of
    it, and leave out what has no weight.

    Raises:
        BackendError: the requested backend, or none, can run it.
    """
    vendor, vendor_reason = vendors.choose(call.q, call.k, call.v, call.pattern)
    has_edges = call.sites.score_edges is not None or call.sites.value_edges is not None
    work = remaining_work(call.routes, call.sites)
    skip_below = _skip_below(call.q)
    own_first = has_edges or vendor is None or work < skip_below
    order = _in_order(backends.order_of("routed_attention", call.q), own_first)
    reasons = refused(call.q, vendor, vendor_reason, has_edges, call.pattern)
    backend = backends.choose("routed_attention", requested, call.q, reasons, order)
    evidence = _evidence(call.q, backend, in_tiles=backend in TILED and (has_edges or vendor is None))
    if backend in OWN:
        why = "it was asked for"
        if has_edges:
            why = "edges between routes need own kernels"
        elif vendor is None:
            why = f"no vendor's kernel can run it: {vendor_reason}"
        elif work < skip_below:
            why = "masks leave so little of the backward's work that own kernels, which make no more, are faster"
        return Plan(backend, None, why, evidence)
    if has_edges and vendor is not None:
        vendor_reason = f"{vendor_reason}; edges between routes need a backward in tiles"
    return Plan(backend, vendor, vendor_reason, evidence)


def _in_order(names: tuple[str, ...], own_first: bool) -> tuple[str, ...]:
    """The order in which the automatic choice tries the backends: those with own kernels first, or after the others."""
    if own_first:
        return ("triton", *(name for name in names if name != "triton"))
    return tuple(sorted(names, key=OWN.__contains__))


def _skip_below(q: Tensor) -> float:
    """Below which share of the work own kernels are faster."""
    measured = answers.share_for_own(q.device, q.dtype)
    return SKIP_BELOW if measured is None else measured


def _evidence(q: Tensor, backend: str, in_tiles: bool) -> str:
    """What any of a call's choices rests on; between vendors' kernels, or them and own ones, only CUDA has a choice."""
    is_measured = (
        backends.evidence_of("routed_attention", q, backend) == answers.MEASURED
        or (q.is_cuda and answers.share_for_own(q.device, q.dtype) is not None)
        or (q.is_cuda and answers.vendors(q.device, q.dtype) is not None)
        or (in_tiles and answers.tiles(q.device, q.dtype) is not None)
    )
    return answers.MEASURED if is_measured else answers.SHIPPED


def refused(
    q: Tensor, vendor: str | None, vendor_reason: str, has_edges: bool, pattern: Pattern
) -> dict[str, str]:
    """The backends that cannot run the call for what it asks, each with the reason."""
    reasons = {}
    if vendor is None:
        reasons["cuda"] = f"it masks around a vendor's kernel, and none can run the call: {vendor_reason}"
    if has_edges:
        reasons["cuda"] = "there is no CUDA kernel for edges between routes yet"
    if q.shape[3] > MAX_HEAD_DIM:
        reasons["triton"] = (
            f"its tiles have whole rows of at most {MAX_HEAD_DIM} features, and these have {q.shape[3]}"
        )
    if pattern.dropout > 0:
        own = "own kernels do not drop out; only vendors' kernels on CUDA do"
        reasons |= dict.fromkeys(OWN, own)
        if has_edges:
            reasons |= dict.fromkeys(TILED, f"edges between routes need own kernels, and {own}")
        elif vendor is None:
            reasons |= dict.fromkeys(TILED, f"{own}, and none can run the call: {vendor_reason}")
    return reasons


def remaining_work(routes: Routes | None, sites: AttentionTables) -> float:
    """The share of a dense backward that masks leave, taken as if tokens came in long runs of every route alike."""
    if routes is None or routes.strength is not None:
        return 1.0
    by_query = _density(sites.heads) * _density(sites.forward_heads)
    by_key = min(1.0, _density(sites.key) + _density(sites.value))
    return by_query * (KEY_VALUE_SHARE * by_key + (1 - KEY_VALUE_SHARE) * _density(sites.query))


def _density(table: Table | None) -> float:
    return 1.0 if table is None else float(table.density)


def _read_share(what: answers.What, value: Any) -> float:
    answers.check_what(what, answers.DTYPES)
    return answers.number(value)


answers.read_by("skip_below", _read_share)
