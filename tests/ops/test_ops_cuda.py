"""Every op on a GPU: CUDA graphs, streams, devices, and no waiting for the device."""

import cases
import pytest
import torch
from cases import every_function_backend, every_op_backend
from device_state import without_waiting

from gradroute import Routes, testing
from gradroute.testing import assert_same_bits, sample


@pytest.mark.setup("CUDA graphs", "every op, with Routes made inside the capture", unrun=True)
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_cuda_graph(backend):
    """Forward and backward with Routes made inside the capture; replays on new inputs have the bits of eager runs."""
    calls = [sample("routed_gated_mlp", strength="token", device="cuda", seed=seed) for seed in range(3)]
    calls = [call.with_sites(calls[0].sites) for call in calls]
    inputs = {name: calls[0].tensors[name].clone().requires_grad_() for name in calls[0].differentiable}
    ids, strength, upstream = (
        tensor.clone() for tensor in (calls[0].routes.ids, calls[0].routes.strength, calls[0].upstream)
    )

    def step():
        routes = Routes.of(ids, 4, strength=strength, validate=False)
        output = calls[0].with_routes(routes).call(inputs, backend)
        return output, torch.autograd.grad(output, list(inputs.values()), upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = step()
    for call in calls:
        with torch.no_grad():
            for name, tensor in inputs.items():
                tensor.copy_(call.tensors[name])
        for static, new in (
            (ids, call.routes.ids),
            (strength, call.routes.strength),
            (upstream, call.upstream),
        ):
            static.copy_(new)
        expected = call.run(backend)
        for _ in range(2):
            graph.replay()
            replayed = testing.Result(output.detach(), dict(zip(inputs, gradients, strict=True)))
            assert_same_bits(replayed, expected, "replay")


@pytest.mark.gpu
@every_function_backend
def test_no_synchronisation_once_routes_exist(op, backend):
    call = cases.make(op, on=backend, strength="token", device="cuda")
    expected = call.run(backend)  # copies the tables to the device
    with without_waiting():
        result = call.run(backend)
    assert_same_bits(result, expected, op)


@pytest.mark.gpu
@every_op_backend
def test_another_stream(op, backend):
    call = cases.make(op, on=backend, strength="token", device="cuda")
    expected = call.run(backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = call.run(backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(result, expected, op)


@pytest.mark.gpu
@every_op_backend
def test_another_device(op, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    result = cases.make(op, on=backend, strength="token", device="cuda:1").run(backend)
    expected = cases.make(op, on=backend, strength="token", device="cuda:0").run(backend)
    moved = testing.Result(
        result.output.to("cuda:0"), {name: g.to("cuda:0") for name, g in result.gradients.items()}
    )
    assert_same_bits(moved, expected, op)
