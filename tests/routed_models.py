"""Routed models for tests/models: plans with every site, batches, and comparisons of gradients."""

import re
import warnings

import model_zoo
import pytest
import torch
from model_zoo import HEADS, HIDDEN, LAYOUTS, NAMES, VOCABULARY, WIDTH, fresh, plain

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites, models
from gradroute.models import NANO_GPT, ResidualSites, Shape

# Two ways to the same fp32 sums, each through some twenty layers of them: a few units in the last place.
TOLERANCE = 1e-5
OF_TRANSFORMERS = [name for name in NAMES if name != "nano_gpt"]


def route(name, model, plan, **options):
    if name == "nano_gpt":
        options["architecture"] = NANO_GPT
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tied parameter", category=RuntimeWarning)
        return models.route(model, plan, **options)


def routed(name, plan, **options):
    return route(name, fresh(name), plan, **options)


def batch(rows=2, tokens=10, routes=2, padding=True):
    """Tokens (the one called padding among them), targets (one for every position) and ids."""
    shape = (rows, tokens)
    ids = torch.randint(0, routes, shape)
    ids.view(-1)[:routes] = torch.arange(routes)[: ids.numel()]
    words = torch.randint(1, VOCABULARY, shape)
    if padding:
        words[0, 0] = 0
    return words, torch.randint(0, VOCABULARY, shape), ids


def table(features, routes=2):
    """Weights of all kinds; no two routes alike."""
    choices = torch.tensor([0.0, 1.0, 0.5, -0.75])
    return choices[torch.randint(0, 4, (routes, features))]


def check(got, expected, tolerance=TOLERANCE):
    assert got.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 0, name
        assert model_zoo.error(got[name], expected[name]) <= tolerance, name


def check_differ(got, other, names=None):
    """Masks tell: the gradients are not those of the unrouted model."""
    for name in got if names is None else names:
        assert model_zoo.error(got[name], other[name]) > 0.01, name


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


def activation_sites(name, routes=2):
    """Every activation site of every layer, apart from edges."""
    layout = LAYOUTS[name]
    return {
        "mlp": MLPSites(pre=table(HIDDEN, routes), hidden=table(HIDDEN, routes), output=table(WIDTH, routes)),
        "attention": AttentionSites(
            query=table(HEADS, routes),
            key=table(layout.kv_heads, routes),
            value=table(layout.kv_heads, routes),
            heads=table(HEADS, routes),
        ),
        "residual": {
            0: ResidualSites(pre=table(WIDTH, routes), post=table(WIDTH, routes)),
            1: ResidualSites(mid=table(WIDTH, routes) if layout.mid else None, post=table(WIDTH, routes)),
        },
    }


def update_sites(name, routes=2):
    """Every site of parameters."""
    layout = LAYOUTS[name]
    bias = table(WIDTH, routes) if layout.output_bias else None
    return {
        "mlp": MLPSites(
            update_in=table(HIDDEN, routes), update_out=table(HIDDEN, routes), update_output_bias=bias
        ),
        "attention": AttentionSites(
            update_q=table(HEADS, routes),
            update_kv=table(layout.kv_heads, routes),
            update_out=table(HEADS, routes),
            update_output_bias=bias,
        ),
        "norm": NormSites(table(WIDTH, routes)),
        "qk_norm": NormSites(table(layout.head_dim, routes)) if layout.qk_norm_heads else None,
        "final_norm": NormSites(table(WIDTH, routes)),
        "embedding": EmbeddingSites(table(WIDTH, routes)),
        "lm_head": LinearSites(update_rows=table(VOCABULARY, routes), update_cols=table(WIDTH, routes)),
    }


def merged(*sites):
    """Sites of one type with the tables of all."""
    return type(sites[0])(**{name: table for each in sites for name, table in each.tables.items()})


def all_sites(name, routes=2):
    """Activations, parameters, forwards and edges at once."""
    activations, updates = activation_sites(name, routes), update_sites(name, routes)
    forward = {"forward_heads": table(HEADS, routes)}
    if name != "nano_gpt":
        forward |= {"score_edges": table(routes, routes), "value_edges": table(routes, routes)}
    return updates | {
        "residual": activations["residual"],
        "mlp": merged(activations["mlp"], updates["mlp"], MLPSites(forward=table(HIDDEN, routes))),
        "attention": merged(activations["attention"], updates["attention"], AttentionSites(**forward)),
    }


def documents(lengths):
    """Documents, each as its tokens, targets and ids, `[1, length]`."""
    return [batch(1, length, padding=False) for length in lengths]


def shape_of(name):
    layout = LAYOUTS[name]
    if name == "nano_gpt":
        return Shape(2, WIDTH, HIDDEN, HEADS, layout.kv_heads, layout.head_dim)
    return plain(name).config


def tables_of(plan, layers=4, **changes):
    """By layer and site the weights of a plan for a Llama-like shape."""
    widths = {"d_model": 16, "d_ff": 24, "heads": 4, "kv_heads": 2, "head_dim": 4}
    return [
        {
            f"{entry}.{site}": table.weights
            for entry, sites in each._asdict().items()
            if sites is not None
            for site, table in sites.tables.items()
        }
        for each in plan.layers(Shape(layers, **widths | changes))
    ]
