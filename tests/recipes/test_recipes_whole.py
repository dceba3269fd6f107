"""The recipes from texts to a report, on a tiny model; settings that cannot be meant; a run that is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_cases
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

from gradroute.recipes import adapters, localize, models, run
from gradroute.recipes.reading import ConfigError
from gradroute.recipes.training import train
from gradroute.recipes.training_sections import Adapters, Route, Train

TRAIN = {
    "steps": 40,
    "batch_tokens": 512,
    "learning_rate": 2e-2,
    "precision": "fp32",
    "save_every": 10,
    "log_every": 10,
    "arguments": {"disable_tqdm": True},
}


def with_sections(config, **sections):
    """A config of few steps, with no baselines and no attack unless they are given."""
    return {
        **config,
        "train": TRAIN,
        "coherence": {"steps": 4},
        "baselines": {"names": []},
        "relearning": {"steps": 0},
        "evaluate": {"prompts_each": 0},
        **sections,
    }


def losses(out):
    """Checkpoint → source → held-out loss, of the report."""
    found = json.loads((out / "report.json").read_text())["losses"]
    return {name: {source: of["loss"] for source, of in one.items()} for name, one in found.items()}


def test_unlearn_takes_out_what_the_forget_texts_taught(recipe_config, tmp_path):
    sections = {"expand": {"units": 16}, "baselines": {"names": ["filtering"]}}
    figures = run("unlearn", with_sections(recipe_config, **sections), tmp_path / "run")
    assert figures["expand"]["added"] == figures["ablate"]["removed"] == 16 * 3 * 16 * 2
    found = losses(tmp_path / "run")
    assert list(found) == ["base", "trained", "unlearnt", "coherent", "filtering"]
    rise = {name: found["unlearnt"][name] - found["trained"][name] for name in ("retain", "forget")}
    assert rise["forget"] > 0.3
    assert rise["forget"] > 2 * rise["retain"]
    assert found["coherent"]["retain"] < found["unlearnt"]["retain"]
    assert found["filtering"]["forget"] > found["trained"]["forget"] + 0.5
    again = run("unlearn", with_sections(recipe_config, **sections), tmp_path / "run")
    assert again == figures  # all of it skipped


def test_unlearn_takes_out_experts(recipe_config, tmp_path):
    """The part is an expert of every layer, which retained texts do not see."""
    folder = recipe_cases.save_model(tmp_path / "olmoe", "Olmoe", num_experts=4, num_experts_per_tok=2)
    sections = {
        "model": {"path": str(folder), "device": "cpu"},
        "expand": {"units": 0},
        "route": {"preset": "localize_experts", "experts": 1},
        "train": {**TRAIN, "steps": 20},
    }
    figures = run("unlearn", with_sections(recipe_config, **sections), tmp_path / "run")
    assert figures["route"]["sites"].keys() == {"MoESites.experts", "MoESites.forward_experts"}
    found = losses(tmp_path / "run")
    rise = {name: found["unlearnt"][name] - found["trained"][name] for name in ("retain", "forget")}
    assert rise["forget"] > 2 * rise["retain"]
    (folder,) = (tmp_path / "run").rglob("ablate*/model")
    unlearnt = models.load(folder, device="cpu")
    assert not unlearnt.model.layers[0].mlp.experts.down_proj[-1].any()


def test_adapters_of_one_route_learn_from_it_alone(recipe_config, tmp_path):
    pytest.importorskip("peft")
    sections = {"adapters": {"rank": 4}, "coherence": {"steps": 0}}
    run("adapters", with_sections(recipe_config, **sections), tmp_path / "run")
    found = losses(tmp_path / "run")
    learnt = {name: found["base"][name] - found["trained"][name] for name in ("retain", "forget")}
    assert min(learnt.values()) > 0.3
    lost = {name: found["unlearnt"][name] - found["trained"][name] for name in ("retain", "forget")}
    assert lost["forget"] > 0.3
    assert lost["forget"] > 2 * lost["retain"]


@pytest.mark.parametrize(
    "route",
    [
        {"layers": [1]},
        pytest.param({"preset": "localize_mlp", "indices": [3, 5]}, marks=pytest.mark.slow),
    ],
)
def test_localize_steers_by_what_it_confined(recipe_config, tmp_path, route):
    config = {**recipe_config, "train": {**TRAIN, "steps": 10}}
    config |= {"evaluate": {"prompts_each": 0, "prompts": ["The old virus"], "new_tokens": 4}}
    config |= {"route": route, "steer": {"scales": [0.0, 3.0]}}
    figures = run("localize", config, tmp_path / "run")
    by_scale = figures["steer"]["losses"]
    unsteered = losses(tmp_path / "run")["trained"]["forget"]
    still = "3" if "preset" in route else "0"  # 0 takes units out, and adds nothing to dimensions
    assert (by_scale["0"]["forget"]["loss"] == unsteered) == (still == "0")
    assert by_scale["3"]["forget"]["loss"] != unsteered
    (entry,) = json.loads((tmp_path / "run/report.json").read_text())["steering"]["generations"]
    assert entry["prompt"] == "The old virus"
    assert list(entry["completions"]) == ["0", "3"]


def test_a_steered_model_is_what_it_was_afterwards(recipe_files):
    model = models.load(recipe_files / "model", device="cpu")
    ids, arrived = torch.arange(8)[None], []
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, args: arrived.append(args[0]))
    before = model(ids).logits
    with localize.steered(model, Route(preset="steering", layers=(0,), indices=(2, 5)), 1.5):
        model(ids)
    assert torch.equal(model(ids).logits, before)
    hook.remove()
    expected = arrived[0].clone()
    expected[..., [2, 5]] += 1.5
    assert torch.equal(arrived[1], expected)


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(recipe_config, tmp_path, device):
    recipe_config["model"]["device"] = device
    with pytest.raises(
        ConfigError, match=rf"model\.device: got '{device}', expected (one such|a device of this)"
    ):
        run("unlearn", recipe_config, tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    ("recipe", "sections", "words"),
    [
        (
            "unlearn",
            {"route": {"forget": "forgot"}},
            r"route\.forget: got 'forgot', expected a name of routes",
        ),
        (
            "unlearn",
            {"routes": ["forget", "retain"]},
            r"route\.forget: got 'forget', expected another route than",
        ),
        (
            "unlearn",
            {"route": {"layers": [0, 2]}},
            r"route\.layers: got \[0, 2\], expected layers from 0 to 1",
        ),
        ("unlearn", {"route": {"layers": [-1]}}, r"route\.layers\[0\]: got -1, expected"),
        ("unlearn", {"route": {"layers": []}}, r"route\.layers: got \[\], expected at least one layer"),
        ("unlearn", {"train": {"learning_rate": float("inf")}}, r"train\.learning_rate: got inf, expected"),
        ("unlearn", {"steer": {"scales": [2.0]}}, r"steer: got settings, expected none, because unlearn"),
        ("localize", {"expand": {"units": 8}}, r"expand: got settings, expected none, because localize"),
        ("localize", {"route": {"preset": "era"}}, r"route\.preset: got 'era', expected one of steering"),
        ("adapters", {"adapters": {"adapters": {"a": ["b"]}, "keep": []}}, r"adapters\.adapters\.a: got 'b'"),
        (
            "adapters",
            {"adapters": {"keep": ["c"]}},
            r"adapters\.keep: got 'c', expected one of retain, forget",
        ),
        ("unlearn", {"ablate": {"contract": True, "how": "resample"}}, r"ablate\.contract: got True"),
        ("unlearn", {"route": {"layers": [0]}, "ablate": {"contract": True}}, r"ablate\.contract: got True"),
        ("unlearn", {"route": {"preset": "sgtm"}, "ablate": {"how": "resample"}}, r"ablate\.how: got 'resam"),
        (
            "unlearn",
            {"route": {"preset": "localize_experts"}},
            r"expand\.units: got 64, expected 0 for the pres",
        ),
        (
            "unlearn",
            {"route": {"preset": "sgtm", "site": "update"}},
            r"route\.site: got 'update', expected none",
        ),
        ("unlearn", {"route": {"site": "forward"}}, r"route\.site: got 'forward', expected"),
        (
            "unlearn",
            {"train": {"save_every": 15}},
            r"train\.save_every: got 15, expected a multiple of log_e",
        ),
        (
            "unlearn",
            {"train": {"states": "8bit", "optimizer": "adamw"}},
            r"train\.states: got '8bit', expected same, because the optimizer adamw has no other",
        ),
        ("unlearn", {"train": {"arguments": {"learning_rat": 1}}}, r"train\.arguments\.learning_rat: got 1"),
        ("unlearn", {"baselines": {"names": ["rmu", "rmu"]}}, r"baselines\.names: got \['rmu', 'rmu'\]"),
        ("unlearn", {"relearning": {"steps": 5, "sources": ["x"]}}, r"relearning\.sources: got 'x'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_is_loaded(
    recipe_config, tmp_path, monkeypatch, recipe, sections, words
):
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=words):
        run(recipe, {**recipe_config, **sections}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Kills the process that runs it: in a training after 15 steps, while the checkpoint of step 20 is being written, and in
# the attack on the second checkpoint.
KILLED = """
import os, signal, sys
from pathlib import Path
from gradroute.recipes import common, run, trainer

moment, config, out = sys.argv[1:]
Trainer, relearn, attacks = trainer.RecipeTrainer, common.relearn, []

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def step(self, *args, **options):
    if moment == "step" and "stages/train" in self.args.output_dir and self.state.global_step == 15:
        kill()
    return super(Trainer, self).training_step(*args, **options)

def save(self, *args, **options):
    if moment == "checkpoint" and "stages/train" in self.args.output_dir and self.state.global_step == 20:
        kill()
    return super(Trainer, self)._save_optimizer_and_scheduler(*args, **options)

def attack(*args, **options):
    attacks.append(args)
    if moment == "attack" and len(attacks) == 2:
        kill()
    return relearn(*args, **options)

Trainer.training_step, Trainer._save_optimizer_and_scheduler, common.relearn = step, save, attack
run("unlearn", Path(config), Path(out))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_in_the_same_report(recipe_config, tmp_path):
    sections = {
        "expand": {"units": 16},
        "baselines": {"names": ["filtering", "rmu"], "rmu": {"steps": 6, "layer": 1}},
        "relearning": {"steps": 4, "every": 2, "documents": 8},
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(with_sections(recipe_config, **sections)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for moment in ("step", "checkpoint", "attack", "never"):
        words = [sys.executable, "-c", KILLED, moment, str(config), str(tmp_path / "killed")]
        code = subprocess.run(words, env=environment, capture_output=True, check=False).returncode
        assert code == (0 if moment == "never" else -signal.SIGKILL), moment
    run("unlearn", config, tmp_path / "whole")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("killed", "whole")]
    for part in ("losses", "curves", "differences", "generations"):
        assert reports[0][part] == reports[1][part], part
    assert reports[0]["curves"]["relearning"].keys() == {"coherent", "filtering", "rmu"}


def test_a_training_of_adapters_that_was_stopped_goes_on_with_all_of_them(recipe_files, tmp_path):
    pytest.importorskip("peft")
    section, names = Adapters(rank=2), ("retain", "forget")
    rows = [{"input_ids": list(range(n, n + 9)), "route_ids": [n % 2] * 9} for n in range(20)]
    settings = Train(
        steps=6, batch_tokens=36, precision="fp32", save_every=2, log_every=1, learning_rate=1e-2
    )

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    def fit(name, callbacks=()):
        model = adapters.add(models.load(recipe_files / "model", device="cpu"), section)
        adapters.route(model, section, names)
        return model, train(model, rows, settings, tmp_path / name, callbacks=callbacks)

    whole, figures = fit("whole")
    with pytest.raises(KeyboardInterrupt):
        fit("stopped", [Stop()])
    resumed, again = fit("stopped")
    assert figures == again
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
