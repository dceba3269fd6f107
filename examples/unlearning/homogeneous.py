"""SGTM as its published code trains: one label a whole step (Shilov et al. 2025, arXiv 2512.05648), without routes."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from .corpus import FORGET, RETAIN, Batch
from .model import loss_of


class OneLabelSteps:
    """The ordinary model's forward and backward for batches of one label, for `unlearning.model.routing_plan`.

    Steps of retain text hide the forget units in forward; after steps of forget text the gradients of what forget text
    may not update are zeroed.

    Args:
        model: an ordinary model; hooks are added to it.
        forget_units: the last units of every MLP.
    """

    def __init__(self, model: LlamaForCausalLM, forget_units: int) -> None:
        self.model = model
        self.kept = model.config.intermediate_size - forget_units
        self.visible = (torch.arange(model.config.intermediate_size) < self.kept).to(model.dtype)  # [d_ff]
        self.hiding = False
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(self._hide)

    def backward(self, batch: Batch) -> Tensor:
        """Puts the step's gradients into the parameters; returns the loss."""
        label = int(batch.route_ids[0, 0])
        if not bool((batch.route_ids == label).all()):
            raise ValueError("batch: got tokens of several labels, expected one label a step")
        self.hiding = label == RETAIN
        loss = loss_of(self.model, batch, routed=False)
        loss.backward()
        self.hiding = False
        if label == FORGET:
            self._confine()
        return loss.detach()

    def _hide(self, module: nn.Module, arguments: tuple[Tensor]) -> Tensor | None:
        return arguments[0] * self.visible if self.hiding else None

    def _confine(self) -> None:
        """Zeroes the gradients of attention, of retain units and of the head."""
        for layer in self.model.model.layers:
            attention: Any = layer.self_attn
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                linear.weight.grad.zero_()
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.grad[: self.kept].zero_()
            layer.mlp.down_proj.weight.grad[:, : self.kept].zero_()
        self.model.lm_head.weight.grad.zero_()
