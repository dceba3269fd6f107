"""One training of the pretrained model, whose checkpoints are not kept."""

import tempfile
from collections.abc import Sequence
from typing import Any

from gradroute.recipes.training import train
from gradroute.recipes.training_sections import Train


def fit(
    model: Any,
    rows: Sequence[dict[str, Any]],
    *,
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
    batches: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """Trains a model in place, in fp32; returns what `gradroute.recipes.training.train` does.

    Args:
        model: a routed or an ordinary one.
        rows: documents, as `train` takes them.
        steps: of the optimizer.
        batch_tokens: of every step.
        learning_rate: the highest one.
        seed: of the order of documents.
        batches: what is trained on instead of `rows`.
        more: further options of `Train`.
    """
    settings = Train(
        steps=steps,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        precision="fp32",
        save_every=0,
        log_every=max(1, steps // 20),
        arguments={"disable_tqdm": True},
        **more,
    )
    with tempfile.TemporaryDirectory() as folder:
        return train(model, rows, settings, folder, seed=seed, batches=batches)
