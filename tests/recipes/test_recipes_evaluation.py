"""Evaluation of checkpoints: losses and errors against plain computations, differences that find what was planted."""

import copy
import math
import sys
import types

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import tiny_models as tiny

from gradroute.models import localize_mlp, route, sgtm
from gradroute.recipes import evaluation
from gradroute.recipes.evaluation import comparison, held_out


class Words:
    """A tokenizer whose token n is the word wn."""

    eos_token_id = pad_token_id = 0

    def __call__(self, text):
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(f" w{token}" for token in tokens)


def rows_of(lengths, sources=("retain", "forget"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(1, tiny.VOCABULARY, (length,), generator=generator)
        route_ids = torch.randint(0, 2, (length,), generator=generator)
        source = sources[number % len(sources)]
        rows.append({"input_ids": ids.tolist(), "source": source, "route_ids": route_ids.tolist()})
    return rows


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny.llama()


def naive(model, row):
    """The losses of one document alone, [S - 1]."""
    ids = torch.tensor(row["input_ids"])
    with torch.no_grad():
        logits = model.eval()(ids[None]).logits[0].double()
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none").numpy()


@pytest.mark.parametrize("names", [None, ["first", "second"]])
@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_losses_and_their_errors_are_those_of_documents_one_by_one(model, names, batch_tokens):
    rows = rows_of([9, 5, 12, 1, 7, 20])
    found = evaluation.losses(model, rows, names=names, batch_tokens=batch_tokens)
    assert list(found) == (["retain", "forget"] if names is None else names)
    for number, name in enumerate(found):
        sums, counts = [], []
        for row in rows:
            of_token = naive(model, row) if len(row["input_ids"]) > 1 else np.zeros(0)
            belongs = (
                np.full(len(of_token), row["source"] == name)
                if names is None
                else np.array(row["route_ids"][1:], int) == number
            )
            if belongs.any():
                sums.append(of_token[belongs].sum())
                counts.append(belongs.sum())
        sums, counts = np.array(sums), np.array(counts)
        mean, documents = sums.sum() / counts.sum(), len(sums)
        error = math.sqrt(((sums - mean * counts) ** 2).sum() * documents / (documents - 1)) / counts.sum()
        assert found[name]["loss"] == pytest.approx(mean, rel=1e-5)
        assert found[name]["standard_error"] == pytest.approx(error, rel=1e-4)
        assert (found[name]["tokens"], found[name]["documents"]) == (counts.sum(), documents)


def test_the_error_is_the_spread_of_losses_of_other_documents(model):
    # Of 200 draws the standard deviation has an error of 5 %; the estimate of each draw, of 30 documents, more.
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 50, (200, 30))
    level = generator.normal(3, 0.5, (200, 30))  # a document's own difficulty, which its tokens share
    drawn = [
        held_out.DocumentLosses(("text",), (t * d)[:, None], t[:, None]).means()["text"]
        for t, d in zip(tokens, level, strict=True)
    ]
    spread = np.std([one["loss"] for one in drawn])
    assert np.mean([one["standard_error"] for one in drawn]) == pytest.approx(spread, rel=0.15)


def test_a_change_has_the_error_of_the_same_documents_differences(model):
    before = held_out.DocumentLosses(("a",), np.array([[10.0], [90.0]]), np.array([[10], [10]]))
    after = held_out.DocumentLosses(("a",), np.array([[15.0], [95.0]]), np.array([[10], [10]]))
    assert after.changes(before)["a"] == {
        "change": 0.5,
        "standard_error": 0.0,
        "tokens": 20,
        "documents": 2,
    }
    assert after.means()["a"]["standard_error"] == pytest.approx(4.0)
    with pytest.raises(ValueError, match="before: got the losses of other documents"):
        after.changes(held_out.DocumentLosses(("a",), before.sums, before.tokens + 1))


def test_without_tokens_there_is_no_loss_and_of_one_document_no_error(model):
    found = evaluation.losses(model, rows_of([8, 1]))
    assert found["retain"]["standard_error"] is None
    assert found["forget"] == {"loss": None, "standard_error": None, "tokens": 0, "documents": 0}


def test_a_routed_model_is_evaluated_whole_and_left_as_it_was(model):
    rows = rows_of([9, 6])
    expected = evaluation.losses(copy.deepcopy(model), rows)
    # Ids would change the forward: sgtm hides the forget units from retain tokens.
    route(model, sgtm(model.config, forget_heads=2, forget_units=8)).train()
    model.model.layers[0].mlp.eval()
    assert evaluation.losses(model, rows) == expected
    assert model.training
    assert not model.model.layers[0].mlp.training


def test_logits_are_never_there_twice(model, monkeypatch):
    monkeypatch.setattr(held_out, "CHUNK", 4 * tiny.VOCABULARY)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            owns = not any(r.alias_info for r in function._schema.returns)
            if owns and isinstance(result, torch.Tensor) and result.shape[-1:] == (tiny.VOCABULARY,):
                sizes.append(result.numel())
            return result

    with Sizes():
        evaluation.losses(model.bfloat16(), rows_of([16] * 4), batch_tokens=64)
    whole = 4 * 16 * tiny.VOCABULARY
    assert max(sizes) == whole
    assert sizes.count(whole) <= 2  # the product, and the view that reshapes it
    assert sorted(sizes)[-3] <= 4 * tiny.VOCABULARY


def test_a_change_that_was_planted_is_found(model):
    planted, rows = 7, rows_of([24] * 12)
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.lm_head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCABULARY))
        after.lm_head.bias[planted] = -5  # the logit of one token; the others only move with the sum
    found = evaluation.token_differences(model, after, rows, Words(), top=3, context=2)
    first = found["tokens"][0]
    assert (first["token"], first["text"]) == (planted, " w7")
    count = sum(row["input_ids"][1:].count(planted) for row in rows)
    assert first["count"] == count >= comparison.LEAST
    old, new = ([naive(m, row) for row in rows] for m in (model, after))
    of_planted = np.concatenate(
        [(b - a)[np.array(r["input_ids"][1:]) == planted] for a, b, r in zip(old, new, rows, strict=True)]
    )
    assert first["difference"] == pytest.approx(of_planted.mean(), rel=1e-4)
    assert first["standard_error"] == pytest.approx(of_planted.std(ddof=1) / math.sqrt(count), rel=1e-4)
    most = found["contexts"][0]
    row = rows[most["document"]]["input_ids"]
    at = most["position"]
    assert abs(most["difference"]) == pytest.approx(np.abs(np.subtract(new, old)).max(), rel=1e-4)
    assert row[at] == planted
    assert most["text"] == f" w{row[at]}"
    assert most["left"] == Words().decode(row[max(0, at - 2) : at])
    assert most["right"] == Words().decode(row[at + 1 : at + 3])
    total = np.concatenate([b - a for a, b in zip(old, new, strict=True)])
    moved = [f["difference"] * f["tokens"] for f in found["sources"].values()]
    assert sum(moved) == pytest.approx(total.sum(), rel=1e-4)
    assert sum(map(sum, found["histogram"]["counts"].values())) == len(total)
    assert sum(found["positions"]["tokens"]) == len(total)
    assert found["concentration"]["0.5"] <= 1
    text = found["texts"][0]
    assert text["differences"] == pytest.approx((new[text["document"]] - old[text["document"]]), abs=1e-4)
    weights = evaluation.weight_differences(model, after)
    assert (weights["missing"], weights["outside"]["lm_head"]) == (["lm_head.bias"], 0)
    assert not any(ratio for row in weights["change"] for ratio in row)


def test_weights_differ_where_they_were_changed(model):
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.model.layers[1].mlp.up_proj.weight *= 1.5
    found = evaluation.weight_differences(model, after)
    changed = {
        (module, layer): ratio
        for module, ratios in zip(found["modules"], found["change"], strict=True)
        for layer, ratio in zip(found["layers"], ratios, strict=True)
        if ratio
    }
    assert changed == {("mlp.up_proj", 1): pytest.approx(0.5)}
    after.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
        F.pad(model.model.layers[0].mlp.down_proj.weight, (0, 1), value=2.0)
    )
    found = evaluation.weight_differences(model, after)
    assert found["reshaped"] == ["model.layers.0.mlp.down_proj.weight"]
    size = model.model.layers[0].mlp.down_proj.weight.norm().item()
    ratio = found["change"][found["modules"].index("mlp.down_proj")][0]
    assert ratio == pytest.approx(2 * math.sqrt(tiny.D_MODEL) / size, rel=1e-4)


def test_generations_are_those_of_each_model_alone(model):
    other = route(tiny.llama(), localize_mlp([0], 8))
    prompts = ["w3 w4 w5", "w6"]
    found = evaluation.generations({"a": model, "b": other}, Words(), prompts, max_new_tokens=5)
    assert [one["prompt"] for one in found] == prompts
    ids = torch.tensor([[3, 4, 5]])
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == 2:  # the model's end token
            break
    assert found[0]["completions"]["a"] == Words().decode(ids[0, 3:].tolist())
    random = torch.random.get_rng_state()
    draws = [
        evaluation.generations({"a": model}, Words(), prompts, max_new_tokens=5, sample=True, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(random, torch.random.get_rng_state())


def test_bad_input_is_refused_by_name(model):
    rows = rows_of([6])
    for wrong, message in [
        ("text", "rows: got 'text', expected a list"),
        ([], "rows: got no documents"),
        ([{"tokens": [1]}], r"rows\[0\]: got the columns tokens, expected input_ids"),
        ([{"input_ids": [1.5]}], r"rows\[0\].input_ids: got \[1.5\], expected a list of integers"),
        ([{"input_ids": [1, 99]}], r"rows\[0\].input_ids: got the token 99, expected tokens below 32"),
        ([{"input_ids": [1] * 40}], r"rows\[0\].input_ids: got 40 tokens, expected 32 at most"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            evaluation.losses(model, wrong)
    with pytest.raises(
        ValueError, match=r"rows\[0\].route_ids: got the route 1, expected routes from 0 to 0"
    ):
        evaluation.losses(model, [rows[0] | {"route_ids": [1] * 6}], names=["only"])
    with pytest.raises(ValueError, match=r"rows\[0\]: got no route_ids"):
        evaluation.losses(model, [{"input_ids": [1, 2]}], names=["a", "b"])
    with pytest.raises(ValueError, match="batch_tokens: got 0"):
        evaluation.losses(model, rows, batch_tokens=0)
    with pytest.raises(ValueError, match=r"prompts\[0\]: got '', which has no tokens"):
        evaluation.generations({"a": model}, Words(), [""])
    with pytest.raises(ValueError, match=r"prompts\[0\]: got 1 tokens and max_new_tokens 48, expected 32"):
        evaluation.generations({"a": model}, Words(), ["w1"])


@pytest.fixture
def calls(monkeypatch):
    """A stand-in for lm_eval, which notes how it is called and answers as version 0.4.13 does."""
    noted = {}

    class HFLM:
        def __init__(self, **arguments):
            noted["model"] = arguments

    class TaskManager:
        def __init__(self, include_path=None):
            noted["include_path"] = include_path

        def match_tasks(self, names):
            return [name for name in names if name in ("wmdp_bio", "mmlu")]

    def simple_evaluate(**arguments):
        noted["training"] = noted["model"]["pretrained"].training
        noted["arguments"] = arguments
        metrics = {"alias": "wmdp_bio", "acc,none": 0.25, "acc_stderr,none": 0.01, "exact,strict": "N/A"}
        return {"results": {"wmdp_bio": metrics}, "n-samples": {"wmdp_bio": {"original": 9, "effective": 5}}}

    modules = {
        "lm_eval": types.SimpleNamespace(simple_evaluate=simple_evaluate, __spec__="found"),
        "lm_eval.models": types.SimpleNamespace(),
        "lm_eval.models.huggingface": types.SimpleNamespace(HFLM=HFLM),
        "lm_eval.tasks": types.SimpleNamespace(TaskManager=TaskManager),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return noted


def test_the_harness_is_called_as_it_documents(model, calls):
    tokenizer = Words()
    found = evaluation.harness(model.train(), tokenizer, ["wmdp_bio"], limit=5, batch_size=3)
    assert found == {"wmdp_bio": {"acc": 0.25, "acc_stderr": 0.01, "exact,strict": None, "samples": 5}}
    assert calls["model"] == {"pretrained": model, "tokenizer": tokenizer, "batch_size": 3}
    assert calls["arguments"]["tasks"] == ["wmdp_bio"]
    assert (calls["arguments"]["limit"], calls["arguments"]["num_fewshot"]) == (5, None)
    assert (calls["training"], model.training) == (False, True)
    with pytest.raises(ValueError, match=r"tasks: got \['wmpd_bio'\], expected names that lm_eval knows"):
        evaluation.harness(model, tokenizer, ["wmpd_bio"])


def test_the_harness_is_refused_where_it_is_not_installed(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluation.harness_unavailable() == "lm_eval is not installed: pip install lm-eval"
    with pytest.raises(
        ImportError, match=r"tasks: got \['mmlu'\], expected none, because lm_eval is not installed"
    ):
        evaluation.harness(model, Words(), ["mmlu"])
