"""The class swap: a module of an existing model becomes routed, and ordinary again, in place.

`module.__class__` is set to a subclass of the module's own class whose forward takes `routes`. Parameters, buffers,
hooks, state_dict keys and isinstance checks stay what they were; without routes the subclass calls the forward it
overrides, so that the swapped module is then the ordinary one, bit for bit.

Routes are an explicit argument from the decoder layer on down, because activation checkpointing runs a layer's forward
again in backward, when nothing else says which routes it had (context variables and patched forwards give silently
wrong gradients there). Modules whose parent passes no further arguments (the embeddings, the final norm, the head, and
the decoder layers of some models) are handed the routes by the model for the time of its forward: `__call__` makes
them an explicit argument before any checkpoint of the module itself begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn

from ..layers import RoutedModule
from ..routes import Routes
from ..sites import Sites
from .modules import Argument

# The attributes that a swap leaves on an instance, and takes away again.
_STATE = (
    *("_sites", "_op_sites", "backend", "_routes", "_documents", "_was_routed", "_routing"),
    "_ablated_fractions",
)


class Swapped(RoutedModule):
    """Base of the mixins that route modules: a mixin and a module's own class together make the class it is given.

    Attributes:
        original: the module's class before.
        mixin: the subclass of this one that routes it.
        owns_sites: whether the module's sites concern nothing but itself, and may be assigned again.
    """

    original: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Swapped]]
    owns_sites: ClassVar[bool] = False
    _routes: Routes | None = None
    _documents: Tensor | None = None
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
        if "routes" not in kwargs:
            if self._routes is not None:
                kwargs["routes"] = self._routes
            elif self._was_routed:
                self._refuse_recomputation()
        routes = kwargs.get("routes")
        if isinstance(routes, Routes) and not torch.compiler.is_compiling():
            reached(routes).add(id(self))
        return super().__call__(*args, **kwargs)

    def hand(self, routes: Routes | None, documents: Tensor | None = None) -> None:
        """Gives the module its routes for the calls to come, until it is given others.

        Args:
            routes: the batch's routes; None: none from now on.
            documents: the bounds of the batch's documents, `cu_seq_lens_q`, for layers of models that do not pass them
                on.
        """
        self._routes = routes
        if routes is not None and not self._was_routed:
            self._was_routed = True

    def _refuse_recomputation(self) -> None:
        """A checkpoint that holds this module but not the model cannot know its routes when it runs again."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(self).__name__}: got a recomputation in backward without routes, expected a checkpoint of the "
                "whole model or of what its own activation_checkpointing_enable() covers; a checkpoint around this "
                "module alone does not know its routes (after routed training, unroute() the model to train it without)"
            )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # The class is made at run time, so it cannot be pickled by its name.
        if type(self).__dict__.get("mixin") is None:
            return super().__reduce_ex__(protocol)
        state = vars(self) | {"_routes": None, "_documents": None}
        state.pop("_compiled_call_impl", None)  # as torch.nn.Module does: it is bound to this very instance
        return _empty, (self.mixin, self.original), state


def reached(routes: Routes) -> set[int]:
    """The ids of the modules that these routes have reached, which the model looks at after its forward."""
    return routes.derived("modules reached", set)


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
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        original.__name__,
        (mixin, original),
        names | mixin.members(original) | {"original": original, "mixin": mixin},
    )


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
    refuse_unswappable(module)
    mixin.check_module(module)
    module.__class__ = swapped_class(mixin, type(module))
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
    present = dict(module.named_children())
    missing = [name for name in names if name not in present]
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
    if "forward" in vars(module):
        raise TypeError(f"model: got a {name} whose forward was replaced, expected that of its class")


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
        for name in _STATE:
            vars(module).pop(name, None)
