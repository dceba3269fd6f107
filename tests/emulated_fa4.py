"""FlashAttention-4's backward on the CPU, as its sources of 4.0.0b36 have it, in the place of `fa4.device`.

The functions that it is given are those of `gradroute/backends/fa4/device.py`, for all elements of a head at once.
"""

import torch
from emulated_vendors import _why_not_inputs

from gradroute.backends.fa4 import backward, refusals
from gradroute.backends.fa4.blocks import BLOCK
from gradroute.backends.vendor import machine


def use_on_the_cpu(monkeypatch, capability=(9, 0)):
    """The library is there, and runs on tensors of the CPU.

    Args:
        monkeypatch: pytest's.
        capability: the GPU's compute capability.

    Returns:
        The emulated library, which counts its runs and what they computed.
    """
    library = Library(capability)
    monkeypatch.setattr(refusals, "why_not_installed", lambda: None)
    monkeypatch.setattr(refusals, "why_not_inputs", _why_not_inputs)
    monkeypatch.setattr(machine, "capability", lambda index: capability)
    monkeypatch.setattr(backward, "library", lambda: library)
    return library


def mask_of(batch, query, key, operands):
    """Which of the positions the mask of a pass lets through."""
    seen = key <= query
    if operands.first is not None:
        seen = (key >= operands.first[query]) & (key < operands.stop[query])
    return seen if operands.bits is None else seen & has_edge(batch, query, key, operands)


def has_edge(batch, query, key, operands):
    return (operands.bits[batch, query] >> operands.key_routes[batch, key]) & 1 != 0


def by_routes(table, batch, query, key, operands):
    """The weight of each pair of positions."""
    return table[operands.query_routes[batch, query].long(), operands.key_routes[batch, key].long()]


class Library:
    """Stands for the module `gradroute.backends.fa4.device`.

    Attributes:
        capability: the GPU's compute capability.
        masked: for each run, how many elements of a head were computed under the mask, and how many without it.
    """

    def __init__(self, capability):
        self.capability = capability
        self.masked = []

    def run(self, q, k, v, o, d_o, lse, dq, dk, dv, scale, operands):
        batch, length, heads, _ = q.shape
        group = heads // k.shape[2]
        assert_readable(q, k, v, o, d_o)
        assert all(t.is_contiguous() and t.dtype == q.dtype for t in (dq, dk, dv))
        assert lse.is_contiguous()
        assert lse.shape == (batch, heads, length)
        assert lse.isfinite().all()
        assert operands.query_routes.dtype == operands.key_routes.dtype == torch.int32
        *tensors, blocks = operands
        assert all(t is None or t.is_contiguous() for t in (*tensors, *blocks))
        sums = [torch.zeros(t.shape, dtype=lse.dtype) for t in (dq, dk, dv)]
        counts = torch.zeros(2, dtype=torch.long)
        for b in range(batch):
            partial, full = blocks_of(blocks, b, length)
            for h in range(heads):
                one = [
                    t[b, :, number].to(lse.dtype) for t, number in ((q, h), (k, h // group), (v, h // group))
                ]
                rows = (o[b, :, h].to(lse.dtype), d_o[b, :, h].to(lse.dtype), lse[b, h])
                p, ds, masked = self.head(*one, *rows, scale, operands, (b, group), (partial, full))
                counts += torch.stack([masked.sum(), full.sum()])
                p, ds = (t.to(q.dtype).to(lse.dtype) for t in (p, ds))
                sums[0][b, :, h] += scale * ds @ one[1]
                sums[1][b, :, h // group] += scale * ds.mT @ one[0]
                sums[2][b, :, h // group] += p.mT @ rows[1]
        for out, total in zip((dq, dk, dv), sums, strict=True):
            out.copy_(total)
        self.masked.append(tuple((counts // (batch * heads)).tolist()))

    def head(self, q, k, v, o, d_o, lse, scale, operands, batch_and_group, blocks):
        """P̃ and dS `[S, S]` of a head, and which elements of partial blocks it has."""
        batch, group = batch_and_group
        partial, full = blocks
        query, key = torch.arange(len(q))[:, None], torch.arange(len(k))[None, :]
        mask = mask_of(batch, query, key, operands)
        # What `_mistakes_queries` of the backward is about.
        packed = query // group if self.capability[0] == 9 else query
        scores = scale * q @ k.mT
        if operands.bias is not None:
            scores = scores + by_routes(operands.bias, batch, packed, key, operands)
        scores = scores.masked_fill(~(full | (partial & mask)), -torch.inf)
        p = (scores - lse[:, None]).exp()
        ds = p * (d_o @ v.mT - (d_o * o).sum(-1, keepdim=True))
        if operands.factor is not None:
            factor = by_routes(operands.factor, batch, packed, key, operands)
            ds = torch.where(factor != 0, ds * factor, 0.0)
        return p, ds, partial & mask


def assert_readable(*tensors):
    """Rows that TMA can read: 16 bytes at a time."""
    for t in tensors:
        step = 16 // t.element_size()
        assert t.stride(-1) == 1
        assert t.shape[-1] % step == 0
        assert all(stride > 0 and stride % step == 0 for stride in t.stride()[:-1])


def blocks_of(blocks, batch, length):
    """`[S, S]` bool of a batch element: whether an element is in a partial block, and whether in a full one."""
    return (
        listed(count[batch, 0], index[batch, 0], length)
        for count, index in (
            (blocks.partial_count, blocks.partial_index),
            (blocks.full_count, blocks.full_index),
        )
    )


def listed(count, index, length):
    assert count.dtype == index.dtype == torch.int32
    found = torch.zeros(len(count), index.shape[-1], dtype=torch.bool)  # [keys' blocks, queries' blocks]
    for keys, number in enumerate(count.tolist()):
        found[keys, index[keys, :number].long()] = True
    elements = found.T.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return elements[:length, :length]
