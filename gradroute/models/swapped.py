"""The class swap: a module of an existing model becomes routed, and ordinary again, in place.

`module.__class__` is set to a subclass of the module's own class whose forward takes `routes`. Parameters, buffers,
hooks, state_dict keys and isinstance checks stay what they were; without routes the subclass calls the forward it
overrides, so that the swapped module is then the ordinary one, bit for bit.

Routes are an explicit argument from the decoder layer on down, because activation checkpointing runs a layer's forward
again in backward, when nothing else says which routes it had (context variables and patched forwards give silently
wrong gradients there). Modules whose parent passes no further arguments (the embeddings, the final norm, the head, and
the decoder layers of some models) find them in the running call of their model (`gradroute.models.calls`): `__call__`
makes them an explicit argument before any checkpoint of the module itself begins.

Others replace a module's forward too, on the instance: `gradroute.models.replaced` says what becomes of theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn

from ..layers import RoutedModule
from ..layers.module import names_of
from ..routes import Routes
from ..sites import Sites
from .calls import Call, Owner, refuse_retired, running_call
from .computed import unknown_forward
from .modules import Argument
from .patched import absorb, patch_of, patched_class, restore
from .replaced import adopt_forward, check_forward, refuse_forward_without_routes

# The attributes that a swap leaves on an instance, and takes away again.
_STATE = (
    *("_sites", "_op_sites", "backend", "_routing", "_owner", "_is_handed", "_was_routed"),
    *("_ablated_fractions", "_took_offers", "_warned_of_unrouted", "_by_expert", "_needs_same_base"),
)


class Swapped(RoutedModule):
    """Base of the mixins that route modules: a mixin and a module's own class together make the class it is given.

    Attributes:
        original: the module's class before.
        mixin: the subclass of this one that routes it.
        owns_sites: whether the module's sites concern nothing but itself, and may be assigned again.
        computes: whether it computes itself, with routes, what the original's forward does without.
    """

    original: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Swapped]]
    owns_sites: ClassVar[bool] = False
    computes: ClassVar[bool] = True
    # The routed modules of one model share it.
    _owner: Owner | None = None
    # Whether the module finds its routes in the running call, because its parent passes no arguments on.
    _is_handed: bool = False
    # Whether it ever found some. Never False again: it says nothing of a batch.
    _was_routed: bool = False
    # All that a mixin needs to know besides its sites, in a NamedTuple of its own.
    _routing: tuple[Any, ...] | None = None

    if TYPE_CHECKING:  # the module's own attributes, which its class declares

        def __getattr__(self, name: str) -> Any: ...

    @property
    def sites(self) -> Any:
        """Where the module masks, or None. A module with routed submodules handed its sites on when it was routed."""
        return self._sites

    @sites.setter
    def sites(self, sites: Sites | None) -> None:
        if "_sites" in vars(self) and not self.owns_sites:
            raise TypeError(
                f"{type(self).__name__}.sites: got sites for a module whose parts are routed with it, expected another "
                "plan: unroute() the model and route() it again"
            )
        RoutedModule.sites.fset(self, sites)  # type: ignore[attr-defined]

    @classmethod
    def members(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Members that the class made of this mixin and `original` has besides those that it inherits."""
        return {}

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        """Raises TypeError unless this mixin can route the module."""

    def swap_children(self) -> None:
        """Swaps the submodules that the module calls with routes; called once it has its own sites."""

    def __call__(self, *args: Argument, **kwargs: Argument) -> Argument:
        if not is_swapped(self):  # torch.compile keeps this method, bound, when the module is unrouted
            return type(self).__call__(self, *args, **kwargs)
        if "routes" not in kwargs and self._is_handed:
            self._take_routes(running_call(self._owner), kwargs)
        routes = kwargs.get("routes")
        if isinstance(routes, Routes):
            first = args[0] if args else None
            # Layers may be on several devices.
            if isinstance(first, Tensor) and first.device != routes.device:
                kwargs["routes"] = self._moved(routes, first.device)
        if "forward" in vars(self):
            self._meet_forward(routes)
        return super().__call__(*args, **kwargs)

    def _meet_forward(self, routes: Routes | None) -> None:
        """Deals with a forward that was put on this very module since it was routed.

        Raises:
            RuntimeError: it takes no routes, and there are some.
        """
        if patch_of(self) is not None:
            self._absorb()
        elif routes is not None:
            refuse_forward_without_routes(self)

    def _absorb(self) -> None:
        """Makes a forward of Liger's that is bound to the module that of the class from which it is swapped."""
        patch = patch_of(self)
        if patch is None or "mixin" not in type(self).__dict__:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(self).__name__}: got a forward of Liger's that was put there since the model was routed, in "
                "traced code; expected route() after that, or a first forward without torch.compile"
            )
        self.__class__ = swapped_class(self.mixin, patched_class(self.original, patch))
        vars(self).pop("forward", None)

    def _moved(self, routes: Routes, device: torch.device) -> Routes:
        routes = routes.to(device)
        return routes if self._owner is None or torch.compiler.is_compiling() else self._owner.private(routes)

    def _take_routes(self, call: Call | None, kwargs: dict[str, Argument]) -> None:
        """Makes the running call's routes an argument, if it has some."""
        if call is None:
            if self._was_routed:
                self._refuse_recomputation()
        elif call.routes is not None:
            kwargs["routes"] = call.routes
            if not self._was_routed:
                self._was_routed = True

    def _refuse_recomputation(self) -> None:
        """A checkpoint that holds this module but not the model cannot know its routes when it runs again."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(self).__name__}: got a recomputation in backward without routes, expected a checkpoint of the "
                "whole model, or the model's own activation or gradient checkpointing; a checkpoint around this "
                "module alone does not know its routes (after routed training, unroute() the model to train it without)"
            )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # The class is made at run time, so it cannot be pickled by its name.
        if type(self).__dict__.get("mixin") is None:
            return super().__reduce_ex__(protocol)
        state = vars(self).copy()
        state.pop("_compiled_call_impl", None)  # as torch.nn.Module does: it is bound to this very instance
        return _empty, (self.mixin, self.original), state


def is_swapped(module: nn.Module) -> bool:
    """Whether a module is routed."""
    return isinstance(module, Swapped)


def _empty(mixin: type[Swapped], original: type[nn.Module]) -> nn.Module:
    swapped = swapped_class(mixin, original)
    return swapped.__new__(swapped)


_CLASSES: dict[tuple[type[Swapped], type[nn.Module]], Any] = {}


def swapped_class(mixin: type[Swapped], original: type[nn.Module]) -> Any:
    """The subclass of a module's class that routes it. It keeps the name: policies of FSDP and others look for it."""
    if (mixin, original) not in _CLASSES:
        _CLASSES[mixin, original] = _make_class(mixin, original)
    return _CLASSES[mixin, original]


def _make_class(mixin: type[Swapped], original: type[nn.Module]) -> type:
    members = mixin.members(original)
    routed = members.get("forward", mixin.forward)

    def forward(self: nn.Module, *args: Argument, **kwargs: Argument) -> Argument:
        # Whoever wraps a module's forward (mixed precision, hooks, a checkpoint, torch.compile) keeps this function,
        # and may call it when the module was unrouted since: then it is the original's.
        if not torch.compiler.is_compiling():
            refuse_retired(self, kwargs.get("routes"))
            _mark_reached(self, kwargs.get("routes"))
            if mixin.computes and kwargs.get("routes") is not None:
                _refuse_patched(original)
        if not isinstance(self, swapped):
            return original.forward(self, *args, **kwargs)
        return routed(self, *args, **kwargs)

    # There is no `__wrapped__`, along which accelerate's unwrap_model would go on to the original forward.
    forward.__doc__, forward.__signature__ = routed.__doc__, inspect.signature(routed)  # type: ignore[attr-defined]
    members |= {"forward": forward, "original": original, "mixin": mixin}
    # transformers wraps the forward of a subclass of its layers when that is made: what it wraps is this function.
    swapped = type(original.__name__, (mixin, original), names_of(original) | members)
    forward.swapped = swapped  # type: ignore[attr-defined]
    swapped.forward.swapped = swapped  # type: ignore[attr-defined]
    return swapped


def _refuse_patched(original: type[nn.Module]) -> None:
    """Raises where a class was given another forward since a module of it was routed, which would not be called."""
    unknown = unknown_forward(original)
    if unknown is not None:
        raise RuntimeError(
            f"{original.__name__}: got routes for a module whose class was given the forward {unknown} since route(), "
            "which routed modules would not call; expected the class's own (a hook, or a wrapper around the forward of "
            "the module itself, is called)"
        )


def _refuse_other_class(module: nn.Module) -> None:
    """Raises where a module's class does not compute what the mixins know it for."""
    unknown = unknown_forward(type(module))
    if unknown is not None:
        raise TypeError(
            f"model: got a {type(module).__name__} whose class has the forward {unknown}, expected that of its own "
            "package, which routed modules compute themselves: take the patch or the override away, or do the same by "
            "a hook, which is called"
        )


def _mark_reached(module: nn.Module, routes: Argument) -> None:
    """Notes in the running call that the routed forward of a module runs, with routes."""
    if isinstance(routes, Routes) and isinstance(module, Swapped):
        call = running_call(module._owner)
        if call is not None:
            call.reached.add(id(module))


def swap(
    module: nn.Module,
    mixin: type[Swapped],
    sites: Sites | None,
    backend: str | None,
    routing: tuple[Any, ...] | None = None,
) -> None:
    """Makes `module` routed, in place.

    Args:
        module: a module of an existing model.
        mixin: what routes it.
        sites: where it masks.
        backend: see `gradroute.use_backend`.
        routing: what the mixin needs to know besides, in the NamedTuple that it declares.

    Raises:
        TypeError: the module is not one that the mixin can route.
        ValueError: it is routed already, or a table does not fit it.
    """
    if isinstance(module, Swapped):  # route() refuses a model that is routed already before it begins
        raise ValueError(
            f"model: got a {type(module).__name__} that is in two places of the model and is routed in the first, "
            "expected a module of its own in each"
        )
    refuse_unswappable(module)
    mixin.check_module(module)
    if mixin.computes:
        _refuse_other_class(module)
    absorb(module)
    swapped = swapped_class(mixin, type(module))
    check_forward(module, swapped)
    module.__class__ = swapped
    adopt_forward(module)
    assert isinstance(module, Swapped)
    module._routing = routing
    module.backend = backend
    module.sites = sites
    module.swap_children()


@contextmanager
def errors_name(where: str) -> Iterator[None]:
    """Puts `where` in front of the message of a TypeError or ValueError: which part of the plan it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def check_children(module: nn.Module, names: Iterable[str]) -> None:
    """Raises TypeError unless a module has submodules of these names."""
    # named_children leaves out a submodule that has two names.
    missing = [name for name in names if module._modules.get(name) is None]
    if missing:
        raise TypeError(f"got a {type(module).__name__} without {', '.join(missing)}")


def refuse_unswappable(module: nn.Module) -> None:
    """Raises where a class swap would break what was done to a module before."""
    name = type(module).__name__
    if isinstance(module, Swapped):
        raise ValueError(
            f"model: got a {name} that is routed already, expected an ordinary one; unroute() it first"
        )
    if hasattr(module, "_get_fsdp_state") or name == "FullyShardedDataParallel":
        raise TypeError(
            f"model: got a {name} that FSDP manages, expected to route the model before it is sharded"
        )
    if name == "OptimizedModule":
        raise TypeError("model: got a compiled module, expected to route the model before torch.compile")


def refuse_remade(module: nn.Module) -> None:
    """Raises where a routed module was given yet another class, which a swap back would lose."""
    if isinstance(module, Swapped) and "mixin" not in type(module).__dict__:
        raise TypeError(
            f"model: got a {type(module).__name__} that something made another class of since it was routed (FSDP2 and "
            "tensor_parallel do), expected to unroute before that"
        )


def unswap(module: nn.Module) -> None:
    """Makes a routed module ordinary again; nothing else of it changes."""
    if isinstance(module, Swapped):
        module.__class__ = type(module).original  # type: ignore[assignment]
        adopt_forward(module)
        for name in _STATE:
            vars(module).pop(name, None)
    restore(module)
