"""Backend `torch`: the primitives composed of PyTorch operations. It runs on any device and needs no build.

`gradroute.primitives.protocol` says what each of them computes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..primitives import shared
from ..primitives.arguments import ActivationMasks, NormArguments, product_dtype
from ..primitives.attention_kernels import AttentionKernels
from ..primitives.attention_pattern import Pattern
from ..primitives.overwriting import may_overwrite, times
from ..primitives.protocol import AttentionTables
from ..routes import Routes
from ..tables import Table
from . import attention
from . import composed as primitives  # this module, as shared algorithms take it
from .optim import adamw_step as adamw_step
from .optim import touched_blocks as touched_blocks


def mask(weights: Tensor, routes: Routes, dtype: torch.dtype) -> Tensor:
    """m for the columns `weights [R, F]`: `[T, F]` in `dtype`, interpolated from row 0 by the strength."""
    weights = weights.to(dtype)
    m = weights[routes.ids.long()]  # [T, F]
    strength = routes.strength
    if strength is None:
        return m
    if strength.dim() > 0:
        strength = strength.unsqueeze(-1)
    return torch.lerp(weights[0], m, strength.to(dtype))


def pieces(g: Tensor, routes: Routes, table: Table) -> Iterator[tuple[slice, Tensor]]:
    """The masked features of `g [T, F]` with their masks: `[T, 1]` a constant segment, `[T, F]` if dense."""
    weights, dtype = table.on(g.device), product_dtype(g.dtype)
    if table.kind == "dense":
        yield slice(None), mask(weights, routes, dtype)
        return
    for start, stop in table.segments:
        features = slice(None) if table.features == 1 else slice(start, stop)
        yield features, mask(weights[:, start : start + 1], routes, dtype)


def masked_product(g: Tensor, routes: Routes, table: Table | None, *, overwrite: bool = False) -> Tensor:
    if table is None:
        return g
    if not may_overwrite(g):
        return _put_together(g, routes, table)
    out = g if overwrite else g.clone(memory_format=torch.contiguous_format)
    _multiply_(out, routes, table)
    return out


def _is_binary(routes: Routes, table: Table) -> bool:
    """Whether no weight is anything but 0 and 1."""
    return table.binary and routes.strength is None


def _has_zeros(routes: Routes, table: Table) -> bool:
    """Whether some weight may be 0."""
    return table.density < 1 or routes.strength is not None


def _put_together(g: Tensor, routes: Routes, table: Table) -> Tensor:
    """m ⊙ g for g [T, F], of its masked features and those between them; nothing is written to."""
    is_binary, has_zeros = _is_binary(routes, table), _has_zeros(routes, table)
    parts, done = [], 0
    for features, m in pieces(g, routes, table):
        part = g[:, features]
        if not is_binary:
            part = (part * m).to(g.dtype)  # formed in m's dtype and rounded once
        if has_zeros:
            part = part.masked_fill(m == 0, 0)  # whatever g is there
        if features == slice(None):
            return part.contiguous()
        parts += [g[:, done : features.start], part]
        done = features.stop
    return torch.cat([*parts, g[:, done:]], 1)


def _multiply_(g: Tensor, routes: Routes, table: Table) -> None:
    """m ⊙ g in place, for g [T, F]."""
    is_binary, has_zeros = _is_binary(routes, table), _has_zeros(routes, table)
    for features, m in pieces(g, routes, table):
        part = g[:, features]
        if m.shape[1] == 1 and g.device.type == "cpu":
            _multiply_rows_(part, m, is_binary)
            continue
        if not is_binary:
            part.mul_(m)  # formed in m's dtype and rounded once, by type promotion
        if has_zeros:
            part.masked_fill_(m == 0, 0)  # whatever g is there


def _multiply_rows_(part: Tensor, m: Tensor, is_binary: bool) -> None:
    """part [T, F] times m [T, 1] in place, on the rows that change and no others.

    Eager PyTorch's masked_fill_ is not vectorised on the CPU: over all rows it takes as long as the activation's
    backward. Elsewhere the number of rows would have to be waited for.
    """
    rows = (m[:, 0] != 1).nonzero()[:, 0]
    if is_binary:
        part.index_fill_(0, rows, 0)
        return
    changed, m = part[rows].mul_(m[rows]), m[rows, 0]
    part[rows] = changed.index_fill_(0, (m == 0).nonzero()[:, 0], 0)


def input_grad(g: Tensor, weight: Tensor, routes: Routes, table: Table | None) -> Tensor:
    return shared.input_grad(g, weight, routes, table, masked_product)


def weight_grad(g: Tensor, x: Tensor, routes: Routes, rows: Table | None, cols: Table | None) -> Tensor:
    return shared.weight_grad(g, x, routes, rows, cols, masked_product)


def bias_grad(g: Tensor, routes: Routes, table: Table | None) -> Tensor:
    return masked_product(g, routes, table).sum(0)


def _masked(g: Tensor, routes: Routes, *groups: tuple[Table, ...]) -> Tensor:
    """The product of masks times g, in place where it may be: they commute with the derivative, which has made g."""
    for tables in groups:
        for table in tables:
            g = masked_product(g, routes, table, overwrite=True)
    return g


def _updates(g: Tensor, routes: Routes, tables: tuple[Table, ...]) -> Tensor:
    """The sum over tokens of the product of masks times g."""
    for table in tables:
        g = masked_product(g, routes, table)
    return g.sum(0)


def activation_forward(
    a: Tensor, up: Tensor | None, routes: Routes, table: Table | None, activation: str
) -> Tensor:
    return shared.activation_forward(a, up, routes, table, activation, masked_product)


def activation_backward(
    dz: Tensor | None,
    a: Tensor,
    routes: Routes,
    masks: ActivationMasks,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    act = ACTIVATIONS[activation]
    z = db = None
    if want_z:
        z = _masked(act.value(a), routes, masks.z)
    if dz is None:
        return None, z, None
    da = _masked(act.backward(dz, a), routes, masks.dh, masks.da)
    if want_bias:
        db = _updates(da, routes, masks.update)
    return da, z, db


def glu_backward(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    routes: Routes,
    masks: ActivationMasks,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    act = ACTIVATIONS[activation]
    value = act.value(gate)
    z = db_gate = db_up = None
    if want_z:
        z = _masked(value * up, routes, masks.z)
    if dz is None:
        return None, None, z, None, None
    dgate, dup = (
        _masked(branch, routes, masks.dh, masks.da) for branch in (act.backward(dz * up, gate), dz * value)
    )
    if want_bias:
        db_gate, db_up = (_updates(branch, routes, masks.update) for branch in (dgate, dup))
    return dgate, dup, z, db_gate, db_up


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    routes: Routes,
    update: Table | None,
    norm: NormArguments,
    *,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dtype = product_dtype(x.dtype)
    g, x_wide = dy.to(dtype), x.to(dtype)
    if norm.centered:
        x_wide = x_wide - x_wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + norm.eps)
    x_hat = x_wide * rstd
    dx = dweight = None
    if weight is not None:
        dx_hat = g * (weight.to(dtype) + norm.offset)
        if norm.centered:
            dx_hat = dx_hat - dx_hat.mean(-1, keepdim=True)
        dx = _norm_input_grad(dx_hat, x_hat, rstd).to(x.dtype)
    if want_weight:
        x_seen = x_hat.to(x.dtype).to(dtype) if norm.round_x_hat else x_hat
        dweight = bias_grad(g * x_seen, routes, update)
    dbias = bias_grad(g, routes, update) if want_bias else None
    return dx, dweight, dbias


def _norm_input_grad(dx_hat: Tensor, x_hat: Tensor, rstd: Tensor) -> Tensor:
    """dx̂ through the division by the root mean square."""
    return rstd * (dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True))


def embedding_backward(
    dy: Tensor,
    tokens: Tensor,
    routes: Routes,
    update: Table | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> Tensor:
    g = masked_product(dy.to(product_dtype(dy.dtype)), routes, update)
    padding = -1 if padding_idx is None else padding_idx
    return torch.ops.aten.embedding_dense_backward(g, tokens, num_embeddings, padding, False).to(dy.dtype)


def masked_heads(x: Tensor, routes: Routes | None, table: Table | None, *, overwrite: bool = False) -> Tensor:
    if table is None:
        return x
    assert routes is not None
    batch, _, length, _ = x.shape
    m = mask(table.on(x.device), routes, product_dtype(x.dtype)).view(batch, length, table.features, 1)
    m = m.transpose(1, 2)  # [B, H or 1, S, 1]
    if not _is_binary(routes, table):
        # formed in m's dtype and rounded once
        x, overwrite = times(x, m) if overwrite else (x * m).to(x.dtype), True
    # 0 whatever x is there
    return x.masked_fill_(m == 0, 0) if overwrite and may_overwrite(x) else x.masked_fill(m == 0, 0)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: AttentionTables,
    pattern: Pattern,
    kernels: AttentionKernels,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return attention.forward(q, k, v, routes, sites, pattern, kernels, primitives)


def attention_output_grad(
    dz: Tensor, o: Tensor, routes: Routes | None, sites: AttentionTables, *, want_delta: bool
) -> tuple[Tensor, Tensor | None]:
    """Leaves delta to who needs it."""
    if sites.forward_heads is None:
        return masked_heads(dz, routes, sites.heads), None
    d_o = masked_heads(dz, routes, sites.forward_heads)
    return masked_heads(d_o, routes, sites.heads, overwrite=True), None


def attention_backward(
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    saved: tuple[Tensor, ...],
    routes: Routes | None,
    sites: AttentionTables,
    pattern: Pattern,
    kernels: AttentionKernels,
    *,
    want_query: bool,
    want_key_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return attention.backward(
        dz,
        q,
        k,
        v,
        z,
        saved,
        routes,
        sites,
        pattern,
        kernels,
        primitives,
        want_query=want_query,
        want_key_value=want_key_value,
    )
