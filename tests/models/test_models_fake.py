"""Routed models under FakeTensorMode: what a memory estimate of a training step does."""

import pytest
from model_zoo import build
from routed_models import all_sites, batch, route
from torch._subclasses.fake_tensor import FakeTensorMode

from gradroute.models import RoutingPlan
from gradroute.optim import routed_param_groups


@pytest.mark.setup("FakeTensorMode", "a model that is made, routed and trained in it")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_models_made_routed_and_trained_under_fake_tensors(name):
    """Every site, in both ways to lay out q, k and v in one linear layer and in three."""
    words, _, ids = batch()
    plan = RoutingPlan(2, **all_sites(name))
    with FakeTensorMode() as mode:
        model = route(name, build(name), plan)
        groups = routed_param_groups(model)
        words, ids = mode.from_tensor(words), mode.from_tensor(ids)
        model(words, route_ids=ids, use_cache=False).logits.sum().backward()
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
