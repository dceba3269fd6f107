"""routed_trainer of TRL's SFTTrainer: every kind of dataset, truncation and packing has a plain step's gradient."""

import copy
import re

import pytest
import tiny_models as tiny
import torch

pytest.importorskip("trl")

import trl_cases as cases
from trl import SFTConfig, SFTTrainer

from gradroute import LinearSites, NormSites
from gradroute.models import RouteCollator, RoutingPlan, route, routed_trainer, unroute, unrouted

RoutedSFTTrainer = routed_trainer(SFTTrainer)

# What the trainer makes of TEXTS, PROMPTS and CHATS: tokens, their labels, and the route of each document.
LENGTHS = (3, 4, 5, 6)
TOKENIZED = [{"input_ids": [*cases.ids(n, n), cases.EOS], "route_ids": n % 2} for n in LENGTHS]
TEXTS = [{"text": cases.text(cases.ids(n, n)), "route_ids": n % 2} for n in LENGTHS]
PROMPTS = [
    {
        "prompt": cases.text(cases.ids(n, n)[:2]),
        "completion": f" {cases.text(cases.ids(n, n)[2:])} <eos>",
        "route_ids": n % 2,
    }
    for n in LENGTHS
]


def by_token(row):
    """The same document with a route for each token, which alternate."""
    return row | {"route_ids": [(row["route_ids"] + t) % 2 for t in range(len(row["input_ids"]))]}


def trainer(
    tmp_path, model, rows, trainer_class=RoutedSFTTrainer, data_collator=None, route_align=None, **options
):
    with cases.deprecations():
        arguments = SFTConfig(tmp_path, **cases.STEP | {"max_length": None} | options)
        more = {} if route_align is None else {"route_align": route_align}
        return trainer_class(
            model,
            arguments,
            train_dataset=cases.dataset(rows) if isinstance(rows, list) else rows,
            processing_class=cases.tokenizer(),
            data_collator=data_collator,
            **more,
        )


def trained(tmp_path, model, rows, **options):
    return cases.trained(trainer(tmp_path, copy.deepcopy(model), rows, **options))


def unrouted_step(model, examples):
    return cases.stepped_on(model, [example | {"route_ids": 0} for example in examples])


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.setup("TRL SFTTrainer", "routed_trainer: texts, one route a document")
def test_texts(tmp_path):
    """One route a document; the trainer's own collator drops the column."""
    model = cases.routed()
    got = trained(tmp_path, model, TEXTS)
    cases.assert_close(got, cases.stepped_on(model, TOKENIZED))
    cases.assert_routed(got, unrouted_step(model, TOKENIZED))


@pytest.mark.setup(
    "TRL SFTTrainer", "tokens with a route each; any collator, with and without remove_unused_columns"
)
@pytest.mark.slow
@pytest.mark.parametrize("removes", [True, False])
@pytest.mark.parametrize("collator", [None, RouteCollator(pad_token_id=0)])
def test_tokens(tmp_path, collator, removes):
    """One route a token, with either collator, whether columns are removed or not."""
    model, rows = cases.routed(), [by_token(row) for row in TOKENIZED]
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    got = trained(tmp_path, model, labelled, data_collator=collator, remove_unused_columns=removes)
    cases.assert_close(got, cases.stepped_on(model, rows))


@pytest.mark.slow
def test_next_token(tmp_path):
    model, rows = cases.routed(), [by_token(row) for row in TOKENIZED]
    got = trained(tmp_path, model, rows, route_align="next_token")
    cases.assert_close(got, cases.stepped_on(model, rows, align="next_token"))


@pytest.mark.slow
@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.setup("TRL SFTTrainer", "routed_trainer: prompts and completions, completion_only_loss")
def test_prompts_and_completions(tmp_path, completion_only):
    model = cases.routed()
    examples = [row | {"labels": row["input_ids"]} for row in TOKENIZED]
    if completion_only:
        examples = [row | {"labels": [-100, -100, *row["labels"][2:]]} for row in examples]
    got = trained(tmp_path, model, PROMPTS, completion_only_loss=completion_only)
    cases.assert_close(got, cases.stepped_on(model, examples))


@pytest.mark.slow
@pytest.mark.parametrize("assistant_only", [True, False])
@pytest.mark.setup("TRL SFTTrainer", "routed_trainer: chats, assistant_only_loss")
def test_chats(tmp_path, assistant_only):
    """Two turns, whose tokens are those of the template; the loss of the assistant's alone."""
    model, rows, examples = cases.routed(), [], []
    for n in LENGTHS:
        question, answer = cases.ids(n, n), cases.ids(2, n + 1)
        roles = [("user", question), ("assistant", answer)]
        messages = [{"role": role, "content": cases.text(content)} for role, content in roles]
        rows.append({"messages": messages, "route_ids": n % 2})
        before = [cases.WORDS["user"], *question, cases.WORDS["assistant"]]
        tokens = [*before, *answer, cases.EOS]
        labels = [-100] * len(before) + tokens[len(before) :] if assistant_only else tokens
        examples.append({"input_ids": tokens, "labels": labels, "route_ids": n % 2})
    got = trained(tmp_path, model, rows, assistant_only_loss=assistant_only)
    cases.assert_close(got, cases.stepped_on(model, examples))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kept"), [("keep_start", slice(0, 4)), ("keep_end", slice(-4, None))])
@pytest.mark.setup("TRL SFTTrainer", "routed_trainer: truncation")
def test_truncation(tmp_path, mode, kept):
    """A document's routes are cut where its tokens are; one whose labels are all cut goes with its routes."""
    model = cases.routed()
    rows = [by_token(row) | {"labels": row["input_ids"]} for row in TOKENIZED]
    masked = by_token(TOKENIZED[0]) | {"labels": [-100] * len(TOKENIZED[0]["input_ids"])}
    cut = [{name: column[kept] for name, column in row.items()} for row in rows]
    got = trained(tmp_path, model, [masked, *rows], max_length=4, truncation_mode=mode)
    cases.assert_close(got, cases.stepped_on(model, cut))


def pieces(rows, width):
    """Rows cut to pieces of `width` tokens."""
    return [
        {name: column[start : start + width] for name, column in row.items()}
        for row in rows
        for start in range(0, len(row["input_ids"]), width)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("align", ["position", "next_token"])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.setup("TRL SFTTrainer", "routed_trainer: packing by bfd, bfd_split and wrapped")
def test_packing(tmp_path, strategy, align):
    """Rows of several documents, whose tokens each have a route of their own."""
    model, width = cases.routed(), 6
    rows = [by_token(row) for row in TOKENIZED]
    expected = pieces(rows, width)
    if strategy == "bfd":
        expected = [{name: column[:width] for name, column in row.items()} for row in rows]
    if strategy == "wrapped":
        joined = {name: [number for row in rows for number in row[name]] for name in rows[0]}
        expected = pieces([joined], width)
    options = {
        "packing": True,
        "packing_strategy": strategy,
        "max_length": width,
        "per_device_train_batch_size": 8,
    }
    got = trained(tmp_path, model, rows, route_align=align, **options)
    cases.assert_close(got, cases.stepped_on(model, expected, align=align))


@pytest.mark.slow
def test_packed_documents_keep_their_routes(tmp_path):
    """Every token of a packed dataset has the route that its document gave it, in whichever order."""
    rows = [{"input_ids": cases.ids(n, n), "route_ids": n % 2, "route_strength": n / 8} for n in range(1, 8)]
    made = trainer(tmp_path, cases.routed(), rows, packing=True, max_length=9, shuffle_dataset=True)
    by_start = {tuple(row["input_ids"]): row for row in rows}
    for row in made.train_dataset:
        start = 0
        for length in row["seq_lengths"]:
            document = slice(start, start + length)
            expected = by_start.pop(tuple(row["input_ids"][document]))
            assert row["route_ids"][document] == [expected["route_ids"]] * length
            assert row["route_strength"][document] == [expected["route_strength"]] * length
            start += length
    assert not by_start


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo's own
@pytest.mark.parametrize(
    "options",
    [
        {"padding_free": True},
        {"pad_to_multiple_of": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"selective": True}},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.setup("TRL SFTTrainer", "routed_trainer: padding-free, accumulation, checkpoints, torch_compile")
def test_options(tmp_path, options):
    model, rows = cases.routed(), [by_token(row) for row in TOKENIZED]
    cases.assert_close(trained(tmp_path, model, rows, **options), cases.stepped_on(model, rows))


@pytest.mark.setup("TRL SFTTrainer", "bf16")
@pytest.mark.slow
def test_mixed_precision(tmp_path):
    """bf16 autocast rounds gradients; parameters that a route may not train stay bit for bit, though."""
    model = cases.routed()
    rows = [row | {"route_ids": 1} for row in TOKENIZED]
    got, plain = trained(tmp_path, model, rows, bf16=True), trained(tmp_path, model, rows)
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.get_parameter(name)
    assert torch.equal(got[name][:16], before[:16])
    assert not torch.equal(got[name][16:], before[16:])
    for parameter in got:  # a step of at most LEARNING_RATE times the gradient's bf16 rounding
        torch.testing.assert_close(got[parameter], plain[parameter], atol=1e-2, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_losses(tmp_path, options):
    """Losses of the trainer's own: routed and unrouted steps differ only where the plan masks."""
    model = cases.routed()
    got = trained(tmp_path, model, [row | {"route_ids": 1} for row in TOKENIZED], **options)
    plain = trained(tmp_path, model, [row | {"route_ids": 0} for row in TOKENIZED], **options)
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(got[up][:16], model.get_parameter(up)[:16])
    torch.testing.assert_close(got[up][16:], plain[up][16:], atol=1e-6, rtol=0)
    assert not torch.equal(plain[up][:16], model.get_parameter(up)[:16])


@pytest.mark.slow
def test_streamed_datasets(tmp_path):
    model = cases.routed()
    streamed = cases.dataset(TEXTS).to_iterable_dataset()
    cases.assert_close(trained(tmp_path, model, streamed), cases.stepped_on(model, TOKENIZED))


@pytest.mark.setup("TRL SFTTrainer", "PEFT adapters")
@pytest.mark.slow
def test_adapters(tmp_path):
    """LoRA adapters that stand before route(): one for each route."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    with cases.deprecations():
        model = peft.get_peft_model(tiny.llama(), config, "retain")
        model.add_adapter("forget", config)
    model.base_model.set_adapter(["retain", "forget"])
    route(model, RoutingPlan(2, adapters={"retain": [0], "forget": [1]}))
    got = trained(tmp_path, model, TEXTS)
    cases.assert_close(got, cases.stepped_on(model, TOKENIZED))
    only = trained(tmp_path, model, [row | {"route_ids": 1} for row in TEXTS])
    for name, value in only.items():
        assert torch.equal(value, model.get_parameter(name)) == ("forget" not in name)
    with expect(ValueError, "peft_config: got a configuration, expected None"):
        routed = cases.routed()
        arguments = SFTConfig(tmp_path, **cases.STEP)
        RoutedSFTTrainer(routed, arguments, train_dataset=cases.dataset(TEXTS), peft_config=config)


@pytest.mark.slow
def test_evaluation_is_unrouted(tmp_path):
    model = cases.routed(cases.forward_plan())
    made = trainer(tmp_path, model, TEXTS)
    with torch.no_grad():
        batch = RouteCollator(pad_token_id=0)(TOKENIZED)
        routes = batch.pop("route_ids")
        plain, routed = model(**batch).loss.item(), model(**batch, route_ids=routes).loss.item()
    for rows in (TEXTS, [{"text": row["text"]} for row in TEXTS]):
        assert made.evaluate(cases.dataset(rows))["eval_loss"] == pytest.approx(plain, abs=1e-5)
    assert abs(plain - routed) > 1e-4


@pytest.mark.slow
def test_the_model_after_training(tmp_path):
    """It trains once more by hand, is unrouted, saved and loaded as a plain one."""
    model = cases.routed()
    cases.trained(trainer(tmp_path, model, TEXTS))
    batch = RouteCollator(pad_token_id=0)(TOKENIZED)
    model.zero_grad()
    model(**batch).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    unroute(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    del batch["route_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.setup("TRL SFTTrainer", "SFTTrainer itself", refused="its collator drops the routes")
def test_the_trainer_itself_does_not_train_without_routes(tmp_path):
    """TRL's own class and collator drop the routes: training raises, and not where it is meant."""
    model = cases.routed()
    made = trainer(tmp_path, copy.deepcopy(model), TEXTS, SFTTrainer)
    with expect(
        RuntimeError, "LlamaModel: got a forward in training mode without route_ids, past the routed model"
    ):
        cases.trained(made)
    made = trainer(tmp_path, copy.deepcopy(model), TEXTS, SFTTrainer)
    with unrouted(made.model):
        got = cases.trained(made)
    cases.assert_close(got, unrouted_step(model, TOKENIZED))


@pytest.mark.slow
@pytest.mark.setup("TRL SFTTrainer", "SFTTrainer itself, RouteCollator and remove_unused_columns=False")
def test_the_trainer_itself_with_a_route_collator(tmp_path):
    model = cases.routed()
    rows = [by_token(row) | {"labels": row["input_ids"]} for row in TOKENIZED]
    collator = RouteCollator(pad_token_id=0)
    options = {"trainer_class": SFTTrainer, "data_collator": collator}
    got = trained(tmp_path, model, rows, remove_unused_columns=False, **options)
    cases.assert_close(got, cases.stepped_on(model, rows))
    with expect(ValueError, "make the trainer by gradroute.models.routed_trainer"):
        trained(tmp_path, model, rows, **options)


def test_wrong_datasets(tmp_path):
    model = cases.routed()
    with expect(ValueError, "train_dataset: got the columns text, expected route_ids too"):
        trainer(tmp_path, model, [{"text": row["text"]} for row in TEXTS])
    with expect(
        ValueError, "dataset[0]['route_ids']: got 3 numbers, expected 4, one for each of the example's"
    ):
        trainer(
            tmp_path, model, [row | {"route_ids": [0] * n} for row, n in zip(TEXTS, LENGTHS, strict=True)]
        )
    with expect(TypeError, "model: got the name 'gpt2', expected a routed model"):
        RoutedSFTTrainer("gpt2", train_dataset=cases.dataset(TEXTS))


@pytest.mark.slow
@pytest.mark.parametrize("align", ["position", "next_token"])
@pytest.mark.setup("TRL SFTTrainer", "routed_trainer: a plan of the head, by all logits")
def test_a_plan_of_the_head(tmp_path, align):
    """TRL's fused head reads the head's weight; where the plan routes it, all logits are computed."""
    retain_only = [[1.0], [0.0]]
    plan = RoutingPlan(2, lm_head=LinearSites(update_rows=retain_only), final_norm=NormSites(retain_only))
    model, rows = cases.routed(plan), [by_token(row) for row in TOKENIZED]
    got = trained(tmp_path, model, rows, route_align=align)
    cases.assert_close(got, cases.stepped_on(model, rows, align=align))
    cases.assert_routed(got, unrouted_step(model, rows))
    plain = {"trainer_class": SFTTrainer, "data_collator": RouteCollator(pad_token_id=0)}
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    with expect(ValueError, "past the routed model whose lm_head the plan routes too"):
        trained(tmp_path, model, labelled, remove_unused_columns=False, **plain)
