"""routed_attention with FlashAttention-4's backward, from the choice to the gradients; without a GPU it is emulated."""

import emulated_fa4
import emulated_vendors
import pytest
import torch
from cases import assert_same_numbers, plan_of, tiered
from test_attention import assert_as_stated, make_call
from test_attention_fa4 import BINARY, TABLES

from gradroute import AttentionSites, Routes, Table, routed_attention
from gradroute.backends.fa4 import refusals
from gradroute.backends.vendor import machine
from gradroute.testing import Result

BY_HEAD = ("query", "key", "value", "heads", "forward_heads")
OPTIONS = {
    "causal": {},
    "window": {"window": 30},
    "documents": {"batch": 1, "cu_seqlens": torch.tensor([0, 1, 90, 140], dtype=torch.int32)},
    "padding": {"key_mask": (torch.arange(140) % 100 > 3).expand(2, -1)},
}


@pytest.fixture(params=tiered([(9, 0), (10, 0)]), ids=str)
def fa4(request, device, monkeypatch, free):
    """A function that says that the library ran so many passes: the real one, on a GPU, or the emulated one.

    The parameter is the GPU's compute capability.
    """
    if device.type == "cuda":
        why = refusals.why_not_installed()
        if why is not None or machine.capability(None) != request.param:
            pytest.skip(why or f"this GPU is not of compute capability {request.param}")
        return lambda number: None
    emulated_vendors.use_on_the_cpu(monkeypatch, request.param)
    library = emulated_fa4.use_on_the_cpu(monkeypatch, request.param)

    def ran(number):
        assert len(library.masked) == number

    return ran


def call_with(device, tables, **options):
    edges = dict(zip(("score_edges", "value_edges"), tables, strict=True))
    edges = {site: table for site, table in edges.items() if table is not None}
    return make_call(
        device, **{"head_dim": 64, "length": 140, "dtype": torch.bfloat16} | options, tables=edges
    )


@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
def test_every_kind_of_tables(device, fa4, tables):
    *edges, number = tables
    call = call_with(device, edges, sites=BY_HEAD, strength=True)
    assert plan_of(call, "torch").backward == "fa4"
    assert_as_stated(call, "torch")
    fa4(number)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["both, fractional", "scores, negative"])
def test_every_pattern(device, fa4, name, options):
    call = call_with(device, TABLES[name][:2], **options)
    assert plan_of(call, "torch").backward == "fa4"
    assert_as_stated(call, "torch")
    fa4(1)


@pytest.mark.parametrize(
    "options",
    tiered([{"dtype": torch.float16}, {"head_dim": 96}, {"head_dim": 128}, {"kv_heads": 4}, {"kv_heads": 1}]),
    ids=str,
)
def test_other_shapes_and_dtypes(device, fa4, options):
    call = call_with(device, TABLES["both, fractional"][:2], **options)
    assert plan_of(call, "torch").backward == "fa4"
    assert_as_stated(call, "torch")


@pytest.mark.parametrize("backend", ["torch", "cuda"])
def test_backends_that_mask_around_it(backend, device, fa4):
    """The forward has the bits of the call without masks of gradients."""
    call = call_with(device, (BINARY, BINARY), sites=BY_HEAD, batch=1)
    assert plan_of(call, backend).backward == "fa4"
    result = assert_as_stated(call, backend)
    unrouted = call.with_sites(AttentionSites(forward_heads=call.sites.forward_heads)).run(backend)
    assert torch.equal(result.output, unrouted.output.cpu())


def test_gradients_that_are_expanded_or_transposed(device, fa4):
    call = call_with(device, (BINARY, BINARY), batch=1)
    expected = call.run("torch")
    upstream = call.upstream.mT.contiguous().mT
    assert_same_numbers(call.with_upstream(upstream).run("torch"), expected, "transposed")
    zero_stride = call.upstream[:, :, :1].expand_as(call.upstream)
    assert_same_numbers(
        call.with_upstream(zero_stride).run("torch"),
        call.with_upstream(zero_stride.contiguous()).run("torch"),
        "expanded",
    )


@pytest.mark.slow
def test_compiled_code_has_the_op_and_the_same_bits(device, fa4):
    call = call_with(device, (BINARY, BINARY), batch=1, length=64)
    keywords = {"routes": call.routes, "sites": call.sites, "backend": "torch"}
    compiled = torch.compile(
        lambda q, k, v: routed_attention(q, k, v, **keywords), fullgraph=True, backend="aot_eager"
    )
    leaves = call.leaves()
    z = compiled(**leaves)
    gradients = torch.autograd.grad(z, tuple(leaves.values()), call.upstream)
    result = Result(z.detach(), dict(zip(leaves, gradients, strict=True)))
    assert_same_numbers(result, call.run("torch"), "compiled")
    fa4(2)


def test_one_token(device, fa4):
    q, k, v = (
        torch.randn(1, 2, 1, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3)
    )
    routes = Routes.of(torch.zeros(1, 1, dtype=torch.int32, device=device), 2)
    sites = AttentionSites(value_edges=Table([[0.5, 1.0], [1.0, 1.0]]))
    z = routed_attention(q, k, v, routes, sites, backend="torch")
    _, _, dv = torch.autograd.grad(z, (q, k, v), torch.ones_like(z))
    assert torch.equal(dv, torch.full_like(dv, 0.5))
