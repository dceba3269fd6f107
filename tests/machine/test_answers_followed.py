"""What was measured here is followed by every call, read once, the same bits for the same file, and explained."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gradroute
from gradroute import AttentionSites, Routes, backends, testing
from gradroute.attention import explain
from gradroute.backends import native
from gradroute.backends.tiled import tiling
from gradroute.machine import answers
from gradroute.machine.answers import MEASURED, SHIPPED
from gradroute.machine.records import CHECK, TUNING, Record
from gradroute.tables import localize

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF_OFF = [[1.0, 1.0, 0.0, 0.0]] * 2
FOUND = {
    **{f"backends/{op}/float32": [[200, ["torch"]], [None, ["torch", "cpu"]]] for op in backends.OPS},
    **{f"rectangles/{name}/float32": {"min_saving": 0.01, "min_tokens": 4} for name in ("linear", "mlp")},
    "run/mlp/float32": 8,
    "tiles/float32": {"rows": 8, "keys": 16},
}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache with what was measured on the CPU."""
    monkeypatch.setenv("GRADROUTE_CACHE", str(tmp_path))
    Record(TUNING, CPU).update({question: {"answer": answer} for question, answer in FOUND.items()})
    backends.choose_anew()
    return tmp_path


def test_measured_tiles_are_taken_and_explained():
    q = torch.randn(1, 2, 40, 8)
    assert tiling.largest_tile(CPU, torch.float32) == (tiling.ROWS, tiling.KEYS)
    with answers.trying(CPU, {"tiles/float32": {"rows": 8, "keys": 16}}):
        assert tiling.largest_tile(CPU, torch.float32) == (8, 16)
        assert tiling.largest_tile(CPU, torch.bfloat16) == (tiling.ROWS, tiling.KEYS)
        assert explain(q, q, q, None, None, window=9).evidence == MEASURED
        assert explain(q, q, q, None, None).evidence == SHIPPED  # a vendor's kernel, which has no such tiles
        testing.sample("routed_attention", tokens=(1, 40), window=9).assert_within_budget("torch")
    assert explain(q, q, q, None, None, window=9).evidence == SHIPPED


def test_tiles_of_other_devices_stay_as_shipped():
    with answers.trying(CUDA, {"tiles/float32": {"rows": 8, "keys": 16}}):
        assert tiling.largest_tile(CUDA, torch.float32) == (tiling.DEVICE_ROWS, tiling.DEVICE_KEYS)


@pytest.fixture
def gpu(monkeypatch):
    """Attention on a GPU that is not there, whose vendors' kernels run every call."""
    monkeypatch.setattr(native, "why_not", lambda name: None)
    for vendor in backends.vendor.VENDORS.values():
        monkeypatch.setattr(vendor, "why_not", lambda *_: None)
    with FakeTensorMode():
        q = torch.zeros(2, 4, 8, 64, device=CUDA, dtype=torch.bfloat16)
        ids = torch.zeros(2, 8, dtype=torch.int32, device=CUDA)
        yield q, Routes.of(ids, 2, validate=False)


def test_the_measured_order_of_vendors_kernels_is_followed(gpu):
    q, routes = gpu
    sites = AttentionSites(query=HALF_OFF)
    with answers.trying(CUDA, {}):
        shipped = explain(q, q, q, routes, sites)
        assert (shipped.vendor, shipped.evidence) == ("flash", SHIPPED)
    for first in ("cudnn", "efficient"):
        with answers.trying(CUDA, {"vendors/bfloat16": [first]}):
            plan = explain(q, q, q, routes, sites)
        assert (plan.vendor, plan.evidence) == (first, MEASURED)
        assert "in the order of their speed measured here" in plan.reason
    with answers.trying(CUDA, {"vendors/float16": ["cudnn"]}):
        assert explain(q, q, q, routes, sites) == shipped


def test_the_measured_share_for_own_kernels_is_followed(gpu):
    q, routes = gpu
    sites = AttentionSites(heads=HALF_OFF)  # half of the work is left
    for share, backend in ((0.4, "cuda"), (0.6, "triton")):
        with answers.trying(CUDA, {"skip_below/bfloat16": share}):
            plan = explain(q, q, q, routes, sites)
        assert (plan.backend, plan.evidence) == (backend, MEASURED)


def test_files_are_read_once(cache, monkeypatch):
    read, reads = Record.read, []
    monkeypatch.setattr(Record, "read", lambda record: reads.append(record.file.parent.name) or read(record))
    call = testing.sample("routed_mlp", tokens=8)
    for _ in range(3):
        call.run()
    assert reads == ["tuning", "check"]


def test_what_took_no_part_in_a_choice_is_no_evidence():
    q = torch.randn(1, 2, 4, 8)
    with answers.trying(CPU, {"vendors/float32": ["flash"], "skip_below/float32": 0.5}):
        assert explain(q, q, q, None, None).evidence == SHIPPED
    with answers.trying(CPU, {"backends/routed_mlp/float32": [[None, ["torch"]]]}):
        assert backends.explain("routed_mlp", q, "torch").evidence == MEASURED
        assert backends.explain("routed_mlp", q, "reference").evidence == SHIPPED


def test_attentions_order_is_made_once_and_anew_with_other_answers(cache, monkeypatch):
    made, make = [], backends._orders_of
    monkeypatch.setattr(backends, "_orders_of", lambda op, x: made.append(op) or make(op, x))
    q = torch.randn(1, 2, 4, 8)
    for _ in range(3):
        assert backends.order_of("routed_attention", q)[0] == "torch"
    assert len(made) == 1
    with answers.trying(CPU, {}):
        assert backends.order_of("routed_attention", q) == backends.OPS["routed_attention"]
    backends.choose_anew()
    assert backends.order_of("routed_attention", q)[0] == "torch"
    assert len(made) == 3


RUNS_EVERY_OP = """
import hashlib, torch
torch.set_num_threads(1)
from gradroute import backends, testing
digest = hashlib.sha256()
for op in backends.OPS:
    tokens = (2, 19) if op == "routed_attention" else 64
    for tables in ("blocks", "dense"):
        call = testing.sample(op, tokens=tokens, tables=tables)
        result = call.run()
        for tensor in (result.output, *result.gradients.values()):
            digest.update(tensor.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def run(code, **environment):
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_the_same_file_gives_the_same_bits_and_another_may_not(cache):
    with_file = run(RUNS_EVERY_OP)
    assert run(RUNS_EVERY_OP) == with_file
    without = run(RUNS_EVERY_OP, GRADROUTE_TUNING="0")
    assert run(RUNS_EVERY_OP, GRADROUTE_CACHE=str(cache / "empty")) == without
    assert with_file != without  # the file is followed: runs and tiles are summed in other orders


COUNTS_READS = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and "GR-CACHE" in str(args[0]) else None)
counts = []
import torch
torch.set_num_threads(1)
import gradroute
from gradroute import testing
counts.append(len(opened))
call = testing.sample("routed_mlp", tokens=8)
for _ in range(3):
    call.run()
    counts.append(len(opened))
print(counts)
"""


@pytest.mark.slow
def test_files_are_read_at_the_first_call_once_and_never_at_import(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADROUTE_CACHE", str(tmp_path / "GR-CACHE"))
    Record(TUNING, CPU).update({question: {"answer": answer} for question, answer in FOUND.items()})
    right = {"passed": True, "date": "2026-01-01T00:00:00", "failures": []}
    Record(CHECK, CPU).update({"torch": right})
    assert json.loads(run(COUNTS_READS)) == [0, 2, 2, 2]
    assert json.loads(run(COUNTS_READS, GRADROUTE_TUNING="0")) == [0, 1, 1, 1]


@pytest.mark.slow
def test_importing_loads_neither_commands_nor_their_tools():
    code = "import sys, gradroute; print([name for name in sys.modules if name.startswith('gradroute.machine.')])"
    loaded = run(code)
    assert "'gradroute.machine.answers'" in loaded
    assert "tune" not in loaded


@pytest.mark.slow
def test_compiled_code_takes_answers_as_constants_and_no_size_apart(cache):
    """One graph for all sizes, though eager calls of these sizes take different backends and forms."""
    graphs = []

    def remember(graph, example):
        graphs.append(graph)
        return graph.forward

    sites = gradroute.MLPSites(hidden=localize(2, 16, {1: slice(0, 4)}))
    w_in, w_out = torch.randn(16, 8), torch.randn(8, 16)

    @torch.compile(fullgraph=True, backend=remember, dynamic=True)
    def step(x, routes):
        return gradroute.routed_mlp(x, w_in, None, w_out, None, routes, sites)

    for tokens in (20, 70):
        x = torch.randn(tokens, 8, requires_grad=True)
        routes = Routes.of(torch.arange(tokens) % 2, 2)
        (compiled,) = torch.autograd.grad(step(x, routes).sum(), x)
        (eager,) = torch.autograd.grad(
            gradroute.routed_mlp(x, w_in, None, w_out, None, routes, sites).sum(), x
        )
        torch.testing.assert_close(compiled, eager)
    assert len(graphs) == 1
