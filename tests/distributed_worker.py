"""The cells of the matrix that test_models_distributed.py runs in each of its two processes, one after the other."""

import contextlib
import copy
import functools
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import tiny_models as tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites
from gradroute.models import ResidualSites, RoutingPlan, route, unroute
from gradroute.models.inspection import decoder_layers
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


def plain_model(layers=2):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=layers)).train()


def make_model(plan, layers=2):
    return route(plain_model(layers), plan)


def make_biased():
    """A Llama with biases everywhere, which the output's layers must add once, and train only where they may."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    model = transformers.LlamaForCausalLM(config).train()
    set_biases(model)
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


def set_biases(model):
    """Biases that are not 0, as they are in a new model, and no larger than embeddings.

    Larger ones make all tokens alike: attention's gradients nearly cancel then, and rounding is 1e-5 of them.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)


def plain_neox(parallel=True, layers=2, dropout=0.0):
    """A GPT-NeoX whose attention and MLP are parallel, or one after the other; a quarter of q and k rotates."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        **without_groups(SIZES),
        num_hidden_layers=layers,
        use_parallel_residual=parallel,
        hidden_dropout=dropout,
        bos_token_id=1,
    )
    model = transformers.GPTNeoXForCausalLM(config).train()
    set_biases(model)
    return model


def plain_neo():
    """A GPT-Neo with a layer of each of its kinds, whose configuration says how many heads its attention has."""
    torch.manual_seed(0)
    sizes = without_groups(SIZES)
    config = transformers.GPTNeoConfig(
        **{name: sizes[name] for name in sizes if name != "num_attention_heads"},
        num_heads=HEADS,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPTNeoForCausalLM(config).train()
    set_biases(model)
    return model


def plain_phi3(layers=2):
    """A Phi-3, whose first rank has all of q in its rows, and whose second rank has all of k and v."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        **SIZES, num_hidden_layers=layers, bos_token_id=1, pad_token_id=0, eos_token_id=2
    )
    return transformers.Phi3ForCausalLM(config).train()


def plain_gpt2(dropout=0.0):
    """A GPT-2; it drops out of the outputs of attention and of the MLP, of which every rank has a summand."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=D_MODEL,
        n_inner=D_FF,
        n_head=HEADS,
        n_layer=2,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    set_biases(model)
    return model


def without_groups(sizes):
    return {name: size for name, size in sizes.items() if name != "num_key_value_heads"}


def plan_of_heads(mid=False):
    """A plan with every site of a model with biases, all of whose query heads have a key and value head of their own.

    Tables change within a rank's half of the features.
    """
    bias = localize(2, D_MODEL, {1: slice(0, 20)})
    residual = ResidualSites(
        pre=localize(2, D_MODEL, {1: slice(16, 32)}), mid=[[1.0], [0.5]] if mid else None
    )
    return RoutingPlan(
        2,
        mlp=MLPSites(
            pre=localize(2, D_FF, {1: slice(0, 50)}, off=0.5),
            hidden=localize(2, D_FF, {1: slice(40, 64)}),
            forward=localize(2, D_FF, {0: slice(0, 60)}),
            update_in=localize(2, D_FF, {1: slice(20, 64)}),
            update_out=localize(2, D_FF, {1: slice(10, 50)}),
            output=localize(2, D_MODEL, {1: slice(0, 30)}),
            update_output_bias=bias,
        ),
        attention=AttentionSites(
            query=localize(2, HEADS, {1: [0, 2, 3]}, off=0.5),
            key=localize(2, HEADS, {1: [1]}, off=0.25),
            value=localize(2, HEADS, {1: [0, 2]}, off=0.75),
            heads=localize(2, HEADS, {1: [1, 2, 3]}),
            forward_heads=localize(2, HEADS, {0: [0, 1, 2]}),
            update_q=localize(2, HEADS, {1: [0, 3]}),
            update_kv=localize(2, HEADS, {1: [1, 3]}),
            update_out=localize(2, HEADS, {1: [2, 3]}),
            update_output_bias=bias,
            score_edges=[[1.0, 1.0], [0.0, 1.0]],
            value_edges=[[1.0, 0.0], [1.0, 1.0]],
        ),
        residual={1: residual},
        norm=NormSites([[1.0], [0.0]]),
        final_norm=NormSites([[1.0], [0.0]]),
        embedding=EmbeddingSites([[1.0], [0.0]]),
        lm_head=LinearSites(update_rows=[[1.0], [0.0]]),
    )


def make_neox(parallel=True, dropout=0.0):
    return route(plain_neox(parallel, dropout=dropout), plan_of_heads(mid=not parallel))


def make_neo():
    return route(plain_neo(), plan_of_heads(mid=True))


def make_phi3():
    return route(plain_phi3(), full_plan())


def make_small_phi3():
    return route(plain_phi3(layers=1), small_plan(attention=True))


def make_gpt2(dropout=0.0):
    return route(plain_gpt2(dropout), plan_of_heads(mid=True))


def make_small_neox():
    """One that compiles fast."""
    updates = AttentionSites(update=localize(2, HEADS, {1: [2, 3]}))
    mlp = MLPSites(hidden=localize(2, D_FF, {1: slice(40, 64)}), update=localize(2, D_FF, {1: slice(20, 64)}))
    return route(plain_neox(layers=1), RoutingPlan(2, mlp=mlp, attention=updates))


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
        named = model.named_parameters()
        return {name_of(name): whole(parameter.grad) for name, parameter in named if parameter.requires_grad}


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


def tensor_parallel_of(rank, make, checkpoint="off", compiled=False):
    """A routed model: gradients, the loss, the state_dict, and the placements of the gradients."""
    model = make()
    plain = copy.deepcopy(model)
    micro_batches = batches()[:1]
    torch.manual_seed(1)  # of dropout, which is the same on every rank
    expected = step(plain, "none", micro_batches, rank)
    set_checkpoint(model, checkpoint)
    model = sharded_model = parallelize(model, "tp")
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    got = step(model, "tp", micro_batches, rank)
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return {
        "worst": worst_of(got, expected),
        "sharded": len(sharded),
        "same placements": all(p.placements == p.grad.placements for p in sharded),
        "loss": [evaluated(each, micro_batches[0]) for each in (sharded_model, plain)],
        "state_dict": same_state(sharded_model, plain),
        "unroute": refusal_of(unroute, sharded_model),
        "again": refusal_of(parallelize, sharded_model, "tp"),
    }


@torch.no_grad()
def evaluated(model, batch):
    return float(loss_of(model.eval(), batch, label_count(batch)))


def same_state(model, plain):
    """Whether two models have the same state_dict, bit for bit, when all of it is gathered."""
    state = {name: whole(value) for name, value in model.state_dict().items()}
    expected = plain.state_dict()
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)


def refusal_of(function, *arguments):
    try:
        function(*arguments)
    except TypeError as error:
        return str(error)
    return ""


def unrouted_tensor_parallel(rank, make_plain, make_plan):
    """Training, evaluation, generation and the state_dict of a parallel model without routes."""
    routed = route(make_plain(), make_plan())
    plain = make_plain()
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
        results[f"{name}, state_dict"] = same_state(model, plain)
    return results


def checkpointed(rank, make_plain):
    """Whether one process, and a parallel model, load what torch.distributed.checkpoint saves of a parallel model."""
    saved = make_plain()
    directory = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(directory)
    dcp.save(parallelize(copy.deepcopy(saved), "tp").state_dict(), checkpoint_id=directory[0])
    results = {}
    for parallel in ("none", "tp"):
        model = make_plain()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model = parallelize(model, parallel)
        dcp.load(model.state_dict(), checkpoint_id=directory[0])
        results[parallel] = same_state(model, saved)
    return results


def generated(model):
    model.eval()
    prompt = torch.arange(8).view(2, 4)
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
    )


def sharded_twice(rank, make):
    """Tensor parallel with FSDP2 over a dimension of one: the parameters are DTensors of both meshes."""
    model = make()
    micro_batches = batches()[:1]
    expected = step(copy.deepcopy(model), "none", micro_batches, rank)
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    for layer in decoder_layers(model).values():
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
        "unrouted": (unrouted_tensor_parallel, plain_model, full_plan),
        "2d": (sharded_twice, functools.partial(make_model, full_plan())),
    },
    "gpt_neox": {
        "gpt_neox": (tensor_parallel_of, make_neox),
        "gpt_neox, serial": (tensor_parallel_of, functools.partial(make_neox, parallel=False)),
        "gpt_neox, dropout": (tensor_parallel_of, functools.partial(make_neox, dropout=0.1)),
        "gpt_neox, checkpoint": (tensor_parallel_of, make_neox, "non-reentrant"),
        "gpt_neox, compiled": (tensor_parallel_of, make_small_neox, "off", True),
        "gpt_neox, unrouted": (unrouted_tensor_parallel, plain_neox, plan_of_heads),
        "gpt_neox, saved": (checkpointed, plain_neox),
        "gpt_neox, 2d": (sharded_twice, make_neox),
    },
    "families": {
        "phi3": (tensor_parallel_of, make_phi3),
        "phi3, checkpoint": (tensor_parallel_of, make_phi3, "non-reentrant"),
        "phi3, compiled": (tensor_parallel_of, make_small_phi3, "off", True),
        "phi3, unrouted": (unrouted_tensor_parallel, plain_phi3, full_plan),
        "phi3, saved": (checkpointed, plain_phi3),
        "phi3, 2d": (sharded_twice, make_phi3),
        "gpt2": (tensor_parallel_of, make_gpt2),
        "gpt2, dropout": (tensor_parallel_of, functools.partial(make_gpt2, dropout=0.1)),
        "gpt2, unrouted": (unrouted_tensor_parallel, plain_gpt2, plan_of_heads),
        "gpt2, saved": (checkpointed, plain_gpt2),
        "gpt2, 2d": (sharded_twice, make_gpt2),
        "gpt_neo": (tensor_parallel_of, make_neo),
        "gpt_neo, unrouted": (unrouted_tensor_parallel, plain_neo, plan_of_heads),
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
