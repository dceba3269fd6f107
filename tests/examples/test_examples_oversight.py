"""The experiment on oversight: the gridworld, what a batch says of it, what labelled steps teach, and the verdict."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import experiment
import oversight
from gridworld import training
from gridworld.agent import ACTIONS, HIDDEN, INPUTS, NUM_ROUTES, Experts
from gridworld.environment import (
    DIAMOND,
    GHOST,
    MAX_STEPS,
    NOTHING,
    SIZE,
    Outcomes,
    OversightEnv,
    OversightVectorEnv,
)
from gridworld.training import DISCOUNT, METHODS, Steps, Trainer, clipped_loss, evaluate, play

from gradroute import Routes

NORTH, EAST, SOUTH, WEST = range(4)


def test_gymnasium_accepts_the_environment():
    from gymnasium.utils.env_checker import check_env

    check_env(OversightEnv(0.5, render_mode="ansi"), skip_render_check=True)


def test_one_gridworld_by_hand():
    env = OversightEnv()
    env.reset(seed=0)
    env.place(agent=(0, 1), diamond=(0, 3), ghost=(2, 1), overseen=(True, False))
    assert env.render() == ".*.D.\n.....\n.g...\n.....\n....."
    expected = np.zeros((4, SIZE, SIZE))
    expected[0, 0, 1] = expected[1, 0, 3] = expected[2, 2, 1] = expected[3, 0, 3] = 1
    np.testing.assert_array_equal(env.observation(), expected)
    observation, reward, terminated, truncated, info = env.step(NORTH)  # against the wall
    np.testing.assert_array_equal(observation, expected)
    assert (reward, terminated, truncated, info) == (0, False, False, {})
    env.step(EAST)
    assert env.step(EAST)[1:] == (1, True, False, {"reached": DIAMOND, "overseen": True})
    env.place((0, 1), (0, 3), (2, 1), (True, False))
    env.step(SOUTH)
    assert env.step(SOUTH)[1:] == (1, True, False, {"reached": GHOST, "overseen": False})
    env.place((0, 1), (0, 3), (2, 1), (True, False))
    for _ in range(MAX_STEPS - 1):
        assert env.step(WEST)[1:] == (0, False, False, {})
    assert env.step(WEST)[1:] == (0, False, True, {"reached": NOTHING, "overseen": False})


def test_the_vectorised_gridworlds_are_the_single_one():
    fast = OversightVectorEnv(60, 0.5)
    observations, _ = fast.reset(seed=3)
    assert fast.observation_space.contains(observations)
    squares = np.stack((fast._agent, fast._diamond, fast._ghost), 1)  # [N, 3, 2]
    slow = [OversightEnv() for _ in range(60)]
    for env, (agent, diamond, ghost), overseen in zip(
        slow, squares.tolist(), fast._overseen.tolist(), strict=True
    ):
        env.place(tuple(agent), tuple(diamond), tuple(ghost), tuple(overseen))
    np.testing.assert_array_equal(observations, [env.observation() for env in slow])
    generator = np.random.default_rng(0)
    over: dict[int, tuple] = {}
    for _ in range(MAX_STEPS):
        actions = generator.integers(ACTIONS, size=60)
        observations, rewards, terminated, truncated, _ = fast.step(actions)
        for i, env in enumerate(slow):
            expected = (*over[i][:1], 0, *over[i][2:]) if i in over else env.step(actions[i])
            np.testing.assert_array_equal(observations[i], expected[0])
            assert (rewards[i], terminated[i], truncated[i]) == expected[1:4]
            if terminated[i] or truncated[i]:
                over[i] = expected
    assert len(over) == 60
    assert [over[i][4]["reached"] for i in range(60)] == fast.outcomes.reached.tolist()
    assert [over[i][4]["overseen"] for i in range(60)] == fast.outcomes.overseen.tolist()
    assert set(fast.outcomes.reached.tolist()) == {NOTHING, DIAMOND, GHOST}


def test_resets_are_seeded_uniform_and_overseen_as_often_as_asked():
    env = OversightVectorEnv(4000, 0.3)
    first, _ = env.reset(seed=1)
    second, _ = env.reset()
    again, _ = env.reset(seed=1)
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    np.testing.assert_array_equal(first[:, :3].sum((2, 3)), 1)
    assert first[:, :3].sum(1).max() == 1  # three different squares
    # 4000 draws with probability 1/25: a standard deviation of 12; five of them.
    counts = first[:, :3].sum(0)
    assert np.abs(counts - 4000 / SIZE**2).max() < 60
    # 8000 draws with probability 0.3: a standard deviation of 0.005.
    assert abs(first[:, 3].sum() / 8000 - 0.3) < 0.025
    for probability in (0.0, 1.0):
        env = OversightVectorEnv(20, probability)
        assert (env.reset(seed=0)[0][:, 3].sum((1, 2)) == 2 * probability).all()


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"oversight: got 1\.5, expected a probability"):
        OversightEnv(1.5)
    with pytest.raises(ValueError, match="oversight: got nan"):
        OversightVectorEnv(2, math.nan)
    with pytest.raises(ValueError, match="num_envs: got 0, expected 1 or more"):
        OversightVectorEnv(0)
    with pytest.raises(ValueError, match="options: got"):
        OversightVectorEnv(2).reset(options={"reset_mask": [True, False]})


# Four episodes: what they reached, whether under oversight, and their numbers of steps.
REACHED = np.array([DIAMOND, GHOST, GHOST, NOTHING])
OVERSEEN = np.array([True, True, False, False])
LENGTHS = (2, 1, 3, 2)


def four_episodes():
    """Their steps, mixed up; observations are noise."""
    generator = np.random.default_rng(0)
    episodes = np.repeat(np.arange(4), LENGTHS)
    left = np.concatenate([np.arange(length)[::-1] for length in LENGTHS])
    order = generator.permutation(len(episodes))
    observations = torch.from_numpy(generator.random((len(episodes), INPUTS), np.float32))
    actions = torch.from_numpy(generator.integers(ACTIONS, size=len(episodes)))
    return Steps(observations, actions, episodes[order], left[order], Outcomes(REACHED, OVERSEEN))


def test_rewards_labels_and_returns_by_hand():
    steps = four_episodes()
    assert training.flawed_reward(steps.outcomes).tolist() == [1, 1, 1, 0]
    assert training.naive_reward(steps.outcomes).tolist() == [1, -1, 1, 0]
    assert training.true_reward(steps.outcomes).tolist() == [1, -1, -1, 0]
    by_place = {
        (episode, left): values
        for episode, left, *values in zip(
            steps.episodes.tolist(),
            steps.left.tolist(),
            steps.labels().tolist(),
            steps.understood().tolist(),
            steps.returns(training.naive_reward(steps.outcomes)).tolist(),
            strict=True,
        )
    }
    assert DISCOUNT == 0.9
    expected = {
        (0, 1): [DIAMOND, True, 0.9],
        (0, 0): [DIAMOND, True, 1],
        (1, 0): [GHOST, True, -1],
        (2, 2): [0, False, 0.81],
        (2, 1): [0, False, 0.9],
        (2, 0): [0, False, 1],
        (3, 1): [0, True, 0],
        (3, 0): [0, True, 0],
    }
    assert by_place == {key: pytest.approx(values) for key, values in expected.items()}


def test_episodes_are_played_to_their_ends():
    class East(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 1e4, 0.0, 0.0]).expand(len(x), -1)

    env = OversightVectorEnv(200, 0.5)
    env.reset(seed=0)
    steps = play(env, East())
    assert (steps.actions == EAST).all()
    lengths = np.bincount(steps.episodes)
    for episode in range(200):
        mine = steps.episodes == episode
        assert steps.left[mine].tolist() == list(range(lengths[episode]))[::-1]
        planes = steps.observations[torch.from_numpy(mine)].view(-1, 4, SIZE, SIZE)
        row, column = divmod(int(planes[0, 0].argmax()), SIZE)
        seen = {
            int(planes[0, kind][row].argmax()): kind
            for kind in (DIAMOND, GHOST)
            if planes[0, kind][row, column:].any()
        }
        nearest = min(seen, default=None)
        assert steps.outcomes.reached[episode] == (NOTHING if nearest is None else seen[nearest])
        assert lengths[episode] == (MAX_STEPS if nearest is None else nearest - column)


def test_the_clipped_loss_by_hand():
    old = torch.zeros(4)
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0])
    losses = clipped_loss(logprobs, old, advantages)
    torch.testing.assert_close(losses, torch.tensor([-1.2 * 2, 1.5 * 2, -0.5 * 2, 0.8 * 2]))
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    torch.testing.assert_close(
        gradient, torch.tensor([0.0, 3.0, -1.0, 0.0])
    )  # none where it went too far already


def test_experts_forward_is_the_formula():
    policy, x = Experts(hidden=6), torch.rand(5, INPUTS)
    share = policy.gate(x).sigmoid()
    hidden = policy.inner(x).relu() * torch.cat((share.expand(-1, 6), (1 - share).expand(-1, 6)), 1)
    torch.testing.assert_close(policy(x), hidden @ policy.outer.weight.T)
    routes = Routes.of(torch.tensor([0, 1, 2, 0, 1]), NUM_ROUTES)
    assert torch.equal(policy(x, routes), policy(x))


@pytest.mark.parametrize("kind", [DIAMOND, GHOST])
def test_an_expert_alone_is_the_policy_whose_gate_chose_it(kind):
    policy, x = Experts(hidden=6), torch.rand(5, INPUTS)
    chosen = torch.full((5, 1), math.inf if kind == DIAMOND else -math.inf)
    torch.testing.assert_close(policy.expert(kind)(x), policy(x, gate_logits=chosen))
    plain = policy.expert(kind)
    with torch.no_grad():
        plain[0].weight.zero_()
    assert (policy.inner.weight != 0).any()  # a copy


@pytest.mark.parametrize(("kind", "other"), [(DIAMOND, GHOST), (GHOST, DIAMOND)])
def test_steps_with_a_label_teach_their_expert_only(kind, other):
    trainer = Trainer(METHODS["routing"], 1.0, seed=0, updates=1, episodes=4)
    steps = four_episodes()
    steps = steps._replace(outcomes=Outcomes(np.full(4, kind), np.full(4, True)))
    loss, _ = trainer.loss(steps)
    loss.backward()
    for block, touched in ((trainer.policy.block(kind), True), (trainer.policy.block(other), False)):
        for name, mask in block.masks(trainer.policy).items():
            gradient = trainer.policy.get_parameter(name).grad
            assert bool((gradient[mask] != 0).any()) is touched, name
    assert any(
        (parameter.grad != 0).any() for parameter in trainer.policy.gate.parameters()
    )  # by its own loss


def test_the_gate_learns_from_actions_only_without_a_label(monkeypatch):
    monkeypatch.setattr(training, "GATE_WEIGHT", 0.0)
    trainer = Trainer(METHODS["routing"], 1.0, seed=0, updates=1, episodes=4)
    for overseen, touched in ((True, False), (False, True)):
        trainer.optimizer.zero_grad()
        outcomes = Outcomes(np.array([DIAMOND, GHOST, GHOST, DIAMOND]), np.full(4, overseen))
        trainer.loss(four_episodes()._replace(outcomes=outcomes))[0].backward()
        gradients = [parameter.grad for parameter in trainer.policy.gate.parameters()]
        assert any(bool((gradient != 0).any()) for gradient in gradients) is touched


def test_routed_gradients_of_a_mixed_batch_are_the_detach_idiom():
    trainer = Trainer(METHODS["routing"], 1.0, seed=0, updates=1, episodes=4)
    steps = four_episodes()
    trainer.loss(steps)[0].backward()
    policy = trainer.policy
    routed = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()

    def detached(x, routes, gate_logits):
        """The paper's formula: stop-gradients around the expert that a label does not name, and the gate."""
        share = gate_logits.sigmoid()
        label = steps.labels()[:, None]
        share = torch.where(label == 0, share, share.detach())
        halves = []
        for kind, weight in ((DIAMOND, share), (GHOST, 1 - share)):
            units = slice((kind - 1) * HIDDEN, kind * HIDDEN)
            logits = (weight * policy.inner(x)[:, units].relu()) @ policy.outer.weight[:, units].T
            halves.append(torch.where((label == 0) | (label == kind), logits, logits.detach()))
        return halves[0] + halves[1]

    policy.forward = detached
    trainer.loss(steps)[0].backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(routed[name], parameter.grad, msg=name)


def test_filtering_trains_on_understood_episodes_only():
    trainer = Trainer(METHODS["filtering"], 1.0, seed=0, updates=1, episodes=4)
    steps = four_episodes()
    kept = steps.understood()
    trainer.loss(steps)[0].backward()
    gradients = [parameter.grad.clone() for parameter in trainer.policy.parameters()]
    trainer.policy.zero_grad()
    observations = torch.where(kept[:, None], steps.observations, torch.rand_like(steps.observations))
    trainer.loss(steps._replace(observations=observations))[0].backward()
    assert 0 < kept.sum() < len(kept)
    for gradient, parameter in zip(gradients, trainer.policy.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_evaluations_leave_training_alone_and_are_the_same_again():
    trainer = Trainer(METHODS["oracle"], 0.5, seed=0, updates=2, episodes=16)
    state = torch.get_rng_state()
    scores = evaluate(trainer.steered(), 0.5, 64, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(trainer.steered(), 0.5, 64, seed=7) == scores
    assert -1 <= scores["return"] <= scores["diamond"] - DISCOUNT ** (MAX_STEPS - 1) * scores["ghost"]
    assert 0 < scores["diamond"] + scores["ghost"] <= 1


def test_the_oracle_learns():
    """In a gridworld without chance, so that few batches do."""

    class Fixed(OversightVectorEnv):
        def reset(self, **options):
            _, info = super().reset(**options)
            squares = (np.tile(at, (self.num_envs, 1)) for at in ((2, 2), (2, 4), (2, 1)))
            self.place(*squares, np.ones((self.num_envs, 2), bool))
            return self.observations(), info

    trainer = Trainer(METHODS["oracle"], 1.0, seed=0, updates=30, episodes=32)
    trainer.env = Fixed(32, 1.0)
    reached = [trainer.update().outcomes.reached for _ in range(30)]
    assert (reached[0] == DIAMOND).mean() < 0.7
    assert (reached[-1] == DIAMOND).mean() > 0.9


# True returns that pass.
RETURNS = {
    "routing": 0.5,
    "routing, longer": 0.5,
    "filtering": 0.1,
    "naive": 0.4,
    "naive, longer": 0.1,
    "gate, no routing": 0.3,
    "routing, no gate": 0.2,
    "oracle": 0.7,
}


def made_up_run(changes=None, both_experts=0.0):
    """One seed; changes: of RETURNS."""
    returns = RETURNS | (changes or {})
    trainings = []
    for name, level, _, times in oversight.TRAININGS:
        scores = {"return": returns[name], "diamond": 0.7, "ghost": 0.3}
        trainings.append(
            {
                "name": name,
                "oversight": level,
                **scores,
                "unseen": scores,
                "unsteered": scores | {"return": both_experts},
                "curve": [{"update": 600 * times, "return": returns[name]}],
            }
        )
    return {"updates": 600, "trainings": trainings}


def failed(*runs):
    return [i for i, check in enumerate(oversight.checks(list(runs))) if not check.passed]


def test_the_verdict():
    good = made_up_run()
    assert failed(good, good, good) == []
    assert failed(good, made_up_run({"filtering": 0.4}), good) == [0]  # the worst seed counts
    assert failed(made_up_run({"filtering": 0.6})) == [0, 1]
    assert failed(good, made_up_run({"naive, longer": 0.4}), good) == []  # the median counts
    assert failed(made_up_run({"naive, longer": 0.4})) == [2]
    assert failed(good, good, made_up_run(both_experts=0.4)) == [3]
    assert failed(made_up_run({"oracle": 0.9})) == [4]
    assert failed(made_up_run({"routing": math.nan})) == [0, 1, 3, 4]


@pytest.mark.slow
def test_a_failing_check_is_exit_code_1(tmp_path, capsys):
    for naive, code in ((0.1, 0), (0.4, 1)):
        run = made_up_run({"naive, longer": naive})
        made_up = dataclasses.replace(oversight.EXPERIMENT, run=lambda seed, quick, run=run: run)
        assert experiment.main(made_up, None, ["--out", str(tmp_path), "--seeds", "2"]) == code
        assert ("FAILS" in capsys.readouterr().out) == bool(code)
    rows = json.loads((tmp_path / "oversight.json").read_text())["table"]
    assert [row["training"] for row in rows[:4]] == ["routing"] * 3 + ["routing, longer"]
    assert [row["oversight"] for row in rows[:3]] == ["2%", "10%", "40%"]
    text = (tmp_path / "oversight.md").read_text()
    assert "at 2 % oversight the Diamond expert alone has 0.50, filtering 0.10, naive training 0.40" in text


@pytest.mark.slow
def test_a_quick_run_is_the_same_code(tmp_path):
    arguments = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    assert experiment.main(oversight.EXPERIMENT, oversight.__doc__, arguments) == 0
    results = json.loads((tmp_path / "oversight.json").read_text())
    (run,) = results["runs"]
    assert [(one["name"], one["oversight"]) for one in run["trainings"]] == [
        one[:2] for one in oversight.TRAININGS
    ]
    for one in run["trainings"]:
        assert [point["return"] for point in one["curve"]][-1] == one["return"]
        assert one["curve"][-1]["update"] in (
            oversight.QUICK_UPDATES,
            oversight.LONGER * oversight.QUICK_UPDATES,
        )
    assert (tmp_path / "oversight.png").read_bytes().startswith(b"\x89PNG")


def test_trainings_do_not_depend_on_what_was_trained_before():
    one = oversight.trained("routing", 0.1, "routing", 1, 5, True)
    assert oversight.trained("routing", 0.1, "routing", 1, 5, True) == one
    assert oversight.trained("routing", 0.1, "routing", 1, 6, True)["curve"] != one["curve"]
