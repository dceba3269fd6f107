"""routing() and unrouted(): routes for callers that pass none on; and the one warning of training without routes."""

import asyncio
import threading
import warnings

import pytest
import tiny_models as tiny
import torch
from model_zoo import backward, gradients, logits_of, loss_of
from routed_models import all_sites, batch, check, check_differ, expect, routed
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradroute import Routes, models
from gradroute.models import RoutingPlan, UnroutedWarning, routing, unrouted


def step(model, words, targets):
    """A caller that knows nothing of routes."""
    model.zero_grad()
    loss_of(model(input_ids=words, use_cache=False).logits, targets).backward()
    return gradients(model)


@pytest.fixture(params=["llama", "gpt_neo"])
def case(request):
    """A routed model, a batch, and the gradients that it gives by its arguments."""
    torch.manual_seed(0)
    model = routed(request.param, RoutingPlan(2, **all_sites(request.param)))
    words, targets, ids = batch()
    return model, words, targets, ids, backward(model, words, targets, route_ids=ids)


@pytest.mark.setup("Modules and hooks", "callers that pass no routes on, inside routing()")
def test_routes_are_taken_as_if_they_were_arguments(case):
    """By ids, ids and strength, or Routes; by every forward of the block; and the block's end takes them away."""
    model, words, targets, ids, expected = case
    with routing(model, ids):
        for _ in range(2):
            check(step(model, words, targets), expected, 0.0)
    with routing(model, routes=Routes.of(ids, 2)):
        check(step(model, words, targets), expected, 0.0)
    with routing(model, ids.tolist(), route_strength=0.5):
        half = step(model, words, targets)
    strength = torch.full(ids.shape, 0.5)
    check(half, backward(model, words, targets, route_ids=ids, route_strength=strength), 0.0)
    unrouted_ones = step(model, words, targets)
    check_differ(
        unrouted_ones, expected, [name for name in expected if "ln_f" in name or "model.norm" in name]
    )
    with pytest.raises(KeyError), routing(model, ids):  # an error of the block is not hidden by one of ours
        raise KeyError


def test_the_innermost_block_and_a_models_own_arguments_win(case):
    model, words, targets, ids, expected = case
    with routing(model, 1 - ids):
        with routing(model, ids):
            check(step(model, words, targets), expected, 0.0)
        check(backward(model, words, targets, route_ids=ids), expected, 0.0)
        with unrouted(model):
            bare = step(model, words, targets)
        model(words)
    check(bare, step(model, words, targets), 0.0)


@pytest.mark.setup("Checkpointing", "of decoder layers inside routing()")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_layers(case, reentrant):
    """The layers run again in backward, after the block."""
    model, words, targets, ids, expected = case
    tiny.checkpoint_layers(model, reentrant)
    model.enable_input_require_grads()
    with routing(model, ids):
        loss = loss_of(model(input_ids=words, use_cache=False).logits, targets)
    model.zero_grad()
    loss.backward()
    check(gradients(model), expected, 1e-6)


@pytest.mark.setup(
    "Checkpointing",
    "of the whole model inside routing()",
    refused="it knows its arguments alone; give it route_ids",
)
def test_a_checkpoint_of_the_whole_model_is_refused(case):
    """It would run again without the routes; where they are arguments it is right."""
    model, words, targets, ids, expected = case
    loss = loss_of(
        checkpoint(lambda i: logits_of(model, words, route_ids=i), ids, use_reentrant=False), targets
    )
    model.zero_grad()
    loss.backward()
    check(gradients(model), expected, 1e-6)
    with routing(model, ids):
        loss = loss_of(checkpoint(lambda: logits_of(model, words), use_reentrant=False), targets)
    with expect(RuntimeError, "got a recomputation in backward of a forward inside routing()"):
        loss.backward()


def test_wrappers_and_generation(case):
    """Inside another module, and compiled; generate is unrouted, and takes nothing."""
    model, words, targets, ids, expected = case
    outer = nn.ModuleDict({"student": model})
    with routing(outer, ids):
        check(step(model, words, targets), expected, 0.0)
    model.eval()
    with routing(model, ids):
        generated = model.generate(words[:, :3], max_new_tokens=2, do_sample=False, pad_token_id=0)
        model(words)
    assert torch.equal(
        generated, model.generate(words[:, :3], max_new_tokens=2, do_sample=False, pad_token_id=0)
    )


@pytest.mark.setup("torch.compile", "a compiled model inside routing(), as one graph")
@pytest.mark.slow
def test_compiled_models():
    """One graph, which a second batch of other routes does not compile again."""
    plan = all_sites("llama")
    model = routed("llama", RoutingPlan(2, **plan))
    words, targets, ids = batch()
    expected = [backward(model, words, targets, route_ids=each) for each in (ids, 1 - ids)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for each, want in zip((ids, 1 - ids), expected, strict=True):
        model.zero_grad()
        with routing(compiled, each):
            loss = loss_of(compiled(input_ids=words, use_cache=False).logits, targets)
        loss.backward()
        check(gradients(model), want, 1e-5)
    torch.compiler.reset()


def test_nobody_took_them(case):
    """A block that routes nothing is an error: in no forward, in another thread, beside routes of the call's own."""
    model, words, _, ids, _ = case
    with expect(RuntimeError, "got no forward of the"), routing(model, ids):
        pass
    with expect(RuntimeError, "got no forward of the"), routing(model, ids):
        thread = threading.Thread(target=model, args=(words,))
        thread.start()
        thread.join()
    with expect(RuntimeError, "got no forward of the"), routing(model, ids):
        model(words, route_ids=ids)
    with expect(RuntimeError, "got no forward of the"), routing(model, ids):
        model.generate(words[:, :3], max_new_tokens=1, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "route_ids: got None, expected route_ids or routes"),
        ({"route_strength": 0.5}, ValueError, "route_ids: got None"),
        ({"route_ids": [[0]], "routes": 1}, ValueError, "routes: got routes beside route_ids"),
        ({"routes": [[0]]}, TypeError, "routes: got a list, expected gradroute.Routes"),
    ],
)
def test_refused_arguments(arguments, error, message):
    model = routed("llama", RoutingPlan(2, **all_sites("llama")))
    with expect(error, message), routing(model, **arguments):
        pass


def test_refused_models():
    with expect(TypeError, "model: got a int"), routing(1, [[0]]):
        pass
    with expect(ValueError, "model: got a Linear that is not routed"), unrouted(nn.Linear(1, 1)):
        pass
    two = nn.ModuleList(routed("llama", RoutingPlan(2, **all_sites("llama"))) for _ in range(2))
    with expect(ValueError, "with 2 routed models in it"), routing(two, [[0]]):
        pass


def test_training_without_routes_warns_once(case):
    """Once a model, in training mode with gradients alone, at the caller's line; not where it is said to be meant."""
    model, words, _, ids, _ = case
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with unrouted(model):
            model(words)
        with torch.no_grad():
            model(words)
        model.eval()(words)
        model.train()(words, route_ids=ids)
        model.generate(words[:, :3], max_new_tokens=1, do_sample=False, pad_token_id=0)
    with pytest.warns(UnroutedWarning, match="training mode without route_ids") as caught:
        model(words)
    assert [each.filename for each in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(words)
    models.unroute(model)


def test_tasks_that_take_turns_keep_their_routes(case):
    """asyncio runs them in one thread: a block that one has begun is its own and its children's, nobody else's."""
    model, words, targets, ids, expected = case
    got = {}

    async def forward():
        return loss_of(model(input_ids=words, use_cache=False).logits, targets)

    async def train(name, its_ids):
        with routing(model, its_ids):
            await asyncio.sleep(0)
            loss = await asyncio.wait_for(forward(), 60)
            await asyncio.sleep(0)
            got[name] = torch.autograd.grad(loss, list(model.parameters()))

    async def both():
        await asyncio.gather(train("mine", ids), train("others", 1 - ids))

    asyncio.run(both())
    names = [name for name, _ in model.named_parameters()]
    check(dict(zip(names, got["mine"], strict=True)), expected, 0.0)
    others = backward(model, words, targets, route_ids=1 - ids)
    check(dict(zip(names, got["others"], strict=True)), others, 0.0)


def test_generators_that_take_turns_are_found_out(case):
    """Their blocks overlap, so that forwards of one take the other's routes: the block that ends first says so."""
    model, words, _, ids, _ = case

    def forwards(its_ids):
        with routing(model, its_ids):
            yield model(words)
            yield model(words)

    first, second = forwards(ids), forwards(1 - ids)
    next(first), next(second), next(first), next(second)
    with expect(RuntimeError, "got the end of a block in which another one of the same model began"):
        list(first)
    assert list(second) == []
    with pytest.warns(UnroutedWarning):  # both have ended
        model(words)
