"""Findings about this machine: where they are kept, which count, and what becomes of files that cannot be used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradroute.machine import answers, identity, records, verdicts
from gradroute.machine.records import CHECK, TUNING, Record

CPU = torch.device("cpu")
ORDERS = [[1000, ["torch", "cpu"]], [None, ["cpu", "torch"]]]
QUESTION = "backends/route_grad/float32"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADROUTE_CACHE", str(tmp_path))
    return tmp_path


def measured(question, answer):
    Record(TUNING, CPU).update({question: {"answer": answer}})
    answers.forget()


def test_the_folder_is_named_or_the_users_cache(monkeypatch, tmp_path):
    assert records.folder() == tmp_path
    monkeypatch.delenv("GRADROUTE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert records.folder() == Path("/somewhere/gradroute")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert records.folder() == Path("/home/somebody/.cache/gradroute")


def test_a_relative_folder_counts_from_the_working_directory_and_a_home_is_known(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    for named, found in {"here": tmp_path / "here", "~/there": Path("/home/somebody/there")}.items():
        monkeypatch.setenv("GRADROUTE_CACHE", named)
        assert records.folder() == found
    monkeypatch.delenv("GRADROUTE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert records.folder() == Path("/home/somebody/.cache/gradroute")


def test_what_is_written_is_read(cache):
    record = Record(CHECK, CPU)
    assert record.read() == {}
    record.update({"torch": {"passed": True}})
    record.update({"cpu": {"passed": False}, "torch": {"passed": False}})
    assert Record(CHECK, CPU).read() == {"torch": {"passed": False}, "cpu": {"passed": False}}
    assert Record(TUNING, CPU).read() == {}
    assert sorted(path.suffix for path in cache.glob("check/*")) == [".json", ".lock"]


def test_findings_of_another_version_or_processor_are_other_files(monkeypatch):
    here = Record(TUNING, CPU)
    here.update({"torch": 1})
    for changed in ({"torch": "2.99.0"}, {"device": "another processor"}, {"threads": 77}):
        with monkeypatch.context() as patch:
            of = identity.of
            patch.setattr(
                identity, "of", lambda *args, of=of, changed=changed, **kw: of(*args, **kw) | changed
            )
            there = Record(TUNING, CPU)
            assert there.file != here.file
            assert there.read() == {}


def test_threads_count_for_speed_alone():
    assert "threads" in Record(TUNING, CPU).machine
    assert "threads" not in Record(CHECK, CPU).machine


def test_a_file_under_this_machines_name_about_another_is_reported_and_ignored():
    record = Record(CHECK, CPU)
    record.update({"torch": 1})
    text = record.file.read_text(encoding="utf-8")
    record.file.write_text(text.replace(str(torch.__version__), "2.99.0"), encoding="utf-8")
    with pytest.warns(RuntimeWarning, match=r"ignored: ValueError: it is about .*2\.99\.0"):
        assert record.read() == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"machine": 1}', "\x00\x01", "[" * 100000, '{"machine": 1' + "0" * 5000 + "}"],
)
def test_a_corrupt_file_is_reported_ignored_and_replaced(text):
    record = Record(CHECK, CPU)
    record.file.parent.mkdir(parents=True)
    record.file.write_text(text, encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="is ignored: .*python -m gradroute check` writes it anew"):
        assert record.read() == {}
    with pytest.warns(RuntimeWarning, match="is ignored"):
        record.update({"torch": 1})
    assert record.read() == {"torch": 1}


@pytest.mark.parametrize("findings", [[["torch", {}]], [[1, 2]], [], "text", None, 3])
def test_findings_that_are_no_object_are_reported_and_ignored(findings):
    record = Record(TUNING, CPU)
    record.update({})
    record.file.write_text(json.dumps({"machine": record.machine, "findings": findings}), encoding="utf-8")
    with pytest.warns(
        RuntimeWarning, match="is ignored: TypeError: its findings are a .*, expected an object"
    ):
        assert answers.backends("route_grad", CPU, torch.float32) is None


def test_what_is_no_regular_file_is_not_read(cache):
    """A pipe would have every call wait for somebody who writes into it."""
    record = Record(CHECK, CPU)
    record.file.parent.mkdir(parents=True)
    os.mkfifo(record.file)
    with pytest.warns(RuntimeWarning, match="is ignored: ValueError: it is no regular file"):
        assert record.read() == {}


def test_two_processes_that_write_at_once_lose_nothing():
    code = (
        "import sys, torch\n"
        "from gradroute.machine.records import Record\n"
        "torch.set_num_threads(1)\n"
        "for number in range(40):\n"
        "    Record('check', torch.device('cpu')).update({f'{sys.argv[1]}-{number}': number})\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("one", "other")]
    assert [process.wait() for process in running] == [0, 0]
    assert len(Record(CHECK, CPU).read()) == 80


def test_an_unwritable_folder_is_an_error(monkeypatch, cache):
    (cache / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("GRADROUTE_CACHE", str(cache / "file"))
    assert Record(CHECK, CPU).read() == {}
    with pytest.raises(OSError, match="file"):
        Record(CHECK, CPU).update({"torch": 1})


def test_answers_are_read_once():
    measured(QUESTION, ORDERS)
    assert answers.backends("route_grad", CPU, torch.float32) == (
        (1000, ("torch", "cpu")),
        (None, ("cpu", "torch")),
    )
    assert answers.backends("route_grad", CPU, torch.bfloat16) is None
    Record(TUNING, CPU).file.unlink()
    assert answers.backends("route_grad", CPU, torch.float32) is not None
    answers.forget()
    assert answers.backends("route_grad", CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (QUESTION, []),
        (QUESTION, [[5, ["torch"]]]),
        (QUESTION, [[None, ["torch"]], [None, ["cpu"]]]),
        (QUESTION, [[7, ["torch"]], [5, ["cpu"]], [None, ["torch"]]]),
        (QUESTION, [[None, ["torch", "torch"]]]),
        (QUESTION, [[None, ["nobody"]]]),
        (QUESTION, 3),
        ("rectangles/mlp/float32", {"min_saving": -1, "min_tokens": 4}),
        ("rectangles/mlp/float32", {"min_saving": 0.5}),
        ("run/mlp/float32", 0),
        ("run/mlp/float32", True),
        ("vendors/float32", ["nobody"]),
        ("skip_below/float32", float("nan")),
        ("skip_below/float32", 10**400),
        ("run/mlp/float32", 10**400),
        ("tiles/float32", {"rows": 384}),
        ("weather/float32", 1),
        ("backends/nobody/float32", [[None, ["torch"]]]),
        ("backends/route_grad", [[None, ["torch"]]]),
        ("rectangles/attention/float32", {"min_saving": 0.5, "min_tokens": 4}),
        ("run/mlp/bfloat16", 512),  # runs of half precision would be rounded before they are summed
        ("vendors/int8", ["flash"]),
        ("skip_below/float32/more", 0.5),
        ("tiles/complex64", {"rows": 384, "keys": 512}),
    ],
)
def test_an_answer_of_another_form_is_reported_and_ignored(question, answer):
    measured("skip_below/bfloat16", 0.5)
    measured(question, answer)
    with pytest.warns(RuntimeWarning, match=f"answer to {question} in .* is ignored: .*tune` removes it"):
        assert answers.share_for_own(CPU, torch.bfloat16) == 0.5
    assert answers.answer(CPU, *question.split("/")) is None


def test_the_environment_says_whether_files_are_followed(monkeypatch):
    for said, follows in {"0": False, "1": True, "": True}.items():
        monkeypatch.setenv("GRADROUTE_TUNING", said)
        assert answers._from_environment() is follows
    monkeypatch.setenv("GRADROUTE_TUNING", "off")
    with pytest.raises(ValueError, match="got 'off', expected 0 "):
        answers._from_environment()


@pytest.mark.slow
def test_the_environment_has_files_ignored(monkeypatch):
    measured(QUESTION, ORDERS)
    code = (
        "import torch\nfrom gradroute.machine import answers\ntorch.set_num_threads(1)\n"
        "print(answers.backends('route_grad', torch.device('cpu'), torch.float32))"
    )
    for said, found in {"0": "None", "1": "((1000, ", "": "((1000, "}.items():
        monkeypatch.setenv("GRADROUTE_TUNING", said)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.startswith(found), done.stderr
    monkeypatch.setenv("GRADROUTE_TUNING", "off")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "GRADROUTE_TUNING: got 'off', expected 0 (ignore what was measured here) or 1" in done.stderr


def test_trying_replaces_what_was_measured():
    measured(QUESTION, ORDERS)
    with answers.trying(CPU, {"run/mlp/float32": 77}):
        assert answers.run("mlp", CPU, torch.float32) == 77
        assert answers.backends("route_grad", CPU, torch.float32) is None
    assert answers.run("mlp", CPU, torch.float32) is None
    assert answers.backends("route_grad", CPU, torch.float32) is not None


@pytest.mark.parametrize(
    "found",
    [
        3,
        {},
        [[1]],
        {"passed": False, "date": "", "failures": 7},
        {"passed": True, "date": "now", "failures": ["one"]},
        {"passed": 1, "date": "", "failures": []},
    ],
)
def test_a_verdict_of_another_form_is_reported_and_ignored(found):
    Record(CHECK, CPU).update({"cpu": found})
    with pytest.warns(
        RuntimeWarning, match="verdict on backend 'cpu' in .* is ignored: .*check` judges anew"
    ):
        assert verdicts.of(CPU) == {}


def test_meta_tensors_have_no_findings():
    assert verdicts.of(torch.device("meta")) == {}
    assert answers.backends("route_grad", torch.device("meta"), torch.float32) is None


def test_a_file_says_what_it_is_about():
    record = Record(TUNING, CPU)
    record.update({QUESTION: {"answer": ORDERS}})
    written = json.loads(record.file.read_text(encoding="utf-8"))
    assert written["machine"] == identity.of(CPU, with_threads=True)
    assert record.file.name.startswith(written["machine"]["device"][:3])
