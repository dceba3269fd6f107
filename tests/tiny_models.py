"""Tiny models of transformers, with batches and gradients, for the tests of gradroute.models."""

import torch
import transformers

VOCABULARY, D_MODEL, D_FF, HEADS, KV_HEADS, LAYERS = 32, 16, 24, 4, 2, 2
HEAD_DIM = D_MODEL // HEADS


#: How transformers calls recomputation: activation checkpointing, and gradient checkpointing in 5.17 and before.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


def checkpoint_layers(model, use_reentrant=False):
    """Has the model recompute its layers in backward."""
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})


def llama(**options):
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**defaults | options))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def gpt_neo():
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_layers=LAYERS,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        num_heads=HEADS,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPTNeoForCausalLM(config)


def neox():
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPTNeoXForCausalLM(config)


def tokens(batch=4, sequence=6, seed=0):
    """`[B, S]`, none of which is padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, sequence), generator=generator)


def mixed_ids(like, num_routes=2, seed=0):
    """A route for every token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_routes, like.shape, generator=generator)


def gradients(model):
    """The gradients of all trained parameters, cloned; a parameter without one is missing."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, input_ids, **arguments):
    """The gradients of the model's own loss, and no others."""
    model.zero_grad()
    model(input_ids=input_ids, labels=input_ids, **arguments).loss.backward()
    return gradients(model)


def assert_gradients_close(got, want, tolerance=1e-6):
    """`tolerance` is absolute, for gradients of at most a few units in fp32: some roundings of their sums."""
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        error = (got[name] - gradient).abs().max()
        assert error <= tolerance, f"{name}: off by {error}"


def assert_gradients_equal(got, want):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name
