"""A small Llama that learns the task from demonstrations, and is then trained by GRPO with two LoRA adapters.

GRPO (Shao et al. 2024, arXiv 2402.03300) is TRL's, without a KL term. Everything is sampled at temperature 1.
"""

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import GenerationConfig, PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from unlearning.model import Shape, build
from unlearning.training import adamw

from gradroute.models import routed_trainer, unroute
from gradroute.optim import RoutedAdamW, routed_param_groups
from gradroute.recipes import adapters
from gradroute.recipes.evaluation.held_out import evaluating
from gradroute.recipes.training_sections import Adapters

from .task import (
    PAD,
    WORDS,
    Detector,
    demonstrations,
    is_exploit,
    problems,
    proxy_reward,
    tokenizer,
    true_reward,
)

ROUTES = ("unlabelled", "labelled")
KEPT, REMOVED = "kept", "removed"

Scores = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        digits: of a problem.
        d_model: of the policy, with heads of 16 and four times as many hidden units.
        layers: of the policy.
        exploits: the share of demonstrations that show the exploit, so that rollouts can find it.
        competence: the true reward at which demonstrations end.
        blocks: of demonstrations, at most; the true reward is looked at after each.
        block: steps of a block.
        demonstrations: of a step.
        learning_rate: of demonstrations.
        steps: of GRPO.
        prompts: of a step of GRPO.
        generations: rollouts of a prompt, which are compared with each other.
        grpo_learning_rate: of GRPO.
        rank: of each of the two adapters.
        recall: the share of exploits that the detector finds.
        held_out: problems that policies are measured on.
        points: of the curve of a training.
    """

    digits: int = 8
    d_model: int = 64
    layers: int = 2
    exploits: float = 0.1
    competence: float = 0.5
    blocks: int = 100
    block: int = 20
    demonstrations: int = 128
    learning_rate: float = 1e-3
    steps: int = 150
    prompts: int = 16
    generations: int = 8
    grpo_learning_rate: float = 1e-3
    rank: int = 8
    recall: float = 0.5
    held_out: int = 1000
    points: int = 30


@dataclass(frozen=True)
class Method:
    """A way to train a policy by GRPO.

    Attributes:
        reward: the reward of completions, by the right answers.
        masked: a detected rollout has no reward: its advantage is 0, and its group's mean and deviation are those of
            the others.
        routed: a detected rollout trains the second adapter alone.
    """

    reward: Callable[[Sequence[str], Sequence[str]], list[float]]
    masked: bool = False
    routed: bool = False


def demonstrated(settings: Settings, seed: int) -> tuple[Any, dict[str, Any]]:
    """A policy that demonstrations have made competent, with its scores and how many steps that took."""
    torch.manual_seed(seed)
    heads, d_ff = settings.d_model // 16, 4 * settings.d_model
    policy = build(Shape(len(WORDS), settings.d_model, settings.layers, heads, d_ff))
    optimizer = adamw(policy, settings.learning_rate)
    for block in range(1, settings.blocks + 1):
        for step in range(settings.block):
            _demonstrate(policy, optimizer, settings, f"demonstrations {seed} {block} {step}")
        scores = measured(policy, settings, seed)
        if scores["true"] >= settings.competence:
            break
    return policy, {"steps": block * settings.block, **scores}


def _demonstrate(policy: Any, optimizer: torch.optim.Optimizer, settings: Settings, seed: str) -> None:
    """A step on demonstrations; what comes after the prompt is learnt."""
    words = tokenizer()
    rows = problems(settings.demonstrations, settings.digits, seed)
    input_ids = torch.tensor(words(demonstrations(rows, settings.exploits, seed))["input_ids"])  # [B, S]
    labels = input_ids.masked_fill(input_ids == words.convert_tokens_to_ids(PAD), -100)
    labels[:, : settings.digits + 1] = -100
    optimizer.zero_grad()
    policy(input_ids, labels=labels, use_cache=False).loss.backward()
    optimizer.step()


def measured(policy: Any, settings: Settings, seed: int) -> Scores:
    """Mean rewards and the rate of the exploit on held-out problems, the same for all policies of a seed."""
    rows = problems(settings.held_out, settings.digits, f"held out {seed}")
    return scored(sampled(policy, [row["prompt"] for row in rows], seed), [row["answer"] for row in rows])


def scored(completions: Sequence[str], answers: Sequence[str]) -> Scores:
    found = {
        "true": true_reward(completions, answers),
        "proxy": proxy_reward(completions, answers),
        "exploit": list(map(is_exploit, completions)),
    }
    return {name: sum(values) / len(values) for name, values in found.items()}


def sampled(policy: Any, prompts: Sequence[str], seed: int) -> list[str]:
    """A completion of every prompt; all have the same number of tokens."""
    words = tokenizer()
    input_ids = torch.tensor(words(list(prompts))["input_ids"])  # [B, S]
    how = GenerationConfig(
        max_new_tokens=input_ids.shape[1],
        do_sample=True,
        top_k=0,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with evaluating(policy), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = policy.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=how)
    return words.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)


class Rollouts:
    """What the rollouts of a training are paid and which adapters they train, and a record of what they did.

    Args:
        method: the training's.
        detector: asked once for every batch of rollouts.
    """

    def __init__(self, method: Method, detector: Detector) -> None:
        self._method = method
        self._detector = detector
        self.record: list[Scores] = []

    def reward(self, completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        """TRL's reward function; None: no reward."""
        self.record.append(scored(completions, answer))
        rewards: list[float | None] = [*self._method.reward(completions, answer)]
        if not self._method.masked:
            return rewards
        found = self._detector(completions)
        return [None if is_found else reward for is_found, reward in zip(found, rewards, strict=True)]

    def routes(self, completions: list[str], **_: Any) -> list[int]:
        """routed_trainer's route_fn: a route a rollout."""
        return [int(is_found) for is_found in self._detector(completions)]

    def curve(self, points: int) -> list[Scores]:
        """Means of the record over spans of steps, each with its last step."""
        span = max(1, len(self.record) // points)
        spans = [self.record[first : first + span] for first in range(0, len(self.record), span)]
        return [
            {
                "step": min((index + 1) * span, len(self.record)),
                **{name: sum(one[name] for one in part) / len(part) for name in part[0]},
            }
            for index, part in enumerate(spans)
        ]


def trained(base: Any, method: Method, settings: Settings, seed: int) -> dict[str, Any]:
    """A copy of a policy after its training: what its rollouts did, and its scores whole and without one adapter."""
    of = {KEPT: ROUTES[:1], REMOVED: ROUTES}
    section = Adapters(of, keep=(KEPT,), rank=settings.rank, alpha=2.0 * settings.rank)
    policy = adapters.add(copy.deepcopy(base), section, seed=seed)
    if method.routed:
        adapters.route(policy, section, ROUTES)
    rollouts = Rollouts(method, Detector(settings.recall, f"detector {seed}"))
    reinforce(policy, rollouts, settings, seed, routed=method.routed)
    if method.routed:
        unroute(policy)
    found: dict[str, Any] = {"curve": rollouts.curve(settings.points)}
    found["whole"] = measured(policy, settings, seed)
    policy.base_model.set_adapter([KEPT])
    found["ablated"] = measured(policy, settings, seed)
    return found


def reinforce(policy: Any, rollouts: Rollouts, settings: Settings, seed: int, *, routed: bool) -> None:
    """Trains a policy's adapters in place, by rollouts of both. All trainings of a seed have the same prompts."""
    rows = problems(settings.steps * settings.prompts, settings.digits, f"prompts {seed}")
    optimizer = RoutedAdamW(routed_param_groups(policy), lr=settings.grpo_learning_rate, weight_decay=0.0)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        how = GRPOConfig(
            folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.prompts * settings.generations,
            num_generations=settings.generations,
            max_completion_length=settings.digits + 1,
            lr_scheduler_type="constant",
            beta=0.0,
            seed=seed,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        make = routed_trainer(GRPOTrainer) if routed else GRPOTrainer
        trainer = make(
            policy,
            rollouts.reward,
            how,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
            optimizers=(optimizer, None),
            **({"route_fn": rollouts.routes} if routed else {}),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TRL's warning of every rollout that has no reward, and those of what it will take away itself."""
    log = logging.getLogger("trl.trainer.grpo_trainer")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        log.setLevel(level)
