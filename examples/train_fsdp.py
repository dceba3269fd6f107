"""Trains a small routed Llama with FSDP2: `torchrun --nproc_per_node=2 examples/train_fsdp.py`, on CPUs or on GPUs.

The data are synthetic: sequences of route 0 (retain) count upwards, sequences of route 1 (forget) count downwards.
"""

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from gradroute.models import route, sgtm
from gradroute.optim import RoutedAdamW, routed_param_groups

ROUTES = ("retain", "forget")
IGNORED = -100


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a micro-batch of one rank")
    parser.add_argument("--length", type=int, default=32, help="tokens in a sequence")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--bf16", action="store_true", help="compute in bf16, reduce and update in fp32")
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations in backward")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    device = start()
    model = make_model(args, device)
    # torch's AdamW would move, by decay and momentum, what a mask protects.
    optimizer = RoutedAdamW(routed_param_groups(model), lr=args.lr, weight_decay=0.01)
    batches = synthetic_batches(args, model.config.vocab_size, device)
    for step in range(args.steps):
        losses = train_step(model, optimizer, [next(batches) for _ in range(args.accumulate)])
        if dist.get_rank() == 0 and (step % 5 == 0 or step == args.steps - 1):
            shown = ", ".join(f"{name} {loss:.4f}" for name, loss in zip(ROUTES, losses, strict=True))
            print(f"step {step}: loss {shown}", flush=True)
    # A thread of gloo may still hold the tensor of the last collective, and let go of it under the interpreter's lock,
    # which it gets while this one waits. Once the interpreter is about to end, the process would abort instead.
    dist.barrier()
    dist.destroy_process_group()


def start() -> torch.device:
    """This rank's device, and the process group of its kind: nccl on GPUs, gloo on CPUs."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def make_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(0)  # every rank makes the same model
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=args.length,
    )
    model = LlamaForCausalLM(config).to(device).train()
    route(model, sgtm(config, forget_heads=1, forget_units=64))  # routed before it is sharded
    if args.checkpoint:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable()
        else:  # transformers 5.17 and older
            model.gradient_checkpointing_enable()
    options = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),))}
    if args.bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor, Tensor]]
) -> list[float]:
    """One update; returns each route's mean loss over all ranks.

    Ranks and micro-batches hold different numbers of labels, so a mean taken on each of them and then averaged would
    weigh a label by how few others happen to be beside it. With routes that is worse than unfair: a rank with three
    forget tokens would teach the forget part as much as one with three thousand, and one with none would still halve
    what the other taught. So the sum of all labels' losses is divided by their number, over all ranks and
    micro-batches, which must be known before the first backward. It is one number for all routes: dividing each
    route's sum by its own count would be another objective, in which rare routes count more.
    """
    count = torch.stack([(labels[:, 1:] != IGNORED).sum() for _, labels, _ in batches]).sum()
    dist.all_reduce(count)
    sums = torch.zeros(2, len(ROUTES), device=count.device, dtype=torch.float64)  # losses, labels
    for i, (tokens, labels, route_ids) in enumerate(batches):
        model.set_requires_gradient_sync(i == len(batches) - 1)  # gradients are reduced once a step
        logits = model(tokens, route_ids=route_ids, use_cache=False).logits[:, :-1]
        targets = labels[:, 1:]
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        # FSDP2 (as DDP) averages gradients over the ranks: times their number, the average is the sum.
        (losses.sum() * dist.get_world_size() / count).backward()
        add_by_route(sums, losses, targets.flatten(), route_ids[:, 1:].flatten())
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).tolist()


def add_by_route(sums: Tensor, losses: Tensor, targets: Tensor, routes: Tensor) -> None:
    sums[0].index_add_(0, routes, losses.detach().double())
    sums[1].index_add_(0, routes, (targets != IGNORED).double())


def synthetic_batches(
    args: argparse.Namespace, vocabulary: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, labels and routes, each [batch, length]: other sequences, padding and shares of routes on every rank."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    while True:
        start = torch.randint(0, vocabulary, (args.batch, 1), generator=generator)
        forget = torch.rand(args.batch, 1, generator=generator) < (0.75 if rank == 0 else 0.1)
        steps = torch.arange(args.length) * torch.where(forget, -1, 1)
        tokens = (start + steps) % vocabulary
        used = torch.randint(args.length // 4, args.length + 1, (args.batch, 1), generator=generator)
        labels = tokens.masked_fill(torch.arange(args.length) >= used, IGNORED)
        yield tokens.to(device), labels.to(device), forget.long().expand(-1, args.length).to(device)


if __name__ == "__main__":
    main()
