"""The cells that test_layers_distributed.py runs in each of its two processes, one after the other.

A cell returns the largest difference of a gradient, or of an output, from what one process has, relative to the
largest element. A cell of REFUSALS returns the message of the TypeError.
"""

import copy
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from gradroute import (
    AttentionSites,
    EmbeddingSites,
    LinearSites,
    MLPSites,
    NormSites,
    RoutedAttention,
    RoutedEmbedding,
    RoutedGatedMLP,
    RoutedLayerNorm,
    RoutedLinear,
    Routes,
)
from gradroute.tables import localize

RANKS = 2
D_MODEL, D_FF, VOCABULARY = 8, 12, 10
HIDDEN = localize(2, D_FF, {1: slice(0, 5)}, on=0.5)
OUTPUT = localize(2, D_MODEL, {1: slice(0, 3)})
ALL_LINEAR = LinearSites(
    output=localize(2, D_FF, {1: slice(2, 9)}, on=0.5),
    input=localize(2, D_MODEL, {1: slice(1, 6)}),
    update_rows=localize(2, D_FF, {1: slice(0, 8)}),
    update_cols=localize(2, D_MODEL, {1: slice(3, 8)}),
    update_bias=[[1.0], [0.25]],
)


class Batch:
    """The same batch on every rank, so that FSDP's mean over the ranks is one rank's gradient."""

    def __init__(self):
        torch.manual_seed(1)
        self.x = torch.randn(2, 5, D_MODEL, dtype=torch.float64)
        self.ids = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]])
        self.routes = Routes.of(self.ids, 2)
        self.mesh = init_device_mesh("cpu", (RANKS,))

    def masked(self, x, table):
        m = table.weights[self.ids].to(x.dtype)
        return m * x + (1 - m) * x.detach()

    def direction(self, y):
        torch.manual_seed(2)
        return torch.randn(y.shape, dtype=torch.float64)


def gated(sites):
    torch.manual_seed(0)
    return RoutedGatedMLP(D_MODEL, D_FF, bias=True, sites=sites).double()


def gated_by_hand(batch):
    """The gradients of the detach idiom in one process, by name; that of the input is x."""
    mlp, x = gated(None), batch.x.clone().requires_grad_()
    h = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    y = batch.masked(mlp.down_proj(batch.masked(h, HIDDEN)), OUTPUT)
    (y * batch.direction(y)).sum().backward()
    return {name: p.grad for name, p in mlp.named_parameters()} | {"x": x.grad}


def difference(got, expected):
    """Relative to the largest element."""
    got = got.full_tensor() if isinstance(got, DTensor) else got
    return float((got - expected).abs().max() / expected.abs().max())


def trained(layer, batch, expected):
    """The largest difference of the layer's gradients, after one backward, from those expected by name."""
    y = layer(batch.x, batch.routes)
    (y * batch.direction(y)).sum().backward()
    return max(difference(p.grad, expected[name]) for name, p in layer.named_parameters())


def fully_sharded(batch, children):
    mlp = gated(MLPSites(hidden=HIDDEN, output=OUTPUT))
    for name in mlp.names if children else ():
        fully_shard(getattr(mlp, name), mesh=batch.mesh)
    fully_shard(mlp, mesh=batch.mesh)
    return trained(mlp, batch, gated_by_hand(batch))


def fully_sharded_routed_linears(batch):
    """RoutedLinears in the place of the submodules take update sites, too, when they are sharded."""
    sites = MLPSites(hidden=HIDDEN, update=localize(2, D_FF, {1: slice(0, 7)}), output=OUTPUT)
    plain, mlp = gated(sites), gated(sites)
    y = plain(batch.x, batch.routes)
    (y * batch.direction(y)).sum().backward()
    for name in mlp.names:
        linear = RoutedLinear.from_linear(getattr(mlp, name))
        setattr(mlp, name, linear)
        fully_shard(linear, mesh=batch.mesh)
    fully_shard(mlp, mesh=batch.mesh)
    return trained(mlp, batch, {name: p.grad for name, p in plain.named_parameters()})


def fsdp1(batch, children, sites=None, use_orig_params=True):
    sites = MLPSites(hidden=HIDDEN, output=OUTPUT) if sites is None else sites
    policy = ModuleWrapPolicy({nn.Linear}) if children else None
    mlp = FullyShardedDataParallel(
        gated(sites),
        auto_wrap_policy=policy,
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    x = batch.x.clone().requires_grad_()
    y = mlp(x, batch.routes)
    (y * batch.direction(y)).sum().backward()
    expected, got = gated_by_hand(batch), {"x": x.grad}
    if use_orig_params:  # FSDP1 gives no whole gradients of flat parameters
        with FullyShardedDataParallel.summon_full_params(mlp, with_grads=True):
            for name, p in mlp.named_parameters():
                got[name.replace("_fsdp_wrapped_module.", "")] = p.grad.clone()
        assert got.keys() == expected.keys()
    return max(difference(got[name], expected[name]) for name in got)


def linear(batch, style, positional, sites=ALL_LINEAR, bias=True):
    """A RoutedLinear under torch's tensor parallelism, against the same one in one process."""
    torch.manual_seed(0)
    whole = RoutedLinear(D_MODEL, D_FF, bias, sites=sites).double()
    layer = copy.deepcopy(whole)
    parallelize_module(nn.Sequential(layer), batch.mesh, {"0": style})
    seen = []
    for one in (whole, layer):
        x = batch.x.clone().requires_grad_()
        y = one(x, batch.routes) if positional else one(x, routes=batch.routes)
        (y * batch.direction(y)).sum().backward()
        seen.append([y.detach(), x.grad, *(p.grad for p in one.parameters())])
    return max(difference(got, expected) for expected, got in zip(*seen, strict=True))


def colwise(batch, **options):
    return linear(batch, ColwiseParallel(output_layouts=Replicate()), **options)


def rowwise(batch, **options):
    return linear(batch, RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()), **options)


TENSOR_PARALLEL = {
    "gate_proj": ColwiseParallel(),
    "up_proj": ColwiseParallel(),
    "down_proj": RowwiseParallel(),
}


def parallel_mlp(batch, sites):
    """An MLP whose submodules are sharded as torch's tutorial does it: every rank has half of the hidden units."""
    mlp, whole = gated(sites), gated(sites)
    parallelize_module(mlp, batch.mesh, TENSOR_PARALLEL)
    y = whole(batch.x, batch.routes)
    (y * batch.direction(y)).sum().backward()
    return trained(mlp, batch, {name: p.grad for name, p in whole.named_parameters()})


def parallel_attention(batch, sites):
    attention = RoutedAttention(D_MODEL, 2, sites=sites).double()
    styles = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(attention, batch.mesh, styles | {"o_proj": RowwiseParallel()})
    attention(batch.x, batch.routes)


def sharded_embedding(batch, style):
    layer = RoutedEmbedding(VOCABULARY, D_MODEL, sites=EmbeddingSites(OUTPUT))
    parallelize_module(nn.Sequential(layer), batch.mesh, {"0": style})
    layer(batch.ids, batch.routes)


def sharded_norm(batch):
    layer = RoutedLayerNorm(D_MODEL, sites=NormSites(OUTPUT)).double()
    parallelize_module(nn.Sequential(layer), batch.mesh, {"0": SequenceParallel()})
    layer(batch.x, batch.routes)


def sharded_updates(batch):
    mlp = gated(MLPSites(update=HIDDEN))
    for name in mlp.names:
        fully_shard(getattr(mlp, name), mesh=batch.mesh)
    mlp(batch.x, batch.routes)


UPDATES = MLPSites(update=HIDDEN)
CELLS = {
    "fully_shard": lambda batch: fully_sharded(batch, children=False),
    "fully_shard of submodules": lambda batch: fully_sharded(batch, children=True),
    "fully_shard of RoutedLinears": fully_sharded_routed_linears,
    "FSDP1": lambda batch: fsdp1(batch, children=False),
    "FSDP1 of submodules": lambda batch: fsdp1(batch, children=True),
    "FSDP1 of submodules, flat": lambda batch: fsdp1(batch, children=True, use_orig_params=False),
    "ColwiseParallel, positional": lambda batch: colwise(batch, positional=True),
    "ColwiseParallel": lambda batch: colwise(batch, positional=False),
    "ColwiseParallel without bias": lambda batch: colwise(
        batch, positional=True, bias=False, sites=LinearSites(output=ALL_LINEAR.output)
    ),
    "RowwiseParallel, positional": lambda batch: rowwise(batch, positional=True),
    "RowwiseParallel": lambda batch: rowwise(batch, positional=False),
    "RowwiseParallel without bias": lambda batch: rowwise(
        batch, positional=True, bias=False, sites=LinearSites(input=ALL_LINEAR.input)
    ),
    "RowwiseParallel with a default": lambda batch: rowwise(
        batch, positional=True, sites=LinearSites(update_rows=ALL_LINEAR.update_rows)
    ),
    "tensor-parallel submodules": lambda batch: parallel_mlp(
        batch, MLPSites(hidden=[[1.0], [0.5]], output=OUTPUT)
    ),
}
REFUSALS = {
    "masks of hidden units that ranks share": lambda batch: parallel_mlp(batch, MLPSites(hidden=HIDDEN)),
    "masks of heads that ranks share": lambda batch: parallel_attention(
        batch, AttentionSites(heads=localize(2, 2, {1: [0]}))
    ),
    "ColwiseParallel embedding": lambda batch: sharded_embedding(batch, ColwiseParallel()),
    "RowwiseParallel embedding": lambda batch: sharded_embedding(
        batch, RowwiseParallel(input_layouts=Replicate())
    ),
    "SequenceParallel norm": sharded_norm,
    "updates of sharded submodules": sharded_updates,
    "updates of FSDP1's submodules": lambda batch: fsdp1(batch, children=True, sites=UPDATES),
}


def refusal(cell, batch):
    try:
        cell(batch)
    except TypeError as error:
        return str(error)
    return "nothing was raised"


def run(rank, directory):
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", "invalid escape sequence")  # of torchao, whenever Python compiles it
    warnings.filterwarnings("ignore", ".*FSDP", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    store = dist.FileStore(str(Path(directory, "store")), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    results = {}
    for name, cell in (CELLS | REFUSALS).items():
        batch = Batch()
        try:
            results[name] = cell(batch) if name in CELLS else refusal(cell, batch)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    torch.save(results, Path(directory, f"{rank}.pt"))
    dist.destroy_process_group()
