"""Routed trainers in each of two processes, which test_trainers_distributed.py starts by torch.distributed.run."""

import os
import sys
import warnings

import torch
import trl
import trl_cases as cases
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from gradroute.models import routed_trainer

DOCUMENTS = [
    {"input_ids": cases.ids(3 + i, i), "route_ids": [(i + t) % 2 for t in range(3 + i)]} for i in range(4)
]
OPTIONS = cases.STEP | {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}


def reward(completion_ids, **rollouts):
    return [float(sum(ids) % 7) for ids in completion_ids]


def route_fn(completion_ids, rewards, advantages, **rollouts):
    """Rewards and advantages are those of this process's rollouts alone."""
    assert rewards[:, 0].tolist() == reward(completion_ids)
    assert len(advantages) == len(completion_ids) == 2
    return [ids[-1] % 2 for ids in completion_ids]


def trainers(folder):
    """Each trainer by its name, on a model of its own."""
    data, words = cases.dataset(DOCUMENTS), cases.tokenizer()
    arguments = TrainingArguments(folder, **OPTIONS)
    collator = DataCollatorWithFlattening()
    yield (
        "Trainer",
        routed_trainer(Trainer)(cases.routed(), arguments, train_dataset=data, data_collator=collator),
    )
    arguments = trl.SFTConfig(folder, **OPTIONS, max_length=None)
    yield (
        "SFTTrainer",
        routed_trainer(trl.SFTTrainer)(cases.routed(), arguments, train_dataset=data, processing_class=words),
    )
    arguments = trl.GRPOConfig(folder, **OPTIONS, num_generations=2, max_completion_length=4)
    prompts = cases.dataset([{"prompt": cases.text(cases.ids(2 + i, i))} for i in range(4)])
    made = routed_trainer(trl.GRPOTrainer)
    more = {"train_dataset": prompts, "processing_class": words, "route_fn": route_fn}
    yield "GRPOTrainer", made(cases.routed(), reward, arguments, **more)


def main(folder):
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    for name, trainer in trainers(folder):
        torch.save(
            {"before": cases.weights(trainer.model), "after": cases.trained(trainer)},
            os.path.join(folder, f"{name}-{os.environ['RANK']}.pt"),
        )


if __name__ == "__main__":
    main(sys.argv[1])
