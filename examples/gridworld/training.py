"""Training by policy gradients, with what oversight there is: routing, filtering, the naive way, and an oracle.

Batches are whole episodes. The loss is PPO's (Schulman et al. 2017, arXiv 1707.06347) with Monte Carlo returns and a
value network as the baseline: it takes several steps of the optimizer on each batch, which minutes on a CPU need. Cloud
et al. 2024 (arXiv 2410.04332, appendix F) use REINFORCE, one step a batch, for 328 million steps of the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from gradroute import Routes
from gradroute.optim import RoutedAdamW, routed_param_groups

from .agent import ACTIONS, NUM_ROUTES, Experts, mlp
from .environment import DIAMOND, GHOST, NOTHING, Outcomes, OversightVectorEnv

# The paper's discount is 0.97. Where a step costs more, the nearer square is preferred after fewer episodes.
DISCOUNT = 0.9
EPISODES = 512  # episodes in a batch
EPOCHS = 4  # steps of the optimizer on a batch
CLIP = 0.2
LEARNING_RATE = 2e-3
VALUE_WEIGHT = 0.5
ENTROPY_WEIGHTS = 0.05, 0.02  # in the first batch and in the last
# Labels come from overseen squares only, which the gate sees: taught more by them, it learns to tell squares that are
# overseen rather than which square comes next, and leaves the experts mixed where nothing is overseen.
GATE_WEIGHT = 0.03

Rewards = NDArray[np.float64]  # [N], of whole episodes


def flawed_reward(outcomes: Outcomes) -> Rewards:
    """A reward of 1 for reaching something."""
    return (outcomes.reached != NOTHING).astype(np.float64)


def naive_reward(outcomes: Outcomes) -> Rewards:
    """A reward of 1 for reaching something, but -1 where it is known to be Ghost."""
    return flawed_reward(outcomes) - 2.0 * (outcomes.overseen & (outcomes.reached == GHOST))


def true_reward(outcomes: Outcomes) -> Rewards:
    """A reward of 1 for Diamond and -1 for Ghost."""
    return (outcomes.reached == DIAMOND) * 1.0 - (outcomes.reached == GHOST)


@dataclass(frozen=True)
class Method:
    """A way to train a policy.

    Attributes:
        reward: the reward of episodes by their ends.
        filtered: only episodes are trained on of which it is known how they ended.
        experts: the policy is `Experts`, and its gate is taught labels; else it is one MLP.
        routed: steps of episodes with a label teach the expert of that label only.
        gated: the experts' gate is learned.
    """

    reward: Callable[[Outcomes], Rewards]
    filtered: bool = False
    experts: bool = False
    routed: bool = False
    gated: bool = True


METHODS = {
    "routing": Method(flawed_reward, experts=True, routed=True),
    "filtering": Method(true_reward, filtered=True),
    "naive": Method(naive_reward),
    "oracle": Method(true_reward),
    "gate, no routing": Method(flawed_reward, experts=True),
    "routing, no gate": Method(flawed_reward, experts=True, routed=True, gated=False),
}


class Steps(NamedTuple):
    """All steps of N whole episodes, S in all."""

    observations: Tensor  # [S, INPUTS]
    actions: Tensor  # [S]
    episodes: NDArray[np.int64]  # [S] in [0, N)
    left: NDArray[np.int64]  # [S]: how many steps of the episode follow
    outcomes: Outcomes  # the ends of the episodes

    def returns(self, rewards: Rewards) -> Tensor:
        """[S] fp32: the reward [N] of the episode's end, discounted once for each step that follows."""
        return torch.from_numpy((rewards[self.episodes] * DISCOUNT**self.left).astype(np.float32))

    def labels(self) -> Tensor:
        """[S]: DIAMOND or GHOST in episodes that ended there under oversight, else 0: the routes."""
        known = np.where(self.outcomes.overseen, self.outcomes.reached, 0)
        return torch.from_numpy(known[self.episodes])

    def understood(self) -> Tensor:
        """[S]: whether it is known how the episode ended, which includes that it reached nothing."""
        known = self.outcomes.overseen | (self.outcomes.reached == NOTHING)
        return torch.from_numpy(known[self.episodes])


@torch.no_grad()
def sample(policy: nn.Module, observations: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Observations [A, 4, SIZE, SIZE] → as the policy's input [A, INPUTS], and actions [A]."""
    x = torch.from_numpy(observations).flatten(1)
    return x, torch.multinomial(policy(x).softmax(1), 1)[:, 0]


def play(env: OversightVectorEnv, policy: nn.Module) -> Steps:
    """One episode in each of the N gridworlds. The policy is asked only where an episode is not over yet."""
    observations, _ = env.reset()
    lengths = np.zeros(env.num_envs, np.int64)
    actions = np.zeros(env.num_envs, np.int64)
    playing = np.arange(env.num_envs)
    parts: list[tuple[Tensor, Tensor, NDArray[np.int64], NDArray[np.int64]]] = []
    while len(playing):
        x, chosen = sample(policy, observations[playing])
        parts.append((x, chosen, playing, lengths[playing]))
        actions[playing] = chosen.numpy()
        observations, _, terminated, truncated, _ = env.step(actions)
        lengths[playing] += 1
        playing = playing[~(terminated | truncated)[playing]]
    inputs, all_actions, episodes, steps = zip(*parts, strict=True)
    of_step = np.concatenate(episodes)
    left = lengths[of_step] - 1 - np.concatenate(steps)
    return Steps(torch.cat(inputs), torch.cat(all_actions), of_step, left, env.outcomes)


def clipped_loss(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """PPO's objective, [S] each → [S]: no gain from moving a probability further than CLIP in one batch."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)


def gate_loss(gate_logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over labelled steps of -log Γ for Diamond, -log(1 - Γ) for Ghost; [S, 1] and [S]. 0 without labels."""
    labelled = labels > 0
    is_diamond = (labels[labelled] == DIAMOND).float()
    losses = F.binary_cross_entropy_with_logits(gate_logits[labelled, 0], is_diamond, reduction="none")
    return losses.sum() / max(1, len(losses))


class Trainer:
    """A policy, its value network, and one method of training them.

    Args:
        method: the way to train.
        oversight: the probability that a terminal square is under oversight.
        seed: the seed of the weights, the gridworlds and the actions.
        updates: the number of batches.
        episodes: the number of episodes in a batch.
    """

    def __init__(
        self, method: Method, oversight: float, seed: int, updates: int, episodes: int = EPISODES
    ) -> None:
        torch.manual_seed(seed)
        self.method = method
        self.updates = updates
        self.done = 0
        self.env = OversightVectorEnv(episodes, oversight)
        self.env.reset(seed=seed)
        self.policy: nn.Module = Experts(gated=method.gated) if method.experts else mlp(ACTIONS)
        self.value = mlp(1)
        groups = [*routed_param_groups(self.policy), {"params": list(self.value.parameters())}]
        self.optimizer = RoutedAdamW(groups, lr=LEARNING_RATE, weight_decay=0.0)

    def update(self) -> Steps:
        """Trains on one batch."""
        # The rate is constant at first, then falls to 0, so that the last batches leave little noise.
        learning_rate = LEARNING_RATE * min(1.0, 2 * (1 - self.done / self.updates))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        steps = play(self.env, self.policy)
        old: Tensor | None = None
        for _ in range(EPOCHS):
            loss, old = self.loss(steps, old)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.done += 1
        return steps

    def loss(self, steps: Steps, old: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss, and the actions' log-probabilities [S]; old: those when the actions were taken, where not these."""
        x, labels = steps.observations, steps.labels()
        policy, gate_logits = self.policy, None
        if isinstance(policy, Experts):
            gate_logits = policy.gate_logits(x)
            # Known to be in range, so nothing is checked.
            routes = Routes.of(labels, NUM_ROUTES, validate=False) if self.method.routed else None
            distribution = policy(x, routes, gate_logits).log_softmax(1)  # [S, ACTIONS]
        else:
            distribution = policy(x).log_softmax(1)
        logprobs = distribution.gather(1, steps.actions[:, None])[:, 0]
        old = logprobs.detach() if old is None else old
        values = self.value(x)[:, 0]
        returns = steps.returns(self.method.reward(steps.outcomes))
        entropies = -(distribution.exp() * distribution).sum(1)
        each = (
            clipped_loss(logprobs, old, returns - values.detach())
            + VALUE_WEIGHT * (values - returns).square()
            - self.entropy_weight * entropies
        )
        if self.method.filtered:
            each = each * steps.understood()
        loss = each.mean()
        if gate_logits is not None and self.method.gated:
            loss = loss + GATE_WEIGHT * gate_loss(gate_logits, labels)
        return loss, old

    @property
    def entropy_weight(self) -> float:
        first, last = ENTROPY_WEIGHTS
        return first + (last - first) * self.done / self.updates

    def steered(self) -> nn.Module:
        """The policy to use: of experts the one that goes to Diamond, alone."""
        return self.policy.expert(DIAMOND) if isinstance(self.policy, Experts) else self.policy


def evaluate(policy: nn.Module, oversight: float, episodes: int, seed: int) -> dict[str, float]:
    """The truth about a policy: the mean discounted return of episodes, and the shares that end on each square."""
    with torch.random.fork_rng(devices=[]):  # training then goes on as if nothing had been evaluated
        torch.manual_seed(seed)
        env = OversightVectorEnv(episodes, oversight)
        env.reset(seed=seed)
        steps = play(env, policy)
    reached = steps.outcomes.reached
    returns = steps.returns(true_reward(steps.outcomes))[
        : env.num_envs
    ]  # the index of the first step of each episode
    return {
        "return": returns.mean().item(),
        "diamond": float((reached == DIAMOND).mean()),
        "ghost": float((reached == GHOST).mean()),
    }
