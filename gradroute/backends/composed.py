"""Backend `torch`: the leaf computations of the autograd.Functions, composed of PyTorch operations.

Any device, no build. Each function has the name and the signature of its counterpart in gradroute.kernels.
`None` in place of a table means no mask. Gradients are flat: `[T, F]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..primitives.arguments import AdamWOptions, product_dtype, wanted
from ..primitives.attention_pattern import Pattern
from ..routes import Routes
from ..tables import Table
from . import tiled as attention_blocks
from .vendor import VENDORS

# A masked copy of an operand is made for this share of the tokens at a time.
WORKSPACE_SHARE = 8
MIN_CHUNK = 1024


def mask(weights: Tensor, routes: Routes, dtype: torch.dtype, tokens: slice = slice(None)) -> Tensor:
    """m for the columns `weights [R, F]`: `[T, F]` in `dtype`, interpolated from row 0 by the strength."""
    weights = weights.to(dtype)
    m = weights[routes.ids[tokens].long()]  # [T, F]
    strength = routes.strength
    if strength is None:
        return m
    if strength.dim() > 0:
        strength = strength[tokens].unsqueeze(-1)
    return torch.lerp(weights[0], m, strength.to(dtype))


def pieces(
    g: Tensor, routes: Routes, table: Table, tokens: slice = slice(None)
) -> Iterator[tuple[slice, Tensor]]:
    """The masked features of `g [T, F]` with their masks: `[T, 1]` a constant segment, `[T, F]` if dense."""
    weights, dtype = table.on(g.device), product_dtype(g.dtype)
    if table.kind == "dense":
        yield slice(None), mask(weights, routes, dtype, tokens)
        return
    for start, stop in table.segments:
        features = slice(None) if table.features == 1 else slice(start, stop)
        yield features, mask(weights[:, start : start + 1], routes, dtype, tokens)


def masked_product(g: Tensor, routes: Routes, table: Table | None, tokens: slice = slice(None)) -> Tensor:
    """m ⊙ g in a new tensor; `g` itself without a table."""
    if table is None:
        return g
    out = g.clone(memory_format=torch.contiguous_format)
    masked_product_(out, routes, table, tokens)
    return out


def masked_product_(g: Tensor, routes: Routes, table: Table | None, tokens: slice = slice(None)) -> None:
    """m ⊙ g in place, on a gradient that the caller allocated."""
    if table is None:
        return
    is_binary = table.binary and routes.strength is None
    has_zeros = table.density < 1 or routes.strength is not None
    for features, m in pieces(g, routes, table, tokens):
        part = g[:, features]
        if m.shape[1] == 1 and g.device.type == "cpu" and not torch.compiler.is_compiling():
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


def input_grad(
    g: Tensor,
    weight: Tensor,
    routes: Routes,
    table: Table | None,
    product_: Callable[..., None] = masked_product_,
) -> Tensor:
    """m ⊙ (g W): g `[T, O]`, weight `[O, I]` → `[T, I]`. `product_`: the masked product in place."""
    dx = g @ weight
    product_(dx, routes, table)
    return dx


def weight_grad(
    g: Tensor,
    x: Tensor,
    routes: Routes,
    rows: Table | None,
    cols: Table | None,
    product: Callable[..., Tensor] = masked_product,
) -> Tensor:
    """(m_rows ⊙ g)ᵀ (m_cols ⊙ x): g `[T, O]`, x `[T, I]` → `[O, I]`. `product`: the masked product of some tokens.

    Masked copies are made of a share of the tokens at a time, never of a whole operand.
    """
    if rows is None and cols is None:
        return g.T @ x
    wide = product_dtype(g.dtype)
    total = torch.zeros(g.shape[1], x.shape[1], dtype=wide, device=g.device)
    chunk = max(MIN_CHUNK, -(-g.shape[0] // WORKSPACE_SHARE))
    for start in range(0, g.shape[0], chunk):
        tokens = slice(start, start + chunk)
        masked_g = product(g[tokens], routes, rows, tokens)
        masked_x = product(x[tokens], routes, cols, tokens)
        if (
            g.device.type == "cpu"
        ):  # rounded to half precision, a chunk's product could overflow before the sum
            masked_g, masked_x = masked_g.to(wide), masked_x.to(wide)
        total += masked_g.T @ masked_x
    return total.to(g.dtype)


def bias_grad(g: Tensor, routes: Routes, table: Table | None) -> Tensor:
    """Σ_t m ⊙ g: g `[T, O]` → `[O]`."""
    return masked_product(g, routes, table).sum(0)


def _mask_middle(da: Tensor, routes: Routes, sites: Any) -> None:
    """m_pre ⊙ m_hidden ⊙ m_forward ⊙ da in place: masks commute with the derivative, so dz need not be copied."""
    for table in (sites.forward, sites.hidden, sites.pre):
        masked_product_(da, routes, table)


def _mask_output(z: Tensor, routes: Routes, sites: Any) -> None:
    """m_update_out ⊙ m_forward ⊙ z in place."""
    for table in (sites.forward, sites.update_out):
        masked_product_(z, routes, table)


def activation_backward(
    dz: Tensor | None,
    a: Tensor,
    routes: Routes,
    sites: Any,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradient of z = m_forward ⊙ act(a), and what the weights beside it need.

    Args:
        dz: `[T, F]`, or None where only z is wanted.
        a: `[T, F]`.
        routes: the batch's routes.
        sites: effective sites with `pre`, `hidden`, `forward`; for z also `update_out`, for the bias `update_in`.
        activation: its name.
        want_z: recompute m_update_out ⊙ z.
        want_bias: sum the bias gradient.
        overwrite: the matrices are the caller's own, and the C++ kernels leave their results there. New ones cost page
            faults: with them a gated MLP's backward took 0.94 times the ordinary one's instead of 0.82 (1024 tokens,
            128 × 512, fp32, 2 cores). Only for backends whose products are made in parts.

    Returns:
        da `[T, F]`; m_update_out ⊙ z `[T, F]`; Σ_t m_update_in ⊙ da `[F]`; None for what is not wanted.
    """
    act = ACTIVATIONS[activation]
    z = db = None
    if want_z:
        z = act.value(a)
        _mask_output(z, routes, sites)
    if dz is None:
        return None, z, None
    da = act.backward(dz, a)
    _mask_middle(da, routes, sites)
    if want_bias:
        db = bias_grad(da, routes, sites.update_in)
    return da, z, db


def glu_backward(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    routes: Routes,
    sites: Any,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of z = m_forward ⊙ (act(gate) * up), and what the weights beside it need.

    Arguments as for `activation_backward`, with gate and up `[T, F]`.

    Returns:
        dgate, dup `[T, F]`; m_update_out ⊙ z `[T, F]`; Σ_t m_update_in ⊙ dgate and Σ_t m_update_in ⊙ dup `[F]`; None
        for what is not wanted.
    """
    act = ACTIVATIONS[activation]
    value = act.value(gate)
    z = db_gate = db_up = None
    if want_z:
        z = value * up
        _mask_output(z, routes, sites)
    if dz is None:
        return None, None, z, None, None
    dgate, dup = act.backward(dz * up, gate), dz * value
    for branch in (dgate, dup):
        _mask_middle(branch, routes, sites)
    if want_bias:
        db_gate, db_up = (bias_grad(branch, routes, sites.update_in) for branch in (dgate, dup))
    return dgate, dup, z, db_gate, db_up


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    routes: Routes,
    update: Table | None,
    eps: float,
    offset: float,
    casting_mode: str,
    *,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of an RMS norm, the weight's masked; x̂ is computed again.

    Args:
        dy: `[T, D]`.
        x: `[T, D]`.
        weight: `[D]`, or None where dx is not wanted.
        routes: the batch's routes.
        update: m_update.
        eps: added to the mean square.
        offset: added to the weight.
        casting_mode: "llama": the weight met x̂ rounded to x's dtype.
        want_weight: compute dW.

    Returns:
        dx `[T, D]` in x's dtype; dW `[D]` in fp32 (fp64 for fp64); None for what is not wanted.
    """
    dtype = product_dtype(x.dtype)
    x_wide, g = x.to(dtype), dy.to(dtype)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    x_hat = x_wide * rstd
    dx = dweight = None
    if weight is not None:
        dx = _norm_input_grad(g * (weight.to(dtype) + offset), x_hat, rstd).to(x.dtype)
    if want_weight:
        x_seen = x_hat.to(x.dtype).to(dtype) if casting_mode == "llama" else x_hat
        dweight = bias_grad(g * x_seen, routes, update)
    return dx, dweight


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    routes: Routes,
    update: Table | None,
    eps: float,
    *,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a layer norm, the weight's and the bias's masked; x̂ is computed again.

    Arguments as for `rms_norm_backward`; eps is added to the variance.

    Returns:
        dx `[T, D]` in x's dtype; dW and db `[D]` in fp32 (fp64 for fp64); None for what is not wanted.
    """
    dtype = product_dtype(x.dtype)
    x_wide, g = x.to(dtype), dy.to(dtype)
    centered = x_wide - x_wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    x_hat = centered * rstd
    dx = None
    if weight is not None:
        dx_hat = g * weight.to(dtype)
        dx = _norm_input_grad(dx_hat - dx_hat.mean(-1, keepdim=True), x_hat, rstd).to(x.dtype)
    dweight = bias_grad(g * x_hat, routes, update) if want_weight else None
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
    """dW[v] = Σ_{t: token_t = v} m_update ⊙ dy_t, none for padding_idx.

    Args:
        dy: `[T, D]`.
        tokens: `[T]`, int32 or int64.
        routes: the batch's routes.
        update: m_update.
        num_embeddings: V.
        padding_idx: the row that no token updates, in `[0, V)`, or None.

    Returns:
        `[V, D]` in dy's dtype, summed in fp32 (fp64 for fp64).
    """
    g = masked_product(dy.to(product_dtype(dy.dtype)), routes, update)
    padding = -1 if padding_idx is None else padding_idx
    return torch.ops.aten.embedding_dense_backward(g, tokens, num_embeddings, padding, False).to(dy.dtype)


def masked_heads(x: Tensor, routes: Routes | None, table: Table | None) -> Tensor:
    """m ⊙ x in a new tensor, for x `[B, H, S, D]` and a table `[R, H]` or `[R, 1]`; `x` itself without a table."""
    if table is None:
        return x
    out = x.clone()
    masked_heads_(out, routes, table)
    return out


def masked_heads_(x: Tensor, routes: Routes | None, table: Table | None) -> None:
    """m ⊙ x in place, on a tensor `[B, H, S, D]` that the caller allocated."""
    if table is None:
        return
    assert routes is not None
    batch, _, length, _ = x.shape
    m = mask(table.on(x.device), routes, product_dtype(x.dtype)).view(batch, length, table.features, 1)
    m = m.transpose(1, 2)  # [B, H or 1, S, 1]
    if not table.binary or routes.strength is not None:
        x.mul_(m)  # formed in m's dtype and rounded once, by type promotion
    x.masked_fill_(m == 0, 0)  # whatever x is there


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: Any,
    pattern: Pattern,
    vendor: str | None,
    product: Callable[..., Tensor] = masked_heads,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """z = m_forward_heads ⊙ softmax(scale q kᵀ) v, and what its backward needs beside it.

    Args:
        q: `[B, H, S_q, D]`.
        k: `[B, G, S_k, D]`; H is a multiple of G.
        v: `[B, G, S_k, D]`.
        routes: of the tokens `[B, S_q]`; None: no masks.
        sites: effective sites.
        pattern: which keys a query sees.
        vendor: the kernel, of `gradroute.backends.vendor.VENDORS`; None: in blocks.
        product: the masked product of heads.

    Returns:
        z `[B, H, S_q, D]`; the tensors to save: those of the kernel, its output first where that is not z.
    """
    if vendor is None:
        o, *saved = attention_blocks.attention_forward(q, k, v, pattern)
    else:
        o, *saved = VENDORS[vendor].forward(q, k, v, pattern)
    if sites.forward_heads is None:
        return o, tuple(saved)
    return product(o, routes, sites.forward_heads), (o, *saved)


def attention_output_grad(
    dz: Tensor, o: Tensor, routes: Routes | None, sites: Any, *, want_delta: bool
) -> tuple[Tensor, Tensor | None]:
    """do = m_heads ⊙ m_forward_heads ⊙ dz, dz itself where neither has a table; delta is left to who needs it.

    Args:
        dz: `[B, H, S, D]`.
        o: `[B, H, S, D]`, attention's output, not masked.
        routes: of the tokens; None: no masks.
        sites: effective sites.
        want_delta: rowsum(do ⊙ o) is needed.

    Returns:
        do `[B, H, S, D]`; delta `[B, H, S]` in fp32 (fp64 for fp64), or None.
    """
    if sites.forward_heads is None:
        return masked_heads(dz, routes, sites.heads), None
    d_o = masked_heads(dz, routes, sites.forward_heads)
    masked_heads_(d_o, routes, sites.heads)
    return d_o, None


def attention_backward(
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    saved: tuple[Tensor, ...],
    routes: Routes | None,
    sites: Any,
    pattern: Pattern,
    vendor: str | None,
    *,
    want_query: bool,
    want_key_value: bool,
    output_grad: Callable[..., tuple[Tensor, Tensor | None]] = attention_output_grad,
    product_: Callable[..., None] = masked_heads_,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv of attention with every mask: around a vendor's backward, or, with edges, in blocks.

    Args:
        dz: `[B, H, S_q, D]`, in any layout.
        q: as for attention_forward, like k and v.
        k: see q.
        v: see q.
        z: what attention_forward returned.
        saved: what attention_forward returned beside z.
        routes: of the tokens; None: no masks.
        sites: effective sites.
        pattern: which keys a query sees.
        vendor: as for attention_forward.
        want_query: compute dq.
        want_key_value: compute dk and dv.
        output_grad: as attention_output_grad.
        product_: the masked product of heads in place.

    Returns:
        dq, dk, dv, in the shapes of q, k, v; None for what is not wanted.
    """
    o, *rest = (z, *saved) if sites.forward_heads is None else saved
    in_blocks = vendor is None or sites.score_edges is not None or sites.value_edges is not None
    d_o, delta = output_grad(dz, o, routes, sites, want_delta=in_blocks)
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    if in_blocks:
        dq, dk, dv = attention_blocks.attention_backward(
            d_o,
            q,
            k,
            v,
            o,
            rest[0],
            routes,
            sites.score_edges,
            sites.value_edges,
            pattern,
            delta,
            want_query=want_query,
            want_key_value=want_key_value,
        )
    else:
        assert vendor is not None
        dq, dk, dv = VENDORS[vendor].backward(d_o, q, k, v, (o, *rest), pattern)
    if want_query:
        product_(dq, routes, sites.query)
    if want_key_value:
        product_(dk, routes, sites.key)
        product_(dv, routes, sites.value)
    return wanted((dq, want_query), (dk, want_key_value), (dv, want_key_value))


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    factors: Tensor,
    by_column: bool,
    options: AdamWOptions,
) -> None:
    """One step of `gradroute.optim.RoutedAdamW` on a parameter, in place: in fp32 (fp64 for fp64), rounded once.

    Args:
        parameter: θ `[N, M]`.
        gradient: g.
        exp_avg: m.
        exp_avg_sq: v.
        max_exp_avg_sq: the largest v so far, with amsgrad.
        factors: `[4, n]`, of the dtype to compute in: 1 - lr λ, lr / (1 - β₁^t), 1 / √(1 - β₂^t), and 1 for blocks that
            are touched, 0 for others.
        by_column: blocks are columns, n = M; else rows, n = N. n = 1: there is one block.
        options: β₁, β₂, ε, maximize.
    """
    beta1, beta2, eps, maximize = options
    decay, size, scale, touched = factors.unsqueeze(1 if by_column else 2)
    g = -gradient.to(factors.dtype) if maximize else gradient.to(factors.dtype)
    average = torch.lerp(exp_avg.to(g.dtype), g, 1 - beta1)
    square = beta2 * exp_avg_sq.to(g.dtype) + (1 - beta2) * g * g
    changed = {exp_avg: average, exp_avg_sq: square}
    if max_exp_avg_sq is not None:
        square = changed[max_exp_avg_sq] = torch.maximum(max_exp_avg_sq.to(g.dtype), square)
    changed[parameter] = parameter * decay - size * average / (square.sqrt() * scale + eps)
    for old, new in changed.items():
        old.copy_(torch.where(touched != 0, new.to(old.dtype), old))
