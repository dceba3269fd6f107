"""The engine: stages are done once, stale ones are made anew, and a process killed at any moment goes on."""

import dataclasses
import json
import os
import signal
import sys
import types

import pytest

from gradroute.recipes import RECIPES, folders, run, running
from gradroute.recipes.config import ConfigError, load
from gradroute.recipes.folders import RunInUse
from gradroute.recipes.stages import Stage

STEPS = 5


class Recipe:
    """A recipe of cheap stages: `first` writes a number, `train` counts in steps, `report` adds up."""

    def __init__(self):
        self.ran = []
        self.steps = 0
        self.at_step = lambda step: None
        self.stages = (
            Stage("first", self.first, reads=("seed", "data.sources")),
            Stage("train", self.train, reads=("train.learning_rate",), after=("first",), resumable=True),
            Stage(
                "report",
                self.report,
                reads=("report",),
                after=("*",),
                publishes=("report.txt",),
                wanted=lambda config: config.report.title != "none",
            ),
        )

    def first(self, context):
        self.ran.append("first")
        assert not context.resumes
        (context.folder / "number").write_text(str(context.config.seed))
        return {"number": context.config.seed}

    def train(self, context):
        """Counts to STEPS, with a checkpoint a step, as Trainer would."""
        self.ran.append("train")
        done = [int(path.name) for path in context.folder.iterdir() if path.name.isdigit()]
        number = int((context.inputs["first"].folder / "number").read_text())
        for step in range(max(done, default=0) + 1, STEPS + 1):
            self.steps += 1
            folders.write_text(context.folder / str(step), str(number * step))
            self.at_step(step)
        return {"last": number * STEPS}

    def report(self, context):
        self.ran.append("report")
        (context.folder / "deep").mkdir()
        text = f"{context.config.report.title} {context.inputs['train'].figures['last']}"
        (context.folder / "deep" / "part").write_text(text)
        (context.folder / "report.txt").write_text(text)
        return {"text": text, "skipped": {name: made.skipped for name, made in context.inputs.items()}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nothing waits for the disk, or goes through all objects of the tests' process."""
    monkeypatch.setattr(os, "fsync", lambda opened: None)
    monkeypatch.setattr(running.gc, "collect", lambda: 0)


@pytest.fixture
def recipe(monkeypatch):
    """A recipe of this name; its stages may be changed."""
    made = Recipe()
    module = types.ModuleType("gradroute.recipes.counting")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(RECIPES, "counting", "counts")
    module.__getattr__ = lambda name: made.stages if name == "STAGES" else None
    return made


@pytest.fixture
def start(recipe, recipe_config, tmp_path):
    """Runs the recipe in a folder, with settings."""

    def started(*settings, **options):
        recipe.ran.clear()
        settings = ("seed=3", "report.title=sum", *settings)
        return run("counting", recipe_config, tmp_path / "run", settings=settings, **options)

    started.states = lambda *settings: {
        name: (state.word, state.reason)
        for name, state in running.states(
            "counting", recipe_config, tmp_path / "run", ("seed=3", "report.title=sum", *settings)
        )
    }
    return started


def test_a_run_leaves_its_figures_its_config_and_what_it_publishes(start, tmp_path, recipe_config):
    figures = start()
    assert figures["first"] == {"number": 3}
    assert figures["report"]["text"] == "sum 15"
    assert (tmp_path / "run/report.txt").read_text() == "sum 15"
    done = json.loads((tmp_path / "run/stages/report/done.json").read_text())
    assert {made["path"] for made in done["made"]} == {"report.txt", "deep/part"}
    assert done["versions"]["torch"]
    # The config that was written out is the config: the whole run is done with it too.
    again = run("counting", tmp_path / "run/config.yaml", tmp_path / "run")
    assert again == figures


def test_what_is_done_is_skipped_and_what_is_stale_is_made_anew(start, recipe, recipe_config, tmp_path):
    start()
    assert recipe.ran == ["first", "train", "report"]
    start()
    assert recipe.ran == []
    start("labels.share=0.5")  # no stage reads it
    assert recipe.ran == []
    figures = start("report.title=total")
    assert recipe.ran == ["report"]
    assert figures["report"] == {"text": "total 15", "skipped": {"first": True, "train": True}}
    usual = load(recipe_config).train.learning_rate
    assert start.states("report.title=total", "train.learning_rate=0.5") == {
        "first": ("done", start.states()["first"][1]),
        "train": ("stale", f"train.learning_rate: {usual} → 0.5"),
        "report": ("stale", "stage train changed"),
    }
    assert start("seed=4")["train"] == {"last": 20}
    assert recipe.ran == ["first", "train", "report"]


def test_contents_of_files_count_and_their_places_and_dates_do_not(start, recipe, recipe_config, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("one\n\ntwo")
    recipe_config["data"]["sources"]["retain"]["path"] = str(texts)
    start()
    os.utime(texts, (1, 1))
    moved = texts.rename(tmp_path / "elsewhere.txt")
    recipe_config["data"]["sources"]["retain"]["path"] = str(moved)
    start()
    assert recipe.ran == []
    before = moved.stat()
    moved.write_text("one\n\ntwe")
    os.utime(moved, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert start.states()["first"] == ("stale", "data.sources.retain.path changed")
    start()
    assert recipe.ran == ["first", "train", "report"]


def test_a_file_that_was_taken_away_is_made_again(start, recipe, tmp_path):
    start()
    (tmp_path / "run/stages/first/number").unlink()
    assert start.states()["first"] == ("to do", "number is missing or has another size")
    (tmp_path / "run/report.txt").unlink()
    start()
    assert recipe.ran == ["first"]
    assert (tmp_path / "run/report.txt").read_text() == "sum 15"


def test_one_stage_alone_and_all_until_one(start, recipe, tmp_path):
    with pytest.raises(
        ConfigError, match=r"only: got 'train', expected a stage whose earlier .*; first is not"
    ):
        start(only="train")
    assert not (
        tmp_path / "run/config.yaml"
    ).exists()  # what is refused leaves no config that nothing was made with
    assert start(until="first") == {"first": {"number": 3}}
    assert recipe.ran == ["first"]
    start(only="train")
    assert recipe.ran == ["train"]
    assert start.states()["report"] == ("to do", "")
    start()
    assert recipe.ran == ["report"]
    for argument in ("only", "until"):
        with pytest.raises(
            ConfigError, match=rf"{argument}: got 'trian', expected .* \(did you mean train\?\)"
        ):
            start(**{argument: "trian"})
    with pytest.raises(ConfigError, match="only, until: got"):
        start(only="first", until="first")


def test_a_stage_that_is_not_wanted_is_left_out(start, recipe):
    assert set(start("report.title=none")) == {"first", "train"}


def test_all_stages_are_checked_before_the_first_one_runs(start, recipe, tmp_path):
    def refuse(config):
        raise ConfigError.of("report.title", config.report.title, "another")

    recipe.stages = (*recipe.stages[:2], dataclasses.replace(recipe.stages[2], check=refuse))
    with pytest.raises(ConfigError, match=r"report.title: got 'sum', expected another"):
        start()
    assert recipe.ran == []
    assert not (tmp_path / "run").exists()


def test_folders_of_others_are_left_alone(start, tmp_path, recipe_config, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis").write_text("years of work")
    with pytest.raises(ConfigError, match=r"out: got .*, expected a new or empty folder"):
        start()
    (tmp_path / "run/thesis").unlink()
    start()
    monkeypatch.setitem(RECIPES, "other", "")
    monkeypatch.setitem(sys.modules, "gradroute.recipes.other", sys.modules["gradroute.recipes.counting"])
    with pytest.raises(
        ConfigError, match=r"out: got .*, expected a folder of other; this one is of counting"
    ):
        run("other", recipe_config, tmp_path / "run")


def test_a_second_process_is_refused_while_the_first_one_runs(start, recipe, tmp_path):
    seen = []

    def meanwhile(step):
        if not seen:
            with pytest.raises(
                RunInUse, match=rf"out: got .*, expected .*: process {os.getpid()} on .* does"
            ) as error:
                run("counting", tmp_path / "run/config.yaml", tmp_path / "run")
            seen.append(error)

    recipe.at_step = meanwhile
    start()
    assert len(seen) == 1


class Killed(BaseException):
    """What no handler expects."""


def end_of(folder):
    """All that a finished run has in its folder, but for what is different in every run."""
    found = {}
    for path in folders.files_below(folder):
        name, text = path.relative_to(folder).as_posix(), path.read_text()
        if name.endswith("done.json"):
            record = json.loads(text)
            record["figures"].pop("skipped", None)
            text = {part: record[part] for part in ("key", "figures", "made")}
        if name not in ("lock", "run.json"):
            found[name] = text
    return found


def test_killed_before_any_change_of_the_disk_it_goes_on_to_the_same_end(
    start, recipe, tmp_path, monkeypatch
):
    """The process ends before the first, the second, the third … change, and is started again each time."""
    start("seed=1")  # stale folders are deleted on the way, too
    left = [0]

    def counted(function):
        def called(*arguments, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*arguments, **options)

        return called

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "rmdir"), (os, "unlink"), (os, "mkdir")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    crashes = 0
    for changes in range(1, 200):
        left[0] = changes
        try:
            start()
            break
        except Killed:
            crashes += 1
    assert crashes > 10
    left[0] = -1
    ends = end_of(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "interrupted")
    start()
    assert ends == end_of(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.*fork")  # the child does nothing with threads
@pytest.mark.parametrize("step", [1, 3, STEPS])
def test_a_process_killed_in_a_resumable_stage_goes_on_there(start, recipe, tmp_path, step):
    def die(now):
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        recipe.at_step = die
        try:
            start()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert start.states()["train"] == ("interrupted", "goes on where it was")
    figures = start()  # nobody holds the lock any more
    assert recipe.ran == ["train", "report"]
    assert recipe.steps == STEPS - step
    assert figures["train"] == {"last": 15}
    whole = end_of(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "interrupted")
    start()
    assert end_of(tmp_path / "run") == whole


def test_an_interrupted_stage_with_another_key_begins_anew(start, recipe):
    def fail(step):
        raise RuntimeError("no memory")

    recipe.at_step = fail
    with pytest.raises(RuntimeError, match="no memory"):
        start()
    recipe.at_step = lambda step: None
    recipe.steps = 0
    start("train.learning_rate=0.5")
    assert recipe.steps == STEPS
