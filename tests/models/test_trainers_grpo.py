"""routed_trainer of TRL's GRPOTrainer: routes of rollouts, in the forward of the policy's loss."""

import copy
import re

import pytest
import tiny_models as tiny
import torch

pytest.importorskip("trl")

import trl_cases as cases
from trl import GRPOConfig, GRPOTrainer

from gradroute import LinearSites
from gradroute.models import RoutingPlan, route, routed_trainer, unroute, unrouted

PROMPTS = [{"prompt": cases.text(cases.ids(2 + i, i)), "kind": i % 2, "route_ids": i % 2} for i in range(4)]
PLAIN = [{name: row[name] for name in ("prompt", "kind")} for row in PROMPTS]
COMPLETION = 4


def reward(completion_ids, **rollouts):
    """Differs within every group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def by_last_token(completion_ids, **rollouts):
    return [ids[-1] % 2 for ids in completion_ids]


def by_token(completion_ids, **rollouts):
    return [[token % 2 for token in ids] for ids in completion_ids]


def last_tokens(batch):
    lengths = batch["completion_mask"].sum(1)
    return batch["completion_ids"].gather(1, lengths[:, None] - 1) % 2


class Watched(routed_trainer(GRPOTrainer)):
    """Keeps the batches that it trained on, without their routes."""

    def _compute_loss(self, model, inputs):
        assert "route_ids" not in inputs
        self.batches = [*getattr(self, "batches", []), dict(inputs)]
        return super()._compute_loss(model, inputs)


def trainer(tmp_path, model, rows=PLAIN, trainer_class=Watched, route_fn=None, route_align=None, **options):
    fixed = {"num_generations": 2, "max_completion_length": COMPLETION, "loss_type": "grpo", "beta": 0.0}
    more = {"route_fn": route_fn, "route_align": route_align}
    with cases.deprecations():
        return trainer_class(
            model,
            reward,
            GRPOConfig(tmp_path, **cases.STEP | fixed | options),
            train_dataset=cases.dataset(rows),
            processing_class=cases.tokenizer(),
            **{name: value for name, value in more.items() if value is not None},
        )


def tokens_of(batch):
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return tokens, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def log_probabilities(model, batch, temperature=1.0, **routes):
    """Of the completions' tokens `[B, C]`."""
    tokens, mask = tokens_of(batch)
    logits = model(input_ids=tokens, attention_mask=mask, **routes).logits[:, :-1] / temperature
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return chosen[:, -batch["completion_ids"].shape[1] :]


def policy_loss(model, batch, routes, old=None, **options):
    """GRPO's clipped objective (Shao et al. 2024, arXiv 2402.03300, equation 3), without KL."""
    logps = log_probabilities(model, batch, route_ids=routes, **options)
    ratio = (logps - (logps.detach() if old is None else old)).exp()
    gain = batch["advantages"][:, None]
    loss = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
    mask = batch["completion_mask"]
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def whole(routes, batch):
    """One route a rollout, `[B, P + C]`."""
    return routes.expand(-1, tokens_of(batch)[0].shape[1]) * tokens_of(batch)[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"remove_unused_columns": True},
                {"activation_checkpointing": True},
                {"temperature": 0.7},
                {"pad_to_multiple_of": 4},
            )
        ),
    ],
    ids=lambda options: "-".join(options) or "none",
)
@pytest.mark.setup("TRL GRPOTrainer", "routed_trainer: routes by a function of the rollouts")
def test_routes_by_a_function_of_the_rollouts(tmp_path, options):
    """A function that looks at the completions chooses which part of the model they train."""
    model = cases.routed()
    made = trainer(tmp_path, copy.deepcopy(model), route_fn=by_last_token, **options)
    got = cases.trained(made)
    (batch,) = made.batches
    routes = whole(last_tokens(batch), batch)
    assert {0, 1} == set(last_tokens(batch).flatten().tolist())
    hot = {"temperature": options.get("temperature", 1.0)}
    cases.assert_close(got, cases.stepped(model, lambda copied: policy_loss(copied, batch, routes, **hot)))
    cases.assert_routed(
        got, cases.stepped(model, lambda copied: policy_loss(copied, batch, 0 * routes, **hot))
    )


@pytest.mark.slow
@pytest.mark.parametrize("align", ["position", "next_token"])
def test_routes_by_token(tmp_path, align):
    """Tokens of the completion have their own routes; prompts have those of the dataset."""
    model = cases.routed()
    made = trainer(tmp_path, copy.deepcopy(model), PROMPTS, route_fn=by_token, route_align=align)
    got = cases.trained(made)
    (batch,) = made.batches
    by_prompt = {tuple(cases.ids(2 + i, i)): i % 2 for i in range(4)}
    tokens, mask = tokens_of(batch)
    width = batch["prompt_ids"].shape[1]
    routes = tokens % 2
    for row, (prompt, kept) in enumerate(zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)):
        routes[row, :width] = by_prompt[tuple(prompt[kept.bool()].tolist())]
    if align == "next_token":
        lengths = width + batch["completion_mask"].sum(1)
        for row, length in enumerate(lengths):
            routes[row, : length - 1] = routes[row, 1:length].clone()
    cases.assert_close(got, cases.stepped(model, lambda copied: policy_loss(copied, batch, routes * mask)))


@pytest.mark.setup("TRL GRPOTrainer", "a route a prompt")
@pytest.mark.slow
def test_routes_of_the_prompts(tmp_path):
    model = cases.routed()
    made = trainer(tmp_path, copy.deepcopy(model), PROMPTS)
    got = cases.trained(made)
    (batch,) = made.batches
    lengths = batch["prompt_mask"].sum(1)  # a prompt of 2 + i tokens has route i % 2
    routes = whole((lengths % 2)[:, None], batch)
    cases.assert_close(got, cases.stepped(model, lambda copied: policy_loss(copied, batch, routes)))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [cases.hidden_plan, cases.forward_plan])
@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2, "max_steps": 2},
        {"steps_per_generation": 2, "max_steps": 2, "gradient_accumulation_steps": 1},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 2},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.setup("TRL GRPOTrainer", "routed_trainer: rollouts that several steps use")
def test_rollouts_that_several_steps_use(tmp_path, plan, options):
    """Shuffled and split, each rollout keeps its route; the ratio to old log-probabilities starts at 1."""
    model = cases.routed(plan())
    made = trainer(tmp_path, copy.deepcopy(model), route_fn=by_last_token, **options)
    got = cases.trained(made)
    accumulated = options.get("gradient_accumulation_steps", 1)
    optimized = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(optimized.parameters(), cases.LEARNING_RATE)
    with torch.no_grad():
        olds = [
            log_probabilities(model, batch, route_ids=whole(last_tokens(batch), batch))
            for batch in made.batches
        ]
    for index, (batch, old) in enumerate(zip(made.batches, olds, strict=True)):
        loss = policy_loss(optimized, batch, whole(last_tokens(batch), batch), old) / accumulated
        loss.backward()
        if (index + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    cases.assert_close(got, cases.weights(optimized))


@pytest.mark.slow
def test_what_a_function_is_given(tmp_path):
    seen = []

    def route_fn(prompts, completions, completion_ids, rewards, advantages, inputs):
        seen.append((rewards, advantages))
        assert [row["prompt"] for row in inputs] == prompts
        assert [row["kind"] for row in inputs] == [0, 0, 1, 1]
        assert rewards[:, 0].tolist() == reward(completion_ids)
        decoded = cases.tokenizer().batch_decode(completion_ids, skip_special_tokens=True)
        assert [text.split() for text in completions] == [text.split() for text in decoded]
        return {"route_ids": (rewards[:, 0] > 3).long(), "route_strength": torch.full((4,), 0.5)}

    model = cases.routed()
    made = trainer(
        tmp_path,
        copy.deepcopy(model),
        route_fn=route_fn,
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
    )
    got = cases.trained(made)
    ((rewards, advantages),) = seen
    assert rewards.shape == (4, 1)
    assert advantages.shape == (4,)
    (batch,) = made.batches
    sums = (batch["completion_ids"] * batch["completion_mask"]).sum(1)
    routes = whole((sums % 7 > 3).long()[:, None], batch)
    strength = torch.where(tokens_of(batch)[1].bool(), 0.5, 1.0)

    def expected(copied):
        tokens, mask = tokens_of(batch)
        output = copied(input_ids=tokens, attention_mask=mask, route_ids=routes, route_strength=strength)
        return policy_loss(lambda **_: output, batch, routes)

    cases.assert_close(got, cases.stepped(model, expected))


@pytest.mark.slow
@pytest.mark.setup("TRL GRPOTrainer", "routed_trainer: adapters, whose copy is the reference")
def test_the_reference_and_evaluation_are_unrouted(tmp_path):
    """The reference is a copy of the adapters, under a plan that hides units from tokens of the base route."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with cases.deprecations():
        model = peft.get_peft_model(tiny.llama(), config)
    route(model, cases.forward_plan())
    plain = unroute(copy.deepcopy(model))
    made = trainer(tmp_path, model, route_fn=lambda completion_ids, **_: [0] * len(completion_ids), beta=0.5)
    cases.trained(made)
    (batch,) = made.batches
    with torch.no_grad():
        expected = log_probabilities(plain, batch)
    torch.testing.assert_close(batch["ref_per_token_logps"], expected, atol=1e-5, rtol=0)
    made.batches.clear()
    calls = []
    made._route_fn = lambda **_: calls.append(1)
    with cases.deprecations():
        made.evaluate(cases.dataset(PLAIN))
    assert made.batches
    assert not calls


@pytest.mark.slow
def test_a_plan_of_the_head(tmp_path):
    model = cases.routed(RoutingPlan(2, lm_head=LinearSites(update_rows=[[1.0], [0.0]])))
    made = trainer(tmp_path, copy.deepcopy(model), route_fn=by_last_token, temperature=0.7)
    got = cases.trained(made)
    (batch,) = made.batches
    routes = whole(last_tokens(batch), batch)
    cases.assert_close(
        got, cases.stepped(model, lambda copied: policy_loss(copied, batch, routes, temperature=0.7))
    )


@pytest.mark.slow
def test_wrong_routes(tmp_path):
    def raises(error, message, rows=PLAIN, **options):
        with pytest.raises(error, match=re.escape(message)):
            cases.trained(trainer(tmp_path, cases.routed(), rows, **options))

    raises(ValueError, "train_dataset: got the columns prompt, kind, expected route_ids too")
    raises(TypeError, "route_fn: got a int, expected a function or None", route_fn=1)
    for answer, error, message in (
        ([0, 1], ValueError, "route_fn: got route_ids of 2 rollouts, expected 4"),
        ([0.5] * 4, TypeError, "route_fn[0]['route_ids']: got dtype torch.float64, expected integers"),
        (None, TypeError, "route_fn: got route_ids as None, expected one of each of the 4 rollouts"),
        ([[0, 1] * 9] * 4, ValueError, "route_fn[0]['route_ids']: got 18 numbers, expected"),
        (
            torch.zeros(4, 1, 1),
            ValueError,
            "route_fn: got route_ids of shape [4, 1, 1], expected [4], or [4, ",
        ),
        ({"routes": [0] * 4}, ValueError, "route_fn: got routes, expected route_ids"),
        ([0, 1, 2, 0], ValueError, "expected 0 <= id < num_routes = 2"),
    ):
        raises(error, message, route_fn=lambda answer=answer, **_: answer)


@pytest.mark.setup(
    "TRL GRPOTrainer", "GRPOTrainer itself", refused="it drops the routes; routed_trainer keeps them"
)
@pytest.mark.slow
def test_the_trainer_itself_does_not_train_without_routes(tmp_path):
    model = cases.routed()
    made = trainer(tmp_path, model, trainer_class=GRPOTrainer)
    with pytest.raises(RuntimeError, match="LlamaModel: got a forward in training mode without route_ids"):
        cases.trained(made)
    with unrouted(model):
        cases.trained(made)
    unroute(model)
