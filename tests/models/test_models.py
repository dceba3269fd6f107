"""Routed models of every architecture, against the detach idiom hooked in by hand, and SGTM's own recipe."""

import copy
import functools
import io
import json
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import model_zoo
import transformers
from model_zoo import HEADS, HIDDEN, KINDS, NAMES, VOCABULARY, WIDTH, backward, by_hand, fresh, plain

import gradroute
from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites, Routes, Table, models
from gradroute.models import NANO_GPT, ResidualSites, RoutingPlan, Shape, unroute
from gradroute.tables import localize

# Two ways to the same fp32 sums, each through some twenty layers of them: a few units in the last place.
TOLERANCE = 1e-5
OF_TRANSFORMERS = [name for name in NAMES if name != "nano_gpt"]
WITH_OUTPUT_BIAS = {"llama", "gpt2", "gpt_neo", "gpt_neox", "gpt_neox_serial", "nano_gpt"}
TIED = {"qwen3", "gemma3", "gpt2", "gpt_neo", "nano_gpt"}


def route(name, model, plan, **options):
    if name == "nano_gpt":
        options["architecture"] = NANO_GPT
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tied parameter", category=RuntimeWarning)
        return models.route(model, plan, **options)


def routed(name, plan, **options):
    return route(name, fresh(name), plan, **options)


def exact(name):
    """The model with an activation whose eager rounding is that of the kernels: "gelu_new" rounds every step."""
    if name in ("gpt2", "gpt_neo"):
        return model_zoo.build(name, activation_function="gelu_pytorch_tanh")
    return fresh(name)


def batch(rows=2, tokens=10, routes=2, padding=True):
    """Tokens (the one called padding among them), targets (one for every position) and ids."""
    shape = (rows, tokens)
    ids = torch.randint(0, routes, shape)
    ids.view(-1)[:routes] = torch.arange(routes)[: ids.numel()]
    words = torch.randint(1, VOCABULARY, shape)
    if padding:
        words[0, 0] = 0
    return words, torch.randint(0, VOCABULARY, shape), ids


def table(features, routes=2):
    """Weights of all kinds; no two routes alike."""
    choices = torch.tensor([0.0, 1.0, 0.5, -0.75])
    return choices[torch.randint(0, 4, (routes, features))]


def check(got, expected, tolerance=TOLERANCE):
    assert got.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 0, name
        assert model_zoo.error(got[name], expected[name]) <= tolerance, name


def check_differ(got, other, names=None):
    """Masks tell: the gradients are not those of the unrouted model."""
    for name in got if names is None else names:
        assert model_zoo.error(got[name], other[name]) > 0.01, name


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


# Plans


def activation_sites(name, routes=2):
    """Every activation site of every layer, apart from edges."""
    kind = KINDS[name]
    return {
        "mlp": MLPSites(pre=table(HIDDEN, routes), hidden=table(HIDDEN, routes), output=table(WIDTH, routes)),
        "attention": AttentionSites(
            query=table(HEADS, routes),
            key=table(kind.kv_heads, routes),
            value=table(kind.kv_heads, routes),
            heads=table(HEADS, routes),
        ),
        "residual": {
            0: ResidualSites(pre=table(WIDTH, routes), post=table(WIDTH, routes)),
            1: ResidualSites(mid=table(WIDTH, routes) if kind.mid else None, post=table(WIDTH, routes)),
        },
    }


def update_sites(name, routes=2):
    """Every site of parameters."""
    kind = KINDS[name]
    bias = table(WIDTH, routes) if name in WITH_OUTPUT_BIAS else None
    return {
        "mlp": MLPSites(
            update_in=table(HIDDEN, routes), update_out=table(HIDDEN, routes), update_output_bias=bias
        ),
        "attention": AttentionSites(
            update_q=table(HEADS, routes),
            update_kv=table(kind.kv_heads, routes),
            update_out=table(HEADS, routes),
            update_output_bias=bias,
        ),
        "norm": NormSites(table(WIDTH, routes)),
        "qk_norm": NormSites(table(kind.head_dim, routes)) if kind.qk_norm_heads else None,
        "final_norm": NormSites(table(WIDTH, routes)),
        "embedding": EmbeddingSites(table(WIDTH, routes)),
        "lm_head": LinearSites(update_rows=table(VOCABULARY, routes), update_cols=table(WIDTH, routes)),
    }


def merged(*sites):
    """Sites of one type with the tables of all."""
    return type(sites[0])(**{name: table for each in sites for name, table in each.tables.items()})


def all_sites(name, routes=2):
    """Activations, parameters, forwards and edges at once."""
    activations, updates = activation_sites(name, routes), update_sites(name, routes)
    forward = {"forward_heads": table(HEADS, routes)}
    if name != "nano_gpt":
        forward |= {"score_edges": table(routes, routes), "value_edges": table(routes, routes)}
    return updates | {
        "residual": activations["residual"],
        "mlp": merged(activations["mlp"], updates["mlp"], MLPSites(forward=table(HIDDEN, routes))),
        "attention": merged(activations["attention"], updates["attention"], AttentionSites(**forward)),
    }


# Gradients


@pytest.mark.parametrize("name", NAMES)
def test_hand_is_autograd(name):
    """Of the oracle itself: its formulas without masks are the plain model's gradients."""
    tokens, targets, ids = batch()
    nowhere = RoutingPlan(2, mlp=MLPSites())
    check(by_hand(name, nowhere, ids, tokens, targets), backward(fresh(name), tokens, targets))


@pytest.mark.parametrize("name", NAMES)
def test_activation_sites_are_the_detach_idiom(name):
    tokens, targets, ids = batch()
    plan = RoutingPlan(2, **activation_sites(name))
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    hooked = fresh(name)
    hand = model_zoo.ByHand(hooked, name, plan, ids)
    model_zoo.run(hooked, tokens, targets).backward()
    check(got, model_zoo.gradients(hooked))  # autograd's own, through the idiom
    check(got, hand.collected())
    below = [key for key in got if ".0." in key or "embed" in key or "wte" in key or "wpe" in key]
    check_differ(got, backward(fresh(name), tokens, targets), below)


@pytest.mark.parametrize("name", NAMES)
def test_update_sites_mask_parameters_alone(name):
    tokens, targets, ids = batch()
    plan = RoutingPlan(2, **update_sites(name))
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets))
    unmasked = backward(fresh(name), tokens, targets)
    check_differ(got, unmasked)
    # Only where parameters are: the last layer's masks change nothing below.
    alone = RoutingPlan(2, mlp={1: update_sites(name)["mlp"]})
    got = backward(routed(name, alone), tokens, targets, route_ids=ids)
    masked = {key for key in got if ".1.mlp." in key}
    check_differ(got, unmasked, {key for key in masked if key.endswith("weight")})
    check(*({key: grads[key] for key in got if key not in masked} for grads in (got, unmasked)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [None, "token"])
def test_all_sites_at_once(name, strength):
    tokens, targets, ids = batch(routes=3)
    strength = None if strength is None else torch.rand(ids.shape)
    sites = all_sites(name, routes=3)
    plan = RoutingPlan(3, **sites)
    model = routed(name, plan)
    got = backward(model, tokens, targets, route_ids=ids, route_strength=strength)
    check(got, by_hand(name, plan, ids, tokens, targets, strength))
    check_differ(got, backward(fresh(name), tokens, targets))
    again = backward(model, tokens, targets, routes=Routes.of(ids, 3, strength))
    assert all(torch.equal(got[key], again[key]) for key in got)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_all_sites_on_a_gpu(name):
    """The same numbers from other kernels: fp32 sums in another order, the exponentials of another library."""
    tokens, targets, ids = batch(routes=3)
    plan = RoutingPlan(3, **all_sites(name, routes=3))
    expected = backward(routed(name, plan), tokens, targets, route_ids=ids)
    model = routed(name, plan).cuda()
    got = backward(model, tokens.cuda(), targets.cuda(), route_ids=ids)  # ids follow the tokens
    check({key: gradient.cpu() for key, gradient in got.items()}, expected, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_differ(name):
    """A layer that is not routed beside one that is, with attention masked in one and not in the other."""
    tokens, targets, ids = batch()
    last = len(plain(name).get_submodule(KINDS[name].layers)) - 1
    sites = all_sites(name)
    plan = RoutingPlan(2, mlp={0: sites["mlp"]}, attention={last: sites["attention"]})
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets))
    as_list = RoutingPlan(
        2,
        mlp=[sites["mlp"], *[None] * last],
        attention=lambda index, shape: sites["attention"] if index == shape.layers - 1 else None,
    )
    again = backward(routed(name, as_list), tokens, targets, route_ids=ids)
    assert all(torch.equal(got[key], again[key]) for key in got)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
@pytest.mark.parametrize("site", ["score_edges", "value_edges", "both"])
def test_edges(name, site):
    """Binary edges, longer than the windows; the model's own window and scale hold."""
    tokens, targets, ids = batch(tokens=13)
    edges = [[1.0, 1.0], [0.0, 1.0]]
    names = ("score_edges", "value_edges") if site == "both" else (site,)
    plan = RoutingPlan(2, attention=AttentionSites(**dict.fromkeys(names, edges)))
    model = routed(name, plan)
    got = backward(model, tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets))
    below = [key for key in got if ".0." in key and "weight" in key]
    unmasked = backward(fresh(name), tokens, targets)
    assert max(model_zoo.error(got[key], unmasked[key]) for key in below) > 0.01


@pytest.mark.parametrize("name", ["gpt2", "mistral", "phi3", "nano_gpt"])
def test_shorthand_update(name):
    """`update` is update_q, update_out, update_in, ..., where they are not given; tables of one column are for all."""
    tokens, targets, ids = batch()
    kind = KINDS[name]
    kv = {} if kind.kv_heads == HEADS else {"update_kv": table(kind.kv_heads)}
    attention = AttentionSites(update=table(HEADS), **kv)
    plan = RoutingPlan(2, mlp=MLPSites(update=table(HIDDEN)), attention=attention)
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets))
    column = [[1.0], [0.5]]
    plan = RoutingPlan(
        2,
        mlp=MLPSites(hidden=column, update=column),
        attention=AttentionSites(heads=column, update=column, update_kv=column),
        residual=ResidualSites(post=column),
        norm=NormSites(column),
    )
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets))


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "nano_gpt"])
def test_loss_of_the_model_itself(name):
    """With labels, as people call it."""
    tokens, _, ids = batch()
    plan = RoutingPlan(2, **all_sites(name))

    def own_loss(model, **inputs):
        if name == "nano_gpt":
            return model(tokens, tokens.roll(-1), **inputs)[1]
        return model(input_ids=tokens, labels=tokens, **inputs).loss

    model, hooked = routed(name, plan), fresh(name)
    own_loss(model, route_ids=ids).backward()
    hand = model_zoo.ByHand(hooked, name, plan, ids)
    own_loss(hooked).backward()
    check(model_zoo.gradients(model), hand.collected())


@pytest.mark.parametrize("name", sorted({*OF_TRANSFORMERS} - {"gpt_neo"}))
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_parameter_sites_leave_attention_as_it_is(name, implementation):
    """Where attention itself masks nowhere, the model's own implementation runs."""
    tokens, targets, ids = batch(tokens=13)
    plan = RoutingPlan(2, **update_sites(name))
    unrouted = exact(name)
    unrouted.set_attn_implementation(implementation)
    model = route(name, copy.deepcopy(unrouted), plan)
    got, expected = model_zoo.logits_of(model, tokens, route_ids=ids), model_zoo.logits_of(unrouted, tokens)
    assert torch.equal(got, expected)
    got = backward(model, tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets, model=unrouted))


# Padding and packing


def documents(lengths):
    """Of each its tokens, targets and ids, `[1, length]`."""
    return [batch(1, length, padding=False) for length in lengths]


def of_documents(name, plan, parts):
    """What each document gives by itself, summed."""
    each = [by_hand(name, plan, ids, tokens, targets) for tokens, targets, ids in parts]
    return {key: sum(grads[key] for grads in each) for key in each[0]}


def padded(part, length, side, value):
    missing = length - part.shape[1]
    return nn.functional.pad(part, (0, missing) if side == "right" else (missing, 0), value=value)


# With attention sites routed_attention runs, without them the model's own.
MASKED = {
    "routed": lambda name: RoutingPlan(
        2,
        mlp=MLPSites(hidden=table(HIDDEN), update=table(HIDDEN)),
        attention=AttentionSites(
            heads=table(HEADS), key=table(KINDS[name].kv_heads), score_edges=table(2), value_edges=table(2)
        ),
    ),
    "own": lambda name: RoutingPlan(
        2,
        mlp=MLPSites(hidden=table(HIDDEN)),
        attention=AttentionSites(update_q=table(HEADS)),
        residual=ResidualSites(post=table(WIDTH)),
    ),
}


def with_implementations(names):
    """Routed attention runs in the place of any; the model's own is one of two, GPT-Neo's one alone."""
    own = [(name, implementation, "own") for name in names for implementation in ("eager", "sdpa")]
    own.remove(("gpt_neo", "sdpa", "own"))
    return [(name, "eager" if name == "gpt_neo" else "sdpa", "routed") for name in names] + own


def masked_model(name, implementation, plan):
    model = fresh(name)
    if name != "gpt_neo":
        model.set_attn_implementation(implementation)
    return route(name, model, plan)


@pytest.mark.parametrize(("name", "implementation", "attention"), with_implementations(OF_TRANSFORMERS))
def test_padding(name, implementation, attention):
    plan = MASKED[attention](name)
    parts = documents((9, 5, 1))
    expected = of_documents(name, plan, parts)
    model = masked_model(name, implementation, plan)
    for side in ("right", "left"):
        tokens, targets, ids = (
            torch.cat([padded(part[i], 9, side, value) for part in parts])
            for i, value in enumerate((0, -100, 1))
        )
        mask = (tokens != 0).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"attention_mask": mask, "position_ids": positions}
        if side == "right":
            del inputs["position_ids"]
        check(backward(model, tokens, targets, route_ids=ids, **inputs), expected)
    whole = torch.ones(1, 9)
    tokens, targets, ids = parts[0]
    check(
        backward(model, tokens, targets, route_ids=ids, attention_mask=whole),
        of_documents(name, plan, parts[:1]),
    )


@pytest.mark.parametrize(("name", "implementation", "attention"), with_implementations(OF_TRANSFORMERS))
def test_packing(name, implementation, attention):
    """Documents in one row, and in the rows of a batch: by positions that begin again, and by bounds."""
    plan = MASKED[attention](name)
    parts = documents((5, 7, 9, 3))
    expected = of_documents(name, plan, parts)
    model = masked_model(name, implementation, plan)
    joined = [torch.cat([part[i] for part in parts], dim=1) for i in range(3)]
    lengths = [part[0].shape[1] for part in parts]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    for rows in (1, 2):
        tokens, targets, ids = (part.view(rows, -1) for part in joined)
        for inputs in ({}, {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}):
            inputs["position_ids"] = positions.view(rows, -1)
            check(backward(model, tokens, targets, route_ids=ids, **inputs), expected)


def test_documents_do_not_see_each_other():
    """Of the test above: without bounds the documents of a row are one."""
    plan = MASKED["routed"]("llama")
    tokens, targets, ids = batch(1, 12)
    positions = torch.arange(6).repeat(2)[None]
    packed = backward(routed("llama", plan), tokens, targets, route_ids=ids, position_ids=positions)
    check_differ(packed, backward(routed("llama", plan), tokens, targets, route_ids=ids))


# Forward


@pytest.mark.parametrize("name", NAMES)
def test_unrouted_calls_are_the_plain_model(name):
    tokens, targets, ids = batch(tokens=13)
    plan = RoutingPlan(2, **all_sites(name))
    for implementation in ("eager", "sdpa"):
        model, unrouted = fresh(name), fresh(name)
        if name not in ("gpt_neo", "nano_gpt"):
            for each in (model, unrouted):
                each.set_attn_implementation(implementation)
        route(name, model, plan)
        for _ in ("before", "after"):
            got, expected = (model_zoo.logits_of(each, tokens) for each in (model, unrouted))
            assert torch.equal(got, expected)
            got, expected = (backward(each, tokens, targets) for each in (model, unrouted))
            assert all(torch.equal(got[key], expected[key]) for key in expected)
            check_differ(backward(model, tokens, targets, route_ids=ids), expected)


@pytest.mark.parametrize("name", NAMES)
def test_routed_forward_is_the_plain_one(name):
    """Bit for bit, where nothing masks in forward and attention is the model's own; else but for rounding."""
    tokens, _, ids = batch(tokens=13)
    sites = update_sites(name) | {
        "mlp": merged(activation_sites(name)["mlp"], update_sites(name)["mlp"]),
        "residual": activation_sites(name)["residual"],
    }
    unrouted = exact(name)
    expected = model_zoo.logits_of(unrouted, tokens)
    model = route(name, unrouted, RoutingPlan(2, **sites))
    assert torch.equal(model_zoo.logits_of(model, tokens, route_ids=ids), expected)
    expected = model_zoo.logits_of(fresh(name), tokens)
    got = model_zoo.logits_of(routed(name, RoutingPlan(2, **sites)), tokens, route_ids=ids)
    assert model_zoo.error(got, expected) < TOLERANCE
    attention = RoutingPlan(2, attention=activation_sites(name)["attention"])
    got = model_zoo.logits_of(routed(name, attention), tokens, route_ids=ids)
    assert model_zoo.error(got, expected) < TOLERANCE
    forward = RoutingPlan(2, mlp=MLPSites(forward=localize(2, HIDDEN, {1: slice(8)})))
    got = model_zoo.logits_of(routed(name, forward), tokens, route_ids=ids)
    assert model_zoo.error(got, expected) > 0.01


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_outputs_that_models_record(name):
    tokens, _, ids = batch()
    plan = RoutingPlan(2, **update_sites(name))
    unrouted = exact(name)
    model = route(name, copy.deepcopy(unrouted), plan)
    for inputs in ({}, {"route_ids": ids}):
        got, expected = (
            each(tokens, output_hidden_states=True, output_attentions=True, use_cache=False, **given)
            for each, given in ((model, inputs), (unrouted, {}))
        )
        for field in ("hidden_states", "attentions"):
            assert len(got[field]) == len(expected[field]) > 0
            assert all(map(torch.equal, got[field], expected[field]))
    embeddings = unrouted.get_input_embeddings()(tokens)
    model = route(name, unroute(model), RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
    got = model(inputs_embeds=embeddings, route_ids=ids).logits
    assert torch.equal(got, unrouted(tokens, use_cache=False).logits)


DROPOUTS = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "gpt_neo": ("resid_dropout", "embed_dropout", "attention_dropout"),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "gpt_neox_serial": ("hidden_dropout", "attention_dropout"),
    "phi3": ("resid_pdrop", "attention_dropout"),
    "llama": ("attention_dropout",),
    "gemma3": ("attention_dropout",),
    "nano_gpt": ("dropout",),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout(name):
    """A routed model drops what the plain one does; attention with dropout is the model's own."""
    tokens, targets, ids = batch()
    sites = update_sites(name) | {
        "mlp": merged(MLPSites(hidden=table(HIDDEN), forward=table(HIDDEN)), MLPSites(update=table(HIDDEN))),
        "residual": activation_sites(name)["residual"],
    }
    plan = RoutingPlan(2, **sites)
    dropping = model_zoo.build(name, **dict.fromkeys(DROPOUTS[name], 0.3))
    torch.manual_seed(0)
    expected = by_hand(name, plan, ids, tokens, targets, model=dropping)
    model = route(name, copy.deepcopy(dropping), plan)
    torch.manual_seed(0)
    check(backward(model, tokens, targets, route_ids=ids), expected)
    torch.manual_seed(1)
    check_differ(backward(model, tokens, targets, route_ids=ids), expected)
    torch.manual_seed(0)
    assert torch.isfinite(model_zoo.run(model.eval(), tokens, targets, route_ids=ids))
    assert torch.equal(model_zoo.logits_of(model, tokens), model_zoo.logits_of(dropping.eval(), tokens))


def test_dropout_in_attention_that_masks():
    """No kernel of a CPU can: an error in training, nothing in evaluation."""
    tokens, _, ids = batch()
    plan = RoutingPlan(2, attention=AttentionSites(heads=table(HEADS)))
    model = route("llama", model_zoo.build("llama", attention_dropout=0.1), plan)
    with expect(gradroute.BackendError, "dropout"):
        model(tokens, route_ids=ids)
    assert torch.isfinite(model.eval()(tokens, route_ids=ids).logits).all()


# SGTM


def recipe(name, part, label, forget_heads, forget_units):
    """SGTM's gradients of a batch of one label: zeros in forward where it retains, in .grad where it forgets."""
    model, kind = fresh(name), KINDS[name]
    features = forget_heads * kind.head_dim
    layers = model.get_submodule(kind.layers)
    if label == "retain":
        for layer in layers:
            output = layer.get_submodule(kind.attention).get_submodule(kind.output)
            output.register_forward_pre_hook(functools.partial(_without_last, features))
            layer.get_submodule(kind.outer).register_forward_pre_hook(
                functools.partial(_without_last, forget_units)
            )
    tokens, targets = part
    model_zoo.run(model, tokens, targets).backward()
    if label == "forget":
        for layer in layers:
            _keep_forget_gradients(layer, kind, forget_heads, forget_units)
    return model_zoo.gradients(model)


def _without_last(count, module, args):
    x = args[0].clone()
    x[..., x.shape[-1] - count :] = 0
    return (x, *args[1:])


def _keep_forget_gradients(layer, kind, forget_heads, forget_units):
    attention, head_dim = layer.get_submodule(kind.attention), kind.head_dim
    forget_kv_heads = forget_heads // (HEADS // kind.kv_heads)
    q, kv = (
        (torch.arange(heads) >= heads - count).repeat_interleave(head_dim)
        for heads, count in ((HEADS, forget_heads), (kind.kv_heads, forget_kv_heads))
    )
    if kind.layout == "separate":
        rows = [q, kv, kv]
    elif kind.layout == "fused":
        rows = [torch.cat((q, kv, kv))]
    else:
        rows = [torch.stack([part.view(HEADS, -1) for part in (q, kv, kv)], 1).flatten()]
    for linear, kept in zip(map(attention.get_submodule, kind.qkv), rows, strict=True):
        _zero_rows(linear, ~kept)
    _zero_columns(attention.get_submodule(kind.output), ~q)
    units = torch.arange(HIDDEN) >= HIDDEN - forget_units
    for linear in map(layer.get_submodule, kind.inner):
        _zero_rows(linear, ~(torch.cat((units, units)) if kind.fused_gate else units))
    _zero_columns(layer.get_submodule(kind.outer), ~units)


def _matrix_gradient(linear):
    return model_zoo._linear_matrix(linear, linear.weight.grad)


def _zero_rows(linear, rows):
    _matrix_gradient(linear)[rows] = 0
    if linear.bias is not None:
        linear.bias.grad[rows] = 0


def _zero_columns(linear, columns):
    _matrix_gradient(linear)[:, columns] = 0
    if linear.bias is not None:
        linear.bias.grad.zero_()


def shape_of(name):
    kind = KINDS[name]
    if name == "nano_gpt":
        return Shape(2, WIDTH, HIDDEN, HEADS, kind.kv_heads, kind.head_dim)
    return plain(name).config


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("forget_heads", "forget_units"), [(2, 16), (3, 0)])
def test_sgtm_is_its_recipe(name, forget_heads, forget_units):
    """One batch of both labels, a label a sequence: the sum of what batches of one label give."""
    labels = torch.tensor([1, 0, 2, 1, 0])
    tokens, targets, _ = batch(5, 8)
    plan = models.sgtm(shape_of(name), forget_heads, forget_units, unlabelled=2)
    got = backward(routed(name, plan), tokens, targets, route_ids=labels[:, None].expand(5, 8))
    each = [
        recipe(name, (tokens[labels == label], targets[labels == label]), what, forget_heads, forget_units)
        for label, what in enumerate(("retain", "forget", "unlabelled"))
    ]
    check(got, {key: sum(grads[key] for grads in each) for key in got})
    check_differ(got, backward(fresh(name), tokens, targets))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_sgtm_joint_parts(name):
    """The variants: everybody trains the down projection, or forget tokens train neither embeddings nor norms."""
    tokens, targets, _ = batch(2, 8)
    forget = torch.ones(2, 8, dtype=torch.long)
    ordinary = backward(fresh(name), tokens, targets)
    joint = models.sgtm(shape_of(name), 2, 16, joint_down_projection=True)
    got = backward(routed(name, joint), tokens, targets, route_ids=forget)
    outer = [key for key in got if KINDS[name].outer in key]
    assert outer
    check(*({key: grads[key] for key in outer} for grads in (got, ordinary)))
    apart = models.sgtm(shape_of(name), 2, 16, joint_embedding=False)
    got = backward(routed(name, apart), tokens, targets, route_ids=forget)
    norms = [key for key in got if any(f".{norm}." in key for norm in KINDS[name].norms)]
    assert len(norms) >= 4
    assert all((got[key] == 0).all() for key in norms)
    if name not in TIED:
        assert (got["model.embed_tokens.weight"] == 0).all()
        assert (got["lm_head.weight"] != 0).any()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen2"])
def test_sgtm_output_biases(name):
    """What forget tokens do not touch has a gradient of exactly 0: the biases of output projections among it."""
    tokens, targets, _ = batch(2, 8)
    plan = models.sgtm(shape_of(name), 2, 16)
    got = backward(routed(name, plan), tokens, targets, route_ids=torch.ones(2, 8, dtype=torch.long))
    kind = KINDS[name]
    biases = [key for key in got if key.endswith((f"{kind.output}.bias", f"{kind.outer}.bias"))]
    assert bool(biases) == (name in WITH_OUTPUT_BIAS)
    assert all((got[key] == 0).all() for key in biases)
    for key in got:
        if name == "qwen2" and key.endswith("k_proj.bias"):
            assert (got[key][: kind.head_dim] == 0).all()
            assert (got[key][kind.head_dim :] != 0).any()


# Saved, copied, ordinary again


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_saved_model_is_the_plain_one(name, tmp_path):
    tokens, _, _ = batch()
    unrouted = fresh(name)
    unrouted.save_pretrained(tmp_path / "plain")
    model = routed(name, RoutingPlan(2, **all_sites(name)))
    assert list(model.state_dict()) == list(unrouted.state_dict())
    model.save_pretrained(tmp_path / "routed")
    configs = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("plain", "routed")]
    assert configs[0] == configs[1]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "routed", attn_implementation="eager"
    )
    assert type(loaded) is type(unrouted)
    assert all(type(a) is type(b) for a, b in zip(loaded.modules(), unrouted.modules(), strict=True))
    assert list(loaded.state_dict()) == list(unrouted.state_dict())
    for key, value in unrouted.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert torch.equal(loaded(tokens).logits, unrouted.eval()(tokens).logits)


@pytest.mark.parametrize("name", NAMES)
def test_unroute(name):
    tokens, targets, ids = batch()
    model, unrouted = fresh(name), fresh(name)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    called = []
    model.get_submodule(KINDS[name].layers)[0].register_forward_hook(lambda *_: called.append(1))
    hooks = len(model.get_submodule(KINDS[name].layers)[0]._forward_hooks)
    route(name, model, RoutingPlan(2, **all_sites(name)))
    assert isinstance(model, type(unrouted))
    assert list(model.state_dict()) == keys
    model_zoo.run(model, tokens, targets, route_ids=ids).backward()
    assert len(called) == 1
    assert unroute(model) is model
    assert len(model.get_submodule(KINDS[name].layers)[0]._forward_hooks) == hooks
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for (path, got), expected in zip(model.named_modules(), unrouted.modules(), strict=True):
        assert type(got) is type(expected), path
        assert vars(got).keys() == vars(expected).keys(), path
    assert list(model.state_dict()) == keys
    assert torch.equal(model_zoo.logits_of(model, tokens), model_zoo.logits_of(unrouted, tokens))
    got, expected = (backward(each, tokens, targets) for each in (model, unrouted))
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    with expect(ValueError, "not routed"):
        unroute(model)
    route(name, model, RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))  # and once more


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("name", "copied"),
    [(name, copy.deepcopy) for name in NAMES]
    + [("llama", by_pickle), ("gpt_neo", by_torch), ("nano_gpt", by_torch)],
)
def test_copies_are_routed(name, copied):
    """Also before any call, and with a plan that is a function."""
    tokens, targets, ids = batch()
    hidden = table(HIDDEN)
    sites = all_sites(name) | {"mlp": lambda index: MLPSites(hidden=hidden)}
    model = routed(name, RoutingPlan(2, **sites))
    logits = model_zoo.logits_of(model, tokens, route_ids=ids)
    early = copied(model)
    expected = backward(model, tokens, targets, route_ids=ids)
    for other in (early, copied(model)):
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        got = backward(other, tokens, targets, route_ids=ids)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
        unroute(other)
        assert type(other) is type(plain(name))
    assert torch.equal(model_zoo.logits_of(model, tokens, route_ids=ids), logits)


# Errors of plans


BAD_PLANS = [
    ("llama", lambda: {"mlp": {5: MLPSites()}}, ValueError, "got layers [5], expected indices from 0 to 1"),
    ("llama", lambda: {"mlp": {-1: MLPSites()}}, ValueError, "got layers [-1]"),
    ("llama", lambda: {"mlp": MLPSites(hidden=table(63))}, ValueError, "layer 0: RoutingPlan.mlp: "),
    ("llama", lambda: {"mlp": MLPSites(hidden=table(63))}, ValueError, "63 features, expected 64 or 1"),
    ("llama", lambda: {"mlp": {1: MLPSites(output=table(64))}}, ValueError, "layer 1: RoutingPlan.mlp: "),
    (
        "llama",
        lambda: {"attention": AttentionSites(value=table(HEADS))},
        ValueError,
        "AttentionSites.value: got a table of 4 features, expected 2 or 1",
    ),
    ("llama", lambda: {"attention": AttentionSites(query=table(2))}, ValueError, "expected 4 or 1"),
    ("llama", lambda: {"attention": AttentionSites(update=table(HEADS))}, ValueError, "update_kv"),
    ("mistral", lambda: {"mlp": MLPSites(update_output_bias=table(WIDTH))}, ValueError, "update_output_bias"),
    (
        "mistral",
        lambda: {"attention": AttentionSites(update_output_bias=table(WIDTH))},
        ValueError,
        "o_proj has no bias",
    ),
    ("llama", lambda: {"attention": AttentionSites(score_edges=table(3))}, ValueError, "score_edges"),
    ("llama", lambda: {"mlp": AttentionSites()}, TypeError, "RoutingPlan.mlp, layer 0: got a AttentionSites"),
    ("llama", lambda: {"residual": {0: "pre"}}, TypeError, "expected ResidualSites or None"),
    ("llama", lambda: {"norm": 3}, TypeError, "RoutingPlan.norm: got a int"),
    ("llama", lambda: {"mlp": [MLPSites()]}, ValueError, "got a sequence of 1, expected one entry for each"),
    ("llama", lambda: {"mlp": lambda index: 3}, TypeError, "got a int, expected MLPSites or None"),
    ("llama", lambda: {"mlp": MLPSites(hidden=table(64, 3))}, ValueError, "has 3 routes, expected"),
    ("llama", lambda: {"mlp": {}}, ValueError, "got no sites in any layer"),
    ("llama", lambda: {"mlp": [None, None]}, ValueError, "got no sites in any layer"),
    ("llama", lambda: {"qk_norm": NormSites(table(8))}, TypeError, "without q_norm, expected qk_norm"),
    ("llama", lambda: {"norm": {1: NormSites(table(8))}}, ValueError, "layer 1: RoutingPlan.norm: "),
    ("llama", lambda: {"final_norm": NormSites(table(8))}, ValueError, "RoutingPlan.final_norm: "),
    ("llama", lambda: {"embedding": EmbeddingSites(table(8))}, ValueError, "RoutingPlan.embedding: "),
    ("llama", lambda: {"lm_head": LinearSites(output=table(8))}, ValueError, "RoutingPlan.lm_head: "),
    ("llama", lambda: {"lm_head": LinearSites(update_bias=table(50))}, ValueError, "update_bias"),
    ("llama", lambda: {"residual": ResidualSites(mid=table(31))}, ValueError, "layer 0: ResidualSites.mid"),
    ("gpt_neox", lambda: {"residual": ResidualSites(mid=table(WIDTH))}, ValueError, "in parallel"),
    ("qwen3", lambda: {"qk_norm": NormSites(table(8))}, ValueError, "expected 16 or 1"),
    ("gpt2", lambda: {"mlp": {1: MLPSites(hidden=table(63))}}, ValueError, "layer 1: RoutingPlan.mlp: "),
    ("gpt_neo", lambda: {"attention": {1: AttentionSites(heads=table(3))}}, ValueError, "layer 1: "),
    ("nano_gpt", lambda: {"attention": {1: AttentionSites(heads=table(3))}}, ValueError, "layer 1: "),
]


@pytest.mark.parametrize("name", sorted({name for name, *_ in BAD_PLANS}))
def test_errors_of_plans_change_nothing(name):
    model, unrouted = fresh(name), plain(name)
    for plan_of, kinds, message in (case[1:] for case in BAD_PLANS if case[0] == name):
        with expect(kinds, message):
            route(name, model, RoutingPlan(2, **plan_of()))
        for (path, got), expected in zip(model.named_modules(), unrouted.modules(), strict=True):
            assert type(got) is type(expected), (message, path)
            assert vars(got).keys() == vars(expected).keys(), (message, path)


def test_errors_of_plans_themselves():
    with expect(ValueError, "RoutingPlan: got no sites"):
        RoutingPlan(2)
    with expect(TypeError, "num_routes: got 2.0"):
        RoutingPlan(2.0, mlp=MLPSites())
    with expect(ValueError, "num_routes: got 0"):
        RoutingPlan(0, mlp=MLPSites())
    with expect(TypeError, "RoutingPlan.final_norm: got a MLPSites, expected NormSites or None"):
        RoutingPlan(2, final_norm=MLPSites())
    with expect(ValueError, "RoutingPlan.embedding: EmbeddingSites.update has 3 routes"):
        RoutingPlan(2, embedding=EmbeddingSites(table(WIDTH, 3)))
    with expect(TypeError, "unexpected keyword argument"):
        RoutingPlan(2, mpl=MLPSites())


def test_models_that_are_refused():
    plan = RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN)))
    model = fresh("llama")
    with expect(TypeError, "plan: got a dict, expected a RoutingPlan"):
        models.route(model, {})
    with expect(TypeError, "model: got a str, expected a torch.nn.Module"):
        models.route("llama", plan)
    with expect(TypeError, "model: got a Linear of model_type None, expected one of llama, mistral"):
        models.route(nn.Linear(2, 2), plan)
    with expect(TypeError, "model: got a Linear without transformer.h"):
        models.route(nn.Linear(2, 2), plan, architecture=NANO_GPT)
    opt = transformers.OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4
    )
    with expect(TypeError, "of model_type 'opt', expected one of llama"):
        models.route(transformers.OPTForCausalLM(opt), plan)
    with expect(TypeError, "compiled module, expected to route the model before torch.compile"):
        models.route(torch.compile(model), plan)
    with expect(TypeError, "got a GPT2LMHeadModel without gpt_neox.layers"):
        models.route(fresh("gpt2"), plan, architecture=models.ARCHITECTURES["gpt_neox"])
    with expect(TypeError, "layer 0: got a GPT2Block with cross-attention"):
        models.route(model_zoo.build("gpt2", add_cross_attention=True), plan)
    assert type(model) is type(plain("llama"))


def test_model_of_another_form_is_refused():
    plan = RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN)))
    wrong = models.Architecture(
        "model.layers", "model.embed_tokens", "model.norm", models.ARCHITECTURES["gpt_neox"].layer
    )
    model = fresh("llama")
    with expect(TypeError, "layer 0: got a LlamaDecoderLayer without attention"):
        models.route(model, plan, architecture=wrong)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain("llama").modules(), strict=True))


@pytest.mark.parametrize("where", ["model", "layer", "mlp"])
def test_what_was_done_to_modules_before(where):
    """Sharding, compilation and replaced forwards of any part are refused, and nothing has changed."""
    plan = RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN)))

    def part(model):
        layer = model.model.layers[1]
        return {"model": model, "layer": layer, "mlp": layer.mlp}[where]

    model = fresh("llama")
    part(model).forward = part(model).forward
    with expect(TypeError, "whose forward was replaced"):
        models.route(model, plan)
    del part(model).forward
    sharded = type("FSDPPart", (type(part(model)),), {"_get_fsdp_state": lambda self: None})
    part(model).__class__ = sharded
    with expect(TypeError, "that FSDP manages, expected to route the model before it is sharded"):
        models.route(model, plan)
    part(model).__class__ = sharded.__base__
    if where != "model":
        owner, name = (model.model.layers, "1") if where == "layer" else (model.model.layers[1], "mlp")
        setattr(owner, name, torch.compile(getattr(owner, name)))
        with expect(TypeError, "compiled module"):
            models.route(model, plan)
        setattr(owner, name, getattr(owner, name)._orig_mod)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain("llama").modules(), strict=True))
    models.route(model, plan)
    with expect(ValueError, "routed already"):
        models.route(model, plan)
    model.__class__ = type("FSDPPart", (type(model),), {})
    with expect(TypeError, "something made another class of since it was routed"):
        unroute(model)


def test_layers_that_were_routed_alone():
    """A model of which a part is routed is refused, and that part stays as it was."""
    plan = RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN)))
    model = fresh("llama")
    models.route(model.model, plan)
    kinds = [type(module) for module in model.modules()]
    with expect(ValueError, "routed already"):
        models.route(model, plan)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "nano_gpt"])
def test_tied_parameters(name):
    options = {"architecture": NANO_GPT} if name == "nano_gpt" else {}
    embedding, head = EmbeddingSites([[1.0], [0.0]]), LinearSites(update_rows=[[1.0], [0.0]])
    with pytest.warns(RuntimeWarning, match="RoutingPlan.embedding is given and lm_head is not"):
        models.route(fresh(name), RoutingPlan(2, embedding=embedding), **options)
    with pytest.warns(RuntimeWarning, match="RoutingPlan.lm_head is given and embedding is not"):
        models.route(fresh(name), RoutingPlan(2, lm_head=head), **options)
    models.route(fresh(name), RoutingPlan(2, embedding=embedding, lm_head=head), **options)  # no warning
    models.route(fresh("llama"), RoutingPlan(2, lm_head=head))  # is not tied


def test_model_without_a_head():
    """A base model alone, as it is inside of others: the same paths without the first name."""
    tokens, _, ids = batch()
    whole = routed("llama", RoutingPlan(2, **update_sites("llama") | {"lm_head": None}))
    base = fresh("llama").model
    models.route(base, whole.routing_plan)
    states = base(tokens, route_ids=ids).last_hidden_state
    whole.lm_head(states).sum().backward()
    got = {f"model.{key}": value for key, value in model_zoo.gradients(base).items()}
    whole(tokens, route_ids=ids).logits.sum().backward()
    expected = model_zoo.gradients(whole)
    assert all(torch.equal(got[key], expected[key]) for key in got)
    with expect(ValueError, "RoutingPlan.lm_head: got sites, expected None: LlamaModel has no lm_head"):
        models.route(fresh("llama").model, RoutingPlan(2, lm_head=LinearSites(update_rows=[[1.0], [0.0]])))


# Errors of calls


@pytest.fixture(scope="module")
def llamas():
    """One that masks in attention, one that does not."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(0, 2, (2, HIDDEN), generator=generator).float()
    return {
        "routed": routed("llama", RoutingPlan(2, attention=AttentionSites(heads=[[1.0], [0.0]]))),
        "own": routed("llama", RoutingPlan(2, mlp=MLPSites(hidden=hidden))),
    }


@pytest.mark.parametrize("attention", ["routed", "own"])
def test_errors_of_calls(llamas, attention):
    model = llamas[attention]
    tokens, _, ids = batch()
    for name in (
        "route_id",
        "routes_ids",
        "route_idx",
        "rout_strength",
        "strength",
        "route_strengths",
        "router",
        "route",
    ):
        with expect(TypeError, f"unexpected keyword argument {name!r}"):
            model(tokens, **{name: ids})
    for wrong, message in (
        (ids[:, :-1], "route_ids: got shape [2, 9], expected that of the tokens [2, 10]"),
        (ids[:1], "route_ids: got shape [1, 10]"),
        (ids[0], "route_ids: got shape [10]"),
        (ids.flatten(), "route_ids: got shape [20]"),
        (ids + 1, "ids: got "),
        (ids - 1, "ids: got "),
    ):
        with expect(ValueError, message):
            model(tokens, route_ids=wrong)
    with expect(TypeError, "integer or bool dtype"):
        model(tokens, route_ids=ids.float())
    with expect(ValueError, "route_ids: got None beside route_strength"):
        model(tokens, route_strength=torch.tensor(0.5))
    with expect(ValueError, "strength: got shape [10]"):
        model(tokens, route_ids=ids, route_strength=torch.rand(10))
    with expect(ValueError, "routes: got routes beside route_ids"):
        model(tokens, route_ids=ids, routes=Routes.of(ids, 2))
    with expect(TypeError, "routes: got a Tensor, expected gradroute.Routes"):
        model(tokens, routes=ids)
    with expect(ValueError, "routes: got 3 routes, expected the plan's num_routes = 2"):
        model(tokens, routes=Routes.of(ids, 3))
    with expect(ValueError, "route_ids: got shape [20]"):
        model(tokens, routes=Routes.of(ids.flatten(), 2))
    cache = model(tokens, use_cache=True).past_key_values
    with expect(ValueError, "got a cache beside routes"):
        model(tokens, route_ids=ids, past_key_values=cache)
    with expect(ValueError, "got a cache beside routes"):
        model(tokens, route_ids=ids, use_cache=True)
    assert model(tokens, route_ids=ids).past_key_values is None
    with expect(TypeError, "generate() got route_ids"):
        model.generate(tokens, route_ids=ids)
    assert torch.equal(  # after an error nothing is left of its routes
        model_zoo.logits_of(model, tokens), model_zoo.logits_of(fresh("llama"), tokens)
    )


def test_masks_that_are_refused(llamas):
    tokens, targets, ids = batch()
    causal = torch.ones(10, 10, dtype=torch.bool).tril().expand(2, 1, 10, 10)
    model = llamas["routed"]
    with expect(ValueError, "attention_mask: got [2, 1, 10, 10], expected a padding mask [2, 10]"):
        model(tokens, attention_mask=causal, route_ids=ids)
    with expect(ValueError, "attention_mask: got dict, expected a padding mask"):
        model(tokens, attention_mask={"full_attention": causal}, route_ids=ids)
    with expect(ValueError, "attention_mask: got [2, 9]"):
        model(tokens, attention_mask=torch.ones(2, 9), route_ids=ids)
    # The model's own attention takes what it always does.
    additive = torch.zeros(2, 1, 10, 10).masked_fill(~causal, torch.finfo(torch.float32).min)
    got = backward(llamas["own"], tokens, targets, attention_mask=additive, route_ids=ids)
    check(got, by_hand("llama", llamas["own"].routing_plan, ids, tokens, targets))


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "nano_gpt"])
@pytest.mark.parametrize("part", ["layer", "mlp", "attention", "norm", "head"])
def test_routes_that_do_not_arrive(name, part):
    """A module that was replaced after the model was routed trains with routes no more: an error, not silence."""
    tokens, targets, ids = batch()
    sites = update_sites(name)
    model, unrouted = routed(name, RoutingPlan(2, **sites)), fresh(name)
    kind = KINDS[name]
    path = {
        "layer": f"{kind.layers}.1",
        "mlp": f"{kind.layers}.1.mlp",
        "attention": f"{kind.layers}.1.{kind.attention}",
        "norm": f"{kind.layers}.1.{kind.norms[1]}",
        "head": "lm_head",
    }[part]
    owner, _, child = path.rpartition(".")
    setattr(model.get_submodule(owner), child, unrouted.get_submodule(path))
    with pytest.raises((RuntimeError, TypeError), match="routes"):
        model_zoo.run(model, tokens, targets, route_ids=ids)


def test_embeddings_that_routes_do_not_reach():
    tokens, _, ids = batch()
    model = routed("llama", RoutingPlan(2, embedding=EmbeddingSites(table(WIDTH))))
    with expect(ValueError, "inputs_embeds: got embeddings beside routes, expected input_ids"):
        model(inputs_embeds=model.model.embed_tokens(tokens).detach(), route_ids=ids)


def test_ids_of_all_kinds():
    """Lists, bools and small integers; strengths as numbers."""
    tokens, targets, ids = batch()
    plan = RoutingPlan(2, **all_sites("llama"))
    model = routed("llama", plan)
    expected = backward(model, tokens, targets, route_ids=ids)
    for same in (ids.tolist(), ids.bool(), ids.to(torch.uint8), ids.numpy()):
        got = backward(model, tokens, targets, route_ids=same)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    got = backward(model, tokens, targets, route_ids=ids, route_strength=0.25)
    check(got, by_hand("llama", plan, ids, tokens, targets, torch.tensor(0.25)))
    got = model(tokens, None, None, None, None, tokens, route_ids=ids)  # labels by position
    assert got.loss is not None


# Presets


def tables_of(plan, layers=4, **changes):
    """By layer and site the weights of a plan for a Llama-like shape."""
    widths = {"d_model": 16, "d_ff": 24, "heads": 4, "kv_heads": 2, "head_dim": 4}
    return [
        {
            f"{entry}.{site}": table.weights
            for entry, sites in each._asdict().items()
            if sites is not None
            for site, table in sites.tables.items()
        }
        for each in plan.layers(Shape(layers, **widths | changes))
    ]


def test_localize_mlp():
    plan = models.localize_mlp(range(1, 3), 5, route=2, off=-0.5)
    assert plan.num_routes == 3
    rows = torch.ones(3, 24)
    rows[2, 5:] = -0.5
    first, *chosen, last = tables_of(plan)
    assert first == last == {}
    for tables in chosen:
        assert tables.keys() == {"mlp.hidden"}
        assert torch.equal(tables["mlp.hidden"], rows)
    plan = models.localize_mlp([0], [3, 23], num_routes=5, on=2.0)
    rows = torch.ones(5, 24)
    rows[1] = 0
    rows[1, [3, 23]] = 2
    assert torch.equal(tables_of(plan)[0]["mlp.hidden"], rows)
    rows = torch.zeros(24)
    rows[20:] = 1
    plan = models.localize_mlp([3], slice(20, 24))
    assert torch.equal(tables_of(plan)[3]["mlp.hidden"][1], rows)
    with expect(ValueError, "layers: got [4], expected indices from 0 to 3"):
        tables_of(models.localize_mlp([0, 4], 5))


def test_steering():
    plan = models.steering([1, 2], dim=3, off=0.25)
    rows = torch.ones(2, 16)
    rows[1] = 0.25
    rows[1, 3] = 1
    first, *chosen, last = tables_of(plan)
    assert first == last == {}
    for tables in chosen:
        assert tables.keys() == {"residual.post"}
        assert torch.equal(tables["residual.post"], rows)
    several = models.steering([0], dim=[0, 15], route=0, num_routes=2)
    assert tables_of(several)[0]["residual.post"].tolist() == [[1.0, *[0.0] * 14, 1.0], [1.0] * 16]
    with expect(ValueError, "layers: got [-1]"):
        tables_of(models.steering([-1]))
    with expect(ValueError, "where[1]: got index 16"):
        tables_of(models.steering([0], 16))


def test_era():
    plan = models.era(units=8, off=-0.1)
    rows = torch.ones(2, 24)
    rows[1, :16] = -0.1
    for tables in tables_of(plan):
        assert tables.keys() == {"mlp.hidden"}
        assert torch.equal(tables["mlp.hidden"], rows)
    only = tables_of(models.era([2], units=8))
    assert [bool(tables) for tables in only] == [False, False, True, False]
    with expect(ValueError, "units: got 25, expected 0 to 24"):
        tables_of(models.era(units=25))


def test_sgtm_tables():
    shape = Shape(2, 16, 24, 4, 2, 4)
    plan = models.sgtm(shape, 2, 6, unlabelled=2, layers=[1])
    first, last = tables_of(plan, 2)
    assert first == {}
    heads = [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert last["attention.update_q"].tolist() == last["attention.update_out"].tolist() == heads
    assert last["attention.update_kv"].tolist() == [[1, 1], [0, 1], [1, 1]]
    assert last["attention.forward_heads"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert last["mlp.forward"].tolist() == [[1] * 18 + [0] * 6, [1] * 24, [1] * 24]
    units = [[1] * 24, [0] * 18 + [1] * 6, [1] * 24]
    assert last["mlp.update_in"].tolist() == last["mlp.update_out"].tolist() == units
    assert not any("bias" in site for site in last)
    biased = tables_of(plan, 2, attention_output_bias=True, mlp_output_bias=True)[1]
    for entry in ("attention", "mlp"):
        assert biased[f"{entry}.update_output_bias"].tolist() == [[1], [0], [1]]
    assert plan.norm is None
    assert plan.embedding is None
    other = models.sgtm(shape, 1, 6, retain=1, forget=0)
    assert tables_of(other, 2)[0]["attention.update_kv"].tolist() == [[0, 0], [1, 1]]
    for arguments, message in (
        ({"forget_heads": 5}, "forget_heads: got 5, expected 0 to 4"),
        ({"forget_units": 25}, "forget_units: got 25, expected 0 to 24"),
        ({"forget_heads": 0, "forget_units": 0}, "expected a forget part"),
        ({"forget_units": 1, "forget": 0}, "expected different routes"),
        ({"forget_units": 1, "unlabelled": -1}, "expected different routes"),
        ({"forget_units": 1, "layers": [2]}, "layers: got [2], expected indices from 0 to 1"),
    ):
        with expect(ValueError, message):
            models.sgtm(shape, **arguments)
    with expect(TypeError, "expected a transformers configuration"):
        models.sgtm(3)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_shape_of_configurations(name):
    kind = KINDS[name]
    layers = len(plain(name).get_submodule(kind.layers))
    assert Shape.of(plain(name).config) == Shape(layers, WIDTH, HIDDEN, HEADS, kind.kv_heads, kind.head_dim)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_shape_is_read_off_layers_where_no_configuration_says_it(name):
    model = fresh(name)
    architecture = models.ARCHITECTURES[model.config.model_type]
    shape = architecture.layer.shape_of(model.get_submodule(architecture.layers))
    assert shape == Shape.of(model.config)


@pytest.mark.parametrize("name", NAMES)
def test_shape_that_plans_are_given(name):
    kind, given = KINDS[name], []

    def sites(index, shape):
        given.append((index, shape))
        return MLPSites(hidden=table(shape.d_ff))

    model = routed(name, RoutingPlan(2, mlp=sites))
    layers = len(model.get_submodule(kind.layers))
    biased = name in WITH_OUTPUT_BIAS
    shape = Shape(layers, WIDTH, HIDDEN, HEADS, kind.kv_heads, kind.head_dim, biased, biased)
    assert given == [(index, shape) for index in range(layers)]
    assert isinstance(model.routing_plan, RoutingPlan)
    assert all(isinstance(entry.tables["hidden"], Table) for entry in model.routing_plan.mlp)


def test_tables_of_ones_do_not_make_attention_routed():
    """Without forget heads the preset's tables of heads are ones: attention stays the model's own."""
    model = fresh("llama")
    models.route(model, models.sgtm(model.config, forget_heads=0, forget_units=16))
    assert not any(layer.self_attn._routing["everywhere"] for layer in model.model.layers)


def test_sgtm_keeps_the_head_from_forget_tokens():
    model = fresh("llama")
    models.route(model, models.sgtm(model.config, forget_units=16, joint_head=False))
    tokens = torch.randint(3, VOCABULARY, (2, 6))
    for forget in (True, False):
        model.zero_grad()
        model(tokens, labels=tokens, route_ids=torch.full_like(tokens, int(forget))).loss.backward()
        assert (model.lm_head.weight.grad == 0).all() == forget


def test_bounds_of_documents_alone_are_refused_where_the_model_attends_itself():
    model = models.route(fresh("llama"), models.localize_mlp([0], 8))
    tokens = torch.randint(3, VOCABULARY, (1, 6))
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: got bounds of documents without position_ids"):
        model(tokens, route_ids=torch.zeros_like(tokens), cu_seq_lens_q=bounds)


def test_sites_of_modules_with_routed_parts_are_the_plans():
    model = models.route(fresh("llama"), models.localize_mlp([0], 8))
    mlp = model.model.layers[0].mlp
    with pytest.raises(TypeError, match=r"LlamaMLP\.sites: got sites for a module whose parts"):
        mlp.sites = mlp.sites


# Dynamo's own, of hidden states that a compiled layer is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_copies_of_compiled_layers_are_their_own():
    """What torch.compile keeps on a module is bound to that very module."""
    tokens, targets, ids = batch()
    model = routed("llama", RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
    for layer in model.model.layers:
        layer.compile(backend="eager")
    expected = backward(model, tokens, targets, route_ids=ids)
    model.zero_grad()
    got = backward(copy.deepcopy(model), tokens, targets, route_ids=ids)
    check(got, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_ids_that_come_past_the_model_are_refused(name):
    tokens, _, ids = batch()
    model = routed(name, models.sgtm(shape_of(name), 1, 16))
    with expect(
        TypeError, "got route_ids, expected routes: call the model that was routed, not its base model"
    ):
        model.base_model(tokens, route_ids=ids)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "phi3", "gemma3"])
def test_bidirectional_windows(name):
    tokens, _, ids = batch()
    model = model_zoo.build(name, is_causal=False) if hasattr(KINDS[name].config(), "is_causal") else None
    if model is None:
        model = fresh(name)
        model.config.is_causal = False
    expected = model_zoo.logits_of(model, tokens)
    assert not torch.allclose(expected, model_zoo.logits_of(plain(name), tokens))
    models.route(model, RoutingPlan(2, attention=AttentionSites(heads=table(HEADS))))
    assert model_zoo.error(model_zoo.logits_of(model, tokens, route_ids=ids), expected) <= TOLERANCE


def test_a_linear_layer_with_another_forward_is_called():
    tokens, _, ids = batch()
    model = fresh("llama")
    up = model.model.layers[0].mlp.up_proj
    original = up.forward
    up.forward = lambda x: original(x) * 3
    expected = model_zoo.logits_of(model, tokens)
    models.route(model, RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
    assert torch.equal(model_zoo.logits_of(model, tokens, route_ids=ids), expected)


def test_hooks_on_an_activation_are_refused():
    tokens, _, ids = batch()
    model = routed("llama", RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, inputs, output: output * 0)
    model(tokens)
    with expect(RuntimeError, "LlamaMLP.act_fn: got hooks or another forward, expected none beside routes"):
        model(tokens, route_ids=ids)


def test_heads_for_other_tasks():
    """A forward that does not name use_cache hands it on."""
    tokens, _, ids = batch()
    config = KINDS["gpt2"].config()
    model = transformers.AutoModelForQuestionAnswering.from_config(config).eval()
    expected = model(tokens, use_cache=False).start_logits
    models.route(model, models.sgtm(config, 1, 16, retain=1, forget=0))
    got = model(tokens, route_ids=torch.zeros_like(ids)).start_logits
    assert model_zoo.error(got, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("argument", "value"),
    [("output_attentions", True), ("logits_to_keep", 3), ("encoder_hidden_states", torch.zeros(1))],
)
def test_arguments_that_routed_models_cannot_honour(argument, value):
    tokens, _, ids = batch()
    sites = {"lm_head": LinearSites(update_rows=table(1)), "attention": AttentionSites(heads=table(HEADS))}
    model = routed("llama", RoutingPlan(2, **sites))
    with expect(ValueError, f"{argument}: got "):
        model(tokens, route_ids=ids, **{argument: value})


def test_a_checkpoint_of_the_whole_model_after_routed_training():
    tokens, targets, ids = batch()
    model = routed("llama", RoutingPlan(2, final_norm=NormSites(table(WIDTH))))
    expected = backward(fresh("llama"), tokens, targets)
    backward(model, tokens, targets, route_ids=ids)
    model.zero_grad()
    logits = torch.utils.checkpoint.checkpoint(
        lambda: model_zoo.logits_of(model, tokens), use_reentrant=False
    )
    model_zoo.loss_of(logits, targets).backward()
    check(model_zoo.gradients(model), expected)
    with expect(RuntimeError, "got a recomputation in backward without routes"):
        model.zero_grad()
        hidden = model.model(tokens).last_hidden_state
        torch.utils.checkpoint.checkpoint(model.model.norm, hidden, use_reentrant=False).sum().backward()


def test_an_instance_of_a_routed_class_is_not_routed_itself():
    tokens, _, ids = batch()
    model = routed("llama", RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
    other = type(model)(model.config)
    with expect(TypeError, "that route() never saw"):
        other(tokens, route_ids=ids)
