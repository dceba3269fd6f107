"""What is not ordinary: signs before memory, zeros without any, autocast around a backward, tensors written to."""

import copy
import dataclasses
import pickle

import cases
import pytest
import torch
from cases import every_function_backend

from gradroute import AttentionSites, Routes, backends, routed_attention
from gradroute.testing import assert_same_bits

WRITTEN_TO = ["key_mask", "cu_seqlens"]


def negated(tensor):
    """A tensor of the same numbers that is a sign before other memory, as the imaginary part of a conjugate is."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    view = torch._neg_view(-tensor)
    assert view.is_neg()
    return view


@every_function_backend
def test_signs_before_memory_are_read(op, backend, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, device=device, strength=None if op == "routed_attention" else "token")
    expected = call.run(backend)
    tensors = {name: negated(tensor) for name, tensor in call.tensors.items()}
    call = dataclasses.replace(call, tensors=tensors, upstream=negated(call.upstream))
    call.routes.strength = negated(call.routes.strength)
    assert_same_bits(call.run(backend), expected, "negated")


@every_function_backend
def test_zeros_without_memory_give_zeros(op, backend, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, device=device)
    zeros = torch._efficientzerotensor(call.upstream.shape, dtype=call.upstream.dtype, device=device)
    expected = dataclasses.replace(call, upstream=torch.zeros_like(call.upstream)).run(backend)
    assert_same_bits(dataclasses.replace(call, upstream=zeros).run(backend), expected, "zeros")


@every_function_backend
def test_autocast_around_a_backward_changes_nothing(op, backend, device):
    """What a backward computes in was decided when its forward ran."""
    cases.require(backend, device)
    call = cases.make(op, on=backend, device=device)
    leaves = call.leaves()
    wanted = [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]
    output = call.call(leaves, backend)
    expected = torch.autograd.grad(output, wanted, call.upstream, retain_graph=True)
    with torch.autocast(device.type, torch.bfloat16):
        found = torch.autograd.grad(output, wanted, call.upstream)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def attention(backend, device, name):
    """(output, q, the tensor `name` of the pattern) of a call with edges."""
    q = torch.randn(1, 2, 12, 16, device=device, requires_grad=True)
    routes = Routes.of(torch.arange(12, device=device)[None] % 2, 2)
    mask = {
        "key_mask": torch.ones(1, 12, dtype=torch.bool, device=device),
        "cu_seqlens": torch.tensor([0, 5, 12], dtype=torch.int32, device=device),
    }[name]
    sites = AttentionSites(score_edges=[[1, 0], [1, 1]])
    return routed_attention(q, q, q, routes, sites, backend=backend, **{name: mask}), q, mask


@pytest.mark.parametrize("name", WRITTEN_TO)
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_what_a_backward_reads_again_may_not_be_written_to(backend, name, device):
    if backend not in backends.available_backends("routed_attention", device):
        pytest.skip(f"{backend} does not run here")
    output, q, mask = attention(backend, device, name)
    version = mask._version
    mask.zero_()
    if backend == "triton" and name == "cu_seqlens":  # own kernels keep what the forward found of it
        torch.autograd.grad(output.sum(), q)
        return
    with pytest.raises(
        RuntimeError, match=f"{name}: got .* written to after the forward .version {version}, now"
    ):
        torch.autograd.grad(output.sum(), q)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda routes: pickle.loads(pickle.dumps(routes))])
def test_copies_of_routes_derive_anew_from_other_tensors(copied):
    """Whatever identity a tensor has, what another one gave is not taken for its own."""
    routes = Routes.of(torch.zeros(4, dtype=torch.int64), 1)
    one = torch.tensor([1, 2])
    assert routes.derived_from("sum", (one,), one.sum) == 3
    other = copied(routes)
    held = other._derived["sum"][0][0]
    assert held is not one
    for _ in range(20):
        another = torch.tensor([5, 6])
        assert other.derived_from("sum", (another,), another.sum) == 11


def test_what_is_derived_of_tensors_is_shared_and_does_not_pile_up():
    routes, made = Routes.of(torch.zeros(4, dtype=torch.int64), 1), []
    mask = torch.zeros(2, 1, 4)

    def found(tensor):
        return routes.derived_from("sum", (tensor, None), lambda: made.append(1) or tensor.sum().item())

    assert [found(mask), found(mask), found(mask[:, 0]), found(mask[:, 0])] == [0, 0, 0, 0]
    assert len(made) == 2
    mask.add_(1)
    assert found(mask[:, 0]) == 8
    assert found(mask[:1, 0]) == 4
    assert len(made) == 4
    assert list(routes._derived) == ["sum"]
    with torch.inference_mode():
        uncounted = torch.ones(3)
    assert [found(uncounted), found(uncounted)] == [3, 3]
    assert len(made) == 6
