"""The whole model: takes `route_ids`, makes the batch's Routes of them, and sees to it that they arrive."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import as_tensor
from ..routes import Routes
from ..sites import Sites
from .architectures import submodule
from .attention_function import document_bounds, structured_mask
from .calls import offering, open_offer, routed_calls, running
from .lora import is_adapter
from .modules import Argument
from .plan import RoutingPlan
from .replaced import hides_forward
from .swapped import Swapped, is_swapped

# The arguments that a routed model's forward takes besides the ordinary one's.
ROUTING_ARGUMENTS = ("route_ids", "route_strength", "routes")


class UnroutedWarning(RuntimeWarning):
    """A routed model is trained without routes."""


class ModelRouting(NamedTuple):
    """The routing of a TopModel.

    Attributes:
        plan: the plan by which the model is routed.
        has_handed: whether there are modules that find their routes in the running call.
        expected: the modules that routes must reach, by name.
        everywhere: see AttentionRouting.
        passes_routes: whether the model hands further arguments on to its decoder layers.
        beyond: the names of modules that routes must reach and that are not in this part of the model, see BaseModel.
    """

    plan: RoutingPlan
    has_handed: bool
    expected: tuple[tuple[str, Swapped], ...]
    everywhere: bool
    passes_routes: bool
    beyond: tuple[str, ...] = ()


class TopModel(Swapped):
    """A model whose forward takes routes: `model(input_ids, labels=..., route_ids=..., route_strength=...)`.

    Attributes:
        argument_names: the arguments of the ordinary forward.
        takes_cache: whether the ordinary forward takes `use_cache`.
    """

    sites_type = Sites  # it masks nothing itself
    computes = False
    argument_names: ClassVar[tuple[str, ...]]
    takes_cache: ClassVar[bool]
    _routing: ModelRouting
    # Whether ablate() scaled by weights other than 0 and 1, which it may not do twice.
    _ablated_fractions: bool = False
    # Whether a forward ever found its routes in routing(); whether the model warned of a forward without any.
    _took_offers: bool = False
    _warned_of_unrouted: bool = False

    @classmethod
    def members(cls, original: type[nn.Module]) -> dict[str, Any]:
        """A forward with the ordinary one's signature and the routing arguments: Trainer keeps only named columns."""

        def forward(self: TopModel, *args: Argument, **kwargs: Argument) -> Argument:
            return self._forward(args, kwargs)

        forward.__doc__ = original.forward.__doc__
        forward.__signature__ = _signature(original.forward)  # type: ignore[attr-defined]
        parameters = inspect.signature(original.forward).parameters.values()
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        names = _argument_names(original)
        return {
            "forward": forward,
            "argument_names": names,
            "takes_cache": takes_more or "use_cache" in names,
        }

    def __call__(self, *args: Argument, **kwargs: Argument) -> Argument:
        if not is_swapped(self):  # torch.compile keeps this method, bound, when the model is unrouted
            return type(self).__call__(self, *args, **kwargs)
        given = [name for name in ROUTING_ARGUMENTS if kwargs.get(name) is not None]
        if not given or torch.compiler.is_compiling() or not hides_forward(self):
            return super().__call__(*args, **kwargs)
        before = routed_calls()
        output = super().__call__(*args, **kwargs)
        if routed_calls() == before:
            raise RuntimeError(
                f"{', '.join(given)}: got routes for a model whose forward was replaced since route(), by one that "
                "drops what it does not know; expected unroute(), the replacement, and route() then"
            )
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "forward":
            self._absorb()  # at once: what wraps the forward later then wraps the routed one

    def _sites_of_ops(self, sites: Sites) -> tuple[()]:
        return ()

    @property
    def routing_plan(self) -> RoutingPlan:
        """The plan by which the model is routed."""
        return self._routing.plan

    def _forward(self, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> Argument:
        names = self.argument_names
        self._refuse_misspelt(kwargs)
        given = {name: kwargs.pop(name, None) for name in ROUTING_ARGUMENTS}
        if all(value is None for value in given.values()):
            given = self._offered()
        if all(value is None for value in given.values()):
            return self._unrouted(args, kwargs)
        if "_routing" not in vars(self):
            raise TypeError(
                f"route_ids: got ids for a {type(self).__name__} that route() never saw; route it first"
            )
        kwargs.update(zip(names, args, strict=False))
        tokens = _tokens(kwargs)
        routes = self._routes_of(tokens, **given)
        self._refuse_cache(kwargs)
        self._refuse_beside_routes(kwargs)
        if self._routing.everywhere and "attention_mask" in names:  # nanoGPT has no masks
            _structure(kwargs, tokens)
        elif kwargs.get("cu_seq_lens_q") is not None and kwargs.get("position_ids") is None:
            raise ValueError(
                "cu_seq_lens_q: got bounds of documents without position_ids, by which the model's own attention keeps "
                "them apart; expected both, as RouteCollator(packed=True) gives them"
            )
        return self._routed(routes, kwargs)

    def _offered(self) -> dict[str, Argument]:
        """The routing arguments that wait for this forward; see `routing`."""
        offer = open_offer(self._owner)
        if (self._took_offers or (offer is not None and offer.arguments)) and _is_recomputed():
            raise RuntimeError(
                f"{type(self).__name__}: got a recomputation in backward of a forward inside routing(), expected a "
                "checkpoint of the layers (the model's own activation or gradient checkpointing): a checkpoint around "
                "the whole model knows its arguments alone, so give it route_ids as one"
            )
        arguments = dict.fromkeys(ROUTING_ARGUMENTS)
        if offer is None or not offer.arguments:
            return arguments
        offer.taken = True
        if not self._took_offers:
            self._took_offers = True
        return arguments | offer.arguments

    def _unrouted(self, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> Argument:
        forward = type(self).original.forward
        self._refuse_unrouted()
        if self._owner is None or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        self._warn_of_unrouted()
        # A call without routes: in a checkpoint of the whole model, no module of it lacks its routes.
        with running(self._owner, None):
            return forward(self, *args, **kwargs)

    def _refuse_unrouted(self) -> None:
        """Raises in a routed trainer, which trains with routes or not at all."""
        if not (self.training and torch.is_grad_enabled()):
            return
        offer = open_offer(self._owner)
        if offer is not None and offer.refusal is not None:
            raise RuntimeError(f"{type(self).__name__}: {offer.refusal}")

    def _warn_of_unrouted(self) -> None:
        """Warns once of training without routes, which a collator that drops columns brings about."""
        if self._warned_of_unrouted or not (self.training and torch.is_grad_enabled()):
            return
        if open_offer(self._owner) is not None:
            return  # unrouted()
        self._warned_of_unrouted = True
        warnings.warn(
            f"{type(self).__name__}: got a forward in training mode without route_ids, in which every token trains "
            "every parameter (a collator may have dropped the column); expected route_ids or routes, or "
            "unrouted(model) around it where that is meant",
            UnroutedWarning,
            stacklevel=11,
        )

    def _routed(self, routes: Routes, kwargs: dict[str, Argument]) -> Argument:
        assert self._owner is not None
        forward = type(self).original.forward
        is_compiling = torch.compiler.is_compiling()
        self._call_head(kwargs)
        if not is_compiling:
            routes = self._owner.private(routes)
        if self._routing.passes_routes:
            kwargs["routes"] = routes
        if is_compiling and not self._routing.has_handed:
            # A checkpoint of the whole model may be traced, which allows no side effects.
            return forward(self, **kwargs)
        with running(self._owner, routes, kwargs.get("cu_seq_lens_q")) as call:
            output = forward(self, **kwargs)
        if not is_compiling:
            self._check_reached(call.reached)
        return output

    def _call_head(self, kwargs: dict[str, Argument]) -> None:
        """Asks Liger's forward to call the head where that is routed: its fused loss reads the weight instead."""
        if all(name != "lm_head" for name, _ in self._routing.expected):
            return
        is_compiling = torch.compiler.is_compiling()
        # The class may have been given another forward since.
        names = self.argument_names if is_compiling else _argument_names(type(self).original)
        if "skip_logits" not in names:
            return
        if kwargs.get("skip_logits"):
            raise ValueError(
                "skip_logits: got True beside routes, expected False: the plan routes the head, which a fused loss "
                "does not call"
            )
        kwargs["skip_logits"] = False

    def _routes_of(
        self, tokens: Tensor, route_ids: Argument, route_strength: Argument, routes: Routes | None
    ) -> Routes:
        num_routes = self.routing_plan.num_routes
        if routes is None:
            routes = _made_routes(route_ids, route_strength, num_routes).to(tokens.device)
        elif route_ids is not None or route_strength is not None:
            raise ValueError("routes: got routes beside route_ids or route_strength, expected one of both")
        elif not isinstance(routes, Routes):
            raise TypeError(
                f"routes: got a {type(routes).__name__}, expected gradroute.Routes; raw ids are given as "
                "route_ids, or made one by gradroute.Routes.of(ids, num_routes)"
            )
        if routes.num_routes != num_routes:
            raise ValueError(
                f"routes: got {routes.num_routes} routes, expected the plan's num_routes = {num_routes}"
            )
        shape = tuple(tokens.shape[:2])
        if routes.shape != shape:
            raise ValueError(
                f"route_ids: got shape {list(routes.shape)}, expected that of the tokens {list(shape)}"
            )
        return routes

    def _refuse_misspelt(self, kwargs: dict[str, Argument]) -> None:
        """Models of transformers take any keyword and drop what they do not know."""
        for name in kwargs:
            if name not in (*self.argument_names, *ROUTING_ARGUMENTS) and _is_misspelt(name):
                raise TypeError(
                    f"forward() got an unexpected keyword argument {name!r}; expected one of "
                    f"{', '.join(ROUTING_ARGUMENTS)}"
                )

    def _refuse_cache(self, kwargs: dict[str, Argument]) -> None:
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise ValueError(
                "past_key_values, use_cache: got a cache beside routes, expected none: routes are for training; "
                "generate without them"
            )
        if self.takes_cache:
            kwargs["use_cache"] = False

    def _refuse_beside_routes(self, kwargs: dict[str, Argument]) -> None:
        """Raises where an argument asks for what routed modules do not do."""
        plan = self.routing_plan
        wants_attentions = kwargs.get("output_attentions")
        if wants_attentions is None:
            wants_attentions = getattr(getattr(self, "config", None), "output_attentions", False)
        if self._routing.everywhere and wants_attentions:
            raise ValueError(
                "output_attentions: got True beside routes, expected False: routed attention makes no probabilities"
            )
        if plan.embedding is not None and kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "inputs_embeds: got embeddings beside routes, expected input_ids: the plan routes the embedding"
            )
        kept = kwargs.get("logits_to_keep")
        if plan.lm_head is not None and (isinstance(kept, Tensor) or kept):
            raise ValueError(
                f"logits_to_keep: got {kept} beside routes, expected 0: the plan routes the head, at every position"
            )
        if kwargs.get("encoder_hidden_states") is not None:
            raise ValueError(
                "encoder_hidden_states: got a tensor beside routes, expected None: no cross-attention"
            )

    # Dynamo must see this and not trace it: where FSDP2 breaks the graph, Dynamo would trace it by itself, and cannot.
    @torch.compiler.disable(recursive=False)
    def _check_reached(self, seen: set[int]) -> None:
        if torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
            return  # parts of the forward were compiled, and compiled code leaves no marks
        missing = [
            name
            for name, module in self._routing.expected
            if (id(module) not in seen and not self._is_compiled(name)) or self._is_adapted(name)
        ]
        if missing:
            raise RuntimeError(
                f"route_ids: got routes that did not reach {', '.join(missing)}: something replaced or wraps them "
                "since the model was routed (nn.DataParallel does; use DistributedDataParallel); expected route() "
                "after that"
            )

    def _is_compiled(self, name: str) -> bool:
        """Whether a module runs as a part of one that was compiled by itself."""
        names = name.split(".")
        around = [submodule(self, ".".join(names[:depth])) for depth in range(1, len(names) + 1)]
        return any(
            getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
            or type(module).__name__ == "OptimizedModule"
            for module in around
        )

    def _is_adapted(self, name: str) -> bool:
        """Whether an adapter stands around a routed module, which then still is reached, unlike the adapter."""
        module = submodule(self, name)
        return is_adapter(module) and not isinstance(module, Swapped)

    def generate(self, *args: Argument, **kwargs: Argument) -> Argument:
        """The ordinary generation, which is unrouted.

        Raises:
            TypeError: it is given routes.
        """
        wrong = [name for name in ROUTING_ARGUMENTS if kwargs.get(name) is not None]
        if wrong:
            raise TypeError(f"generate() got {', '.join(wrong)}, expected none: generation is unrouted")
        for name in ROUTING_ARGUMENTS:
            kwargs.pop(name, None)
        if self._owner is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with offering(self._owner, {}):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def _is_recomputed() -> bool:
    """Whether this runs in a backward: a checkpoint's forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.compiler.assume_constant_result  # Dynamo cannot trace difflib
def _is_misspelt(name: str) -> bool:
    is_close = bool(difflib.get_close_matches(name, ROUTING_ARGUMENTS, 1, 0.75))
    return is_close or any(word in name.lower() for word in ("rout", "strength"))


def _made_routes(route_ids: Argument, route_strength: Argument, num_routes: int) -> Routes:
    if route_ids is None:
        raise ValueError("route_ids: got None beside route_strength, expected the route of every token")
    try:
        if not isinstance(route_ids, Tensor):
            route_ids = as_tensor(route_ids, "integers in rows of one length")
        if isinstance(route_strength, Tensor):  # a 0-dim one may be written to later, so it is not moved
            route_ids = route_ids.to(route_strength.device)
        return Routes.of(route_ids, num_routes, route_strength)
    except (TypeError, ValueError) as error:
        # Routes.of names its own arguments, ids and strength.
        message = f"route_{error}"
        known = message.startswith(("route_ids", "route_strength"))
        raise type(error)(message if known else f"route_ids: {error}") from None


def _structure(kwargs: dict[str, Argument], tokens: Tensor) -> None:
    """Puts masks in the form that routed attention takes: padding of keys, and bounds of documents."""
    shape = tuple(tokens.shape[:2])
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if kwargs.get("cu_seq_lens_q") is not None:
        kwargs["cu_seq_lens_q"] = kwargs["cu_seq_lens_q"].to(torch.int32)
    elif positions is not None and mask is None:
        kwargs["cu_seq_lens_q"] = document_bounds(positions, shape)
    kwargs["attention_mask"] = structured_mask(mask, shape, tokens.device)


def _tokens(kwargs: dict[str, Argument]) -> Tensor:  # [B, S] or [B, S, d_model]
    for name in ("input_ids", "inputs_embeds", "idx"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    first = next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
    if first is None or first.dim() < 2:
        raise ValueError("input_ids: got None, expected the tokens [B, S] beside routes")
    return first


def _argument_names(original: type[nn.Module]) -> tuple[str, ...]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind in named)


def _signature(forward: Callable[..., Argument]) -> inspect.Signature:
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ROUTING_ARGUMENTS
    ]
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=parameters[:at] + extra + parameters[at:])
