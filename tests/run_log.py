"""A plugin of pytest that writes what becomes of every test at once, so that a kill loses nothing.

`PYTHONPATH=tests python -m pytest -p run_log --run-log FILE` appends one JSON object a line: one as a test begins,
with the outcome "began", and one as it ends, with its outcome, its seconds, its worker, and the error of one that
failed. With pytest-xdist the controller writes them, and a worker that dies is the outcome "crashed" of the test that
it ran. `--earlier FILE` leaves out the tests that passed there: the last line of a test counts. Several files are read
in order.
"""

import json
import re
import time
from pathlib import Path

import pytest

BEGAN, PASSED, FAILED, ERROR, SKIPPED, CRASHED = "began", "passed", "failed", "error", "skipped", "crashed"
XFAILED, XPASSED = "xfailed", "xpassed"
MOST_TEXT = 8000  # characters of a failure's text: its beginning and its end
GROUP = re.compile(r"@[^\]@:/]*$")
CRASH = "???"  # pytest-xdist's name for the phase in which a worker died


def pytest_addoption(parser):
    group = parser.getgroup("run log")
    group.addoption("--run-log", type=Path, help="append one JSON object a line as tests begin and end")
    group.addoption(
        "--earlier", type=Path, action="append", help="leave out the tests that passed in this log"
    )


def pytest_configure(config):
    for earlier in config.getoption("earlier") or ():
        if not earlier.is_file():
            raise pytest.UsageError(f"--earlier: got {earlier}, expected a file that --run-log wrote")
    file = config.getoption("run_log")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(RunLog(file), "run_log_writer")


def outcomes(files):
    """The last outcome of every test in logs; a line that a kill has torn does not count."""
    found = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            found[entry["test"]] = entry["outcome"]
    return found


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out what has passed in an earlier run."""
    earlier = outcomes(config.getoption("earlier") or ())
    dropped = [item for item in items if earlier.get(plain(item.nodeid)) == PASSED]
    if dropped:
        items[:] = [item for item in items if earlier.get(plain(item.nodeid)) != PASSED]
        config.hook.pytest_deselected(items=dropped)


def plain(nodeid):
    """The name of a test without the group that pytest-xdist's loadgroup appends: "test.py::test[3]@group"."""
    return GROUP.sub("", nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Gives a failing report the error's type, message and place, which travel with it from a worker."""
    report = (yield).get_result()
    if call.excinfo is not None and report.failed:
        report.cause = {
            "type": call.excinfo.typename,
            "message": str(call.excinfo.value)[:MOST_TEXT],
            **places(call.excinfo.traceback, item.config.rootpath),
        }


def places(traceback, root):
    """The last frame, and the last one in the project, in "frame" and "place"."""
    frames = [f"{relative(entry.path, root)}:{entry.lineno + 1} {entry.name}" for entry in traceback]
    own = [frame for frame in frames if not Path(frame.partition(":")[0]).is_absolute()]
    return {"frame": frames[-1] if frames else "", "place": own[-1] if own else ""}


def relative(path, root):
    """A path as seen from the root, where it is below it and not an installed package's."""
    try:
        inside = Path(path).relative_to(root)
    except ValueError:
        return str(path)
    return str(path) if "site-packages" in inside.parts else inside.as_posix()


class RunLog:
    """Writes a line as a test begins, and one as it ends."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        self.file = path.open("a", encoding="utf-8")
        if before and not before.endswith(b"\n"):  # a kill has torn the last line
            self.file.write("\n")
        self.phases = {}

    def pytest_runtest_logstart(self, nodeid, location):
        self.write({"test": plain(nodeid), "outcome": BEGAN})

    def pytest_runtest_logreport(self, report):
        if report.when == CRASH:
            self.phases.pop(report.nodeid, None)
            self.write(entry_of(report.nodeid, CRASHED, [report]))
            return
        phases = self.phases.setdefault(report.nodeid, [])
        phases.append(report)
        if report.when == "teardown":
            del self.phases[report.nodeid]
            self.write(entry_of(report.nodeid, outcome_of(phases), phases))

    def pytest_collectreport(self, report):
        """A file that cannot be collected is a line too: its tests are missing."""
        if report.failed:
            entry = {"test": report.nodeid, "outcome": ERROR, "seconds": 0.0, "worker": worker_of(report)}
            cause = {
                "type": "CollectionError",
                "message": last_line(report),
                "frame": "",
                "place": report.nodeid,
            }
            self.write(entry | {"phase": "collection", "cause": cause, "text": shortened(report)})

    def pytest_unconfigure(self, config):
        self.file.close()

    def write(self, entry):
        self.file.write(json.dumps(entry | {"at": round(time.time(), 1)}) + "\n")
        self.file.flush()


def outcome_of(phases):
    """The outcome of a test, from the reports of its phases."""
    for report in phases:
        if report.failed:
            return FAILED if report.when == "call" else ERROR
        if report.skipped:
            return XFAILED if hasattr(report, "wasxfail") else SKIPPED
    return XPASSED if any(hasattr(report, "wasxfail") for report in phases) else PASSED


def entry_of(nodeid, outcome, phases):
    """The line of a test that has ended."""
    entry = {
        "test": plain(nodeid),
        "outcome": outcome,
        "seconds": round(sum(report.duration for report in phases), 3),
        "worker": worker_of(phases[-1]),
    }
    failing = next((report for report in phases if report.failed), None)
    if failing is not None:
        entry |= {"phase": failing.when, "cause": getattr(failing, "cause", None), "text": shortened(failing)}
    elif outcome == SKIPPED:
        skipping = next(report for report in phases if report.skipped)
        entry["reason"] = (
            skipping.longrepr[-1] if isinstance(skipping.longrepr, tuple) else str(skipping.longrepr)
        )
    return entry


def worker_of(report):
    """The worker of pytest-xdist that ran a test; "" without one."""
    node = getattr(report, "node", None)
    return "" if node is None else node.gateway.id


def last_line(report):
    """The error of a file that cannot be collected: the last line of its text that says something."""
    return next((line for line in reversed(report.longreprtext.splitlines()) if line.strip()), "")


def shortened(report):
    """The text of a failure, less its middle where it is long."""
    text = report.longreprtext
    if len(text) <= MOST_TEXT:
        return text
    return f"{text[: MOST_TEXT // 4]}\n[...]\n{text[-3 * MOST_TEXT // 4 :]}"
