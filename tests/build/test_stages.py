"""tools/stages.py with real processes: limits, signals, exit codes, and what is written down."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stages
from stages import Stage, read_record, run_stages

TOOLS = Path(stages.__file__).parent
PATIENCE = 60  # seconds after which a test gives up on another process


def shell(name, script, **others):
    return Stage(name, ("sh", "-c", script), **others)


def ends(folder):
    """The end of every stage, by its name."""
    return {line["stage"]: line for line in read_record(folder) if line["event"] == stages.END}


def test_output_is_kept_and_shown_and_a_failure_costs_nothing(tmp_path, capfd):
    code = run_stages(
        [shell("one", "echo first; echo wrong >&2; exit 3"), shell("two", "echo second")], tmp_path
    )
    assert code == 1
    assert (tmp_path / "one.log").read_text().split() == ["first", "wrong"]
    assert {"first", "wrong", "second"} <= set(capfd.readouterr().out.split())
    found = ends(tmp_path)
    assert (found["one"]["exit"], found["one"]["failed"], found["one"]["cut_short"]) == (3, True, False)
    assert (found["two"]["exit"], found["two"]["failed"]) == (0, False)
    assert [line["event"] for line in read_record(tmp_path)] == ["begin", "end"] * 2


def test_all_is_well_with_codes_that_are_fine(tmp_path):
    assert run_stages([shell("none", "exit 5", fine=(0, 5)), shell("zero", "true")], tmp_path) == 0
    assert ends(tmp_path)["none"]["exit"] == 5


def test_standard_output_may_go_to_a_file_and_variables_are_set(tmp_path):
    stage = shell("report", "echo $WORD; echo note >&2", output="report.txt", environment={"WORD": "figures"})
    assert run_stages([stage], tmp_path) == 0
    assert (tmp_path / "report.txt").read_text() == "figures\n"
    assert (tmp_path / "report.log").read_text() == "note\n"


def test_a_missing_program_is_a_failure_of_its_stage(tmp_path):
    assert run_stages([Stage("absent", ("no-such-program",)), shell("next", "true")], tmp_path) == 1
    assert {name: end["exit"] for name, end in ends(tmp_path).items()} == {"absent": 127, "next": 0}
    assert "no-such-program" in (tmp_path / "absent.log").read_text()


@pytest.mark.slow
def test_sigint_at_the_limit_lets_a_stage_save(tmp_path):
    stage = shell("long", "trap 'echo saved; exit 7' INT; echo ready; sleep 600", seconds=2)
    assert run_stages([stage], tmp_path) == 1
    assert (tmp_path / "long.log").read_text().split() == ["ready", "saved"]
    end = ends(tmp_path)["long"]
    assert (end["exit"], end["cut_short"], end["failed"]) == (7, True, True)


@pytest.mark.slow
def test_a_stage_that_ignores_sigint_is_killed_with_its_children(tmp_path):
    script = f"trap '' INT; sleep 600 & echo $! > {tmp_path}/child; wait; sleep 600"
    assert run_stages([shell("deaf", script, seconds=2)], tmp_path, grace=0.5) == 1
    assert ends(tmp_path)["deaf"]["exit"] == -signal.SIGKILL
    assert gone(int((tmp_path / "child").read_text()))


@pytest.mark.slow
def test_what_a_stage_leaves_behind_ends_with_it(tmp_path):
    assert run_stages([shell("parent", f"sleep 600 & echo $! > {tmp_path}/child")], tmp_path) == 0
    assert gone(int((tmp_path / "child").read_text()))


def gone(process):
    """Whether a process has ended, as one does that its new parent has not yet asked about."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_with_too_little_time_left_a_stage_is_not_begun(tmp_path):
    planned = [
        shell("small", "true", least=1),
        shell("large", "true", least=1000),
        shell("last", "true", least=1),
    ]
    assert run_stages(planned, tmp_path, total=500, grace=10) == 0
    assert set(ends(tmp_path)) == {"small", "last"}
    (line,) = (line for line in read_record(tmp_path) if line["event"] == stages.NOT_BEGUN)
    assert line["stage"] == "large"
    assert "it needs 1000 s" in line["why"]


def test_the_limit_of_a_stage_is_within_the_total_less_the_grace(tmp_path):
    run_stages([shell("stage", "true", seconds=1000)], tmp_path, total=100, grace=30)
    begin = next(line for line in read_record(tmp_path) if line["event"] == stages.BEGIN)
    assert 0 < begin["limit"] <= 70


def test_a_stage_that_cannot_run_here_says_why(tmp_path):
    assert run_stages([shell("tool", "exit 1", why_not="ncu is not on PATH")], tmp_path) == 0
    (line,) = read_record(tmp_path)
    assert (line["event"], line["why"]) == (stages.NOT_BEGUN, "ncu is not on PATH")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_the_runner_stops_the_stage_and_begins_no_other(tmp_path, number):
    code = f"""
import sys, pathlib
sys.path.insert(0, {str(TOOLS)!r})
from stages import Stage, run_stages
long = Stage("long", ("sh", "-c", "trap 'echo saved; exit 7' INT; echo ready; sleep 600"))
sys.exit(run_stages([long, Stage("next", ("true",))], pathlib.Path({str(tmp_path)!r})))
"""
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    wait_for(lambda: "ready" in text(tmp_path / "long.log"))
    runner.send_signal(number)
    assert runner.wait(PATIENCE) == 130
    assert text(tmp_path / "long.log").split() == ["ready", "saved"]
    assert [line["event"] for line in read_record(tmp_path)] == [stages.BEGIN, stages.END, stages.NOT_BEGUN]
    assert ends(tmp_path)["long"]["cut_short"]


def text(file):
    return file.read_text() if file.exists() else ""


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_torn_lines_are_left_out_and_told(tmp_path, capsys):
    whole = json.dumps({"event": "begin", "stage": "one"})
    (tmp_path / stages.RECORD).write_text(f"{whole}\n{whole[:20]}")
    assert read_record(tmp_path) == [{"event": "begin", "stage": "one"}]
    (tmp_path / stages.RECORD).write_text(f"{whole[:20]}\n{whole}\n")
    capsys.readouterr()
    assert read_record(tmp_path) == [{"event": "begin", "stage": "one"}]
    assert "line 1 is torn, and left out" in capsys.readouterr().err
    (tmp_path / stages.RECORD).write_text(f"{whole}\n\n{whole}\n")
    assert len(read_record(tmp_path)) == 2
    assert capsys.readouterr().err == ""
    assert read_record(tmp_path / "nowhere") == []


def test_signals_are_as_before_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run_stages([shell("stage", "true")], tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
