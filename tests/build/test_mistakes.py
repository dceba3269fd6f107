"""Every public argument refuses what cannot be meant, before anything changes.

`mistakes` and `mistakes_toolkit` have a call of every public name with what is wrong for each of its arguments; a
public name or an argument without a row there fails here.
"""

import importlib
import inspect
import json
import re
from pathlib import Path

import mistakes
import mistakes_toolkit
import numpy as np
import pytest
import torch

import gradroute
from gradroute.blocks import Block
from gradroute.models import RouteCollator, RoutingPlan, localize_mlp, sgtm, steering
from gradroute.optim import RoutedAdamW
from gradroute.tables import heads, localize

NAMES = json.loads(Path(__file__).with_name("public_names.json").read_text(encoding="utf-8"))

CALLS = {
    f"gradroute.{prefix}{name}": call
    for prefix, rows in {
        "": (mistakes.ops, mistakes.objects, mistakes.layers, mistakes.plans, mistakes_toolkit.blocks),
        "labels.": (mistakes_toolkit.labelling,),
        "telemetry.": (mistakes_toolkit.measuring,),
        "optim.": (mistakes_toolkit.optimizing,),
    }.items()
    for of_rows in rows
    for name, call in of_rows()
}

#: Public names that are not checked here, and why.
ELSEWHERE = {
    "gradroute.reference.": "the meaning of the ops, which the ops call when they have checked",
    "gradroute.testing.": "helpers of tests",
    "gradroute.Routes": "made by Routes.of",
    "gradroute.routes.Routes": "the same",
    "gradroute.Routes.reshape": "takes what torch.Tensor.reshape does, which refuses the rest",
    "gradroute.models.Shape": "a named tuple: sgtm checks it",
    "gradroute.models.RoutedAttentionParallel": "no arguments",
    "gradroute.models.RoutedMLPParallel": "no arguments",
    "gradroute.models.transformer_lens.pass_routes": "test_models_transformer_lens.py",
    "gradroute.labels.Summary": "made by summarize",
    "gradroute.labels.match_spans": "test_labels_spans.py",
    "gradroute.tables.TableLike": "a type",
    "gradroute.recipes.plan": "test_planning.py, test_recipes_config.py",
    "gradroute.recipes.run": "test_recipes_running.py, test_recipes_config.py",
    "gradroute.telemetry.summary_writer": "TensorBoard's",
}

#: Arguments that are not checked here, and why.
OF_TORCH = {"device", "dtype"}
ARGUMENTS = {
    "gradroute.Table.of.name": "what an error names",
    "gradroute.labels.token_sequences.tokenizer": "test_labels_words.py",
    "gradroute.labels.token_sequences.words": "test_labels_words.py",
}


def found(path):
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            value = getattr(value, name)
        return value
    raise AssertionError(path)


@pytest.mark.parametrize("module", ["models", "labels", "era", "optim", "telemetry", "blocks"])
def test_every_exported_function_is_a_public_name(module):
    """Whatever a package exports is in public_names.json, or has a row without it."""
    exported = importlib.import_module(f"gradroute.{module}")
    functions = [name for name in exported.__all__ if inspect.isroutine(getattr(exported, name))]
    paths = [f"gradroute.{module}.{name}" for name in functions]
    assert [path for path in paths if path not in NAMES and path not in CALLS] == []


def test_every_public_argument_has_a_row():
    """A new public function, or a new argument, needs values that it refuses."""
    covered = {getattr(found(path), "__func__", found(path)) for path in CALLS}
    missing = []
    for path, parameters in NAMES.items():
        if parameters in (None, "", "self") or any(
            path == name or (name[-1] == "." and path.startswith(name)) for name in ELSEWHERE
        ):
            continue
        if path not in CALLS:
            if getattr(found(path), "__func__", found(path)) not in covered:
                missing.append(path)
            continue
        for name in inspect.signature(found(path)).parameters:
            is_checked = name in CALLS[path].wrong or name in OF_TORCH or f"{path}.{name}" in ARGUMENTS
            if name != "self" and not is_checked:
                missing.append(f"{path}.{name}")
    assert missing == []


def fingerprint(model):
    """All that a refused call must leave as it was."""
    if model is None:
        return None
    return (
        [type(module) for module in model.modules()],
        [vars(module).keys() for module in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        model.config.to_dict(),
    )


def same(before, after):
    return before is after or (
        before[:2] == after[:2]
        and before[2].keys() == after[2].keys()
        and all(torch.equal(value, after[2][name]) for name, value in before[2].items())
        and before[3] == after[3]
    )


@pytest.mark.parametrize("path", CALLS)
def test_what_cannot_be_meant_is_refused(path):
    """Each wrong value is a TypeError or ValueError that names the argument, what came and what was expected."""
    call = CALLS[path]
    before = fingerprint(call.watched)
    passed = []
    for argument, values in call.wrong.items():
        for value in values:
            try:
                call.function(**call.right | {argument: value})
                message = "nothing was raised"
            except (TypeError, ValueError) as error:
                message = str(error)
                if all(re.search(rf"\b{word}\b", message) for word in (argument, "got", "expected")):
                    continue
            passed.append(f"{argument}={value!r}: {message}")
    assert passed == []
    assert same(before, fingerprint(call.watched))


def test_integers_of_numpy_are_integers():
    """They are taken wherever ints are."""
    two, one = np.int64(2), np.int32(1)
    routes = gradroute.Routes.of([0, 1], two)
    assert type(routes.num_routes) is int
    assert len(routes.pad(one)) == 3
    assert routes.repeat(two).shape == (2, 2)
    assert localize(two, np.int16(4), {one: [0]}).weights[1].tolist() == [1, 0, 0, 0]
    assert heads([[1.0, 0.0]], two).features == 4
    assert gradroute.RoutedLinear(two, one).weight.shape == (1, 2)
    assert RoutingPlan(two, mlp={np.int64(0): None, 1: mistakes.OF_MLP}).num_routes == 2
    assert localize_mlp(np.array([0, 1]), two, route=one, num_routes=two).num_routes == 2
    assert steering([np.int64(0)], one).num_routes == 2
    assert sgtm(mistakes.CONFIG, one, two, forget=one).num_routes == 2
    assert len(Block.units(mistakes.MODEL_OF_ALL, two).parts[0].index) == 2
    assert RouteCollator(pad_token_id=np.int64(0)).pad_token_id == 0
    assert RoutedAdamW([torch.nn.Parameter(torch.ones(2, 2))], lr=np.float32(0.5), block_dim=one) is not None


def test_an_empty_batch_has_no_tokens():
    assert len(gradroute.Routes.of([], 2)) == 0


def test_a_route_that_sees_everything_is_not_called_ablated():
    """Of a fresh model nothing was ablated: the route is what does not fit."""
    with pytest.raises(ValueError, match="route: got 1, whose tokens see everything"):
        gradroute.models.ablate(mistakes.ROUTED, route=1)
