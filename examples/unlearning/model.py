"""A small Llama-style decoder built of gradroute layers, and the routing of SGTM (arXiv 2512.05648) on it.

A forget token trains the last block of MLP units and what is joint (embedding, norms), nothing else.
A retain token trains everything but that block, which its forward pass does not see.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradroute import (
    LinearSites,
    MLPSites,
    RoutedEmbedding,
    RoutedGatedMLP,
    RoutedLinear,
    RoutedRMSNorm,
    Routes,
    Table,
    tables,
)

from .corpus import FORGET, RETAIN, ROUTE_NAMES, Batch

NUM_ROUTES = len(ROUTE_NAMES)


@dataclass(frozen=True)
class Shape:
    vocabulary: int = 1024
    d_model: int = 128
    layers: int = 3
    heads: int = 4
    d_ff: int = 512
    forget_units: int = 64

    @property
    def forget_block(self) -> slice:
        return slice(self.d_ff - self.forget_units, self.d_ff)


def retain_only() -> LinearSites:
    """Forget tokens leave every row of the weight alone, while their gradient still flows on to the embedding."""
    return LinearSites(update_rows=Table([[1.0], [0.0]]))  # [R, 1]


def block_sites(shape: Shape) -> MLPSites:
    """A unit that is zeroed in the forward pass takes no update either: `update` need not name the retain route."""
    block = shape.forget_block
    return MLPSites(
        forward=tables.localize(NUM_ROUTES, shape.d_ff, {RETAIN: block}, on=0.0, off=1.0),
        update=tables.localize(NUM_ROUTES, shape.d_ff, {FORGET: block}),
    )


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.qkv_proj = RoutedLinear(shape.d_model, 3 * shape.d_model, bias=False, sites=retain_only())
        self.o_proj = RoutedLinear(shape.d_model, shape.d_model, bias=False, sites=retain_only())

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor, routes: Routes | None) -> Tensor:
        """x [B, S, D], rotation [2, S, D / H], mask [B, 1, S, S] -> [B, S, D]"""
        batch, length, width = x.shape
        qkv = self.qkv_proj(x, routes).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, S, D / H]
        z = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v, attn_mask=mask)
        return self.o_proj(z.transpose(1, 2).reshape(batch, length, width), routes)


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attention_norm = RoutedRMSNorm(shape.d_model)
        self.attention = Attention(shape)
        self.mlp_norm = RoutedRMSNorm(shape.d_model)
        self.mlp = RoutedGatedMLP(shape.d_model, shape.d_ff, sites=block_sites(shape))

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor, routes: Routes | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x, routes), rotation, mask, routes)
        return x + self.mlp(self.mlp_norm(x, routes), routes)


class Decoder(nn.Module):
    """Without routes it is the ordinary model: the control, and what one would deploy."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embedding = RoutedEmbedding(shape.vocabulary, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RoutedRMSNorm(shape.d_model)
        self.head = RoutedLinear(shape.d_model, shape.vocabulary, bias=False, sites=retain_only())
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * shape.layers) ** 0.5 if last else 0.02)

    def forward(self, batch: Batch, routes: Routes | None = None) -> Tensor:
        """-> logits [B, S, V]"""
        length = batch.tokens.shape[1]
        rotation = rotary_angles(length, self.shape.d_model // self.shape.heads, batch.tokens.device)
        mask = within_documents(batch.document_ids)
        x = self.embedding(batch.tokens, routes)  # [B, S, D]
        for block in self.blocks:
            x = block(x, rotation, mask, routes)
        return self.head(self.norm(x, routes), routes)

    def loss(self, batch: Batch, routes: Routes | None = None) -> Tensor:
        return F.cross_entropy(self(batch, routes).flatten(0, 1), batch.targets.flatten())

    @torch.no_grad()
    def ablate(self) -> None:
        """Zeroes the forget block, and so its gradients: fine-tuning the model as a whole does not bring it back."""
        units = self.shape.forget_block
        for block in self.blocks:
            block.mlp.gate_proj.weight[units] = 0
            block.mlp.up_proj.weight[units] = 0
            block.mlp.down_proj.weight[:, units] = 0


def within_documents(document_ids: Tensor) -> Tensor:
    """[B, S] -> [B, 1, S, S], causal. It also keeps a forget token's loss from reaching another document's positions,
    where it would be masked as theirs."""
    same = document_ids[:, :, None] == document_ids[:, None, :]  # [B, S, S]
    return same.tril()[:, None]


def rotary_angles(length: int, head_width: int, device: torch.device) -> Tensor:
    """cos and sin, [2, S, head_width]"""
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device) / head_width)
    angles = torch.outer(torch.arange(length, device=device), frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, H, S, D / H]"""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
