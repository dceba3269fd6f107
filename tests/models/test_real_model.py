"""A pretrained model with its own weights, which have what random ones lack: activations of a thousand beside one."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import real_model
import transformers

from gradroute import era, models
from gradroute.models import route, unroute
from gradroute.optim import RoutedAdamW, routed_param_groups

pytestmark = pytest.mark.slow

RETAIN, FORGET = 0, 1
TEXTS = (
    "The sun is a star. The planets of the solar system go around it, and the earth is the third of them.",
    'Permission is hereby granted, free of charge, to any person obtaining a copy of this software and "as is".',
)
TOKENS = 20
LAYERS = 3  # of the shortened model
UNITS = 64


@pytest.fixture(scope="module")
def pretrained():
    """Loaded once; tests change copies."""
    return real_model.load(torch.float32)


@pytest.fixture(scope="module")
def saved(pretrained, tmp_path_factory):
    """The same as a folder of transformers, which loads faster."""
    folder = tmp_path_factory.mktemp("smollm2")
    pretrained[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short(pretrained):
    """The first layers of it."""
    model = copy.deepcopy(pretrained[0])
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    return model


def batch(tokenizer, labels=(RETAIN, FORGET)):
    """Rows of one label each: words [B, S] and route_ids [B, S]."""
    rows = [tokenizer(TEXTS[label]).input_ids[:TOKENS] for label in labels]
    return torch.tensor(rows), torch.tensor(labels)[:, None].expand(-1, TOKENS)


def gradients(model, words, **inputs):
    model.zero_grad()
    model(words, labels=words, use_cache=False, **inputs).loss.backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def plans(config):
    return {
        "sgtm": models.sgtm(config, forget_heads=3, forget_units=UNITS),
        "localize_mlp": models.localize_mlp(range(LAYERS), UNITS),
        "steering": models.steering([0, 1], dim=5),
        "era": models.era(units=UNITS),
    }


def by_hand(name, model, words, ids):
    """The gradients that routing by a plan must give, by the detach idiom hooked into the plain model."""
    if name == "sgtm":
        parts = [sgtm_by_hand(model, words[ids[:, 0] == label], label) for label in (RETAIN, FORGET)]
        return {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
    hooks = [
        layer.register_forward_hook(lambda module, args, output: detached(output, ids, slice(5, 6)))
        if name == "steering"
        else layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: (
                detached(args[0], ids, slice(UNITS) if name == "localize_mlp" else slice(-UNITS, None)),
            )
        )
        for layer in model.model.layers[: 2 if name == "steering" else LAYERS]
    ]
    found = gradients(model, words)
    for hook in hooks:
        hook.remove()
    return found


def detached(x, ids, kept):
    m = torch.ones_like(x)
    m[ids == FORGET] = 0
    m[..., kept] = 1
    return m * x + (1 - m) * x.detach()


def sgtm_by_hand(model, words, label):
    """A batch of one label: retain tokens do not see the forget part; forget tokens update nothing else."""
    features = 3 * model.config.head_dim
    outer = [(layer.self_attn.o_proj, features) for layer in model.model.layers]
    outer += [(layer.mlp.down_proj, UNITS) for layer in model.model.layers]
    hooks = [m.register_forward_pre_hook(without_last(n)) for m, n in outer if label == RETAIN]
    found = gradients(model, words)
    for hook in hooks:
        hook.remove()
    if label == FORGET:
        forgotten = {"q_proj": features, "k_proj": 64, "v_proj": 64, "gate_proj": UNITS, "up_proj": UNITS}
        for name, gradient in found.items():
            for part, count in forgotten.items():
                if part in name:
                    gradient[:-count] = 0
            for part, count in (("o_proj", features), ("down_proj", UNITS)):
                if part in name:
                    gradient[:, :-count] = 0
    return found


def without_last(count):
    def hook(module, args):
        x = args[0].clone()
        x[..., -count:] = 0
        return (x,)

    return hook


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


def copy_for(name, model):
    """A copy, with the units that era's plan takes for added ones."""
    model = copy.deepcopy(model)
    if name == "era":
        era.expand(model, UNITS, zero_output=False)
    return model


@pytest.mark.parametrize("name", ["sgtm", "localize_mlp", "steering", "era"])
def test_gradients_of_pretrained_layers_are_those_of_the_detach_idiom(pretrained, short, name):
    """In fp32 to its rounding; in bf16 at most twice as far from fp32's as the idiom in bf16."""
    words, ids = batch(pretrained[1])
    model = copy_for(name, short)
    exact, unrouted = by_hand(name, model, words, ids), gradients(model, words)
    assert max(error(unrouted[key], exact[key]) for key in exact) > 0.1
    route(model, plans(model.config)[name])
    got = gradients(model, words, route_ids=ids)
    assert got.keys() == exact.keys()
    for key, expected in exact.items():
        assert error(got[key], expected) <= 1e-5, (
            key
        )  # sums of fp32 in another order: a few units in the last place
    unroute(model.bfloat16())
    idiom = by_hand(name, model, words, ids)
    route(model, plans(model.config)[name])
    got = gradients(model, words, route_ids=ids)
    for key, expected in exact.items():
        assert error(got[key], expected) <= 2 * error(idiom[key], expected) + 1e-3, key


@pytest.mark.parametrize(
    ("dtype", "presets"),
    [(torch.float32, ("localize_mlp", "steering", "era", "sgtm")), (torch.bfloat16, ("era", "sgtm"))],
    ids=["fp32", "bf16"],
)
def test_a_pretrained_model_is_trained_by_presets_saved_and_loaded(
    pretrained, saved, dtype, presets, tmp_path
):
    """The whole way, preset after preset: routed it computes what it did, and learns; it ends as a plain checkpoint."""
    words, ids = batch(pretrained[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    with torch.no_grad():
        assert 1 < model(words, labels=words).loss < 4  # nats; who knows nothing has log(49152), 10.8
    for name in presets:
        if name == "era":
            added = era.expand(model, UNITS)
        route(model, plans(model.config)[name])
        first, second = (step(model, words, ids) for _ in range(2))
        assert second < first
        unroute(model)
        if name == "era":
            era.ablate(model, added, how="slice")
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config.intermediate_size == pretrained[0].config.intermediate_size
    model.save_pretrained(tmp_path)
    pretrained[1].save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answers = [m.generate(**prompt, max_new_tokens=4, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*answers)
    assert answers[0].shape[1] > prompt["input_ids"].shape[1]


def step(model, words, ids):
    optimizer = RoutedAdamW(routed_param_groups(model), lr=1e-4, fused=True)
    loss = model(words, labels=words, route_ids=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    model.zero_grad()
    return float(loss.detach())
