"""Scale-out in two gloo processes: pipeline stages, context parallel, mixtures of experts that FSDP2 shards."""

import copy
import dataclasses

import distributed_worker as base
import moe_zoo
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel

from gradroute import AttentionSites, Routes
from gradroute.models import MoESites, RoutingPlan, ablate, route
from gradroute.tables import Table, localize

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
MICROBATCHES, SEQUENCE = 4, 8
SDPA = nn.functional.scaled_dot_product_attention


class Stage(nn.Module):
    """One stage of a routed Llama, split by hand: its layers, the embedding in the first, norm and head in the last.

    It makes the Routes of its microbatch from the ids that every stage is given, and hands them to each routed part.
    """

    def __init__(self, model, index, stages):
        super().__init__()
        self.num_routes = model.routing_plan.num_routes
        inner = model.model
        split = len(inner.layers) // stages
        self.layers = inner.layers[index * split : (index + 1) * split]
        self.rotary_emb = inner.rotary_emb
        self.embed_tokens = inner.embed_tokens if index == 0 else None
        last = index == stages - 1
        self.norm, self.lm_head = (inner.norm, model.lm_head) if last else (None, None)

    def forward(self, x, route_ids):
        routes = Routes.of(route_ids, self.num_routes)
        x = x if self.embed_tokens is None else self.embed_tokens(x, routes=routes)
        positions = torch.arange(x.shape[1])[None]
        embeddings = self.rotary_emb(x, positions)
        for layer in self.layers:
            x = layer(x, position_embeddings=embeddings, attention_mask=None, routes=routes)
        return x if self.norm is None else self.lm_head(self.norm(x, routes=routes), routes=routes)


def pipeline(rank, schedule):
    """Each stage's gradients over microbatches that have their own ids: (worst error, its parameter), and the loss."""
    model = base.make_model(base.full_plan())
    tokens, labels, ids = (torch.cat(parts) for parts in zip(*base.batches(), strict=True))
    count = base.label_count((tokens, labels, ids))
    reference = copy.deepcopy(model)
    exact = base.loss_of(reference, (tokens, labels, ids), count)
    exact.backward()
    expected = base.gradients(reference)

    def loss(logits, targets):
        flat = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        return nn.functional.cross_entropy(*flat, ignore_index=base.IGNORED, reduction="sum") / count

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stage = Stage(model, rank, base.RANKS)
    runner = SCHEDULES[schedule](
        PipelineStage(stage, rank, base.RANKS, torch.device("cpu")),
        MICROBATCHES,
        loss_fn=loss,
        scale_grads=False,
    )
    losses = []
    if rank == 0:
        runner.step(tokens, route_ids=ids)
    else:
        runner.step(route_ids=ids, target=labels, losses=losses)
    got = {names[id(parameter)]: parameter.grad for parameter in stage.parameters()}
    mine = {name: expected[name] for name in got}
    differs = float((sum(losses) / exact).detach() - 1) if losses else 0.0
    return {"worst": base.worst_of(got, mine), "loss": differs, "parameters": len(got)}


def experts_plan():
    return RoutingPlan(
        2,
        moe=MoESites(
            forward=Table([[1.0] * 10 + [0.0] * (moe_zoo.UNITS - 10), [1.0] * moe_zoo.UNITS]),
            forward_experts=Table([[1.0, 1.0, 1.0, 0.0], [1.0] * moe_zoo.EXPERTS]),
            update=localize(2, moe_zoo.UNITS, {1: slice(8, moe_zoo.UNITS)}),
            experts=localize(2, moe_zoo.EXPERTS, {1: [2, 3]}),
            update_router=[[1.0], [0.5]],
        ),
    )


def experts(rank, name):
    """Gradients, ablation and the logits after it of experts in shards, against one process."""
    torch.manual_seed(0)
    model = route(moe_zoo.fresh(name), experts_plan()).train()
    batches = base.batches()[:1]
    expected = base.step(copy.deepcopy(model), "none", batches, rank)
    exact = copy.deepcopy(model)
    before = {key: value.clone() for key, value in exact.state_dict().items()}
    ablate(exact, 0)
    model = base.parallelize(model, "fsdp")
    is_sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    got = base.step(model, "fsdp", batches, rank)
    ablate(model, 0)
    state = {key: base.whole(value) for key, value in model.state_dict().items()}
    tokens = batches[0][0]
    with torch.no_grad():
        differs = float((model(tokens).logits - exact(tokens).logits).abs().max())
    return {
        "worst": base.worst_of(got, expected),
        "sharded": is_sharded,
        "ablated": [key for key, value in before.items() if not torch.equal(value, exact.state_dict()[key])],
        "differing": [key for key, value in exact.state_dict().items() if not torch.equal(value, state[key])],
        "logits": differs,
    }


class GatheredAttention:
    """Causal attention of a rank's queries over the keys of all ranks, whose positions are given, in any order."""

    def __init__(self, positions):
        self.mine, self.every = positions, gathered(positions)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None
        key, value = gathered(key, 2), gathered(value, 2)
        seen = self.mine[:, None] >= self.every
        options = {"attn_mask": seen, "scale": scaling, "enable_gqa": True}
        # torch's context parallel has another function in the place of the one that torch.nn.functional names.
        return SDPA(query, key, value, **options).transpose(1, 2).contiguous(), None


class _Gathered(torch.autograd.Function):
    """The parts of all ranks along a dimension; the gradient of a part is the sum of what the ranks have for it."""

    @staticmethod
    def forward(ctx, x, dim):
        ctx.dim = dim
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(base.RANKS)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(base.RANKS, ctx.dim)[dist.get_rank()], None


def gathered(x, dim=0):
    return _Gathered.apply(x, dim)


def local_plan():
    """Every sort of site that is about a token alone: all but those of attention between tokens."""
    full = base.full_plan()
    updates = AttentionSites(
        update=localize(2, base.HEADS, {1: [2, 3]}), update_kv=localize(2, base.KV_HEADS, {1: [1]})
    )
    return dataclasses.replace(full, attention=updates)


def context(rank):
    """Tokens, targets, ids and positions in shards of the sequence that torch makes, balanced over the ranks."""
    model = base.make_model(local_plan())
    tokens, labels, ids = (part[:, :SEQUENCE].clone() for part in base.batches()[0])
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=base.IGNORED)
    positions = torch.arange(SEQUENCE)[None].clone()
    reference = copy.deepcopy(model)
    exact = summed(reference, tokens, targets, ids, positions)
    exact.backward()
    expected = base.gradients(reference)
    buffers = [tokens, targets, ids, positions]
    with context_parallel(
        init_device_mesh("cpu", (base.RANKS,)), buffers=buffers, buffer_seq_dims=[1] * len(buffers)
    ):
        transformers.AttentionInterface.register("gathered", GatheredAttention(positions[0].clone()))
        transformers.AttentionMaskInterface.register("gathered", lambda *args, **kwargs: None)
        model.set_attn_implementation("gathered")
        width = tokens.shape[1]
        loss = summed(model, tokens, targets, ids, positions)
        loss.backward()
        refusals = [refusal_of(make) for make in (base.full_plan, local_plan)]
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    total = loss.detach()
    dist.all_reduce(total)
    return {
        "worst": base.worst_of(base.gradients(model), expected),
        "loss": float((total / exact).detach() - 1),
        "width": width,
        "refusals": refusals,
    }


def refusal_of(make_plan):
    """What comes of a model with transformers' own "sdpa" inside context_parallel."""
    model = base.make_model(make_plan())
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    try:
        model(tokens, route_ids=tokens)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def summed(model, tokens, targets, ids, positions):
    logits = model(tokens, position_ids=positions, route_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=base.IGNORED, reduction="sum"
    )


GROUPS = {
    "scale": {
        **{("pipeline", name): (pipeline, name) for name in SCHEDULES},
        **{("experts", name): (experts, name) for name in ("mixtral", "gpt_oss")},
        ("context",): (context,),
    }
}


def run(rank, directory, group):
    base.GROUPS |= GROUPS
    base.run(rank, directory, group)
