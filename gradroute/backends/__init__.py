"""Which backend runs an op: one literal table, the automatic choice, and the reasons for a refusal."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import as_device, check_choice, shown
from ..machine import answers, verdicts
from ..machine.answers import MEASURED, SHIPPED
from ..primitives.protocol import Primitives
from ..tracing import constant_when_traced
from . import composed, native

_FASTEST_FIRST = ("triton", "cuda", "cpu", "torch", "reference")

# op → the backends that implement it, in the order in which the automatic choice tries them.
OPS: dict[str, tuple[str, ...]] = {
    "route_grad": _FASTEST_FIRST,
    "routed_linear": _FASTEST_FIRST,
    "routed_activation": _FASTEST_FIRST,
    "routed_glu": _FASTEST_FIRST,
    "routed_mlp": _FASTEST_FIRST,
    "routed_gated_mlp": _FASTEST_FIRST,
    "routed_rms_norm": _FASTEST_FIRST,
    "routed_layer_norm": _FASTEST_FIRST,
    "routed_embedding": _FASTEST_FIRST,
    "routed_attention": _FASTEST_FIRST,
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_PRIMITIVES: dict[str, Primitives] = {"torch": composed, "cpu": native, "cuda": native}

_triton_is_installed = importlib.util.find_spec("triton") is not None


def _load_triton() -> None:
    from . import triton

    _PRIMITIVES["triton"] = triton


# Where Triton's kernels can run they are imported now, because traced code cannot import. Elsewhere they wait until
# somebody asks for them: they are 0.6 of the 0.85 s that importing gradroute takes after torch.
if _triton_is_installed and (
    torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1"
):
    _load_triton()


def _from_environment() -> str | None:
    """The backend that GRADROUTE_BACKEND names."""
    named = os.environ.get("GRADROUTE_BACKEND") or None
    if named is not None and named not in _BACKENDS:
        raise ValueError(f"GRADROUTE_BACKEND: got {named!r}, expected one of {', '.join(_BACKENDS)}")
    return named


_process_wide: str | None = None


class BackendError(RuntimeError):
    """No backend can run a call; the message names every rejected one with its reason."""


class use_backend:
    """Chooses `backend` for every later call of the process (None: automatic again).

    As a context manager it restores the earlier choice on leaving. An explicit choice never falls back: a call
    that the backend cannot run raises BackendError. Under torch.compile it is read when a function is traced.

    Raises:
        ValueError: no such backend.
    """

    def __init__(self, backend: str | None) -> None:
        global _process_wide
        check_backend(backend)
        self._earlier = _process_wide
        _process_wide = backend

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _process_wide
        _process_wide = self._earlier


def available_backends(op: str | None = None, device: torch.device | str | None = None) -> tuple[str, ...]:
    """The backends that can run here, best first: those of `op` (default: of any op) on `device` (default: any)."""
    reasons = unavailable_backends(op, device)
    names = BACKENDS[::-1] if op is None else OPS[op]
    return tuple(name for name in names if name not in reasons)


def unavailable_backends(op: str | None = None, device: torch.device | str | None = None) -> dict[str, str]:
    """The backends that cannot run here, each with the reason."""
    if op is not None:
        check_choice("op", op, OPS)
    where = None if device is None else as_device("device", device)
    reasons = {}
    for name in BACKENDS:
        reason = _why_not(op, name, where)
        if reason is None and where is not None and where.type == "cuda" and not torch.cuda.is_available():
            reason = "no CUDA device is visible"
        if reason is not None:
            reasons[name] = reason
    return reasons


def choose(
    op: str,
    requested: str | None,
    x: Tensor,
    refused: Mapping[str, str] | None = None,
    order: tuple[str, ...] | None = None,
) -> str:
    """The backend that runs `op` on the activation `x`.

    An explicit choice (`requested`, else use_backend, else GRADROUTE_BACKEND) is taken or refused; the automatic
    one takes the first of the op's backends that supports the call, and that no check has found wrong on this machine,
    and warns when it is not the fastest there.

    Args:
        op: its name in OPS.
        requested: the argument `backend`.
        x: the activation.
        refused: backends that cannot run this very call, with the reasons.
        order: in which the automatic choice tries the op's backends; default: `order_of`.

    Raises:
        ValueError: no such backend.
        BackendError: the explicit backend, or every backend, cannot run the call.
    """
    explicit = asked_for(requested)
    if explicit is not None:
        check_backend(explicit)
        reason = _why_not(op, explicit, x.device, x.dtype) or (refused or {}).get(explicit)
        if reason is not None:
            raise BackendError(f"{op}: the requested backend {explicit!r} cannot run it: {reason}")
        return explicit
    if order is None and not refused and not torch.compiler.is_compiling():
        return _remembered(op, x)
    return _automatic(op, x, refused, order or order_of(op, x))


def asked_for(requested: str | None) -> str | None:
    """The explicit choice of a call with this argument `backend`, use_backend's and GRADROUTE_BACKEND's included.

    None: the choice is automatic.
    """
    return _process_wide if requested is None else requested


def order_of(op: str, x: Tensor) -> tuple[str, ...]:
    """The op's backends, fastest first: as measured on this machine for such an activation, else as shipped.

    Traced code must not depend on a size: under torch.compile what was measured for the largest counts.
    """
    if torch.compiler.is_compiling():
        return _orders_of(op, x)[-1][1]
    orders = answers.derived(("orders", op, x.device, x.dtype), lambda: _orders_of(op, x))
    return next(names for limit, names in orders if limit is None or x.numel() <= limit)


def _orders_of(op: str, x: Tensor) -> answers.Orders:
    """The orders by size; what was not measured comes after what was."""
    measured = answers.backends(op, x.device, x.dtype)
    if measured is None:
        return ((None, OPS[op]),)
    return tuple(
        (limit, (*names, *(name for name in OPS[op] if name not in names))) for limit, names in measured
    )


def _remembered(op: str, x: Tensor) -> str:
    """The automatic choice, made once: to make it anew took 2 of the 33 µs of a small gated MLP's call."""
    key = (op, x.device, x.dtype)
    found = _choices.get(key)
    if found is None:
        found = []
        for limit, order in _orders_of(op, x):
            found.append((limit, _automatic(op, x, None, order)))
        _choices[key] = found
    for limit, name in found:
        if limit is None or x.numel() <= limit:
            return name
    raise AssertionError("the last choice has no limit")


# By op, device and dtype: the backends by size (the most elements of the activation; None: any number).
_choices: dict[Any, list[tuple[int | None, str]]] = {}


def choose_anew() -> None:
    """Forgets what was chosen, and what `check` and `tune` found: their files are read again at the next call."""
    _choices.clear()
    answers.forget()
    verdicts.forget()


class Choice(NamedTuple):
    """Which backend runs a call.

    Attributes:
        backend: a name of BACKENDS.
        reason: why it runs there.
        evidence: what its place before others rests on: MEASURED ("measured here") or SHIPPED ("shipped estimate").
    """

    backend: str
    reason: str
    evidence: str


def explain(op: str, x: Tensor, backend: str | None = None) -> Choice:
    """Which backend a call of `op` runs on, and why; nothing is computed.

    Args:
        op: a name of OPS. Attention has an `explain` of its own in `gradroute.attention`, which knows more.
        x: the activation, of any size; of embeddings the weight.
        backend: the argument `backend` of the call.

    Raises:
        TypeError: `x` is not a tensor.
        ValueError: no such op or backend.
        BackendError: the explicit backend, or every backend, cannot run the call.
    """
    check_choice("op", op, OPS)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got a {type(x).__name__}, expected a tensor")
    chosen = choose(op, backend, x)
    evidence = evidence_of(op, x, chosen)
    if asked_for(backend) is not None:
        return Choice(chosen, "it was asked for", evidence)
    rejected = _rejected(op, order_of(op, x), x, None)
    why = "it is the fastest that can run the call"
    return Choice(chosen, f"{why}; {_listed(rejected)}" if rejected else why, evidence)


def candidates(op: str, x: Tensor) -> tuple[str, ...]:
    """The op's backends between which the automatic choice has a choice for the activation `x`, as shipped in order."""
    names = (name for name in OPS[op] if name != "reference")
    return tuple(name for name in names if _why_not_automatic(op, name, x, None) is None)


def evidence_of(op: str, x: Tensor, backend: str) -> str:
    """What a backend's place in the order for `x` rests on: MEASURED, or SHIPPED where it is not among the measured."""
    measured = answers.backends(op, x.device, x.dtype) or ()
    names = next((names for limit, names in measured if limit is None or x.numel() <= limit), ())
    return MEASURED if backend in names else SHIPPED


def _automatic(op: str, x: Tensor, refused: Mapping[str, str] | None, names: tuple[str, ...]) -> str:
    """The first of the backends that supports the call."""
    for name in names:
        if _is_elsewhere(name, x) or _why_not_automatic(op, name, x, refused):
            continue
        is_slow = name == "reference" or (name == "torch" and native.loading.module is None)
        if is_slow or (x.is_cuda and name != names[0]):
            rejected = _rejected(op, names[: names.index(name)], x, refused)
            _warn_slow(op, name, _listed(rejected) or "no faster backend exists yet")
        return name
    raise BackendError(f"{op}: no backend can run it: " + _listed(_rejected(op, names, x, refused)))


def with_kernels(what: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for what has kernels, or the composition of backend torch, but is no op of the table.

    It is that of use_backend, else of GRADROUTE_BACKEND, else the first with kernels for such tensors.

    Raises:
        BackendError: none can run it; the message says what, and names every backend with the reason.
    """
    home = "cuda" if device.type == "cuda" else "cpu"
    chosen = tuple(name for name in _FASTEST_FIRST if _BACKENDS[name].home == home)
    names = chosen if _process_wide is None else (_process_wide,)
    reasons: dict[str, str] = {}
    for name in names:
        reason = _why_not(None, name, device, dtype) if name != "reference" else "it has no kernels"
        if reason is None and _process_wide is None:
            reason = verdicts.why_not(name, device)
        if reason is None:
            return name
        reasons[name] = reason
    raise BackendError(f"{what}: no backend can run it: {_listed(reasons)}")


def primitives(backend: str) -> Primitives:
    """The primitives of a backend, for the autograd.Functions to call."""
    if backend not in _PRIMITIVES:
        _load_triton()
    return _PRIMITIVES[backend]


def check_backend(backend: str | None) -> str | None:
    """The backend's name, or None: the automatic choice; raises where there is no such backend."""
    if backend is None or (isinstance(backend, str) and backend in BACKENDS):
        return backend
    kind: type[Exception] = ValueError if isinstance(backend, str) else TypeError
    raise kind(f"backend: got {shown(backend)}, expected one of {', '.join(BACKENDS)}, or None")


def _why_not(
    op: str | None, name: str, device: torch.device | None, dtype: torch.dtype | None = None
) -> str | None:
    """Why backend `name` cannot run `op` on tensors of this device and dtype; None when it can."""
    implemented = any(name in row for row in OPS.values()) if op is None else name in OPS[op]
    if not implemented:
        return f"there are no {name} kernels for {op or 'any op'} yet"
    if dtype is not None and dtype not in DTYPES:
        return f"dtype {dtype} is not supported, only float32, bfloat16, float16 and float64"
    return _BACKENDS[name].why_not(name, device, dtype)


def _why_not_anywhere(name: str, device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    return None


def _why_not_triton(name: str, device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    if not _triton_is_installed:
        return "the package triton is not installed"
    if dtype == torch.float64:
        return "float64 runs on the backends reference, torch and cpu"
    kernels = sys.modules.get(f"{__name__}.triton")
    if kernels is not None and (kernels.INTERPRETED or kernels.recording()):
        return None
    if device is None:
        return (
            None
            if torch.cuda.is_available()
            else "no CUDA device is visible, and TRITON_INTERPRET=1 is not set"
        )
    if device.type not in ("cuda", "meta"):
        return f"Triton runs on CUDA devices (elsewhere only under TRITON_INTERPRET=1); the tensors are on {device}"
    return None


def _why_not_native(name: str, device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    reason = native.why_not(name)
    if reason is not None:
        return reason
    if name == "cuda" and dtype == torch.float64:
        return "float64 runs on the backends reference, torch and cpu"
    if device is None:
        return "no CUDA device is visible" if name == "cuda" and not torch.cuda.is_available() else None
    if device.type not in (name, "meta"):
        return f"its kernels take tensors on {name}; these are on {device}"
    if device.type == "cuda" and torch.cuda.is_available() and not torch.compiler.is_compiling():
        return native.why_not_on(torch.cuda.get_device_capability(device))
    return None


class _Backend(NamedTuple):
    """The choice's knowledge of a backend.

    Attributes:
        why_not: (its name, device, dtype) → why it cannot run there; None when it can.
        home: the type of device that its kernels are for; None: every type.
        elsewhere: why the automatic choice leaves it out on other devices though it may run there; None: it does not.
    """

    why_not: Callable[[str, torch.device | None, torch.dtype | None], str | None]
    home: str | None = None
    elsewhere: str | None = None


_BACKENDS = {
    "reference": _Backend(_why_not_anywhere),
    "torch": _Backend(_why_not_anywhere),
    "cpu": _Backend(_why_not_native, "cpu"),
    "triton": _Backend(
        _why_not_triton, "cuda", "Triton is chosen by itself for CUDA tensors, and these are on {device}"
    ),
    "cuda": _Backend(_why_not_native, "cuda"),
}

#: Every backend there is, by name.
BACKENDS = tuple(_BACKENDS)


def _is_elsewhere(name: str, x: Tensor) -> bool:
    """Whether the automatic choice skips a backend without building a reason, which took 2 µs of a call on the CPU."""
    return x.device.type == "cpu" and _BACKENDS[name].home == "cuda"


def _why_not_automatic(op: str, name: str, x: Tensor, refused: Mapping[str, str] | None) -> str | None:
    backend = _BACKENDS[name]
    if backend.elsewhere is not None and x.device.type != backend.home:
        return backend.elsewhere.format(device=x.device)
    return (
        _why_not(op, name, x.device, x.dtype) or (refused or {}).get(name) or verdicts.why_not(name, x.device)
    )


def _rejected(
    op: str, names: tuple[str, ...], x: Tensor, refused: Mapping[str, str] | None
) -> dict[str, str]:
    """The reasons why the automatic choice passed over these backends."""
    reasons = {name: _why_not_automatic(op, name, x, refused) for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


@constant_when_traced  # so that compiled code says it once, while it is traced
def _warn_slow(op: str, name: str, why: str) -> None:
    warnings.warn(f"{op} runs on the slower backend {name!r}: {why}", RuntimeWarning, stacklevel=4)


def _listed(rejected: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in rejected.items())


def _read_orders(what: answers.What, value: Any) -> answers.Orders:
    """Orders of an op's backends by size, the smallest sizes first; the last one has no limit."""
    answers.check_what(what, OPS, DTYPES)
    found = tuple((limit, answers.order(names, OPS[str(what[0])])) for limit, names in value)
    limits = [limit for limit, _ in found]
    if not limits or limits[-1] is not None or any(type(limit) is not int for limit in limits[:-1]):
        raise ValueError(f"got the limits {limits}, expected whole numbers, and null for the last one")
    if limits[:-1] != sorted(set(limits[:-1])):
        raise ValueError(f"got the limits {limits}, expected growing ones")
    return found


_process_wide = _from_environment()
answers.read_by("backends", _read_orders)
