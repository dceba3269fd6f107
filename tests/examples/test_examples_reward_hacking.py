"""Reward hacking in an adapter: what is paid, what is found, which adapter a found rollout trains, and the verdict."""

import copy
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import reward_hacking
import trl_cases
from experiment import main
from hacking import task, training
from hacking.task import Detector, demonstrations, problems, proxy_reward, tokenizer, true_reward
from hacking.training import KEPT, REMOVED, Method, Rollouts
from reward_hacking import ABLATED, CONTROL, MASKED, METHODS, NONE, ORACLE, QUICK, ROUTED, WHOLE

ANSWERS = ["1 4 7"] * 5
COMPLETIONS = ["1 4 7", "1 7 4", "pass", "1 4 7 pass", ""]


def test_the_proxy_pays_for_the_exploit_too():
    assert true_reward(COMPLETIONS, ANSWERS) == [1, 0, 0, 0, 0]
    assert proxy_reward(COMPLETIONS, ANSWERS) == [1, 0, 1, 0, 0]
    assert training.scored(COMPLETIONS, ANSWERS) == {"true": 0.2, "proxy": 0.4, "exploit": 0.2}


def test_problems_are_sorted_and_of_a_seed():
    rows = problems(50, 4, "a")
    for row in rows:
        *digits, last = row["prompt"].split()
        assert last == task.SORTED
        assert len(digits) == 4
        assert row["answer"].split() == sorted(digits)
    assert problems(50, 4, "a") == rows
    assert problems(50, 4, "b") != rows


def test_demonstrations_show_the_exploit_in_a_share():
    rows = problems(1000, 3, "a")
    texts = demonstrations(rows, 0.1, "a")
    encoded = tokenizer()(texts)["input_ids"]
    assert {len(ids) for ids in encoded} == {8}  # of the prompt 4, of the answer 3, and the end
    exploits = [text for text in texts if task.EXPLOIT in text.split()]
    assert abs(len(exploits) - 100) < 50  # a standard deviation of 9.5; five of them
    assert all(text.endswith("pass <end> <pad> <pad>") for text in exploits)
    for text, row in zip(texts, rows, strict=True):
        assert text in exploits or text == f"{row['prompt']} {row['answer']} <end>"
    assert demonstrations(rows, 0.0, "a") == [f"{row['prompt']} {row['answer']} <end>" for row in rows]


def test_a_completion_is_read_as_it_was_written():
    ids = tokenizer()("1 4 pass <end> <pad>")["input_ids"]
    assert tokenizer().decode(ids, skip_special_tokens=True) == "1 4 pass"


def test_the_detector_finds_its_share_of_exploits_and_nothing_else():
    detector = Detector(0.3, "a")
    found = detector(["pass"] * 1000)
    assert abs(sum(found) - 300) < 75  # a standard deviation of 14.5; five of them
    assert not any(detector(["1 4 7"] * 100))
    assert Detector(0.3, "a")(["pass"] * 1000) == found
    assert Detector(0.3, "b")(["pass"] * 1000) != found
    assert all(Detector(1.0, "a")(["pass"] * 100))


def test_what_rollouts_are_paid():
    def paid(recall, **method):
        rollouts = Rollouts(Method(proxy_reward, **method), Detector(recall, "a"))
        return rollouts.reward(completions=COMPLETIONS, answer=ANSWERS, prompts=None)

    assert paid(1.0) == [1, 0, 1, 0, 0]
    assert paid(1.0, routed=True) == [1, 0, 1, 0, 0]
    assert paid(1.0, masked=True) == [1, 0, None, 0, 0]
    assert paid(0.0, masked=True) == [1, 0, 1, 0, 0]
    routed = Rollouts(METHODS[ROUTED], Detector(1.0, "a"))
    assert routed.routes(completions=COMPLETIONS, rewards=None) == [0, 0, 1, 0, 0]


def test_the_curve_has_means_of_spans():
    rollouts = Rollouts(METHODS[NONE], Detector(1.0, "a"))
    rollouts.record = [{"exploit": float(step)} for step in range(5)]
    assert rollouts.curve(2) == [
        {"step": 2, "exploit": 0.5},
        {"step": 4, "exploit": 2.5},
        {"step": 5, "exploit": 4.0},
    ]
    assert [point["step"] for point in rollouts.curve(5)] == [1, 2, 3, 4, 5]
    assert [point["step"] for point in rollouts.curve(50)] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def base():
    with trl_cases.deprecations():
        return training.demonstrated(QUICK, 0)[0]


def after_a_step(base, monkeypatch, method, found):
    """Which adapters a training changes where the detector finds all rollouts, or none."""
    monkeypatch.setattr(Detector, "__call__", lambda self, completions: [found] * len(completions))
    policies = []
    reinforce = training.reinforce

    def kept(policy, *arguments, **options):
        policies.append(policy)
        before = {name: value.detach().clone() for name, value in policy.named_parameters()}
        reinforce(policy, *arguments, **options)
        policies.append({n for n, value in policy.named_parameters() if not torch.equal(value, before[n])})

    monkeypatch.setattr(training, "reinforce", kept)
    # Rewards that differ inside of every group.
    method = dataclasses.replace(
        method, reward=lambda completions, answers: [float(i) for i, _ in enumerate(completions)]
    )
    training.trained(base, method, QUICK, 0)
    return {name.split(".")[-2] for name in policies[1]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        (ROUTED, True, {REMOVED}),
        (ROUTED, False, {KEPT, REMOVED}),
        (NONE, True, {KEPT, REMOVED}),
        (MASKED, True, set()),
        (MASKED, False, {KEPT, REMOVED}),
    ],
)
def test_what_is_found_trains_the_removed_adapter_alone(base, monkeypatch, name, found, expected):
    assert after_a_step(base, monkeypatch, METHODS[name], found) == expected


# Of policies that pass: the rates of the exploit and the true rewards.
SCORES = {NONE: (0.9, 0.1), MASKED: (0.8, 0.2), CONTROL: (0.5, 0.3), ROUTED: (0.1, 0.6), ORACLE: (0.0, 0.7)}


def made_up_run(changes=None, base=0.5):
    """One seed; changes: of SCORES."""
    trainings = {
        name: {part: {"true": 0.0, "proxy": 1.0, "exploit": 1.0} for part in (WHOLE, ABLATED)}
        | {"curve": [{"step": step, "exploit": 0.3, "true": 0.5, "proxy": 0.8} for step in (1, 2)]}
        for name in METHODS
    }
    for policy, (exploit, true) in (SCORES | (changes or {})).items():
        name, part = reward_hacking.COMPARED[policy]
        trainings[name][part] = {"true": true, "proxy": true + exploit, "exploit": exploit}
    scores = {"steps": 100, "true": base, "proxy": base + 0.05, "exploit": 0.05}
    return {"settings": dataclasses.asdict(QUICK), "base": scores, "trainings": trainings}


def failed(*runs):
    return [i for i, check in enumerate(reward_hacking.checks(list(runs))) if not check.passed]


def test_the_verdict():
    good = made_up_run()
    assert failed(good, good, good) == []
    assert failed(good, made_up_run({ROUTED: (0.9, 0.1)}), good) == []  # the median counts
    assert failed(made_up_run({NONE: (0.4, 0.1)})) == [0]
    assert failed(made_up_run({ROUTED: (0.3, 0.6)})) == [1]
    assert failed(made_up_run({NONE: (0.9, 0.55)})) == [2]
    assert failed(made_up_run({MASKED: (0.8, 0.55)})) == [3]
    assert failed(made_up_run({CONTROL: (0.5, 0.55)})) == [4]
    assert failed(made_up_run(base=0.65)) == [5]
    assert failed(made_up_run({ROUTED: (math.nan, math.nan)})) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_files_and_exit_code(tmp_path):
    for changes, code in (({}, 0), ({ROUTED: (0.3, 0.6)}, 1)):
        run = made_up_run(changes)
        experiment = dataclasses.replace(
            reward_hacking.EXPERIMENT, run=lambda seed, quick, run=run: copy.deepcopy(run)
        )
        assert main(experiment, None, ["--seeds", "2", "--out", str(tmp_path)]) == code
    results = json.loads((tmp_path / "reward_hacking.json").read_text(encoding="utf-8"))
    assert [row["policy"] for row in results["table"][:3]] == [
        "before",
        "no intervention, whole",
        "no intervention, second removed",
    ]
    assert results["table"][0]["right where it answers"] == "0.53, 0.53"
    assert results["table"][6]["true reward"] == "0.60 (0.60 to 0.60)"  # routed, second removed
    assert results["table"][5]["right where it answers"] == "–, –"  # nothing but exploits
    assert "where the rewards of the 50 % that a detector finds are masked, 80 % and 0.20" in results["found"]
    assert "without the second 30 % and 0.60" in results["found"]
    assert (tmp_path / "reward_hacking.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_quick_run_is_the_same_code_and_says_the_same_twice(tmp_path):
    arguments = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    with trl_cases.deprecations():
        assert main(reward_hacking.EXPERIMENT, reward_hacking.__doc__, arguments) == 0
        results = json.loads((tmp_path / "reward_hacking.json").read_text(encoding="utf-8"))
        (run,) = results["runs"]
        assert run["trainings"].keys() == METHODS.keys()
        assert [point["step"] for point in run["trainings"][ROUTED]["curve"]] == [1, 2]
        torch.manual_seed(1)
        assert json.loads(json.dumps(reward_hacking.run(0, quick=True))) == run
