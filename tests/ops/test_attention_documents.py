"""The bounds of documents: refused where tokens are in none or in two; as backend triton finds them, once a batch."""

import gc
import warnings
import weakref
from functools import partial

import pytest
import torch

import gradroute.documents
from gradroute import AttentionSites, Routes, attention, backends, routed_attention
from gradroute.models import RouteCollator
from gradroute.testing import assert_same_bits, sample

documents = pytest.importorskip("gradroute.kernels.attention.documents")

BOUNDS = [
    ([0, 37], 37),
    ([0, 1, 30, 30, 37], 37),  # one token; an empty document
    ([0, 0, 5, 5, 5, 9, 40], 40),
    ([0, 0, 37, 37], 37),  # empty ones first and last
    ([0, *range(7, 700, 7), 700], 700),  # two blocks of positions
    ([0], 0),
    ([0, 0], 0),
]

MALFORMED = {
    "a first token in no document": [1, 5, 12],
    "a last token in no document": [0, 5, 11],
    "more tokens than there are": [0, 5, 13],
    "not ascending": [0, 9, 5, 12],
    "no document": [0],
}

every_malformed = pytest.mark.parametrize("bounds", MALFORMED.values(), ids=MALFORMED)


def packed(bounds, device, tokens=12):
    """The arguments of a call of attention with these bounds of documents."""
    q = torch.randn(1, 2, tokens, 16, device=device)
    routes = Routes.of(torch.zeros(1, tokens, dtype=torch.int64, device=device), 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    return {"q": q, "k": q, "v": q, "routes": routes, "sites": None, "cu_seqlens": cu_seqlens}


@every_malformed
@pytest.mark.parametrize("backend", [*backends.OPS["routed_attention"], None])
def test_bounds_that_leave_tokens_out_are_refused(bounds, backend):
    """On every backend alike, before anything runs; on CUDA, where nobody waits, by an assertion on the device."""
    call = packed(bounds, "cpu")
    message = (
        rf"cu_seqlens: got \[{bounds[0]}.*\], expected bounds that ascend from 0 to 12, the number of tokens"
    )
    for routing in ({}, {"sites": AttentionSites(query=[[0.5]])}, {"routes": None}):
        for function in (routed_attention, attention.explain):
            with pytest.raises(ValueError, match=message):
                function(**(call | routing), backend=backend)


def test_compiled_code_asserts_them():
    """As CUDA does, without reading them: here, where an assertion that fails ends no process."""
    compiled = torch.compile(lambda call: routed_attention(**call), fullgraph=True, backend="aot_eager")
    right = packed([0, 0, 5, 12], "cpu")
    assert torch.equal(compiled(right), routed_attention(**right))
    for bounds in ([1, 5, 8, 12], [0, 5, 8, 11], [0, 9, 5, 12]):
        with pytest.raises(
            RuntimeError, match="cu_seqlens: expected bounds that ascend from 0 to the number"
        ):
            compiled(right | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})


def test_the_layers_of_a_batch_check_them_once(monkeypatch):
    """And again what was written to; a batch without routes in every call."""
    checked, check = [], gradroute.documents._check
    monkeypatch.setattr(gradroute.documents, "_check", lambda *given: checked.append(given) or check(*given))
    call = packed([0, 5, 12], "cpu")
    for _ in range(3):
        attention.explain(**call)
    assert len(checked) == 1
    call["cu_seqlens"][1] = 13
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[0, 13, 12\]"):
        attention.explain(**call)
    for _ in range(2):
        attention.explain(**packed([0, 5, 12], "cpu") | {"routes": None})
    assert len(checked) == 4


def test_the_collator_makes_the_padding_of_packed_rows_a_document(device):
    examples = [{"input_ids": [1] * n, "route_ids": 0} for n in (3, 4)]
    batch = RouteCollator(pad_token_id=0, pad_to_multiple_of=12, packed=True)(examples)
    call = packed(batch["cu_seq_lens_q"].tolist(), device)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 7, 12]
    alone = {name: call[name][:, :, 7:] for name in "qkv"}
    padding = routed_attention(**alone, routes=None, sites=None)
    torch.testing.assert_close(routed_attention(**call)[:, :, 7:], padding)


@pytest.fixture
def able(device):
    if "triton" not in backends.available_backends("routed_attention", device):
        pytest.skip("triton does not run here")


@pytest.fixture
def launches(monkeypatch):
    """The launches that find bounds, in their order."""
    found, launch = [], documents.launch

    def counted(*args, **arguments):
        found.append(arguments["bounds"])
        launch(*args, **arguments)

    monkeypatch.setattr(documents, "launch", counted)
    return found


@pytest.mark.parametrize(("bounds", "length"), BOUNDS)
@pytest.mark.usefixtures("able")
def test_every_position_has_the_bounds_of_its_document(bounds, length, device):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    begins, ends = documents.document_bounds(None, cu_seqlens, length).tolist()
    for position in range(length):
        number = sum(bound <= position for bound in bounds[1:])
        assert (begins[position], ends[position]) == (bounds[number], bounds[number + 1])


@pytest.mark.usefixtures("able")
def test_strided_bounds(device):
    cu_seqlens = torch.tensor([0, 99, 4, 99, 9], dtype=torch.int32, device=device)[::2]
    assert documents.document_bounds(None, cu_seqlens, 9).tolist() == [
        [0] * 4 + [4] * 5,
        [4] * 4 + [9] * 5,
    ]


def call_of(device):
    return sample("routed_attention", tokens=(1, 20), documents=3, sites=("query",), device=device)


@pytest.mark.usefixtures("able")
def test_the_layers_of_a_batch_share_them(device, launches):
    call = call_of(device)
    first = call.run("triton")
    assert_same_bits(call.run("triton"), first, "the second layer")
    assert len(launches) == 1


@pytest.mark.usefixtures("able")
def test_without_routes_the_backward_takes_those_of_the_forward(device, launches):
    call_of(device).with_routes(None).run("triton")
    assert len(launches) == 1


@pytest.mark.usefixtures("able")
def test_documents_that_were_written_to_are_found_anew(device, launches):
    """And a backward takes those of its own forward."""
    call, other = call_of(device), call_of(device)
    first = call.run("triton")
    leaves = call.leaves()
    output = call.call(leaves, "triton")
    for each in (call, other):
        each.keywords["cu_seqlens"].copy_(torch.tensor([0, 2, 9, 20]))
    late = torch.autograd.grad(output, list(leaves.values()), call.upstream)
    assert all(torch.equal(one, other) for one, other in zip(late, first.gradients.values(), strict=True))
    assert_same_bits(call.run("triton"), other.run("triton"), "written to")
    assert len(launches) == 3


@pytest.mark.usefixtures("able")
def test_another_tensor_is_found_anew_and_none_is_kept_longer_than_the_routes(device, launches):
    q = torch.randn(1, 2, 12, 16, device=device)
    routes = Routes.of(torch.zeros(1, 12, dtype=torch.int64, device=device), 1)
    sites = AttentionSites(query=[[0.5]])
    kept = []
    for bounds in ([0, 5, 12], [0, 7, 12]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        routed_attention(q, q, q, routes, sites, cu_seqlens=cu_seqlens, backend="triton")
        kept.append(weakref.ref(cu_seqlens))
    del cu_seqlens
    assert [bounds[1, 0].item() for bounds in launches] == [5, 7]
    launches.clear()
    del routes
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


@pytest.mark.usefixtures("able")
def test_under_inference_mode_they_are_found_and_not_shared(device, launches):
    with torch.inference_mode():
        call = call_of(device)
        for _ in range(2):
            call.call(call.tensors, "triton")
    assert len(launches) == 2


def test_documents_are_refused_under_jit_trace():
    """torch.jit.trace itself fails there with "unordered_map::at"."""
    q = torch.randn(1, 2, 8, 8)
    routes, sites = Routes.of(torch.tensor([[0, 1] * 4]), 2), AttentionSites(heads=torch.ones(2, 2) / 2)
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    call = partial(routed_attention, routes=routes, sites=sites, cu_seqlens=bounds, backend="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        with pytest.raises(ValueError, match=r"cu_seqlens: .* under torch\.jit\.trace"):
            torch.jit.trace(lambda q: call(q, q, q), (q,))
