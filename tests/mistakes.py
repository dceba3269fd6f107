"""Calls of every public name that are right, and what is wrong for each of their arguments."""

import math
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import gradroute
from gradroute import Routes, Table, attention, linear, models, tables
from gradroute.blocks import Block
from gradroute.models import Shape

NAN, INF = math.nan, math.inf


class Thing:
    """What no argument takes."""


THING = Thing()
NONE = (None,)
INT = ("1", 1.5, True, 1j, THING, [1], NAN, np.float32(1))
NUMBER = ("1", True, 1j, THING, [1.0], NAN, INF, torch.ones(2))
BOOL = (None, "yes", 1, 0.5, THING, [True])
NAME = (3, "nope", THING, 1.5, ["position"])
TENSOR = ("x", THING, 3, 1.5, [[1.0, 2.0]], np.ones((4, 4)))
ROUTES = (3, "x", THING, [0, 1])
SITES = (3, "x", THING, [[1.0], [0.0]], Table([[1.0], [1.0]]))
TABLE = ("x", THING, 3, [[1.0, 2.0], [1.0]], [1.0], [[NAN] * 4] * 2, [["a"]], [], [[1j]])
NUMBERS = (None, "x", THING, [[1], [1, 2]], {"a": 1}, ["a"])
LAYERS = (3, "01", [0.5], [True], [-1], [99], {0: 1}, THING, [], torch.zeros(1, 1, dtype=torch.long))
MODEL = (None, 3, "model", THING)
OPTIMIZER = (3, "adam", THING)
PER_LAYER = (3, "x", THING, Table([[1.0]]), torch.ones(2), gradroute.MLPSites, {0: 3}, [3, 4], {-1: None})
SOME_OF = (
    *("x", None, THING, 1.5, True, [], [0.5], [99], {}, [[1]], torch.ones(3)),
    *(slice(40, 50), slice(20, 40), slice(3, 3), slice(0.5, 1), 99),
)


class Call(NamedTuple):
    """A call that is right.

    Attributes:
        function: what is called.
        right: its arguments.
        wrong: for every argument, values that are refused.
        watched: a model that a refused call leaves as it was.
    """

    function: object
    right: dict
    wrong: dict
    watched: object = None


CONFIG = LlamaConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
)
MODEL_OF_ALL = LlamaForCausalLM(CONFIG)
EXPERTS = MixtralForCausalLM(
    MixtralConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=3,
    )
)
ROUTED = LlamaForCausalLM(CONFIG)
models.route(ROUTED, models.sgtm(CONFIG, 1, 4))
BLOCK = Block.units(MODEL_OF_ALL, 4)
WRONG_BLOCK = (None, 3, "x", THING, [BLOCK])
BATCH = Routes.of([0, 1, 1, 0], 2)
MASK = [[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
X, W, B = torch.ones(4, 4), torch.ones(4, 4), torch.ones(4)
Q = torch.ones(1, 2, 4, 4)
OF_LINEAR = gradroute.LinearSites(output=MASK)
OF_MLP = gradroute.MLPSites(hidden=MASK)
OF_NORM = gradroute.NormSites(MASK)
OF_ATTENTION = gradroute.AttentionSites(heads=[[1.0, 1.0], [0.0, 1.0]])


def tensors(*names, **optional):
    """What is wrong for tensors that a call needs, and for those it may lack."""
    return dict.fromkeys(names, NONE + TENSOR) | dict.fromkeys(optional, TENSOR)


OF_OP = {"routes": ROUTES, "sites": SITES, "backend": NAME}
OF_LAYER = {"sites": SITES, "backend": NAME}


def ops():
    """The ops and what explains one."""
    bf16 = X.bfloat16()
    yield (
        "route_grad",
        Call(
            gradroute.route_grad,
            {"x": X, "routes": BATCH, "table": MASK},
            {"x": NONE + TENSOR, "routes": ROUTES, "table": (*TABLE, torch.ones(3, 4)), "backend": NAME},
        ),
    )
    of_linear = {
        "x": (None, *TENSOR, torch.ones(4, 3), torch.ones(3, 4), bf16),
        "weight": (None, *TENSOR, torch.ones(4, 3), bf16),
        "bias": (*TENSOR, torch.ones(3)),
        **OF_OP,
        "sites": (*SITES, OF_MLP),
    }
    right = {"x": X, "weight": W, "bias": B, "routes": BATCH, "sites": OF_LINEAR}
    yield "routed_linear", Call(gradroute.routed_linear, right, of_linear)
    yield "linear.explain", Call(linear.explain, right, of_linear)
    yield (
        "linear.routed_linears",
        Call(
            linear.routed_linears,
            {"x": X, "layers": [(W, B, OF_LINEAR)], "routes": BATCH},
            {
                "x": NONE + TENSOR,
                "layers": (None, 3, "x", THING, [], [3], [(W, B)]),
                "routes": ROUTES,
                "backend": NAME,
            },
        ),
    )
    others = {"activation": NONE + NAME, **OF_OP}
    right = {"x": X, "w_in": W, "b_in": B, "w_out": W, "b_out": B, "routes": BATCH, "sites": OF_MLP}
    wrong = tensors("x", "w_in", "w_out", b_in=1, b_out=1) | others
    yield "routed_mlp", Call(gradroute.routed_mlp, right, wrong)
    yield "mlp.explain", Call(gradroute.mlp.explain, right, wrong)
    right = {"x": X, "w_gate": W, "w_up": W, "w_down": W, "routes": BATCH, "sites": OF_MLP}
    wrong = tensors("x", "w_gate", "w_up", "w_down", b_gate=1, b_up=1, b_down=1) | others
    yield "routed_gated_mlp", Call(gradroute.routed_gated_mlp, right, wrong)
    yield "gated_mlp.explain", Call(gradroute.gated_mlp.explain, right, wrong)
    middle = gradroute.ActivationSites(hidden=MASK)
    yield (
        "routed_activation",
        Call(
            gradroute.routed_activation,
            {"a": X, "routes": BATCH, "sites": middle, "activation": "gelu"},
            tensors("a") | {"activation": NONE + NAME, **OF_OP},
        ),
    )
    yield (
        "routed_glu",
        Call(
            gradroute.routed_glu,
            {"gate": X, "up": X, "routes": BATCH, "sites": middle},
            tensors("gate", "up") | {"activation": NONE + NAME, **OF_OP},
        ),
    )
    yield (
        "routed_rms_norm",
        Call(
            gradroute.routed_rms_norm,
            {"x": X, "weight": B, "routes": BATCH, "sites": OF_NORM},
            tensors("x", "weight")
            | {
                "eps": (*NUMBER, -1.0),
                "offset": NONE + NUMBER,
                "casting_mode": NONE + NAME,
                **OF_OP,
            },
        ),
    )
    yield (
        "routed_layer_norm",
        Call(
            gradroute.routed_layer_norm,
            {"x": X, "weight": B, "bias": B, "routes": BATCH, "sites": OF_NORM},
            tensors("x", "weight", bias=1) | {"eps": (None, *NUMBER, -1.0), **OF_OP},
        ),
    )
    yield (
        "routed_embedding",
        Call(
            gradroute.routed_embedding,
            {
                "tokens": torch.arange(4),
                "weight": W,
                "routes": BATCH,
                "sites": gradroute.EmbeddingSites(MASK),
            },
            tensors("tokens", "weight") | {"padding_idx": (*INT, 99), **OF_OP},
        ),
    )
    of_attention = {
        **tensors("q", "k", "v", cu_seqlens=1, key_mask=1),
        **OF_OP,
        "causal": BOOL,
        "window": (*INT, 0, -1),
        "scale": NUMBER,
        "dropout": (None, *NUMBER, -0.1, 1.5),
    }
    right = {"q": Q, "k": Q, "v": Q, "routes": Routes.of([[0, 1, 1, 0]], 2), "sites": OF_ATTENTION}
    yield "routed_attention", Call(gradroute.routed_attention, right, of_attention)
    yield "attention.explain", Call(attention.explain, right, of_attention)


def objects():
    """Tables, routes, sites, and the choice of a backend."""
    yield "use_backend", Call(gradroute.use_backend, {"backend": None}, {"backend": NAME})
    for function in (gradroute.available_backends, gradroute.unavailable_backends):
        yield function.__name__, Call(function, {}, {"op": NAME, "device": (3.5, "gpu", THING)})
    ids = ("x", None, THING, 1.5, [0.5], [[0], [0, 1]], torch.ones(4), [7], [-1], torch.eye(4).to_sparse())
    strength = ("x", 1j, True, THING, NAN, INF, [1.0, 2.0], torch.ones(2), torch.ones(4, dtype=torch.long))
    wrong = {
        "ids": ids,
        "num_routes": (None, *INT, 0, -1, 40000),
        "strength": strength,
        "validate": BOOL,
    }
    yield "Routes.of", Call(Routes.of, {"ids": [0, 1, 1, 0], "num_routes": 2}, wrong)
    index = (None, "x", 1.5, THING, torch.tensor([9]), torch.tensor([0.5]), torch.ones(3, dtype=torch.bool))
    yield "Routes.select", Call(BATCH.select, {"index": torch.tensor([0])}, {"index": index})
    yield "Routes.pad", Call(BATCH.pad, {"n": 1}, {"n": (None, *INT, -1)})
    yield "Routes.repeat", Call(BATCH.repeat, {"n": 2}, {"n": (None, *INT, -1)})
    yield (
        "Routes.to",
        Call(BATCH.to, {"device": "cpu"}, {"device": (None, "gpu", 1.5, THING), "non_blocking": BOOL}),
    )
    yield "Table", Call(Table, {"weights": MASK}, {"weights": NONE + TABLE})
    yield "Table.of", Call(Table.of, {"weights": MASK}, {"weights": NONE + TABLE})
    yield (
        "Table.on",
        Call(Table(MASK).on, {"device": torch.device("cpu")}, {"device": (None, "gpu", 3.5, THING)}),
    )
    for name in ("Linear", "MLP", "Attention", "Norm", "Embedding", "Activation"):
        kind = vars(gradroute)[f"{name}Sites"]
        yield kind.__name__, Call(kind, {}, dict.fromkeys(kind.declared, TABLE))
    for kind in (models.ResidualSites, models.MoESites):
        yield f"models.{kind.__name__}", Call(kind, {}, dict.fromkeys(kind.declared, TABLE))
    where = (
        *(None, 3, "x", [1, 2], {1: 5}, {1: "a"}, {1: None}, {5: [0]}, {-1: [0]}, {"a": [0]}, {True: [0]}),
        *({1: [9]}, {1: slice(3, 99)}, {1: slice(4, 4)}, {1: slice(0.5, 1)}, {1: [True]}, {1: 1.5}),
        *({1: [0.5]}, {1: [[0, 1]]}),
    )
    count, weight = (None, *INT, 0, -1), NONE + NUMBER
    yield (
        "tables.localize",
        Call(
            tables.localize,
            {"num_routes": 2, "features": 4, "where": {1: [0]}},
            {"num_routes": count, "features": count, "where": where, "on": weight, "off": weight},
        ),
    )
    yield (
        "tables.heads",
        Call(tables.heads, {"weights": MASK, "head_dim": 2}, {"weights": NONE + TABLE, "head_dim": count}),
    )
    yield (
        "tables.concatenate",
        Call(
            tables.concatenate,
            {"parts": [Table(MASK), None], "widths": [4, 2]},
            {
                "parts": (None, 3, "x", [3], [Table(MASK)], [Table(MASK), Table([[1.0]])]),
                "widths": (None, 3, "ab", [4, "a"], [4], [4, -1], [4, 1.5]),
            },
        ),
    )


def layers():
    """The constructors of the layers."""
    size = (None, *INT, -1)
    yield (
        "RoutedLinear",
        Call(
            gradroute.RoutedLinear,
            {"in_features": 4, "out_features": 4},
            {"in_features": size, "out_features": size, "bias": BOOL, **OF_LAYER},
        ),
    )
    for kind in (gradroute.RoutedMLP, gradroute.RoutedGatedMLP):
        wrong = {"d_model": size, "d_ff": size, "bias": BOOL, "activation": NONE + NAME, **OF_LAYER}
        yield kind.__name__, Call(kind, {"d_model": 4, "d_ff": 4}, wrong)
    yield (
        "RoutedEmbedding",
        Call(
            gradroute.RoutedEmbedding,
            {"num_embeddings": 4, "embedding_dim": 4},
            {
                "num_embeddings": size,
                "embedding_dim": size,
                "padding_idx": (*INT, 99, -99),
                "max_norm": (1.0, "a"),
                "norm_type": NONE + NUMBER,
                "scale_grad_by_freq": (True, "a"),
                "sparse": (True, "a"),
                "_weight": ("x", 3, THING, torch.ones(2, 2)),
                "_freeze": BOOL,
                **OF_LAYER,
            },
        ),
    )
    shape = (None, "x", 1.5, True, THING, [1.5], -1, 0, [2, 2], [])
    affine = (*BOOL, False)
    yield (
        "RoutedRMSNorm",
        Call(
            gradroute.RoutedRMSNorm,
            {"normalized_shape": 4},
            {
                "normalized_shape": shape,
                "eps": (*NUMBER, -1),
                "elementwise_affine": affine,
                "offset": NONE + NUMBER,
                "casting_mode": NONE + NAME,
                **OF_LAYER,
            },
        ),
    )
    yield (
        "RoutedLayerNorm",
        Call(
            gradroute.RoutedLayerNorm,
            {"normalized_shape": 4},
            {
                "normalized_shape": shape,
                "eps": (None, *NUMBER, -1),
                "elementwise_affine": affine,
                "bias": BOOL,
                **OF_LAYER,
            },
        ),
    )
    yield (
        "RoutedAttention",
        Call(
            gradroute.RoutedAttention,
            {"d_model": 8, "heads": 2},
            {
                "d_model": (*size, 0),
                "heads": (*size, 0, 3),
                "kv_heads": (*INT, -1, 0, 3),
                "head_dim": (*INT, -1, 0),
                "causal": BOOL,
                "window": (*INT, -1, 0),
                "scale": NUMBER,
                "dropout": (None, *NUMBER, -1, 2),
                "bias": BOOL,
                **OF_LAYER,
            },
        ),
    )


def routed(preset, model=MODEL_OF_ALL):
    """A preset, and what `route` makes of it, which knows the model's numbers."""
    return lambda **arguments: models.route(model, preset(**arguments))


def forward_within(manager):
    """A `with` block of a context manager, and a forward of the routed model in it."""

    def call(**arguments):
        with manager(**arguments):
            ROUTED(torch.zeros(1, 2, dtype=torch.long))

    return call


def plans():
    """Plans, presets, and what makes a model routed."""
    of_route = {"route": (None, *INT, -1, 99999), "num_routes": (*INT, 0, -1, 99999), "off": NONE + NUMBER}
    yield (
        "models.sgtm",
        Call(
            models.sgtm,
            {"config": CONFIG, "forget_units": 4},
            {
                "config": (None, 3, "x", THING, Shape(2, 8, 16, 4, 3, 2), Shape("a", 8, 16, 4, 4, 2)),
                "forget_heads": (None, *INT, -1, 5),
                "forget_units": (None, *INT, -1, 99),
                "retain": (None, *INT, -1, 1),
                "forget": (None, *INT, -1, 0),
                "unlabelled": (*INT, 0, -1),
                "layers": LAYERS,
                "joint_down_projection": BOOL,
                "joint_embedding": BOOL,
                "joint_head": BOOL,
            },
        ),
    )
    units = (*SOME_OF, 0, -1, -16, slice(0))
    wrong = {"layers": (None, *LAYERS, CONFIG), "units": units, "on": NONE + NUMBER, **of_route}
    right = {"layers": [0], "units": 4}
    yield "models.localize_mlp", Call(routed(models.localize_mlp), right, wrong, MODEL_OF_ALL)
    wrong = {"layers": (*LAYERS, CONFIG), "experts": units, "on": NONE + NUMBER, **of_route}
    wrong |= {"hidden_from_others": BOOL}
    right = {"layers": [0], "experts": 1}
    yield "models.localize_experts", Call(routed(models.localize_experts, EXPERTS), right, wrong, EXPERTS)
    wrong = {"layers": (None, *LAYERS, CONFIG), "dim": SOME_OF, **of_route}
    yield "models.steering", Call(routed(models.steering), {"layers": [0]}, wrong, MODEL_OF_ALL)
    wrong = {"layers": (*LAYERS, CONFIG), "units": (None, *INT, 0, -1, 99), **of_route, "site": (None, *NAME)}
    yield "models.era", Call(routed(models.era), {"units": 4}, wrong, MODEL_OF_ALL)
    per_layer = dict.fromkeys(("moe", "mlp", "attention", "residual", "norm", "qk_norm"), PER_LAYER)
    once = dict.fromkeys(("final_norm", "embedding", "lm_head"), (3, "x", THING, OF_MLP))
    adapters = (3, "x", {"a": 3}, {"a": [5]}, {"a": ["x"]}, {3: [0]}, {"a": "01"})
    wrong = {"num_routes": (None, *INT, 0, -1), **per_layer, **once, "adapters": adapters}
    yield "models.RoutingPlan", Call(models.RoutingPlan, {"num_routes": 2, "mlp": OF_MLP}, wrong)
    wrong = {
        "model": MODEL,
        "plan": (None, 3, "x", THING, OF_MLP),
        "architecture": (3, "x"),
        "backend": NAME,
    }
    right = {"model": MODEL_OF_ALL, "plan": models.localize_mlp([0], 4)}
    yield "models.route", Call(models.route, right, wrong, MODEL_OF_ALL)
    yield "models.unroute", Call(models.unroute, {"model": ROUTED}, {"model": MODEL}, ROUTED)
    wrong = {"model": MODEL, "route": (None, *INT, -1, 9, 1), "optimizer": OPTIMIZER}
    yield "models.ablate", Call(models.ablate, {"model": ROUTED}, wrong, ROUTED)
    wrong = {"model": MODEL, "mesh": (None, 3, "x", THING)}
    yield (
        "models.tensor_parallel",
        Call(models.tensor_parallel, {"model": MODEL_OF_ALL, "mesh": None}, wrong, MODEL_OF_ALL),
    )
    wrong = {
        "model": MODEL,
        "route_ids": (None, "x", THING, [0.5], [[9, 9]], [[0], [0, 1]]),
        "route_strength": ("x", 1j, NAN, THING),
        "routes": ROUTES,
    }
    right = {"model": ROUTED, "route_ids": [[0, 1]]}
    yield "models.routing", Call(forward_within(models.routing), right, wrong, ROUTED)
    yield "models.unrouted", Call(forward_within(models.unrouted), {}, {"model": MODEL})
    wrong = {"trainer_class": (None, 3, "x", THING, int)}
    yield "models.routed_trainer", Call(models.routed_trainer, {}, wrong)
    yield (
        "models.RouteCollator",
        Call(
            models.RouteCollator,
            {"pad_token_id": 0},
            {
                "pad_token_id": (*INT, -1),
                "pad_to_multiple_of": (*INT, 0, -1),
                "packed": BOOL,
                "align": NONE + NAME,
                "label_pad": NONE + INT,
            },
        ),
    )
