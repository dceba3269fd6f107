"""Runs in each of the two processes of test_optim_distributed.py; the model is distributed_worker's."""

import copy
import functools
import importlib.util
from pathlib import Path
from unittest.mock import patch

import distributed_worker as worker
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from gradroute.backends import native
from gradroute.models import Shape, route, sgtm
from gradroute.models.parallel import tensor_parallel
from gradroute.optim import RoutedAdamW, quantised, routed_param_groups

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
INTEGERS = {1: torch.int8, 4: torch.int32, 8: torch.int64}
OPTIONS = {"lr": 0.1, "weight_decay": 0.1}

# Two ranks cannot divide these rows and columns evenly, and one rank gets none of some.
SHAPES = ((5, 3), (4, 6), (1, 7), (6, 1), (3, 2, 5), (7,), (1,), ())


# Of some that are large enough for codes a rank has nothing, or another number of rows or columns. 131 elements share
# a scale of 262, and of half of them.
CODED = ((262, 262), (5, 1024), (1024, 5), (1, 4096), (6, 512, 2), (4096,), (3, 2))


def same(one, other):
    one, other = one.detach().contiguous(), other.detach().contiguous()
    return torch.equal(one.view(INTEGERS[one.itemsize]), other.view(INTEGERS[other.itemsize]))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differing(ours, exact, optimizer, expected):
    """The names of parameters and states that differ in some bit from those of one process."""
    wrong = [name for name in exact if not same(whole(ours[name]), exact[name])]
    for name in exact:
        states = optimizer.state[ours[name]], expected.state[exact[name]]
        assert states[0].keys() == states[1].keys()
        wrong += [f"{name}.{key}" for key in states[0] if not same(whole(states[0][key]), states[1][key])]
    return wrong


def sharded(rank, placements, shape, block_dim, norm_type=None, fused=False):
    """Steps of parameters that are sharded in some way, by shards of gradients that every rank makes alike.

    Returns the differences to one process, and the number of collectives of a step.
    """
    mesh = init_device_mesh("cpu", shape)
    torch.manual_seed(0)
    shapes = [size for size in SHAPES if len(size) >= (2 if block_dim == 1 else 0)]
    exact, ours = {}, {}
    for size in shapes:
        exact[str(size)] = nn.Parameter(torch.randn(size))
        fitting = [p if p.is_replicate() or p.dim < len(size) else Replicate() for p in placements]
        ours[str(size)] = nn.Parameter(distribute_tensor(exact[str(size)].detach().clone(), mesh, fitting))
    options = OPTIONS | {"block_dim": block_dim, "amsgrad": True, "fused": fused}
    optimizer, expected = RoutedAdamW(ours.values(), **options), RoutedAdamW(exact.values(), **options)
    wrong, collectives = [], 0
    for step in range(4):
        for name, p in exact.items():
            gradient = torch.randn(p.shape) * (torch.rand(p.shape) < (1.0, 0.3, 0.1, 0.0)[step])
            p.grad = gradient
            ours[name].grad = distribute_tensor(gradient, mesh, ours[name].placements)
        if norm_type is not None:
            norms = [one.clip_grad_norm_(1.0, norm_type) for one in (optimizer, expected)]
            torch.testing.assert_close(*norms)
            torch.testing.assert_close(
                [whole(p.grad) for p in ours.values()], [p.grad for p in exact.values()]
            )
            for name, p in exact.items():
                p.grad = whole(ours[name].grad)  # its norm was summed in another order
        with CommDebugMode() as communication:
            optimizer.step()
        collectives = max(collectives, communication.get_total_counts())
        expected.step()
        wrong += differing(ours, exact, optimizer, expected)
    states = [optimizer.state[p] for p in ours.values()]
    assert all(isinstance(value, DTensor) for state in states for value in state.values())
    counted = sum(int((whole(state["step"]) < 3).sum()) for state in states)
    assert counted or norm_type is not None  # some blocks were left alone
    return {"wrong": wrong, "collectives": collectives}


def coded(rank, placements, shape, block_dim, fused=False):
    """The same for moments in codes, where as many elements share a scale as in one process."""
    mesh = init_device_mesh("cpu", shape)
    torch.manual_seed(0)
    shapes = [size for size in CODED if len(size) >= (2 if block_dim == 1 else 0)]
    exact = {str(size): nn.Parameter(torch.randn(size)) for size in shapes}
    ours = {}
    for name, p in exact.items():
        fitting = [one if one.is_replicate() or one.dim < p.dim() else Replicate() for one in placements]
        ours[name] = nn.Parameter(distribute_tensor(p.detach().clone(), mesh, fitting))
    options = OPTIONS | {"block_dim": block_dim, "amsgrad": True, "fused": fused, "state_dtype": "8bit"}
    optimizer, expected = RoutedAdamW(ours.values(), **options), RoutedAdamW(exact.values(), **options)
    wrong = []
    for share in (1.0, 0.5, 0.3, 0.0):
        for name, p in exact.items():
            gradient = torch.randn(p.shape)
            for dim in range(min(2, p.dim())):
                along = [-1 if each == dim else 1 for each in range(p.dim())]
                gradient = gradient * (torch.rand(p.shape[dim]) < share).view(along)
            p.grad = gradient
            ours[name].grad = distribute_tensor(gradient, mesh, ours[name].placements)
        optimizer.step()
        expected.step()
        wrong += differing(ours, exact, optimizer, expected)
    states = [optimizer.state[p] for p in ours.values()]
    assert all(isinstance(value, DTensor) for state in states for value in state.values())
    refusals = []
    for one, state in ((optimizer, expected.state_dict()), (expected, optimizer.state_dict())):
        try:
            one.load_state_dict(state)
        except ValueError as error:
            refusals.append(str(error))
    return {"wrong": wrong, "coded": sum("exp_avg_codes" in state for state in states), "refusals": refusals}


def partial_gradients(rank):
    """A gradient that has yet to be summed over the ranks, for a parameter that every rank has."""
    mesh = init_device_mesh("cpu", (worker.RANKS,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
    local = torch.zeros(4, 3)
    local[rank] = 1.0
    p.grad = DTensor.from_local(local, mesh, [Partial()])
    optimizer = RoutedAdamW([p])
    optimizer.step()
    return whole(optimizer.state[p]["step"]).flatten().tolist()


def not_finite(rank, value):
    """One rank has half of a row that is not finite; the norm is over all ranks and ordinary and sharded gradients."""
    mesh = init_device_mesh("cpu", (worker.RANKS,))
    gradient = torch.zeros(3, 4)
    gradient[1, 0] = value
    columns = nn.Parameter(distribute_tensor(torch.ones(3, 4), mesh, [Shard(1)]))
    columns.grad = distribute_tensor(gradient, mesh, [Shard(1)])
    plain = nn.Parameter(torch.ones(3))
    plain.grad = torch.zeros(3)
    norm = RoutedAdamW([columns, plain]).clip_grad_norm_(1.0)
    return {"norm": norm, "columns": whole(columns.grad), "plain": plain.grad}


def make_model():
    """A routed model with a forget part whose hidden units do not end where a rank's half does."""
    sizes = (worker.D_MODEL, worker.D_FF, worker.HEADS, worker.KV_HEADS, worker.HEAD_DIM)
    return worker.make_model(sgtm(Shape(2, *sizes), forget_heads=2, forget_units=20))


def make_routed(make_plain):
    """The same of another architecture, where one layer makes q, k and v.

    Its bias is frozen: a softmax does not see that of a key that is not rotated, whose gradient is rounding errors or,
    with the sums in another order, 0, so that steps would not be counted alike.
    """
    model = make_plain()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(("query_key_value.bias", "c_attn.bias")))
    return route(model, sgtm(model.config, forget_heads=2, forget_units=20))


def batches():
    """Batches of both routes, of retain tokens alone, of forget tokens on rank 1 alone, of retain tokens again."""
    tokens, labels, ids = worker.batches()[0]
    retain = torch.zeros_like(ids)
    forget = retain.clone()
    forget[worker.RANKS :] = 1
    chosen = (ids, retain, forget, retain)
    return [(tokens.roll(i, 1), labels.roll(i, 1), one) for i, one in enumerate(chosen)]


def make_optimizer(model, **options):
    # eps is large, because gradients are summed in another order, and small gradients over their size would differ.
    return RoutedAdamW(routed_param_groups(model, weight_decay=0.1), lr=1e-2, eps=1e-2, **options)


def parallelize(model, parallel):
    if parallel != "2d":
        return worker.parallelize(model, parallel)
    mesh = init_device_mesh("cpu", (1, worker.RANKS), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def train(model, parallel, rank, optimizer, of=None, max_norm=1e6):
    norms = []
    for batch in batches() if of is None else of:
        optimizer.zero_grad()
        worker.step(model, "tp" if parallel == "2d" else parallel, [batch], rank)
        norms.append(optimizer.clip_grad_norm_(max_norm))
        optimizer.step()
    return torch.stack(norms)


def named(model):
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def trained(rank, parallel, make=make_model):
    """Takes the same steps in one process and in two; returns the largest error, and differences in counts of steps."""
    exact = make()
    model = copy.deepcopy(exact)
    expected = make_optimizer(exact)
    norms = train(exact, "none", rank, expected)
    before = {name: p.detach().clone() for name, p in named(model).items()}
    model = parallelize(model, parallel)
    optimizer = make_optimizer(model)
    got = train(model, parallel, rank, optimizer)
    ours, theirs = named(model), named(exact)
    assert ours.keys() == theirs.keys()
    steps = {
        name: (whole(optimizer.state[p]["step"]), expected.state[theirs[name]]["step"])
        for name, p in ours.items()
        if p.requires_grad
    }
    moved = {name: (p.detach() - before[name]).abs().max() for name, p in theirs.items()}
    return {
        "norms": float(((got - norms) / norms).abs().max()),
        "error": max(
            float((whole(p.detach()) - theirs[name].detach()).abs().max() / moved[name])
            for name, p in ours.items()
            if p.requires_grad
        ),
        "steps": [name for name, (one, other) in steps.items() if not torch.equal(one, other)],
        "uneven": len([name for name, (_, other) in steps.items() if other.unique().numel() > 1]),
        "block_dims": [g["block_dim"] for g in optimizer.param_groups]
        == [g["block_dim"] for g in expected.param_groups],
    }


def checkpoint_of_codes(rank, directory, full):
    """The same with moments in codes, also of parameters as small as these."""
    with patch.multiple(quantised, SMALLEST=512, LEAST=8):
        return checkpoint(rank, f"{directory}/codes", full, state_dtype="8bit")


def checkpoint(rank, directory, full, **options):
    """An optimizer that goes on from a checkpoint of torch.distributed does what the one that was saved does."""
    model = parallelize(make_model(), "fsdp")
    optimizer = make_optimizer(model, **options)
    train(model, "fsdp", rank, optimizer, batches()[:3])
    other = parallelize(make_model(), "fsdp")
    other.load_state_dict(model.state_dict())
    new = make_optimizer(other, **options)
    coded = sum("exp_avg_codes" in state for state in optimizer.state.values())
    options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if full:
        state = copy.deepcopy(state)
    else:
        dcp.save({"optimizer": state}, checkpoint_id=f"{directory}/optimizer")
        state = get_optimizer_state_dict(other, new, options=options)
        dcp.load({"optimizer": state}, checkpoint_id=f"{directory}/optimizer")
    set_optimizer_state_dict(other, new, state, options=options)
    results = {"loaded": compared(model, other, optimizer, new), "coded": coded}
    for one, its in ((model, optimizer), (other, new)):
        train(one, "fsdp", rank, its, batches()[2:])
    return results | {"went on": compared(model, other, optimizer, new)}


def initialised(rank):
    """A step of zeros, by which torch.distributed.checkpoint makes a state, leaves everything as it is."""
    model = parallelize(make_model(), "fsdp")
    before = {name: whole(p).detach().clone() for name, p in named(model).items()}
    optimizer = make_optimizer(model)
    get_optimizer_state_dict(model, optimizer)
    assert all(optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"} for p in model.parameters())
    steps = [whole(state["step"]) for state in optimizer.state.values()]
    return {
        "wrong": [name for name, p in named(model).items() if not same(whole(p), before[name])],
        "steps": sum(int(step.sum()) for step in steps),
        "lr": {group["lr"] for group in optimizer.param_groups},
    }


def compared(model, other, optimizer, new):
    ours, theirs = named(model), named(other)
    wrong = [name for name in ours if not same(whole(ours[name]), whole(theirs[name]))]
    for name in ours:
        one, two = optimizer.state[ours[name]], new.state[theirs[name]]
        assert {key: value.placements for key, value in one.items()} == {
            key: value.placements for key, value in two.items()
        }
        wrong += [f"{name}.{key}" for key in one if not same(whole(one[key]), whole(two[key]))]
    return wrong


ROWS, COLUMNS = Shard(0), Shard(1)
CELLS = {
    **{
        f"{how} block_dim={block_dim}": (sharded, placements, shape, block_dim)
        for how, placements, shape in (
            ("rows", [ROWS], (worker.RANKS,)),
            ("columns", [COLUMNS], (worker.RANKS,)),
            ("whole", [Replicate()], (worker.RANKS,)),
            ("rows, then columns", [ROWS, COLUMNS], (1, worker.RANKS)),
            ("rows, whole columns", [ROWS, COLUMNS], (worker.RANKS, 1)),
        )
        for block_dim in (0, 1, None)
    },
    "clipped rows": (sharded, [ROWS], (worker.RANKS,), 1, 2.0),
    "clipped columns": (sharded, [COLUMNS], (worker.RANKS,), 0, float("inf")),
    **{
        f"fused {how}": (sharded, placements, (worker.RANKS,), 1, None, True)
        for how, placements in (("rows", [ROWS]), ("columns", [COLUMNS]))
        if native.module is not None
    },
    **{
        f"codes {how} {block_dim}{' fused' * fused}": (coded, placements, (worker.RANKS,), block_dim, fused)
        for how, placements in (("rows", [ROWS]), ("columns", [COLUMNS]), ("whole", [Replicate()]))
        for block_dim in (0, 1, None)
        for fused in ((False, True) if native.module is not None and block_dim == 1 else (False,))
        if HAS_TORCHAO
    },
    "partial": (partial_gradients,),
    "nan": (not_finite, float("nan")),
    "inf": (not_finite, float("inf")),
    **{f"trained {parallel}": (trained, parallel) for parallel in ("ddp", "fsdp", "tp", "2d")},
    "trained tp of gpt_neox": (trained, "tp", functools.partial(make_routed, worker.plain_neox)),
    "trained tp of gpt2": (trained, "tp", functools.partial(make_routed, worker.plain_gpt2)),
    "initialised": (initialised,),
}


def run(rank, directory, group):
    functions = {"checkpoint": checkpoint} | (
        {"checkpoint of codes": checkpoint_of_codes} if HAS_TORCHAO else {}
    )
    saved = {
        f"{name}, {'full' if full else 'sharded'}": (function, str(Path(directory)), full)
        for name, function in functions.items()
        for full in (False, True)
    }
    worker.GROUPS[group] = CELLS | saved
    worker.run(rank, directory, group)
