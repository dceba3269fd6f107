"""The same as `mistakes` for blocks, era, labels, telemetry and the optimizer."""

import torch
from mistakes import (
    BLOCK,
    BOOL,
    EXPERTS,
    INT,
    LAYERS,
    MODEL,
    MODEL_OF_ALL,
    NAME,
    NAN,
    NONE,
    NUMBER,
    NUMBERS,
    OPTIMIZER,
    SOME_OF,
    TENSOR,
    THING,
    WRONG_BLOCK,
    Call,
)
from torch import nn

from gradroute import era, labels, optim, telemetry
from gradroute.blocks import Block, check_disjoint

STATES = (None, 3, "x", THING, {}, {"a": 3})
BLOCKS = {"forget": BLOCK}


def blocks():
    """Blocks, and what changes a model by them."""
    model = {"model": MODEL_OF_ALL}
    which = (*SOME_OF, 0, -1)
    of_block = {"model": MODEL, "layers": LAYERS, "architecture": (3, "x", THING)}
    yield "blocks.Block", Call(Block, {"parts": BLOCK.parts}, {"parts": (None, 3, "x", THING, [3], [])})
    wrong = {**of_block, "units": which, "between": (3, "x", THING)}
    yield "blocks.Block.units", Call(Block.units, {**model, "units": 2}, wrong)
    of_experts = {"model": EXPERTS, "experts": 1}
    yield "blocks.Block.experts", Call(Block.experts, of_experts, {**of_block, "experts": which})
    yield "blocks.Block.heads", Call(Block.heads, {**model, "heads": 2}, {**of_block, "heads": which})
    dims = [{"lm_head.weight": piece} for piece in (3, (0,), ("a", 1), (5, 1), (0.5, 1), (True, 1), (0, 99))]
    pieces = (None, 3, "x", THING, {}, {"nope": (0, 1)}, {3: (0, 1)}, *dims)
    right = {**model, "pieces": {"lm_head.weight": (0, 2)}}
    yield "blocks.Block.of", Call(Block.of, right, {"model": MODEL, "pieces": pieces})
    for name in ("parameters", "tensors", "masks", "state_dict", "has_influence"):
        yield f"blocks.Block.{name}", Call(getattr(BLOCK, name), model, {"model": MODEL})
    right = {**model, "state": BLOCK.state_dict(MODEL_OF_ALL)}
    wrong = {"model": MODEL, "state": STATES}
    yield "blocks.Block.load_state_dict", Call(BLOCK.load_state_dict, right, wrong, MODEL_OF_ALL)
    wrong = {"blocks": (None, 3, "x", THING, {"a": 3}, [BLOCK]), "model": MODEL}
    yield "blocks.check_disjoint", Call(check_disjoint, {"blocks": BLOCKS, **model}, wrong)
    changes = {"model": MODEL, "optimizer": OPTIMIZER}
    architecture = (3, "x")
    yield (
        "era.expand",
        Call(
            era.expand,
            {**model, "units": 4},
            {
                **changes,
                "units": (None, *INT, -1, 0),
                "heads": (None, *INT, -1),
                "std": (*NUMBER, -1),
                "zero_output": BOOL,
                "between": (3, "x", THING),
                "architecture": architecture,
            },
            MODEL_OF_ALL,
        ),
    )
    of_block = {**model, "block": BLOCK}
    wrong = {**changes, "block": WRONG_BLOCK, "how": NONE + NAME, "generator": (3, "x", THING)}
    yield "era.ablate", Call(era.ablate, {**of_block, "how": "resample"}, wrong, MODEL_OF_ALL)
    wrong = {**changes, "block": (None, "x", THING, 1.5, True, [BLOCK], 0, -1), "architecture": architecture}
    yield "era.contract", Call(era.contract, of_block, wrong, MODEL_OF_ALL)
    wrong = {**changes, "block": WRONG_BLOCK, "state": STATES}
    yield "era.merge", Call(era.merge, {**of_block, "state": {}}, wrong, MODEL_OF_ALL)
    wrong = {"model": MODEL, "block": WRONG_BLOCK, "scale": NONE + NUMBER}
    for function in (era.gate, era.Gate):
        yield f"era.{function.__name__}", Call(function, {**of_block, "scale": 1.0}, wrong, MODEL_OF_ALL)
    wrong = {"model": MODEL, "path": (None, 3.5, THING, ["a"]), "max_shard_size": (None, *INT, -1, 0)}
    yield "era.export", Call(era.export, {**model, "path": "/nowhere"}, wrong)


def labelling():
    """The functions of gradroute.labels."""
    ids, counts = [0, 1], {"forget_counts": [1, 2], "retain_counts": [2, 1]}
    cu_seqlens = ("x", THING, [0, 9], [1, 2], [0.5], 3)
    wrong = {"labels": (*NUMBERS, [1j, 1j]), "lengths": ("x", THING, [0.5, 1.0], [-1, 1], [1], 3)}
    wrong["cu_seqlens"] = ("x",)
    yield "documents", Call(labels.documents, {"labels": ids, "lengths": [2, 3]}, wrong)
    shape = (None, 3, "ab", THING, [3, 2], [2, -1], [2, 1.5], [])
    right = {"labels": ids, "shape": [2, 3]}
    yield "samples", Call(labels.samples, right, {"labels": NUMBERS, "shape": shape})
    flags = ("x", THING, 3, [1, 0], [True], [[0]])
    right = {"starts": [[True], [False]]}
    yield "episode_numbers", Call(labels.episode_numbers, right, {"starts": flags, "dones": flags})
    wrong = {"labels": NUMBERS, "starts": flags, "dones": flags, "take": NONE + NAME}
    yield "episodes", Call(labels.episodes, {"labels": [0], **right}, wrong)
    masks = ("x", THING, [1], 3, ["a", "b"], [0.5, 1], [2, 1])
    wrong = {"labels": (*NUMBERS, 3), "cu_seqlens": cu_seqlens, "attention_mask": masks}
    yield "next_token", Call(labels.next_token, {"labels": ids}, wrong)
    rate = (None, *NUMBER, -1, 2)
    wrong = {
        "labels": (*NUMBERS, [0.5]),
        "seed": NONE + INT,
        "false_negative": rate,
        "false_positive": rate,
        "route": (None, *INT, -1, 0, 99999),
        "base": (None, *INT, -1, 1),
        "groups": ("x", THING, [0.5, 1], [0], 3),
    }
    yield "with_errors", Call(labels.with_errors, {"labels": ids, "seed": 0}, wrong)
    masks = (None, 3, "x", THING, {}, {1: 3}, {1: [1, 0]}, {"a": [True]}, {-1: [True]})
    wrong = {"masks": (*masks, {1: [True], 2: [True, False]}), "base": (None, *INT, -1)}
    yield "prioritise", Call(labels.prioritise, {"masks": {1: [True, False]}}, wrong)
    wrong = {"input_ids": (*NUMBERS, [0.5], [9], [-1]), "vocab_size": (None, *INT, 0, -1)}
    yield "token_counts", Call(labels.token_counts, {"input_ids": ids, "vocab_size": 4}, wrong)
    of_counts = {
        "forget_counts": (*NUMBERS, [-1, 1], [], [NAN, 1], [[1, 2]]),
        "retain_counts": (*NUMBERS, [-1, 1], [1]),
        "smoothing": (None, "x", THING, -1, NAN, True, (1,), (1, "a"), 1j),
    }
    of_weights = {"scale": (None, *NUMBER, 0, -1), "bias": NONE + NUMBER}
    yield "frequency_ratio", Call(labels.frequency_ratio, counts, of_counts)
    wrong = {"ratio": (*NUMBERS, [-1], [NAN]), **of_weights}
    yield "soft_weights", Call(labels.soft_weights, {"ratio": [1.0, 2.0]}, wrong)
    yield "frequency_strength", Call(labels.frequency_strength, counts, of_counts | of_weights)
    ratio = (None, "x", True, 1j, THING, NAN, -1, [1])
    wrong = {**of_counts, "min_count": (None, *INT, -1), "min_ratio": ratio, "limit": (*INT, -1)}
    yield "candidates", Call(labels.candidates, {**counts, "min_count": 0, "min_ratio": 0}, wrong)
    wrong = {
        "ids": (*NUMBERS, [0.5], [9], [-1]),
        "routes": (None, "ab", THING, 1.5, True, 0, -1, [1, 2], [], 99999),
        "input_ids": ("x", THING, [0.5, 1], [1]),
        "tokenizer": (3, "x", THING),
        "examples": (None, *INT, -1),
        "context": (None, *INT, 0, -1),
        "cu_seqlens": cu_seqlens,
    }
    yield "summarize", Call(labels.summarize, {"ids": ids, "routes": 2, "input_ids": ids}, wrong)
    token_ids = (None, "x", THING, 3, [], [0.5], [-1], [True])
    wrong = {"input_ids": (*NUMBERS, [0.5]), "token_ids": token_ids}
    yield "match_tokens", Call(labels.match_tokens, {"input_ids": ids, "token_ids": [1]}, wrong)
    sequences = (None, "x", THING, 3, [], [[]], [3], [["a"]], [[-1]], [[0.5]])
    wrong = {
        "input_ids": (*NUMBERS, [0.5]),
        "sequences": sequences,
        "mark": NONE + NAME,
        "cu_seqlens": cu_seqlens,
    }
    yield "match_ngrams", Call(labels.match_ngrams, {"input_ids": ids, "sequences": [[1]]}, wrong)
    wrong = {"words": (None, 3, "tree", [], THING), "case_variants": BOOL, "leading_space": BOOL}
    yield "token_sequences", Call(labels.token_sequences, {"tokenizer": None, "words": ["a"]}, wrong)


def within(telemetry, name):
    """A method of Telemetry, called in a step that then ends early."""

    def call(**arguments):
        with telemetry.step(torch.tensor([[0, 1]])):
            getattr(telemetry, name)(**arguments)

    return call


class Log:
    """A log of scalars."""

    def add_scalar(self, *scalar):
        """Takes one."""


def measuring():
    """Telemetry, and what its steps take."""
    monitor = telemetry.Telemetry(MODEL_OF_ALL, ["retain", "forget"], BLOCKS)
    names = (None, 3, "ab", THING, [], [1, 2], ["a", "a"], ["a/b"])
    yield (
        "Telemetry",
        Call(
            telemetry.Telemetry,
            {"model": MODEL_OF_ALL, "routes": ["retain", "forget"], "blocks": BLOCKS},
            {
                "model": MODEL,
                "routes": names,
                "blocks": (3, "x", THING, {"a": 3}, {3: BLOCK}, ["a"]),
                "home": (3, "x", ["a"], {"a": "x"}, {"retain": 3}),
                "modules": (3, "x", THING, ["nope"], [3]),
                "every": (None, *INT, 0, -1),
                "align": NONE + NAME,
                "rest": BOOL,
            },
        ),
    )
    ids = ("x", THING, 1.5, [0.5], [9], [[0], [1, 1]])

    def step(**arguments):
        with monitor.step(**arguments):
            pass

    wrong = {"route_ids": ids, "optimizer": (*OPTIMIZER, [3])}
    yield "Telemetry.step", Call(step, {}, wrong)
    yield (
        "Telemetry.batch",
        Call(within(monitor, "batch"), {"route_ids": [[0, 1]]}, {"route_ids": NONE + ids}),
    )
    right = {"logits": torch.zeros(1, 2, 4), "labels": torch.zeros(1, 2, dtype=torch.long)}
    wrong_labels = (None, *TENSOR, torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2))
    wrong = {"logits": NONE + TENSOR, "labels": wrong_labels, "shift": BOOL}
    yield "Telemetry.losses", Call(within(monitor, "losses"), right, wrong)
    counted = ("x", THING, 3, torch.ones(1, 2), torch.ones(3, dtype=torch.bool))
    wrong = {"losses": NONE + TENSOR, "counted": counted}
    yield (
        "Telemetry.token_losses",
        Call(within(monitor, "token_losses"), {"losses": torch.zeros(1, 2)}, wrong),
    )
    batch = dict.fromkeys(("input_ids", "labels"), torch.zeros(1, 2, dtype=torch.long))
    wrong = {"batch": (None, 3, "x", THING, [1], {}), "route_ids": ids[:-1], "loss": (3, "x", THING)}
    yield "Telemetry.leakage", Call(monitor.leakage, {"batch": batch, "route_ids": [[0, 1]]}, wrong)
    yield "Telemetry.to_json_lines", Call(monitor.to_json_lines, {}, {"path": (None, 3.5, THING)})
    writer = (3, "x", THING)
    wrong = {"writer": NONE + writer, "step": NONE + INT, "prefix": (None, 3, THING)}
    yield "Telemetry.log_to", Call(monitor.log_to, {"writer": Log(), "step": 1}, wrong)
    yield "Telemetry.callback", Call(monitor.callback, {}, {"writer": writer})
    yield "Record", Call(telemetry.Record, {"step": 1}, {"step": (None, *INT, -1)})


def optimizing():
    """The optimizer and its groups."""
    parameters = [nn.Parameter(torch.ones(4, 4))]
    adam = optim.RoutedAdamW(parameters)
    positive = (None, *NUMBER, -1)
    yield (
        "RoutedAdamW",
        Call(
            optim.RoutedAdamW,
            {"params": parameters},
            {
                "params": (None, 3, THING, [], ["a"], [3]),
                "lr": (None, "a", True, 1j, THING, NAN, float("inf"), -1, torch.ones(2)),
                "betas": (None, 3, "ab", THING, (0.9,), (0.9, 1.0), (-1, 0.9), (NAN, 0.9), ("a", 0.9)),
                "eps": positive,
                "weight_decay": positive,
                "block_dim": ("a", 2, -1, 0.0, True, THING),
                "amsgrad": BOOL,
                "maximize": BOOL,
                "fused": BOOL,
                "state_dtype": (
                    *(3, "float32", "8bits", "4bit", b"8bit", True, THING),
                    *(torch.uint8, torch.int8, torch.float16, torch.float64),
                ),
            },
        ),
    )
    norm = (None, "a", True, 1j, THING, NAN, -1)
    wrong = {"max_norm": norm, "norm_type": (*norm, 0), "error_if_nonfinite": BOOL}
    yield "RoutedAdamW.clip_grad_norm_", Call(adam.clip_grad_norm_, {"max_norm": 1.0}, wrong)
    wrong = {"state_dict": (None, 3, "x", THING, {}, {"state": {}})}
    yield "RoutedAdamW.load_state_dict", Call(adam.load_state_dict, {}, wrong)
    wrong = {"param_group": (None, 3, "x", THING, {}, {"params": [3]})}
    yield "RoutedAdamW.add_param_group", Call(adam.add_param_group, {}, wrong)
    yield "RoutedAdamW.step", Call(adam.step, {}, {"closure": (3, "x")})
    wrong = {"model": MODEL, "weight_decay": (*NUMBER, -1), "no_decay": (3, "x", THING)}
    right = {"model": MODEL_OF_ALL, "weight_decay": 0.1}
    yield "routed_param_groups", Call(optim.routed_param_groups, right, wrong)
