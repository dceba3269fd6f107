"""SGTM's plan has the gradients of SGTM's own recipe, document by document."""

import functools

import pytest
import torch

pytest.importorskip("transformers")

import model_zoo
from model_zoo import HEADS, HIDDEN, LAYOUTS, NAMES, VOCABULARY, backward, fresh
from routed_by_hand import linear_matrix
from routed_models import (
    batch,
    check,
    check_differ,
    expect,
    routed,
    shape_of,
    tables_of,
)

from gradroute import models
from gradroute.models import Shape


def recipe(name, part, label, forget_heads, forget_units):
    """SGTM's gradients of a batch of one label: zeros in forward where it retains, in .grad where it forgets."""
    model, layout = fresh(name), LAYOUTS[name]
    features = forget_heads * layout.head_dim
    layers = model.get_submodule(layout.layers)
    if label == "retain":
        for layer in layers:
            output = layer.get_submodule(layout.attention).get_submodule(layout.output)
            output.register_forward_pre_hook(functools.partial(_without_last, features))
            layer.get_submodule(layout.outer).register_forward_pre_hook(
                functools.partial(_without_last, forget_units)
            )
    tokens, targets = part
    model_zoo.run(model, tokens, targets).backward()
    if label == "forget":
        for layer in layers:
            _keep_forget_gradients(layer, layout, forget_heads, forget_units)
    return model_zoo.gradients(model)


def _without_last(count, module, args):
    x = args[0].clone()
    x[..., x.shape[-1] - count :] = 0
    return (x, *args[1:])


def _keep_forget_gradients(layer, layout, forget_heads, forget_units):
    attention, head_dim = layer.get_submodule(layout.attention), layout.head_dim
    forget_kv_heads = forget_heads // (HEADS // layout.kv_heads)
    q, kv = (
        (torch.arange(heads) >= heads - count).repeat_interleave(head_dim)
        for heads, count in ((HEADS, forget_heads), (layout.kv_heads, forget_kv_heads))
    )
    if layout.qkv_layout == "separate":
        rows = [q, kv, kv]
    elif layout.qkv_layout == "fused":
        rows = [torch.cat((q, kv, kv))]
    else:
        rows = [torch.stack([part.view(HEADS, -1) for part in (q, kv, kv)], 1).flatten()]
    for linear, kept in zip(map(attention.get_submodule, layout.qkv), rows, strict=True):
        _zero_rows(linear, ~kept)
    _zero_columns(attention.get_submodule(layout.output), ~q)
    units = torch.arange(HIDDEN) >= HIDDEN - forget_units
    for linear in map(layer.get_submodule, layout.inner):
        _zero_rows(linear, ~(torch.cat((units, units)) if layout.fused_gate else units))
    _zero_columns(layer.get_submodule(layout.outer), ~units)


def _matrix_gradient(linear):
    return linear_matrix(linear, linear.weight.grad)


def _zero_rows(linear, rows):
    _matrix_gradient(linear)[rows] = 0
    if linear.bias is not None:
        linear.bias.grad[rows] = 0


def _zero_columns(linear, columns):
    _matrix_gradient(linear)[:, columns] = 0
    if linear.bias is not None:
        linear.bias.grad.zero_()


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
    outer = [key for key in got if LAYOUTS[name].outer in key]
    assert outer
    check(*({key: grads[key] for key in outer} for grads in (got, ordinary)))
    apart = models.sgtm(shape_of(name), 2, 16, joint_embedding=False)
    got = backward(routed(name, apart), tokens, targets, route_ids=forget)
    norms = [key for key in got if any(f".{norm}." in key for norm in LAYOUTS[name].norms)]
    assert len(norms) >= 4
    assert all((got[key] == 0).all() for key in norms)
    if not LAYOUTS[name].tied:
        assert (got["model.embed_tokens.weight"] == 0).all()
        assert (got["lm_head.weight"] != 0).any()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen2"])
def test_sgtm_output_biases(name):
    """Forget tokens leave a gradient of exactly 0 outside of the forget part, in biases of output projections too."""
    tokens, targets, _ = batch(2, 8)
    plan = models.sgtm(shape_of(name), 2, 16)
    got = backward(routed(name, plan), tokens, targets, route_ids=torch.ones(2, 8, dtype=torch.long))
    layout = LAYOUTS[name]
    biases = [key for key in got if key.endswith((f"{layout.output}.bias", f"{layout.outer}.bias"))]
    assert bool(biases) == layout.output_bias
    assert all((got[key] == 0).all() for key in biases)
    for key in got:
        if name == "qwen2" and key.endswith("k_proj.bias"):
            assert (got[key][: layout.head_dim] == 0).all()
            assert (got[key][layout.head_dim :] != 0).any()


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
        ({"forget_heads": 5}, "forget_heads: got 5, expected an int from 0 to 4"),
        ({"forget_units": 25}, "forget_units: got 25, expected an int from 0 to 24"),
        ({"forget_heads": 0, "forget_units": 0}, "expected a forget part"),
        ({"forget_units": 1, "forget": 0}, "expected different routes"),
        ({"forget_units": 1, "unlabelled": -1}, "unlabelled: got -1, expected an int from 0"),
        ({"forget_units": 1, "layers": [2]}, "layers: got [2], expected indices from 0 to 1"),
    ):
        with expect(ValueError, message):
            models.sgtm(shape, **arguments)
    with expect(TypeError, "expected a transformers configuration"):
        models.sgtm(3)


def test_sgtm_keeps_the_head_from_forget_tokens():
    model = fresh("llama")
    models.route(model, models.sgtm(model.config, forget_units=16, joint_head=False))
    tokens = torch.randint(3, VOCABULARY, (2, 6))
    for forget in (True, False):
        model.zero_grad()
        model(tokens, labels=tokens, route_ids=torch.full_like(tokens, int(forget))).loss.backward()
        assert (model.lm_head.weight.grad == 0).all() == forget
