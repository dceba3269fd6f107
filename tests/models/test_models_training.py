"""Training a routed model: transformers' Trainer and plain loops, checkpointing, mixed precision, torch.compile."""

import copy
import re

import pytest
import torch

pytest.importorskip("transformers")

import tiny_models as tiny
from tiny_models import assert_gradients_close, assert_gradients_equal, backward, gradients, mixed_ids, tokens
from transformers import Trainer, TrainingArguments

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites
from gradroute.models import ResidualSites, RoutingPlan, route
from gradroute.models.collator import RouteCollator
from gradroute.tables import localize

RETAIN_ONLY = [[1.0], [0.0]]
COLLATOR = RouteCollator(pad_token_id=0)
LEARNING_RATE = 0.1


def plan_of_everything():
    return RoutingPlan(
        2,
        mlp=MLPSites(
            hidden=localize(2, tiny.D_FF, {1: slice(16, 24)}),
            update=localize(2, tiny.D_FF, {1: slice(8, 24)}),
        ),
        attention=AttentionSites(
            heads=localize(2, tiny.HEADS, {1: [3]}),
            update=localize(2, tiny.HEADS, {1: [2, 3]}),
            update_kv=localize(2, tiny.KV_HEADS, {1: [1]}),
            score_edges=[[1.0, 1.0], [0.0, 1.0]],
        ),
        residual=ResidualSites(pre=localize(2, tiny.D_MODEL, {1: slice(8, 16)}), post=[[1.0], [0.5]]),
        norm=NormSites(RETAIN_ONLY),
        final_norm=NormSites(RETAIN_ONLY),
        embedding=EmbeddingSites(RETAIN_ONLY),
        lm_head=LinearSites(update_rows=RETAIN_ONLY),
    )


def plan_of_hidden_units():
    hidden = localize(2, tiny.D_FF, {1: slice(16, 24)})
    return RoutingPlan(2, mlp=MLPSites(hidden=hidden, update=hidden))


def routed(model=None, plan=None):
    return route(tiny.llama() if model is None else model, plan_of_everything() if plan is None else plan)


def examples(n=8, routes=(0, 1), length=None):
    """Documents of 4 to 6 tokens; the routes of their tokens alternate."""
    return [
        {
            "input_ids": tokens(1, length or 4 + i % 3, seed=i)[0].tolist(),
            "route_ids": [routes[(i + t) % len(routes)] for t in range(length or 4 + i % 3)],
        }
        for i in range(n)
    ]


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# transformers' Trainer


def arguments(folder, **options):
    """SGD without clipping and decay, so that a step is the gradient times the learning rate."""
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=folder, **defaults | options)


def trained(model, folder, data, **options):
    """The model's weights after Trainer's steps."""
    model = copy.deepcopy(model)
    Trainer(model, arguments(folder, **options), data_collator=COLLATOR, train_dataset=data).train()
    return weights(model)


def plainly_trained(model, batches):
    """The model's weights after SGD in a plain loop."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for batch in batches:
        optimizer.zero_grad()
        model(**COLLATOR(batch)).loss.backward()
        optimizer.step()
    return weights(model)


@pytest.mark.setup("Trainer", "RouteCollator; also with activation checkpointing")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_as_a_plain_loop(tmp_path, checkpointing):
    model, data = routed(), examples(16)
    got = trained(model, tmp_path, data, max_steps=2, **{tiny.CHECKPOINTING: checkpointing})
    assert_gradients_close(got, plainly_trained(model, [data[:8], data[8:]]))
    unmasked = plainly_trained(model, [[example | {"route_ids": 0} for example in data[:8]]])
    assert any((got[name] - unmasked[name]).abs().max() > 1e-3 for name in got)


@pytest.mark.setup("Trainer", "gradient accumulation")
def test_trainer_accumulates_the_gradient_of_the_whole_batch(tmp_path):
    """Documents differ in length, so that a mean of means would be another gradient."""
    model, data = routed(), examples()
    whole = trained(model, tmp_path, data)
    parts = trained(model, tmp_path, data, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_gradients_close(parts, whole)


@pytest.mark.setup(
    "Trainer", "a model that was not routed, with RouteCollator", refused="the column route_ids is dropped"
)
def test_trainer_with_a_model_that_is_not_routed(tmp_path):
    """Trainer drops the column, because the model does not know it; the collator misses it."""
    with expect(ValueError, "route_ids"):
        trained(tiny.llama(), tmp_path, examples())


@pytest.mark.setup("Trainer", "evaluate")
def test_trainer_evaluates(tmp_path):
    model, data = routed(), examples()
    options = arguments(tmp_path, per_device_eval_batch_size=8)
    trainer = Trainer(model, options, data_collator=COLLATOR, eval_dataset=data)
    batch = COLLATOR(data)
    del batch["route_ids"]
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-6)
    with expect(ValueError, "values 2; expected 0 <= id < num_routes = 2"):  # the ids did arrive
        trainer.evaluate(examples(routes=(0, 2)))


def test_trainer_leaves_alone_what_no_token_may_update(tmp_path):
    model = routed()
    got = trained(model, tmp_path, examples(routes=(1,)), max_steps=3)
    before = weights(model)
    frozen = ("norm.weight", "layernorm.weight", "embed_tokens.weight", "lm_head.weight")
    for name, weight in got.items():
        assert torch.equal(weight, before[name]) == name.endswith(frozen), name


@pytest.mark.setup("Trainer", "LoRA adapters of several routes")
# get_peft_model reads what transformers 5.23 calls by another name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_trainer_with_dual_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny.llama(), config, "retain")
    model.add_adapter("forget", config)
    model.base_model.set_adapter(["retain", "forget"])
    route(model, RoutingPlan(2, adapters={"retain": [0], "forget": [1]}))
    got, before = trained(model, tmp_path, examples(routes=(1,))), weights(model)
    for name, weight in got.items():
        assert torch.equal(weight, before[name]) == (".forget." not in name), name


# Plain loops


def test_a_plain_loop_learns():
    model = routed()
    loader = torch.utils.data.DataLoader(examples(), batch_size=4, collate_fn=COLLATOR)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_accumulated_gradients():
    """Rows are equally long: the mean of the parts is the mean of the whole."""
    model = routed()
    x = tokens()
    ids = mixed_ids(x)
    want = backward(model, x, route_ids=ids)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
        loss = model(x[rows], labels=x[rows], route_ids=ids[rows]).loss
        (loss * len(x[rows]) / len(x)).backward()
    assert_gradients_close(gradients(model), want)


def test_forwards_between_forward_and_backward():
    """Two batches in flight, and an evaluation with routes and without: each backward has its own batch's routes."""
    model = routed()
    x = [tokens(seed=seed) for seed in range(2)]
    ids = [mixed_ids(tokens, seed=seed) for seed, tokens in enumerate(x)]
    want = [backward(model, tokens, route_ids=routes) for tokens, routes in zip(x, ids, strict=True)]
    for checkpointing in (False, True):
        if checkpointing:
            tiny.checkpoint_layers(model)
        model.zero_grad()
        losses = [model(t, labels=t, route_ids=r).loss for t, r in zip(x, ids, strict=True)]
        model.eval()
        with torch.no_grad():
            model(x[0])
            model(x[0], route_ids=1 - ids[0])
        model.train()
        losses[0].backward()
        assert_gradients_equal(gradients(model), want[0])
        model.zero_grad()
        losses[1].backward()
        assert_gradients_equal(gradients(model), want[1])


# Activation checkpointing


@pytest.mark.setup("Checkpointing", "of decoder layers, reentrant or not")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt_neo])
def test_checkpointing(make, use_reentrant):
    """Bit for bit, also where the layers are handed their routes by the model (GPT-Neo)."""
    plan = (
        plan_of_everything()
        if make is tiny.llama
        else RoutingPlan(2, attention=AttentionSites(heads=RETAIN_ONLY))
    )
    model = routed(make(), plan).train()
    x = tokens()
    batches = [mixed_ids(x, seed=seed) for seed in range(2)]
    wants = [backward(model, x, route_ids=ids) for ids in batches]
    tiny.checkpoint_layers(model, use_reentrant)
    assert getattr(model, f"is_{tiny.CHECKPOINTING}")
    for ids, want in zip(batches, wants, strict=True):
        assert_gradients_equal(backward(model, x, route_ids=ids), want)


# Mixed precision


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast(dtype, tolerance):
    """The forward is the ordinary one under autocast; `tolerance`: some ulps, relative to the largest gradient."""
    model = tiny.llama()
    plain = copy.deepcopy(model)
    routed(model, plan_of_hidden_units())
    x = tokens()
    ids = mixed_ids(x)
    want = backward(model, x, route_ids=ids)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        output = model(x, labels=x, route_ids=ids)
        assert torch.equal(output.logits, plain(x).logits)
    assert output.logits.dtype == dtype
    output.loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        error = (gradient - want[name]).abs().max()
        assert error <= tolerance * want[name].abs().max(), f"{name}: off by {error}"


def test_masked_gradients_are_zero_under_autocast():
    model = routed()
    x = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        model(x, labels=x, route_ids=torch.ones_like(x)).loss.backward()
    frozen = ("norm.weight", "layernorm.weight", "embed_tokens.weight", "lm_head.weight")
    for name, gradient in gradients(model).items():
        assert gradient.any() != name.endswith(frozen), name
    rows = model.model.layers[0].mlp.gate_proj.weight.grad.any(dim=1)
    assert rows.tolist() == [False] * 16 + [True] * 8


def test_grad_scaler():
    """A step in fp16 is that of the unscaled gradients; one whose gradients overflow is skipped."""
    model = routed(plan=plan_of_hidden_units())
    x = tokens()
    ids = mixed_ids(x)
    want = backward(model, x, route_ids=ids)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for overflows in (False, True):
        before = weights(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(x, labels=x, route_ids=ids).loss * (1e6 if overflows else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if not overflows:
            for name, gradient in gradients(model).items():
                assert (gradient - want[name]).abs().max() <= 0.01 * want[name].abs().max(), (
                    name
                )  # some fp16 ulps
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(weight, before[name]) for name, weight in weights(model).items()]
        assert any(moved) != overflows
    assert scaler.get_scale() == 2.0**7


# torch.compile


@pytest.mark.setup("torch.compile", "a routed model as one graph for all labels")
@pytest.mark.slow
def test_one_graph_for_all_ids():
    check_compiled("aot_eager", routed(tiny.llama(num_hidden_layers=1)))


@pytest.mark.setup("torch.compile", "a routed model, by Inductor")
@pytest.mark.slow
def test_inductor():
    """Only the MLP is trained: a kernel takes more than a second to compile, and the whole model has 25."""
    model = routed(tiny.llama(num_hidden_layers=1), plan_of_hidden_units())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    check_compiled("inductor", model)


def check_compiled(backend, model):
    x = tokens()
    batches = [mixed_ids(x, seed=seed) for seed in range(3)]
    wants = [backward(model, x, route_ids=ids) for ids in batches]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids, want in zip(batches, wants, strict=True):
            model.zero_grad()
            compiled(x, labels=x, route_ids=ids).loss.backward()
            assert_gradients_close(gradients(model), want)


# Routes that would be lost


@pytest.mark.parametrize("name", ["route_id", "routes_ids", "rout_ids", "route_mask", "router"])
def test_misspelt_arguments(name):
    model = routed()
    x = tokens()
    with expect(TypeError, f"got an unexpected keyword argument '{name}'"):
        model(x, labels=x, **{name: mixed_ids(x)})


def test_other_arguments_are_handed_on():
    model = routed()
    x = tokens()
    loss = model(x, labels=x, route_ids=mixed_ids(x), num_items_in_batch=torch.tensor(5)).loss
    assert loss.item() == pytest.approx(4 * model(x, labels=x).loss.item(), rel=1e-6)  # 20 predictions


def test_ids_that_reach_no_layer():
    model = routed()
    model.model.layers[1] = copy.deepcopy(tiny.llama().model.layers[1])
    x = tokens()
    assert model(x).logits.isfinite().all()
    with expect(RuntimeError, "got routes that did not reach model.layers.1"):
        model(x, route_ids=mixed_ids(x))


@pytest.mark.setup("Trainer", "generate with routes", refused="generation is unrouted")
def test_generation_is_unrouted():
    plain = tiny.llama().eval()
    model = routed(copy.deepcopy(plain))
    x = tokens()
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(x)}
    assert torch.equal(model.generate(x, **options), plain.generate(x, **options))
    for name in ("route_ids", "routes", "route_strength"):
        with expect(TypeError, f"generate() got {name}, expected none: generation is unrouted"):
            model.generate(x, **options, **{name: mixed_ids(x)})
