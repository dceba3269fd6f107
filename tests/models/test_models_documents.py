"""Padded and packed batches of routed models have the gradients of their documents one by one."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from model_zoo import HEADS, HIDDEN, LAYOUTS, VOCABULARY, WIDTH, backward, fresh
from routed_by_hand import by_hand
from routed_models import OF_TRANSFORMERS, batch, check, check_differ, documents, route, routed, table

from gradroute import AttentionSites, MLPSites, models
from gradroute.models import ResidualSites, RoutingPlan


def of_documents(name, plan, parts):
    """The sum of the gradients that each document gives by itself."""
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
            heads=table(HEADS), key=table(LAYOUTS[name].kv_heads), score_edges=table(2), value_edges=table(2)
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
    """The control of test_packing: without bounds the documents of a row are one."""
    plan = MASKED["routed"]("llama")
    tokens, targets, ids = batch(1, 12)
    positions = torch.arange(6).repeat(2)[None]
    packed = backward(routed("llama", plan), tokens, targets, route_ids=ids, position_ids=positions)
    check_differ(packed, backward(routed("llama", plan), tokens, targets, route_ids=ids))


def test_bounds_of_documents_alone_are_refused_where_the_model_attends_itself():
    model = models.route(fresh("llama"), models.localize_mlp([0], 8))
    tokens = torch.randint(3, VOCABULARY, (1, 6))
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: got bounds of documents without position_ids"):
        model(tokens, route_ids=torch.zeros_like(tokens), cu_seq_lens_q=bounds)
