"""Calls: the forwards of routed models that are running in this thread, and the routes that wait for the next ones.

Nothing of a batch is kept on a module, where two threads, or two forwards of which one runs inside the other, would mix
their batches. A module whose parent passes no further arguments on (the embeddings, the final norm, the head, and the
decoder layers of some models) looks for its routes in the innermost call of its own model. The calls are kept in a
threading.local, which torch.compile can trace and guards on; a context variable would break the graph.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..routes import Routes


def _nothing() -> None:
    return None


class Owner:
    """An identity that the modules of one routed model have in common: by it a module knows the calls of its own model.

    Attributes:
        handed: the routes of forwards whose graphs or checkpoints may still be alive, one private object a forward.
        whole: gives the routed model, or None where it was not said.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.handed: weakref.WeakSet[Routes] = weakref.WeakSet()
        self.whole: Callable[[], nn.Module | None] = _nothing if model is None else weakref.ref(model)

    def private(self, routes: Routes) -> Routes:
        """The same routes as an object of one forward alone, which lives as long as its graph or checkpoint does."""
        mine = routes.alias()
        if torch.is_grad_enabled():
            self.handed.add(mine)
        return mine

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        # The model's copy has been begun, if it is copied.
        memo[id(self)] = copy = Owner(memo.get(id(self.whole())))
        return copy

    def __reduce__(self) -> tuple[type[Owner], tuple[()]]:
        return Owner, ()


class Call:
    """A forward of a routed model that is running.

    Attributes:
        owner: the model's.
        routes: the batch's routes; None: the forward is unrouted.
        documents: the bounds of the batch's documents, `cu_seq_lens_q`, for layers of models that do not pass them on.
        reached: the ids of the modules that routes have reached in this call.
        outer: the call inside which this one runs.
    """

    def __init__(
        self, owner: Owner, routes: Routes | None, documents: Tensor | None, outer: Call | None
    ) -> None:
        self.owner = owner
        self.routes = routes
        self.documents = documents
        self.reached: set[int] = set()
        self.outer = outer


class Offer:
    """Routing arguments that wait for the forwards of one model; none: these forwards are unrouted, or refused.

    Attributes:
        owner: the model's.
        arguments: `route_ids`, `route_strength` and `routes`, those that were given.
        refusal: what a forward that trains without routes raises; None: it is meant.
        taken: whether a forward took them.
        outer: the offer inside which this one was made.
        is_open: whether its block has not ended.
        is_of_task: whether an asyncio task made it, in which alone it waits, and in those that the task begins.
    """

    def __init__(
        self, owner: Owner, arguments: dict[str, Any], refusal: str | None, outer: Offer | None
    ) -> None:
        self.owner = owner
        self.arguments = arguments
        self.refusal = refusal
        self.taken = False
        self.outer = outer
        self.is_open = True
        self.is_of_task = not torch.compiler.is_compiling() and asyncio._get_running_loop() is not None


# The offers of this asyncio task, and those that the task had which began it. Tasks take turns in one thread, so that
# their blocks are not nested there.
_OF_TASK: ContextVar[tuple[Offer, ...]] = ContextVar("gradroute_offers", default=())

_THREAD = threading.local()


def running_call(owner: Owner | None) -> Call | None:
    """The innermost call of a model that is running in this thread."""
    call: Call | None = getattr(_THREAD, "call", None)
    while call is not None and call.owner is not owner:
        call = call.outer
    return call


def routed_calls() -> int:
    """How many calls with routes this thread has made."""
    return getattr(_THREAD, "routed", 0)


@contextmanager
def running(owner: Owner, routes: Routes | None, documents: Tensor | None = None) -> Iterator[Call]:
    """A call, for the time of a forward."""
    outer: Call | None = getattr(_THREAD, "call", None)
    call = Call(owner, routes, documents, outer)
    _THREAD.call = call
    if routes is not None and not torch.compiler.is_compiling():
        _THREAD.routed = routed_calls() + 1
    try:
        yield call
    finally:
        _THREAD.call = outer


def open_offer(owner: Owner | None) -> Offer | None:
    """The offer that waits for the forwards of a model in this thread."""
    offer: Offer | None = getattr(_THREAD, "offer", None)
    while offer is not None and not (offer.owner is owner and offer.is_open and _waits_here(offer)):
        offer = offer.outer
    return offer


def _waits_here(offer: Offer) -> bool:
    """Whether an offer is that of the running task, or of one that began it."""
    return not offer.is_of_task or torch.compiler.is_compiling() or offer in _OF_TASK.get()


@contextmanager
def offering(owner: Owner, arguments: dict[str, Any], refusal: str | None = None) -> Iterator[Offer]:
    """An offer, for the time of a `with` block.

    Raises:
        RuntimeError: at the end of the block, where one that began inside it, for the same model, has not ended.
    """
    offer = Offer(owner, arguments, refusal, getattr(_THREAD, "offer", None))
    _THREAD.offer = offer
    if offer.is_of_task:
        _OF_TASK.set((*(one for one in _OF_TASK.get() if one.is_open), offer))
    try:
        yield offer
        if open_offer(owner) not in (offer, None):
            raise RuntimeError(
                "routing: got the end of a block in which another one of the same model began that is still open, as "
                "in generators that take turns: forwards of one took the other's routes; expected blocks that end in "
                "the block in which they began, or route_ids as an argument of the forward"
            )
    finally:
        offer.is_open = False
        last: Offer | None = getattr(_THREAD, "offer", None)
        while last is not None and not last.is_open:
            last = last.outer
        _THREAD.offer = last


# The routes of forwards of models that were unrouted since, whose graphs or checkpoints are alive.
_RETIRED: weakref.WeakSet[Routes] = weakref.WeakSet()


def refuse_retired(module: nn.Module, routes: object) -> None:
    """Raises where a checkpoint runs again in backward with the routes of a model that was unrouted since."""
    if _RETIRED and isinstance(routes, Routes) and routes in _RETIRED:
        raise RuntimeError(
            f"{type(module).__name__}: got a recomputation in backward of a forward that was routed, expected backward "
            "before unroute(): the routes of that forward have no meaning any more"
        )


class _RefuseRetired:
    """A hook before the forward of a module that was unrouted, for as long as graphs of routed forwards are alive.

    transformers up to 5.20 checkpoints `__call__`: then the forward is looked up again in backward, and an ordinary
    one takes the routes for arguments of its own and drops them.
    """

    handle: RemovableHandle

    def __init__(self, owner: Owner) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_retired(module, kwargs.get("routes"))
        if not self.owner.handed:
            self.handle.remove()


def retire(owner: Owner, modules: Iterable[nn.Module]) -> None:
    """Says that a model was unrouted: checkpoints of its forwards must not run again in these modules."""
    _RETIRED.update(owner.handed)
    for module in modules if owner.handed else ():
        hook = _RefuseRetired(owner)
        hook.handle = module.register_forward_pre_hook(hook, with_kwargs=True)
