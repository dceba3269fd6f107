"""Which kernels run a call of attention: the rules, in one place, each with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from torch import Tensor

from .. import backends
from ..machine import answers, verdicts
from ..primitives.attention_kernels import BackwardKernels
from ..primitives.attention_pattern import Pattern
from ..primitives.protocol import AttentionTables
from ..routes import Routes
from ..tables import Table
from . import fa4
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


#: The name of FlashAttention-4's backward, which is no backend, among plans' backwards and in the verdicts of `check`.
FA4: Final = "fa4"

# Backends with kernels of their own, at least for the backward; the others mask around a vendor's kernel.
OWN = ("triton", "reference")
# Backends that compute in tiles of torch's products where no vendor's kernel does what a call asks for.
TILED = ("cpu", "torch")


class Plan(NamedTuple):
    """The kernels that run a call.

    Attributes:
        backend: a name of `gradroute.backends.BACKENDS`.
        vendor: the vendor's kernel that runs the forward, by its name in `gradroute.backends.vendor.VENDORS`; None: the
            backend's own kernels, which on backends torch and cpu are tiles of torch's products.
        backward: whose kernels run the backward: "vendor", those of the same vendor; "fa4", FlashAttention-4's, through
            edges between routes; "own", the backend's own; "tiles", tiles of torch's products.
        reason: why they run it.
        evidence: what the choice rests on: "measured here" (by `python -m gradroute tune`) or "shipped estimate".
    """

    backend: str
    vendor: str | None
    backward: BackwardKernels
    reason: str
    evidence: str = answers.SHIPPED


def plan(call: AttentionCall, requested: str | None) -> Plan:
    """Chooses what runs a call.

    Vendors' kernels are the fastest where their whole backward is needed and no edges are; own kernels can do all of
    it, and leave out what has no weight. FlashAttention-4 makes a backward with edges at the price of an ordinary one.
    No mask changes the forward that the automatic choice takes: it is a vendor's kernel wherever one can run the call
    without routes, so that its output has the same bits, and only the backward is another's then. A backend with own
    kernels alone that was asked for runs both.

    Raises:
        BackendError: the requested backend, or none, can run it.
    """
    vendor, vendor_reason = vendors.choose(call.q, call.k, call.v, call.pattern)
    has_edges = call.sites.score_edges is not None or call.sites.value_edges is not None
    no_edges = _why_not_fa4(call, vendor, requested) if has_edges else None
    needs_own = no_edges is not None
    leaves_little = remaining_work(call.routes, call.sites) < _skip_below(call.q)
    own_first = needs_own or vendor is None or leaves_little
    order = _in_order(backends.order_of("routed_attention", call.q), own_first)
    reasons = refused(call.q, vendor, vendor_reason, no_edges, call.pattern)
    backend = backends.choose("routed_attention", requested, call.q, reasons, order)
    evidence = _evidence(call.q, backend, in_tiles=backend in TILED and (needs_own or vendor is None))
    if backend in OWN and backends.asked_for(requested) is not None:
        return Plan(backend, None, "own", "it was asked for", evidence)
    if vendor is None:
        why = f"no vendor's kernel can run it: {vendor_reason}" if backend in OWN else vendor_reason
        return Plan(backend, None, "own" if backend in OWN else "tiles", why, evidence)
    if backend == "reference":
        return Plan(backend, None, "own", "no other backend can run it", evidence)
    by_fa4 = f" (FlashAttention-4's is not taken: {no_edges})" if needs_own and call.q.is_cuda else ""
    if backend in OWN:
        why = f"{_why_own(needs_own, leaves_little)}{by_fa4}"
        why = f"{why}; the forward is that of the call without routes: {vendor_reason}"
        return Plan(backend, vendor, "own", why, evidence)
    if needs_own:
        why = f"{vendor_reason}; edges between routes need a backward in tiles{by_fa4}"
        return Plan(backend, vendor, "tiles", why, evidence)
    if has_edges:
        why = f"{vendor_reason}; FlashAttention-4's backward takes the edges between routes"
        return Plan(backend, vendor, FA4, why, evidence)
    return Plan(backend, vendor, "vendor", vendor_reason, evidence)


def under_vendor(call: AttentionCall, backend: str) -> Plan:
    """The plan of a call whose backward is own kernels of a backend that is asked for, under a vendor's forward.

    The automatic choice makes such plans too; this one is made whatever a check has found, so that a check can run it.

    Raises:
        BackendError: no vendor's kernel can run the forward, or the backend cannot run the call.
    """
    vendor, reason = vendors.choose(call.q, call.k, call.v, call.pattern)
    if vendor is None:
        raise backends.BackendError(f"routed_attention: no vendor's kernel can run the forward: {reason}")
    backends.choose("routed_attention", backend, call.q, refused(call.q, vendor, reason, None, call.pattern))
    return Plan(backend, vendor, "own", f"it was asked for, under a vendor's forward: {reason}")


def _why_not_fa4(call: AttentionCall, vendor: str | None, requested: str | None) -> str | None:
    """Why FlashAttention-4 does not run the backward of a call with edges, whose forward is a vendor's.

    A check that found it wrong keeps it out of the automatic choice, as it does a backend.
    """
    if vendor is None:
        return "no vendor's kernel can run the forward"
    assert call.routes is not None
    edges = call.sites.score_edges, call.sites.value_edges
    reason = fa4.why_not(call.q, call.k, call.v, call.routes.num_routes, *edges, call.pattern)
    if reason is None and backends.asked_for(requested) is None:
        return verdicts.why_not(FA4, call.q.device)
    return reason


def _why_own(needs_own: bool, leaves_little: bool) -> str:
    """Why the backward is own kernels' though a vendor's kernel runs the forward."""
    if needs_own:
        return "edges between routes need own kernels in the backward"
    if leaves_little:
        return "masks leave so little of the backward's work that own kernels, which make no more, are faster"
    return "no backend that masks around a vendor's kernel can run it"


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
    q: Tensor, vendor: str | None, vendor_reason: str, no_edges: str | None, pattern: Pattern
) -> dict[str, str]:
    """The backends that cannot run the call for what it asks, each with the reason.

    `no_edges` says why FlashAttention-4's backward cannot run the call's edges; None: it can, or there are none.
    """
    reasons = {}
    if vendor is None:
        reasons["cuda"] = f"it masks around a vendor's kernel, and none can run the call: {vendor_reason}"
    elif no_edges is not None:
        reasons["cuda"] = f"its edges between routes are those of FlashAttention-4's backward: {no_edges}"
    if q.shape[3] > MAX_HEAD_DIM:
        reasons["triton"] = (
            f"its tiles have whole rows of at most {MAX_HEAD_DIM} features, and these have {q.shape[3]}"
        )
    if pattern.dropout > 0:
        own = "own kernels do not drop out; only vendors' kernels on CUDA do"
        reasons |= dict.fromkeys(OWN, own)
        if no_edges is not None:
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
