"""RoutedTrainer: what a trainer of transformers does besides, so that its model is trained with routes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from .calls import offering
from .collator import ALIGNMENTS, RouteCollator
from .route_columns import ROUTE_COLUMNS, RouteColumns
from .routing import routed_model

# Trainers, their arguments, their datasets and their batches, of transformers, TRL and datasets.
Argument = Any
Batch = Any

# A forward without routes that a subclass's own compute_loss calls raises this.
_DROPPED = (
    "got a forward in training mode without route_ids from compute_loss, expected the batch's: pass on "
    'route_ids=inputs["route_ids"], or call the model as model(**inputs); where a forward without routes is meant, put '
    "`with gradroute.models.unrouted(model):` around it"
)

# A mixin of trainers stands before this; mypy then asks nothing of the trainer's methods.
_Trainer: Any = object


class RoutedTrainer(_Trainer):
    """The class that `routed_trainer` puts before a trainer's class.

    Attributes:
        pairs: whether a batch has two rows an example, see `RouteColumns`.
    """

    pairs: ClassVar[bool] = False
    data_collator: Argument

    def __init__(self, *args: Argument, route_align: str = "position", **kwargs: Argument) -> None:
        if route_align not in ALIGNMENTS:
            raise ValueError(
                f"route_align: got {route_align!r}, expected one of {', '.join(map(repr, ALIGNMENTS))}"
            )
        self._route_align = route_align
        self._check(_named(super().__init__, args, kwargs))
        super().__init__(*args, **kwargs)
        routed_model(self.model)  # the one that a `model_init` made

    def _check(self, given: Mapping[str, Argument]) -> None:
        """Raises where the trainer's arguments would train without routes, before it changes anything."""
        model = given.get("model")
        if isinstance(model, str):
            raise TypeError(
                f"model: got the name {model!r}, expected a routed model: load it, then route() it"
            )
        if isinstance(model, nn.Module):
            routed_model(model)
        if given.get("peft_config") is not None:
            raise ValueError(
                "peft_config: got a configuration, expected None: a model is routed after adapters were added, so "
                "pass route(get_peft_model(model, peft_config), plan) as the model"
            )
        if isinstance(given.get("data_collator"), RouteCollator) and self._route_align != "position":
            raise ValueError(
                f"route_align: got {self._route_align!r} beside a RouteCollator, expected it as the collator's align"
            )
        self._check_columns(given.get("train_dataset"))

    def _check_columns(self, dataset: Argument) -> None:
        names = getattr(dataset, "column_names", None)
        if isinstance(names, list) and "route_ids" not in names:
            raise ValueError(
                f"train_dataset: got the columns {', '.join(names)}, expected route_ids too: of the document, or of "
                "each of its tokens"
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in ROUTE_COLUMNS if name not in self._signature_columns]

    def _get_dataloader(self, *args: Argument, **kwargs: Argument) -> Argument:
        """The trainer's loader; only batches for training have routes."""
        is_training = bool(_named(super()._get_dataloader, args, kwargs).get("is_training", False))
        collator: Argument = self.data_collator
        self.data_collator = self._with_routes(collator, is_training)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def _with_routes(self, collator: Callable[..., Batch], is_training: bool) -> Callable[..., Batch]:
        return RouteColumns(collator, align=self._route_align, routed=is_training, pairs=self.pairs)

    def training_step(self, *args: Argument, **kwargs: Argument) -> Argument:
        """The trainer's own, in which no loss of a subclass may leave the routes out."""
        with offering(routed_model(self.model)._owner, {}, _DROPPED):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Argument, **kwargs: Argument) -> Argument:
        model, inputs = self._with_given(model, *self._split(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _with_given(self, model: Argument, inputs: Batch, routes: Batch) -> tuple[Argument, Batch]:
        """The model and the inputs by which the trainer computes its loss, with the routes in one of both."""
        return model, {**inputs, **routes}

    def _split(self, inputs: Batch) -> tuple[Batch, Batch]:
        """A batch without its routes, and these; none in evaluation.

        Raises:
            RuntimeError: there are none in training.
        """
        routes = {name: inputs[name] for name in ROUTE_COLUMNS if name in inputs}
        inputs = {name: value for name, value in inputs.items() if name not in routes}
        if not self.model.training:
            return inputs, {}
        if "route_ids" not in routes:
            raise RuntimeError(
                f"route_ids: got a batch of {', '.join(inputs)} to train on, expected route_ids too: something after "
                "the collator dropped them, or made the batch without it"
            )
        return inputs, routes


def _named(
    function: Callable[..., Argument], args: tuple[Argument, ...], kwargs: Mapping[str, Argument]
) -> Mapping[str, Argument]:
    """The arguments of a call by their names; where they do not fit, the call itself says so."""
    try:
        return inspect.signature(function).bind_partial(*args, **kwargs).arguments
    except TypeError:
        return kwargs
