"""`python -m gradroute check` as a command: verdicts, the automatic choice after them, processes that end or hang."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import broken_kernels
import pytest
import torch

from gradroute import backends
from gradroute.__main__ import main
from gradroute.backends import composed, native
from gradroute.machine import progress
from gradroute.machine.check import command, judging, workers
from gradroute.machine.check.cases import Case, Selection
from gradroute.machine.check.findings import Findings
from gradroute.machine.check.judging import RIGHT, UNCHECKED, WRONG, Outcome, judged
from gradroute.machine.check.keeping import MOST_LINES, Run, verdict
from gradroute.machine.check.trials import CallTrial
from gradroute.machine.check.workers import LostProcesses, Plan, outcomes
from gradroute.machine.records import CHECK, Record

CPU = torch.device("cpu")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NARROW = ("check", "--backend", "torch", "--op", "route_grad", "--quick")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADROUTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def in_process(monkeypatch):
    """Cases are run here instead of in processes of their own, of one op."""

    def run(cases, plan):
        for case in cases:
            yield case, judged(case, plan.backend, plan.device, plan.seed)

    monkeypatch.setattr(command, "outcomes", run)
    monkeypatch.setattr(backends, "OPS", {"route_grad": ("cpu", "torch", "reference")})


def kept(backend="torch"):
    return Record(CHECK, CPU).read().get(backend)


def check(*arguments):
    return main(["check", "--device", "cpu", *arguments])


def test_a_right_backend_passes(in_process, capsys):
    assert check("--backend", "torch", "--quick") == 0
    said = capsys.readouterr()
    assert "torch on cpu: passed (" in said.out
    assert "route_grad  ok 29" in said.out
    assert "torch on cpu: 100%" in said.err or "torch on cpu: " in said.err
    assert kept()["passed"] is True
    assert kept()["failures"] == []


@pytest.mark.skipif(native.module is None, reason="the native module was not built")
def test_a_wrong_backend_is_left_out_until_a_check_passes(in_process, monkeypatch, capsys):
    x = torch.randn(3, 4)
    assert backends.choose("route_grad", None, x) == "cpu"
    with monkeypatch.context() as patch:
        patch.setattr(native, "masked_product", broken_kernels.wrong_in_bfloat16)
        assert check("--backend", "cpu", "--quick") == 1
    said = capsys.readouterr().out
    assert "WRONG numbers of route_grad in bfloat16 (variant={}, tokens=37): route_grad: dx: maximum" in said
    assert (
        "repeat it by `python -m gradroute check --device cpu --backend cpu --op route_grad --dtype" in said
    )
    assert (
        "left out of the automatic choice until these pass: `python -m gradroute check --device cpu" in said
    )
    with pytest.warns(RuntimeWarning, match="backend 'cpu' on cpu: .*numbers of route_grad in bfloat16"):
        assert backends.choose("route_grad", None, x) == "torch"
    assert check("--backend", "cpu", "--quick", "--op", "route_grad") == 0  # a part clears nothing
    said = capsys.readouterr().out
    assert "none wrong; it is left out of the automatic choice until these pass" in said
    with pytest.warns(RuntimeWarning, match="found it wrong"):
        assert backends.choose("route_grad", None, x) == "torch"
    assert check("--backend", "cpu", "--quick") == 0
    assert backends.choose("route_grad", None, x) == "cpu"


def test_a_narrowed_run_that_fails_counts_and_one_that_passes_does_not(in_process, monkeypatch, capsys):
    assert check(*NARROW[1:]) == 0
    assert kept() is None
    assert "this was not the whole check, so that it changes no verdict" in capsys.readouterr().out
    assert check("--backend", "torch", "--quick") == 0
    with monkeypatch.context() as patch:
        patch.setattr(composed, "masked_product", broken_kernels.forgets_the_mask)
        assert check(*NARROW[1:]) == 1
    assert kept()["passed"] is False


def test_json_says_everything(in_process, monkeypatch, capsys):
    monkeypatch.setattr(composed, "masked_product", broken_kernels.forgets_the_mask)
    assert check("--json", "--quick", "--backend", "torch", "--backend", "reference", "--seed", "3") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["right"] is False
    wrong, right = sorted(found["checks"], key=lambda one: one["verdict"]["passed"])
    assert (wrong["backend"], right["backend"]) == ("torch", "reference")
    assert right["failures"] == []
    assert right["checked"] == right["of"] > 0
    failure = wrong["failures"][0]
    assert failure["op"] == "route_grad"
    assert failure["text"].startswith("route_grad: dx: maximum error")
    assert failure["repeat"] == (
        f"python -m gradroute check --device cpu --backend torch --op route_grad --dtype {failure['dtype']} "
        f"--kind {failure['kind']} --quick --seed 3"
    )
    assert wrong["machine"]["torch"] == torch.__version__
    assert Path(wrong["file"]).exists()


def test_what_a_failure_says_repeats_it(in_process, monkeypatch, capsys):
    monkeypatch.setattr(composed, "masked_product", broken_kernels.wrong_in_bfloat16)
    check("--backend", "torch", "--quick", "--json")
    failure = json.loads(capsys.readouterr().out)["checks"][0]["failures"][0]
    assert main([*failure["repeat"].split()[3:], "--json"]) == 1
    again = json.loads(capsys.readouterr().out)["checks"][0]["failures"]
    assert failure in again
    assert {one["dtype"] for one in again} == {"bfloat16"}


def test_ctrl_c_keeps_what_was_found(monkeypatch, capsys):
    monkeypatch.setattr(backends, "OPS", {"route_grad": ("torch", "reference")})

    def interrupted(cases, plan):
        yield cases[0], Outcome(WRONG, "it is wrong") if plan.backend == "torch" else Outcome(RIGHT)
        if plan.backend == "torch":
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "outcomes", interrupted)
    assert check("--quick") == 130
    said = capsys.readouterr().out
    assert "1 WRONG; interrupted; it is left out of the automatic choice" in said
    assert kept()["passed"] is False


def test_ctrl_c_before_anything_was_wrong_changes_no_verdict(monkeypatch, capsys):
    def interrupted(cases, plan):
        yield cases[0], Outcome(RIGHT)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "outcomes", interrupted)
    assert check("--quick", "--backend", "torch") == 130
    assert kept() is None
    assert "1 of " in capsys.readouterr().out


def test_lost_processes_are_no_verdict_of_being_right(monkeypatch, capsys):
    def lost(cases, plan):
        yield cases[0], Outcome(RIGHT)
        raise LostProcesses("a process did not begin: the process ended with exit code 1")

    monkeypatch.setattr(command, "outcomes", lost)
    assert check("--quick", "--backend", "torch") == 1
    assert kept() is None
    assert "a process did not begin" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "passes"), [("strides", True), ("numbers", False)])
def test_only_far_rows_may_stay_unchecked(kind, passes, monkeypatch, capsys):
    def unchecked(cases, plan):
        for case in cases:
            yield case, Outcome(UNCHECKED, "too large") if case.kind == kind else Outcome(RIGHT)

    monkeypatch.setattr(command, "outcomes", unchecked)
    assert check("--quick", "--backend", "torch") == (0 if passes else 1)
    assert bool(kept()) == passes
    assert f"not checked: {kind} of route_grad in " in capsys.readouterr().out
    if passes:
        assert any("too large" in line for line in kept()["unchecked"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--backend", "nobody"], "invalid choice: 'nobody'"),
        (["--op", "routed_weather"], "invalid choice: 'routed_weather'"),
        (["--device", "cuda:77"], "device: got 'cuda:77', expected one that is there: cpu"),
        (["--limit", "0"], "limit: got 0.0, expected a number of seconds above 0"),
        (["--seed", "-1"], "seed: got -1, expected 0 to 4294967295"),
        (["--seed", str(2**63)], f"seed: got {2**63}, expected 0 to 4294967295"),
        (["--limit", "nan"], "limit: got nan, expected a number of seconds above 0"),
        (["--processes", "0"], "processes: got 0, expected 1 or more"),
        (["--device", "cpu", "--backend", "cuda"], "there is nothing to check: cuda on cpu: "),
        (
            ["--backend", "reference", "--op", "adamw_step"],
            "there is nothing to check: no backend has such a case",
        ),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_runs(arguments, error, capsys, cache):
    with pytest.raises(SystemExit) as stopped:
        main(["check", *arguments])
    assert stopped.value.code == 2
    assert error in capsys.readouterr().err
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADROUTE_CACHE", str(tmp_path / "file"))
    with pytest.raises(SystemExit):
        check("--quick")
    assert "file" in capsys.readouterr().err


def test_a_corrupt_file_is_said_and_written_anew(in_process, capsys):
    record = Record(CHECK, CPU)
    record.update({})
    record.file.write_text("{")
    with pytest.warns(RuntimeWarning, match="is ignored: .*check` writes it anew"):
        assert check("--backend", "torch", "--quick") == 0
    assert kept()["passed"] is True


def run_of(seed=0, quick=False, is_whole=True, failures=()):
    return Run(seed, quick, is_whole, tuple(failures), (), "2026-01-02T03:04:05")


def test_a_verdict_falls_by_a_run_that_checks_no_less():
    wrong = verdict(None, run_of(failures=["a"]))
    assert (wrong["passed"], wrong["failures"]) == (False, ["a"])
    assert verdict(wrong, run_of(quick=True))["passed"] is False
    assert verdict(wrong, run_of(seed=7))["passed"] is False
    assert verdict(wrong, run_of(is_whole=False)) is None
    assert verdict(wrong, run_of())["passed"] is True
    by_quick = verdict(None, run_of(quick=True, failures=["a"]))
    assert verdict(by_quick, run_of(quick=True))["passed"] is True
    assert verdict(by_quick, run_of())["passed"] is True


def test_what_stands_against_a_backend_adds_up():
    found = verdict(None, run_of(failures=["a"]))
    found = verdict(found, run_of(seed=7, quick=True, failures=["b"]))
    found = verdict(found, run_of(is_whole=False, failures=["c", "a"]))
    assert set(found["failures"]) == {"a", "b", "c"}
    found = verdict(found, run_of())
    assert (found["passed"], found["failures"]) == (False, ["b"])
    assert verdict(found, run_of(seed=7))["passed"] is True


@pytest.mark.parametrize(
    "before", [3, {}, {"passed": False, "failures": ["x"], "date": "now"}, {"passed": True}]
)
def test_a_verdict_of_another_form_is_replaced(before):
    assert verdict(before, run_of())["passed"] is True
    assert verdict(before, run_of(quick=True))["passed"] is (
        before != {"passed": False, "failures": ["x"], "date": "now"}
    )


def test_many_failures_are_counted():
    lines = verdict(None, run_of(failures=[str(number) for number in range(100)]))["failures"]
    assert len(lines) == MOST_LINES + 1
    assert lines[-1] == "and 80 more"


def test_a_bar_is_shown_on_a_terminal_alone(monkeypatch, capsys):
    one = progress.Progress(30, "check", "torch on cpu", lines=10)
    for _ in range(30):
        one.step()
    one.close()
    assert capsys.readouterr().err.splitlines() == [f"torch on cpu: {3 * n} of 30" for n in range(1, 11)]
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress.Progress(30, "check", "torch on cpu")
    bar.step()
    bar.close()
    assert "torch on cpu" in capsys.readouterr().err


def test_the_command_that_repeats_says_only_what_differs():
    plan = Plan("torch", CPU, 0, 1, 1.0)
    assert (
        Findings(plan, Selection(), 0).command() == "python -m gradroute check --device cpu --backend torch"
    )
    case = Case("bounds", "route_grad", "float16", {})
    assert (
        Findings(plan, Selection(True, 5), 0)
        .command(case)
        .endswith("--op route_grad --dtype float16 --kind bounds --quick --seed 5")
    )


@pytest.fixture
def breaking(monkeypatch, tmp_path):
    """Has every new process of Python put a kernel of broken_kernels in the place of backend torch's."""

    def put(name):
        (tmp_path / "sitecustomize.py").write_text(
            f"import broken_kernels\nfrom gradroute.backends import composed\n"
            f"composed.masked_product = broken_kernels.{name}\n"
        )
        paths = [str(tmp_path), str(HERE), str(ROOT)]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    return put


DTYPES = ("float32", "float16", "bfloat16")


def run_cases(limit=60.0, processes=1):
    cases = [Case("numbers", "route_grad", dtype, {"tokens": 5}) for dtype in DTYPES]
    return {case.dtype: outcome for case, outcome in outcomes(cases, Plan("torch", CPU, 0, processes, limit))}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1e300, float("inf")])
def test_a_limit_may_be_of_any_length(limit):
    assert {outcome.state for outcome in run_cases(limit=limit).values()} == {RIGHT}


def test_a_fault_of_the_check_is_no_verdict_on_the_backend(in_process, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("a sample cannot be drawn")

    monkeypatch.setattr(judging, "made", fails)
    assert check("--quick", "--backend", "torch") == 1
    assert kept() is None
    said = capsys.readouterr().out
    assert "not made" in said
    assert "WRONG" not in said
    assert "the check could not make the call: RuntimeError: a sample cannot be drawn" in said


@pytest.mark.parametrize("kind", ["numbers", "strides"])
def test_a_fault_of_the_check_leaves_a_run_unfinished_in_every_kind(kind, in_process, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no exact values")

    monkeypatch.setattr(CallTrial, "expected", fails)
    assert check("--quick", "--backend", "torch", "--kind", kind) == 1
    assert kept() is None
    assert (
        "could not make what the result has to be: RuntimeError: no exact values" in capsys.readouterr().out
    )


def test_the_largest_seed_is_one_that_samples_take(in_process):
    assert check("--quick", "--backend", "torch", "--seed", str(command.LARGEST_SEED)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_kernel_that_ends_its_process_is_found_and_the_rest_is_checked(breaking, processes):
    breaking("crashes_in_float16")
    found = run_cases(processes=processes)
    assert found["float16"] == Outcome(WRONG, "the process died with signal 11 (SIGSEGV)")
    assert (found["float32"].state, found["bfloat16"].state) == (RIGHT, RIGHT)


@pytest.mark.slow
def test_a_process_that_somebody_else_killed_says_nothing_about_a_kernel(breaking):
    """The system kills a process where memory is short."""
    breaking("is_killed_in_float16")
    assert run_cases()["float16"] == Outcome(UNCHECKED, "the process died with signal 9 (SIGKILL)")


@pytest.mark.slow
def test_a_kernel_that_hangs_is_found_and_the_rest_is_checked(breaking, monkeypatch):
    """Only the case that hangs has a limit that counts: on a busy machine a right one may take many seconds."""
    breaking("hangs_in_float16")
    give = workers._Worker.give

    def give_with_a_limit(worker, case):
        worker.limit = 2.0 if case.dtype == "float16" else 300.0
        give(worker, case)

    monkeypatch.setattr(workers._Worker, "give", give_with_a_limit)
    started = time.monotonic()
    found = run_cases()
    assert found["float16"] == Outcome(WRONG, "the process did not come back within 2 seconds")
    assert (found["float32"].state, found["bfloat16"].state) == (RIGHT, RIGHT)
    assert time.monotonic() - started > 2


@pytest.mark.slow
def test_a_device_that_fails_is_left_and_another_process_goes_on(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "from gradroute.machine.check import judging\n"
        "def synchronize(device, number=iter(range(9))):\n"
        "    if next(number):\n"
        "        raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "judging.synchronize = synchronize\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    found = run_cases()
    assert {dtype: outcome.state for dtype, outcome in found.items()} == dict.fromkeys(DTYPES, RIGHT)


@pytest.mark.slow
def test_a_process_that_does_not_begin_is_no_verdict(monkeypatch, tmp_path):
    (tmp_path / "gradroute").mkdir()
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        LostProcesses,
        match=r"did not begin: the process ended with exit code 3 .*under `if __name__ == '__main__':`",
    ):
        run_cases()


@pytest.mark.slow
def test_too_many_lost_processes_end_a_check(breaking, monkeypatch):
    breaking("crashes_in_float16")
    monkeypatch.setattr(workers, "MOST_LOST", 1)
    with pytest.raises(LostProcesses, match="1 processes were lost"):
        run_cases()


@pytest.mark.slow
def test_the_command_as_a_user_runs_it(breaking, cache):
    """Broken it fails and says how to go on; mended it passes; what it wrote is read by another process."""
    command = [sys.executable, "-m", "gradroute", *NARROW, "--device", "cpu", "--kind", "numbers"]
    breaking("crashes_in_float16")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert "the process died with signal 11 (SIGSEGV)" in done.stdout
    assert kept()["passed"] is False
    breaking("right")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert kept()["passed"] is False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_jobs(breaking, number):
    """The signal goes to the command and to its processes: the command ends them, and nothing is kept as wrong."""
    breaking("right")
    running = subprocess.Popen(
        [sys.executable, "-m", "gradroute", "check", "--device", "cpu", "--backend", "torch"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            number, signal.SIG_DFL
        ),  # shells ignore some for what is in the background
    )
    assert running.stderr.readline().startswith("torch on cpu: ")  # a tenth of it has ended
    os.killpg(running.pid, number)
    said, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "interrupted" in said
    assert "Traceback" not in errors
    assert kept() is None


@pytest.mark.slow
def test_two_checks_at_once_lose_nothing(monkeypatch):
    commands = [
        [sys.executable, "-m", "gradroute", "check", "--quick", "--device", "cpu", "--backend", name]
        for name in ("torch", "reference")
    ]
    running = [subprocess.Popen(one, cwd=ROOT, stdout=subprocess.DEVNULL) for one in commands]
    assert [process.wait() for process in running] == [0, 0]
    found = Record(CHECK, CPU).read()
    assert {name: one["passed"] for name, one in found.items()} == {"torch": True, "reference": True}
