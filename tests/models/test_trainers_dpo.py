"""routed_trainer of TRL's DPOTrainer: the policy is routed, its reference is not."""

import copy
import re

import pytest
import tiny_models as tiny
import torch

pytest.importorskip("trl")

import trl_cases as cases
from trl import DPOConfig, DPOTrainer

from gradroute import LinearSites
from gradroute.models import RoutingPlan, route, routed_trainer, unroute, unrouted

BETA = 0.1
PAIRS = [(2, 3, 4, 1), (3, 2, 3, 0), (2, 4, 2, [0, 1]), (4, 3, 3, [1, 1])]


def rows():
    """Prompts, completions that were chosen and rejected, and a route for both, or one for each."""
    return [
        {
            "prompt": cases.text(cases.ids(prompt, i)),
            "chosen": f" {cases.text(cases.ids(chosen, i + 4))} <eos>",
            "rejected": f" {cases.text(cases.ids(rejected, i + 8))} <eos>",
            "route_ids": route_ids if isinstance(route_ids, list) else [route_ids] * 2,
        }
        for i, (prompt, chosen, rejected, route_ids) in enumerate(PAIRS)
    ]


def batch():
    """The tokens of the chosen completions behind their prompts, then of the rejected ones, with their routes."""
    sequences, starts, routes = [], [], []
    for which in (0, 1):
        for i, (prompt, chosen, rejected, route_ids) in enumerate(PAIRS):
            completion = (cases.ids(chosen, i + 4), cases.ids(rejected, i + 8))[which]
            sequences.append([*cases.ids(prompt, i), *completion, cases.EOS])
            starts.append(prompt)
            routes.append(route_ids[which] if isinstance(route_ids, list) else route_ids)
    width = max(map(len, sequences))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])
    scored = mask * (torch.arange(width) >= torch.tensor(starts)[:, None])
    return tokens, mask, scored, torch.tensor(routes)[:, None] * mask


def log_probabilities(model, tokens, mask, scored, **routes):
    with torch.enable_grad() if routes else torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask, **routes).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (chosen * scored[:, 1:]).sum(1)


def loss(model, reference, route=None):
    """The sigmoid loss of DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""
    *given, routes = batch()
    routes = routes if route is None else torch.full_like(routes, route)
    ratios = log_probabilities(model, *given, route_ids=routes) - log_probabilities(reference, *given)
    chosen, rejected = ratios.chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def trained(tmp_path, model, reference, **options):
    arguments = DPOConfig(tmp_path, **cases.STEP | {"beta": BETA} | options)
    made = routed_trainer(DPOTrainer)(
        copy.deepcopy(model),
        reference,
        arguments,
        train_dataset=cases.dataset(rows()),
        processing_class=cases.tokenizer(),
    )
    return cases.trained(made)


def reference_of(model):
    """A model near the policy, but another."""
    torch.manual_seed(1)
    reference = unroute(copy.deepcopy(model)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return reference


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"remove_unused_columns": False},
                {"activation_checkpointing": True},
                {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
                {"precompute_ref_log_probs": True},
            )
        ),
    ],
    ids=lambda options: "-".join(options) or "none",
)
@pytest.mark.setup("TRL DPOTrainer", "routed_trainer: a route a pair or two, the reference unrouted")
def test_a_step(tmp_path, options):
    model = cases.routed()
    reference = reference_of(model)
    with cases.deprecations():
        got = trained(tmp_path, model, copy.deepcopy(reference), **options)
    cases.assert_close(got, cases.stepped(model, lambda copied: loss(copied, reference)))
    cases.assert_routed(got, cases.stepped(model, lambda copied: loss(copied, reference, route=0)))


@pytest.mark.slow
def test_a_reference_that_is_routed_too_is_not_given_routes(tmp_path):
    """A copy of the routed policy sees all units, which the policy's tokens of route 0 do not."""
    model = cases.routed(cases.forward_plan())
    reference = copy.deepcopy(model).eval()
    got = trained(tmp_path, model, copy.deepcopy(reference))
    cases.assert_close(got, cases.stepped(model, lambda copied: loss(copied, reference)))


@pytest.mark.slow
@pytest.mark.setup("TRL DPOTrainer", "routed_trainer: a plan of the head, by all logits")
def test_a_plan_of_the_head(tmp_path):
    model = cases.routed(RoutingPlan(2, lm_head=LinearSites(update_rows=[[1.0], [0.0]])))
    reference = reference_of(model)
    got = trained(tmp_path, model, copy.deepcopy(reference))
    cases.assert_close(got, cases.stepped(model, lambda copied: loss(copied, reference)))


@pytest.mark.slow
@pytest.mark.setup("TRL DPOTrainer", "routed_trainer: adapters, whose copy is the reference")
def test_adapters_whose_reference_is_a_copy_of_them(tmp_path):
    """The trainer adds that copy, "ref", to the routed model, and makes it active for the reference's forward."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    with cases.deprecations():
        model = peft.get_peft_model(tiny.llama(), config)
    route(model, RoutingPlan(2, adapters={"default": [1]}))
    reference = unroute(copy.deepcopy(model))
    got = trained(tmp_path, model, None)
    expected = cases.stepped(model, lambda copied: loss(copied, reference))
    cases.assert_close(got, expected)
    cases.assert_routed(got, cases.stepped(model, lambda copied: loss(copied, reference, route=1)))


@pytest.mark.slow
def test_evaluation_is_unrouted(tmp_path):
    model = cases.routed(cases.forward_plan())
    reference = reference_of(model)
    made = routed_trainer(DPOTrainer)(
        model,
        copy.deepcopy(reference),
        DPOConfig(tmp_path, **cases.STEP | {"beta": BETA}),
        train_dataset=cases.dataset(rows()),
        processing_class=cases.tokenizer(),
    )
    with cases.deprecations():
        got = made.evaluate(cases.dataset(rows()))["eval_loss"]
    plain = unroute(copy.deepcopy(model))
    *given, _ = batch()
    chosen, rejected = (log_probabilities(plain, *given) - log_probabilities(reference, *given)).chunk(2)
    expected = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean().item()
    assert got == pytest.approx(expected, abs=1e-5)
    assert abs(loss(model, reference).item() - expected) > 1e-4


@pytest.mark.setup(
    "TRL DPOTrainer", "DPOTrainer itself", refused="it drops the routes; routed_trainer keeps them"
)
@pytest.mark.slow
def test_the_trainer_itself_does_not_train_without_routes(tmp_path):
    model = cases.routed()
    made = DPOTrainer(
        copy.deepcopy(model),
        reference_of(model),
        DPOConfig(tmp_path, **cases.STEP),
        train_dataset=cases.dataset(rows()),
        processing_class=cases.tokenizer(),
    )
    with pytest.raises(RuntimeError, match="LlamaModel: got a forward in training mode without route_ids"):
        cases.trained(made)
    with unrouted(made.model):
        cases.trained(made)


@pytest.mark.slow
def test_wrong_routes(tmp_path):
    wrong = [row | {"route_ids": [0, 1, 0]} for row in rows()]
    made = routed_trainer(DPOTrainer)(
        cases.routed(),
        tiny.llama(),
        DPOConfig(tmp_path, **cases.STEP),
        train_dataset=cases.dataset(wrong),
        processing_class=cases.tokenizer(),
    )
    message = (
        "examples[0]['route_ids']: got 3 numbers, expected 2, one for each of the chosen and the rejected"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        cases.trained(made)
