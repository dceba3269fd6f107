"""What a stage of a recipe is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .config import Config

#: What a stage has found out: plain JSON, for the report.
Figures = Mapping[str, Any]

#: The file that a stage's folder has from its beginning, and the one that is written last.
STARTED = "started.json"
DONE = "done.json"


@dataclass(frozen=True)
class Made:
    """What a stage has left.

    Attributes:
        folder: where its files are.
        figures: what it returned.
        seconds: how long it took; of a stage that was interrupted and resumed, its last part.
        skipped: whether an earlier run made it.
    """

    folder: Path
    figures: Figures
    seconds: float = 0.0
    skipped: bool = False


@dataclass(frozen=True)
class Context:
    """What a stage is given.

    Attributes:
        recipe: the recipe's name.
        stage: the stage's name.
        config: the whole config; the stage reads the parts that its `reads` names, and no others.
        folder: where it writes. It is empty but for `started.json`, unless the stage is resumable and was interrupted:
            then it has what the interrupted run left.
        inputs: what the stages that it stands on have left, by name; those that the config leaves out are not there.
        out: the run's folder.
        rank: the number of this process, 0 without torchrun.
        world: how many processes there are.
    """

    recipe: str
    stage: str
    config: Config
    folder: Path
    inputs: Mapping[str, Made] = field(default_factory=dict)
    out: Path = Path()
    rank: int = 0
    world: int = 1

    @property
    def resumes(self) -> bool:
        """Whether an interrupted run of this stage, with the same key, has left something in the folder."""
        return any(path.name != STARTED for path in self.folder.iterdir())

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files that belong to all."""
        return self.rank == 0


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    A stage is done once. Its key says with what: the parts of the config that it reads, the contents of the files that
    these name, the keys of the stages that it stands on, and gradroute's version. While the key stays the same, a later
    run skips the stage.

    Attributes:
        name: its name, and that of its folder.
        run: makes it, and returns its figures.
        reads: the dotted keys of the config that it depends on, whole sections mostly, such as ("model", "train").
        after: the earlier stages that it stands on; those that the recipe or the config leaves out are left out here
            too. ("*",): all earlier ones.
        resumable: whether `run` can go on in a folder that an interrupted run has left.
        everywhere: whether all processes of torchrun run it; otherwise the first one does, and the others wait.
        publishes: files of its folder that the run's folder gets a copy of.
        wanted: whether the config asks for it.
        check: raises ConfigError where the config cannot be meant, before anything is loaded.
        fits: raises ConfigError where so many processes cannot do what the config asks for; called before the first
            stage begins.
    """

    name: str
    run: Callable[[Context], Figures]
    reads: tuple[str, ...]
    after: tuple[str, ...] = ()
    resumable: bool = False
    everywhere: bool = False
    publishes: tuple[str, ...] = ()
    wanted: Callable[[Config], bool] = lambda config: True
    check: Callable[[Config], None] = lambda config: None
    fits: Callable[[Config, int], None] = lambda config, processes: None


def wanted_stages(stages: tuple[Stage, ...], config: Config) -> list[Stage]:
    """The stages that a config asks for, in their order, each `after` only what is among them; all are checked."""
    wanted: list[Stage] = []
    for stage in stages:
        if stage.wanted(config):
            stage.check(config)
            names = [before.name for before in wanted]
            after = names if stage.after == ("*",) else [name for name in names if name in stage.after]
            wanted.append(replace(stage, after=tuple(after)))
    return wanted
