"""`python -m gradroute tune`: which candidate is chosen, what is kept, and what the command says."""

import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from tune_cases import CPU, EFFORT, backend_of, clock, findings, small

from gradroute import __main__, backends
from gradroute.backends import composed, native
from gradroute.machine import answers, identity, progress
from gradroute.machine.records import TUNING, Record
from gradroute.machine.tune import command, measuring
from gradroute.machine.tune.measuring import Contest, Measuring, Trial, is_faster, least_rounds, ranking
from gradroute.machine.tune.of_backends import by_size
from gradroute.machine.tune.question import threshold
from gradroute.machine.tune.questions import questions
from gradroute.skipping import rule

__all__ = ["small"]
pytestmark = [
    pytest.mark.usefixtures("small"),
    pytest.mark.skipif(native.module is None, reason="backend torch alone leaves nothing to choose"),
]
ROUTE_GRAD, GLU = "backends/route_grad/float32", "backends/routed_glu/float32"


@pytest.mark.parametrize(
    ("own", "incumbent", "faster"),
    [
        ([0.5] * 8, [1.0] * 8, True),
        ([0.96] * 8, [1.0] * 8, True),
        ([0.98] * 8, [1.0] * 8, False),  # too little
        ([1.0] * 8, [1.0] * 8, False),
        ([0.5] * 7 + [2.0] * 2, [1.0] * 9, False),  # a coin does as well in 9 of 100 contests
        ([0.5] * 8 + [9.0], [1.0] * 9, True),  # one disturbed round does not count
        ([0.5] * 5, [1.0] * 5, False),  # too few rounds to tell
        ([5.0, 0.5, 50.0, 0.05] * 2, [10.0, 1.0, 100.0, 0.1] * 2, True),  # rounds are compared one by one
    ],
)
def test_a_candidate_must_be_faster_by_more_than_the_noise(own, incumbent, faster):
    assert is_faster(own, incumbent) is faster


def test_a_ranking_keeps_the_shipped_order_within_the_noise():
    assert ranking({"a": [1.0] * 8, "b": [0.99] * 8, "c": [1.01] * 8}) == ["a", "b", "c"]
    assert ranking({"a": [1.0] * 8, "b": [0.9] * 8, "c": [0.5] * 8}) == ["c", "b", "a"]
    assert ranking({"a": [1.0] * 8, "b": [3.0] * 8, "c": [2.0] * 8}) == ["a", "c", "b"]


def contests(faster, rounds=8):
    """Contests of an old and a new form, by point: whether the new one is the faster one."""
    return {
        point: Contest({"old": [1.0] * rounds, "new": [0.5 if is_new else 2.0] * rounds}, {})
        for point, is_new in faster.items()
    }


def simulated(seed, candidates, jitter, gain):
    """What contests of equals rank first, but the last one is faster by `gain`; times jitter by a normal share."""
    generator = random.Random(seed)
    rounds = max(measuring.QUICK.least_rounds, least_rounds(candidates - 1))
    for _ in range(500):
        speeds = [1.0] * (candidates - 1) + [1.0 - gain]
        times = [[max(0.01, generator.gauss(one, jitter * one)) for _ in range(rounds)] for one in speeds]
        yield ranking(dict(enumerate(times)))


@pytest.mark.parametrize("candidates", [2, 5])
@pytest.mark.parametrize("jitter", [0.05, 0.15])
def test_equals_keep_the_shipped_answer(candidates, jitter):
    orders = list(simulated(1, candidates, jitter, gain=0))
    assert sum(order[0] == 0 for order in orders) >= 0.97 * len(orders)


@pytest.mark.parametrize("candidates", [2, 5])
def test_what_is_faster_by_a_fifth_wins(candidates):
    orders = list(simulated(2, candidates, 0.05, gain=0.2))
    assert sum(order[0] == candidates - 1 for order in orders) >= 0.97 * len(orders)


@pytest.mark.parametrize(("others", "expected"), [(1, 9), (2, 11), (4, 12)])
def test_a_contest_has_rounds_enough_that_one_may_be_lost(others, expected):
    assert least_rounds(others) == expected
    trials = {str(number): [Trial(lambda: None, lambda: None)] for number in range(others + 1)}
    assert Measuring(CPU, EFFORT).contest(trials).rounds == expected


@pytest.mark.parametrize(
    ("faster", "expected"),
    [
        ({1: False, 2: False, 3: True}, 2.5),  # as shipped
        ({1: False, 2: True, 3: True}, 2),
        ({1: True, 2: True, 3: True}, 1),
        ({1: True, 2: False, 3: True}, 3),  # what is below does not count
        ({1: False, 2: False, 3: False}, "never"),
        ({1: True, 2: True, 3: False}, "never"),
    ],
)
def test_a_threshold_is_where_a_form_is_faster_from_then_on(faster, expected):
    found = threshold(contests(faster), "new", lambda point: point >= 2.5, shipped=2.5, never="never")
    assert found == expected


@pytest.mark.parametrize(("points", "rounds", "expected"), [(5, 8, 5), (6, 8, "shipped"), (6, 9, 6)])
def test_a_threshold_asks_more_of_a_contest_where_there_are_more_points(points, rounds, expected):
    """Of 6 equals the chance that one wins all of 8 rounds is 6 / 256: more than one may have."""
    faster = contests({point: point == points for point in range(1, points + 1)}, rounds)
    assert threshold(faster, "new", lambda point: False, shipped="shipped", never="never") == expected


def test_a_contest_of_many_points_has_the_rounds_that_they_ask_for():
    trials = {name: [Trial(lambda: None, lambda: None)] for name in ("old", "new")}
    assert Measuring(CPU, EFFORT).contest(trials, points=6).rounds == least_rounds(6) > least_rounds(1)


def test_orders_by_size_meet_half_way_and_neighbours_that_agree_are_one():
    assert by_size([(100, ["a", "b"]), (10000, ["b", "a"])]) == [[1000, ["a", "b"]], [None, ["b", "a"]]]
    assert by_size([(1, ["a"]), (4, ["a"]), (100, ["b"])]) == [[20, ["a"]], [None, ["b"]]]
    assert by_size([(1, ["a"]), (4, ["a"])]) == [[None, ["a"]]]


def test_rounds_take_every_candidate_and_the_inputs_in_turn(monkeypatch):
    timed = []
    trials = {
        name: [Trial(lambda: None, lambda: None, {}, is_launch_bound=bool(number)) for number in range(2)]
        for name in "ab"
    }
    names = {id(trial): f"{name}{number}" for name in "ab" for number, trial in enumerate(trials[name])}
    clock(monkeypatch, lambda trial: timed.append(names[id(trial)]) or 1.0)
    contest = Measuring(CPU, EFFORT).contest(trials)
    assert timed[:12] == ["a0", "b0", "b0", "a0", "a1", "b1", "b1", "a1", "a0", "b0", "b0", "a0"]
    assert contest.rounds == 9
    assert contest.figures("x: ") == {name: {"ms": 1e3, "ratio": 1.0} for name in ("x: a", "x: b")}


def test_rounds_end_when_their_time_is_up():
    effort = EFFORT._replace(least_rounds=2, most_rounds=1000)
    trials = {"a": [Trial(lambda: None, lambda: None)]}
    assert Measuring(CPU, effort).contest(trials).rounds == 2
    assert Measuring(CPU, effort._replace(seconds=1e9, most_rounds=7)).contest(trials).rounds == 7


def test_trials_run_with_their_answers_and_short_ones_are_repeated():
    seen = []

    def step():
        seen.append(answers.run("mlp", CPU, torch.float32))

    Measuring(CPU, EFFORT).seconds(Trial(step, step, {"run/mlp/float32": 7}))
    assert seen == [7]
    Measuring(CPU, EFFORT).seconds(Trial(step, step, {}, is_launch_bound=True))
    assert seen[1:] == [None] * measuring.LAUNCHES


def test_what_is_wrong_is_left_out_and_where_nothing_is_right_there_is_no_answer():
    def fails():
        raise RuntimeError("no such kernel")

    trials = {"a": [Trial(lambda: None, fails)], "b": [Trial(lambda: None, lambda: None)]}
    contest = Measuring(CPU, EFFORT).contest(trials)
    assert list(contest.milliseconds) == ["b"]
    assert contest.left_out == {"a": "RuntimeError: no such kernel"}
    with pytest.raises(AssertionError, match="a: RuntimeError: no such kernel"):
        Measuring(CPU, EFFORT).contest({"a": trials["a"]})


def tune(*arguments):
    return command.main(["--quick", "--device", "cpu", *arguments])


def test_a_faster_backend_is_taken_by_size_and_explained(monkeypatch, capsys):
    """Here torch is faster with few elements, and twice as slow with many."""

    def seconds(trial):
        return {"cpu": 2.0, "torch": 1.0 if trial.is_launch_bound else 4.0}[backend_of(trial)]

    clock(monkeypatch, seconds)
    assert tune("--only", ROUTE_GRAD) == 0
    found = findings()[ROUTE_GRAD]
    assert found["answer"] == [[128, ["torch", "cpu"]], [None, ["cpu", "torch"]]]
    assert found["measured"]["small, 32 elements: torch"] == {"ms": 1e3, "ratio": 0.5}
    assert (found["rounds"], found["quick"], found["left_out"], found["spread"]) == (9, True, {}, 0.0)
    assert f'{ROUTE_GRAD}: [[128, ["torch", "cpu"]], [null, ["cpu", "torch"]]], shipped is' in (
        capsys.readouterr().out
    )
    for elements, backend in ((128, "torch"), (129, "cpu")):
        choice = backends.explain("route_grad", torch.randn(elements))
        assert (choice.backend, choice.evidence) == (backend, "measured here")


def test_a_wrong_backend_is_not_taken_however_fast_it_is(monkeypatch, capsys):
    right = composed.masked_product
    monkeypatch.setattr(composed, "masked_product", lambda *args, **kw: 2 * right(*args, **kw))
    clock(monkeypatch, lambda trial: 1e-9 if backend_of(trial) == "torch" else 1.0)
    assert tune("--only", ROUTE_GRAD) == 0
    found = findings()[ROUTE_GRAD]
    assert found["answer"] == [[None, ["cpu"]]]
    assert "maximum error" in found["left_out"]["large, 512 elements: torch"]
    assert "torch is left out: AssertionError: route_grad: dx: " in capsys.readouterr().out


def test_a_backend_that_differs_from_run_to_run_is_not_taken(monkeypatch):
    right, runs = composed.masked_product, []

    def differs(*args, **kw):
        runs.append(1)
        return right(*args, **kw) * (1 + 1e-7 * (len(runs) % 2))

    monkeypatch.setattr(composed, "masked_product", differs)
    clock(monkeypatch, lambda trial: 1e-9 if backend_of(trial) == "torch" else 1.0)
    assert tune("--only", ROUTE_GRAD) == 0
    assert "run again" in findings()[ROUTE_GRAD]["left_out"]["large, 512 elements: torch"]


def test_where_nothing_is_right_no_answer_is_written(monkeypatch, capsys):
    clock(monkeypatch, lambda trial: 1.0)
    monkeypatch.setattr(measuring.Judged, "check", lambda *_, **__: 1 / 0)
    assert tune("--only", ROUTE_GRAD) == 1
    assert findings() == {}
    assert f"{ROUTE_GRAD}: no answer, AssertionError: cpu: ZeroDivisionError" in capsys.readouterr().out


def test_noisy_rounds_are_said(monkeypatch, capsys):
    times = iter(range(1, 1000))
    clock(monkeypatch, lambda trial: next(times) % 7 + 1.0)
    assert tune("--only", ROUTE_GRAD) == 0
    assert "noisy: the quartiles of some rounds are" in capsys.readouterr().out
    assert findings()[ROUTE_GRAD]["spread"] > 0.2


def test_an_interrupt_keeps_what_was_answered_and_the_rest_is_asked_next_time(monkeypatch, capsys):
    asked = []

    def seconds(trial):
        op = trial.step.func.__self__.op
        if op not in asked:
            asked.append(op)
        if op == "routed_glu" and "resumed" not in asked:
            raise KeyboardInterrupt
        return 1.0

    clock(monkeypatch, seconds)
    assert tune("--only", ROUTE_GRAD, GLU) == 130
    assert asked == ["route_grad", "routed_glu"]
    assert list(findings()) == [ROUTE_GRAD]
    assert "Interrupted. The answers before this are kept" in capsys.readouterr().out
    asked[:] = ["resumed"]
    assert tune("--only", ROUTE_GRAD, GLU) == 0
    assert asked == ["resumed", "routed_glu"]
    assert "1 of 2 questions to ask" in capsys.readouterr().out
    assert set(findings()) == {ROUTE_GRAD, GLU}


def test_an_interrupted_run_says_which_command_goes_on_and_prints_its_object(monkeypatch, capsys):
    clock(monkeypatch, lambda trial: 1.0)
    assert tune("--only", ROUTE_GRAD) == 0

    def interrupt(trial):
        raise KeyboardInterrupt

    clock(monkeypatch, interrupt)
    capsys.readouterr()
    assert tune("--only", ROUTE_GRAD, "--only", GLU, "--again", "--json") == 130
    out, err = capsys.readouterr()
    assert "the same command without --again goes on from here" in err
    assert set(json.loads(out)["cpu"]["findings"]) == {ROUTE_GRAD}


def test_a_quick_answer_never_replaces_a_whole_one(monkeypatch, capsys):
    clock(monkeypatch, lambda trial: 1.0)
    assert command.main(["--device", "cpu", "--only", ROUTE_GRAD]) == 0
    whole = findings()
    assert tune("--only", ROUTE_GRAD, "--again") == 0
    assert findings() == whole
    assert f"{ROUTE_GRAD}: the answer of a whole run stays" in capsys.readouterr().out


def test_the_list_does_not_say_measured_where_answers_are_ignored(monkeypatch, capsys):
    clock(monkeypatch, lambda trial: 1.0)
    assert tune("--only", ROUTE_GRAD) == 0
    capsys.readouterr()
    monkeypatch.setattr(answers, "_reads_files", False)
    assert tune("--list", "--json", "--only", ROUTE_GRAD) == 0
    (row,) = json.loads(capsys.readouterr().out)["cpu"]
    assert row["evidence"] == "shipped estimate"


@pytest.mark.slow
def test_whoever_reads_the_output_may_stop():
    """As `| head -1` does: no traceback, and nothing about answers that cannot be kept."""
    reading, writing = os.pipe()
    os.close(reading)
    command_line = [sys.executable, "-m", "gradroute", "tune", "--list", "--quick", "--device", "cpu"]
    done = subprocess.run(command_line, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_whole_run_asks_again_what_a_quick_one_answered(monkeypatch):
    asked = []
    clock(monkeypatch, lambda trial: asked.append(1) or 1.0)
    only = ("--device", "cpu", "--only", ROUTE_GRAD)
    for arguments, is_asked, is_quick in (
        (("--quick", *only), True, True),
        (("--quick", *only), False, True),
        (("--quick", "--again", *only), True, True),
        (only, True, False),
        (only, False, False),
        (("--quick", *only), False, False),
        (("--again", *only), True, False),
    ):
        asked.clear()
        assert command.main(list(arguments)) == 0
        assert bool(asked) is is_asked, arguments
        assert findings()[ROUTE_GRAD]["quick"] is is_quick, arguments


def test_answers_that_cannot_be_read_are_asked_again(monkeypatch):
    clock(monkeypatch, lambda trial: 1.0)
    Record(TUNING, CPU).update({ROUTE_GRAD: {"answer": [[None, ["nobody"]]]}})
    assert tune("--only", ROUTE_GRAD) == 0
    assert findings()[ROUTE_GRAD]["answer"] == [[None, ["cpu", "torch"]]]


@pytest.mark.filterwarnings("ignore:The answer to")
def test_what_cannot_be_read_is_removed_and_the_rest_stays(monkeypatch):
    clock(monkeypatch, lambda trial: 1.0)
    kept = {GLU: {"answer": [[None, ["torch"]]]}, "launch/of_triton": {"answer": {}}}
    monkeypatch.delitem(answers._readers, "launch", raising=False)
    damaged = {
        "weather/float32": {"answer": 1},
        "backends/nobody/float32": 3,
        "run/mlp/float32": {"answer": []},
    }
    Record(TUNING, CPU).update(kept | damaged)
    assert tune("--list") == 0
    assert set(findings()) == set(kept | damaged)
    assert tune("--only", ROUTE_GRAD) == 0
    assert set(findings()) == {*kept, ROUTE_GRAD}
    assert findings()[GLU] == kept[GLU]


def test_where_nothing_is_to_be_asked_nothing_is_written(monkeypatch, capsys):
    """A shared folder may be one that this process can only read."""
    clock(monkeypatch, lambda trial: 1.0)
    assert tune("--only", ROUTE_GRAD) == 0
    monkeypatch.setattr(Record, "change", lambda *_: pytest.fail("the file is written"))
    assert tune("--only", ROUTE_GRAD) == 0
    assert "0 of 1 questions to ask" in capsys.readouterr().out


def test_answers_of_another_machine_do_not_count(monkeypatch):
    clock(monkeypatch, lambda trial: 1.0)
    of = identity.of
    with monkeypatch.context() as there:
        there.setattr(identity, "of", lambda *args, **kw: of(*args, **kw) | {"threads": 77})
        assert tune("--only", ROUTE_GRAD) == 0
        assert set(findings()) == {ROUTE_GRAD}
    assert findings() == {}
    assert backends.explain("route_grad", torch.randn(3)).evidence == "shipped estimate"


def test_the_list_says_what_is_decided_and_on_what_grounds(monkeypatch, capsys):
    clock(monkeypatch, lambda trial: 1.0 if backend_of(trial) == "torch" else 2.0)
    assert tune("--only", ROUTE_GRAD) == 0
    capsys.readouterr()
    clock(monkeypatch, lambda trial: pytest.fail("nothing is measured"))
    assert tune("--list", "--json") == 0
    rows = {row["question"]: row for row in json.loads(capsys.readouterr().out)["cpu"]}
    assert rows[ROUTE_GRAD]["answer"] == [[None, ["torch", "cpu"]]]
    assert rows[ROUTE_GRAD]["evidence"] == "measured here"
    assert rows["run/mlp/float32"]["answer"] == rule.RUN
    assert rows["run/mlp/float32"]["evidence"] == "shipped estimate"
    assert tune("--list", "--only", "tiles") == 0
    out = capsys.readouterr().out
    assert out.startswith("On cpu:\ntiles/float32: the tiles in which attention is computed")
    assert '  shipped estimate: {"rows": 384, "keys": 512}' in out


def test_json_is_all_that_is_printed(monkeypatch, capsys):
    clock(monkeypatch, lambda trial: 1.0)
    assert tune("--only", ROUTE_GRAD, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["cpu"]
    assert found["findings"] == findings()
    assert found["failed"] == []
    assert f"{ROUTE_GRAD}: " in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "weather"], r"--only: got 'weather', expected kinds \(backends, "),
        (
            ["--only", "vendors", "--device", "cpu"],
            "got 'vendors', a kind of which there is no question on cpu",
        ),
        (["--only", "run/nobody"], "--only: got 'run/nobody', expected kinds .* or questions that --list"),
        (["--device", "meta"], "device: got 'meta', expected cpu, or a CUDA device that is there"),
        (["--device", "cpu:3"], "device: got 'cpu:3', and there is one CPU"),
        (["--device", "nowhere"], "device: got 'nowhere', expected the name of a device"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_it_says_that_answers_are_ignored(monkeypatch, capsys):
    clock(monkeypatch, lambda trial: 1.0)
    monkeypatch.setattr(answers, "_reads_files", False)
    assert tune("--only", ROUTE_GRAD) == 0
    assert "GRADROUTE_TUNING=0 is set: answers are written, and ignored" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(small, monkeypatch, capsys):
    (small / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("GRADROUTE_CACHE", str(small / "file"))
    clock(monkeypatch, lambda trial: pytest.fail("nothing is measured"))
    assert tune("--only", ROUTE_GRAD) == 1
    assert "Answers cannot be kept: " in capsys.readouterr().out


def test_products_are_timed_on_the_backend_that_is_chosen_by_itself(monkeypatch):
    """Whatever the process asks for everywhere, as GRADROUTE_BACKEND does."""
    used = set()
    clock(monkeypatch, lambda trial: used.add(trial.step.backend) or 1.0)
    with backends.use_backend("reference"):
        assert tune("--only", "run/mlp") == 0
    assert used == {"cpu"}


def test_it_is_a_command_of_the_package(monkeypatch, capsys):
    assert __main__.main(["tune", "--list", "--quick", "--device", "cpu", "--only", "run"]) == 0
    assert capsys.readouterr().out.count("run/") == 3


def test_without_tqdm_questions_are_lines(monkeypatch, capsys):
    clock(monkeypatch, lambda trial: 1.0)
    find_spec = progress.importlib.util.find_spec
    monkeypatch.setattr(
        progress.importlib.util, "find_spec", lambda name: None if name == "tqdm" else find_spec(name)
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert tune("--only", ROUTE_GRAD) == 0
    out, err = capsys.readouterr()
    assert err == f"[1/1] {ROUTE_GRAD}\n"
    assert f'{ROUTE_GRAD}: [[null, ["cpu", "torch"]]], as shipped\n' in out


def test_every_question_of_the_cpu_is_asked_once_and_can_be_read():
    whole = questions(CPU, command.WHOLE)
    assert len({question.name for question in whole}) == len(whole)
    assert {question.name.split("/")[0] for question in whole} == {"backends", "rectangles", "run", "tiles"}
    for question in whole:
        answers.parsed(question.name, question.shipped)
        assert question.decides
    quick = questions(CPU, command.QUICK)
    assert {question.name for question in quick} < {question.name for question in whole}
    asked = {question.name.split("/")[1] for question in quick if question.name.startswith("backends/")}
    assert asked == set(backends.OPS)


@pytest.mark.slow
def test_two_real_runs_at_once_lose_nothing(tmp_path):
    """The command itself, on the CPU, as two processes with one cache."""
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "gradroute",
                "tune",
                "--quick",
                "--device",
                "cpu",
                "--json",
                "--only",
                name,
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"GRADROUTE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )
        for name in (ROUTE_GRAD, GLU)
    ]
    printed = [json.loads(process.communicate()[0])["cpu"] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0]["file"] == printed[1]["file"]
    with open(printed[0]["file"], encoding="utf-8") as file:
        found = json.load(file)["findings"]
    assert set(found) == {ROUTE_GRAD, GLU}
    for finding in found.values():
        assert sorted(finding["answer"][-1][1]) == ["cpu", "torch"]
        assert finding["rounds"] >= measuring.QUICK.least_rounds
        assert all(figure["ms"] > 0 for figure in finding["measured"].values())
