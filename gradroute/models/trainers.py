"""routed_trainer: the trainers of transformers and TRL, with routes.

These trainers call the model themselves, and drop columns that they do not know on the way: when a dataset is prepared,
when unused columns are removed, when a batch is collated, and between the batch and the model. A routed trainer is a
subclass that keeps `route_ids` and `route_strength` beside the tokens at each of these places, and that trains with
routes or raises. TRL is never imported here: the caller has it, who has one of its trainers.
"""

from __future__ import annotations

import functools
from typing import Any

from .transformers_trainer import RoutedTrainer
from .trl_trainers import RoutedDPOTrainer, RoutedGRPOTrainer, RoutedSFTTrainer


def routed_trainer(trainer_class: Any) -> Any:
    """The subclass of a trainer that trains a routed model with routes, or raises.

    Its datasets have a column `route_ids` and may have `route_strength`, for each token or for the whole document; see
    `RouteCollator`. They are kept through the preparation of the dataset, with the removal of unused columns and
    without it, and through any collator that pads examples or puts them one after the other. Evaluation is unrouted.

    - `transformers.Trainer`: with any such collator.
    - `trl.SFTTrainer`: `text`, `messages`, `prompt` and `completion` with one route a document, `input_ids` also with
      one a token; truncation, every strategy of packing, and padding-free batches.
    - `trl.DPOTrainer`: one route a pair, or two, of the chosen and the rejected completion. Log-probabilities of the
      reference are unrouted.
    - `trl.GRPOTrainer`: one route a prompt, from the dataset, or what `route_fn` makes of the rollouts; the forward of
      the policy's loss is routed. Generation and the reference are unrouted, and so are old log-probabilities, unless
      the plan masks in forward: then these are of the forward that is trained, so that the ratio starts at 1.

    TRL's fused head reads the head's weight, which no route can mask; where the plan routes the head, or adapters of
    it, SFT and DPO and GRPO compute all logits instead.

    The class takes the trainer's arguments and these, all keywords:

    - `route_align`: "position" (default) or "next_token", see `RouteCollator`.
    - `route_fn` (GRPO): called after every generation with the keywords `prompts` and `completions` (lists of B),
      `completion_ids` (a list of B lists), `rewards` `[B, functions]`, `advantages` `[B]`, and `inputs`, the B rows
      of the dataset. It returns the route of every rollout `[B]`, or of every token of the completions, `[B, C]` or
      B lists (prompts then have that of the dataset, or 0); or a dict of `route_ids` and `route_strength`.

    Args:
        trainer_class: `transformers.Trainer` or `Seq2SeqTrainer`, one of the three of TRL above, or a subclass of one.

    Returns:
        A class with the trainer's arguments and those of routes.

    Raises:
        TypeError: no class of these.

    The class's constructor raises ValueError where the model is not routed, where it would add adapters itself
    (`peft_config`), and where the dataset has no `route_ids`.
    """
    return _made(trainer_class, _mixin_of(trainer_class))


@functools.cache
def _made(trainer_class: Any, mixin: Any) -> Any:
    members = {"__module__": trainer_class.__module__, "__doc__": trainer_class.__doc__}
    return type(f"Routed{trainer_class.__name__}", (mixin, trainer_class), members)


def _mixin_of(trainer_class: object) -> type:
    """The mixin for the first class among a trainer's bases that is transformers' or TRL's."""
    mixins: dict[str, type] = {
        "transformers.Trainer": RoutedTrainer,
        "transformers.Seq2SeqTrainer": RoutedTrainer,
        "trl.SFTTrainer": RoutedSFTTrainer,
        "trl.DPOTrainer": RoutedDPOTrainer,
        "trl.GRPOTrainer": RoutedGRPOTrainer,
    }
    bases = trainer_class.__mro__ if isinstance(trainer_class, type) else ()
    names = [f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in bases]
    known = [name for name in names if name.partition(".")[0] in ("transformers", "trl")]
    if any(issubclass(base, RoutedTrainer) for base in bases):
        raise TypeError(
            f"trainer_class: got {trainer_class!r}, which is routed already, expected an ordinary one"
        )
    if not known or known[0] not in mixins:
        raise TypeError(
            f"trainer_class: got {trainer_class!r}, expected transformers.Trainer, trl.SFTTrainer, trl.DPOTrainer, "
            "trl.GRPOTrainer or a subclass of one that is not TRL's; another trainer's forwards can be routed by "
            "gradroute.models.routing"
        )
    return mixins[known[0]]
