"""Nothing of a call is left on a shared object: threads, forwards inside forwards, routes that serve twice."""

import sys
import threading

import pytest
import torch
from model_zoo import NAMES, backward, logits_of, loss_of
from routed_models import all_sites, batch, check, expect, routed, update_sites

from gradroute import LinearSites, Routes
from gradroute.models import RoutingPlan
from gradroute.models.decoder_layer import DecoderLayer

NOTHING = [[1.0], [0.0]]  # tokens of route 1 may not teach


def of_batch(model, words, targets, **inputs):
    """The gradients of one batch, without writing to `.grad`, which threads share."""
    loss = loss_of(logits_of(model, words, **inputs), targets)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def same(got, expected):
    return all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.setup("Threads", "two threads and more that share a routed model, each with labels of its own")
@pytest.mark.parametrize("name", ["llama", "gpt_neo", "nano_gpt"])
def test_threads_share_a_model(name):
    """Two threads with labels of their own, and one without any, get what each gets alone, bit for bit."""
    model = routed(name, RoutingPlan(2, **all_sites(name)))
    words, targets, ids = batch()
    inputs = [{"route_ids": ids}, {"route_ids": 1 - ids}, {}]
    expected = [of_batch(model, words, targets, **each) for each in inputs]
    assert not same(expected[0], expected[1])
    wrong, ready = [], threading.Barrier(len(inputs))

    def work(each, want):
        try:
            for _ in range(6):
                ready.wait()
                if not same(of_batch(model, words, targets, **each), want):
                    wrong.append(each)
        except Exception as error:
            wrong.append(error)
            ready.abort()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.setup("Modules and hooks", "a hook that calls the same routed model again")
@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
@pytest.mark.parametrize("inner", [True, False])
def test_a_forward_inside_a_forward(name, inner):
    """A hook of one forward calls the same model with other routes, or with none: neither changes the other."""
    model = routed(name, RoutingPlan(2, **update_sites(name)))
    words, targets, ids = batch()
    other = {"route_ids": 1 - ids} if inner else {}
    expected = of_batch(model, words, targets, route_ids=ids), of_batch(model, words, targets, **other)
    found = []

    def call(module, args):
        if not found:
            found.append(None)
            found[0] = of_batch(model, words, targets, **other)

    first = next(module for module in model.modules() if isinstance(module, DecoderLayer))
    first.register_forward_pre_hook(call)
    assert same(of_batch(model, words, targets, route_ids=ids), expected[0])
    assert same(found[0], expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_two_forwards_before_their_backwards(name):
    """Interleaved steps of one model, and one Routes object that serves both a masked and an unmasked model."""
    model = routed(name, RoutingPlan(2, **all_sites(name)))
    words, targets, ids = batch()
    expected = [backward(model, words, targets, route_ids=each) for each in (ids, 1 - ids)]
    losses = [loss_of(logits_of(model, words, route_ids=each), targets) for each in (ids, 1 - ids)]
    for loss, want in zip(reversed(losses), reversed(expected), strict=True):
        model.zero_grad()
        loss.backward()
        check({n: p.grad for n, p in model.named_parameters()}, want, 0.0)


@pytest.mark.setup(
    "Modules and hooks",
    "resize_token_embeddings of a model with a routed head",
    refused="the new head is not routed; unroute before, route after",
)
def test_routes_that_serve_every_step_say_nothing_of_the_step_before():
    """A head that was replaced after a step is missed in the next one, although its routes had reached the old head."""
    model = routed("llama", RoutingPlan(2, lm_head=LinearSites(update_rows=NOTHING)))
    words, _, ids = batch()
    routes = Routes.of(torch.ones_like(ids), 2)
    model(words, labels=words, routes=routes).loss.backward()
    assert not model.lm_head.weight.grad.any()
    model.resize_token_embeddings(64, mean_resizing=False)
    with expect(RuntimeError, "got routes that did not reach lm_head"):
        model(words, labels=words, routes=routes)


def test_layers_on_several_devices_without_hooks():
    """Routes follow the tokens: a layer that gets them on another device moves the routes, once a device."""
    routes = Routes.of(torch.zeros(2, 4, dtype=torch.int64), 2)
    moved = routes.to("meta")
    assert moved.device.type == "meta"
    assert routes.to("meta") is moved
    annealed = Routes.of(torch.zeros(2, 4, dtype=torch.int64), 2, torch.tensor(0.5))
    assert annealed.to("meta") is not annealed.to("meta")  # its strength may have been written to since
