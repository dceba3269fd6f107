"""A routed model prepared by Accelerate: plain arguments, accumulation, mixed precision, unwrapping."""

import copy

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import trl_cases as cases
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gradroute.models import RouteCollator, route, unroute

DOCUMENTS = [{"input_ids": cases.ids(5, i), "route_ids": [(i + t) % 2 for t in range(5)]} for i in range(4)]


@pytest.fixture(autouse=True)
def _state():
    """Accelerate keeps the first accelerator's precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(model, size, **options):
    """The model after an epoch in Accelerate's loop, as its prepare() left it, and the accelerator."""
    accelerator = Accelerator(cpu=True, **options)
    loader = torch.utils.data.DataLoader(DOCUMENTS, size, collate_fn=RouteCollator(pad_token_id=0))
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), cases.LEARNING_RATE), loader
    )
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    return model, accelerator


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.setup("Accelerate", "prepare, accumulate")
def test_accumulation(size):
    """Batches of as many tokens, so that the mean of their means is that of all."""
    model = cases.routed()
    prepared, accelerator = trained(copy.deepcopy(model), size, gradient_accumulation_steps=4 // size)
    cases.assert_close(cases.weights(accelerator.unwrap_model(prepared)), cases.stepped_on(model, DOCUMENTS))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.setup("Accelerate", "mixed precision, unwrap_model, then unroute")
def test_mixed_precision_and_unwrapping(keep):
    """Unwrapped, the model is routed still; it is unrouted, and routed again."""
    model = cases.routed()
    plan = model.routing_plan
    batch = RouteCollator(pad_token_id=0)(DOCUMENTS)

    def loss(copied):
        with torch.autocast("cpu", torch.bfloat16):
            return copied(**batch).loss

    prepared, accelerator = trained(copy.deepcopy(model), 4, mixed_precision="bf16")
    expected = cases.stepped(model, loss)
    assert all(torch.equal(value, expected[name]) for name, value in cases.weights(prepared).items())
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
    assert unwrapped.routing_plan.num_routes == plan.num_routes
    unroute(unwrapped)
    del batch["route_ids"]
    with torch.no_grad():
        unwrapped(**batch)
    if not keep:
        route(unwrapped, plan)
