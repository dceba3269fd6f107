"""Telemetry: whether routing works, seen while a model trains, by route and by block.

A route is a label of tokens (`Routes`), a block a part of the parameters that a route's tokens are to train (`Block`).
`Telemetry` says, for every measured step: the loss of each route's tokens, how much of the gradient of activations
belongs to them, how large the gradients and updates of each block are, and whether a block stayed untouched where none
of its tokens was there; and on demand, by a probe, how much of a route's gradient leaks out of its block.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import AttentionSites
from .blocks import Block, check_disjoint
from .layers import RoutedModule
from .mlp import MLPSites
from .models.architectures import ARCHITECTURES, part
from .models.collator import ALIGNMENTS
from .models.modules import is_dtensor
from .models.routing import inner_model
from .routes import Routes

if TYPE_CHECKING:
    from rich.table import Table

#: What is summed over all watched modules, and the parameters outside of all blocks: no names of the user's.
ALL, REST = "all", "rest"

IGNORED_LABEL = -100  # transformers takes no loss of it

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
        self._regions = _Regions(model, blocks)
        self._watched = _decoder_layers(model) if modules is None else _named_modules(model, modules)
        self._records: list[Record] = []
        self._steps = 0
        self._record: Record | None = None  # of the step that runs or ran last, if that is measured
        self._running = False
        self._measurement: _Measurement | None = None
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
            ValueError: route ids of another shape.
        """
        measurement = self._current("token_losses")
        if measurement is None:
            return
        losses = losses.detach()
        counted = torch.ones_like(losses, dtype=torch.bool) if counted is None else counted
        belongs = measurement.batch_of("losses").belongs(losses.shape, losses.device, "losses")
        measurement.add_losses(losses, counted, belongs)

    def before_update(self) -> None:
        """Measures `.grad` and the parameters: for loops without an optimizer whose hooks `step` can use."""
        if self._measurement is not None and not self._measurement.snapshot:
            self._measurement.before_update(self._regions, self.rest)

    def after_update(self) -> None:
        """Measures how far the parameters moved since `before_update`."""
        if self._measurement is not None and self._measurement.snapshot:
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
            self._measurement = _Measurement(
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

    def _hook(self, measurement: _Measurement, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        handles = measurement.handles
        for name, module in self._watched.items():
            handles.append(module.register_forward_hook(self._output_hook(measurement, name)))
        if measurement.reads_forward:
            handles.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            handles.append(self.model.register_forward_hook(self._after_forward, with_kwargs=True))
        for optimizer in optimizers:
            handles.append(optimizer.register_step_pre_hook(lambda *_: self.before_update()))
            handles.append(optimizer.register_step_post_hook(lambda *_: self.after_update()))

    def _output_hook(self, measurement: _Measurement, name: str) -> Callable[..., None]:
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
        if not torch.compiler.is_compiling() and (measurement := self._reading()) is not None:
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

    def _reading(self) -> _Measurement | None:
        """What takes ids and losses from the model's forward now."""
        reads = self._measurement is not None and self._measurement.reads_forward and not self._probing
        return self._measurement if reads else None

    def _current(self, what: str) -> _Measurement | None:
        if not self._running:
            raise RuntimeError(
                f"{what}: got a call outside of a step, expected it within `with telemetry.step(...)`"
            )
        return self._measurement

    def _last(self, what: str) -> Record:
        if not self._records:
            raise RuntimeError(f"{what}: got no measured step yet, expected one: `with telemetry.step(...)`")
        return self._records[-1]

    def _batch(self, route_ids: Any) -> _Batch:
        return _Batch(route_ids, len(self.routes))

    @torch.no_grad()
    def _add_losses(self, measurement: _Measurement, logits: Tensor, labels: Tensor, shift: bool) -> None:
        batch = measurement.batch_of("losses")
        losses, counted, belongs = self._cross_entropies(logits.detach(), labels, batch, shift)
        measurement.add_losses(losses, counted, belongs)

    def _cross_entropies(
        self, logits: Tensor, labels: Tensor, batch: _Batch, shift: bool
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

    def _language_losses(self, batch: Batch, ids: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        if batch.get("labels") is None:
            raise ValueError("batch: got no labels, expected them, or a function loss(model, batch)")
        output = self.model(**{name: value for name, value in batch.items() if name != "labels"})
        return self._cross_entropies(output.logits, batch["labels"], ids, shift=True)

    def _leakages(self, losses: Tensor, belongs: Tensor) -> dict[str, float]:
        """Of losses `[*tokens]` and which of them are each route's, `[R, *tokens]`."""
        parameters = self._regions.trained()
        squares, counts = [], []
        for mine in belongs:
            total = torch.where(mine, losses, 0.0).sum() / mine.sum()
            gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
            found = [pair for pair in zip(parameters, gradients, strict=True) if pair[1] is not None]
            squares.append(self._regions.squares(found))
            counts.append(self._regions.nonzeros(found))
        present = belongs.flatten(1).any(1).tolist()
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


class Record(Mapping[str, float]):
    """What one step measured: a mapping of floats, on the device until it is first read.

    Raises:
        RuntimeError: it is read before its step has ended.
    """

    def __init__(self, step: int) -> None:
        self._values: dict[str, float] = {"step": float(step)}
        self._unread: list[tuple[list[str], Tensor]] | None = None
        self.is_complete = False

    def fill(self, results: list[tuple[list[str], Tensor]]) -> None:
        """Takes names with values `[n]`, once."""
        self._unread = results
        self.is_complete = True

    def _read(self) -> dict[str, float]:
        if not self.is_complete:
            raise RuntimeError("record: got a read before the step has ended, expected it after the `with`")
        if self._unread is not None:
            probed = self._values
            self._values = {"step": probed.pop("step")}
            for names, values in self._unread:
                self._values.update(zip(names, values.tolist(), strict=True))
            self._values.update(probed)
            self._unread = None
        return self._values

    def __getitem__(self, key: str) -> float:
        return self._read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return f"Record({self._read()})" if self.is_complete else "Record(its step has not ended)"


class _Measurement:
    """What a measured step has collected, all of it on the device.

    Attributes:
        reads_forward: whether ids and losses come from the model's forward: until ids are given.
        handles: of the hooks.
        called: the watched modules whose forward ran.
        batch: the ids of the current batch.
        snapshot: the parameters before the update, by region.
    """

    def __init__(self, routes: int, modules: list[str], reads_forward: bool) -> None:
        self.reads_forward = reads_forward
        self.handles: list[Any] = []
        self.called: set[str] = set()
        self.batch: _Batch | None = None
        self.snapshot: list[tuple[int, Tensor, Tensor]] = []
        self._routes = routes
        self._present: list[Tensor] = []  # each [R], of one batch
        self._squares: dict[str, list[Tensor]] = {name: [] for name in modules}  # each [R], of one backward
        self._losses: list[tuple[Tensor, Tensor]] = []  # each [R] and [R], of one forward
        self._gradient: tuple[Tensor, Tensor] | None = None  # squares [K + 2], nonzeros [K]
        self._before: Tensor | None = None  # squares [K + 2]
        self._update: Tensor | None = None  # squares [K + 2]

    def take(self, batch: _Batch | None) -> None:
        """The ids of the forwards to come."""
        self.batch = batch
        if batch is not None:
            self._present.append(batch.counts())

    def batch_of(self, what: str) -> _Batch:
        if self.batch is None:
            raise ValueError(
                f"route_ids: got none for {what}, expected telemetry.step(route_ids), or route_ids in the model's "
                "forward"
            )
        return self.batch

    @torch.no_grad()
    def add_gradient(self, name: str, gradient: Tensor | None, belongs: Tensor) -> None:
        """The gradient `[*tokens, F]` that arrived at an output whose tokens belong to routes `[R, *tokens]`."""
        if gradient is not None:
            squares = torch.linalg.vector_norm(gradient, dim=-1, dtype=_wide(gradient)).square()
            self._squares[name].append(_by_route(squares, belongs))

    def add_losses(self, losses: Tensor, counted: Tensor, belongs: Tensor) -> None:
        mine = belongs & counted
        self._losses.append((_by_route(losses.to(_wide(losses)), mine), mine.flatten(1).sum(1)))

    def before_update(self, regions: _Regions, rest: bool) -> None:
        gradients = [(p, p.grad) for p in regions.parameters() if p.grad is not None]
        self._gradient = regions.squares(gradients), regions.nonzeros(gradients)
        for region, parameter, values in regions.split([(p, p.detach()) for p in regions.trained()], rest):
            self.snapshot.append((region, parameter, values.clone()))
        self._before = regions.sum_squares((region, values) for region, _, values in self.snapshot)

    @torch.no_grad()
    def after_update(self, regions: _Regions) -> None:
        """The difference to the first `before_update`: several optimizers are one update."""
        rest = any(region >= len(regions.names) for region, *_ in self.snapshot)
        after = regions.split([(p, p.detach()) for p in regions.trained()], rest)
        self._update = regions.sum_squares(
            (region, values.to(_wide(values)) - before.to(_wide(before)))
            for (region, _, before), (_, _, values) in zip(self.snapshot, after, strict=True)
        )

    def results(
        self, routes: tuple[str, ...], blocks: tuple[str, ...], homes: Mapping[str, list[int]], rest: bool
    ) -> list[tuple[list[str], Tensor]]:
        """Names, each list with its values `[n]`."""
        results: list[tuple[list[str], Tensor]] = []
        if self._losses:
            device = self._losses[0][0].device
            sums, counts = (
                torch.stack([one.to(device) for one in column]).sum(0)
                for column in zip(*self._losses, strict=True)
            )
            results.append(([f"loss/{route}" for route in routes], sums / counts))
            results.append(([f"tokens/{route}" for route in routes], counts.double()))
        results += self._shares(routes)
        if self._gradient is not None:
            squares, nonzeros = self._gradient
            names = [*blocks, REST]
            results.append(([f"block_grad_norm/{name}" for name in names], _joined_rest(squares).sqrt()))
            results.append(([f"protected/{name}" for name in blocks], self._protected(nonzeros, homes)))
        if self._update is not None and self._before is not None:
            names = [*blocks, REST] if rest else list(blocks)
            update, before = (_joined_rest(one)[: len(names)] for one in (self._update, self._before))
            results.append(([f"update_norm/{name}" for name in names], update.sqrt()))
            results.append(([f"update_ratio/{name}" for name in names], (update / before).sqrt()))
        return results

    def _shares(self, routes: tuple[str, ...]) -> Iterator[tuple[list[str], Tensor]]:
        if not self._squares:
            return
        found = [squares.device for lists in self._squares.values() for squares in lists]
        device = found[0] if found else torch.device("cpu")
        by_module = {
            name: sum((one.to(device, torch.float64) for one in lists), _zeros(self._routes, device))
            for name, lists in self._squares.items()
        }
        by_module[ALL] = torch.stack(list(by_module.values())).sum(0)
        for name, squares in by_module.items():
            yield [f"grad_norm/{name}/{route}" for route in routes], squares.sqrt()
            yield [f"grad_share/{name}/{route}" for route in routes], squares / squares.sum()

    def _protected(self, nonzeros: Tensor, homes: Mapping[str, list[int]]) -> Tensor:  # [K] → [K]
        """1 or 0 for blocks whose routes had no token, NaN for the others."""
        if not self._present:
            return torch.full_like(nonzeros, math.nan, dtype=torch.float64)
        present = torch.stack([one.to(nonzeros.device) for one in self._present]).sum(0)  # [R]
        applies = [
            present[homes[block]].sum() == 0 if homes[block] else present.new_zeros((), dtype=torch.bool)
            for block in homes
        ]
        untouched = (nonzeros == 0).double()
        return torch.where(torch.stack(applies), untouched, math.nan) if applies else untouched


class _Batch:
    """The route ids of one batch, and which route's each token is."""

    def __init__(self, route_ids: Any, num_routes: int) -> None:
        if isinstance(route_ids, Routes):
            route_ids = route_ids.ids.view(route_ids.shape)
        ids = torch.as_tensor(route_ids)
        if ids.is_floating_point() or ids.is_complex():
            raise TypeError(f"route_ids: got dtype {ids.dtype}, expected an integer or bool dtype")
        self._ids = ids.to(torch.int64)
        self._num_routes = num_routes
        self._belongs: dict[Any, Tensor] = {}
        if ids.device.type == "cpu" and ids.numel():
            least, most = self._ids.aminmax()
            if least < 0 or most >= num_routes:
                raise ValueError(
                    f"route_ids: got ids from {least} to {most}, expected 0 to {num_routes - 1}, one for each name of "
                    "routes"
                )

    def belongs(self, tokens: Sequence[int], device: torch.device, what: str) -> Tensor:
        """Whether each of the tokens, of which `what` says the shape, belongs to each route: bool `[R, *tokens]`."""
        shape = tuple(tokens)
        if (shape, device) not in self._belongs:
            ids = self._spread(shape, what).to(device)
            routes = torch.arange(self._num_routes, device=device).view(-1, *[1] * len(shape))
            self._belongs[shape, device] = ids == routes
        return self._belongs[shape, device]

    def counts(self) -> Tensor:
        """How many of the ids are each route's: `[R]`."""
        return self.belongs(self._ids.shape, self._ids.device, "ids").flatten(1).sum(1)

    def _spread(self, shape: tuple[int, ...], what: str) -> Tensor:
        ids = self._ids
        if tuple(ids.shape) == shape[: ids.dim()]:  # an id of a sample is that of all its tokens
            return ids.view(*ids.shape, *[1] * (len(shape) - ids.dim())).expand(shape)
        if ids.dim() == 1 and ids.numel() == math.prod(shape):
            return ids.view(shape)
        raise ValueError(
            f"route_ids: got shape {list(ids.shape)}, expected that of the tokens of {what}, {list(shape)}, or "
            f"[{math.prod(shape)}]"
        )


class _Regions:
    """A model's parameters, divided in regions.

    Blocks are regions 0 to K - 1; K is what else the tensors have that a block has a piece of; K + 1 all other tensors.

    Raises:
        TypeError: a block that is none.
        ValueError: blocks that overlap, or are not of the model's shape.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Block]) -> None:
        for name, block in blocks.items():
            if not isinstance(block, Block):
                raise TypeError(
                    f"blocks[{name!r}]: got a {type(block).__name__}, expected a gradroute.blocks.Block"
                )
        check_disjoint(blocks, model)
        self.names = tuple(blocks)
        self._model = model
        self._blocks = tuple(blocks.values())
        self._indices: dict[Any, Tensor] = {}  # copies on devices: a copy from the host may wait

    def parameters(self) -> list[nn.Parameter]:
        """All of the model."""
        parameters = list(self._model.parameters())
        sharded = [name for name, one in self._model.named_parameters() if is_dtensor(one)]
        if sharded:
            raise TypeError(
                f"{sharded[0]}: got a sharded parameter (DTensor), expected an ordinary one; without an optimizer "
                "step measures losses and shares alone"
            )
        return parameters

    def trained(self) -> list[nn.Parameter]:
        """Those that require a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def split(
        self, tensors: Iterable[tuple[nn.Parameter, Tensor]], rest: bool = True
    ) -> Iterator[tuple[int, nn.Parameter, Tensor]]:
        """Tensors of the shapes of parameters, as their elements in each region; elsewhere zero or cut off.

        Args:
            tensors: parameter and tensor.
            rest: whether to yield the elements outside of all blocks.
        """
        pieces = self._pieces()
        blocks = len(self._blocks)
        for parameter, tensor in tensors:
            of_parameter = pieces.get(parameter, [])
            indices = [(block, dim, self._on(index, tensor.device)) for block, dim, index in of_parameter]
            for block, dim, index in indices:
                yield block, parameter, tensor.index_select(dim, index)
            if rest and not indices:
                yield blocks + 1, parameter, tensor
            elif rest:
                outside = tensor.clone()
                for _, dim, index in indices:
                    outside.index_fill_(dim, index, 0)
                yield blocks, parameter, outside

    def squares(self, tensors: Iterable[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """The squared norm of each region's elements, fp64 `[K + 2]`."""
        return self.sum_squares((region, values) for region, _, values in self.split(tensors))

    @torch.no_grad()
    def sum_squares(self, values: Iterable[tuple[int, Tensor]]) -> Tensor:
        """Squares of values by their regions, fp64 `[K + 2]`."""
        device = self._device()
        squares = [[_zeros((), device)] for _ in range(len(self._blocks) + 2)]
        for region, one in values:
            norm = torch.linalg.vector_norm(one, dtype=_wide(one))
            squares[region].append(norm.to(device, torch.float64).square())
        return torch.stack([torch.stack(of_region).sum() for of_region in squares])

    def nonzeros(self, tensors: Iterable[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """How many elements of each block are not zero, `[K]`: squares of small ones may underflow, this does not."""
        device = self._device()
        counts = [[torch.zeros((), dtype=torch.int64, device=device)] for _ in self._blocks]
        for region, _, values in self.split(tensors, rest=False):
            counts[region].append(values.count_nonzero().to(device))
        return torch.stack([torch.stack(of_block).sum() for of_block in counts]) if counts else torch.zeros(
            0, dtype=torch.int64, device=device
        )  # fmt: skip

    def _pieces(self) -> dict[nn.Parameter, list[tuple[int, int, Tensor]]]:
        """By parameter: the block's number, dimension and index. Made anew: parameters may be replaced."""
        pieces: dict[nn.Parameter, list[tuple[int, int, Tensor]]] = {}
        for i, block in enumerate(self._blocks):
            for piece, parameter in block.parameters(self._model):
                pieces.setdefault(parameter, []).append((i, piece.dim, piece.index))
        return pieces

    def _on(self, index: Tensor, device: torch.device) -> Tensor:
        key = (id(index), device)
        if key not in self._indices:
            self._indices[key] = index.to(device)
        return self._indices[key]

    def _device(self) -> torch.device:
        parameter = next(self._model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device


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
    layers = None if architecture is None else part(inner, architecture.layers)
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
    flat = logits.flatten(0, -2).to(_wide(logits))
    losses = nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return losses.view(labels.shape)


def _by_route(values: Tensor, belongs: Tensor) -> Tensor:
    """Sums of values `[*tokens]` by route, `[R]`: a sum for each, as adding by index has no fixed order on a GPU."""
    return torch.where(belongs, values, 0.0).flatten(1).sum(1)


def _joined_rest(squares: Tensor) -> Tensor:  # [K + 2] → [K + 1]
    return torch.cat((squares[:-2], squares[-2:].sum(0, keepdim=True)))


def _root_ratio(part_: float, whole: float) -> float:
    return math.sqrt(part_ / whole) if whole != 0 else math.nan


def _wide(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64: what norms and losses are computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _zeros(shape: Any, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)


def _is_recomputation() -> bool:
    """Whether this runs within a backward, as a checkpoint does."""
    return torch._C._current_graph_task_id() != -1
