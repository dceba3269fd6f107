"""The suite `labels`: every way is checked against the slow one, and the limit is one in seconds."""

import pytest
import torch

from bench import command, report, runner, suites
from bench import labels as bench_labels
from bench.cases import FORWARD, SECONDS, Limit
from bench.ops import Options
from bench.results import MISSED, NOT_MEASURED, REACHED, Run, limit_text
from gradroute import labels

CPU = torch.device("cpu")
EAGER = Options(CPU, with_compiled=False)
TOKENS = 6000


@pytest.fixture(autouse=True)
def _small(monkeypatch, quick_bench):
    small = {"SAMPLE": 1500, "VOCABULARY": 3000, "WANTED": 20, "NGRAMS": 40, "DOCUMENT": (8, 100)}
    for name, value in ({"TOKENS": TOKENS} | small).items():
        monkeypatch.setattr(bench_labels, name, value)


@pytest.mark.slow
def test_every_case_is_timed_and_limited(tmp_path):
    plans = suites.suite_plans("labels", EAGER)
    assert [plan.name for plan in plans] == [f"labels, {name}" for name in bench_labels.CASES]
    done = runner.run("labels", plans, 2, CPU, tmp_path)
    assert done.failures() == []
    for name, case in done.cases.items():
        assert {variant for variant, one in case["variants"].items() if not one["is_rival"]} == {"gradroute"}
        speed = done.figure(name, "gradroute", FORWARD)
        assert done.figure(name, "gradroute", FORWARD, "tokens").p50 == pytest.approx(
            1e3 * TOKENS / speed.p50
        )
        (limit,) = case["limits"]
        assert limit["got"] == speed.p50 / 1e3
        assert limit["verdict"] == REACHED
    in_group = {plan.name for plan in suites.available("cpu", EAGER)}
    assert {plan.name for plan in plans} <= in_group


@pytest.mark.slow
def test_other_lengths_have_no_limit(tmp_path):
    arguments = ["run", "labels", "--tokens", "1000", "2000", "--case", "priority", "--rounds", "2"]
    assert command.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    run = Run.load(tmp_path / "labels.json")
    assert list(run.cases) == [f"labels, three rules by priority, {n} tokens" for n in (1000, 2000)]
    assert [case["limits"] for case in run.cases.values()] == [[], []]


def test_the_corpus_is_what_it_says():
    of = bench_labels.corpus(TOKENS, CPU)
    assert len(of.input_ids) == TOKENS == of.cu_seqlens[-1]
    assert of.input_ids.max() < bench_labels.VOCABULARY
    assert len(of.forget) == len(of.cu_seqlens) - 1
    document, token = of.sample
    assert of.cu_seqlens[document] == token
    assert 1500 <= TOKENS - token <= 1500 + 100
    assert {len(ngram) for ngram in of.ngrams} == set(range(1, 9))
    assert all(torch.equal(a, b) for a, b in zip(of[:4], bench_labels.corpus(TOKENS, CPU)[:4], strict=True))
    assert bench_labels.corpus(TOKENS, CPU).ngrams == of.ngrams


def test_samples_have_every_label():
    """Else the check would say little."""
    of = bench_labels.corpus(TOKENS, CPU)
    assert set(bench_labels.chain_slow(of)["ids"].tolist()) == {0, 1, 2, 3}
    assert 0.01 < bench_labels.ngrams_slow(of)["mask"].float().mean() < 0.99
    assert 0.001 < bench_labels.spans_slow(of)["mask"].float().mean() < 0.5
    strength = bench_labels.strength_slow(of)["strength"]
    assert (strength > 0.9).sum() > 10
    assert (strength < 0.1).sum() > 100


match_ngrams, match_spans, frequency_strength = (
    labels.match_ngrams,
    labels.match_spans,
    labels.frequency_strength,
)
next_token, prioritise, token_counts = labels.next_token, labels.prioritise, labels.token_counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "function", "wrong"),
    [
        (0, "match_tokens", lambda ids, wanted: ids == 3),
        (1, "match_ngrams", lambda ids, ngrams, cu_seqlens: match_ngrams(ids, ngrams, "first", cu_seqlens)),
        (2, "match_spans", lambda text, offsets, words: match_spans(text, offsets, words, whole_words=False)),
        (3, "frequency_strength", lambda forget, retain: frequency_strength(retain, forget)),
        (3, "token_counts", lambda ids, size: token_counts(ids, size) + 1),
        (4, "next_token", lambda ids, cu_seqlens: next_token(ids)),
        (4, "prioritise", lambda masks: prioritise(dict(reversed(masks.items())))),
    ],
)
def test_what_is_wrong_is_not_timed(case, function, wrong, monkeypatch, tmp_path):
    plan = suites.suite_plans("labels", EAGER)[case]
    monkeypatch.setattr(labels, function, wrong)
    done = runner.run("labels", [plan], 2, CPU, tmp_path)
    (failure,) = done.failures()
    assert failure.endswith("are not those of the slow way")
    assert done.figure(plan.name, "gradroute", FORWARD) is None
    assert done.cases[plan.name]["limits"][0]["verdict"] == NOT_MEASURED


def test_a_limit_in_seconds():
    limit = Limit("own", "", 2.0, SECONDS, FORWARD)
    reached = runner.verdict(limit, {"own": [900.0, 1100.0, 5000.0]}, {})
    assert (reached["got"], reached["verdict"]) == (1.1, REACHED)
    assert limit_text(reached) == "own at most 2 s, forward: 1.100, reached"
    assert report.limit_cells(reached) == ["`own` time, forward", "≤ 2 s", "1.100", "reached"]
    missed = runner.verdict(limit, {"own": [2001.0]}, {})
    assert missed["verdict"] == MISSED
    nothing = runner.verdict(limit, {"other": [1.0]}, {})
    assert (nothing["got"], nothing["verdict"]) == (None, NOT_MEASURED)
    assert limit_text(nothing) == "own at most 2 s, forward: not measured"


@pytest.mark.slow
def test_a_page_of_the_suite(tmp_path):
    """A target in seconds is no ratio: it is in the table of targets alone."""
    run = runner.run("labels", suites.suite_plans("labels", EAGER)[1:2], 2, CPU, tmp_path / "cpu-2-cores")
    assert run.headlines("labels") == []
    page = report.page(tmp_path)
    assert "| `gradroute` time, forward | ≤ 2 s |" in page
    assert "tokens/s" in page
    assert "Relative times" not in page
