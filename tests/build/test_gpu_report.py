"""tools/gpu_report.py on made-up folders: causes, stages, and the results that it copies."""

import json

import gpu_report
import pytest
import stages
from bench_runs import GPU, README, add_case, limit, make_run, mlp_axes

MACHINE = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"}
CALL = {"call": "1", "machine": MACHINE, "commit": None, "clean": None, "without_commit": "no git"}


@pytest.fixture
def folder(tmp_path):
    return folder_of(tmp_path / "one")


def folder_of(folder, **changed):
    folder.mkdir()
    stages.Record(folder).add(stages.CALL, **CALL | changed)
    return folder


def add_tests(folder, *entries, name="tests"):
    with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"seconds": 0.1} | entry) + "\n" for entry in entries)


def failure(test, message, place="kernels/linear.py:12 launch", kind="RuntimeError"):
    cause = {"type": kind, "message": message, "place": place, "frame": "torch/x.py:1 f"}
    return {"test": test, "outcome": "failed", "cause": cause, "text": f"text of {test}"}


def report(*folders):
    return "\n".join(gpu_report.report(folders))


def test_failures_are_grouped_by_type_message_and_place(folder):
    add_tests(
        folder,
        failure("test_a", "got 71216 bytes at 0x7f00, expected 68640"),
        failure("test_b", "got 71217 bytes at 0x7f10, expected 68640", "kernels/linear.py:99 launch"),
        failure("test_c", "got 1 bytes at 0x1, expected 2", "kernels/norm.py:12 launch"),
        failure("test_d", "got 1 bytes at 0x1, expected 2", kind="ValueError"),
        {"test": "test_e", "outcome": "crashed", "text": "worker 'gw3' crashed while running 'test_e'"},
        {"test": "test_f", "outcome": "crashed", "text": "worker 'gw11' crashed while running 'test_f'"},
        {"test": "test_g", "outcome": "began"},
        {"test": "test_h", "outcome": "passed", "seconds": 42.0},
        {"test": "test_i", "outcome": "skipped", "reason": "needs 80 GiB"},
    )
    found = gpu_report.causes(gpu_report.last_entries([folder]).values())
    groups = [["test_a", "test_b"], ["test_e", "test_f"], ["test_c"], ["test_d"], ["test_g"]]
    assert [cause.tests for cause in found] == groups
    assert found[0].message == "got N bytes at <address>, expected N"
    assert found[0].place == "kernels/linear.py launch"
    assert found[0].example == "text of test_a"
    text = report(folder)
    assert "### 2 tests: RuntimeError: got N bytes at <address>, expected N" in text
    assert "- 42.0 s test_h" in text
    assert "4 failed, 2 crashed, 1 began, 1 passed, 1 skipped" in text
    assert "- 1: needs N GiB" in text


def test_the_last_word_on_a_test_counts(folder, tmp_path):
    add_tests(folder, failure("test_a", "x"), {"test": "test_b", "outcome": "passed"})
    later = folder_of(tmp_path / "two")
    add_tests(later, failure("test_a", "x"), name="before")
    add_tests(later, {"test": "test_a", "outcome": "passed"}, name="again")
    assert "2 passed\n" in report(folder, later)


def test_every_stage_says_what_became_of_it(folder):
    record = stages.Record(folder)
    for name, fields in {
        "fine": {"exit": 0, "cut_short": False, "failed": False},
        "bad": {"exit": 3, "cut_short": False, "failed": True},
        "late": {"exit": 130, "cut_short": True, "failed": True},
    }.items():
        record.add(stages.BEGIN, stage=name)
        record.add(stages.END, stage=name, seconds=1.0, **fields)
    record.add(stages.NOT_BEGUN, stage="tool", why="ncu is not on PATH")
    record.add(stages.KEPT, stage="old", earlier="/somewhere/zero")
    record.add(stages.ANEW, stage="dead", why="csrc changed since")
    record.add(stages.BEGIN, stage="dead")
    text = report(folder)
    for line in (
        "one fine: ended, exit code 0",
        "one bad: FAILED, exit code 3",
        "one late: CUT SHORT, exit code 130",
        "one tool: NOT BEGUN, ncu is not on PATH",
        "one old: taken from zero",
        "one dead: anew, because csrc changed since",
        "one dead: KILLED",
        "Stages: bad, late, tool, dead",
        "on NVIDIA H200, torch 2.11.0, Triton 3.6.0, unknown comm",
    ):
        assert line in text


def add_results(folder, tokens, name="h200"):
    """A run of the benchmark with a case for every number of tokens, one of which misses its target."""
    run = make_run(name, GPU, {"copy": 4000.0, "gemm": {"bfloat16": 700.0}})
    for count in tokens:
        limits = [limit("triton", 0.95, "unmasked", 0.84), limit("triton", 0.5, "unmasked", 0.84)]
        times = {"full": {"unmasked": 100.0, "triton": 84.0}}
        add_case(run, f"gated MLP, {count} tokens", "gated_mlp", mlp_axes(count), times, limits=limits)
    run.cases[f"gated MLP, {tokens[0]} tokens"]["variants"]["cuda"] = {
        "is_rival": False,
        "wrong": "dx: error 3",
    }
    run.save(folder)


def test_the_fullest_run_of_a_suite_is_the_one_that_counts(folder, tmp_path):
    add_results(folder, [64, 128])
    add_results(folder / "short", [64])
    later = folder_of(tmp_path / "two")
    add_results(later, [64])
    assert gpu_report.results([folder, later]) == {"h200.json": folder / "h200.json"}
    add_results(later, [64, 128])
    assert gpu_report.results([folder, later]) == {"h200.json": later / "h200.json"}
    text = report(folder)
    assert "2 cases; targets: " in text
    assert "- gated MLP, 64 tokens, cuda: dx: error 3" in text


@pytest.mark.slow
def test_results_are_copied_as_they_are_and_reported(folder, tmp_path, capsys):
    root = tmp_path / "root"
    (root / "bench" / "results").mkdir(parents=True)
    (root / "README.md").write_text(README)
    add_results(folder, [64])
    assert gpu_report.main([str(folder), "--write", "h200", "--root", str(root)]) == 0
    for name in ("h200.json", "h200.csv"):
        assert (root / "bench" / "results" / "h200" / name).read_bytes() == (folder / name).read_bytes()
    assert "gated MLP, 64 tokens" in (root / "bench" / "results" / "README.md").read_text()
    assert "outdated" not in (root / "README.md").read_text()


@pytest.mark.parametrize("name", ["../h200", "local", ""])
def test_a_name_that_is_no_machine_s_is_refused(folder, tmp_path, capsys, name):
    add_results(folder, [64])
    if name:
        assert gpu_report.main([str(folder), "--write", name, "--root", str(tmp_path)]) == 2
        assert "expected the name of a folder" in capsys.readouterr().err
    else:
        with pytest.raises(ValueError, match="expected the name of a folder"):
            gpu_report.write([folder], tmp_path, name)


def test_folders_of_two_cards_or_of_none_are_refused(folder, tmp_path, capsys):
    other = folder_of(tmp_path / "two", machine=MACHINE | {"gpu": "NVIDIA H100"})
    assert gpu_report.main([str(folder), str(other)]) == 2
    assert "several cards" in capsys.readouterr().err
    assert gpu_report.main([str(tmp_path)]) == 2
    assert "names a call" in capsys.readouterr().err
