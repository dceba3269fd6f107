"""The model without its head, which others call past the routed model: TRL's fused head, Liger's fused loss."""

from __future__ import annotations

import torch

from ..routes import Routes
from .calls import open_offer, running_call
from .modules import Argument
from .top import TopModel


class BaseModel(TopModel):
    """The base model of a routed model; inside the routed model's forward it is the ordinary one.

    TRL and Liger put a forward on the instance of the whole model that calls its base model, with all arguments that
    they do not know themselves, and reads the weight of its head. Then the base model makes the routes, and everything
    in it is routed as in the routed model's own forward.
    """

    @property
    def is_part(self) -> bool:
        """Whether the plan routes the head too, which is not in the base model."""
        return bool(self._routing.beyond)

    def _forward(self, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> Argument:
        if kwargs.get("routes") is not None or running_call(self._owner) is not None:
            return type(self).original.forward(self, *args, **kwargs)
        return super()._forward(args, kwargs)

    def _routed(self, routes: Routes, kwargs: dict[str, Argument]) -> Argument:
        if self.is_part:
            raise ValueError(
                f"route_ids: got routes for a {type(self).__name__} alone, past the routed model whose "
                f"{', '.join(self._routing.beyond)} the plan routes too (TRL's fused head and Liger's fused loss read "
                "its weight); expected a plan without it, a trainer of gradroute.models.routed_trainer, or the routed "
                "model's own forward"
            )
        return super()._routed(routes, kwargs)

    def _warn_of_unrouted(self) -> None:
        """Raises where another forward stands in the place of the routed model's; else its caller meant this one."""
        assert self._owner is not None
        if "forward" not in vars(self._owner.whole() or self):
            super()._warn_of_unrouted()
        elif self.training and torch.is_grad_enabled() and open_offer(self._owner) is None:
            raise RuntimeError(
                f"{type(self).__name__}: got a forward in training mode without route_ids, past the routed model "
                "(TRL's trainers and Liger's fused loss replace its forward, and TRL's collator drops the column); "
                "expected route_ids: make the trainer by gradroute.models.routed_trainer. "
                "`with gradroute.models.unrouted(model):` trains without routes"
            )
