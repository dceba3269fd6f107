"""Shared by the tests of telemetry: a routed Llama, a plain module, and their sums by hand."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers")

import tiny_models as tiny

from gradroute import MLPSites, RoutedMLP, Routes
from gradroute.blocks import Block
from gradroute.models import route, sgtm
from gradroute.tables import localize
from gradroute.telemetry import Telemetry

ROUTES = ("retain", "forget")
FORGET_UNITS, FORGET_HEADS = 8, 2
LEARNING_RATE = 0.1
CLOSE = 1e-5  # sums of a few hundred numbers in fp32, in another order: some tens of roundings of 6e-8


def close(want):
    want = want.detach() if isinstance(want, torch.Tensor) else want
    return pytest.approx(float(want), rel=CLOSE, nan_ok=True)


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


def llama(**options):
    """Routed, and its forget part."""
    model = tiny.llama(**options)
    route(model, sgtm(model.config, FORGET_HEADS, FORGET_UNITS))
    return model, Block.units(model, FORGET_UNITS) | Block.heads(model, FORGET_HEADS)


def llama_telemetry(**options):
    model, block = llama()
    return model, Telemetry(model, ROUTES, {"forget": block}, **options)


def batch_of(ids=(0, 1, 0, 1), seed=0):
    """Rows of one route each, with a label that no loss is taken of."""
    input_ids = tiny.tokens(batch=len(ids), seed=seed)
    labels = input_ids.clone()
    labels[1, 3] = -100
    return {
        "input_ids": input_ids,
        "labels": labels,
        "route_ids": torch.tensor(ids)[:, None].repeat(1, input_ids.shape[1]),
    }


def without_ids(batch):
    return {name: value for name, value in batch.items() if name != "route_ids"}


class Net(nn.Module):
    """Two routed MLPs in a residual stream and a linear head; the last units are confined to route 1."""

    def __init__(self):
        super().__init__()
        self.first = self.mlp()
        self.second = self.mlp()
        self.head = nn.Linear(6, 5)

    @staticmethod
    def mlp():
        return RoutedMLP(6, 12, sites=MLPSites(update=localize(2, 12, {1: slice(8, 12)})))

    def forward(self, x, ids=None):
        routes = None if ids is None else Routes.of(ids, 2)
        x = x + self.first(x, routes)
        return self.head(x + self.second(x, routes))


def squares_by_hand(model, modules, batches, ids_of, loss_of):
    """By module and route: the squared norm of the gradient that retain_grad finds at the outputs, over all batches."""
    squares = {name: [0.0, 0.0] for name in modules}
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output
            outputs[name].retain_grad()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    for batch in batches:
        loss_of(model, batch).backward()
        for name, output in outputs.items():
            for r in range(2):
                squares[name][r] += float(output.grad[ids_of(batch) == r].double().square().sum())
    for handle in handles:
        handle.remove()
    return squares


def llama_squares(model, *batches, modules=None):
    """The sums of a Llama's decoder layers, under their short names, or of the modules that are named."""
    model = copy.deepcopy(model)
    watched = {f"layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    if modules is not None:
        watched = {name: model.get_submodule(name) for name in modules}
    return squares_by_hand(model, watched, batches, lambda b: b["route_ids"], lambda m, b: m(**b).loss)


def assert_shares(record, squares):
    """`squares` by module and route."""
    totals = [sum(column) for column in zip(*squares.values(), strict=True)]
    for name, by_route in (squares | {"all": totals}).items():
        assert min(by_route) > 0
        for route_name, square in zip(ROUTES, by_route, strict=True):
            assert record[f"grad_norm/{name}/{route_name}"] == close(math.sqrt(square))
            assert record[f"grad_share/{name}/{route_name}"] == close(square / sum(by_route))


def step_of(telemetry, model, *batches, ids=None):
    """The record of one step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    optimizer.zero_grad()
    with telemetry.step(ids, optimizer=optimizer):
        for batch in batches:
            model(**batch).loss.backward()
        optimizer.step()
    return telemetry.latest


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def losses_by_hand(model, batch, ids=None, align="position"):
    """The mean loss and the number of tokens by route."""
    ids = batch["route_ids"] if ids is None else ids
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    ids = ids[:, 1:] if align == "next_token" else ids[:, :-1]
    mine = [(ids == r) & (labels != -100) for r in range(2)]
    return [(F.cross_entropy(logits[m], labels[m]), int(m.sum())) for m in mine]


def assert_losses(record, want):
    for name, (loss, tokens) in zip(ROUTES, want, strict=True):
        assert record[f"loss/{name}"] == close(loss)
        assert record[f"tokens/{name}"] == tokens


def norms_by_hand(block, model, tensors):
    """The norms of the block's elements and of all others, in tensors by parameter name."""
    masks = block.masks(model)
    inside = [tensors[name][mask] for name, mask in masks.items()]
    outside = [t[~masks[name]] if name in masks else t.flatten() for name, t in tensors.items()]
    return torch.cat(inside).norm(), torch.cat(outside).norm()


class FakeWriter:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))
