"""Routed attention and its gradients in NumPy, stated once more: an oracle that shares no code with the package.

Everything is float64, one head of one sequence at a time, with every S_q × S_k matrix written out.
"""

from typing import NamedTuple

import numpy as np


class Options(NamedTuple):
    """Which keys a query sees, and the scale of the scores."""

    causal: bool = True
    window: int | None = None
    scale: float | None = None
    cu_seqlens: np.ndarray | None = None  # [documents + 1]
    key_mask: np.ndarray | None = None  # [B, S_k] bool


class Routing(NamedTuple):
    """The routes of the queries' tokens, and the tables by site."""

    ids: np.ndarray  # [B, S] integers
    tables: dict[str, np.ndarray]  # [R, heads] or [R, 1]; edges [R, R]
    strength: np.ndarray | float | None = None  # [B, S], or one for all

    def mask(self, site, heads):
        """m [B, S, heads], 1 where there is no table: W[r_t, h], or what the strength makes of it and W[0, h]."""
        if site not in self.tables:
            return np.ones((len(self.ids), 1, heads))
        weights = np.broadcast_to(self.tables[site], (len(self.tables[site]), heads))
        base, own = weights[0], weights[self.ids]
        if self.strength is None:
            return own
        s = np.asarray(self.strength, dtype=np.float64)[..., None]
        # From the nearer end, so that both ends are exact.
        return np.where(s < 0.5, base + s * (own - base), own - (1 - s) * (own - base))

    def edges(self, site):
        """[B, S_q, S_k], or 1: E[the query's route, the key's route], whatever the strength."""
        if site not in self.tables:
            return np.ones((len(self.ids), 1, 1))
        return self.tables[site][self.ids[:, :, None], self.ids[:, None, :]]


class Result(NamedTuple):
    z: np.ndarray  # [B, H, S_q, D]
    dq: np.ndarray  # [B, H, S_q, D]
    dk: np.ndarray  # [B, G, S_k, D]
    dv: np.ndarray  # [B, G, S_k, D]


def attention(q, k, v, dz, routing=None, options=None):
    """z, and the gradients that dz sends to q, k and v.

    q and dz [B, H, S_q, D], k and v [B, G, S_k, D]; H is a multiple of G. S_q ≠ S_k where no site but forward_heads
    has a table.
    """
    (batch, heads), kv_heads = q.shape[:2], k.shape[1]
    routing = routing or Routing(np.zeros((batch, q.shape[2]), dtype=int), {})
    options = options or Options()
    scale = 1 / np.sqrt(q.shape[3]) if options.scale is None else options.scale
    m_query, m_heads, m_forward = (routing.mask(site, heads) for site in ("query", "heads", "forward_heads"))
    m_key, m_value = (routing.mask(site, kv_heads) for site in ("key", "value"))
    e_score, e_value = routing.edges("score_edges"), routing.edges("value_edges")

    z, dq, dk, dv = (np.zeros(a.shape) for a in (q, q, k, v))
    for b, h in np.ndindex(batch, heads):
        g = h * kv_heads // heads
        p = softmax(scale * (q[b, h] @ k[b, g].T), visible_keys(q.shape[2], k.shape[2], b, options))
        o = p @ v[b, g]
        z[b, h] = masked(m_forward[b, :, h], o)
        do = masked(m_forward[b, :, h], masked(m_heads[b, :, h], dz[b, h]))
        dp = do @ v[b, g].T
        ds = p * (dp - (do * o).sum(1, keepdims=True))
        ds = np.where(e_score[b] == 0, 0.0, e_score[b] * ds)
        dq[b, h] = masked(m_query[b, :, h], scale * ds @ k[b, g])
        dk[b, g] += scale * ds.T @ q[b, h]
        dv[b, g] += (e_value[b] * p).T @ do
    for b, g in np.ndindex(batch, kv_heads):
        dk[b, g] = masked(m_key[b, :, g], dk[b, g])
        dv[b, g] = masked(m_value[b, :, g], dv[b, g])
    return Result(z, dq, dk, dv)


def masked(m, rows):  # m [S], rows [S, D]
    """m ⊙ rows, exactly 0 where m is 0."""
    return np.where(m[:, None] == 0, 0.0, m[:, None] * rows)


def softmax(scores, visible):  # both [S_q, S_k]
    """Over the visible keys of each query; all 0 where there are none."""
    p = np.zeros(scores.shape)
    for i, seen in enumerate(visible):
        if seen.any():
            exponentials = np.exp(scores[i, seen] - scores[i, seen].max())
            p[i, seen] = exponentials / exponentials.sum()
    return p


def visible_keys(queries, keys, b, options):  # [S_q, S_k] bool
    """The last query stands at the last key."""
    i = np.arange(queries)[:, None] + keys - queries
    j = np.arange(keys)[None, :]
    visible = np.ones((queries, keys), dtype=bool)
    if options.causal:
        visible &= j <= i
    if options.window is not None:
        visible &= i - j < options.window
        if not options.causal:
            visible &= j - i < options.window
    if options.cu_seqlens is not None:
        for start, stop in zip(options.cu_seqlens[:-1], options.cu_seqlens[1:], strict=True):
            inside = (start <= i) & (i < stop)  # [S, 1]
            visible &= inside == inside.T
    if options.key_mask is not None:
        visible &= options.key_mask[b]
    return visible
