"""`python -m gradroute`: it tells what runs here, and fails when a backend disagrees with the reference."""

import json
import os
import subprocess
import sys

import pytest
import torch

from gradroute import backends
from gradroute.__main__ import main
from gradroute.backends import composed, native
from gradroute.machine import identity, records, report

EVERY_PAIR = {(op, backend) for op in backends.OPS for backend in backends.BACKENDS}


@pytest.fixture
def one_op(monkeypatch):
    """A table of one op, which is quick to report on."""
    monkeypatch.setattr(backends, "OPS", {"route_grad": ("torch", "reference")})


def test_here_every_backend_agrees(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gradroute"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "gradroute",
        "torch",
        "platform",
        "cpu",
        "cuda",
        "native",
        *backends.OPS,
        *backends.BACKENDS,
    ):
        assert name in done.stdout
    assert "WRONG" not in done.stdout


def test_json_has_every_op_on_every_backend(capsys):
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] is True
    assert {(op, backend) for op, row in found["ops"].items() for backend in row} == EVERY_PAIR
    for op, row in found["ops"].items():
        for backend, cell in row.items():
            assert set(cell["checks"].values()) <= {"ok"}
            assert bool(cell["checks"]) == (cell["reason"] is None), f"{op} on {backend}"
    assert found["ops"]["routed_linear"]["torch"]["checks"]["cpu"] == "ok"


def test_versions_and_build(one_op):
    found = report.report()
    assert {"gradroute", "python", "torch", "triton", "numpy", *identity.TOOLS} == set(found["versions"])
    assert {row["tool"] for row in found["setups"]} >= {"Trainer", "FSDP1", "Threads"}
    assert any(row["refused"] for row in found["setups"])
    assert f"{len(found['setups'])} " not in report.setups_text(found["setups"])  # some are refused
    assert found["cpu"]["threads"] == 1
    if native.module is not None:
        assert found["native"]["cxx"]
        assert found["cpu"]["instruction_set"] in found["native"]["instruction_sets"].split()


def test_a_wrong_kernel_is_named_with_its_error(one_op, monkeypatch, capsys):
    monkeypatch.setattr(composed, "masked_product", lambda g, *_: 1.01 * g)
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "cpu WRONG [1]" in said
    assert "[1] AssertionError: route_grad on torch: dx: maximum error" in said


def test_a_kernel_that_fails_is_named(one_op, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(composed, "masked_product", fails)
    assert main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] is False
    row = found["ops"]["route_grad"]
    assert row["torch"]["checks"]["cpu"] == "RuntimeError: no kernel image is available"
    assert row["reference"]["checks"]["cpu"] == "ok"


def test_without_the_native_module_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(backends, "OPS", {"route_grad": ("cpu", "torch", "reference")})
    monkeypatch.setattr(native.loading, "module", None)
    monkeypatch.setattr(native.loading, "load_error", "the native module was not built")
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "native    the native module was not built\n" in said
    assert said.count("the native module was not built") > 1  # in the row of backend cpu too


def test_it_says_what_was_checked_and_tuned(one_op, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GRADROUTE_CACHE", str(tmp_path))
    backends.choose_anew()
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "checked   cpu: reference never, torch never" in said
    assert "`python -m gradroute check` checks them" in said
    assert "tuned     cpu: nothing\n" in said
    cpu = torch.device("cpu")
    wrong = {"passed": False, "date": "2026-01-02T03:04:05", "failures": ["bounds of route_grad", "more"]}
    right = {"passed": True, "date": "2026-01-03T03:04:05", "failures": []}
    verdicts = dict.fromkeys(backends.BACKENDS, right | {"unchecked": ["strides"]}) | {"reference": wrong}
    records.Record(records.CHECK, cpu).update(verdicts)
    records.Record(records.TUNING, cpu).update({"run/mlp/float32": {"answer": 5}})
    backends.choose_anew()
    found = report.report()  # says it without a warning: warnings are errors here
    said = report.as_text(found)
    assert (
        "checked   cpu: reference 2026-01-02 WRONG (bounds of route_grad), torch 2026-01-03 (1 not checked)"
        in said
    )
    assert "check` checks them" not in said
    assert "tuned     cpu: 1 answers\n" in said
    assert found["findings"]["cpu"]["checks"]["torch"] == right | {"failures": (), "unchecked": ("strides",)}
    assert found["findings"]["cpu"]["tuned"] == ["run/mlp/float32"]


def test_devices_are_listed():
    device = {"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 139.8}
    said = report.cuda_text({"runtime": "13.0", "driver": "580.82.07", "devices": [device]})
    assert said.splitlines() == [
        "torch's runtime 13.0, driver 580.82.07",
        "          cuda:0 NVIDIA H200, sm_90, 139.8 GiB",
    ]


def test_the_driver_version_is_found(tmp_path):
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\nGCC version: 12.2.0\n"
    )
    assert identity.first_match(str(file), identity.DRIVER_VERSION) == "580.82.07"
    assert identity.first_match(str(tmp_path / "absent"), identity.DRIVER_VERSION) is None
