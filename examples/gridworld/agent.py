"""Policies of the gridworld's agent: one MLP, or two experts and a gate, of which one expert can be taken alone.

The mixture of experts of Cloud et al. 2024 (arXiv 2410.04332, appendix F), with one hidden layer an expert and no layer
after the mixture, so that experts share no parameter:

    logits = W_out [Γ(s) h_Diamond(s); (1 - Γ(s)) h_Ghost(s)],  h = ReLU(W_in s + b_in)

An expert is rows of W_in and b_in, and columns of W_out. Steps of an episode that is known to have ended on Diamond
teach the Diamond expert alone, those of one that ended on Ghost the Ghost expert alone, and neither teaches the gate by
its actions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradroute import LinearSites, RoutedLinear, Routes, Table, route_grad
from gradroute.blocks import Block
from gradroute.tables import localize

from .environment import DIAMOND, GHOST, MOVES, OBSERVATION_SPACE

INPUTS = math.prod(OBSERVATION_SPACE.shape)
ACTIONS = len(MOVES)
# Units of an expert, and of every other MLP; the paper's have 256. With experts of 128 the naive policy turns to Ghost
# after fewer episodes, and the Diamond expert alone reaches less: true returns of 0.07 and 0.31 at 2 % oversight, after
# 500 batches of one seed.
HIDDEN = 64
# Routes of steps: 0, it is not known which square the episode ended on; DIAMOND; GHOST.
NUM_ROUTES = 3
# The policy's gradient reaches the gate in steps of route 0 only.
GATE_TABLE = Table([[1.0], [0.0], [0.0]])


def mlp(outputs: int, hidden: int = HIDDEN, bias: bool = True) -> nn.Sequential:
    """A network [S, INPUTS] → [S, outputs]; `bias` says whether its last layer has one."""
    return nn.Sequential(nn.Linear(INPUTS, hidden), nn.ReLU(), nn.Linear(hidden, outputs, bias=bias))


def expert_units(kind: int, hidden: int) -> slice:
    """The hidden units of the expert DIAMOND or GHOST."""
    return slice((kind - 1) * hidden, kind * hidden)


class Experts(nn.Module):
    """A Diamond expert and a Ghost expert, mixed by a gate.

    Args:
        hidden: units of an expert, and of the gate.
        gated: whether the gate is learned; else it is 1/2 everywhere.
    """

    def __init__(self, hidden: int = HIDDEN, gated: bool = True) -> None:
        super().__init__()
        self.hidden = hidden
        units = {kind: expert_units(kind, hidden) for kind in (DIAMOND, GHOST)}
        table = localize(NUM_ROUTES, 2 * hidden, units)
        self.inner = nn.Linear(INPUTS, 2 * hidden)
        # The mask sits where the gradient leaves for the hidden units, and so confines rows of `inner` too.
        sites = LinearSites(input=table, update_cols=table)
        self.outer = RoutedLinear(2 * hidden, ACTIONS, bias=False, sites=sites)
        self.gate = mlp(1, hidden) if gated else None

    def gate_logits(self, x: Tensor) -> Tensor:
        """[S, INPUTS] → [S, 1]; the sigmoid is the share Γ of the Diamond expert."""
        return x.new_zeros(len(x), 1) if self.gate is None else self.gate(x)

    def forward(self, x: Tensor, routes: Routes | None = None, gate_logits: Tensor | None = None) -> Tensor:
        """[S, INPUTS] → [S, ACTIONS]; gate_logits [S, 1], where they are known already."""
        if gate_logits is None:
            gate_logits = self.gate_logits(x)
        share = route_grad(gate_logits.sigmoid(), routes, GATE_TABLE)  # [S, 1]
        hidden = self.inner(x).relu().view(len(x), 2, self.hidden)
        mixed = hidden * torch.stack((share, 1 - share), 1)  # [S, 2, hidden]
        return self.outer(mixed.flatten(1), routes)

    def block(self, kind: int) -> Block:
        """The parameters of the expert DIAMOND or GHOST."""
        units = expert_units(kind, self.hidden)
        pieces = {"inner.weight": (0, units), "inner.bias": (0, units), "outer.weight": (1, units)}
        return Block.of(self, pieces)

    def expert(self, kind: int) -> nn.Sequential:
        """A copy of one expert as the whole policy, without routes: the gate set to it, the other ablated."""
        alone = mlp(ACTIONS, self.hidden, bias=False)
        with torch.no_grad():
            for parameter, values in zip(alone.parameters(), self.block(kind).tensors(self), strict=True):
                parameter.copy_(values)
        return alone
