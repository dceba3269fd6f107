"""reference.py, the meaning: against the detach idiom, ordinary derivatives, and loops over single elements."""

import itertools
import math

import cases
import pytest
import torch
import torch.nn.functional as F

from gradroute import (
    AttentionSites,
    EmbeddingSites,
    LinearSites,
    NormSites,
    Routes,
    backends,
    reference,
    routed_attention,
    routed_embedding,
    routed_linear,
    routed_rms_norm,
    testing,
)
from gradroute.testing import assert_result_within_budget, make_table, sample

# Both sides are fp64 and round differently: the floor of the budget for fp64, see testing.excess.


def assert_means_the_detach_idiom(call):
    detached = call.run_detached()
    exact = call.in_float64().run_detached()  # the same, but for norms that compute in fp32
    assert_result_within_budget(call.run("reference"), exact, detached, call.op)
    plain = call.run_plain()
    assert_result_within_budget(plain, exact, detached, f"{call.op} in plain PyTorch")


@pytest.mark.parametrize("strength", testing.STRENGTHS)
@pytest.mark.parametrize("op", backends.OPS)
def test_every_site_and_variant_is_the_detach_idiom(op, strength):
    """Random weights in {0, 1, 0.5, -0.75}; every site alone, and all together."""
    for sites, variant in itertools.product(("all", *testing.site_names(op)), testing.variants(op)):
        tokens = (1, 19) if "documents" in variant else (2, 19)
        call = sample(op, dtype=torch.float64, tokens=tokens, strength=strength, sites=sites, **variant)
        assert_means_the_detach_idiom(call)


@pytest.mark.parametrize("tables", testing.TABLE_KINDS)
@pytest.mark.parametrize("op", backends.OPS)
def test_every_kind_of_table_is_the_detach_idiom(op, tables):
    # Among few keys the gradient of a score cancels to mere rounding.
    few = (1, 5) if op == "routed_attention" else (1, 1)
    for tokens in ((1, 0), few, (1, 37), (2, 65)):
        call = sample(op, dtype=torch.float64, tokens=tokens, tables=tables, strength="token", bias=False)
        assert_means_the_detach_idiom(call)


@pytest.mark.parametrize("op", backends.OPS)
def test_its_gradients_are_derivatives_where_every_weight_is_one(op):
    """Against finite differences. Routed gradients differ from the derivative by design."""
    sizes = testing.Sizes(d_model=5, d_ff=3, vocabulary=4, heads=2, kv_heads=1, head_dim=3)
    tokens = (1, 6) if op == "routed_attention" else 3
    for variant in testing.variants(op):
        if "padding_idx" in variant:
            continue  # its row is read and does not learn
        call = sample(
            op, dtype=torch.float64, tokens=tokens, tables="ones", sizes=sizes, **variant
        ).in_float64()
        names = call.differentiable

        def function(*leaves, call=call, names=names):
            return call.call(call.tensors | dict(zip(names, leaves, strict=True)), "reference")

        assert torch.autograd.gradcheck(function, [call.leaves()[name] for name in names])


def test_masks_are_the_formula():
    """m = W[r], with strength lerp(W[0], W[r], s): spelled out element by element."""
    weights = [[0.5, 1.0, -0.75], [0.0, 1.0, 0.25]]
    ids, strength = [0, 1, 1, 1], [1.0, 1.0, 0.0, 0.5]
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    routes = Routes.of(ids, 2, strength=torch.tensor(strength))
    y = reference.route_grad(x, routes, testing.Table(weights))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.tolist() == [
        [weights[0][f] + s * (weights[r][f] - weights[0][f]) for f in range(3)]
        for r, s in zip(ids, strength, strict=True)
    ]


def test_masked_product_rounds_once():
    """fp32 product of the fp32 weight, rounded to bf16: another rounding of the weight would show."""
    weight, g = 1 / 3, torch.linspace(-3, 3, 101).bfloat16()
    x = torch.zeros(101, 1, dtype=torch.bfloat16, requires_grad=True)
    y = reference.route_grad(x, Routes.of(torch.zeros(101, dtype=torch.int64), 1), testing.Table([[weight]]))
    (dx,) = torch.autograd.grad(y, x, g[:, None])
    assert torch.equal(dx[:, 0], (torch.tensor(weight) * g.float()).bfloat16())
    assert not torch.equal(dx[:, 0], torch.tensor(weight).bfloat16() * g)


# Attention's edges, element by element.


def attention_by_loops(q, k, v, dz, ids, score_edges, value_edges):
    """dq, dk, dv of one causal head `[S, D]` as nested lists: design §3 written as loops."""
    size, width = range(len(q)), range(len(q[0]))
    scale = 1 / math.sqrt(len(q[0]))
    dq, dk, dv = ([[0.0 for _ in width] for _ in size] for _ in range(3))
    for i in size:
        scores = [scale * sum(q[i][d] * k[j][d] for d in width) for j in range(i + 1)]
        exponentials = [math.exp(score - max(scores)) for score in scores]
        p = [e / sum(exponentials) for e in exponentials]
        o = [sum(p[j] * v[j][d] for j in range(i + 1)) for d in width]
        rowsum = sum(dz[i][d] * o[d] for d in width)
        for j in range(i + 1):
            edge = value_edges[ids[i]][ids[j]]
            for d in width:
                dv[j][d] += edge * p[j] * dz[i][d]
            dp = sum(dz[i][d] * v[j][d] for d in width)
            ds = score_edges[ids[i]][ids[j]] * p[j] * (dp - rowsum)
            for d in width:
                dq[i][d] += scale * ds * k[j][d]
                dk[j][d] += scale * ds * q[i][d]
    return dq, dk, dv


def test_attention_edges_are_the_loops():
    generator = torch.Generator().manual_seed(0)
    q, k, v, dz = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    ids = [0, 1, 2, 1, 0, 2]
    score_edges = [[1.0, 0.0, 0.5], [-0.75, 1.0, 0.0], [0.5, 1.0, 1.0]]
    value_edges = [[1.0, 0.5, 0.0], [0.0, 1.0, -0.75], [1.0, 0.0, 1.0]]
    expected = attention_by_loops(*(t.tolist() for t in (q, k, v, dz)), ids, score_edges, value_edges)
    leaves = [t.view(1, 1, 6, 3).clone().requires_grad_() for t in (q, k, v)]
    sites = AttentionSites(score_edges=score_edges, value_edges=value_edges)
    z = routed_attention(*leaves, Routes.of([ids], 3), sites, backend="reference")
    for got, want in zip(torch.autograd.grad(z, leaves, dz.view_as(z)), expected, strict=True):
        # Sums of at most 18 products of order one: 1e-14 is 45 eps.
        torch.testing.assert_close(got[0, 0], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-14)


def test_attention_edges_that_forbid_a_route_to_teach_another():
    """A value of route 0 has the gradient it has when queries of route 1 have no loss."""
    call = sample("routed_attention", dtype=torch.float64, tokens=(1, 12), sites=(), num_routes=2)
    edges = AttentionSites(value_edges=[[1.0, 1.0], [0.0, 1.0]], score_edges=[[1.0, 1.0], [0.0, 1.0]])
    taught = call.routes.ids.view(1, 1, -1, 1) == 0
    routed = call.with_sites(edges).run("reference").gradients
    silent = call.with_upstream(call.upstream * taught).run("reference").gradients
    of_route_0 = taught.expand_as(silent["k"])
    for name in ("k", "v"):
        torch.testing.assert_close(routed[name][of_route_0], silent[name][of_route_0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("variant", [{}, {"causal": False}, {"window": 3}])
def test_attention_keeps_documents_apart(variant):
    """cu_seqlens gives what separate calls give, forward and backward."""
    call = sample(
        "routed_attention", dtype=torch.float64, tokens=(1, 20), documents=3, strength="token", **variant
    )
    whole = call.run("reference")
    bounds = call.keywords["cu_seqlens"].tolist()
    for start, stop in itertools.pairwise(bounds):
        tensors = {name: tensor[:, :, start:stop] for name, tensor in call.tensors.items()}
        keywords = {name: value for name, value in call.keywords.items() if name != "cu_seqlens"}
        part = testing.Sample(
            op=call.op,
            tensors=tensors,
            routes=call.routes[:, start:stop],
            sites=call.sites,
            keywords=keywords,
            upstream=call.upstream[:, :, start:stop],
        ).run("reference")
        torch.testing.assert_close(part.output, whole.output[:, :, start:stop], rtol=0, atol=1e-14)
        for name, gradient in part.gradients.items():
            torch.testing.assert_close(gradient, whole.gradients[name][:, :, start:stop], rtol=0, atol=1e-14)


def test_a_query_that_sees_no_key_gives_zero():
    call = sample(
        "routed_attention", dtype=torch.float64, tokens=(1, 6), strength="token", sites=("query", "heads")
    )
    hidden = torch.zeros(1, 6, dtype=torch.bool)
    hidden[:, 3:] = True  # the first three queries, causal, see only hidden keys
    call = testing.Sample(call.op, call.tensors, call.routes, call.sites, {"key_mask": hidden}, call.upstream)
    result = call.run("reference")
    assert not result.output[:, :, :3].any()
    assert result.output[:, :, 3:].abs().min() > 0
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())
    assert not result.gradients["q"][:, :, :3].any()


def small_model(parameters, tokens, routes, cu_seqlens):
    """Embedding, norm, attention inside documents, output projection: every parameter routed per token."""
    width = parameters["embedding"].shape[1]
    table = {width: make_table("dense", 3, width, seed=1), 7: make_table("dense", 3, 7, seed=2)}
    x = routed_embedding(
        tokens, parameters["embedding"], routes, EmbeddingSites(update=table[width]), backend="reference"
    )
    x = routed_rms_norm(x, parameters["norm"], routes, NormSites(update=table[width]), backend="reference")
    sites = LinearSites(update_rows=table[width])
    q, k, v = (
        routed_linear(x, parameters[name], None, routes, sites, backend="reference")
        .unflatten(-1, (2, -1))
        .transpose(1, 2)
        for name in ("query", "key", "value")
    )
    z = routed_attention(q, k, v, routes, AttentionSites(), cu_seqlens=cu_seqlens, backend="reference")
    z = z.transpose(1, 2).flatten(2)
    return routed_linear(
        z,
        parameters["out"],
        None,
        routes,
        LinearSites(update_rows=table[7], update_cols=table[width]),
        backend="reference",
    )


def test_documents_of_different_routes_update_as_their_single_route_batches_do():
    """Parameter routing, attention inside documents: the mixed batch's gradient is the sum over its routes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = 8
    parameters = {
        "embedding": normal(11, width),
        "norm": normal(width),
        **{name: normal(width, width) / width**0.5 for name in ("query", "key", "value")},
        "out": normal(7, width),
    }
    parameters = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
    bounds, routes_of_documents = [0, 5, 9, 16, 20], [0, 2, 1, 2]
    tokens = torch.randint(11, (1, 20), generator=generator)
    targets = torch.randint(7, (20,), generator=generator)
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    ids = torch.tensor(routes_of_documents).repeat_interleave(torch.tensor(lengths))

    def gradients(wanted):
        """The gradients of the loss of the documents whose route is in `wanted`, packed into one batch."""
        documents = [document for document, route in enumerate(routes_of_documents) if route in wanted]
        index = torch.cat([torch.arange(bounds[document], bounds[document + 1]) for document in documents])
        ends = list(itertools.accumulate([lengths[document] for document in documents], initial=0))
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        logits = small_model(parameters, tokens[:, index], Routes.of(ids[None, index], 3), cu_seqlens)
        loss = F.cross_entropy(logits[0], targets[index], reduction="sum")
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    mixed = gradients({0, 1, 2})
    single = [gradients({route}) for route in range(3)]
    for name, gradient in mixed.items():
        total = sum(part[name] for part in single)
        # fp64 sums over 20 tokens of gradients of order ten: 1e-12 is some hundred eps of them.
        torch.testing.assert_close(gradient, total, rtol=0, atol=1e-12)
        assert gradient.abs().max() > 0.01


def test_uninitialised_memory_is_poisoned():
    """The promise of conftest.py: an element that nothing writes is NaN, or the largest integer."""
    x = torch.zeros(2)
    for memory in (torch.empty(3), x.new_empty(3), torch.empty_like(x), x.new_empty(3, dtype=torch.bfloat16)):
        assert memory.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def test_covering_samples_cover():
    """Every two values of different axes meet in some case."""
    axes = {"a": range(5), "b": "xyz", "c": (True, False)}
    rows = list(cases.covering(axes))
    assert len(rows) < 5 * 3 * 2
    for first, second in itertools.combinations(axes, 2):
        seen = {(row[first], row[second]) for row in rows}
        assert seen == set(itertools.product(axes[first], axes[second]))
