"""`python -m bench`: what it refuses, keeps and explains."""

import importlib.util
import io
import os
import subprocess
import sys

import pytest
import torch
from bench_cases import CPU, ROOT, plan_of, wrong_glu_backward

from bench import (
    attention_cases,
    command,
    machine,
    model,
    ops,
    progress,
    runner,
    suites,
)
from bench.cases import FORWARD
from bench.results import Run
from bench.settings import DTYPES, SITES, TABLES
from gradroute.backends import native

pytestmark = [
    pytest.mark.skipif(native.module is None, reason=str(native.load_error)),
    pytest.mark.usefixtures("quick_bench"),
]

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@pytest.mark.slow
def test_the_command_runs_a_product_of_axes(tmp_path, capsys):
    arguments = [
        "run",
        "norm",
        "--op",
        "routed_rms_norm",
        "--tokens",
        "8",
        "9",
        "--d-model",
        "4",
        "--no-compiled",
    ]
    assert command.main([*arguments, "--rounds", "2", "--out", str(tmp_path)]) == 0
    run = Run.load(tmp_path / "norm.json")
    assert [case["axes"]["tokens"] for case in run.cases.values()] == [8, 9]
    said = capsys.readouterr().out
    assert "Liger, unmasked" in said
    assert "missing: " in said


def test_a_wrong_kernel_fails_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, "glu_backward", wrong_glu_backward)
    arguments = ["run", "primitive", "--op", "routed_glu", "--tokens", "8", "--d-ff", "8", "--no-compiled"]
    assert command.main([*arguments, "--rounds", "2", "--out", str(tmp_path)]) == 1
    assert "cpu: dgate: maximum error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "suite: got 'nothing', expected one of primitive"),
        (
            ["run", "model", "--density", "0.5"],
            "density: got an axis that the suite model lacks, expected none",
        ),
        (
            ["run", "attention", "--dtype", "int8"],
            "dtype: got an axis that the suite attention lacks, expected tokens",
        ),
        (
            ["run", "attention", "--tokens", "64", "1"],
            "tokens: got 1, expected at least 2 for the suite attention",
        ),
        (["run", "labels", "--tokens", "9"], "tokens: got 9, expected at least 100 for the suite labels"),
        (["run", "gated_mlp", "--dtype", "int8"], "dtype: got 'int8', expected one of float32, bfloat16"),
        (["run", "mlp", "--tables", "quarters"], "tables: got 'quarters', expected one of block, refuse"),
        (["run", "mlp", "--strength", "half"], "strength: got 'half', expected one of none, token, scalar"),
        (["run", "mlp", "--order", "random"], "order: got 'random', expected one of mixed, sorted, runs"),
        (["run", "mlp", "--share", "2"], "share: got 2.0, expected a share from 0 to 1"),
        (
            ["run", "mlp", "--share", "0.5", "--tables", "dense"],
            "share: got [0.5] with tables dense, which ignore it",
        ),
        (
            ["run", "mlp", "--share", "0.5", "--density", "1"],
            "density: got [1.0] with tables block, which ignore it",
        ),
        (["run", "cpu", "--tokens", "5"], "tokens: the group cpu has cases of its own"),
        (["run", "linear", "--case", "no such"], "case: got 'no such'"),
        (["run", "linear", "--op", "routed_mlp"], "op: got routed_mlp, expected one of routed_linear"),
        (["run", "norm", "--sites", "both"], "sites: got 'both', expected update or all for routed_rms_norm"),
        (["run", "linear", "--device", "meta"], "device: got 'meta', expected cpu or cuda"),
        (["run", "linear", "--device", "cuda:1"], "device: got 'cuda:1', expected cpu or cuda"),
        (["run", "linear", "--device", "gpu"], "device: got 'gpu', expected cpu or cuda"),
        (["list", "nothing"], "suite: got 'nothing'"),
        pytest.param(
            ["plot", "nowhere"],
            "nowhere: got no runs, expected NAME.csv with NAME.json",
            marks=needs_matplotlib,
        ),
    ],
)
def test_what_the_command_refuses(arguments, message, tmp_path, capsys):
    out = ["--out", str(tmp_path)] if arguments[0] == "run" else []
    assert command.main([*arguments, *out]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens: got '0', expected a whole number of at least 1"),
        (["--d-ff", "1e3"], "--d-ff: got '1e3', expected a whole number of at least 1"),
        (["--rounds", "none"], "--rounds: got 'none', expected a whole number of at least 1"),
        (["--density", "half"], "--density: invalid float value: 'half'"),
        (["--resume", "--overwrite"], "not allowed with argument --resume"),
    ],
)
def test_numbers_that_the_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        command.main(["run", "mlp", *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("threshold", ["-0.1", "nan", "much"])
def test_a_threshold_that_compares_nothing_is_refused(threshold, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["compare", str(tmp_path), str(tmp_path), f"--threshold={threshold}"])
    assert f"--threshold: got '{threshold}', expected a number of at least 0" in capsys.readouterr().err


def test_a_file_is_no_folder_for_results(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command.main([*TINY, "--out", str(tmp_path / "file")]) == 2
    assert "which is a file, expected a folder" in capsys.readouterr().err


TINY = [
    "run",
    "norm",
    "--op",
    "routed_rms_norm",
    "--tokens",
    "8",
    "--d-model",
    "4",
    "--no-compiled",
    "--rounds",
    "2",
]


def test_what_was_measured_is_not_overwritten_unasked(tmp_path, capsys):
    arguments = [*TINY, "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert (
        "No targets: they are set for the cases that `python -m bench list norm` names"
        in capsys.readouterr().out
    )
    before = (tmp_path / "norm.csv").read_text()
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert "norm.json has 1 case already: --resume goes on with them, --overwrite replaces them" in said
    assert command.main([*arguments, "--resume"]) == 0
    assert "norm.json has all of 1 case: nothing is left to time" in capsys.readouterr().err
    assert (tmp_path / "norm.csv").read_text() == before
    more = [*arguments, "--resume", "--tokens", "8", "9"]
    assert command.main(more) == 0
    assert "norm.json has 1 of 2 cases: 1 to go" in capsys.readouterr().err
    assert len(Run.load(tmp_path / "norm.json").cases) == 2
    assert command.main([*arguments, "--overwrite"]) == 0
    assert len(Run.load(tmp_path / "norm.json").cases) == 1


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    measured = runner.measure

    def measure(plan, *rest):
        if plan.axes["tokens"] == 9:
            raise KeyboardInterrupt
        return measured(plan, *rest)

    monkeypatch.setattr(runner, "measure", measure)
    assert command.main([*TINY, "--out", str(tmp_path), "--tokens", "8", "9"]) == 130
    assert "interrupted: 1 of 2 cases are kept; the same command with --resume" in capsys.readouterr().err
    assert list(Run.load(tmp_path / "norm.json").cases)
    monkeypatch.setattr(runner, "measure", measured)
    assert command.main([*TINY, "--out", str(tmp_path), "--tokens", "8", "9", "--resume"]) == 0
    assert len(Run.load(tmp_path / "norm.json").cases) == 2


def test_an_interrupt_before_the_first_case_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "ceilings", interrupted)
    assert command.main([*TINY, "--out", str(tmp_path)]) == 130
    assert "interrupted before the first case was done" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_explains_every_value_once(capsys):
    with pytest.raises(SystemExit):
        command.main(["run", "--help"])
    said = capsys.readouterr().out
    for value in (*TABLES, *SITES):
        assert sum(line.startswith(f"  {value} ") for line in said.splitlines()) == 1
    assert all(dtype in said for dtype in DTYPES)


@needs_matplotlib
def test_a_run_without_a_sweep_has_no_plots(tmp_path, capsys):
    assert command.main([*TINY, "--out", str(tmp_path)]) == 0
    assert command.main(["plot", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "norm.csv: nothing to plot: a curve needs two cases that differ in density or tokens alone" in said


def test_passes_and_rates_are_explained(tmp_path, capsys):
    runner.run("linear", [plan_of()], 2, CPU, tmp_path)
    said = capsys.readouterr().out
    assert "  full: forward and backward\n" in said
    assert " useful TFLOP/s" in said


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_names_cases_whole(monkeypatch):
    name = "a very long name of a case, " * 8
    for stream, wanted in ((io.StringIO(), f"[1/2] {name}\n  making\n"), (Terminal(), None)):
        monkeypatch.setattr("sys.stderr", stream)
        progress.case(name, 1, 2)
        progress.stage("making")
        progress.step("checking " + name)
        if wanted is None:
            assert f"[1/2] {name}\n" in stream.getvalue()
            assert "\r\033[K  making\r\033[K  checking a very" in stream.getvalue()
            assert len(stream.getvalue().rpartition("\033[K")[2]) < 80
        else:
            assert stream.getvalue() == wanted


@pytest.mark.parametrize(
    ("command", "first"),
    [
        (["-m", "bench", "list"], "python -m bench: loading PyTorch and gradroute"),
        (["examples/demo.py", "--out", "{folder}"], "demo: loading PyTorch, transformers and gradroute"),
    ],
)
def test_a_command_is_there_before_its_imports(command, first, tmp_path):
    """And an interrupt while it imports ends it without a traceback, whatever an import does with it."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); input()\nexcept BaseException:\n    pass\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [part.format(folder=tmp_path) for part in command]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 130
    said = (done.stdout + done.stderr).splitlines()
    assert said[0] == first
    assert said[-1].partition(";")[0].endswith(": interrupted")
    assert len(said) <= 3


def test_ceilings_of_slow_dtypes_take_no_minutes(monkeypatch):
    shapes = []

    def rate(device, dtype, shape):
        shapes.append(shape)
        return 1e-3  # a thousandth of what fp32 has

    monkeypatch.setattr(machine, "_product_rate", rate)
    monkeypatch.setattr(machine, "GEMM_SHAPES", {"cpu": ((2048, 2048, 2048), (64, 64, 64))})
    assert machine.gemm_rate(CPU, torch.float16) == 1e-3
    assert shapes == [machine.PROBE, (512, 512, 512), (64, 64, 64)]
    seconds = 2 * 512**3 / 1e-3 / 1e12
    assert seconds < machine.MOST_SECONDS < 8 * seconds


def test_ceilings_are_the_highest_rates(monkeypatch):
    monkeypatch.setattr(machine, "gemm_rate", lambda *_: 2.0)
    monkeypatch.setattr(machine, "copy_rate", lambda *_: 3.0)
    found = machine.ceilings(CPU, ["float32"])
    assert found == {"copy": 3.0, "gemm": {"float32": 2.0}}
    other = {"copy": 1.0, "gemm": {"float32": 5.0, "bfloat16": 1.0}}
    assert machine.higher(found, other) == {"copy": 3.0, "gemm": {"float32": 5.0, "bfloat16": 1.0}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_group_for_cuda_needs_one(capsys):
    assert command.main(["run", "h200"]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err


@pytest.mark.gpu
def test_suites_run_on_a_gpu(monkeypatch, tmp_path):
    """Clocks, memory, rivals and limits of the suite h200 less its model, in small."""
    monkeypatch.undo()
    small = {"tokens": 160, "d_model": 64, "d_ff": 192, "dtype": "float32"}
    monkeypatch.setitem(suites.BASE_POINTS, "cuda", small)
    shape = attention_cases.SHAPES["cuda"]._replace(batch=1, length=256)
    monkeypatch.setitem(attention_cases.SHAPES, "cuda", shape)
    options = ops.Options(torch.device("cuda"))
    plans = suites.limit_plans(options) + suites.suite_plans("launch", options)
    plans += suites.suite_plans("attention", options) + suites.suite_plans("norm", options)[:2]
    done = runner.run("small", plans, 2, options.device, tmp_path)
    assert done.failures() == []
    assert all(done.modes(name) for name in done.cases)
    assert done.figure("route_grad, 3.7% of tokens", "triton", FORWARD, "memory").p50 == 0


@pytest.mark.slow
def test_a_group_names_what_this_machine_lacks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model, "why_missing", lambda: "transformers is not installed")
    cases = lambda options: [plan_of(), *suites.suite_plans("model", options)]  # noqa: E731
    monkeypatch.setitem(suites.GROUPS, "cpu", ("cpu", cases))
    assert command.main(["run", "cpu", "--rounds", "2", "--out", str(tmp_path)]) == 0
    missing = Run.load(tmp_path / "cpu.json").description["missing"]
    assert missing == {"model": "transformers is not installed"}
    assert "model is missing: transformers is not installed" in capsys.readouterr().out


def test_the_command_lists_suites_and_cases(capsys):
    assert command.main(["list"]) == 0
    assert capsys.readouterr().out.split()[: len(suites.SUITES)] == list(suites.SUITES)
    assert command.main(["list", "cpu"]) == 0
    assert "linear       linear, one token in 16 may not update\n" in capsys.readouterr().out
