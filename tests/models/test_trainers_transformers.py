"""routed_trainer of transformers' Trainer, beside the collators and options of others."""

import contextlib
import copy
import re

import pytest
import tiny_models as tiny
import torch

pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import trl_cases as cases
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from gradroute import models
from gradroute.models import RouteCollator, routed_trainer

RoutedTrainer = routed_trainer(Trainer)
DOCUMENTS = [
    {
        "input_ids": cases.ids(3 + i, i),
        "labels": cases.ids(3 + i, i),
        "route_ids": [i % 2, *[1 - i % 2] * (2 + i)],
    }
    for i in range(4)
]
EVEN = [{name: column[:3] for name, column in document.items()} for document in DOCUMENTS]


def trainer(tmp_path, model, documents, collator=None, options=None, **more):
    arguments = TrainingArguments(tmp_path, **cases.STEP | (options or {}))
    return RoutedTrainer(model, arguments, train_dataset=documents, data_collator=collator, **more)


def unrouted(model, examples):
    return cases.stepped_on(model, [example | {"route_ids": 0} for example in examples])


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.parametrize("removes", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arrow", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.setup("Trainer", "routed_trainer: any collator that pads, unused columns removed or not")
def test_the_default_collator(tmp_path, removes, arrow):
    model = cases.routed()
    data = cases.dataset(EVEN) if arrow else EVEN
    made = trainer(
        tmp_path, copy.deepcopy(model), data, default_data_collator, {"remove_unused_columns": removes}
    )
    got = cases.trained(made)
    cases.assert_close(got, cases.stepped_on(model, EVEN))
    cases.assert_routed(got, unrouted(model, EVEN))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: RouteCollator(pad_token_id=0),
        lambda: DataCollatorForLanguageModeling(cases.tokenizer(), mlm=False),
        lambda: DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    ],
    ids=["RouteCollator", "language modelling", "flattening"],
)
@pytest.mark.setup("Trainer", "routed_trainer: DataCollatorForLanguageModeling, DataCollatorWithFlattening")
def test_collators(tmp_path, make):
    """What transformers' collators make of documents of several lengths has the gradient of RouteCollator's batch."""
    model, collator = cases.routed(), make()
    examples = DOCUMENTS
    if isinstance(collator, DataCollatorForLanguageModeling):  # which pads no labels
        examples = [{name: row[name] for name in ("input_ids", "route_ids")} for row in DOCUMENTS]
    got = cases.trained(trainer(tmp_path, copy.deepcopy(model), examples, collator))
    cases.assert_close(got, cases.stepped_on(model, DOCUMENTS))


@pytest.mark.slow
def test_a_plan_of_attention_packed(tmp_path):
    """Documents in one row keep apart in routed attention too."""
    from gradroute import AttentionSites
    from gradroute.models import RoutingPlan
    from gradroute.tables import localize

    plan = RoutingPlan(2, attention=AttentionSites(heads=localize(2, tiny.HEADS, {1: [3]})))
    model = cases.routed(plan)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    got = cases.trained(trainer(tmp_path, copy.deepcopy(model), DOCUMENTS, collator))
    cases.assert_close(got, cases.stepped_on(model, DOCUMENTS))


@pytest.mark.slow
def test_next_token(tmp_path):
    model = cases.routed()
    made = trainer(tmp_path, copy.deepcopy(model), EVEN, default_data_collator, route_align="next_token")
    got = cases.trained(made)
    cases.assert_close(got, cases.stepped_on(model, EVEN, align="next_token"))
    cases.assert_routed(got, cases.stepped_on(model, EVEN))


@pytest.mark.slow
def test_accumulation(tmp_path):
    """Two batches of documents that differ in length have the gradient of one of them all."""
    model = cases.routed()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    got = cases.trained(trainer(tmp_path, copy.deepcopy(model), DOCUMENTS, collator, options))
    cases.assert_close(got, cases.stepped_on(model, DOCUMENTS))


def test_evaluation_is_unrouted(tmp_path):
    """Its loss is the plain one, also under a plan that hides units from tokens of the base route."""
    model = cases.routed(cases.forward_plan())
    made = trainer(tmp_path, model, EVEN, default_data_collator, eval_dataset=EVEN)
    batch = default_data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in EVEN])
    with torch.no_grad():
        plain, routed = (
            model(**batch, **routes).loss.item() for routes in ({}, {"route_ids": torch.zeros(4, 3).int()})
        )
    assert made.evaluate()["eval_loss"] == pytest.approx(plain, abs=1e-6)
    assert abs(plain - routed) > 1e-4
    assert made.predict(EVEN).metrics["test_loss"] == pytest.approx(plain, abs=1e-6)


@pytest.mark.slow
def test_subclasses(tmp_path):
    """Of a routed trainer, and routed ones of subclasses."""

    class Doubled(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return 2 * super().compute_loss(model, inputs, **kwargs)

    class After(routed_trainer(Trainer)):
        def compute_loss(self, model, inputs, **kwargs):
            return 2 * super().compute_loss(model, inputs, **kwargs)

    model = cases.routed()
    batch = RouteCollator(pad_token_id=0)(EVEN)
    expected = cases.stepped(model, lambda copied: 2 * copied(**batch).loss)
    for made in (routed_trainer(Doubled), After, routed_trainer(type("Own", (Doubled, Seq2SeqTrainer), {}))):
        arguments = Seq2SeqTrainingArguments(tmp_path, **cases.STEP)
        got = cases.trained(
            made(copy.deepcopy(model), arguments, train_dataset=EVEN, data_collator=default_data_collator)
        )
        cases.assert_close(got, expected)
    assert routed_trainer(Doubled).__name__ == "RoutedDoubled"
    assert routed_trainer(Doubled) is routed_trainer(Doubled)


@pytest.mark.setup("Trainer", "routed_trainer: a batch without routes", refused="it would train unrouted")
def test_a_batch_without_routes_is_refused(tmp_path):
    model = cases.routed()
    plain = [{name: row[name] for name in ("input_ids", "labels")} for row in EVEN]
    with expect(ValueError, "train_dataset: got the columns input_ids, labels, expected route_ids too"):
        trainer(tmp_path, model, cases.dataset(plain), default_data_collator)
    with expect(ValueError, "examples[0]: got the columns input_ids, labels, expected route_ids too"):
        cases.trained(trainer(tmp_path, model, plain, default_data_collator))

    class Loader(RoutedTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(plain, 4, collate_fn=default_data_collator)

    arguments = TrainingArguments(tmp_path, **cases.STEP)
    with expect(RuntimeError, "route_ids: got a batch of input_ids, labels to train on"):
        cases.trained(Loader(model, arguments, train_dataset=EVEN))


@pytest.mark.setup(
    "Trainer", "routed_trainer: a compute_loss that drops the routes", refused="it would train unrouted"
)
def test_a_loss_that_drops_the_routes_is_refused(tmp_path):
    """A subclass's own compute_loss passes the routes on, or says that it means a forward without them."""

    class Dropping(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with context(model):
                return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

    class DroppingAfter(RoutedTrainer):
        compute_loss = Dropping.compute_loss

    model = cases.routed()
    arguments = TrainingArguments(tmp_path, **cases.STEP)
    for made in (routed_trainer(Dropping), DroppingAfter):
        context, copied = contextlib.nullcontext, copy.deepcopy(model)
        steps = made(copied, arguments, train_dataset=EVEN, data_collator=default_data_collator)
        with expect(RuntimeError, "without route_ids from compute_loss, expected the batch's"):
            cases.trained(steps)
        cases.assert_close(dict(copied.named_parameters()), dict(model.named_parameters()))
        context = models.unrouted
        cases.assert_close(cases.trained(steps), unrouted(model, EVEN))


def test_wrong_models_and_trainers(tmp_path):
    with expect(ValueError, "model: got a LlamaForCausalLM that is not routed"):
        trainer(tmp_path, tiny.llama(), EVEN)
    with expect(ValueError, "model: got a LlamaForCausalLM that is not routed"):
        trainer(tmp_path, None, EVEN, model_init=lambda: tiny.llama())
    with expect(ValueError, "route_align: got 'next', expected one of 'position', 'next_token'"):
        trainer(tmp_path, cases.routed(), EVEN, route_align="next")
    with expect(ValueError, "route_align: got 'next_token' beside a RouteCollator"):
        trainer(tmp_path, cases.routed(), EVEN, RouteCollator(pad_token_id=0), route_align="next_token")
    for wrong in (object, "Trainer", None, torch.nn.Linear):
        with expect(
            TypeError, "expected transformers.Trainer, trl.SFTTrainer, trl.DPOTrainer, trl.GRPOTrainer"
        ):
            routed_trainer(wrong)
    with expect(TypeError, "a subclass of one that is not TRL's"):
        routed_trainer(pytest.importorskip("trl").RewardTrainer)
    with expect(TypeError, "which is routed already"):
        routed_trainer(RoutedTrainer)


@pytest.mark.setup("Trainer", "routed_trainer: torch_compile=True")
@pytest.mark.slow
def test_compiled(tmp_path):
    model = cases.routed()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # Inductor takes a minute
    made = trainer(tmp_path, copy.deepcopy(model), EVEN, default_data_collator, options)
    got = cases.trained(made)
    cases.assert_close(
        {name.removeprefix("_orig_mod."): value for name, value in got.items()}, cases.stepped_on(model, EVEN)
    )


@pytest.mark.slow
@pytest.mark.setup("Trainer", "routed_trainer: activation checkpointing")
@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_checkpointing(tmp_path, options):
    model = cases.routed()
    arguments = {"activation_checkpointing": True, "activation_checkpointing_kwargs": options}
    got = cases.trained(trainer(tmp_path, copy.deepcopy(model), EVEN, default_data_collator, arguments))
    cases.assert_close(got, cases.stepped_on(model, EVEN))
