"""Runs in each of the two processes of test_era_distributed.py: era on models that FSDP2 shards, against whole ones."""

import copy

import distributed_worker as worker
import model_zoo
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gradroute import era, models
from gradroute.blocks import Block


def whole(tensor):
    tensor = tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model):
    mesh = init_device_mesh("cpu", (worker.RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def differing(model, plain, optimizers=None):
    """The names of parameters and of states that are not those of one process, bit for bit."""
    ours, wrong = dict(model.named_parameters()), []
    for name, parameter in plain.named_parameters():
        pairs = {name: (whole(ours[name]), parameter.detach())}
        if optimizers:
            mine, its = optimizers[0].state[ours[name]], optimizers[1].state[parameter]
            pairs |= {f"{name}.{key}": (whole(mine[key]), its[key]) for key in its}
        wrong += [key for key, (a, b) in pairs.items() if a.shape != b.shape or not torch.equal(a, b)]
    return wrong


def steps(rank):
    """expand, training, resample, gate, ablate, contract and merge, each followed by what differs from one process."""
    plain = model_zoo.build("llama").train()
    model = shard(copy.deepcopy(plain))
    both = (model, plain)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2, foreach=False) for one in both]
    tokens = torch.arange(3, 23).view(2, 10)
    wrong = {}

    def step(name, call):
        results = []
        for one, optimizer in zip(both, optimizers, strict=True):
            torch.manual_seed(rank if one is model else 0)  # a sharded model's values are the first rank's
            results.append(call(one, optimizer))
        wrong[name] = differing(model, plain, optimizers)
        return results[0]

    def train(one, optimizer):
        one(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def gate(one, _):
        with era.gate(one, block, 3.0):
            return one(tokens).logits.detach()

    step("train", train)
    with torch.no_grad():
        model(tokens)  # FSDP2 leaves the parameters of the whole model unsharded after it
    block = step("expand", lambda one, o: era.expand(one, 7, zero_output=False, optimizer=o))
    step("train on", train)
    state = block.state_dict(model)
    step("gate", gate)
    step("resample", lambda one, o: era.ablate(one, block, how="resample", optimizer=o))
    step("ablate", lambda one, o: era.ablate(one, block, optimizer=o))
    step("contract", lambda one, o: era.contract(one, block, optimizer=o))
    step("merge", lambda one, o: era.merge(one, block, state, optimizer=o))
    step("train at last", train)
    return wrong


def exported(rank, folder, routed):
    """A sharded model, routed or not, is exported in files of a few parameters, and loaded whole."""
    sizes = (worker.D_MODEL, worker.D_FF, worker.HEADS, worker.KV_HEADS, worker.HEAD_DIM)
    plain = worker.make_model(models.sgtm(models.Shape(2, *sizes), forget_heads=2, forget_units=20))
    if not routed:
        models.unroute(plain)
    model = shard(copy.deepcopy(plain))
    wrong = {}
    for one in (model, plain):
        era.ablate(one, Block.units(one, slice(0, 5)))
    wrong["block"] = differing(model, plain)
    if routed:
        for one in (model, plain):
            models.ablate(one, 0)
        wrong["route"] = differing(model, plain)
    path = f"{folder}/exported {routed}"
    era.export(model, path, max_shard_size=20_000)
    kind = type(plain).original if routed else type(plain)
    wrong["export"] = differing(kind.from_pretrained(path), plain)
    return wrong


def run(rank, directory, group):
    worker.GROUPS[group] = {
        "steps": (steps,),
        "plain": (exported, directory, False),
        "routed": (exported, directory, True),
    }
    worker.run(rank, directory, group)
