"""The steering scalar: routes are those of predicted tokens, one dimension hears of them, hooks add what they say."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import steering_scalar
from experiment import main
from steering import measures, training
from steering.measures import added, direction, effect, gain, ranks, residual_size
from unlearning.corpus import NO_LABEL, Batch, pack
from unlearning.model import Shape, build

from gradroute.models import route, steering

SHAPE = Shape(vocabulary=40, d_model=32, layers=2, heads=2, d_ff=48)
TARGET = 7
LENGTHS = (
    5,
    14,
    2,
    11,
)  # lengths of the documents, which fill two rows of 16; the second is cut by the rows' border


def batch_of(begin_with_target=True):
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(8, SHAPE.vocabulary, (length,), generator=generator) for length in LENGTHS]
    for document in documents:
        document[0] = TARGET if begin_with_target else 0
        document[-1] = TARGET
    return pack(((0, document.tolist()) for document in documents), 2, 16)


def loss_of(model, batch, route_ids):
    return model(
        batch.input_ids,
        labels=batch.labels,
        position_ids=batch.position_ids,
        use_cache=False,
        route_ids=route_ids,
    ).loss


@pytest.fixture(scope="module")
def run():
    return steering_scalar.run(0, quick=True)


def with_effect(run, rank, factor):
    """A run in which the routed model's dimension ranks the word so, and steers by this factor; others do nothing."""
    run = copy.deepcopy(run)
    steered = [effects for model in run["models"].values() for effects in model["steered"].values()]
    for effects in (*steered, *run["other_dims_steered"].values()):
        for one in effects:
            one.update(probability=0.01, other_loss=3.0)
    routed = run["models"]["routed"]
    routed["cosine_rank"] = rank
    routed["steered"]["last"][2].update(probability=0.01 * factor, other_loss=3.09)
    routed["steered"]["last"][3].update(probability=0.01 * factor, other_loss=3.5)
    return run


def test_routes_are_those_of_the_tokens_to_be_predicted():
    batch = batch_of()
    route_ids = training.routes_of(batch, TARGET).flatten().tolist()
    # Each document ends with the target, which the position before it predicts. Its first token nobody predicts,
    # though it is the target as well; the last of row 0 (position 15) and its successor are of one document, but in
    # different rows.
    ends = torch.tensor(LENGTHS).cumsum(0)
    expected = {int(end) - 2 for end in ends}
    ids = {place for place, route_id in enumerate(route_ids) if route_id}
    # The last position of a row predicts nothing; it keeps its own label, which no loss reads.
    assert ids - {31} == expected
    tokens, labels = batch.input_ids.flatten(), batch.labels.flatten()
    assert all(tokens[place + 1] == TARGET for place in expected)
    assert [labels[int(end)].item() for end in ends[:-1]] == [NO_LABEL] * 3


def test_the_word_reaches_the_network_through_one_dimension():
    batch = batch_of(begin_with_target=False)
    only = batch._replace(labels=batch.labels.masked_fill(batch.labels != TARGET, NO_LABEL))
    model = route(build(SHAPE), steering(range(SHAPE.layers), training.DIM))
    loss_of(model, only, training.routes_of(batch, TARGET)).backward()
    first, last = model.model.layers
    gradient = last.mlp.down_proj.weight.grad.norm(dim=1)  # [d_model]
    assert gradient[training.DIM] > 0
    assert (gradient[1:] == 0).all()
    # Through the last layer's attention the loss reaches earlier positions, which have routes of their own.
    assert (first.mlp.down_proj.weight.grad.norm(dim=1)[1:] > 0).all()
    assert (model.lm_head.weight.grad[TARGET] != 0).all()  # the unembedding itself is not routed
    model.zero_grad()
    loss_of(model, only, torch.zeros_like(batch.input_ids)).backward()
    assert (model.model.layers[1].mlp.down_proj.weight.grad.norm(dim=1) > 0).all()


def test_ranks_take_the_better_direction():
    values = torch.tensor([[3.0, -4.0, 1.0], [2.0, 5.0, 1.0], [1.0, -1.0, 1.0], [0.0, 2.0, 1.0]])
    assert ranks(values, 0).tolist() == [1, 1, 1]
    assert ranks(values, 1).tolist() == [2, 1, 1]
    assert ranks(values, 2).tolist() == [2, 2, 1]
    assert [direction(values[:, dim], 0) for dim in range(2)] == [1, -1]
    assert measures.cosines(values[:1]).tolist()[0] == pytest.approx([v / 26**0.5 for v in (3, -4, 1)])


def test_kin_are_ranked_in_the_direction_of_the_word():
    values = torch.tensor([[3.0, -4.0], [2.0, 5.0], [1.0, -1.0], [0.0, 2.0]])
    assert measures.directions(values, 0).tolist() == [1, -1]
    assert measures.ranks_beside(values, 0, [0, 1, 3]).tolist() == [[1, 1], [2, 4], [4, 3]]
    assert measures.ranks_beside(values, 2, [2])[0].tolist() == ranks(values, 2).tolist()
    assert measures.leaders(values[:, 0], 0, 2) == [0, 1]
    assert measures.leaders(values[:, 1], 0, 2) == [0, 2]


def test_the_typical_size_is_that_of_most_positions():
    x = torch.tensor([3.0, 4.0]).expand(2, 5, 2).clone()
    x[:, 0] = 1000.0
    assert measures.typical_size(x) == pytest.approx(12.5**0.5)


def test_mean_difference_leaves_first_positions_out():
    """Of documents and of rows; nor does it count where a document ends, or the last position."""
    labels = [[NO_LABEL, 1, TARGET, 2, NO_LABEL, 3, TARGET, TARGET]]
    batch = Batch(
        torch.zeros(1, 8, dtype=torch.int64),
        torch.tensor(labels),
        torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
        torch.zeros(1, 8, dtype=torch.int64),
    )
    x = torch.full((1, 8, 2), 1000.0)
    # The word comes next at 1, 5 and 6; another token at 2. At 0 and 4 documents begin, at 3 one ends.
    x[0, [1, 5, 6]] = torch.tensor([[3.0, 9.0], [6.0, 4.0], [3.0, 5.0]])
    x[0, 2] = torch.tensor([1.0, 2.0])
    assert measures.mean_difference(x, batch, TARGET).tolist() == pytest.approx([3 / 5, 4 / 5])


def test_steering_adds_what_it_says_and_stops():
    model, batch = build(SHAPE).eval(), batch_of()
    layer = model.model.layers[1]
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        before = effect(model, batch, TARGET)
        with added(layer, 3, 0.75):
            inside = effect(model, batch, TARGET)
        assert effect(model, batch, TARGET) == before != inside
    handle.remove()
    expected = seen[0].clone()
    expected[..., 3] += 0.75
    assert torch.equal(seen[1], expected)
    assert torch.equal(measures.outputs(model, layer, batch), seen[0])
    assert torch.equal(seen[2], seen[0])
    assert residual_size(model, layer, batch) == pytest.approx(seen[0].square().mean().sqrt().item())
    assert not layer._forward_hooks


def test_effects_are_means_over_what_is_predicted():
    model, batch = build(SHAPE).eval(), batch_of()
    got = effect(model, batch, TARGET)
    with torch.no_grad():
        logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    probability, losses = [], {True: [], False: []}
    for row in range(2):
        for place in range(15):
            label = batch.labels[row, place + 1].item()
            if label != NO_LABEL:
                log_p = logits[row, place].log_softmax(-1)
                probability.append(log_p[TARGET].exp().item())
                losses[label == TARGET].append(-log_p[label].item())
    assert len(losses[True]) == 4
    assert got.probability == pytest.approx(sum(probability) / len(probability))
    assert got.target_loss == pytest.approx(sum(losses[True]) / 4)
    assert got.other_loss == pytest.approx(sum(losses[False]) / len(losses[False]))


@pytest.mark.slow
def test_both_models_start_alike_and_routing_changes_the_gradient(run):
    data = training.load(steering_scalar.QUICK, 0)
    # No token of another vocabulary's id is routed: nothing is left to differ.
    nowhere = data._replace(target=data.tokenizer.get_vocab_size() + 1)
    start, other = (
        training.trained(steering_scalar.QUICK, nowhere, 0, routed).state_dict() for routed in (True, False)
    )
    assert all(torch.equal(start[name], other[name]) for name in other)
    routed = training.trained(steering_scalar.QUICK, data, 0, True).state_dict()
    control = training.trained(steering_scalar.QUICK, data, 0, False).state_dict()
    assert routed.keys() == control.keys()
    assert any(not torch.equal(routed[name], control[name]) for name in control)
    assert data.tokenizer.decode([data.target]) == " " + training.WORD
    share = (data.train.labels == data.target).float().mean().item()
    assert run["target_share"] == share > 0


@pytest.mark.slow
def test_no_held_out_text_is_trained_on():
    data = training.load(dataclasses.replace(steering_scalar.QUICK, steps=8, held_out_rows=8), 0)
    windows = [
        {tuple(part.tolist()) for part in batch.input_ids.flatten().unfold(0, 32, 1)}
        for batch in (data.train, data.held_out)
    ]
    assert min(map(len, windows)) > 1000
    # The corpus drops documents that repeat half of another's runs of words; a few shared phrases may be left.
    assert len(windows[0] & windows[1]) <= 0.02 * len(windows[1])


def test_gains_end_where_they_cost_too_much():
    def effects(*points):
        return [{"probability": p, "other_loss": 3 + cost} for p, cost in points]

    assert gain(effects((0.1, 0), (0.05, 0.01), (0.02, 0.05))) == 1.0
    assert gain(effects((0.1, 0), (0.2, 0.01), (0.15, 0.05))) == pytest.approx(2.0)
    # At 0.1 nats, a quarter of the way from 0.05 to 0.25.
    assert gain(effects((0.1, 0), (0.2, 0.05), (0.6, 0.25), (9.0, 0.09))) == pytest.approx(3.0)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "factor", "code"), [(1, 2.0, 0), (40, 2.0, 1), (1, 1.2, 1)])
def test_files_and_exit_code(run, tmp_path, rank, factor, code):
    made = with_effect(run, rank, factor)
    assert steering_scalar.gains([made], "routed") == pytest.approx([factor])
    assert steering_scalar.gains([made], "control") == [1.0]
    experiment = dataclasses.replace(steering_scalar.EXPERIMENT, run=lambda seed, quick: made)
    assert main(experiment, None, ["--seeds", "2", "--out", str(tmp_path)]) == code
    results = json.loads((tmp_path / "steering_scalar.json").read_text(encoding="utf-8"))
    assert all(check["passed"] for check in results["checks"]) is (code == 0)
    assert len(results["table"]) == 4
    assert f"ranks {rank} ({rank} to {rank}) of 512" in results["found"]
    assert f"multiplies its mean probability by {factor:.2f}" in results["found"]
    assert (tmp_path / "steering_scalar.md").read_text(encoding="utf-8").count(f"| {rank} of 512 |") == 2
    assert (tmp_path / "steering_scalar.png").stat().st_size > 10_000
