"""Trainings and a whole recipe in each of two processes on CPUs, which test_recipes_sharded.py starts."""

import json
import os
import time
import warnings
from pathlib import Path

import recipe_cases
import tiny_models as tiny
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gradroute.models import localize_mlp, route, sgtm
from gradroute.recipes import adapters, sharding
from gradroute.recipes import run as run_recipe
from gradroute.recipes.trainer import RecipeTrainer
from gradroute.recipes.training import train
from gradroute.recipes.training_sections import Adapters, Train

RANKS = 2
STEPS = 6
STOP, BEFORE = 5, 4  # the step in which a training is stopped, and that of the last checkpoint before
MOST_NORM = 0.1

# Two documents of 24 are of route 1, so that some steps have none, and in others one process has all of it.
ROWS = [
    {
        "input_ids": [(7 * i + 3 * t) % 30 + 3 for t in range(5 + i % 8)],
        "route_ids": [int(i in (7, 9))] * (5 + i % 8),
    }
    for i in range(24)
]

MODELS = {
    # 33 tokens and 25 units leave one process a row more than the other.
    "untied": ({}, lambda config: sgtm(config, 2, 5)),
    # accelerate finds the routed layer first, by the name that both have.
    "tied": ({"tie_word_embeddings": True}, lambda config: localize_mlp([0], 6)),
    "adapters": ({}, None),
}
ADAPTERS = Adapters(rank=3, targets=("q_proj", "down_proj"))


def shard_on_cpus():
    """Has accelerate shard on CPUs, on which it makes whole copies instead: it goes by the kind of processes alone.

    Those of a list of kinds are sharded, and CPUs are not in it. So they are said to be GPUs until that is decided.
    """
    init = AcceleratorState.__init__

    def decide(self, *args, fsdp_plugin=None, **kwargs):
        state = PartialState._shared_state
        if fsdp_plugin is not None and state.get("distributed_type") == DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    AcceleratorState.__init__ = decide
    sharding.UNSHARDED = ()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Keep(transformers.TrainerCallback):
    """Stops a training at a step, or keeps what it ends in."""

    def __init__(self, stop):
        self.stop = stop
        self.found = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            raise KeyboardInterrupt

    def on_train_end(self, args, state, control, model, optimizer, **kwargs):
        states = {name: optimizer.state[p] for name, p in model.named_parameters() if p.requires_grad}
        layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
        self.found = {
            "weights": {name: whole(p) for name, p in model.named_parameters()},
            "steps": {name: whole(state["step"]) for name, state in states.items()},
            "moments": {name: whole(state["exp_avg"]) for name, state in states.items()},
            "dtypes": {p.dtype for p in model.parameters()},
            "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
            "layers": [isinstance(layer, FSDPModule) for layer in layers],
        }


def fit(kind, folder, processes, arguments=None, *, stop=None, save_to=None, dtype=torch.float64, **settings):
    """Trains a model of MODELS: the same batches in every step, whatever the number of processes."""
    options, plan = MODELS[kind]
    torch.manual_seed(0)
    model = tiny.llama(vocab_size=33, intermediate_size=25, **options).to(dtype)
    if plan is None:
        model = adapters.add(model, ADAPTERS)
        adapters.route(model, ADAPTERS, ["retain", "forget"])
    else:
        route(model, plan(model.config))
    defaults = {
        "steps": STEPS,
        "batch_tokens": 32,
        "accumulation": 4 // processes,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": MOST_NORM,
        "precision": "fp32",
        "save_every": 2,
        "log_every": 1,
    }
    made = Train(**defaults | settings, arguments={"disable_tqdm": True, **(arguments or {})})
    keep = Keep(stop)
    figures = train(model, ROWS, made, folder, save_to=save_to, callbacks=[keep])
    return {"figures": figures, **keep.found}


def stopped(*args, **options):
    """Trains, is stopped, and goes on from the last checkpoint: what it ends in, and the checkpoint's files."""
    try:
        fit(*args, stop=STOP, **options)
        raise AssertionError("the training was not stopped")
    except KeyboardInterrupt:
        pass
    checkpoint = Path(args[1]) / f"checkpoint-{BEFORE}"
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    return {**fit(*args, **options), "files": files}


def late(*args, **options):
    """As `stopped`, but the last process is late with its part of every checkpoint: was it marked before that?"""
    save, marked = RecipeTrainer._save_rng_state, []

    def save_late(self, output_dir):
        if dist.get_rank() == RANKS - 1:
            time.sleep(0.5)
            marked.append((Path(output_dir) / "whole").exists())
        return save(self, output_dir)

    RecipeTrainer._save_rng_state = save_late
    try:
        return {**stopped(*args, **options), "marked": marked}
    finally:
        RecipeTrainer._save_rng_state = save


def recipe_config(files, processes, arguments):
    """The config of a short run of unlearn with all that it trains, of the same batches for any number of processes."""
    made = recipe_cases.config(Path(files))
    made["model"]["device"] = "cpu"
    return {
        **made,
        "expand": {"units": 6},
        "train": {
            "steps": 6,
            "batch_tokens": 128,
            "accumulation": 2 // processes,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "save_every": 3,
            "log_every": 3,
            "arguments": {"disable_tqdm": True, **arguments},
        },
        "coherence": {"steps": 2},
        "baselines": {"names": ["gradient_ascent"], "gradient_ascent": {"steps": 3}},
        "relearning": {"steps": 2, "every": 1, "documents": 4, "heldout": 4},
        "evaluate": {"prompts_each": 0},
    }


def reported(files, out, processes, arguments):
    """The report of a short run of unlearn."""
    run_recipe("unlearn", recipe_config(files, processes, arguments), Path(out))
    return json.loads((Path(out) / "report.json").read_text())


def cells(directory, files):
    """What is run, by name: the sharded ones after what is not."""
    shards = {"fsdp": True}
    yield "ddp", lambda: fit("untied", f"{directory}/ddp", RANKS)
    yield (
        "sharded",
        lambda: fit("untied", f"{directory}/sharded", RANKS, shards, save_to=f"{directory}/saved"),
    )
    yield "resumed", lambda: late("untied", f"{directory}/resumed", RANKS, shards)
    full = {"fsdp": True, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
    yield "resumed, full", lambda: stopped("untied", f"{directory}/full", RANKS, full)
    options = {"save_every": 0, "activation_checkpointing": True}
    yield "tied", lambda: fit("tied", f"{directory}/tied", RANKS, shards, **options)
    for kind in ("bf16", "fp16"):
        narrow = {"save_every": 0, "precision": kind, "dtype": torch.float32}
        yield kind, lambda narrow=narrow: fit("untied", f"{directory}/narrow", RANKS, shards, **narrow)
    saved = f"{directory}/adapters by two"
    yield "adapters", lambda: fit("adapters", f"{directory}/adapters", RANKS, shards, save_to=saved)
    yield "adapters resumed", lambda: stopped("adapters", f"{directory}/adapters resumed", RANKS, shards)
    yield "environment", lambda: dict(os.environ)
    yield "recipe", lambda: reported(files, f"{directory}/recipe", RANKS, shards)


def run(rank, directory, files, port):
    """Runs all cells, and leaves what came of each, a result or the text of an error."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.simplefilter("error")
    # What transformers will take away, and PEFT still uses.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    shard_on_cpus()
    results = {}
    for name, cell in cells(directory, files):
        try:
            results[name] = cell()
        except Exception as exception:
            results[name] = f"{type(exception).__name__}: {exception}"
        torch.save(results, Path(directory) / f"{rank}.pt")
    time.sleep(0.2)  # a thread of gloo may still hold a tensor, see examples/train_fsdp.py
    dist.destroy_process_group()
