"""Attention in blocks of rows and keys, composed of matrix products: memory O(S · block), any device, edges included.

The queries of the heads that share a key/value head are folded into rows `[N, D]`, position by position. A row sees an
interval of keys, and neither bound of it ever decreases from row to row: the first and the last row of a block say
which keys to visit, and which of those must be hidden from some row.

On the CPU, where looking at data costs nothing, everything else is a choice of rows and keys. Padding is left out, and
so are rows without a gradient. Edges cost nothing on blocks either: all queries of one route give a key the same
weight, so keys of weight 0 are left out, and the others' weights multiply keys and sums `[K, D]`. Elsewhere nothing
may wait for data: padding, documents and edges are applied to every block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..primitives.arguments import has_data, product_dtype, wanted
from ..primitives.attention_pattern import Pattern
from ..primitives.registration import kernel_op, outside_autocast
from ..routes import Routes
from ..tables import Table

# Rows and keys of a block on the CPU: two blocks of fp32 and their operands fit into the second-level caches of two
# cores (2 MiB). Causal backward of 4 heads, 4096 tokens: 183 ms with 384 × 512, 207 with 256 × 256, 229 with 512 × 1024
# in two threads; in one thread 304 to 315, whatever the block.
ROWS, KEYS = 384, 512
# Heads of fewer scores than this are computed together on the CPU, as they are elsewhere: there is too little to leave
# out. One thread, forward and backward, two routes: four heads of 64 elements of 64 tokens take 25 ms together and 279
# apart, of 16 elements of 256 tokens 72 and 116; eight heads of 2 elements of 1024 tokens 206 and 201.
FEW_SCORES = 1 << 17
# Elsewhere, of a block, and how many scores of all heads are computed together, if one batch element is not more.
DEVICE_ROWS, DEVICE_KEYS, DEVICE_SCORES = 1024, 1024, 1 << 24
# Documents are not mixed in a block, unless they have fewer rows than this share of one.
SHARE_OF_A_BLOCK = 8
# Routes of fewer tokens are taken together, with their edges applied to every block: backward of 4096 tokens in one
# thread takes 736 ms apart and 799 together with 64 routes, half of the edges 0, 384 and 760 with 16.
MIN_TOKENS_OF_A_CLASS = 64
# A block's number of keys is a multiple of this, where it can be: a cache line, a vector register.
LANES = 16

LOG2_E = math.log2(math.e)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """o = softmax(scale q kᵀ) v, and the logarithm of the softmax's denominator.

    Args:
        q: `[B, H, S_q, D]`, fp32, bf16, fp16 or fp64.
        k: `[B, G, S_k, D]`; H is a multiple of G.
        v: `[B, G, S_k, D]`.
        pattern: which keys a query sees; no dropout.

    Returns:
        o `[B, H, S_q, D]` in q's dtype, 0 for a query that sees no key; lse `[B, H, S_q]` in fp32 (fp64 for fp64),
        -inf for such a query.
    """
    return forward_op(
        q, k, v, pattern.causal, pattern.window, pattern.scale, pattern.cu_seqlens, pattern.key_mask
    )


def attention_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    routes: Routes | None,
    score_edges: Table | None,
    value_edges: Table | None,
    pattern: Pattern,
    delta: Tensor | None = None,
    *,
    want_query: bool,
    want_key_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of attention through edges.

    P = exp(scale q kᵀ - lse); dv = (E_value ⊙ P)ᵀ do; dS = E_score ⊙ P ⊙ (do vᵀ - rowsum(do ⊙ o));
    dq = scale dS k; dk = scale dSᵀ q, summed over the heads of a group. Where an edge is 0, nothing passes,
    not even NaN.

    Args:
        d_o: `[B, H, S_q, D]`, masked by head.
        q: `[B, H, S_q, D]`, fp32, bf16, fp16 or fp64.
        k: `[B, G, S_k, D]`; H is a multiple of G.
        v: `[B, G, S_k, D]`.
        o: `[B, H, S_q, D]`, attention's output, not masked.
        lse: `[B, H, S_q]`; of a query that sees no key it may be anything.
        routes: of the tokens `[B, S]`, S_q = S_k; may be None without edges.
        score_edges: `[R, R]`, by [query's route, key's route]; None: ones.
        value_edges: `[R, R]`; None: ones.
        pattern: which keys a query sees; no dropout.
        delta: `[B, H, S_q]` in fp32 (fp64 for fp64), rowsum(do ⊙ o), where it is known already.
        want_query: compute dq.
        want_key_value: compute dk and dv.

    Returns:
        dq, dk, dv in the dtypes of q, k, v, summed over blocks in fp32 (fp64 for fp64); None for what is not wanted.
    """
    edges = [None if table is None or table.kind == "ones" else table for table in (score_edges, value_edges)]
    has_edges = any(table is not None for table in edges)
    dq, dk, dv = backward_op(
        d_o,
        q,
        k,
        v,
        o,
        lse,
        routes.ids if routes is not None and has_edges else None,
        *(None if table is None else table.on(q.device) for table in edges),
        delta,
        pattern.causal,
        pattern.window,
        pattern.scale,
        pattern.cu_seqlens,
        pattern.key_mask,
        want_query,
        want_key_value,
    )
    return wanted((dq, want_query), (dk, want_key_value), (dv, want_key_value))


PATTERN_SCHEMA = "bool causal, SymInt? window, float scale, Tensor? cu_seqlens, Tensor? key_mask"


@kernel_op(f"attention_blocks_forward(Tensor q, Tensor k, Tensor v, {PATTERN_SCHEMA}) -> (Tensor, Tensor)")
@outside_autocast
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `attention_forward`."""
    o = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=product_dtype(q.dtype))
    if not has_data(q):
        return o, lse
    if q.numel() == 0 or k.numel() == 0:
        return o.zero_(), lse.fill_(-math.inf)
    pattern = Pattern(causal, window, scale, 0.0, cu_seqlens, key_mask)
    blockwise = Blockwise.of(q, k, pattern, tiles=1)
    for batch in blockwise.batches(q.shape[0]):
        sight = Sight.of(q, k, pattern, batch)
        index, sight = sight.of_keys(None) if blockwise.picks else (None, sight)
        visible = sight.of_rows(None, blockwise)
        for fold in blockwise.folds(batch):
            rows = blockwise.scaled(fold.rows(q))
            keys, values = (_taken(blockwise.operand(fold.keys(t)), index) for t in (k, v))
            o_rows, lse_rows = _forward_rows(rows, keys, values, visible, blockwise)
            fold.put_rows(o, o_rows)
            fold.put_rows(lse.unsqueeze(-1), lse_rows)
    return o, lse


@kernel_op(
    "attention_blocks_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? ids, "
    f"Tensor? score_edges, Tensor? value_edges, Tensor? delta, {PATTERN_SCHEMA}, bool want_query, bool want_key_value) "
    "-> (Tensor, Tensor, Tensor)"
)
@outside_autocast
def backward_op(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    ids: Tensor | None,
    score_edges: Tensor | None,
    value_edges: Tensor | None,
    delta: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    want_query: bool,
    want_key_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `attention_backward`; outputs that are not wanted have no elements."""
    dq, dk, dv = (
        torch.empty_like(t) if is_wanted else t.new_empty(0)
        for t, is_wanted in ((q, want_query), (k, want_key_value), (v, want_key_value))
    )
    if not has_data(q) or not (want_query or want_key_value):
        return dq, dk, dv
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    pattern = Pattern(causal, window, scale, 0.0, cu_seqlens, key_mask)
    blockwise = Blockwise.of(q, k, pattern, tiles=2)
    for batch in blockwise.batches(q.shape[0]):
        edges = Edges.of(ids, score_edges, value_edges, batch, k.shape[2])
        sight = Sight.of(q, k, pattern, batch)
        parts = [Part(None, [Reading(None, sight, *edges.flows())])]
        if blockwise.picks:
            parts = list(_parts(sight, edges, want_key_value))
        for fold in blockwise.folds(batch):
            rows = Rows.of(fold, blockwise, d_o, q, o, lse, delta, want_query)
            keys = Keys.of(fold, blockwise, k, v, want_key_value)
            taught = (rows.d_o != 0).any(-1) if blockwise.picks else None
            for part in parts:
                _backward_part(part, taught, rows, keys, edges, blockwise)
            fold.put_rows(dq, rows.dq, scale)
            fold.put_keys(dk, keys.dk, blockwise.key_scale)
            fold.put_keys(dv, keys.dv)
    return dq, dk, dv


class Fold(NamedTuple):
    """One key/value head of a batch element, or all heads of some elements: n matrices, `[N, D]` or `[n, N, D]`.

    Attributes:
        batch: the batch elements.
        head: the key/value head; None: all.
        group: how many query heads share a key/value head; N = S_q · group.
    """

    batch: slice
    head: int | None
    group: int

    def rows(self, t: Tensor) -> Tensor:  # [B, H, S_q, X] → [N, X] or [n, N, X]
        """What belongs to queries, position by position."""
        rows = self._by_position(t).flatten(-3, -2)
        return rows if self.head is not None else rows.flatten(0, 1)

    def keys(self, t: Tensor) -> Tensor:  # [B, G, S_k, D] → [S_k, D] or [n, S_k, D]
        """What belongs to keys."""
        return t[self.batch.start, self.head] if self.head is not None else t[self.batch].flatten(0, 1)

    def put_rows(self, out: Tensor, rows: Tensor | None, factor: float = 1.0) -> None:
        """Writes factor · rows `[N, X]` or `[n, N, X]` into `out [B, H, S_q, X]`; nothing without rows."""
        if rows is not None:
            place = self._by_position(out)
            place.copy_(rows.mul_(factor).view(place.shape))

    def put_keys(self, out: Tensor, keys: Tensor | None, factor: float = 1.0) -> None:
        """Writes factor · keys `[S_k, D]` or `[n, S_k, D]` into `out [B, G, S_k, D]`; nothing without keys."""
        if keys is not None:
            place = out[self.batch] if self.head is None else out[self.batch.start, self.head]
            place.copy_(keys.mul_(factor).view(place.shape))

    def _by_position(self, t: Tensor) -> Tensor:  # [B, H, S_q, X] → [..., S_q, group, X]
        if self.head is None:
            return t[self.batch].unflatten(1, (-1, self.group)).transpose(2, 3)
        heads = slice(self.head * self.group, (self.head + 1) * self.group)
        return t[self.batch.start, heads].transpose(0, 1)


class Blockwise(NamedTuple):
    """How blocks are computed.

    Attributes:
        heads: G.
        group: how many query heads share a key/value head.
        scale: of the scores.
        rows: of a block, at most.
        keys: of a block, at most.
        elements: of the batch, whose heads are computed together.
        dtype: of the operands of products.
        tiles: memory for blocks `[rows, keys]` that are in use together, where heads are computed one by one.
    """

    heads: int
    group: int
    scale: float
    rows: int
    keys: int
    elements: int
    dtype: torch.dtype
    tiles: tuple[Tensor, ...]

    @staticmethod
    def of(q: Tensor, k: Tensor, pattern: Pattern, tiles: int) -> Blockwise:
        """For q `[B, H, S_q, D]` and k `[B, G, S_k, D]`."""
        heads, group = k.shape[1], q.shape[1] // k.shape[1]
        on_host = looks_at_data(q.device)
        limits = (ROWS, KEYS) if on_host else (DEVICE_ROWS, DEVICE_KEYS)
        rows, keys = min(limits[0], q.shape[2] * group), min(limits[1], k.shape[2])
        wide = product_dtype(q.dtype)
        memory: tuple[Tensor, ...] = ()
        if on_host and q.shape[2] * group * k.shape[2] >= FEW_SCORES:
            memory = tuple(q.new_empty(rows * keys, dtype=wide) for _ in range(tiles))
        scores = ROWS * KEYS if on_host else DEVICE_SCORES
        elements = 1 if memory else max(1, scores // (heads * rows * keys))
        return Blockwise(heads, group, pattern.scale, *limits, elements, operand_dtype(q), memory)

    @property
    def picks(self) -> bool:
        """Whether rows and keys are picked by looking at data, head by head."""
        return len(self.tiles) > 0

    def batches(self, batch: int) -> Iterator[slice]:
        """The batch elements that are computed together."""
        return _split(slice(0, batch), self.elements)

    def folds(self, batch: slice) -> Iterator[Fold]:
        """What is computed together of these batch elements."""
        for head in range(self.heads) if self.picks else [None]:
            yield Fold(batch, head, self.group)

    def operand(self, t: Tensor) -> Tensor:
        """`t` as products take it."""
        return t.to(self.dtype).contiguous()

    @property
    def is_half(self) -> bool:
        """Whether operands are of half precision, which nothing may be multiplied into."""
        return self.dtype not in (torch.float32, torch.float64)

    def scaled(self, q: Tensor) -> Tensor:  # [..., N, D]
        """scale · q as products take it; in half precision q, which scaling would round again."""
        return self.operand(q) if self.is_half else q.to(self.dtype) * self.scale

    @property
    def key_scale(self) -> float:
        """What dSᵀ scaled(q) lacks."""
        return self.scale if self.is_half else 1.0

    def scores(self, q: Tensor, k: Tensor) -> Tensor:  # [..., n, D], [..., m, D] → [..., n, m]
        """scale q kᵀ in fp32 or fp64."""
        scores = self.product(q, k, 0)
        return scores.mul_(self.scale) if self.is_half else scores

    def product(self, a: Tensor, b: Tensor, tile: int) -> Tensor:
        """a bᵀ in fp32 or fp64: a `[..., n, D]`, b `[..., m, D]` → `[..., n, m]`, in a tile where there are any."""
        if self.is_half:
            return torch.bmm(a, b.mT, out_dtype=torch.float32)
        if not self.picks:
            return torch.bmm(a, b.mT)
        out = self.tiles[tile][: a.shape[0] * b.shape[0]].view(a.shape[0], b.shape[0])
        return torch.mm(a, b.T, out=out)

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a b: a `[..., n, m]` in fp32 or fp64, b `[..., m, D]`, total `[..., n, D]` in fp32 or fp64."""
        if self.is_half:
            total.add_(torch.bmm(a.to(self.dtype), b, out_dtype=torch.float32))
        elif self.picks:
            total.addmm_(a, b)
        else:
            total.baddbmm_(a, b)


def operand_dtype(q: Tensor) -> torch.dtype:
    """Of the operands of products: q's own where products of half precision can be fp32, else fp32 or fp64."""
    return q.dtype if q.device.type == "cuda" else product_dtype(q.dtype)


def looks_at_data(device: torch.device) -> bool:
    """Whether the host may branch on values: elsewhere it would wait for the device."""
    return device.type == "cpu"


class Block(NamedTuple):
    """Some rows, the keys that any of them sees, and those that all of them see (none where stop < start)."""

    rows: slice
    keys: slice
    common: slice


class Visible(NamedTuple):
    """What rows see: row n the keys `[first[n], end[n])`, without the hidden ones.

    Attributes:
        first: `[N, 1]` int32.
        end: `[N, 1]` int32.
        hidden: `[batch elements, K]` bool; or None.
        blocks: all rows that see a key, in blocks.
    """

    first: Tensor
    end: Tensor
    hidden: Tensor | None
    blocks: list[Block]


class Sight(NamedTuple):
    """What queries see: query i the keys `[first[i], end[i])`, without the hidden ones.

    Attributes:
        first: `[S_q]` int64, does not decrease.
        end: `[S_q]` int64, does not decrease, nowhere less than first.
        hidden: `[batch elements, S_k]` bool; or None.
        host: first and end where the host may read them.
        is_exact: whether they are equal to first and end, or as far as the host knows.
    """

    first: Tensor
    end: Tensor
    hidden: Tensor | None
    host: tuple[Tensor, Tensor]
    is_exact: bool

    @staticmethod
    def of(q: Tensor, k: Tensor, pattern: Pattern, batch: slice) -> Sight:
        """Of q `[B, H, S_q, D]` and k `[B, G, S_k, D]`."""
        hidden = None if pattern.key_mask is None else ~pattern.key_mask[batch]
        lengths = q.shape[2], k.shape[2]
        bounds = _intervals(*lengths, pattern, pattern.cu_seqlens, q.device)
        if looks_at_data(q.device):
            return Sight(*bounds, hidden, bounds, True)
        host = _intervals(*lengths, pattern, None, torch.device("cpu"))
        return Sight(*bounds, hidden, host, pattern.cu_seqlens is None)

    def of_keys(self, chosen: Tensor | None) -> tuple[Tensor | None, Sight]:
        """The chosen keys `[S_k]` bool that are not hidden: their index, None for all, and who sees them.

        An interval of keys is one of the chosen keys, too.
        """
        if self.hidden is not None:
            (shown,) = ~self.hidden
            chosen = shown if chosen is None else chosen & shown
        if chosen is None or bool(chosen.all()):
            return None, self._replace(hidden=None)
        before = torch.cat([chosen.new_zeros(1, dtype=torch.int64), chosen.cumsum(0)])  # [S_k + 1]
        bounds = before[self.first], before[self.end]
        return chosen.nonzero()[:, 0], Sight(*bounds, None, bounds, True)

    def of_rows(self, index: Tensor | None, blockwise: Blockwise) -> Visible:
        """For the rows `[N]` of folded queries, None for all."""
        group = blockwise.group

        def folded(bound: Tensor) -> Tensor:
            bound = bound.to(torch.int32)
            return bound.repeat_interleave(group) if index is None else bound[index // group]

        blocks = list(_blocks(folded(self.host[0]), folded(self.host[1]), blockwise.rows))
        if not self.is_exact:
            blocks = [block._replace(common=slice(block.keys.stop, block.keys.start)) for block in blocks]
        return Visible(folded(self.first)[:, None], folded(self.end)[:, None], self.hidden, blocks)


def _intervals(
    queries: int, keys: int, pattern: Pattern, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The first key that each query sees, and the end of those it sees, `[S_q]` each; equal where it sees none."""
    position = torch.arange(queries, device=device) + (keys - queries)
    first, end = torch.zeros_like(position), torch.full_like(position, keys)
    if pattern.causal:
        end = position + 1
    if pattern.window is not None:
        first = position - pattern.window + 1
        end = torch.minimum(end, position + pattern.window)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].long()
        document = torch.searchsorted(ends.contiguous(), position, right=True)
        bounds = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), keys)])
        first = torch.maximum(first, bounds[document])
        end = torch.minimum(end, bounds[document + 1])
    first = first.clamp(0, keys)
    return first, torch.maximum(first, end.clamp(0, keys))


def _blocks(first: Tensor, end: Tensor, limit: int) -> Iterator[Block]:
    """Blocks of rows with their keys, from first `[N]` and end `[N]`; blocks that see no key are left out."""
    apart = (first[1:] >= end[:-1]).nonzero()[:, 0] + 1  # rows that share no key with the one before
    start = 0
    for stop in [*apart.tolist(), first.shape[0]]:
        if stop < first.shape[0] and stop - start < limit // SHARE_OF_A_BLOCK:
            continue
        for rows in _split(slice(start, stop), limit):
            low, lower = int(end[rows.start]), int(first[rows.start])
            high, higher = int(end[rows.stop - 1]), int(first[rows.stop - 1])
            if lower < high:
                yield Block(rows, slice(lower, high), slice(higher, low))
        start = stop


def _split(whole: slice, limit: int, multiple: int = 1) -> Iterator[slice]:
    """Equal parts of at most `limit`, each but the last a multiple of `multiple` where the limit allows."""
    length = whole.stop - whole.start
    if length <= 0:
        return
    step = -(-length // -(-length // limit))
    step = min(limit, -(-step // multiple) * multiple)
    for start in range(whole.start, whole.stop, step):
        yield slice(start, min(start + step, whole.stop))


def _hide_(tile: Tensor, value: float, keys: slice, block: Block, visible: Visible) -> None:
    """Writes `value` into tile `[..., n, m]` where a row of the block does not see a key.

    Only columns of keys that some row does not see are touched: eager masked_fill_ is not vectorised on the CPU.
    """
    early, late = block.common.start - keys.start, max(block.common.stop - keys.start, 0)
    if early > 0 or late < tile.shape[-1]:
        positions = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=tile.device)
        if early > 0:
            tile[..., :early].masked_fill_(positions[:early] < visible.first[block.rows], value)
        if late < tile.shape[-1]:
            tile[..., late:].masked_fill_(positions[late:] >= visible.end[block.rows], value)
    if visible.hidden is not None:
        _by_element(tile, visible.hidden).masked_fill_(visible.hidden[:, None, None, keys], value)


def _by_element(tile: Tensor, of_elements: Tensor) -> Tensor:
    """Tile `[n, m]` or `[elements · G, n, m]` as `[elements, G, n, m]`, for what is `[elements, ...]`."""
    return tile.view(of_elements.shape[0], -1, *tile.shape[-2:])


def _forward_rows(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, blockwise: Blockwise
) -> tuple[Tensor, Tensor]:
    """o and lse: q `[..., N, D]`, scaled, k and v `[..., K, D]` → `[..., N, D]`, `[..., N, 1]`, fp32 or fp64."""
    o = torch.zeros(q.shape, dtype=product_dtype(q.dtype), device=q.device)
    lse = torch.full_like(o[..., :1], -math.inf)
    for block in visible.blocks:
        part = (..., block.rows, slice(None))
        lse[part] = _forward_block(q[part], k, v, o[part], block, visible, blockwise)
    return o, lse


def _exp_(tile: Tensor) -> Tensor:
    """exp in place. As exp2 it takes half of the time on the CPU: 26 μs for 256 × 512 elements where exp takes 60."""
    return tile.mul_(LOG2_E).exp2_()


def _forward_block(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, block: Block, visible: Visible, blockwise: Blockwise
) -> Tensor:
    """o += softmax(q kᵀ) v for o of zeros `[..., n, D]`; returns lse `[..., n, 1]`."""
    # Not -inf, which a row may not be shifted by before it sees a key.
    highest = torch.full_like(o[..., :1], torch.finfo(o.dtype).min)
    total = torch.zeros_like(highest)
    for keys in _split(block.keys, blockwise.keys, LANES):
        p = blockwise.scores(q, k[..., keys, :])
        _hide_(p, -math.inf, keys, block, visible)
        higher = torch.maximum(highest, p.amax(-1, keepdim=True))
        fade = (highest - higher).exp_()
        _exp_(p.sub_(higher))
        total.mul_(fade).add_(p.sum(-1, keepdim=True))
        blockwise.accumulate(o.mul_(fade), p, v[..., keys, :])
        highest = higher
    o.div_(torch.where(total == 0, 1, total))
    return highest + total.log()


class Rows(NamedTuple):
    """What belongs to rows, `[..., N, X]`.

    Attributes:
        q: `[..., N, D]`, scaled.
        d_o: `[..., N, D]`.
        lse: `[..., N, 1]`, inf for a row that sees no key.
        delta: `[..., N, 1]`, rowsum(do ⊙ o); 0 for a row that sees no key.
        positions: `[N, 1]`, of the query.
        dq: `[..., N, D]` in fp32 or fp64, the sum so far; None: not wanted.
    """

    q: Tensor
    d_o: Tensor
    lse: Tensor
    delta: Tensor
    positions: Tensor
    dq: Tensor | None

    @staticmethod
    def of(
        fold: Fold,
        blockwise: Blockwise,
        d_o: Tensor,
        q: Tensor,
        o: Tensor,
        lse: Tensor,
        delta: Tensor | None,
        want_query: bool,
    ) -> Rows:
        """The rows of a fold, from tensors `[B, H, S_q, D]`, and lse and delta (if known) `[B, H, S_q]`."""
        wide = product_dtype(q.dtype)
        lse_rows = fold.rows(lse.unsqueeze(-1)).to(wide)
        sees_none = lse_rows.isinf()
        d_o_rows = fold.rows(d_o).to(wide)
        if delta is None:
            delta_rows = (d_o_rows * fold.rows(o)).sum(-1, keepdim=True)
        else:
            delta_rows = fold.rows(delta.unsqueeze(-1))
        q_rows = blockwise.scaled(fold.rows(q))
        positions = torch.arange(q_rows.shape[-2], device=q.device)[:, None] // blockwise.group
        return Rows(
            q_rows,
            blockwise.operand(d_o_rows),
            lse_rows.masked_fill(sees_none, math.inf),
            delta_rows.masked_fill(sees_none, 0),
            positions,
            torch.zeros(q_rows.shape, dtype=wide, device=q.device) if want_query else None,
        )

    def at(self, rows: slice) -> Rows:
        """Views of some rows."""
        return Rows(*(None if t is None else t[..., rows, :] for t in self))  # type: ignore[arg-type]

    def taken(self, index: Tensor) -> Rows:
        """Copies of some rows, with sums of their own: on the CPU."""
        dq = None if self.dq is None else self.dq.new_zeros(len(index), self.dq.shape[1])
        q, d_o, lse, delta, positions = (t.index_select(0, index) for t in self[:5])
        return Rows(q, d_o, lse, delta, positions, dq)


class Keys(NamedTuple):
    """What belongs to keys, `[..., K, X]`.

    Attributes:
        k: `[..., K, D]`.
        v: `[..., K, D]`.
        k_weighted: `[..., K, D]`, k times the weights of score edges that all rows share.
        positions: `[K, 1]`, of the key.
        dk: `[..., K, D]` in fp32 or fp64, the sum so far; None: not wanted.
        dv: the same.
    """

    k: Tensor
    v: Tensor
    k_weighted: Tensor
    positions: Tensor
    dk: Tensor | None
    dv: Tensor | None

    @staticmethod
    def of(fold: Fold, blockwise: Blockwise, k: Tensor, v: Tensor, want_key_value: bool) -> Keys:
        """The keys of a fold, from tensors `[B, G, S_k, D]`."""
        keys, values = (blockwise.operand(fold.keys(t)) for t in (k, v))
        positions = torch.arange(k.shape[2], device=k.device)[:, None]
        sums: list[Tensor | None] = [None, None]
        if want_key_value:
            sums = [torch.zeros(keys.shape, dtype=product_dtype(k.dtype), device=k.device) for _ in range(2)]
        return Keys(keys, values, keys, positions, *sums)

    def at(self, keys: slice) -> Keys:
        """Views of some keys."""
        return Keys(*(None if t is None else t[..., keys, :] for t in self))  # type: ignore[arg-type]

    def taken(self, reading: Reading) -> Keys:
        """The keys of a reading, weighted: copies with sums of their own where it has an index or weights."""
        score, value = (None if flow is None else flow.weights for flow in (reading.score, reading.value))
        if reading.picked is None and score is None and value is None:
            return self
        k, v, _, positions = (_taken(t, reading.picked) for t in self[:4])
        k_weighted = k if score is None else k * score
        sums = (None if t is None else torch.zeros_like(k) for t in self[4:])
        return Keys(k, v, k_weighted, positions, *sums)

    def give_back(self, whole: Keys, reading: Reading) -> None:
        """Adds what `taken` summed, weighted, to the sums of all keys."""
        for mine, total, flow in ((self.dk, whole.dk, reading.score), (self.dv, whole.dv, reading.value)):
            if mine is None or mine is total or flow is None:
                continue
            assert total is not None
            if flow.weights is not None:
                mine.mul_(flow.weights)
            if reading.picked is None:
                total.add_(mine)
            else:
                total.index_copy_(0, reading.picked, mine.add_(total.index_select(0, reading.picked)))


def _taken(t: Tensor, index: Tensor | None) -> Tensor:
    """The rows `index` of t `[K, X]`; t itself for all."""
    return t if index is None else t.index_select(0, index)


class Flow(NamedTuple):
    """How a gradient passes edges.

    Attributes:
        weights: `[K, 1]`, the same for all rows, nowhere 0; None: ones.
        table: `[R, R]` fp32, from which every block takes its edges; None: they are in `weights`.
    """

    weights: Tensor | None = None
    table: Tensor | None = None


class Reading(NamedTuple):
    """Keys that some queries read, and what these teach them.

    Attributes:
        picked: `[K]`, the index of the keys; None: all.
        sight: which of these keys a query sees.
        score: how the gradient of scores flows; None: not at all.
        value: how the gradient of values flows; None: not at all.
    """

    picked: Tensor | None
    sight: Sight
    score: Flow | None
    value: Flow | None


class Part(NamedTuple):
    """Queries whose edges are handled alike: `[S_q]` bool, None for all; with what they read."""

    queries: Tensor | None
    readings: list[Reading]


class Edges(NamedTuple):
    """The edges of some batch elements: ids `[elements, S]` int64, tables `[R, R]` fp32; None: ones."""

    ids: Tensor | None
    score: Tensor | None
    value: Tensor | None

    @staticmethod
    def of(
        ids: Tensor | None, score: Tensor | None, value: Tensor | None, batch: slice, length: int
    ) -> Edges:
        """From ids `[B * S]`, S being the length."""
        if ids is None:
            return Edges(None, None, None)
        return Edges(ids.view(-1, length)[batch].long(), score, value)

    def flows(self) -> tuple[Flow, Flow]:
        """Edges that every block takes from the tables."""
        return Flow(table=self.score), Flow(table=self.value)

    def weigh_(self, tile: Tensor, table: Tensor | None, rows: Rows, keys: Keys) -> None:
        """E ⊙ tile `[..., n, m]` in place, exactly 0 where E = 0."""
        if table is None:
            return
        assert self.ids is not None
        of_rows = self.ids[:, rows.positions]  # [elements, n, 1]
        of_keys = self.ids[:, keys.positions].mT  # [elements, 1, m]
        weights = table[of_rows, of_keys].unsqueeze(1)  # [elements, 1, n, m]
        _by_element(tile, weights).mul_(weights).masked_fill_(weights == 0, 0)


def _parts(sight: Sight, edges: Edges, want_key_value: bool) -> Iterator[Part]:
    """The queries of each class, then all that are in no class, without those that see no key."""
    seeing = sight.of_keys(None)[1]
    remaining = seeing.first < seeing.end  # [S_q]
    for queries, score, value in _classes(edges):
        yield Part(queries & remaining, list(_readings(sight, score, value, want_key_value)))
        remaining = remaining & ~queries
    if bool(remaining.any()):
        yield Part(remaining, [Reading(*sight.of_keys(None), *edges.flows())])


def _classes(edges: Edges) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries `[S]` bool with the same edges to every key, and these, `[S]` each; few queries are in no class."""
    if edges.ids is None:
        return
    routes, ids = torch.unique(edges.ids[0], return_inverse=True)
    if len(routes) ** 2 > ROWS * KEYS:
        return
    ones = torch.ones(len(routes), len(routes), device=ids.device)
    score, value = (ones if table is None else table[routes][:, routes] for table in edges[1:])
    _, class_of = torch.unique(torch.cat([score, value], 1), dim=0, return_inverse=True)  # [routes present]
    for number, size in enumerate(torch.bincount(class_of[ids]).tolist()):
        if size >= MIN_TOKENS_OF_A_CLASS:
            route = int((class_of == number).nonzero()[0])
            yield class_of[ids] == number, score[route, ids], value[route, ids]


def _readings(sight: Sight, score: Tensor, value: Tensor, want_key_value: bool) -> Iterator[Reading]:
    """Of the queries of one class with edges score `[S]` and value `[S]`: keys by which of the two is not 0."""
    scored, valued = score != 0, (value != 0) & want_key_value
    for chosen, has_score, has_value in (
        (scored & valued, True, True),
        (scored & ~valued, True, False),
        (~scored & valued, False, True),
    ):
        if bool(chosen.any()):
            index, seen = sight.of_keys(chosen)
            yield Reading(
                index,
                seen,
                _constant(score, index) if has_score else None,
                _constant(value, index) if has_value else None,
            )


def _constant(weights: Tensor, index: Tensor | None) -> Flow:
    """The flow with these weights `[S]` of the keys at `index`."""
    weights = _taken(weights, index)
    return Flow() if bool((weights == 1).all()) else Flow(weights[:, None])


def _backward_part(
    part: Part, taught: Tensor | None, rows: Rows, keys: Keys, edges: Edges, blockwise: Blockwise
) -> None:
    """Adds a part's gradients to the sums of all rows and keys; `taught [N]` says which rows have a gradient."""
    index = None
    if taught is not None and part.queries is not None:
        taught = taught & part.queries.repeat_interleave(blockwise.group)
        index = None if bool(taught.all()) else taught.nonzero()[:, 0]
    if index is not None and len(index) == 0:
        return
    some = rows if index is None else rows.taken(index)
    for reading in part.readings:
        read = keys.taken(reading)
        _backward_rows(some, read, reading, reading.sight.of_rows(index, blockwise), edges, blockwise)
        read.give_back(keys, reading)
    if index is not None and rows.dq is not None:
        assert some.dq is not None
        rows.dq.index_copy_(0, index, some.dq)


def _backward_rows(
    rows: Rows, keys: Keys, reading: Reading, visible: Visible, edges: Edges, blockwise: Blockwise
) -> None:
    """Adds to the sums of rows and keys what a reading teaches, block by block."""
    for block in visible.blocks:
        some = rows.at(block.rows)
        for part in _split(block.keys, blockwise.keys, LANES):
            read = keys.at(part)
            p = _exp_(blockwise.scores(some.q, read.k).sub_(some.lse))
            _hide_(p, 0.0, part, block, visible)
            if reading.score is not None:
                _score_gradient(p, some, read, reading.score, edges, blockwise)
            if reading.value is not None and read.dv is not None:
                edges.weigh_(p, reading.value.table, some, read)
                blockwise.accumulate(read.dv, p.mT, some.d_o)


def _score_gradient(
    p: Tensor, rows: Rows, keys: Keys, flow: Flow, edges: Edges, blockwise: Blockwise
) -> None:
    """dS = E ⊙ P ⊙ (do vᵀ - delta) for P `[..., n, m]`; dq += dS k; dk += dSᵀ q."""
    ds = blockwise.product(rows.d_o, keys.v, 1).sub_(rows.delta).mul_(p)
    edges.weigh_(ds, flow.table, rows, keys)
    if rows.dq is not None:
        blockwise.accumulate(rows.dq, ds, keys.k_weighted)
    if keys.dk is not None:
        blockwise.accumulate(keys.dk, ds.mT, rows.q)
