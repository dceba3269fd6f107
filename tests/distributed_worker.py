"""The cells of the matrix that test_models_distributed.py runs in each of its two processes, one after the other."""

import contextlib
import copy
import time
import warnings
from datetime import timedelta
from pathlib import Path

import tiny_models as tiny
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites
from gradroute.models import ResidualSites, RoutingPlan, route
from gradroute.models.parallel import tensor_parallel
from gradroute.tables import localize

RANKS = 2
VOCABULARY, D_MODEL, D_FF, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 50, 32, 64, 4, 2, 8, 10
IGNORED = -100
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
# Warnings of others: pyproject.toml says when the first three come, and the last comes at FSDP2's graph breaks.
IGNORED_WARNINGS = [
    ("invalid escape sequence", Warning),
    (".*got a forward in training mode without route_ids", RuntimeWarning),  # cells compare unrouted ones too
    ("`torch.jit.script", DeprecationWarning),
    (".*should not be instantiated", DeprecationWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
]
PARALLEL = ("none", "ddp", "fsdp", "tp")
CHECKPOINTS = ("off", "non-reentrant", "reentrant")


def full_plan(**more):
    """A plan with every sort of site, whose tables change within a rank's half of the features."""
    return RoutingPlan(
        2,
        mlp=MLPSites(
            pre=[[1.0], [0.5]],
            hidden=localize(2, D_FF, {1: slice(40, 64)}),
            update=localize(2, D_FF, {1: slice(20, 64)}),
            output=localize(2, D_MODEL, {1: slice(0, 30)}),
        ),
        attention=AttentionSites(
            heads=localize(2, HEADS, {1: [1, 2, 3]}),
            key=localize(2, KV_HEADS, {1: [1]}, off=0.25),
            update=localize(2, HEADS, {1: [2, 3]}),
            update_kv=localize(2, KV_HEADS, {1: [1]}),
            score_edges=[[1.0, 1.0], [0.0, 1.0]],
        ),
        residual={1: ResidualSites(pre=localize(2, D_MODEL, {1: slice(16, 32)}))},
        norm=NormSites([[1.0], [0.0]]),
        final_norm=NormSites([[1.0], [0.0]]),
        embedding=EmbeddingSites([[1.0], [0.0]]),
        lm_head=LinearSites(update_rows=[[1.0], [0.0]]),
        **more,
    )


def small_plan(attention):
    """A plan that compiles fast: a mask and updates of hidden units, and on demand updates of heads."""
    updates = AttentionSites(
        update=localize(2, HEADS, {1: [2, 3]}), update_kv=localize(2, KV_HEADS, {1: [1]})
    )
    mlp = MLPSites(hidden=localize(2, D_FF, {1: slice(40, 64)}), update=localize(2, D_FF, {1: slice(20, 64)}))
    return RoutingPlan(2, mlp=mlp, attention=updates if attention else None)


def make_model(plan, layers=2):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=layers)).train()
    return route(model, plan)


def make_biased():
    """A Llama with biases everywhere, which the output's layers must add once, and train only where they may."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    model = transformers.LlamaForCausalLM(config).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    allowed = localize(2, D_MODEL, {1: slice(0, 20)})
    plan = RoutingPlan(
        2,
        mlp=MLPSites(update=localize(2, D_FF, {1: slice(20, 64)}), update_output_bias=allowed),
        attention=AttentionSites(
            update=localize(2, HEADS, {1: [1]}),
            update_kv=localize(2, KV_HEADS, {1: [0]}),
            update_output_bias=allowed,
        ),
    )
    return route(model, plan)


def make_qwen3():
    """Norms of queries and keys, whose weight all heads, and so all ranks, share."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES, num_hidden_layers=1, head_dim=HEAD_DIM)
    qk_norm = NormSites(localize(2, HEAD_DIM, {1: slice(0, 3)}))
    return route(transformers.Qwen3ForCausalLM(config).train(), RoutingPlan(2, qk_norm=qk_norm))


def batches():
    """Two micro-batches for each rank. Of rank 1, the first has no token of route 1, and the second no other.

    They hold different numbers of labels, so that the mean of the ranks' mean losses is not the mean loss.
    """
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(2):
        tokens = torch.randint(0, VOCABULARY, (2 * RANKS, TOKENS), generator=generator)
        ids = torch.randint(0, 2, (2 * RANKS, TOKENS), generator=generator)
        labels = tokens.clone()
        labels[0, 3:] = IGNORED
        made.append((tokens, labels, ids))
    made[0][2][2:] = 0
    made[1][2][2:] = 1
    return made


def of_rank(batch, rank):
    return tuple(tensor[2 * rank : 2 * rank + 2] for tensor in batch)


def loss_of(model, batch, count, routed=True):
    """The sum over the batch's labels, divided by `count`."""
    tokens, labels, ids = batch
    options = {"route_ids": ids} if routed else {}
    logits = model(tokens, use_cache=False, **options).logits[:, :-1]
    targets = labels[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum"
    )
    return loss / count


def label_count(batch):
    return int((batch[1][:, 1:] != IGNORED).sum())


def gradients(model):
    unsharded = contextlib.nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        unsharded = FullyShardedDataParallel.summon_full_params(model, with_grads=True)
    with unsharded:
        return {name_of(name): whole(parameter.grad) for name, parameter in model.named_parameters()}


def name_of(name):
    """A parameter's name without those of wrappers."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def worst_of(got, expected):
    """The largest error of a gradient, relative to the parameter's largest gradient, and whose it is."""
    assert got.keys() == expected.keys()
    return max(
        (float((got[name] - exact).abs().max() / exact.abs().max().clamp_min(1e-30)), name)
        for name, exact in expected.items()
    )


def parallelize(model, parallel, policy=None):
    mesh = init_device_mesh("cpu", (RANKS,))
    if parallel == "ddp":
        return DistributedDataParallel(model)
    if parallel == "fsdp1":
        policy = ModuleWrapPolicy({type(model.model.layers[0])})
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)
    if parallel == "fsdp":
        options = {} if policy is None else {"mp_policy": policy}
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)
    return tensor_parallel(model, mesh) if parallel == "tp" else model


def set_checkpoint(model, checkpoint):
    if checkpoint != "off":
        tiny.checkpoint_layers(model, checkpoint == "reentrant")
    if checkpoint == "reentrant":  # it drops the gradients of what has no input that requires one
        model.enable_input_require_grads()


def step(model, parallel, micro_batches, rank):
    """One accumulated backward over the micro-batches, normalised by the labels of all ranks."""
    splits = parallel in ("ddp", "fsdp", "fsdp1")
    count = sum(map(label_count, micro_batches))
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        if parallel == "fsdp":
            model.set_requires_gradient_sync(last)
        accumulating = parallel in ("ddp", "fsdp1") and not last
        with model.no_sync() if accumulating else contextlib.nullcontext():
            part = of_rank(batch, rank) if splits else batch
            # DDP and FSDP2 average over the ranks, so a rank's share of the sum is taken RANKS times.
            loss_of(model, part, count / RANKS if splits else count).backward()
    return gradients(model)


def cell(rank, parallel, checkpoint, compiled):
    """A cell of the matrix: (worst relative error, parameter).

    Compiled ones are small: two processes trace each for seconds.
    """
    if compiled:
        model = make_model(small_plan(attention=(parallel, checkpoint) == ("tp", "off")), layers=1)
    else:
        model = make_model(full_plan())
    micro_batches = batches()[:1]
    expected = step(copy.deepcopy(model), "none", micro_batches, rank)
    set_checkpoint(model, checkpoint)
    model = parallelize(model, parallel)
    if compiled:
        torch._dynamo.reset()
        # The wrappers of DDP and FSDP2 break the graph by design; the model itself is one.
        model = torch.compile(model, backend="aot_eager", fullgraph=parallel in ("none", "tp"))
    return worst_of(step(model, parallel, micro_batches, rank), expected)


def accumulation(rank, parallel):
    """Two micro-batches, in the second of which rank 1 has no token that may update everything."""
    model = make_model(full_plan())
    expected = step(copy.deepcopy(model), "none", batches(), rank)
    set_checkpoint(model, "non-reentrant")
    return worst_of(step(parallelize(model, parallel), parallel, batches(), rank), expected)


def mixed_precision(rank):
    """FSDP2 with bf16 parameters, and one process with a bf16 copy of the model: both against fp32."""
    model = make_model(full_plan())
    micro_batches = batches()[:1]
    exact = step(copy.deepcopy(model), "none", micro_batches, rank)
    rounded = step(copy.deepcopy(model).to(torch.bfloat16), "none", micro_batches, rank)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    got = step(parallelize(model, "fsdp", policy), "fsdp", micro_batches, rank)
    return {name: (error(got[name], exact[name]), error(rounded[name], exact[name])) for name in exact}


def error(got, exact):
    return float((got.float() - exact).norm() / exact.norm())


def missing_sync(rank):
    """The error of a mean loss on every rank, which has not the gradient of the concatenated batch."""
    model = make_model(full_plan())
    batch = batches()[0]
    expected = step(copy.deepcopy(model), "none", [batch], rank)
    part = of_rank(batch, rank)
    model = parallelize(model, "ddp")
    loss_of(model, part, label_count(part)).backward()
    return worst_of(gradients(model), expected)


def tensor_parallel_of(rank, make):
    """Another architecture, routed, and the placements of its gradients."""
    model = make()
    micro_batches = batches()[:1]
    expected = step(copy.deepcopy(model), "none", micro_batches, rank)
    model = parallelize(model, "tp")
    got = step(model, "tp", micro_batches, rank)
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return {
        "worst": worst_of(got, expected),
        "sharded": len(sharded),
        "same placements": all(p.placements == p.grad.placements for p in sharded),
    }


def unrouted_tensor_parallel(rank):
    """Training, evaluation, generation and the state_dict of a parallel model without routes."""
    routed = make_model(full_plan())
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=2)).train()
    plain.load_state_dict(routed.state_dict())
    batch = batches()[0]
    loss_of(plain, batch, label_count(batch), routed=False).backward()
    expected = gradients(plain)
    results = {"differs": worst_of(step(copy.deepcopy(routed), "none", [batch], rank), expected)[0]}
    for name, model in (("routed before", routed), ("never routed", copy.deepcopy(plain))):
        model.zero_grad()
        parallelize(model, "tp")
        loss_of(model, batch, label_count(batch), routed=False).backward()
        results[name] = worst_of(gradients(model), expected)
        results[f"{name}, generates"] = torch.equal(generated(model), generated(plain))
        state = {key: whole(value) for key, value in model.state_dict().items()}
        results[f"{name}, state_dict"] = all(
            torch.equal(value, state[key]) for key, value in plain.state_dict().items()
        )
    return results


def generated(model):
    model.eval()
    prompt = torch.arange(8).view(2, 4)
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
    )


def sharded_twice(rank):
    """Tensor parallel with FSDP2 over a dimension of one: the parameters are DTensors of both meshes."""
    model = make_model(full_plan())
    micro_batches = batches()[:1]
    expected = step(copy.deepcopy(model), "none", micro_batches, rank)
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    got = step(model, "tp", micro_batches, rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    return worst_of(got, expected)


GROUPS = {
    "eager": {
        (parallel, checkpoint, "eager"): (cell, parallel, checkpoint, False)
        for parallel in PARALLEL
        for checkpoint in CHECKPOINTS
    },
    "compile": {
        (parallel, checkpoint, "compile"): (cell, parallel, checkpoint, True)
        for parallel in PARALLEL
        for checkpoint in CHECKPOINTS[:2]
    },
    # These stand apart because they take long, and Dynamo makes no difference between the two checkpoints.
    "compile-reentrant": {
        (parallel, "reentrant", "compile"): (cell, parallel, "reentrant", True) for parallel in PARALLEL
    },
    "more": {
        "accumulation ddp": (accumulation, "ddp"),
        "accumulation fsdp": (accumulation, "fsdp"),
        "accumulation fsdp1": (accumulation, "fsdp1"),
        "mixed precision": (mixed_precision,),
        "mean of means": (missing_sync,),
        "biases": (tensor_parallel_of, make_biased),
        "qwen3": (tensor_parallel_of, make_qwen3),
        "unrouted": (unrouted_tensor_parallel,),
        "2d": (sharded_twice,),
    },
}


def run(rank, directory, group):
    """Runs the cells of a group, and leaves what came of each, a result or the text of an error."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.simplefilter("error")
    for text, category in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", text, category)
    store = f"file://{directory}/{group}.store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    results = {}
    for name, (function, *arguments) in GROUPS[group].items():
        if group == "compile" and name[0] == "none" and CHECKPOINTS.index(name[1]) % RANKS != rank:
            continue  # one process does not need the other, which has the next cell meanwhile
        (Path(directory) / f"{group}.{rank}.running").write_text(str(name))
        try:
            results[name] = function(rank, *arguments)
        except Exception as exception:
            results[name] = f"{type(exception).__name__}: {exception}"
    torch.save(results, Path(directory) / f"{group}.{rank}.pt")
    # A thread of gloo may still hold a tensor, see examples/train_fsdp.py. Ranks need not end together here.
    time.sleep(0.2)
    dist.destroy_process_group()
