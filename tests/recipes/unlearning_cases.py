"""A tiny model and documents of two kinds that it learns in a few steps."""

import torch
import transformers

NAMES = ("retain", "forget")
TOKENS = 16  # of each kind


def documents(count, seed=0, length=14):
    """`count` documents of each kind: a walk over that kind's tokens, which goes on by 3 or 5."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for route, source in enumerate(NAMES):
        for _ in range(count):
            steps = 3 + 2 * torch.randint(0, 2, (length,), generator=generator)
            ids = (torch.randint(0, TOKENS, (1,), generator=generator) + steps.cumsum(0)) % TOKENS
            rows.append(
                {
                    "input_ids": (ids + route * TOKENS).tolist(),
                    "source": source,
                    "route_ids": [route] * length,
                }
            )
    return rows


def save_model(folder, **options):
    """A Llama of two layers as a folder of save_pretrained."""
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 2 * TOKENS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.2,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**defaults | options)).save_pretrained(folder)
    return folder
