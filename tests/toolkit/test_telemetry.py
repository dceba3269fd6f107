"""Telemetry: what it says against numbers computed by hand, and that it changes nothing."""

import copy
import io
import json
import math
import re
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

pytest.importorskip("transformers")

import tiny_models as tiny
from tiny_models import assert_gradients_equal, gradients
from transformers import Trainer, TrainingArguments

from gradroute import MLPSites, RoutedMLP, Routes
from gradroute.blocks import Block
from gradroute.models import RouteCollator, route, sgtm
from gradroute.models.mlp import GatedMLP
from gradroute.tables import localize
from gradroute.telemetry import Telemetry, summary_writer

ROUTES = ("retain", "forget")
FORGET_UNITS, FORGET_HEADS = 8, 2
LEARNING_RATE = 0.1
CLOSE = 1e-5  # sums of a few hundred numbers in fp32, in another order: some tens of roundings of 6e-8


def close(want):
    want = want.detach() if isinstance(want, torch.Tensor) else want
    return pytest.approx(float(want), rel=CLOSE, nan_ok=True)


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


# A tiny Llama, routed by SGTM, and a plain module with a RoutedMLP


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
    """Of the decoder layers, under their short names, or of named modules."""
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


# The gradient of activations


def test_shares_of_decoder_layers():
    model, telemetry = llama_telemetry()
    squares = llama_squares(model, batch_of())
    assert_shares(step_of(telemetry, model, batch_of()), squares)


def test_shares_of_named_modules_of_any_model():
    model, x, ids = Net(), torch.randn(7, 6), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    names = ("first", "head")
    twin = copy.deepcopy(model)
    squares = squares_by_hand(
        twin,
        {name: twin.get_submodule(name) for name in names},
        [x],
        lambda x: ids,
        lambda m, x: m(x, ids).square().sum(),
    )
    telemetry = Telemetry(model, ROUTES, modules=names)
    with telemetry.step(ids) as record:
        model(x, ids).square().sum().backward()
    assert_shares(record, squares)


def test_accumulated_batches_bring_their_own_ids():
    batches = [batch_of((0, 1, 0, 1)), batch_of((1, 1, 1, 0, 1), seed=1)]
    model, telemetry = llama_telemetry()
    squares = llama_squares(model, *batches)
    assert_shares(step_of(telemetry, model, *batches), squares)


@pytest.mark.parametrize("first", [True, False])
def test_accumulated_batches_with_ids_by_hand(first):
    batches = [batch_of((0, 1, 0, 1)), batch_of((1, 1, 1, 0, 1), seed=1)]
    model, telemetry = llama_telemetry()
    squares = llama_squares(model, *batches)
    with telemetry.step(batches[0]["route_ids"] if first else None) as record:
        for batch in batches:
            telemetry.batch(batch["route_ids"])
            logits = model(**without_ids(batch), routes=Routes.of(batch["route_ids"], 2)).logits
            telemetry.losses(logits, batch["labels"])
            model.loss_function(logits, batch["labels"], tiny.VOCABULARY).backward()
    assert_shares(record, squares)
    assert record["tokens/retain"] + record["tokens/forget"] == 19 + 24


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_is_not_counted_twice(use_reentrant):
    """Hooks of transformers' layers stand outside of their checkpoints, those of attention inside: these run twice."""
    model, block = llama()
    names = ["model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.1"]
    squares, want = llama_squares(model, batch_of(), modules=names), losses_by_hand(model, batch_of())
    telemetry = Telemetry(model, ROUTES, {"forget": block}, modules=names)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    handle = model.get_submodule(names[0]).register_forward_hook(lambda *_: calls.append(1))
    record = step_of(telemetry, model.train(), batch_of())
    handle.remove()
    assert len(calls) == 2
    assert_shares(record, squares)
    assert_losses(record, want)


def test_a_checkpoint_of_the_whole_model_is_not_counted_twice():
    model, telemetry = llama_telemetry()
    batch = batch_of()
    squares, want = llama_squares(model, batch), losses_by_hand(model, batch)
    with telemetry.step() as record:
        with set_checkpoint_early_stop(False):  # the second forward runs to its end
            loss = checkpoint(lambda: model(**batch).loss, use_reentrant=False)
        loss.backward()
    assert_shares(record, squares)
    assert_losses(record, want)


def test_norms_of_bf16_gradients_are_of_fp32():
    model, block = llama()
    model = model.to(torch.bfloat16)
    squares = llama_squares(model, batch_of())
    telemetry = Telemetry(model, ROUTES, {"forget": block})
    assert_shares(step_of(telemetry, model, batch_of()), squares)


def test_shares_of_no_gradient_are_not_defined():
    model, telemetry = llama_telemetry()
    with telemetry.step() as record:
        model(**batch_of())
    assert record["grad_norm/all/retain"] == 0
    assert math.isnan(record["grad_share/layers.0/retain"])
    assert not any(key.startswith("update") for key in record)


def test_an_id_of_a_sample_is_that_of_its_tokens():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    x, ids = torch.randn(3, 5, 4), torch.tensor([0, 1, 0])
    gradient = torch.randn(3, 5, 4)
    telemetry = Telemetry(model, ROUTES, modules=["0"])
    with telemetry.step(ids) as record:
        model[0](x).backward(gradient)
    assert record["grad_norm/0/forget"] == close(gradient[1].norm())
    assert record["grad_norm/0/retain"] == close(gradient[[0, 2]].norm())


# What it must not change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_bit_equal(dtype):
    model, block = llama()
    model = model.to(dtype)
    twin = copy.deepcopy(model)
    twin(**batch_of()).loss.backward()
    telemetry = Telemetry(model, ROUTES, {"forget": block})
    with telemetry.step():
        model(**batch_of()).loss.backward()
        telemetry.leakage(batch_of())
    assert_gradients_equal(gradients(model), gradients(twin))


@pytest.mark.parametrize("modules", [None, ["model.layers.0.mlp", "model.layers.1.self_attn", "lm_head"]])
def test_routed_mlps_stay_fused(modules, monkeypatch):
    fused = []
    original = GatedMLP._fused
    monkeypatch.setattr(GatedMLP, "_fused", lambda *args: fused.append(1) or original(*args))
    model, telemetry = llama_telemetry(modules=modules)
    record = step_of(telemetry, model, batch_of())
    assert len(fused) == tiny.LAYERS
    assert record["grad_share/all/retain"] + record["grad_share/all/forget"] == close(1)


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_steps_between_have_no_hooks_and_no_record():
    model, telemetry = llama_telemetry(every=3)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    hooks, latest = [], []
    for _ in range(5):
        with telemetry.step(optimizer=optimizer) as record:
            hooks.append(hooks_of(model) + len(optimizer._optimizer_step_pre_hooks))
            model(**batch_of()).loss.backward()
            optimizer.step()
            assert (record is None) == (hooks[-1] == 0)
        latest.append(telemetry.latest)
        assert hooks_of(model) + len(optimizer._optimizer_step_post_hooks) == 0
    # Two layers, the model's forward before and after, and the optimizer.
    assert hooks == [5, 0, 0, 5, 0]
    assert [record and record["step"] for record in latest] == [0.0, None, None, 3.0, None]
    assert [record["step"] for record in telemetry.history] == [0.0, 3.0]


@pytest.fixture
def compiled():
    """A compiled Net, and what counts its graphs."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    yield torch.compile(Net(), backend=graphs, fullgraph=True), graphs
    torch._dynamo.reset()


def test_modules_of_a_compiled_model_cannot_be_watched(compiled):
    model, _ = compiled
    telemetry = Telemetry(model._orig_mod, ROUTES, modules=["head"])
    with expect(RuntimeError, "with a compiled model give Telemetry modules=()"), telemetry.step([0, 1, 1]):
        model(torch.randn(3, 6)).sum().backward()


def test_a_compiled_model_is_compiled_once(compiled):
    model, graphs = compiled
    x, ids = torch.randn(7, 6), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    telemetry = Telemetry(model._orig_mod, ROUTES, modules=(), every=2)
    for _ in range(3):
        with telemetry.step(ids):
            logits = model(x)
            telemetry.losses(logits, ids, shift=False)
    assert_losses(
        telemetry.latest, [(F.cross_entropy(logits[m], ids[m]), m.sum()) for m in (ids == 0, ids == 1)]
    )
    assert graphs.frame_count == 1


class NoReads(TorchDispatchMode):
    """Raises where a number is read of a tensor, or sizes depend on numbers: on a GPU that waits."""

    reads = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.reads, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def refuse(*_):
    raise AssertionError("waits for the device")


def test_nothing_is_read_before_somebody_asks(monkeypatch):
    model, x, ids = Net(), torch.randn(7, 6), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    block = Block.units(model, 4)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    telemetry = Telemetry(model, ROUTES, {"forget": block}, modules=["head"])
    step = telemetry.step(ids, optimizer=optimizer)
    record = step.__enter__()
    with NoReads(), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", refuse)  # on the CPU no operation
        logits = model(x)
        telemetry.losses(logits, ids, shift=False)
        logits.sum().backward()
        optimizer.step()
        step.__exit__(None, None, None)
        with expect(AssertionError, "waits for the device"):
            telemetry.latest["loss/retain"]
    assert record["tokens/retain"] == 4
    assert record["loss/retain"] == close(F.cross_entropy(logits[ids == 0], ids[ids == 0]))


# Losses


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


@pytest.mark.parametrize("align", ["position", "next_token"])
def test_losses_by_route(align):
    model, telemetry = llama_telemetry(align=align)
    batch = batch_of()
    batch["route_ids"] = tiny.mixed_ids(batch["input_ids"])
    want = losses_by_hand(model, batch, align=align)
    assert want[0][1] + want[1][1] == 19  # 4 rows predict 5 labels each, one of which is -100
    with telemetry.step(batch["route_ids"]) as record:
        telemetry.losses(model(**batch).logits, batch["labels"])
    assert_losses(record, want)
    with telemetry.step() as record:  # from the model's forward
        model(**batch)
    assert_losses(record, want)


def test_alignments_differ():
    model, _ = llama()
    batch = batch_of()
    batch["route_ids"] = tiny.mixed_ids(batch["input_ids"])
    position, next_token = (losses_by_hand(model, batch, align=a) for a in ("position", "next_token"))
    assert position[0][0] != close(next_token[0][0])


def test_losses_of_accumulated_batches_are_means_over_tokens():
    model, telemetry = llama_telemetry()
    batches = [batch_of((0, 1, 1, 1)), batch_of((0, 0, 1), seed=1)]
    parts = [losses_by_hand(model, batch) for batch in batches]
    want = []
    for of_route in zip(*parts, strict=True):
        tokens = sum(n for _, n in of_route)
        want.append((sum(loss * n for loss, n in of_route) / tokens, tokens))
    assert_losses(step_of(telemetry, model, *batches), want)


def test_losses_without_a_shift_and_of_any_kind():
    model, ids = nn.Linear(4, 3), torch.tensor([0, 1, 1, 0, 1])
    labels = torch.tensor([2, 0, 1, -100, 2])
    telemetry = Telemetry(model, ROUTES)
    with telemetry.step(ids) as record:
        logits = model(torch.randn(5, 4))
        telemetry.losses(logits, labels, shift=False)
    assert_losses(
        record,
        [
            (F.cross_entropy(logits[:1], labels[:1]), 1),
            (F.cross_entropy(logits[[1, 2, 4]], labels[[1, 2, 4]]), 3),
        ],
    )
    with telemetry.step(ids) as record:
        telemetry.token_losses(torch.tensor([1.0, 2.0, 4.0, 7.0, 9.0]), torch.tensor([1, 1, 1, 1, 0]) > 0)
    assert_losses(record, [(4.0, 2), (3.0, 2)])


@pytest.mark.parametrize(
    ("counted", "error", "message"),
    [
        (torch.tensor(True), ValueError, "counted: got shape [], expected that of losses, [5]"),
        (torch.ones(1, dtype=torch.bool), ValueError, "counted: got shape [1], expected that of losses, [5]"),
        (torch.ones(5, dtype=torch.int64), TypeError, "counted: got dtype torch.int64, expected a tensor of"),
        ([True] * 5, TypeError, "counted: got a list, expected a tensor of dtype torch.bool"),
    ],
)
def test_what_counts_is_checked(counted, error, message):
    telemetry = Telemetry(nn.Linear(4, 3), ROUTES)
    with telemetry.step(torch.tensor([0, 1, 1, 0, 1])) as record:
        telemetry.token_losses(torch.ones(5))
        with expect(error, message):
            telemetry.token_losses(torch.full((5,), 9.0), counted)
    assert_losses(record, [(1.0, 2), (1.0, 3)])


def test_a_route_without_tokens_has_no_loss():
    model, telemetry = llama_telemetry()
    record = step_of(telemetry, model, batch_of((0, 0)))
    assert math.isnan(record["loss/forget"])
    assert record["tokens/forget"] == 0
    assert record["grad_share/layers.0/forget"] == 0
    assert record["grad_share/layers.0/retain"] == 1


# Blocks


def norms_by_hand(block, model, tensors):
    """Of the elements of tensors by parameter name that are the block's, and of all others."""
    masks = block.masks(model)
    inside = [tensors[name][mask] for name, mask in masks.items()]
    outside = [t[~masks[name]] if name in masks else t.flatten() for name, t in tensors.items()]
    return torch.cat(inside).norm(), torch.cat(outside).norm()


def test_gradient_and_update_norms_of_sgd():
    model, telemetry = llama_telemetry()
    block = Block.units(model, FORGET_UNITS) | Block.heads(model, FORGET_HEADS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    record = step_of(telemetry, model, batch_of())
    norms = {name: norms_by_hand(block, model, tensors) for name, tensors in {
        "block_grad_norm": gradients(model),
        "update_norm": {name: p.detach() - before[name] for name, p in model.named_parameters()},
        "before": before,
    }.items()}  # fmt: skip
    for name in ("block_grad_norm", "update_norm"):
        for part, want in zip(("forget", "rest"), norms[name], strict=True):
            assert want > 0
            assert record[f"{name}/{part}"] == close(want)
    for i, part in enumerate(("forget", "rest")):
        assert record[f"update_ratio/{part}"] == close(norms["update_norm"][i] / norms["before"][i])
        # The parameters' own rounding, 6e-8 of numbers of 1, is 1e-5 of updates of 5e-3.
        gradient_norm = record[f"block_grad_norm/{part}"]
        assert record[f"update_norm/{part}"] == pytest.approx(LEARNING_RATE * gradient_norm, rel=1e-4)


def test_an_untouched_block_has_an_update_of_exactly_zero():
    model, telemetry = llama_telemetry()
    record = step_of(telemetry, model, batch_of((0, 0, 0)))
    assert record["update_norm/forget"] == record["update_ratio/forget"] == 0
    assert record["update_norm/rest"] > 1e-3


def test_rest_may_be_left_out():
    model, telemetry = llama_telemetry(rest=False)
    twin, other = copy.deepcopy(model), None
    record = step_of(telemetry, model, batch_of())
    other = step_of(
        Telemetry(
            twin, ROUTES, {"forget": Block.units(twin, FORGET_UNITS) | Block.heads(twin, FORGET_HEADS)}
        ),
        twin,
        batch_of(),
    )
    assert "update_norm/rest" not in record
    assert record["update_norm/forget"] == other["update_norm/forget"] > 0


def test_several_optimizers_are_one_update():
    model = Net()
    block = Block.units(model, 4)
    optimizers = [
        torch.optim.SGD(part.parameters(), rate)
        for part, rate in ((model.first, 0.1), (model.second, 0.2), (model.head, 0.3))
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    telemetry = Telemetry(model, ROUTES, {"forget": block})
    with telemetry.step(torch.zeros(3, dtype=torch.long), optimizer=optimizers) as record:
        model(torch.randn(3, 6)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    inside, outside = norms_by_hand(block, model, moved)
    assert record["update_norm/forget"] == close(inside)
    assert record["update_norm/rest"] == close(outside)


def test_gradients_are_those_before_the_first_of_several_optimizers():
    model = Net()
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (model.first, model.second, model.head)]
    telemetry = Telemetry(model, ROUTES, rest=False)
    with telemetry.step(torch.zeros(3, dtype=torch.long), optimizer=optimizers) as record:
        model(torch.randn(3, 6)).square().sum().backward()
        want = torch.cat([gradient.flatten() for gradient in gradients(model).values()]).norm()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert want > 0
    assert record["block_grad_norm/rest"] == close(want)
    assert not [key for key in record if key.startswith("update")]


class Cloned(TorchDispatchMode):
    """Counts the elements that are cloned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default:
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_a_parameter_is_cloned_once():
    model = Net()
    telemetry = Telemetry(model, ROUTES, {"forget": Block.units(model, 4)})
    with telemetry.step(torch.zeros(3, dtype=torch.long)) as record:
        with Cloned() as cloned:
            telemetry.before_update()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        telemetry.after_update()
    assert cloned.elements == sum(parameter.numel() for parameter in model.parameters())
    moved = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    inside, outside = norms_by_hand(Block.units(model, 4), model, moved)
    assert record["update_norm/forget"] == close(inside)
    assert record["update_norm/rest"] == close(outside)


def test_updates_without_an_optimizer():
    model = Net()
    telemetry = Telemetry(model, ROUTES, {"forget": Block.units(model, 4)})
    with telemetry.step(torch.zeros(3, dtype=torch.long)) as record:
        model(torch.randn(3, 6)).square().sum().backward()
        telemetry.before_update()
        with torch.no_grad():
            model.head.weight.add_(1.0)
        telemetry.after_update()
    assert record["update_norm/rest"] == close(math.sqrt(model.head.weight.numel()))
    assert record["update_norm/forget"] == 0


@pytest.mark.parametrize(
    ("ids", "routed", "want"), [((0, 0, 0), True, 1), ((0, 0, 0), False, 0), ((0, 1, 0), True, math.nan)]
)
def test_protected(ids, routed, want):
    model, telemetry = llama_telemetry()
    batch = batch_of(ids)
    record = step_of(telemetry, model, batch if routed else without_ids(batch), ids=batch["route_ids"])
    assert record["protected/forget"] == close(want)
    assert (record["block_grad_norm/forget"] == 0) == (want == 1)


def test_protected_looks_at_all_batches_of_a_step():
    model, telemetry = llama_telemetry()
    record = step_of(telemetry, model, batch_of((0, 0, 0)), batch_of((1, 0), seed=1))
    assert math.isnan(record["protected/forget"])


@pytest.mark.parametrize("evaluation", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_within_a_step_is_not_of_its_batch(evaluation):
    model, telemetry = llama_telemetry()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    with telemetry.step(optimizer=optimizer) as record:
        loss = model(**batch_of((0, 0))).loss
        with evaluation():
            model(**batch_of((1, 1), seed=1))
        loss.backward()
        optimizer.step()
    assert record["protected/forget"] == 1
    assert record["tokens/forget"] == 0


# Leakage


def test_a_plan_confines_what_it_says():
    _, telemetry = llama_telemetry()
    values = telemetry.leakage(batch_of())
    # Exact: forget tokens teach nothing outside of the forget part but what is joint, retain tokens nothing inside.
    assert values["leakage/outside_routed/forget"] == 0
    assert values["leakage/inside_routed/forget/forget"] == 1
    assert values["leakage/inside/forget/retain"] == values["leakage/inside_routed/forget/retain"] == 0
    assert values["leakage/protected/forget"] == 1
    # Embeddings, norms and the head are everybody's.
    assert 0.1 < values["leakage/outside/forget"] < 1


def test_mixed_contexts_leak():
    _, telemetry = llama_telemetry()
    batch = batch_of()
    batch["route_ids"] = tiny.mixed_ids(batch["input_ids"])
    assert telemetry.leakage(batch)["leakage/outside_routed/forget"] > 0.01


def test_leakage_without_routing_against_masks():
    model, telemetry = llama_telemetry()
    block = Block.units(model, FORGET_UNITS) | Block.heads(model, FORGET_HEADS)
    batch = batch_of()
    values = telemetry.leakage(without_ids(batch), batch["route_ids"])
    routed_names = block.masks(model).keys()
    for r, name in enumerate(ROUTES):
        twin = copy.deepcopy(model)
        labels = batch["labels"].masked_fill(batch["route_ids"] != r, -100)
        twin(batch["input_ids"], labels=labels).loss.backward()
        found = gradients(twin)
        routed = {name: gradient for name, gradient in found.items() if name in routed_names}
        for suffix, tensors in (("", found), ("_routed", routed)):
            inside, outside = norms_by_hand(block, model, tensors)
            total = torch.hypot(inside, outside)
            assert values[f"leakage/inside{suffix}/forget/{name}"] == close(inside / total)
            if name == "forget":
                assert values[f"leakage/outside{suffix}/forget"] == close(outside / total)
            if not suffix:
                assert values[f"leakage/grad_norm/{name}"] == close(total)
    assert values["leakage/outside_routed/forget"] > 0.5
    assert values["leakage/protected/forget"] == 0
    assert "leakage/outside/retain" not in values  # retain has no home


def test_leakage_with_a_loss_of_ones_own_and_two_blocks():
    model, ids = Net(), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    x = torch.randn(7, 6)
    blocks = {"first": Block.units(model, 4, layers=[0]), "second": Block.units(model, 4, layers=[1])}
    telemetry = Telemetry(model, ROUTES, blocks, home={"forget": "second", "retain": "first"})

    def loss(model, batch):
        return model(batch["x"], batch["route_ids"]).square().sum(-1)

    values = telemetry.leakage({"x": x, "route_ids": ids}, loss=loss)
    for r, (name, own, other) in enumerate((("retain", "first", "second"), ("forget", "second", "first"))):
        twin = copy.deepcopy(model)
        twin(x, ids)[ids == r].square().sum(-1).mean().backward()
        found = gradients(twin)
        total = torch.cat([gradient.flatten() for gradient in found.values()]).norm()
        outside = norms_by_hand(blocks[own], model, found)[1]
        assert values[f"leakage/outside/{name}"] == close(outside / total)
        assert values[f"leakage/inside/{other}/{name}"] == close(
            norms_by_hand(blocks[other], model, found)[0] / total
        )
    assert values["leakage/outside_routed/forget"] == close(values["leakage/inside_routed/first/forget"])
    # Retain tokens train all units but their plan is that of route 0; forget ones the last of both MLPs.
    assert values["leakage/protected/first"] == values["leakage/protected/second"] == 0


def test_a_route_without_tokens_does_not_leak():
    _, telemetry = llama_telemetry()
    values = telemetry.leakage(batch_of((0, 0)))
    assert math.isnan(values["leakage/grad_norm/forget"])
    assert math.isnan(values["leakage/outside/forget"])
    assert values["leakage/inside/forget/retain"] == 0
    assert values["leakage/protected/forget"] == 1


def test_a_route_without_tokens_takes_no_backward():
    model = Net()
    telemetry = Telemetry(model, ROUTES, {"forget": Block.units(model, 4)})
    backwards = []

    def loss(model, batch):
        losses = model(batch["x"], batch["route_ids"]).square().sum(-1)
        losses.register_hook(lambda gradient: backwards.append(gradient))
        return losses

    values = telemetry.leakage({"x": torch.randn(3, 6), "route_ids": torch.zeros(3).long()}, loss=loss)
    assert [gradient.tolist() for gradient in backwards] == [[pytest.approx(1 / 3)] * 3]
    assert math.isnan(values["leakage/grad_norm/forget"])
    assert values["leakage/grad_norm/retain"] > 0


def test_the_probe_leaves_the_model_as_it_was():
    model, block = llama()
    telemetry = Telemetry(model, ROUTES, {"forget": block})
    want = telemetry.leakage(batch_of())
    model.lm_head = nn.Sequential(nn.Dropout(0.5), model.lm_head)
    model.train().model.layers[0].eval()
    model(**batch_of()).loss.backward()
    found, modes = gradients(model), [module.training for module in model.modules()]
    assert telemetry.leakage(batch_of()) == want  # without dropout
    assert [module.training for module in model.modules()] == modes
    assert_gradients_equal(gradients(model), found)


def test_the_probe_draws_no_random_numbers():
    model = Net()
    telemetry = Telemetry(model, ROUTES, {"forget": Block.units(model, 4)})
    batch = {"x": torch.randn(3, 6), "route_ids": torch.tensor([0, 1, 1])}
    state = torch.get_rng_state()
    telemetry.leakage(batch, loss=lambda model, batch: model(batch["x"] + torch.randn(3, 6)).sum(-1))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_joins_the_record_of_a_measured_step():
    model, telemetry = llama_telemetry(every=2)
    measured = step_of(telemetry, model, batch_of())
    values = telemetry.leakage(batch_of())
    assert telemetry.latest == measured | values
    assert telemetry.latest["grad_share/all/forget"] == measured["grad_share/all/forget"]
    assert step_of(telemetry, model, batch_of()) is None
    telemetry.leakage(batch_of((0, 0)))
    assert telemetry.history[-1] == telemetry.history[0] == measured | values


def test_the_probe_is_not_watched():
    model, telemetry = llama_telemetry()
    squares, want = llama_squares(model, batch_of()), losses_by_hand(model, batch_of())
    with telemetry.step() as record:
        telemetry.leakage(batch_of((0, 0)))
        model(**batch_of()).loss.backward()
    assert_shares(record, squares)
    assert_losses(record, want)
    assert record["leakage/inside/forget/retain"] == 0


# What comes out


def test_keys_are_stable():
    model, telemetry = llama_telemetry()
    record = step_of(telemetry, model, batch_of())
    by_route = (
        "loss",
        "tokens",
        *(f"grad_{kind}/{m}" for m in ("layers.0", "layers.1", "all") for kind in ("norm", "share")),
    )
    want = ["step", *(f"{name}/{route_name}" for name in by_route for route_name in ROUTES)]
    want += ["block_grad_norm/forget", "block_grad_norm/rest", "protected/forget"]
    want += [f"{name}/{part}" for name in ("update_norm", "update_ratio") for part in ("forget", "rest")]
    assert list(record) == want
    assert all(type(value) is float for value in record.values())
    assert list(step_of(telemetry, model, batch_of((0, 0)))) == want


def test_json_lines(tmp_path):
    model, telemetry = llama_telemetry()
    for ids in ((0, 0), (0, 1)):
        step_of(telemetry, model, batch_of(ids))
    telemetry.to_json_lines(tmp_path / "history.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[0]["loss/forget"] is None
    assert lines[1] == {**telemetry.history[1], "protected/forget": None}
    telemetry.clear()
    assert telemetry.history == []


class FakeWriter:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_log_to_anything_with_add_scalar():
    model, telemetry = llama_telemetry(every=2)
    writer = FakeWriter()
    for step in range(2):
        step_of(telemetry, model, batch_of((0, 0)))
        telemetry.log_to(writer, 10 + step)
    record = telemetry.history[0]
    want = [
        (f"telemetry/{key}", value, 10) for key, value in record.items() if key != "step" and value == value
    ]
    assert writer.scalars == want
    assert ("telemetry/grad_share/layers.0/retain", 1.0, 10) in want
    assert "telemetry/loss/forget" not in [tag for tag, *_ in want]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, telemetry = llama_telemetry()
    with summary_writer(tmp_path) as writer:
        for step in range(2):
            step_of(telemetry, model, batch_of())
            telemetry.log_to(writer, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    for step, record in enumerate(telemetry.history):
        for key in ("loss/forget", "grad_share/layers.1/retain", "update_norm/rest"):
            event = events.Scalars(f"telemetry/{key}")[step]
            assert (event.step, event.value) == (step, close(record[key]))


def rendered(table):
    import rich.console

    stream = io.StringIO()
    rich.console.Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_tables_contain_the_numbers():
    pytest.importorskip("rich")
    model, telemetry = llama_telemetry()
    step_of(telemetry, model, batch_of((0, 0, 1)))
    telemetry.leakage(batch_of())
    record = telemetry.latest
    for text in (rendered(telemetry.table()), str(telemetry)):
        assert "step 0" in text
        lines = {
            words[0]: words[1:] for line in text.splitlines() if (words := re.findall(r"[\w./–+-]+", line))
        }
        for name in ("loss", "tokens", "grad_share/layers.1", "grad_norm/all", "leakage/inside/forget"):
            assert lines[name] == [f"{record[f'{name}/{route_name}']:.4g}" for route_name in ROUTES]
        for name in ("update_norm", "block_grad_norm"):
            assert lines[name] == [f"{record[f'{name}/{part}']:.4g}" for part in ("forget", "rest")]
        assert lines["protected"] == ["–"]
        assert lines["leakage/outside_routed"] == ["0"]


# transformers' Trainer


def test_trainer(tmp_path):
    model, block = llama()
    collator = RouteCollator(pad_token_id=0)
    documents = [
        {"input_ids": tiny.tokens(1, 6, seed=i)[0].tolist(), "route_ids": i % 2 if i < 8 else 0}
        for i in range(12)
    ]
    twin = copy.deepcopy(model)
    telemetry = Telemetry(model, ROUTES, {"forget": block}, every=2)
    writer = FakeWriter()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    callbacks = [telemetry.callback(writer)]
    Trainer(model, arguments, data_collator=collator, train_dataset=documents, callbacks=callbacks).train()

    other = Telemetry(twin, ROUTES, {"forget": block}, every=2)
    optimizer = torch.optim.SGD(twin.parameters(), LEARNING_RATE)
    for step in range(3):
        with other.step(optimizer=optimizer):
            for i in (4 * step, 4 * step + 2):
                (twin.train()(**collator(documents[i : i + 2])).loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [record["step"] for record in telemetry.history] == [0, 2]
    for record, want in zip(telemetry.history, other.history, strict=True):
        assert record.keys() == want.keys()
        for key, value in want.items():
            # The division of the loss is elsewhere, and the weights have moved by then: some hundred roundings.
            assert record[key] == pytest.approx(value, rel=1e-4, nan_ok=True), key
    assert telemetry.history[1]["protected/forget"] == 1  # the last step's documents are all of route 0
    assert {step for *_, step in writer.scalars} == {1, 3}
    assert hooks_of(model) == 0


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"routes": "forget"}, TypeError, "routes: got 'forget', expected a sequence of names"),
        ({"routes": ()}, ValueError, "routes: got none"),
        ({"routes": ("a", "a")}, ValueError, "routes: got ['a', 'a'], expected different names"),
        ({"routes": ("a/b",)}, ValueError, "names without '/'"),
        ({"every": 0}, ValueError, "every: got 0, expected a number of steps"),
        ({"align": "next"}, ValueError, "align: got 'next', expected one of 'position', 'next_token'"),
        ({"home": {"frget": "a"}}, ValueError, "home: got the route 'frget', expected one of retain, forget"),
        ({"home": {"forget": "b"}}, ValueError, "home: got the block 'b', expected one of a"),
        ({"blocks": {"rest": None}}, ValueError, "blocks: got ['rest'], expected different names"),
        (
            {"blocks": {"a": slice(4)}},
            TypeError,
            "blocks['a']: got a slice, expected a gradroute.blocks.Block",
        ),
        ({"modules": ["third"]}, ValueError, "modules: got 'third', expected names of the model's modules"),
        ({"modules": ["first.fc_in"]}, ValueError, "reads instead of calling it, expected the RoutedMLP"),
    ],
)
def test_arguments_are_checked(options, error, message):
    model = Net()
    defaults = {"routes": ROUTES, "blocks": {"a": Block.units(model, 4)}}
    with expect(error, message):
        Telemetry(model, **defaults | options)


def test_blocks_must_not_overlap():
    model = Net()
    with expect(ValueError, "blocks: got 'a' and 'b', which overlap"):
        Telemetry(model, ROUTES, {"a": Block.units(model, 4), "b": Block.units(model, 5)})


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
def test_parts_of_fused_modules_are_refused(name):
    with expect(ValueError, f"modules: got {name!r}, a part that a routed Llama"):
        llama_telemetry(modules=[name])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(7), TypeError, "route_ids: got dtype torch.float32"),
        (torch.full((7,), 2), ValueError, "route_ids: got ids from 2 to 2, expected 0 to 1"),
        (torch.zeros(6, dtype=torch.long), ValueError, "got shape [6], expected that of the tokens of head, [7]"),
        (None, ValueError, "route_ids: got none for head"),
    ],
)  # fmt: skip
def test_ids_are_checked(ids, error, message):
    model = Net()
    telemetry = Telemetry(model, ROUTES, modules=["head"])
    with expect(error, message), telemetry.step(ids):
        model(torch.randn(7, 6)).sum().backward()
    assert hooks_of(model) == 0
    assert telemetry.latest is None
    with telemetry.step(torch.zeros(7, dtype=torch.long)):  # it goes on
        model(torch.randn(7, 6)).sum().backward()
    assert telemetry.latest["grad_share/head/retain"] == 1


def test_a_step_that_fails_leaves_nothing():
    model, telemetry = llama_telemetry()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    with expect(KeyError, "of the loop's own"), telemetry.step(optimizer=optimizer):
        model(**batch_of()).loss.backward()
        raise KeyError("of the loop's own")
    assert hooks_of(model) + len(optimizer._optimizer_step_pre_hooks) == 0
    assert telemetry.latest is None
    assert telemetry.history == []


def test_calls_at_the_wrong_time():
    model, telemetry = llama_telemetry()
    logits, labels = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    with expect(RuntimeError, "losses: got a call outside of a step"):
        telemetry.losses(logits, labels)
    for call in (telemetry.table, lambda: telemetry.log_to(FakeWriter(), 0)):
        with expect(RuntimeError, "got no measured step yet"):
            call()
    assert telemetry.latest is None
    assert str(telemetry) == "Telemetry: no step was measured yet"
    with telemetry.step() as record:
        model(**batch_of())
        with expect(RuntimeError, "got a step within another one"), telemetry.step():
            pass
        with expect(RuntimeError, "record: got a read before the step has ended"):
            record["step"]
        with expect(RuntimeError, "losses: got logits in a step that takes ids and losses"):
            telemetry.losses(logits, labels)
    assert record["tokens/retain"] == 10
    with expect(ValueError, "labels: got shape [2, 2], expected the logits' [2, 3]"), telemetry.step(labels):
        telemetry.losses(logits, labels[:, :2])
    with expect(RuntimeError, "step: got no call of layers.0, layers.1"), telemetry.step():
        pass
    with expect(TypeError, "optimizer: got a str"), telemetry.step(optimizer="sgd"):
        pass


def test_the_probe_checks_its_batch():
    _, telemetry = llama_telemetry()
    batch = batch_of()
    with expect(ValueError, "route_ids: got None and a batch without route_ids"):
        telemetry.leakage(without_ids(batch))
    with expect(ValueError, "batch: got no labels"):
        telemetry.leakage({"input_ids": batch["input_ids"], "route_ids": batch["route_ids"]})


@pytest.mark.parametrize(
    ("missing", "call", "message"),
    [
        (
            "rich.table",
            lambda telemetry: telemetry.table(),
            "table: got no package rich, expected it installed",
        ),
        ("torch.utils.tensorboard", lambda _: summary_writer(), "pip install 'gradroute[telemetry]'"),
        ("transformers", lambda telemetry: telemetry.callback(), "pip install 'gradroute[models]'"),
    ],
)
def test_missing_packages_are_named(missing, call, message, monkeypatch):
    telemetry = Telemetry(Net(), ROUTES)
    with telemetry.step(torch.zeros(1, dtype=torch.long)):
        pass
    monkeypatch.setitem(sys.modules, missing, None)
    with expect(ImportError, message):
        call(telemetry)
