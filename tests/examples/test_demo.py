"""The demo's model on packed documents: they do not see each other, routes teach what they should, ablation saves."""

import importlib.metadata
import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from unlearning import corpus, cost
from unlearning.corpus import FORGET, RETAIN, Batch, pack
from unlearning.model import Shape, build, loss_of, routing_plan
from unlearning.training import predicted, saved_and_loaded

from gradroute.models import ablate, route, unroute

SHAPE = Shape(vocabulary=40, d_model=32, layers=2, heads=2, d_ff=48, forget_units=16)
LENGTHS = (
    5,
    14,
    2,
    11,
)  # lengths of the documents, which fill two rows of 16; the second is cut by the rows' border
ROUTES = (FORGET, RETAIN, RETAIN, FORGET)


def documents(*routes):
    generator = torch.Generator().manual_seed(0)
    for name, length in zip(routes, LENGTHS, strict=True):
        yield name, torch.randint(SHAPE.vocabulary, (length,), generator=generator).tolist()


def routed_model():
    model = build(SHAPE)
    return route(model, routing_plan(model, SHAPE))


def pieces(batch):
    """Every row of every document as a batch of its own."""
    begins = batch.position_ids == 0
    begins[:, 0] = True
    bounds = [*begins.flatten().nonzero().flatten().tolist(), begins.numel()]
    for begin, end in itertools.pairwise(bounds):
        yield Batch(*(field.view(1, -1)[:, begin:end] for field in batch))


def test_documents_fill_rows():
    batch = pack(documents(*ROUTES), rows=4, length=16)
    assert batch.input_ids.shape == (2, 16)
    assert batch.position_ids.flatten().tolist() == [i for length in LENGTHS for i in range(length)]
    assert batch.route_ids.flatten().tolist() == [
        r for r, n in zip(ROUTES, LENGTHS, strict=True) for _ in range(n)
    ]
    labelled = batch.position_ids > 0
    assert torch.equal(batch.labels[labelled], batch.input_ids[labelled])
    assert (batch.labels[~labelled] == -100).all()


@pytest.mark.parametrize("routed", [False, True])
def test_loss_and_attention_stay_inside_documents(routed):
    model, batch = routed_model(), pack(documents(*ROUTES), rows=2, length=16)
    parts = [part for part in pieces(batch) if predicted(part)]
    assert len(parts) == 5
    with torch.no_grad():
        total = sum(loss_of(model, part, routed) * predicted(part) for part in parts)
        torch.testing.assert_close(loss_of(model, batch, routed), total / predicted(batch))


def test_forget_tokens_train_their_units_and_what_is_joint():
    model = routed_model()
    loss_of(model, pack(documents(*(FORGET,) * 4), 2, 16), routed=True).backward()
    kept = slice(SHAPE.d_ff - SHAPE.forget_units)
    for name, weight in model.named_parameters():
        gradient = weight.grad
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            assert (gradient[kept] == 0).all()
        if name.endswith("down_proj.weight"):
            assert (gradient[:, kept] == 0).all()
        untouched = "self_attn" in name or "lm_head" in name
        assert bool((gradient != 0).any()) is not untouched, name


def test_the_saved_model_computes_what_retain_tokens_saw():
    model, batch = routed_model(), pack(documents(*(RETAIN,) * 4), 2, 16)
    with torch.no_grad():
        before = loss_of(model, batch, routed=True)
        assert not torch.equal(loss_of(model, batch, routed=False), before)
        ablate(model, RETAIN)
        loaded = saved_and_loaded(unroute(model))
        torch.testing.assert_close(loss_of(loaded, batch, routed=False), before)


def test_costs_are_those_of_equal_gradients(monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 1)
    measured = cost.measure(SHAPE, pack(documents(*ROUTES), 2, 16), torch.device("cpu"))
    assert list(measured) == [
        "unrouted",
        "routed",
        "routed, hidden units only",
        "detach, hidden units only",
    ]
    assert measured["routed"]["saved_bytes"] < measured["unrouted"]["saved_bytes"]
    assert measured["unrouted"]["saved_bytes"] < measured["detach, hidden units only"]["saved_bytes"]


def test_the_corpus_does_not_depend_on_where_packages_are(tmp_path, monkeypatch):
    """Nor on the order in which they are found."""
    found = []
    for folder in (tmp_path / "a", tmp_path / "z"):
        for name in ("first", "second"):
            information = folder / f"{name}-1.dist-info"
            information.mkdir(parents=True)
            (information / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")
            (information / "LICENSE").write_text(f"The licence of the {name}.")
            (information / "RECORD").write_text(f"{name}-1.dist-info/LICENSE,,\n")
        installed = list(importlib.metadata.distributions(path=[str(folder)]))
        monkeypatch.setattr(importlib.metadata, "distributions", lambda installed=installed: installed[::-1])
        found.append(list(corpus.licence_texts()))
        monkeypatch.undo()
    assert found[0] == found[1]
    assert found[0][-2:] == ["The licence of the first.", "The licence of the second."]
