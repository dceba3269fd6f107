"""tools/gpu.py: the calls, what goes on with an earlier one, and what is refused; the stages themselves on the CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_profile
import pytest
import stages

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds after which a test gives up on another process
MACHINE = {"gpu": "NVIDIA H200", "torch": "2.11.0", "threads": 16, "plugins": ["xdist", "pytest_timeout"]}
INPUTS = dict.fromkeys((*gpu.FOLDERS, "commit"), "same")
WAITS = """
import pathlib
import time

def test_waits():
    if not pathlib.Path({!r}).exists():
        time.sleep(600)
"""
NOW = {"machine": MACHINE, "inputs": INPUTS}


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "out").mkdir()
    return gpu.Settings(tmp_path / "out", plugins=("xdist", "pytest_timeout"))


@pytest.fixture
def earlier(tmp_path):
    """A call on an H200 whose report is done and whose tests and figures were cut short."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    record = stages.Record(folder)
    record.add(stages.CALL, call="1", **NOW)
    record.add(stages.END, stage="report", exit=0, cut_short=False, failed=False)
    for name in ("tests", "bench"):
        record.add(stages.END, stage=name, exit=130, cut_short=True, failed=True)
    for name in ("report.json", "tests.jsonl", "h200.json", "h200.csv"):
        (folder / name).write_text(f"{name}\n")
    return folder


def go_on(names, settings, earlier, now=NOW):
    """The commands that are left of some stages, by their name."""
    makers = {make(settings).name: make for of_call in gpu.CALLS.values() for make in of_call}
    planned = [makers[name](settings) for name in names]
    record = stages.Record(settings.out)
    left = gpu.going_on(planned, settings, earlier, gpu.earlier_call(earlier, now["machine"]), now, record)
    return {stage.name: " ".join(stage.command) for stage in left}


def events(folder, event):
    return {line["stage"] for line in stages.read_record(folder) if line["event"] == event}


@pytest.mark.parametrize("call", ["1", "2", "3"])
def test_the_first_stages_of_a_call_fit_in_it(settings, call):
    """Time left over goes to the last ones; a stage is only begun with time for itself."""
    planned = [make(settings) for make in gpu.CALLS[call]]
    assert all(stage.seconds <= gpu.TOTAL - stages.GRACE for stage in planned)
    assert gpu.TOTAL <= 8.5 * 60
    names = [stage.name for stage in planned]
    assert len(set(names)) == len(names)


def test_all_calls_together_are_everything():
    of_calls = {make for call in ("1", "2", "3") for make in gpu.CALLS[call]}
    assert of_calls - set(gpu.CALLS["all"]) == {gpu.again, gpu.check, gpu.short_bench}
    assert set(gpu.CALLS["all"]) <= of_calls


def test_tests_run_side_by_side_and_those_of_memory_alone(settings):
    together, alone = gpu.tests(settings).command, gpu.memory(settings).command
    assert together[together.index("-n") + 1] == "14"
    assert alone[alone.index("-n") + 1] == "0"
    assert "(gpu) and not memory" in together
    assert "(gpu) and memory" in alone
    assert together[together.index("--timeout-method") + 1] == "thread"
    plain = gpu.tests(gpu.Settings(settings.out)).command
    assert "-n" not in plain
    assert "--timeout" not in plain


def test_a_call_goes_on_where_an_earlier_one_was_cut_short(settings, earlier):
    left = go_on(["install", "report", "tests", "bench"], settings, earlier)
    assert set(left) == {"install", "tests", "bench"}
    assert f"--earlier {settings.out / 'tests.jsonl'}" in left["tests"]
    assert (settings.out / "tests.jsonl").read_text() == "tests.jsonl\n"
    assert (settings.out / "report.json").read_text() == "report.json\n"
    assert (settings.out / "h200.json").exists()
    assert events(settings.out, stages.KEPT) == {"report"}


def test_what_tuning_has_answered_is_taken_along(settings, earlier):
    (earlier / "tune-findings").mkdir()
    (earlier / "tune-findings" / "answers.json").write_text("answers")
    assert set(go_on(["tune"], settings, earlier)) == {"tune"}
    assert (settings.out / "tune-findings" / "answers.json").read_text() == "answers"
    assert gpu.tune(settings).environment["GRADROUTE_CACHE"] == str(settings.out / "tune-findings")
    assert (
        gpu.check(settings).environment["GRADROUTE_CACHE"]
        != gpu.tune(settings).environment["GRADROUTE_CACHE"]
    )


def test_what_was_taken_from_a_call_counts_in_the_next(settings, earlier):
    stages.Record(earlier).add(stages.KEPT, stage="check", earlier="before")
    assert gpu.ended_well(earlier) == {"report", "check"}


@pytest.mark.parametrize(
    ("changed", "anew"),
    [
        ("csrc", {"report", "tests", "bench"}),
        ("tests", {"tests"}),
        ("commit", {"bench"}),
        ("examples", {"bench"}),
    ],
)
def test_changed_sources_are_not_mixed_with_earlier_findings(settings, earlier, changed, anew):
    left = go_on(
        ["report", "tests", "bench"], settings, earlier, NOW | {"inputs": INPUTS | {changed: "other"}}
    )
    assert events(settings.out, stages.ANEW) == anew
    assert set(left) >= anew
    assert ("--earlier" in left["tests"]) == ("tests" not in anew)
    assert (settings.out / "h200.json").exists() == ("bench" not in anew)
    reasons = [line["why"] for line in stages.read_record(settings.out) if line["event"] == stages.ANEW]
    assert all(changed in why for why in reasons)


def test_other_packages_are_not_mixed_either(settings, earlier):
    go_on(["report", "tests"], settings, earlier, NOW | {"machine": MACHINE | {"torch": "2.13.0"}})
    (why, *_) = [line["why"] for line in stages.read_record(settings.out) if line["event"] == stages.ANEW]
    assert why == "torch was 2.11.0, is 2.13.0"


def test_what_failed_runs_again_with_changed_sources(settings, earlier):
    (earlier / gpu.BEFORE).write_text("before\n")
    (earlier / "again.jsonl").write_text("again\n")
    left = go_on(["again"], settings, earlier, NOW | {"inputs": INPUTS | {"kernels": "other"}})
    assert f"--earlier {settings.out / gpu.BEFORE}" in left["again"]
    assert (settings.out / gpu.BEFORE).read_text().split() == ["before", "tests.jsonl", "again"]
    assert gpu.again(settings).why_not


def test_another_card_is_refused(earlier):
    with pytest.raises(gpu.Refused, match="NVIDIA H200, and this is NVIDIA H100"):
        gpu.earlier_call(earlier, MACHINE | {"gpu": "NVIDIA H100"})


def test_folders_that_would_be_mixed_or_say_nothing_are_refused(tmp_path, earlier):
    with pytest.raises(gpu.Refused, match="has a call already"):
        gpu.check_folders(earlier, None)
    with pytest.raises(gpu.Refused, match=r"which has no stages\.jsonl"):
        gpu.check_folders(tmp_path / "new", tmp_path)
    gpu.check_folders(tmp_path / "new", earlier)


def test_a_machine_without_a_device_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "probe", lambda: MACHINE | {"gpu": None})
    assert gpu.main(["1", "--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert gpu.main(["1", "--rehearse", "--only", "nothing", "--out", str(tmp_path / "out")]) == 2
    assert "only: got nothing" in capsys.readouterr().err


def test_the_cases_that_missed_a_target_are_profiled():
    def case(*verdicts):
        return {"limits": [{"verdict": verdict} for verdict in verdicts]}

    cases = {"a": case("reached", "MISSED"), "b": case("reached"), "c": case("MISSED"), "d": case()}
    assert gpu_profile.missed({"cases": cases}) == ["a", "c"]
    command = gpu_profile.command(Path("out"), "h200", (), 1, "a")
    assert command[0] == "ncu"
    assert command[command.index("--case") + 1] == "a"


LISTS = """
import pathlib
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    names = sorted({item.nodeid.partition("::")[0] for item in items if "gpu" in item.keywords})
    pathlib.Path(NAMES).write_text("\\n".join(names))
"""


@pytest.mark.slow
def test_every_file_with_a_test_for_a_device_is_collected_there(tmp_path):
    (tmp_path / "lists.py").write_text(LISTS.replace("NAMES", repr(str(tmp_path / "names"))))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "lists",
        "-p",
        "no:cacheprovider",
    ]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, stdout=subprocess.DEVNULL
    )
    names = (tmp_path / "names").read_text().split()
    assert "tests/ops/test_ops.py" in names
    assert set(names) <= set(gpu.files_for_a_device())


@pytest.mark.slow
def test_a_rehearsal_that_is_killed_goes_on(tmp_path):
    """Real stages on the CPU: tests, one of which waits to be killed, and the benchmark in small."""
    (tmp_path / "test_first.py").write_text("def test_first():\n    pass\n")
    (tmp_path / "test_waits.py").write_text(WAITS.format(str(tmp_path / "go")))
    case = "linear --tokens 8 --d-model 8 --d-ff 8 --rounds 2 --device cpu"
    common = [sys.executable, "tools/gpu.py", "1", "--rehearse", "--workers", "0", "--marker", "not gpu"]
    common += ["--only", "tests", "short-bench", "--bench", case, "--tests", str(tmp_path)]
    one, two = tmp_path / "one", tmp_path / "two"
    first = subprocess.Popen([*common, "--out", str(one)], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not (one / "tests.jsonl").exists() or "test_waits" not in (one / "tests.jsonl").read_text():
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.1)
    first.terminate()
    assert first.wait(PATIENCE) == stages.INTERRUPTED
    assert events(one, stages.NOT_BEGUN) == {"short-bench"}
    (tmp_path / "go").touch()
    second = [*common, "--out", str(two), "--earlier", str(one)]
    done = subprocess.run(second, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (two / "tests.jsonl").read_text().splitlines()]
    passed = [line["test"] for line in lines if line["outcome"] == "passed"]
    assert [name.rpartition("::")[2] for name in passed] == ["test_first", "test_waits"]
    assert "1 passed, 1 deselected" in (two / "tests.log").read_text()
    assert json.loads((two / "short" / "linear.json").read_text())["cases"]
