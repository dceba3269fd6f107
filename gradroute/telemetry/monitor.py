"""Telemetry: it measures steps of training, and reports what it measured."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import check_bool, check_choice, check_int, check_is, shown
from ..blocks import Block
from ..models.collator import ALIGNMENTS
from ..models.inspection import decoder_layers
from .arguments import (
    Optimizers,
    checked_every,
    checked_home,
    checked_modules,
    checked_names,
    checked_optimizers,
)
from .batches import BatchRoutes, RouteIds
from .hooks import Hooks
from .leakage import evaluation, leakages
from .losses import TokenLosses, check_counted, cross_entropies
from .measurement import Measurement
from .record import Record
from .regions import Regions
from .report import Writer, require_rich, rich_table, text_table, write_json_lines
from .sums import REST
from .trainer import trainer_callback

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import TrainerCallback

Batch = Mapping[str, Any]


class Telemetry:
    """Measures a routed model while it trains, every so many steps; the steps between cost nothing.

    ```python
    telemetry = Telemetry(model, ("retain", "forget"), {"forget": block}, every=10)
    for batch in batches:
        with telemetry.step(optimizer=optimizer):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(telemetry)
    ```

    A record is a flat dict of floats. These are its keys, where there was something to measure:

    - `loss/ROUTE`, `tokens/ROUTE`: the mean loss of the route's tokens, and how many tokens have a label.
    - `grad_norm/MODULE/ROUTE`, `grad_share/MODULE/ROUTE`: the norm of the gradient g that arrived at a module's output
      in the route's tokens, and its share ‖g_route‖² / Σ ‖g_q‖² over routes q: the squares of norms of different tokens
      add up, so that shares sum to one. The module "all" has the squares summed over modules, before the root. With
      several backwards a step all their tokens count; two backwards through one forward count as two gradients. Norms
      are those of the gradient as it arrives: multiplied by a GradScaler's scale (shares are not).
    - `block_grad_norm/BLOCK`, `update_norm/BLOCK`, `update_ratio/BLOCK`: the norm of `.grad` in the block just before
      the optimizer's step (after clipping), ‖p_after - p_before‖ there, and the same divided by ‖p_before‖. The block
      "rest" is all trained parameters outside of all blocks.
    - `protected/BLOCK`: whether the block's `.grad` is exactly zero (1) or not (0), where no token of the routes whose
      home is the block was in the step; where there was one, NaN.
    - `leakage/...`: see `leakage`.
    - `step`: the number of the step, counted from 0.

    A value that is not defined is NaN, such as the loss of a route without tokens and the shares of no gradient. Values
    stay on the device until somebody reads them, which waits for it.

    Neither gradients nor the forward change by a bit: module outputs get a tensor hook, which reads. There are hooks in
    measured steps only. Code that torch.compile made calls no hooks: with a compiled model give Telemetry `modules=()`,
    `step` the ids, and `losses` the logits.

    With many processes, give the inner model under DistributedDataParallel. Losses, tokens and gradients of activations
    are then those of this process's batch; parameters and `.grad`, and so all that is said of blocks, are those of all
    processes (`protected` knows the routes of this process's batch only). The leakage probe is local and does not
    communicate. Sharded parameters (DTensor) cannot be measured as blocks.

    Args:
        model: a routed model or any module.
        routes: the names of route id 0, 1, ...
        blocks: name → Block; disjoint ones.
        home: route → the block that the route's tokens are to train; default: the block of the same name.
        modules: names in `model.named_modules()` of the modules whose outputs are watched, each `[*tokens, F]`;
            default: the decoder layers ("layers.0", ...) of a model of transformers that `gradroute.models.route`
            takes, and nothing in other modules. A routed MLP or attention reads its parts instead of calling them:
            watch the whole.
        every: how many steps there are from one measured step to the next; step 0 is measured.
        align: the route to which the loss belongs that position t has in predicting the label at t + 1: "position", the
            route at t, or "next_token", the route at t + 1. Where the `align` of `gradroute.models.RouteCollator` was
            "next_token" the ids are moved already, and "position" is right here.
        rest: whether update norms of the parameters outside of all blocks are measured, which takes a copy of all
            trained parameters during the optimizer's step instead of a copy of the blocks.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: names that are not there, twice, or taken; blocks that overlap.
    """

    def __init__(
        self,
        model: nn.Module,
        routes: Sequence[str],
        blocks: Mapping[str, Block] | None = None,
        *,
        home: Mapping[str, str] | None = None,
        modules: Iterable[str] | None = None,
        every: int = 1,
        align: str = "position",
        rest: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got a {type(model).__name__}, expected a torch.nn.Module")
        self.every = checked_every(every)
        check_choice("align", align, ALIGNMENTS)
        check_bool("rest", rest)
        self.model = model
        self.routes = checked_names("routes", routes)
        if blocks is not None:
            check_is("blocks", blocks, Mapping, "a dict {name: Block}")
        blocks = dict(blocks or {})
        checked_names("blocks", list(blocks), empty=True)
        self.home = checked_home(home, self.routes, blocks)
        self.align = align
        self.rest = rest
        self._regions = Regions(model, blocks)
        self._watched = decoder_layers(model) if modules is None else checked_modules(model, modules)
        self._records: list[Record] = []
        self._steps = 0
        self._record: Record | None = None  # the record of the step that runs or ran last, if it is measured
        self._running = False
        self._measurement: Measurement | None = None
        self._hooks: Hooks | None = None

    @contextmanager
    def step(
        self, route_ids: RouteIds | None = None, *, optimizer: Optimizers | None = None
    ) -> Iterator[Record | None]:
        """One training step: everything from the forward to the optimizer's step, in a `with`.

        Args:
            route_ids: the ids of the step's batch: integers `[*tokens]` or flat `[T]`, one a sample `[B]`, or a Routes.
                With gradient accumulation call `batch` before each further forward. Ids on a GPU are not checked, which
                would wait for it; tokens whose id has no name belong to no route.
                None: ids are taken from each forward of the model, `model(..., route_ids=...)` or `routes=...`, and so
                are the losses, where the model is given `labels` and returns `logits`.
            optimizer: the optimizer whose `step` is measured, by its hooks; several are one update. None: nothing is
                said of `.grad` and updates, unless `before_update` and `after_update` are called.

        Yields:
            The step's Record, to be read after the `with`; None in a step that is not measured.

        Raises:
            TypeError: ids that are no integers, or no optimizer.
            ValueError: ids out of range, or, where they are used, of another shape than the activations.
            RuntimeError: within another step; or no watched module was called in the step.
        """
        self._begin(route_ids, optimizer)
        try:
            yield self._record
            self._finish()
        finally:
            self._stop()

    def batch(self, route_ids: RouteIds) -> None:
        """Takes the route ids of the forwards to come within a step, for each batch of gradient accumulation.

        Args:
            route_ids: see `step`.

        Raises:
            TypeError: ids that are no integers.
            ValueError: ids out of range.
            RuntimeError: outside of a step.
        """
        measurement = self._current("batch")
        if measurement is not None:
            measurement.reads_forward = False
            measurement.take(BatchRoutes(route_ids, len(self.routes)))

    def losses(self, logits: Tensor, labels: Tensor, *, shift: bool = True) -> None:
        """Adds the cross-entropy of a forward's tokens to their routes.

        Args:
            logits: `[*tokens, V]`.
            labels: `[*tokens]`, integers; -100: no loss.
            shift: whether position t predicts the label at t + 1, as in transformers' models, or the label at t.

        Raises:
            RuntimeError: outside of a step, or in one that takes ids and losses from the model's forward.
            ValueError: labels or route ids of another shape.
        """
        check_is("logits", logits, Tensor, "a torch.Tensor")
        check_is("labels", labels, Tensor, "a torch.Tensor")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels: got dtype {labels.dtype}, expected integers")
        check_bool("shift", shift)
        measurement = self._current("losses")
        if measurement is None:
            return
        if measurement.reads_forward:
            raise RuntimeError(
                "losses: got logits in a step that takes ids and losses from the model's forward, expected "
                "step(route_ids), or no call of losses"
            )
        measurement.add_logits(logits, labels, shift=shift, align=self.align)

    def token_losses(self, losses: Tensor, counted: Tensor | None = None) -> None:
        """Adds losses of any kind to the tokens' routes.

        Args:
            losses: `[*tokens]`, the loss of each token that has a route id.
            counted: bool `[*tokens]`: False leaves a token out.

        Raises:
            RuntimeError: outside of a step.
            TypeError: `counted` is not bool.
            ValueError: route ids, or `counted`, of another shape.
        """
        check_is("losses", losses, Tensor, "a torch.Tensor")
        if counted is not None:
            check_is("counted", counted, Tensor, "a tensor of dtype torch.bool or None")
        measurement = self._current("token_losses")
        if measurement is None:
            return
        losses = losses.detach()
        counted = torch.ones_like(losses, dtype=torch.bool) if counted is None else counted
        check_counted(counted, losses)
        belongs = measurement.batch_of("losses").belongs(losses.shape, losses.device, "losses")
        measurement.add_losses(TokenLosses(losses, counted, belongs))

    def before_update(self) -> None:
        """Measures `.grad` and the parameters: for loops without an optimizer whose hooks `step` can use."""
        if self._measurement is not None and self._measurement.snapshot is None:
            self._measurement.before_update(self._regions, self.rest)

    def after_update(self) -> None:
        """Measures how far the parameters moved since `before_update`."""
        if self._measurement is not None and self._measurement.snapshot is not None:
            self._measurement.after_update(self._regions)

    def leakage(
        self,
        batch: Batch,
        route_ids: RouteIds | None = None,
        *,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    ) -> dict[str, float]:
        """Measures exactly how much of each route's gradient is outside of its block, by one backward for each route.

        g_r is the gradient, by all trained parameters, of the mean loss of route r's tokens alone; ‖g_r[b]‖ is the norm
        of its elements in block b. Parameters of which no block has a piece (embeddings, norms) are shared by design:
        keys with "routed" leave them out of numerator and denominator, and keep whole the tensors of which a block has
        a piece. For every route r and its home block h:

        - `leakage/grad_norm/r`: ‖g_r‖.
        - `leakage/outside/r`: ‖g_r outside of h‖ / ‖g_r‖; `leakage/outside_routed/r` among routed parameters. Exactly 0
          where the plan confines r's tokens to h, and no other route's token is in the context that they attend to.
        - `leakage/inside/b/r`: ‖g_r[b]‖ / ‖g_r‖ for every block b; `leakage/inside_routed/b/r` likewise.
        - `leakage/protected/b`: 1 where all routes of the batch with another home have a gradient of exactly zero in b,
          else 0; NaN where b is nobody's home, or the batch has no such route.

        The values of a route without tokens are NaN. `.grad`, the state of random numbers and buffers stay as they are:
        the model runs in eval mode, without dropout. One forward is kept for all backwards. The values are also added
        to the record of the step that runs or ran last, if it was measured.

        Args:
            batch: the keyword arguments of the model, `model(**batch)` without `labels`. To see what an ordinary
                backward would do, leave the batch's `route_ids` out and give them apart.
            route_ids: the route of every token; default: `route_ids` or `routes` of the batch.
            loss: a function of the model and the batch that returns the loss of each token, `[*tokens]` of the ids;
                default: the cross-entropy of `labels`, shifted.

        Raises:
            TypeError: parameters that are sharded.
            ValueError: no ids, no labels, or shapes that do not fit.
            RuntimeError: the model checkpoints with use_reentrant=True, which cannot be differentiated so.
        """
        check_is("batch", batch, Mapping, "a dict of the model's arguments")
        if loss is not None and not callable(loss):
            raise TypeError(
                f"loss: got {shown(loss)}, expected a function of the model and the batch, or None"
            )
        ids = BatchRoutes(_ids_of(batch) if route_ids is None else route_ids, len(self.routes))
        with self._paused(), evaluation(self.model), torch.enable_grad():
            tokens = (
                self._language_losses(batch, ids)
                if loss is None
                else _own_losses(loss(self.model, batch), ids)
            )
            values = leakages(self._regions, self.routes, self.home, tokens)
        if self._record is not None:
            self._record.add(values)
        return values

    @property
    def latest(self) -> dict[str, float] | None:
        """The record of the last step; None where that step was not measured, or there was none."""
        return None if self._running or self._record is None else dict(self._record)

    @property
    def history(self) -> list[dict[str, float]]:
        """All records, the oldest first."""
        return [dict(record) for record in self._records]

    def clear(self) -> None:
        """Forgets all records, and goes on counting steps."""
        self._records.clear()

    def to_json_lines(self, path: str | os.PathLike[str]) -> None:
        """Writes the history, one JSON object a line; numbers that are not finite become null."""
        check_is("path", path, (str, os.PathLike), "a path")
        write_json_lines(path, self.history)

    def log_to(self, writer: Writer, step: int, *, prefix: str = "telemetry") -> None:
        """Writes the last step's record, if that step was measured; NaN is left out.

        Args:
            writer: anything with `add_scalar(tag, value, step)`, such as TensorBoard's SummaryWriter.
            step: the number of the step for the writer.
            prefix: the beginning of every tag, as in "telemetry/loss/forget".

        Raises:
            RuntimeError: no step was measured yet.
        """
        _check_writer(writer)
        step = check_int("step", step)
        check_is("prefix", prefix, str, "a str")
        self._last("log_to")
        for key, value in (self.latest or {}).items():
            if key != "step" and not math.isnan(value):
                writer.add_scalar(f"{prefix}/{key}", value, step)

    def table(self) -> Table:
        """The last measured step as a table of rich: a row for each measure, a column for each route and block.

        Raises:
            ImportError: rich is missing.
            RuntimeError: no step was measured yet.
        """
        require_rich()
        return rich_table(self._last("table"), self._columns())

    def __str__(self) -> str:
        if not self._records:
            return "Telemetry: no step was measured yet"
        return text_table(self._records[-1], self._columns())

    def __repr__(self) -> str:
        return (
            f"Telemetry(routes={list(self.routes)}, blocks={list(self._regions.names)}, "
            f"modules={list(self._watched)}, every={self.every}, {len(self._records)} records)"
        )

    def callback(self, writer: Writer | None = None) -> TrainerCallback:
        """A TrainerCallback for transformers' Trainer: `Trainer(..., callbacks=[telemetry.callback()])`.

        Ids and losses are taken from the model's forward. Do not call `step` in a training with this callback.

        Args:
            writer: logs every measured step, under Trainer's global step; see `log_to`.

        Raises:
            ImportError: transformers is missing.
        """
        if writer is not None:
            _check_writer(writer)
        return trainer_callback(self, writer)

    def _begin(self, route_ids: RouteIds | None = None, optimizer: Optimizers | None = None) -> None:
        """Begins a step, and hooks it where it is measured."""
        if self._running:
            raise RuntimeError("step: got a step within another one, expected one at a time")
        self._record = None
        if self._steps % self.every == 0:
            batch = None if route_ids is None else BatchRoutes(route_ids, len(self.routes))
            optimizers = checked_optimizers(optimizer)
            self._record = Record(self._steps)
            self._measurement = Measurement(len(self.routes), list(self._watched), batch is None)
            if batch is not None:
                self._measurement.take(batch)
            self._hooks = self._hooked(self._measurement, optimizers)
        self._steps += 1
        self._running = True

    def _hooked(self, measurement: Measurement, optimizers: Sequence[torch.optim.Optimizer]) -> Hooks:
        hooks = Hooks(measurement, len(self.routes), self.align)
        hooks.watch_outputs(self._watched)
        if measurement.reads_forward:
            hooks.read_forward(self.model)
        hooks.watch_updates(optimizers, self.before_update, self.after_update)
        return hooks

    def _finish(self) -> None:
        """Completes the record of a measured step."""
        if self._record is None or self._measurement is None or self._hooks is None:
            return
        if self._watched and not self._hooks.called:
            raise RuntimeError(
                f"step: got no call of {', '.join(self._watched)}, expected a forward within the step (compiled code "
                "calls no hooks: with a compiled model give Telemetry modules=())"
            )
        homes = {
            block: [self.routes.index(route) for route in self.home if self.home[route] == block]
            for block in self._regions.names
        }
        self._record.fill(self._measurement.results(self.routes, self._regions.names, homes, self.rest))
        self._records.append(self._record)

    def _stop(self) -> None:
        """Takes the hooks away, and drops a record that is not complete."""
        if self._hooks is not None:
            self._hooks.remove()
        if self._record is not None and not self._record.is_complete:
            self._record = None
        self._measurement = self._hooks = None
        self._running = False

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Lets the hooks of a step that runs ignore what they see."""
        hooks = self._hooks
        if hooks is None:
            yield
            return
        hooks.is_paused = True
        try:
            yield
        finally:
            hooks.is_paused = False

    def _current(self, what: str) -> Measurement | None:
        """The measurement of the step that runs; None where the step is not measured."""
        if not self._running:
            raise RuntimeError(
                f"{what}: got a call outside of a step, expected it within `with telemetry.step(...)`"
            )
        return self._measurement

    def _last(self, what: str) -> Record:
        if not self._records:
            raise RuntimeError(f"{what}: got no measured step yet, expected one: `with telemetry.step(...)`")
        return self._records[-1]

    def _columns(self) -> tuple[str, ...]:
        """The columns of a table, in their order."""
        return *self.routes, *self._regions.names, REST

    def _language_losses(self, batch: Batch, ids: BatchRoutes) -> TokenLosses:
        """The shifted cross-entropy of a batch's labels."""
        if batch.get("labels") is None:
            raise ValueError("batch: got no labels, expected them, or a function loss(model, batch)")
        output = self.model(**{name: value for name, value in batch.items() if name != "labels"})
        return cross_entropies(output.logits, batch["labels"], ids, shift=True, align=self.align)


def _check_writer(writer: object) -> None:
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"writer: got {shown(writer)}, expected one with add_scalar(tag, value, step)")


def _ids_of(batch: Batch) -> RouteIds:
    """The route ids in a batch."""
    for name in ("route_ids", "routes"):
        if batch.get(name) is not None:
            return batch[name]
    raise ValueError("route_ids: got None and a batch without route_ids, expected the route of every token")


def _own_losses(losses: Tensor, ids: BatchRoutes) -> TokenLosses:
    """The losses `[*tokens]` that a function of the user's returned; all of them count."""
    counted = torch.ones_like(losses, dtype=torch.bool)
    return TokenLosses(losses, counted, ids.belongs(losses.shape, losses.device, "loss"))
