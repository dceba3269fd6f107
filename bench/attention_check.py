"""The numbers that a variant of attention must give: the reference in fp64, and eager PyTorch for the error budget.

Both have `[S, S]` matrices. Key/value heads of batch elements have nothing to do with each other, so each is computed
on its own: even a long call is checked whole, on the inputs that are timed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradroute import AttentionSites
from gradroute.tables import Table
from gradroute.testing import Marks, Result, Sample

HOW = (
    "every variant, before it is timed, on the inputs that are timed, output and gradients: against the reference in "
    "fp64, by batch element and key/value head, within the budget of gradroute.testing.excess, for which plain PyTorch "
    "is eager, with [S, S] matrices"
)


def exact_and_plain(call: Sample) -> tuple[Result, Result]:
    """The exact result of a call, in fp64, and the result of eager PyTorch at the call's dtype."""
    exact, plain = [], []
    for part in parts(call):
        exact.append(part.in_float64().run("reference"))
        plain.append(result(part, lambda part=part, **tensors: eager(part, **tensors)))
    elements = call.upstream.shape[0]
    return joined(exact, elements), joined(plain, elements)


def result(call: Sample, forward: Callable[..., Tensor]) -> Result:
    """The output of a forward (q, k, v) → z and the gradients that the call's upstream gradient gives."""
    leaves: dict[str, Any] = call.leaves()
    z = forward(**leaves)
    gradients = torch.autograd.grad(z, tuple(leaves.values()), call.upstream)
    return Result(z.detach(), dict(zip(leaves, gradients, strict=True)))


def parts(call: Sample) -> Iterator[Sample]:
    """The call on each key/value head of each batch element: q `[1, H / G, S, D]`; k, v `[1, 1, S, D]`."""
    elements, kv_heads = call.upstream.shape[0], call.tensors["k"].shape[1]
    group = call.upstream.shape[1] // kv_heads
    for element in range(elements):
        for kv_head in range(kv_heads):
            heads, kv = slice(group * kv_head, group * (kv_head + 1)), slice(kv_head, kv_head + 1)
            of = {"q": heads, "k": kv, "v": kv}
            one = slice(element, element + 1)
            yield Sample(
                op=call.op,
                tensors={name: tensor[one, of[name]] for name, tensor in call.tensors.items()},
                routes=None if call.routes is None else call.routes[one],
                sites=of_heads(call.sites, heads, kv),
                keywords=call.keywords,
                upstream=call.upstream[one, heads],
            )


def of_heads(sites: AttentionSites, heads: slice, kv: slice) -> AttentionSites:
    """The tables' columns of some heads; edges have none."""
    wanted = {"query": heads, "heads": heads, "key": kv, "value": kv}
    return AttentionSites(
        **{
            site: Table(table.weights[:, wanted[site]]) if site in wanted and table.features > 1 else table
            for site, table in sites.tables.items()
        }
    )


def joined(results: list[Result], elements: int) -> Result:
    """The results of the parts of a call joined to one of the whole call."""

    def whole(tensors: list[Any]) -> Tensor:
        heads = len(tensors) // elements
        rows = [torch.cat(tensors[heads * row : heads * (row + 1)], 1) for row in range(elements)]
        return torch.cat(rows)

    gradients = {name: whole([one.gradients[name] for one in results]) for name in results[0].gradients}
    return Result(whole([one.output for one in results]), gradients)


def eager(call: Sample, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A causal call with `[S, S]` matrices, under ordinary autograd: q `[B, H, S, D]`, k, v `[B, G, S, D]`."""
    marks = Marks(call.routes, {} if call.routes is None else call.tables)
    batch, group = q.shape[0], q.shape[1] // k.shape[1]
    q = marks.by_head("query", q)
    k = marks.by_head("key", k).repeat_interleave(group, 1)
    v = marks.by_head("value", v).repeat_interleave(group, 1)
    s = q @ k.mT * q.shape[-1] ** -0.5
    edges = marks.edges("score_edges", batch, q.dtype)
    if edges is not None:
        s = marks.detached(edges, s)
    hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    p = s.masked_fill(hidden, -torch.inf).softmax(-1)
    edges = marks.edges("value_edges", batch, q.dtype)
    if edges is None:
        o = p @ v
    else:  # a second product, which adds 0, has the gradient of v
        taught = (edges * p).detach() @ v
        o = p @ v.detach() + (taught - taught.detach())
    return marks.by_head("heads", o)
