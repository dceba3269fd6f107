"""A routed model in Lightning: routes are plain arguments of training_step's call."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("lightning")

import tiny_models as tiny
import trl_cases as cases
from lightning.pytorch import LightningModule, Trainer

from gradroute.models import RouteCollator, UnroutedWarning, route, unroute

pytestmark = pytest.mark.slow

DOCUMENTS = [
    {"input_ids": cases.ids(3 + i, i), "route_ids": [(i + t) % 2 for t in range(3 + i)]} for i in range(4)
]


class Module(LightningModule):
    def __init__(self, model=None):
        super().__init__()
        self.model = model

    def configure_model(self):
        if self.model is None:  # under the trainer's default dtype and device
            torch.manual_seed(0)
            self.model = route(tiny.llama(), cases.hidden_plan())

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), cases.LEARNING_RATE)


def loader(size=4):
    return torch.utils.data.DataLoader(DOCUMENTS, size, collate_fn=RouteCollator(pad_token_id=0))


def fit(tmp_path, module, size=4, **options):
    fixed = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(default_root_dir=tmp_path, **fixed | quiet | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers and batch sizes
        warnings.simplefilter("error", UnroutedWarning)
        trainer.fit(module, loader(size))
    return trainer


def weights(module):
    return cases.weights(module.model)


@pytest.mark.parametrize(("options", "size"), [({}, 4), ({"accumulate_grad_batches": 4}, 1)])
@pytest.mark.setup("Lightning", "training_step, accumulation")
def test_a_step(tmp_path, options, size):
    model = cases.routed()
    module = Module(copy.deepcopy(model))
    fit(tmp_path, module, size, **options)
    if size == 4:
        expected = cases.stepped_on(model, DOCUMENTS)
    else:
        parts = [RouteCollator(pad_token_id=0)([document]) for document in DOCUMENTS]
        expected = cases.stepped(model, lambda copied: sum(copied(**part).loss for part in parts) / 4)
    cases.assert_close(weights(module), expected)
    plain = [document | {"route_ids": 0} for document in DOCUMENTS]
    cases.assert_routed(weights(module), cases.stepped_on(model, plain))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.setup("Lightning", "bf16-true, bf16-mixed, configure_model")
def test_precision(tmp_path, precision, configured):
    """The step of a plain loop in the same dtype, with tables of the weights that were written."""
    torch.manual_seed(0)
    plan = cases.hidden_plan()
    module = Module() if configured else Module(route(tiny.llama(), plan))
    fit(tmp_path, module, precision=precision)
    torch.manual_seed(0)
    made_in = torch.bfloat16 if configured and precision == "bf16-true" else torch.float32
    torch.set_default_dtype(made_in)  # as Lightning does around configure_model
    try:
        model = tiny.llama()
    finally:
        torch.set_default_dtype(torch.float32)
    if precision == "bf16-true":
        model = model.bfloat16()
    route(model, plan)
    batch = RouteCollator(pad_token_id=0)(DOCUMENTS)

    def loss(copied):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return copied(**batch).loss

    expected = cases.stepped(model, loss)
    for name, value in weights(module).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.setup("Lightning", "checkpoints")
def test_checkpoints(tmp_path):
    """A saved step continues as the step that was not saved, and loads as a plain model's."""
    model = cases.routed()
    module = Module(copy.deepcopy(model))
    trainer = fit(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "one.ckpt", model=cases.routed(), weights_only=False)
    cases.assert_close(weights(loaded), weights(module))
    fit(tmp_path, module)
    fit(tmp_path, loaded)
    cases.assert_close(weights(loaded), weights(module))
    state = torch.load(tmp_path / "one.ckpt", weights_only=False)["state_dict"]
    plain = tiny.llama()
    plain.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    unroute(loaded.model)


def test_routes_that_are_forgotten(tmp_path):
    """The model warns: nothing of Lightning drops routes, but a training_step may not pass them on."""

    class Forgetful(Module):
        def training_step(self, batch, index):
            return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    with pytest.raises(UnroutedWarning, match="training mode without route_ids"):
        fit(tmp_path, Forgetful(cases.routed()))
