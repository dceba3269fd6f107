"""Products of a backward by oneDNN, and ops that are called without torch.library where nobody would see it."""

from __future__ import annotations

import warnings

import cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradroute import Routes, Table, backends
from gradroute.primitives import products

has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def onednn(monkeypatch):
    """Every product that may be oneDNN's is, on any processor."""
    if not has_onednn:
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(products, "COPIED", 16)


def matrices(rows, inner, cols, transposed):
    """A matrix `[rows, inner]` and one `[inner, cols]`, of which `transposed` lie the other way round in memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = zip(((rows, inner), (inner, cols)), transposed, strict=True)
    return [
        torch.randn(*shape[::-1], generator=generator).T
        if turned
        else torch.randn(*shape, generator=generator)
        for shape, turned in shapes
    ]


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("sizes", [(64, 32, 48), (37, 1, 5), (1, 70, 3)])
def test_products_by_onednn_are_products(sizes, transposed, onednn):
    a, b = matrices(*sizes, transposed)
    assert products.by_onednn(a, b)
    exact = a.double() @ b.double()
    bound = 2 * sizes[1] * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs())
    assert ((products.product(a, b).double() - exact).abs() <= bound).all()
    total = torch.ones(sizes[0], sizes[2])
    added = products.plus_product(total, a, b)
    assert added is total
    assert products.product(a, b).is_contiguous()
    assert ((added.double() - 1 - exact).abs() <= 2 * bound + 1e-6).all()


def test_parts_of_matrices_are_made_dense(onednn):
    """A part of a larger matrix as it is would keep its numbers, and take oneDNN a thousand times as long."""
    whole = torch.arange(30.0).view(5, 6)
    for matrix in (whole, whole.T, whole[1:3]):
        assert products.dense(matrix) is matrix
    for part in (whole[:, 1:4], whole.T[1:4], whole[:, ::2], whole[:1].expand(4, 6)):
        assert products.dense(part).is_contiguous()
        other = torch.ones(part.shape[1], 2)
        assert torch.equal(products.product(part, other), part @ other)
        assert torch.equal(products.product(other.T, part.T), other.T @ part.T)


@pytest.mark.parametrize("sizes", [(8, 40, 12), (12, 40, 8)])
def test_of_operands_by_columns_some_rows_of_the_smaller_one_are_copied(sizes, onednn, monkeypatch):
    a, b = matrices(*sizes, (True, False))
    firsts, by_onednn = [], products._onednn
    monkeypatch.setattr(products, "_onednn", lambda a, b: firsts.append(a.shape) or by_onednn(a, b))
    torch.testing.assert_close(products.product(a, b), a @ b)
    assert firsts == [(8, 16), (8, 16), (8, 8)]


class Seen(TorchDispatchMode):
    """The names of the operations that run inside it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_other_products_are_torchs_own(onednn):
    a, b = matrices(8, 8, 8, (False, False))
    assert products.by_onednn(a, b)
    assert not products.by_onednn(a.double(), b.double())
    assert not products.by_onednn(a.bfloat16(), b.bfloat16())
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not products.by_onednn(a, b)
    with Seen() as seen:
        products.product(a, b)
    assert seen.names == ["aten::mm"]


def test_small_products_are_torchs_own(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    a, b = matrices(8, 8, 8, (False, False))
    assert torch.equal(products.product(a, b), a @ b)
    assert not products.by_onednn(a, b)


@pytest.mark.parametrize("op", ["routed_linear", "routed_mlp", "routed_gated_mlp"])
@pytest.mark.parametrize("tables", ["blocks", "dense"])
def test_backwards_keep_the_budget(op, tables, onednn):
    cases.require("cpu", torch.device("cpu"))
    call = cases.make(op, tokens=256, tables=tables)
    call.assert_within_budget("cpu")
    cases.assert_same_numbers(call.run("cpu"), call.run("cpu"), op)


# Ops without torch.library


def a_masked_product():
    g = torch.randn(4, 8)
    routes = Routes.of(torch.tensor([0, 1, 0, 1]), 2)
    return g, lambda: backends.primitives("cpu").masked_product(g, routes, Table([[1.0] * 8, [0.5] * 8]))


def test_a_mode_and_a_profiler_see_every_op():
    cases.require("cpu", torch.device("cpu"))
    g, masked = a_masked_product()
    unseen = masked()
    with Seen() as seen:
        watched = masked()
    assert "gradroute::native_masked_product" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = masked()
    assert "gradroute::native_masked_product" in [event.key for event in profile.key_averages()]
    assert torch.equal(unseen, watched)
    assert torch.equal(unseen, profiled)
    assert torch.equal(unseen[::2], g[::2])


def test_a_trace_has_the_op():
    """The launcher writes into memory, of which a trace would know nothing."""
    cases.require("cpu", torch.device("cpu"))
    routes, table = Routes.of(torch.tensor([0, 1, 0, 1]), 2), Table([[1.0] * 8, [0.5] * 8])
    masked_product = backends.primitives("cpu").masked_product
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and lists are constants to it
        traced = torch.jit.trace(lambda g: masked_product(g, routes, table), torch.ones(4, 8))
    g = torch.randn(4, 8)
    assert torch.equal(traced(g), masked_product(g, routes, table))


def test_an_op_that_nobody_sees_is_a_call(monkeypatch):
    cases.require("cpu", torch.device("cpu"))
    masked = a_masked_product()[1]
    expected = masked()

    def refuse(*args):
        raise AssertionError("torch.library was called")

    packet = torch.ops.gradroute.native_masked_product
    monkeypatch.setattr(type(packet.default), "__call__", refuse)
    assert torch.equal(masked(), expected)
    with pytest.raises(AssertionError, match="was called"), torch.profiler.profile():
        masked()
