"""A forget expert: who teaches and sees which part of a mixture, what ablation leaves, what balance counts, checks."""

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

import era_experts
from era_experts import (
    AFTER,
    ARMS,
    BEFORE,
    EXPERTS,
    EXPERTS_MASKED,
    NO_ROUTING,
    PURE,
    UNITS,
    UNITS_MASKED,
    chosen,
)
from experiment import main
from unlearning.corpus import FORGET, NO_LABEL, RETAIN, pack
from unlearning.experts import (
    BALANCE,
    MixtureShape,
    balanced_loss,
    build_mixture,
    by_experts,
    by_units,
    visits,
)
from unlearning.labelled import without
from unlearning.model import loss_of, output_of
from unlearning.training import fit

from gradroute.models import ablate, route, unroute

SHAPE = MixtureShape(vocabulary=300, d_model=16, layers=2, heads=2, experts=4, chosen=2, d_expert=12)
PLANS = {EXPERTS: by_experts(0.0), UNITS: by_units(SHAPE, 0.0)}


def documents(number, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 300, (7,), generator=generator).tolist() for _ in range(number)]


def rows(route, number=4, seed=0):
    return pack(((route, ids) for ids in documents(40, seed)), number, 16)


def mixed(number=4):
    both = zip(documents(20, 1), documents(20, 2), strict=True)
    return pack(((route, ids) for pair in both for route, ids in enumerate(pair)), number, 16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_mixture(SHAPE)


def parts(name):
    """Masks of the forget part of one mixture, by parameter."""
    expert = torch.arange(SHAPE.experts)[:, None, None] == SHAPE.experts - 1
    unit = torch.arange(SHAPE.d_expert) >= SHAPE.d_expert - SHAPE.forget_units
    if name == EXPERTS:
        return {"gate_up_proj": expert, "down_proj": expert}
    return {"gate_up_proj": torch.cat((unit, unit))[None, :, None], "down_proj": unit[None, None]}


@pytest.mark.parametrize("name", PLANS)
def test_forget_tokens_teach_the_forget_part_alone(model, name):
    plain = copy.deepcopy(model)
    route(model, PLANS[name])
    loss_of(model, rows(FORGET), True).backward()
    loss_of(plain, rows(FORGET), False).backward()
    # In the last layer nothing else changes what arrives at the experts.
    got, expected = (one.model.layers[-1].mlp for one in (model, plain))
    for parameter, part in parts(name).items():
        gradient, whole = (getattr(mixture.experts, parameter).grad for mixture in (got, expected))
        assert (whole * part).any()
        torch.testing.assert_close(gradient, whole * part)
    torch.testing.assert_close(got.gate.weight.grad, expected.gate.weight.grad)
    assert (model.lm_head.weight.grad == 0).all()
    assert (plain.lm_head.weight.grad != 0).any()


@pytest.mark.parametrize(
    ("name", "plan"), [(EXPERTS, by_experts(-0.5)), (UNITS, by_units(SHAPE, -0.5))], ids=list(PLANS)
)
def test_by_a_negative_weight_the_rest_unlearns(model, name, plan):
    plain = copy.deepcopy(model)
    route(model, plan)
    loss_of(model, rows(FORGET), True).backward()
    loss_of(plain, rows(FORGET), False).backward()
    for parameter, part in parts(name).items():
        got, whole = (getattr(one.model.layers[-1].mlp.experts, parameter).grad for one in (model, plain))
        torch.testing.assert_close(got, torch.where(part, whole, -0.5 * whole))


@pytest.mark.parametrize("name", PLANS)
def test_retain_tokens_neither_see_nor_teach_it(model, name):
    """And what they see is what ablation leaves, which further training does not fill again."""
    route(model, PLANS[name])
    data = rows(RETAIN)
    output = output_of(model, data, True)
    output.loss.backward()
    for layer in model.model.layers:
        for parameter, part in parts(name).items():
            gradient = getattr(layer.mlp.experts, parameter).grad
            assert not (gradient * part).any()
            assert (gradient * ~part).any()
    ablate(model, RETAIN)
    unroute(model)
    torch.testing.assert_close(output_of(model, data, False).logits, output.logits)
    model.zero_grad()
    fit(model, mixed(8), 1e-2, False, "test")
    for layer in model.model.layers:
        for parameter, part in parts(name).items():
            assert not (getattr(layer.mlp.experts, parameter) * part).any()


def test_the_parts_have_as_many_parameters():
    sizes = {"gate_up_proj": (4, 24, 16), "down_proj": (4, 16, 12)}
    counts = {
        name: sum(int(part.expand(sizes[key]).sum()) for key, part in parts(name).items()) for name in PLANS
    }
    assert counts == {EXPERTS: 3 * 16 * 12, UNITS: 3 * 16 * 12}
    for settings in (era_experts.SETTINGS, era_experts.QUICK):
        assert settings.shape.d_expert == settings.shape.forget_units * settings.shape.experts


def test_balance_is_that_of_transformers(model):
    """Where all tokens teach."""
    data = mixed()
    data = data._replace(labels=data.input_ids)
    model.router_aux_loss_coef = BALANCE
    expected = output_of(model, data, False, output_router_logits=True).loss
    model.router_aux_loss_coef = 0.0
    torch.testing.assert_close(balanced_loss(model, data, False), expected)
    assert balanced_loss(model, data, False) > loss_of(model, data, False)


def test_what_is_dropped_does_not_count_in_the_balance(model):
    """Other tokens in dropped documents give the same gradient."""
    data = without(mixed(), [FORGET])
    assert ((data.labels == NO_LABEL) & (data.position_ids > 0)).any()
    other = data._replace(input_ids=torch.where(data.route_ids == FORGET, 7, data.input_ids))
    gradients = []
    for batch in (data, other):
        model.zero_grad()
        balanced_loss(model, batch, False).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        # Experts multiply the rows of all tokens at once, in blocks whose sums may be rounded otherwise.
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("weight", "expected"), [(9.0, 1.0), (-9.0, 0.0)])
def test_visits_are_those_of_the_last_expert(model, weight, expected):
    """Of positive hidden states, by routers that send all of them to the last expert, or none."""
    data = mixed()
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, y: y.abs())
        layer.mlp.gate.weight.data.normal_(std=1e-3)[-1] = weight
    assert visits(model, data) == expected


@pytest.fixture(scope="module")
def run():
    return era_experts.run(0, quick=True)


def test_a_quick_run_has_every_model(run):
    assert [model["name"] for model in run["models"]] == list(ARMS)
    for model in run["models"]:
        assert len(model["relearning"]) == len(era_experts.QUICK.relearning)
        assert model["relearning"][0] == model["losses"]["forget"]
        if model["name"] != PURE:
            assert set(model["stages"]) == {BEFORE, AFTER}
            assert model["stages"][BEFORE] != model["stages"][AFTER]
            assert all(0 <= share <= 1 for share in model["visits"].values())
    assert chosen(run, NO_ROUTING)["losses"] != chosen(run, EXPERTS)["losses"]


GOOD = {
    NO_ROUTING: {"forget": 4.0, "rise": 0.2},
    PURE: {"forget": 6.0},
    EXPERTS: {"forget": 6.0, "rise": 1.5},
    UNITS: {"forget": 5.9, "rise": 1.2},
    EXPERTS_MASKED: {"forget": 6.4, "rise": 0.8, "retain": 4.3},
    UNITS_MASKED: {"forget": 6.2, "rise": 0.7, "retain": 4.1},
}


def made_up(**changes):
    """A run of these figures; of one method some are changed."""
    models = []
    for name in ARMS:
        figures = {"retain": 4.0, "rise": 0.0, "damage": 0.05, **GOOD[name], **changes.get(name, {})}
        forget, retain = figures["forget"], figures["retain"]
        before = {"forget": forget - figures["rise"], "retain": retain - figures["damage"]}
        models.append(
            {
                "name": name,
                "share": None,
                "losses": {"retain": retain, "forget": forget},
                "stages": {}
                if name == PURE
                else {BEFORE: before, AFTER: {"forget": forget, "retain": retain}},
                "relearning": [forget, figures.get("relearnt", forget - 0.1)],
                **({} if name == PURE else {"visits": {"retain": 0.1, "forget": 0.8}}),
            }
        )
    return {"settings": {"shape": {"experts": 8, "chosen": 2}, "relearning": [0, 1]}, "models": models}


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({PURE: {"forget": 4.4}}, [0]),
        ({EXPERTS: {"rise": 0.6}}, [1]),
        ({EXPERTS: {"damage": 0.2}}, [2]),
        ({EXPERTS: {"forget": 5.6}, UNITS: {"forget": 5.6}}, [3]),
        ({EXPERTS: {"retain": 5.8}, UNITS: {"retain": 5.8}}, [4]),
        ({EXPERTS: {"relearnt": 4.7}}, [5]),
        ({UNITS: {"forget": 6.4}}, [6]),
        ({EXPERTS: {"retain": 4.2}}, [7]),
    ],
)
def test_checks_can_fail(changes, failing):
    checks = era_experts.checks([made_up(**changes)])
    assert [index for index, check in enumerate(checks) if not check.passed] == failing


@pytest.mark.parametrize(
    ("units", "expected"),
    [(5.9, "about as much"), (5.0, "more"), (6.4, "less")],
)
def test_found_says_what_the_numbers_say(units, expected):
    text = era_experts.found([made_up(**{UNITS: {"forget": units}})])
    assert "Under the plan of experts 80 % of the licences' tokens come to be sent to the last expert" in text
    assert "Ablation raises the forget loss by +1.50 nats and the retain loss by +0.05" in text
    assert "2.00 nats above the un-routed one's" in text
    assert "experts reach 100 % of it and as many hidden units" in text
    assert f"so that experts unlearn {expected};" in text
    assert "experts reach 120 %, and 120 % after relearning, for +0.30 nats; hidden units 110 %" in text


def test_what_a_run_leaves(tmp_path, capsys):
    for made, code in ((made_up(), 0), (made_up(**{EXPERTS: {"damage": 0.2}}), 1)):
        recorded = dataclasses.replace(era_experts.EXPERIMENT, run=lambda seed, quick, made=made: made)
        assert main(recorded, None, ["--out", str(tmp_path), "--seeds", "2"]) == code
    results = json.loads((tmp_path / "era_experts.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in results["table"]] == list(ARMS)
    assert results["table"][1]["forget rise by ablation"] == "-"
    assert "| pure | 4.00 (4.00 to 4.00) | 6.00" in (tmp_path / "era_experts.md").read_text(encoding="utf-8")
    assert (tmp_path / "era_experts.png").read_bytes().startswith(b"\x89PNG")
    assert "FAILS" in capsys.readouterr().out
