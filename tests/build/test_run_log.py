"""tests/run_log.py: what it writes of every kind of end, with and without pytest-xdist, and what it leaves out."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_log

TESTS = Path(run_log.__file__).parent
PATIENCE = 120  # seconds after which a test gives up on another process

KINDS = """
import os
import pytest

@pytest.mark.parametrize("i", range(2))
def test_passes(i):
    pass

@pytest.mark.xdist_group("group")
def test_in_a_group():
    pass

def test_fails():
    helper()

def helper():
    raise ValueError("got 12")

@pytest.fixture
def broken():
    raise RuntimeError("no device")

def test_has_an_error(broken):
    pass

def test_is_skipped():
    pytest.skip("no package")

@pytest.mark.xfail
def test_fails_as_expected():
    assert False

def test_ends_its_worker():
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(3)
"""
HANGS = """
import time

def test_passes():
    pass

def test_hangs():
    time.sleep(600)
"""


def command(folder, *arguments):
    """pytest with the plugin and nothing of this project, in a folder."""
    plugin = ("-p", "run_log", "--run-log", str(folder / "log.jsonl"))
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
        *plugin,
        *arguments,
    ]


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | {"PYTHONPATH": str(TESTS)}


def run(folder, *arguments):
    done = subprocess.run(
        command(folder, *arguments), capture_output=True, text=True, env=environment(), cwd=folder
    )
    assert "INTERNALERROR" not in done.stdout, done.stdout
    return done


def ended(folder):
    """The last line of every test in the log, by its name without the file."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {entry["test"].partition("::")[2]: entry for entry in entries}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_end_is_written(tmp_path, workers):
    (tmp_path / "test_kinds.py").write_text(KINDS)
    run(tmp_path, *(("-n", str(workers), "--dist", "worksteal") if workers else ()), "test_kinds.py")
    found = ended(tmp_path)
    assert {name: entry["outcome"] for name, entry in found.items()} == {
        "test_passes[0]": "passed",
        "test_passes[1]": "passed",
        "test_in_a_group": "passed",
        "test_fails": "failed",
        "test_has_an_error": "error",
        "test_is_skipped": "skipped",
        "test_fails_as_expected": "xfailed",
        "test_ends_its_worker": "crashed" if workers else "passed",
    }
    assert found["test_fails"]["cause"]["type"] == "ValueError"
    assert found["test_fails"]["cause"]["message"] == "got 12"
    assert found["test_fails"]["cause"]["place"].endswith("helper")
    assert "def helper" in found["test_fails"]["text"]
    assert found["test_has_an_error"]["phase"] == "setup"
    assert "no package" in found["test_is_skipped"]["reason"]
    assert found["test_passes[0]"]["worker"].startswith("gw" if workers else "")
    assert all(entry["seconds"] >= 0 for entry in found.values())
    if workers:
        assert "crashed while running" in found["test_ends_its_worker"]["text"]


@pytest.mark.slow
def test_a_kill_loses_nothing(tmp_path):
    (tmp_path / "test_hangs.py").write_text(HANGS)
    process = subprocess.Popen(
        command(tmp_path, "test_hangs.py"), stdout=subprocess.DEVNULL, env=environment(), cwd=tmp_path
    )
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "log.jsonl").exists() or "test_hangs" not in (tmp_path / "log.jsonl").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait(PATIENCE)
    found = ended(tmp_path)
    assert found["test_passes"]["outcome"] == "passed"
    assert found["test_hangs"]["outcome"] == "began"


@pytest.mark.slow
def test_what_passed_earlier_is_left_out(tmp_path):
    (tmp_path / "test_kinds.py").write_text(KINDS)
    run(tmp_path, "-n", "2", "--dist", "loadgroup", "-k", "passes or group or fails", "test_kinds.py")
    earlier = tmp_path / "earlier.jsonl"
    (tmp_path / "log.jsonl").rename(earlier)
    with open(earlier, "a") as file:
        file.write('{"test": "test_kinds.py::test_fa')  # torn by a kill
    done = run(tmp_path, "--earlier", str(earlier), "-k", "passes or group or fails", "test_kinds.py")
    assert set(ended(tmp_path)) == {"test_fails", "test_fails_as_expected"}
    assert done.returncode == 1
    done = run(tmp_path, "--earlier", str(tmp_path / "none.jsonl"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "none.jsonl" in done.stderr


def test_names_are_without_the_group_of_xdist():
    assert run_log.plain("tests/test_a.py::test_b@group") == "tests/test_a.py::test_b"
    assert run_log.plain("tests/test_a.py::test_b[c@d]@memory") == "tests/test_a.py::test_b[c@d]"
    for same in ("tests/test_a.py::test_b[c@d]", "tests/test_a.py::TestB::test_c", "a@b/test_a.py::test_b"):
        assert run_log.plain(same) == same


def test_the_last_line_of_a_test_counts(tmp_path):
    log, later = tmp_path / "log.jsonl", tmp_path / "later.jsonl"
    log.write_text('{"test": "a", "outcome": "failed"}\n{"test": "b", "outcome": "passed"}\n')
    later.write_text(
        '{"test": "a", "outcome": "began"}\n{"test": "a", "outcome": "passed"}\n{"test": "b", "outco'
    )
    assert run_log.outcomes([log]) == {"a": "failed", "b": "passed"}
    assert run_log.outcomes([log, later]) == {"a": "passed", "b": "passed"}


def test_a_long_text_loses_its_middle():
    assert run_log.shortened(SimpleNamespace(longreprtext="short")) == "short"
    text = run_log.shortened(SimpleNamespace(longreprtext="begin" + "x" * 10**5 + "end"))
    assert len(text) <= run_log.MOST_TEXT + 10
    assert text.startswith("begin")
    assert text.endswith("end")


def test_a_log_that_a_kill_has_torn_goes_on_in_a_new_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"test": "a", "outco')
    writer = run_log.RunLog(log)
    writer.pytest_runtest_logstart("b", None)
    writer.pytest_unconfigure(None)
    assert run_log.outcomes([log]) == {"b": "began"}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_that_cannot_be_collected_is_a_line(tmp_path, workers):
    (tmp_path / "test_good.py").write_text("def test_good():\n    assert True\n")
    (tmp_path / "test_lost.py").write_text("import a_module_that_nobody_has\n")
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "run_log", "--run-log", str(log), "-n", workers]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    (lost,) = [entry for entry in entries if entry["outcome"] == "error"]
    assert lost["test"].endswith("test_lost.py")
    assert "a_module_that_nobody_has" in lost["cause"]["message"]
    assert [entry["outcome"] for entry in entries if "test_good" in entry["test"]] == ["began", "passed"]
