"""Running a recipe: its stages in order, each done once; what is done is kept, and what was interrupted goes on."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import random
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import Config, load, to_yaml
from .folders import (
    LOCK,
    copy_file,
    discard,
    files_below,
    locked,
    read_json,
    sweep,
    sync,
    write_json,
    write_text,
)
from .keys import Key, keys_of
from .names import RECIPES
from .processes import Processes
from .progress import bar, say
from .reading import ConfigError, nearest
from .stages import DONE, STARTED, Context, Figures, Made, Stage, wanted_stages

_RUN = "run.json"
_VERSIONS = ("torch", "transformers", "datasets", "accelerate", "numpy")


@dataclass(frozen=True)
class State:
    """Where a stage is.

    Attributes:
        word: "done", "stale" (done with another key), "interrupted" (begun with this key, and can go on) or "to do".
        reason: why it is not done, in words; empty where there is nothing to say.
        record: what `done.json` says, where the stage is done.
    """

    word: str
    reason: str = ""
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """A recipe with its config in a folder.

    Attributes:
        recipe: its name.
        config: the whole config.
        out: the run's folder.
        stages: those that the config asks for.
        keys: the key of each.
    """

    recipe: str
    config: Config
    out: Path
    stages: list[Stage]
    keys: Mapping[str, Key]

    def folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.out / "stages" / stage

    def state(self, stage: Stage) -> State:
        """Where a stage is."""
        folder, key = self.folder(stage.name), self.keys[stage.name]
        record = read_json(folder / DONE)
        if record is None:
            started = read_json(folder / STARTED)
            goes_on = stage.resumable and started is not None and started.get("key") == key.hash
            return State("interrupted", "goes on where it was") if goes_on else State("to do")
        if record["key"] != key.hash:
            return State("stale", "; ".join(key.changes(record["parts"])))
        lost = [
            made["path"] for made in record["made"] if not _is_there(folder / made["path"], made["bytes"])
        ]
        if lost:
            return State("to do", f"{lost[0]} is missing or has another size")
        return State("done", f"{record['seconds']:.1f} s", record)


def run(
    name: str,
    config: str | Path | Mapping[str, Any] | None,
    out: Path,
    *,
    settings: Iterable[str] = (),
    only: str | None = None,
    until: str | None = None,
) -> dict[str, Figures]:
    """Runs a recipe; see `gradroute.recipes.run`."""
    stages, loaded = prepared(name, config, settings)
    chosen = _chosen(stages, only, until)
    processes = Processes.of_environment()
    for stage in chosen:
        stage.fits(loaded, processes.world)
    with _entered(out, name) if processes.rank == 0 else nullcontext():
        processes.wait()
        keys = processes.share(keys_of(name, stages, loaded) if processes.rank == 0 else None)
        made = _run_all(Run(name, loaded, out, stages, keys), chosen, only, processes)
    return {stage: one.figures for stage, one in made.items()}


def prepared(
    name: str, config: str | Path | Mapping[str, Any] | None, settings: Iterable[str]
) -> tuple[list[Stage], Config]:
    """The stages that a recipe has with a config, and the config, checked."""
    if name not in RECIPES:
        raise ValueError(
            f"name: got {name!r}, expected one of {', '.join(RECIPES)}{nearest(name, list(RECIPES))}"
        )
    loaded = load(config, settings)
    return wanted_stages(stages_of(name), loaded), loaded


def stages_of(name: str) -> tuple[Stage, ...]:
    """All stages of a recipe."""
    return importlib.import_module(f"{__package__}.{name}").STAGES


def states(
    name: str, config: str | Path | Mapping[str, Any] | None, out: Path, settings: Iterable[str] = ()
) -> list[tuple[str, State]]:
    """Where every stage of a recipe is; nothing is changed."""
    stages, loaded = prepared(name, config, settings)
    run = Run(name, loaded, out, stages, keys_of(name, stages, loaded))
    return [(stage.name, run.state(stage)) for stage in stages]


def _chosen(stages: list[Stage], only: str | None, until: str | None) -> list[Stage]:
    """The stages that are asked for."""
    names = [stage.name for stage in stages]
    for argument, value in (("only", only), ("until", until)):
        if value is not None and value not in names:
            raise ConfigError.of(argument, value, f"one of {', '.join(names)}{nearest(value, names)}")
    if only is not None and until is not None:
        raise ConfigError.of("only, until", (only, until), "one of the two")
    if only is not None:
        return [stages[names.index(only)]]
    return stages if until is None else stages[: names.index(until) + 1]


def _entered(out: Path, recipe: str) -> Any:
    """The lock of a run's folder, which is made where it is new and is no other's."""
    if out.exists() and not out.is_dir():
        raise ConfigError.of("out", str(out), "a folder")
    run = read_json(out / _RUN)
    if run is None and out.exists() and any(not path.name.startswith((LOCK, _RUN)) for path in out.iterdir()):
        raise ConfigError.of("out", str(out), "a new or empty folder, or that of an earlier run")
    if run is not None and run["recipe"] != recipe:
        raise ConfigError.of("out", str(out), f"a folder of {recipe}; this one is of {run['recipe']}")
    out.mkdir(parents=True, exist_ok=True)
    return locked(out)


def _run_all(run: Run, chosen: list[Stage], only: str | None, processes: Processes) -> dict[str, Made]:
    """Runs what is chosen and not done; returns all that is done then."""
    done = {stage.name: run.state(stage) for stage in run.stages} if processes.rank == 0 else None
    done = processes.share(done)
    if only is not None and done[only].record is None:  # before anything is written
        _check_inputs(only, chosen[0], [name for name, state in done.items() if state.record is not None])
    if processes.rank == 0:
        (run.out / "stages").mkdir(exist_ok=True)
        sweep(run.out / "stages")
        write_json(run.out / _RUN, {"recipe": run.recipe, "versions": versions(), "command": sys.argv})
        write_text(run.out / "config.yaml", to_yaml(run.config))
    made: dict[str, Made] = {}
    for number, stage in enumerate(run.stages, 1):
        state = processes.share(run.state(stage) if processes.rank == 0 else None)
        if state.record is not None:
            made[stage.name] = _made(run, stage, state.record, skipped=True)
        elif stage in chosen:
            if processes.rank == 0:
                say(
                    f"[{number}/{len(run.stages)}] {stage.name}"
                    + (f" ({state.reason})" if state.reason else "")
                )
            made[stage.name] = _run_one(run, stage, made, processes)
        if processes.rank == 0 and stage.name in made:
            _publish(run, stage)
    return made


def _check_inputs(only: str | None, stage: Stage, made: Collection[str]) -> None:
    missing = [name for name in stage.after if name not in made]
    if missing:
        raise ConfigError.of(
            "only", only, f"a stage whose earlier ones are done; {', '.join(missing)} is not"
        )


def _run_one(run: Run, stage: Stage, made: Mapping[str, Made], processes: Processes) -> Made:
    """Runs one stage, in all processes or the first."""
    folder, begun = run.folder(stage.name), time.monotonic()
    if processes.rank == 0:
        _begin(run, stage)
    processes.wait()
    record = None
    if stage.everywhere or processes.rank == 0:
        _seed(run.config.seed)
        inputs = {name: made[name] for name in stage.after}
        context = Context(
            run.recipe, stage.name, run.config, folder, inputs, run.out, processes.rank, processes.world
        )
        figures = stage.run(context)
        _give_memory_back()
    if stage.everywhere:
        processes.wait()
    if processes.rank == 0:
        record = _finish(folder, run.keys[stage.name], dict(figures), time.monotonic() - begun)
    return _made(run, stage, processes.share(record), skipped=False)


def _begin(run: Run, stage: Stage) -> None:
    """Makes a stage's folder: an empty one, unless the stage goes on where it was interrupted."""
    folder = run.folder(stage.name)
    if run.state(stage).word == "interrupted":
        return
    discard(folder)
    folder.mkdir()
    sync(folder.parent)
    write_json(folder / STARTED, {"key": run.keys[stage.name].hash})


def _finish(folder: Path, key: Key, figures: Figures, seconds: float) -> Mapping[str, Any]:
    """Brings all that a stage made to the disk, and then says that it is done."""
    files = [
        path for path in files_below(folder) if path.name not in (STARTED, DONE) or path.parent != folder
    ]
    for path in bar(files, what="writing", unit=" files", quick=True):
        sync(path)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)
    record = {
        "key": key.hash,
        "parts": key.parts,
        "seconds": round(seconds, 3),
        "figures": figures,
        "made": [
            {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size} for path in files
        ],
        "versions": versions(),
    }
    write_json(folder / DONE, record)
    return record


def _made(run: Run, stage: Stage, record: Mapping[str, Any], skipped: bool) -> Made:
    return Made(run.folder(stage.name), record["figures"], record["seconds"], skipped)


def _publish(run: Run, stage: Stage) -> None:
    """Copies what a stage publishes to the run's folder, where it is not there yet."""
    for name in stage.publishes:
        source, target = run.folder(stage.name) / name, run.out / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            copy_file(source, target)


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the packages that a result may depend on beyond its key."""
    found = {"python": sys.version.split()[0]}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _seed(seed: int) -> None:
    """Seeds every generator, so that a stage draws the same whether others ran before it or were skipped."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(seed)


def _give_memory_back() -> None:
    """The next stage loads its own model: what this one leaves in circles and in torch's cache is freed."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
