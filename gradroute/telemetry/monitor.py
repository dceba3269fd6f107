"""Telemetry: which steps are measured, what of them, and what is said of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attention import AttentionSites
from ..blocks import Block
from ..layers import RoutedModule
from ..mlp import MLPSites
from ..models.architectures import ARCHITECTURES, submodule
from ..models.collator import ALIGNMENTS
from ..models.routing import inner_model
from .measurement import BatchRoutes, Measurement
from .record import Record
from .regions import Regions
from .sums import ALL, IGNORED_LABEL, REST, wide

if TYPE_CHECKING:
    from rich.table import Table

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

    A record is a flat dict of floats. Its keys, grouped by what was there to measure:

    - `loss/ROUTE`, `tokens/ROUTE`: the mean loss of the route's tokens, and how many tokens have a label.
    - `grad_norm/MODULE/ROUTE`, `grad_share/MODULE/ROUTE`: of the gradient g that arrived at a module's output, the norm
      of the route's tokens, and its share ‖g_route‖² / Σ ‖g_q‖² over routes q: the squares of norms of different tokens
      add up, so that shares sum to one. Summed over modules, before the root, under the name "all". With several
      backwards a step all their tokens count; two backwards through one forward count as two gradients. Norms are of
      the gradient as it arrives: multiplied by a GradScaler's scale (shares are not).
    - `block_grad_norm/BLOCK`, `update_norm/BLOCK`, `update_ratio/BLOCK`: of the block's elements, `.grad` just before
      the optimizer's step (after clipping), ‖p_after - p_before‖, and the same divided by ‖p_before‖. "rest" is all
      trained parameters outside of all blocks.
    - `protected/BLOCK`: where no token of the routes whose home is the block was in the step, whether its `.grad` is
      exactly zero (1) or not (0); where there was one, NaN.
    - `leakage/...`: see `leakage`.
    - `step`: which step it was, counted from 0.

    NaN is what is not defined: the loss of a route without tokens, shares of no gradient. Values stay on the device
    until somebody reads them, which waits for it.

    Neither gradients nor the forward change by a bit: module outputs get a tensor hook, which reads. Hooks are there
    in measured steps only. Code that torch.compile made calls none: with a compiled model give `modules=()` here,
    `step` the ids, and `losses` the logits.

    Many processes: under DistributedDataParallel give the inner model. Losses, tokens and gradients of activations are
    then of this process's batch; parameters, `.grad` and so all of blocks are those of all processes (`protected` knows
    of the routes of this process's batch only). The leakage probe is local and does not communicate. Sharded parameters
    (DTensor) cannot be measured as blocks.

    Args:
        model: a routed model or any module.
        routes: the routes' names: that of route id 0, 1, ...
        blocks: name → Block; disjoint.
        home: route → block: whose tokens are to train which block; default: those of the same name.
        modules: names in `model.named_modules()` of the modules whose outputs are watched, each `[*tokens, F]`;
            default: the decoder layers ("layers.0", ...) of a model of transformers that `gradroute.models.route`
            takes, none of other modules. Parts of a routed MLP or attention are read and not called: watch the whole.
        every: measure step 0 and every so many after it.
        align: whose loss it is that position t has in predicting the label at t + 1: "position", that of the route id
            at t, or "next_token", that of the id at t + 1. Where the `align` of `gradroute.models.RouteCollator` was
            "next_token" the ids are moved already, and "position" is right here.
        rest: whether update norms of the parameters outside of all blocks are measured, which takes a copy of all
            trained parameters during the optimizer's step instead of one of the blocks.

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
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: got {every!r}, expected a number of steps, 1 or more")
        if align not in ALIGNMENTS:
            raise ValueError(f"align: got {align!r}, expected one of {', '.join(map(repr, ALIGNMENTS))}")
        self.model = model
        self.routes = _checked_names("routes", routes)
        blocks = dict(blocks or {})
        _checked_names("blocks", list(blocks), empty=True)
        self.home = _checked_home(home, self.routes, blocks)
        self.every = every
        self.align = align
        self.rest = rest
        self._regions = Regions(model, blocks)
        self._watched = _decoder_layers(model) if modules is None else _named_modules(model, modules)
        self._records: list[Record] = []
        self._steps = 0
        self._record: Record | None = None  # of the step that runs or ran last, if that is measured
        self._running = False
        self._measurement: Measurement | None = None
        self._probing = False

    @contextmanager
    def step(
        self, route_ids: Any = None, *, optimizer: torch.optim.Optimizer | Sequence[Any] | None = None
    ) -> Iterator[Record | None]:
        """One training step: everything from the forward to the optimizer's step, in a `with`.

        Args:
            route_ids: of the step's batch: integers `[*tokens]` or flat `[T]`, one a sample `[B]`, or a Routes. With
                gradient accumulation call `batch` before each further forward. Ids on a GPU are not checked, which
                would wait for it; tokens of ids without a name belong to no route.
                None: they are taken from each forward of the model, `model(..., route_ids=...)` or `routes=...`, and so
                are the losses, where it is given `labels` and returns `logits`.
            optimizer: whose `step` is measured, by its hooks; several are one update. None: nothing of `.grad` and
                updates, unless `before_update` and `after_update` are called.

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

    def batch(self, route_ids: Any) -> None:
        """The route ids of the forwards to come within a step, as for `step`: for each batch of gradient accumulation.

        Raises:
            TypeError: ids that are no integers.
            ValueError: ids out of range.
            RuntimeError: outside of a step.
        """
        measurement = self._current("batch")
        if measurement is not None:
            measurement.reads_forward = False
            measurement.take(self._batch(route_ids))

    def losses(self, logits: Tensor, labels: Tensor, *, shift: bool = True) -> None:
        """Adds the cross-entropy of a forward's tokens to their routes.

        Args:
            logits: `[*tokens, V]`.
            labels: `[*tokens]`, integers; -100: no loss.
            shift: whether position t predicts the label at t + 1, as transformers' models do; False: its own.

        Raises:
            RuntimeError: outside of a step, or in one that takes ids and losses from the model's forward.
            ValueError: labels or route ids of another shape.
        """
        measurement = self._current("losses")
        if measurement is None:
            return
        if measurement.reads_forward:
            raise RuntimeError(
                "losses: got logits in a step that takes ids and losses from the model's forward, expected "
                "step(route_ids), or no call of losses"
            )
        self._add_losses(measurement, logits, labels, shift)

    def token_losses(self, losses: Tensor, counted: Tensor | None = None) -> None:
        """Adds losses of any kind to the tokens' routes.

        Args:
            losses: one of each token, `[*tokens]` of the route ids.
            counted: bool `[*tokens]`: False leaves a token out.

        Raises:
            RuntimeError: outside of a step.
            TypeError: `counted` is not bool.
            ValueError: route ids, or `counted`, of another shape.
        """
        measurement = self._current("token_losses")
        if measurement is None:
            return
        losses = losses.detach()
        counted = torch.ones_like(losses, dtype=torch.bool) if counted is None else counted
        if not isinstance(counted, Tensor) or counted.dtype != torch.bool:
            got = f"dtype {counted.dtype}" if isinstance(counted, Tensor) else f"a {type(counted).__name__}"
            raise TypeError(f"counted: got {got}, expected a tensor of dtype torch.bool")
        if counted.shape != losses.shape:
            raise ValueError(
                f"counted: got shape {list(counted.shape)}, expected that of losses, {list(losses.shape)}"
            )
        belongs = measurement.batch_of("losses").belongs(losses.shape, losses.device, "losses")
        measurement.add_losses(losses, counted, belongs)

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
        route_ids: Any = None,
        *,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    ) -> dict[str, float]:
        """How much of each route's gradient is outside of its block, exactly: a probe, one backward for each route.

        g_r is the gradient, by all trained parameters, of the mean loss of route r's tokens alone; ‖g_r[b]‖ is the norm
        of its elements in block b. The joint parameters, of which no block has a piece (embeddings, norms), are shared
        by design: "routed" leaves them out, of numerator and denominator, and keeps whole the tensors that a block has
        a piece of. For every route r, and h its home block:

        - `leakage/grad_norm/r`: ‖g_r‖.
        - `leakage/outside/r`: ‖g_r outside of h‖ / ‖g_r‖; `leakage/outside_routed/r` among routed parameters. Exactly 0
          where the plan confines r's tokens to h, and no other route's token is in the context that they attend to.
        - `leakage/inside/b/r`: ‖g_r[b]‖ / ‖g_r‖ for every block b; `leakage/inside_routed/b/r` likewise.
        - `leakage/protected/b`: whether all routes of the batch whose home b is not have a gradient of exactly zero
          there: 1 or 0; NaN where b is nobody's home, or no such route is there.

        A route without tokens has NaN. `.grad`, the state of random numbers and buffers stay as they are: the model
        runs in eval mode, without dropout. One forward is kept for all backwards. The values are also added to the
        record of the step that runs or ran last, if it was measured.

        Args:
            batch: what the model is called with: `model(**batch)`, but for `labels`. To see what an ordinary backward
                would do, leave its `route_ids` out and give them apart.
            route_ids: default: those of the batch.
            loss: a function of the model and the batch that returns the loss of each token, `[*tokens]` of the ids;
                default: the cross-entropy of `labels`, shifted.

        Raises:
            TypeError: parameters that are sharded.
            ValueError: no ids, no labels, or shapes that do not fit.
            RuntimeError: the model checkpoints with use_reentrant=True, which cannot be differentiated so.
        """
        if route_ids is None:
            route_ids = next(
                (batch[name] for name in ("route_ids", "routes") if batch.get(name) is not None), None
            )
        if route_ids is None:
            raise ValueError(
                "route_ids: got None and a batch without route_ids, expected the route of every token"
            )
        ids = self._batch(route_ids)
        with self._probe(), torch.enable_grad():
            if loss is None:
                losses, counted, belongs = self._language_losses(batch, ids)
            else:
                losses = loss(self.model, batch)
                counted = torch.ones_like(losses, dtype=torch.bool)
                belongs = ids.belongs(losses.shape, losses.device, "loss")
            values = self._leakages(losses, belongs & counted)
        if self._record is not None:
            self._record._values.update(values)
        return values

    @property
    def latest(self) -> dict[str, float] | None:
        """What the last step measured; None where it was not measured, or there was none."""
        return None if self._running or self._record is None else dict(self._record)

    @property
    def history(self) -> list[dict[str, float]]:
        """All records, the oldest first."""
        return [dict(record) for record in self._records]

    def clear(self) -> None:
        """Forgets all records; steps are counted on."""
        self._records.clear()

    def to_json_lines(self, path: str | os.PathLike[str]) -> None:
        """Writes the history, one JSON object a line; what is not finite is null."""
        with open(path, "w", encoding="utf-8") as file:
            for record in self.history:
                finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
                file.write(json.dumps(finite) + "\n")

    def log_to(self, writer: Any, step: int, *, prefix: str = "telemetry") -> None:
        """Writes the last step's record, if that step was measured; NaN is left out.

        Args:
            writer: anything with `add_scalar(tag, value, step)`, such as TensorBoard's SummaryWriter.
            step: under which number.
            prefix: of the tags: "telemetry/loss/forget".

        Raises:
            RuntimeError: no step was measured yet.
        """
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
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError(
                "table: got no package rich, expected it installed: pip install 'gradroute[telemetry]'; "
                "str(telemetry) needs none"
            ) from error
        record = self._last("table")
        header, rows = self._cells(record)
        table = Table(title=f"step {record['step']:.0f}")
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        if not self._records:
            return "Telemetry: no step was measured yet"
        record = self._records[-1]
        header, rows = self._cells(record)
        header[0] = f"step {record['step']:.0f}"
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = (
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in (header, *rows)
        )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"Telemetry(routes={list(self.routes)}, blocks={list(self._regions.names)}, "
            f"modules={list(self._watched)}, every={self.every}, {len(self._records)} records)"
        )

    def callback(self, writer: Any = None) -> Any:
        """A TrainerCallback for transformers' Trainer: `Trainer(..., callbacks=[telemetry.callback()])`.

        Ids and losses are those of the model's forward. Do not use `step` beside it.

        Args:
            writer: what every measured step is logged to, under Trainer's global step.

        Raises:
            ImportError: transformers is missing.
        """
        try:
            from transformers import TrainerCallback
        except ImportError as error:
            raise ImportError(
                "callback: got no package transformers, expected it installed: pip install 'gradroute[models]'"
            ) from error
        telemetry = self

        class TelemetryCallback(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                telemetry._stop()  # a step that Trainer left without an end
                telemetry._begin(None, None)

            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                telemetry.before_update()

            def on_optimizer_step(self, *_: Any, **__: Any) -> None:
                telemetry.after_update()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                telemetry._finish()
                telemetry._stop()
                if writer is not None:
                    telemetry.log_to(writer, state.global_step)

            def on_train_end(self, *_: Any, **__: Any) -> None:
                telemetry._stop()

        return TelemetryCallback()

    def _begin(self, route_ids: Any, optimizer: Any) -> None:
        if self._running:
            raise RuntimeError("step: got a step within another one, expected one at a time")
        measured = self._steps % self.every == 0
        self._record = None
        if measured:
            batch = None if route_ids is None else self._batch(route_ids)
            optimizers = _optimizers(optimizer)
            self._record = Record(self._steps)
            self._measurement = Measurement(
                len(self.routes), list(self._watched), reads_forward=batch is None
            )
            if batch is not None:
                self._measurement.take(batch)
            self._hook(self._measurement, optimizers)
        self._steps += 1
        self._running = True

    def _finish(self) -> None:
        if self._record is None or self._measurement is None:
            return
        measurement = self._measurement
        if self._watched and not measurement.called:
            raise RuntimeError(
                f"step: got no call of {', '.join(self._watched)}, expected a forward within the step (compiled code "
                "calls no hooks: with a compiled model give Telemetry modules=())"
            )
        homes = {block: [self.routes.index(route) for route in self.home if self.home[route] == block]
                 for block in self._regions.names}  # fmt: skip
        self._record.fill(measurement.results(self.routes, self._regions.names, homes, self.rest))
        self._records.append(self._record)

    def _stop(self) -> None:
        """Takes the hooks away, and drops a record that is not complete."""
        if self._measurement is not None:
            for handle in self._measurement.handles:
                handle.remove()
        if self._record is not None and not self._record.is_complete:
            self._record = None
        self._measurement = None
        self._running = False

    def _hook(self, measurement: Measurement, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        handles = measurement.handles
        for name, module in self._watched.items():
            handles.append(module.register_forward_hook(self._output_hook(measurement, name)))
        if measurement.reads_forward:
            handles.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            handles.append(self.model.register_forward_hook(self._after_forward, with_kwargs=True))
        for optimizer in optimizers:
            handles.append(optimizer.register_step_pre_hook(lambda *_: self.before_update()))
            handles.append(optimizer.register_step_post_hook(lambda *_: self.after_update()))

    def _output_hook(self, measurement: Measurement, name: str) -> Callable[..., None]:
        """A forward hook that watches the gradient of a module's output.

        Activation checkpointing runs the forward twice, and the gradient flows through one of the two outputs: with
        use_reentrant=True through the second, the first having no graph; with False through the first.
        """

        def watch(module: nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling() or self._probing:
                return  # compiled code would keep this step's hook for all steps
            measurement.called.add(name)
            x = _first_tensor(output)
            if x is None:
                raise TypeError(
                    f"{name}: got an output of type {type(output).__name__}, expected a tensor or a tuple"
                )
            if x.requires_grad:
                belongs = measurement.batch_of(name).belongs(x.shape[:-1], x.device, name)
                x.register_hook(lambda gradient: measurement.add_gradient(name, gradient, belongs))

        return watch

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return  # an evaluation within the step trains nothing
        if (measurement := self._reading()) is not None:
            ids = kwargs.get("routes") if kwargs.get("route_ids") is None else kwargs["route_ids"]
            measurement.take(None if ids is None else self._batch(ids))

    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or _is_recomputation() or not torch.is_grad_enabled():
            return
        measurement = self._reading()
        logits, labels = getattr(output, "logits", None), kwargs.get("labels")
        if measurement is None or measurement.batch is None or logits is None or labels is None:
            return
        self._add_losses(measurement, logits, labels, shift=True)

    def _reading(self) -> Measurement | None:
        """What takes ids and losses from the model's forward now."""
        reads = self._measurement is not None and self._measurement.reads_forward and not self._probing
        return self._measurement if reads else None

    def _current(self, what: str) -> Measurement | None:
        if not self._running:
            raise RuntimeError(
                f"{what}: got a call outside of a step, expected it within `with telemetry.step(...)`"
            )
        return self._measurement

    def _last(self, what: str) -> Record:
        if not self._records:
            raise RuntimeError(f"{what}: got no measured step yet, expected one: `with telemetry.step(...)`")
        return self._records[-1]

    def _batch(self, route_ids: Any) -> BatchRoutes:
        return BatchRoutes(route_ids, len(self.routes))

    @torch.no_grad()
    def _add_losses(self, measurement: Measurement, logits: Tensor, labels: Tensor, shift: bool) -> None:
        batch = measurement.batch_of("losses")
        losses, counted, belongs = self._cross_entropies(logits.detach(), labels, batch, shift)
        measurement.add_losses(losses, counted, belongs)

    def _cross_entropies(
        self, logits: Tensor, labels: Tensor, batch: BatchRoutes, shift: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's loss `[*tokens]`, whether it counts, and whether it belongs to each route `[R, *tokens]`."""
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels: got shape {list(labels.shape)}, expected the logits' {list(logits.shape[:-1])}"
            )
        labels = labels.to(logits.device)
        belongs = batch.belongs(labels.shape, logits.device, "logits")
        if shift:
            belongs = belongs[..., 1:] if self.align == "next_token" else belongs[..., :-1]
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        return _cross_entropy(logits, labels), labels != IGNORED_LABEL, belongs

    @contextmanager
    def _probe(self) -> Iterator[None]:
        """The model in eval mode, unwatched, and random numbers that are forgotten."""
        training = {module: module.training for module in self.model.modules()}
        devices = {parameter.device for parameter in self.model.parameters() if parameter.is_cuda}
        self._probing = True
        try:
            with torch.random.fork_rng(list(devices)):
                self.model.eval()
                yield
        finally:
            self._probing = False
            for module, was in training.items():
                module.training = was

    def _language_losses(self, batch: Batch, ids: BatchRoutes) -> tuple[Tensor, Tensor, Tensor]:
        if batch.get("labels") is None:
            raise ValueError("batch: got no labels, expected them, or a function loss(model, batch)")
        output = self.model(**{name: value for name, value in batch.items() if name != "labels"})
        return self._cross_entropies(output.logits, batch["labels"], ids, shift=True)

    def _leakages(self, losses: Tensor, belongs: Tensor) -> dict[str, float]:
        """Of losses `[*tokens]` and which of them are each route's, `[R, *tokens]`."""
        parameters = self._regions.trained()
        present = belongs.flatten(1).any(1).tolist()
        squares, counts = [], []
        for mine, is_present in zip(belongs, present, strict=True):
            if not is_present:
                squares.append(self._regions.squares([]))
                counts.append(self._regions.nonzeros([]))
                continue
            total = torch.where(mine, losses, 0.0).sum() / mine.sum()
            gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
            found = [pair for pair in zip(parameters, gradients, strict=True) if pair[1] is not None]
            squares.append(self._regions.squares(found))
            counts.append(self._regions.nonzeros(found))
        return self._leakage_values(torch.stack(squares), torch.stack(counts).tolist(), present)

    def _leakage_values(
        self, squares: Tensor, nonzeros: list[list[int]], present: list[bool]
    ) -> dict[str, float]:
        """The ratios of `leakage`, of squares `[R, K + 2]`, nonzeros `[R][K]`, and which routes have tokens."""
        names = self._regions.names
        values: dict[str, float] = {}
        for route, row, is_present in zip(self.routes, squares.tolist(), present, strict=True):
            row = row if is_present else [math.nan] * len(row)
            values[f"leakage/grad_norm/{route}"] = math.sqrt(sum(row))
            for suffix, regions in (("", row), ("_routed", row[:-1])):
                total = sum(regions)
                if route in self.home:
                    own = names.index(self.home[route])
                    outside = sum(square for i, square in enumerate(regions) if i != own)
                    values[f"leakage/outside{suffix}/{route}"] = _root_ratio(outside, total)
                for name, square in zip(names, regions, strict=False):
                    values[f"leakage/inside{suffix}/{name}/{route}"] = _root_ratio(square, total)
        for i, name in enumerate(names):
            others = [
                nonzeros[r][i] == 0
                for r, route in enumerate(self.routes)
                if present[r] and self.home.get(route) != name
            ]
            is_home = name in self.home.values()
            values[f"leakage/protected/{name}"] = float(all(others)) if others and is_home else math.nan
        return values

    def _cells(self, record: Record) -> tuple[list[str], list[list[str]]]:
        """The header and rows of a table: the last part of a key is its column, the rest its row."""
        rows: dict[str, dict[str, str]] = {}
        for key, value in record.items():
            row, _, column = key.rpartition("/")
            if row:
                rows.setdefault(row, {})[column] = "–" if math.isnan(value) else f"{value:.4g}"
        present = {column for row in rows.values() for column in row}
        columns = [
            name for name in dict.fromkeys((*self.routes, *self._regions.names, REST)) if name in present
        ]
        cells = [[row, *(values.get(column, "") for column in columns)] for row, values in rows.items()]
        return ["", *columns], cells


def summary_writer(log_dir: str | os.PathLike[str] | None = None, **options: Any) -> Any:
    """TensorBoard's SummaryWriter, for `Telemetry.log_to`.

    Args:
        log_dir: where to write; default: TensorBoard's, in runs/.
        options: of torch.utils.tensorboard.SummaryWriter.

    Raises:
        ImportError: tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "summary_writer: got no package tensorboard, expected it installed: pip install 'gradroute[telemetry]'"
        ) from error
    return SummaryWriter(log_dir, **options)


def _checked_names(argument: str, names: Sequence[str], empty: bool = False) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: got {names!r}, expected a sequence of names")
    if not names and not empty:
        raise ValueError(f"{argument}: got none, expected at least one name")
    wrong = [name for name in names if not name or "/" in name or name in (ALL, REST)]
    if wrong or len(set(names)) < len(names):
        raise ValueError(
            f"{argument}: got {list(names)}, expected different names without '/', other than {ALL!r} and {REST!r}"
        )
    return tuple(names)


def _checked_home(
    home: Mapping[str, str] | None, routes: Sequence[str], blocks: Mapping[str, Block]
) -> dict[str, str]:
    if home is None:
        return {route: route for route in routes if route in blocks}
    for route, block in home.items():
        if route not in routes:
            raise ValueError(f"home: got the route {route!r}, expected one of {', '.join(routes)}")
        if block not in blocks:
            raise ValueError(f"home: got the block {block!r}, expected one of {', '.join(blocks) or 'none'}")
    return dict(home)


def _decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of a model of transformers by short names; of other modules none."""
    inner = inner_model(model)
    architecture = ARCHITECTURES.get(getattr(getattr(inner, "config", None), "model_type", None) or "")
    layers = None if architecture is None else submodule(inner, architecture.layers)
    return {f"layers.{i}": layer for i, layer in enumerate(layers or ())}


def _named_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Raises ValueError where a module is not there, or a routed one reads it instead of calling it."""
    present = dict(model.named_modules())
    chosen = {}
    for name in names:
        if name not in present:
            raise ValueError(f"modules: got {name!r}, expected names of the model's modules")
        parents = (name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
        fused = [parent for parent in (*parents, "") if parent != name and _is_fused(present[parent])]
        if fused:
            kind = type(present[fused[0]]).__name__
            raise ValueError(
                f"modules: got {name!r}, a part that a routed {kind} reads instead of calling it, expected the {kind}"
            )
        if name == ALL:
            raise ValueError(
                f"modules: got {ALL!r}, expected another name: it is that of the sum over modules"
            )
        chosen[name or type(model).__name__] = present[name]
    return chosen


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, RoutedModule) and module.sites_type in (MLPSites, AttentionSites)


def _optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    optimizers = (
        [] if optimizer is None else optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    )
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: got a {type(one).__name__}, expected a torch.optim.Optimizer; without one call "
                "before_update and after_update"
            )
    return list(optimizers)


def _first_tensor(output: Any) -> Tensor | None:
    """The activation among what a module returns: its output, or the first tensor of several."""
    if isinstance(output, Tensor):
        return output
    values: Iterable[Any] = output.values() if isinstance(output, Mapping) else ()
    values = output if isinstance(output, (tuple, list)) else values
    return next((value for value in values if isinstance(value, Tensor)), None)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each token `[*tokens]`, a row of the batch at a time: all rows in fp32 would be the step's largest tensor."""
    if logits.dim() > 2 and len(logits) > 1:
        return torch.stack([_cross_entropy(*row) for row in zip(logits, labels, strict=True)])
    flat = logits.flatten(0, -2).to(wide(logits))
    losses = nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return losses.view(labels.shape)


def _root_ratio(part_: float, whole: float) -> float:
    return math.sqrt(part_ / whole) if whole != 0 else math.nan


def _is_recomputation() -> bool:
    """Whether this runs within a backward, as a checkpoint does."""
    return torch._C._current_graph_task_id() != -1
