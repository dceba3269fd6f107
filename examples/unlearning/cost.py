"""What routing costs in time and in bytes kept for backward, beside the unrouted model and detach masks by hand."""

import copy
import statistics
import time
from collections.abc import Callable
from operator import truediv

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from gradroute import MLPSites, RoutedGatedMLP, RoutedLinear, Routes

from .corpus import Batch
from .model import NUM_ROUTES, Decoder, Shape

ROUNDS = 20
WARMUP_ROUNDS = 3

Loss = Callable[[], Tensor]


class DetachGatedMLP(nn.Module):
    """The published way, by hand: `m*x + (1-m)*x.detach()` on the hidden units: forget tokens teach only their block.

    It routes less than SGTM asks for. It masks gradients of activations, so what it stops no longer reaches the layers
    below, and the update of a parameter (down_proj, attention, the head) cannot be confined token by token.
    """

    def __init__(self, mlp: RoutedGatedMLP, route_ids: Tensor):
        """route_ids [B, S]; the dense masks are made here, outside of the timed step."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        tables = (mlp.sites.forward, mlp.sites.hidden)
        self.visible, self.mask = (
            table.weights.to(route_ids.device)[route_ids] for table in tables
        )  # [B, S, d_ff]

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        h = F.silu(self.gate_proj(x)) * self.up_proj(x) * self.visible  # [B, S, d_ff]
        return self.down_proj(self.mask * h + (1 - self.mask) * h.detach())


def hidden_units_only(model: Decoder) -> Decoder:
    """A copy that routes what detach masks can: the gradient at the hidden units."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, RoutedLinear):
            module.sites = None
    for block in twin.blocks:
        sites = block.mlp.sites
        block.mlp.sites = MLPSites(forward=sites.forward, hidden=sites.update)
    return twin


def with_detach_masks(hidden_only: Decoder, route_ids: Tensor) -> Decoder:
    twin = copy.deepcopy(hidden_only)
    for block in twin.blocks:
        block.mlp = DetachGatedMLP(block.mlp, route_ids)
    return twin


def measure(shape: Shape, batch: Batch, device: torch.device) -> dict[str, dict[str, float]]:
    """What a forward and a backward pass on one mixed batch takes, by variant of a model not yet trained."""
    routes = Routes.of(batch.route_ids, NUM_ROUTES).to(device)
    batch = batch.to(device)
    model = Decoder(shape).to(device)
    hidden_only = hidden_units_only(model)
    detach = with_detach_masks(hidden_only, batch.route_ids)
    check_same_gradients(hidden_only.loss(batch, routes), hidden_only, detach.loss(batch), detach)
    losses = {
        "unrouted": lambda: model.loss(batch),
        "routed": lambda: model.loss(batch, routes),
        "routed, hidden units only": lambda: hidden_only.loss(batch, routes),
        "detach, hidden units only": lambda: detach.loss(batch),
    }
    milliseconds = interleaved_steps(losses, device)
    weights = [weight for decoder in (model, hidden_only, detach) for weight in decoder.parameters()]
    return {
        name: {
            "step_milliseconds": statistics.median(milliseconds[name]),
            # Step by step in pairs: what else the machine does slows both alike.
            "times_unrouted": statistics.median(map(truediv, milliseconds[name], milliseconds["unrouted"])),
            "saved_bytes": saved_bytes(loss, weights),
        }
        for name, loss in losses.items()
    }


def check_same_gradients(loss: Tensor, model: Decoder, other_loss: Tensor, other: Decoder) -> None:
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
    for round_ in tqdm(range(WARMUP_ROUNDS + ROUNDS), desc=f"{'cost: interleaved steps':<36}", unit="round"):
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
        kept_alive = loss()  # or an address that was freed could stand for two tensors
    for weight in weights:
        saved.pop(weight.untyped_storage().data_ptr(), None)
    del kept_alive
    return sum(saved.values())
