"""The gradients that routing a model must give: hooks on the plain model, and formulas by hand.

Nothing here asks gradroute what a site means: that is written out again.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from model_zoo import HEADS, HIDDEN, LAYOUTS, plain, run
from nano_gpt import NanoAttention
from torch import nn
from torch.nn import functional as F
from transformers import masking_utils


def mask(table, ids, strength=None):  # [B, S, F]
    """m[t, f] = W[r_t, f], with a strength lerp(W[0, f], W[r_t, f], s_t)."""
    if table is None:
        return None
    m = table.weights[ids.long()]
    if strength is None:
        return m
    strength = torch.as_tensor(strength, dtype=m.dtype)
    strength = strength[..., None] if strength.dim() else strength
    return torch.lerp(table.weights[0].expand_as(m), m, strength)


def detach(x, m):
    """The idiom: the forward is x, the gradient m times that of x."""
    return x if m is None else m * x + (1 - m) * x.detach()


def _times(m, x):
    return x if m is None else m * x


def hand_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Eager attention of transformers, with the detach idiom on q, k, v, scores and values where `module.hand` says."""
    assert dropout == 0
    hand = getattr(module, "hand", {})
    query, key, value = (
        detach(x, None if hand.get(name) is None else hand[name].transpose(1, 2)[..., None])
        for name, x in (("query", query), ("key", key), ("value", value))
    )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if hand.get("score_edges") is not None:
        scores = detach(scores, hand["score_edges"][:, None])
    if attention_mask is not None:
        scores = scores + attention_mask
    p = scores.softmax(-1)
    if hand.get("value_edges") is None:
        return (p @ value).transpose(1, 2), None
    # P learns from all values, and values from the queries whose edge says so.
    taught = (hand["value_edges"][:, None] * p).detach() @ (value - value.detach())
    return (p @ value.detach() + taught).transpose(1, 2), None


def _hand_neo_attention(module, query, key, value, attention_mask=None):
    """GPT-Neo's own: no scale, and its causal mask and window stand in a buffer."""
    tokens = query.shape[2]
    visible = module.bias[:, :, :tokens, :tokens]
    banned = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
    if attention_mask is not None:
        banned = torch.minimum(banned, attention_mask)
    z, p = hand_attention(module, query, key, value, banned, scaling=1.0)
    return z.transpose(1, 2), p


transformers.AttentionInterface.register("by_hand", hand_attention)
transformers.AttentionMaskInterface.register("by_hand", masking_utils.eager_mask)


def _sites_of(entry: Any, index: int) -> dict[str, Any]:
    """A plan's tables for one layer."""
    if isinstance(entry, dict):
        entry = entry.get(index)
    assert not inspect.isfunction(entry), "plans by hand give sites, not functions"
    return {} if entry is None else entry.tables


def linear_matrix(linear, gradient):
    """A gradient [O, I] as the layer stores its weight."""
    return gradient.t() if type(linear).__name__ == "Conv1D" else gradient


def _twice(m):  # [B, S, 2 * HIDDEN]
    """A mask for the outputs of a linear layer that makes gate and up."""
    return m.expand(*m.shape[:-1], HIDDEN).repeat(1, 1, 2)


def _no_tables(*tables: Any) -> bool:
    return all(table is None for table in tables)


class ByHand:
    """A plain model with hooks: activations masked by the detach idiom, and inputs and gradients of all parts kept."""

    def __init__(self, model: nn.Module, name: str, plan: Any, ids, strength=None) -> None:
        self.model, self.layout, self.plan = model, LAYOUTS[name], plan
        self.ids, self.strength = ids, strength
        self.sums: dict[nn.Parameter, Any] = {}
        self.kept: list[Callable[[], None]] = []
        layout = self.layout
        layers = model.get_submodule(layout.layers)
        for i, layer in enumerate(layers):
            self._layer(layer, i)
        attention = [_sites_of(plan.attention, i) for i in range(len(layers))]
        if any(not site.startswith("update") for sites in attention for site in sites):
            self._attend_by_hand(layers, attention)
        if "final_norm" not in layout.lacks:
            self._norm(model.get_submodule(layout.final_norm), _sites_of(plan.final_norm, 0).get("update"))
        update = _sites_of(plan.embedding, 0).get("update")
        self._embedding(model.get_submodule(layout.embedding), update)
        if layout.positions is not None:
            self._embedding(model.get_submodule(layout.positions), update)
        head = _sites_of(plan.lm_head, 0)
        self._linear(
            model.get_submodule("lm_head"),
            rows=self._mask(head.get("update_rows")),
            cols=self._mask(head.get("update_cols")),
            input_mask=self._mask(head.get("input")),
            output_mask=self._mask(head.get("output")),
        )

    def gradients(self, tokens, targets, **inputs) -> dict[str, Any]:
        """The gradient that routing must give for every parameter."""
        self.model.zero_grad()
        run(self.model, tokens, targets, **inputs).backward()
        return self.collected()

    def collected(self) -> dict[str, Any]:
        """The same, after a backward."""
        for keep in self.kept:
            keep()
        # What no entry of a plan is for, such as the norms of single heads, has autograd's own.
        named = self.model.named_parameters()
        return {name: self.sums.get(parameter, parameter.grad) for name, parameter in named}

    def _mask(self, table):
        return mask(table, self.ids, self.strength)

    def _by_feature(self, table):
        """The mask of a table by head, for the features of the heads."""
        m = self._mask(table)
        if m is None or m.shape[-1] == 1:
            return m
        return m.repeat_interleave(self.layout.head_dim, dim=-1)

    def _add(self, parameter: Any, gradient) -> None:
        if parameter is not None:
            before = self.sums.get(parameter, torch.zeros_like(parameter))
            self.sums[parameter] = before + gradient.reshape(parameter.shape)

    def _watch(self, module, input_mask=None, forward=None, output_mask=None, gradients=None) -> None:
        """Masks a module's input and output; `gradients(input, output's gradient)` is called after the backward."""
        kept: dict[str, Any] = {}

        def before(module, args):
            x = _times(forward, detach(args[0], input_mask))
            kept["x"] = x.detach()
            return (x, *args[1:])

        def after(module, args, y):
            y.register_hook(lambda gradient: kept.__setitem__("gradient", gradient))
            return detach(y, output_mask)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        self.kept.append(lambda: gradients(kept["x"], kept["gradient"]))

    def _linear(self, linear, rows=None, cols=None, bias=None, **masks) -> None:
        def gradients(x, g):
            weight = torch.einsum("bso,bsi->oi", _times(rows, g), _times(cols, x))
            self._add(linear.weight, linear_matrix(linear, weight))
            self._add(linear.bias, _times(rows if bias is None else bias, g).sum((0, 1)))

        self._watch(linear, gradients=gradients, **masks)

    def _norm(self, norm, table, heads: int | None = None) -> None:
        m = self._mask(table)
        if m is not None and heads is not None:
            m = m.unsqueeze(heads)

        def gradients(x, g):
            eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 1e-5)
            if "RMSNorm" in type(norm).__name__:
                normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            else:
                normed = F.layer_norm(x, x.shape[-1:], eps=eps)
            g = _times(m, g)
            self._add(norm.weight, (g * normed).flatten(0, -2).sum(0))
            self._add(getattr(norm, "bias", None), g.flatten(0, -2).sum(0))

        self._watch(norm, gradients=gradients)

    def _embedding(self, embedding, table) -> None:
        m = self._mask(table)
        kept: dict[str, Any] = {}

        def before(module, args):  # positions are one row, whose tokens take different routes
            kept["tokens"] = args[0].expand(self.ids.shape)
            return (kept["tokens"],)

        def after(module, args, y):
            y.register_hook(lambda gradient: kept.__setitem__("gradient", gradient))

        def keep():
            g = _times(m, kept["gradient"]) * getattr(embedding, "embed_scale", 1.0)
            gradient = torch.zeros_like(embedding.weight)
            gradient.index_add_(0, kept["tokens"].flatten(), g.flatten(0, 1))
            if embedding.padding_idx is not None:
                gradient[embedding.padding_idx] = 0
            self._add(embedding.weight, gradient)

        embedding.register_forward_pre_hook(before)
        embedding.register_forward_hook(after)
        self.kept.append(keep)

    def _layer(self, layer, i: int) -> None:
        layout, plan = self.layout, self.plan
        self._residual(layer, _sites_of(plan.residual, i))
        self._mlp(layer, _sites_of(plan.mlp, i))
        self._projections(layer.get_submodule(layout.attention), _sites_of(plan.attention, i))
        for name in () if "norm" in layout.lacks else layout.norms:
            self._norm(layer.get_submodule(name), _sites_of(plan.norm, i).get("update"))
        if layout.qk_norm_heads is not None:
            self._qk_norms(layer, i, layout.qk_norm_heads)
        elif layout.has_wide_qk_norm:
            self._qk_norms(layer, i, None)

    def _qk_norms(self, layer, i: int, heads: int | None) -> None:
        for name in ("q_norm", "k_norm"):
            norm = layer.get_submodule(self.layout.attention).get_submodule(name)
            self._norm(norm, _sites_of(self.plan.qk_norm, i).get("update"), heads)

    def _residual(self, layer, sites) -> None:
        pre, mid, post = (self._mask(sites.get(name)) for name in ("pre", "mid", "post"))

        def before(module, args):
            return (detach(args[0], pre), *args[1:])

        def after(module, args, y):
            if isinstance(y, tuple):
                return (detach(y[0], post), *y[1:])
            return detach(y, post)

        def between(module, args):
            # Both ways on, through the norm and along the stream, pass the point: the tensor's whole gradient.
            args[0].register_hook(lambda gradient: mid * gradient)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
        if mid is not None:
            layer.get_submodule(self.layout.mid).register_forward_pre_hook(between)

    def _mlp(self, layer, sites) -> None:
        update_in, update_out = (
            self._mask(sites.get(name, sites.get("update"))) for name in ("update_in", "update_out")
        )
        pre = self._mask(sites.get("pre"))
        if self.layout.fused_gate:
            pre, update_in = (None if m is None else _twice(m) for m in (pre, update_in))
        for name in self.layout.inner:
            self._linear(layer.get_submodule(name), rows=update_in, output_mask=pre)
        self._linear(
            layer.get_submodule(self.layout.outer),
            cols=update_out,
            bias=self._mask(sites.get("update_output_bias")),
            input_mask=self._mask(sites.get("hidden")),
            forward=self._mask(sites.get("forward")),
            output_mask=self._mask(sites.get("output")),
        )

    def _projections(self, attention, sites) -> None:
        layout = self.layout
        q, kv, out = (
            sites.get(name, sites.get("update")) for name in ("update_q", "update_kv", "update_out")
        )
        for name, rows in zip(layout.qkv, self._rows(q, kv, kv), strict=True):
            self._linear(attention.get_submodule(name), rows=rows)
        self._linear(
            attention.get_submodule(layout.output),
            cols=self._by_feature(out),
            bias=self._mask(sites.get("update_output_bias")),
            input_mask=self._by_feature(sites.get("heads")),
            forward=self._by_feature(sites.get("forward_heads")),
        )

    def _rows(self, q, k, v) -> list[Any]:
        """Masks of the outputs of the linear layers that make q, k and v."""
        layout = self.layout
        if layout.qkv_layout == "separate":
            return [self._by_feature(table) for table in (q, k, v)]
        if _no_tables(q, k, v):
            return [None]
        widths = (HEADS * layout.head_dim, *[layout.kv_heads * layout.head_dim] * 2)
        parts = [
            torch.ones(*self.ids.shape, width)
            if table is None
            else self._by_feature(table).expand(*self.ids.shape, width)
            for table, width in zip((q, k, v), widths, strict=True)
        ]
        if layout.qkv_layout == "fused":
            return [torch.cat(parts, -1)]
        return [torch.stack([part.unflatten(-1, (HEADS, -1)) for part in parts], -2).flatten(2)]

    def _attend_by_hand(self, layers, attention) -> None:
        for layer, sites in zip(layers, attention, strict=True):
            module = layer.get_submodule(self.layout.attention)
            if isinstance(module, NanoAttention):
                self._mask_nano(module, sites)
                continue
            module.hand = {name: self._mask(sites.get(name)) for name in ("query", "key", "value")}
            for name in ("score_edges", "value_edges"):
                if name in sites:  # [B, query, key]
                    ids = self.ids.long()
                    module.hand[name] = sites[name].weights[ids[:, :, None], ids[:, None, :]]
            if hasattr(module, "_attn"):  # GPT-Neo asks no registry
                module._attn = functools.partial(_hand_neo_attention, module)
            else:
                self.model.set_attn_implementation("by_hand")

    def _mask_nano(self, module, sites) -> None:
        """Without rotation, what makes q, k and v is the place to mask them."""
        assert not {"score_edges", "value_edges"} & set(sites)
        (m,) = self._rows(sites.get("query"), sites.get("key"), sites.get("value"))
        module.c_attn.register_forward_hook(lambda _, args, y: detach(y, m))


def by_hand(name: str, plan, ids, tokens, targets, strength=None, model=None, **inputs) -> dict[str, Any]:
    """The gradients that routing must give, of all parameters of a copy of the plain model."""
    model = copy.deepcopy(plain(name) if model is None else model)
    return ByHand(model, name, plan, ids, strength).gradients(tokens, targets, **inputs)
