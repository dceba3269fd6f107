"""The cost of routing in time and in bytes kept for backward, beside the unrouted model and detach masks by hand."""

import copy
import statistics
import time
from collections.abc import Callable
from operator import truediv

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM

from gradroute import MLPSites
from gradroute.models import RoutingPlan, route

from .corpus import Batch
from .model import Shape, build, loss_of, routing_plan

ROUNDS = 20
WARMUP_ROUNDS = 3

Loss = Callable[[], Tensor]


class DetachGatedMLP(nn.Module):
    """The published way, by hand: `m*x + (1-m)*x.detach()` on the hidden units: forget tokens teach only their block.

    It routes less than SGTM asks for. It masks gradients of activations, so what it stops no longer reaches the layers
    below, and the update of a parameter (down_proj, attention, the head) cannot be confined token by token.
    """

    def __init__(self, mlp: nn.Module, sites: MLPSites, route_ids: Tensor):
        """route_ids [B, S]; the dense masks are made here, outside of the timed step."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        tables = (sites.forward, sites.hidden)
        self.visible, self.mask = (
            table.weights.to(route_ids.device)[route_ids] for table in tables
        )  # [B, S, d_ff]

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate_proj(x)) * self.up_proj(x) * self.visible  # [B, S, d_ff]
        return self.down_proj(self.mask * h + (1 - self.mask) * h.detach())


def hidden_units_only(routed: LlamaForCausalLM) -> MLPSites:
    """The part of the routing that detach masks can do, the same in every layer: the gradient at the hidden units."""
    sites = routed.model.layers[0].mlp.sites
    return MLPSites(forward=sites.forward, hidden=sites.update_in)


def with_detach_masks(model: LlamaForCausalLM, sites: MLPSites, route_ids: Tensor) -> LlamaForCausalLM:
    for layer in model.model.layers:
        layer.mlp = DetachGatedMLP(layer.mlp, sites, route_ids)
    return model


def measure(shape: Shape, batch: Batch, device: torch.device) -> dict[str, dict[str, float]]:
    """The cost of a forward and a backward pass on one mixed batch, by variant of a model not yet trained."""
    model = build(shape).to(device)
    plan = routing_plan(model, shape)
    routed = route(copy.deepcopy(model), plan)
    sites = hidden_units_only(routed)
    hidden_only = route(copy.deepcopy(model), RoutingPlan(plan.num_routes, mlp=sites))
    detach = with_detach_masks(copy.deepcopy(model), sites, batch.route_ids.to(device))
    losses = {
        "unrouted": lambda: loss_of(model, batch, routed=False),
        "routed": lambda: loss_of(routed, batch, routed=True),
        "routed, hidden units only": lambda: loss_of(hidden_only, batch, routed=True),
        "detach, hidden units only": lambda: loss_of(detach, batch, routed=False),
    }
    check_same_gradients(
        losses["routed, hidden units only"](), hidden_only, losses["detach, hidden units only"](), detach
    )
    milliseconds = interleaved_steps(losses, device)
    models = (model, routed, hidden_only, detach)
    weights = [weight for one in models for weight in one.parameters()]
    return {
        name: {
            "step_milliseconds": statistics.median(milliseconds[name]),
            # Step by step in pairs: what else the machine does slows both alike.
            "times_unrouted": statistics.median(map(truediv, milliseconds[name], milliseconds["unrouted"])),
            "saved_bytes": saved_bytes(loss, weights),
        }
        for name, loss in losses.items()
    }


def check_same_gradients(loss: Tensor, model: nn.Module, other_loss: Tensor, other: nn.Module) -> None:
    """A race of two variants says something only where they compute the same."""
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.autograd.grad(other_loss, list(other.parameters()))
    for gradient, other_gradient in zip(gradients, expected, strict=True):
        # Sums over a thousand tokens in another order: a thousand roundings of 6e-8 at the worst.
        tolerance = 1e-4 * other_gradient.abs().max().item()
        torch.testing.assert_close(gradient, other_gradient, rtol=0, atol=tolerance)


def interleaved_steps(losses: dict[str, Loss], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each step after warming up, by variant."""
    milliseconds: dict[str, list[float]] = {name: [] for name in losses}
    for round_ in tqdm(range(WARMUP_ROUNDS + ROUNDS), desc=f"{'cost':<20}", unit="round"):
        for name, loss in losses.items():
            elapsed = timed_step(loss, device)
            if round_ >= WARMUP_ROUNDS:
                milliseconds[name].append(1e3 * elapsed)
    return milliseconds


def timed_step(loss: Loss, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    loss().backward()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(loss: Loss, weights: list[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, parameters aside."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept_alive = loss()  # otherwise a freed address could stand for two tensors
    for weight in weights:
        saved.pop(weight.untyped_storage().data_ptr(), None)
    del kept_alive
    return sum(saved.values())
