"""The automatic choice follows what was checked and measured on this machine, and says so."""

import logging
import subprocess
import sys

import pytest
import torch

import gradroute
from gradroute import attention, backends, testing
from gradroute.attention import explain
from gradroute.machine import answers, identity, verdicts
from gradroute.machine.records import CHECK, TUNING, Record

CPU = torch.device("cpu")
WRONG = {"passed": False, "date": "2026-01-02T03:04:05", "failures": ["route_grad: dx is wrong", "and more"]}
RIGHT = {"passed": True, "date": "2026-01-03T03:04:05", "failures": []}
LEFT_OUT = (
    r"backend 'cpu' on cpu: `python -m gradroute check` found it wrong .* on 2026-01-02 \(route_grad: dx is"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADROUTE_CACHE", str(tmp_path))


def found(kind, findings, device=CPU):
    Record(kind, device).update(findings)
    backends.choose_anew()


def measured(question, answer):
    found(TUNING, {question: {"answer": answer}})


@pytest.mark.parametrize("op", backends.OPS)
def test_a_backend_that_was_found_wrong_is_left_out_until_a_check_passes(op):
    x = torch.randn(3, 4)
    if backends.unavailable_backends(op, CPU).get("cpu"):
        pytest.skip("the native module was not built")
    assert backends.choose(op, None, x) == "cpu"
    found(CHECK, {"cpu": WRONG})
    with pytest.warns(RuntimeWarning, match=LEFT_OUT):
        assert backends.choose(op, None, x) == "torch"
    assert backends.choose(op, None, x) == "torch"  # and nothing is said again
    assert "until a check passes" in backends.explain(op, x).reason
    assert backends.choose(op, "cpu", x) == "cpu"
    found(CHECK, {"cpu": RIGHT})
    assert backends.choose(op, None, x) == "cpu"


def test_attention_and_the_optimizer_leave_it_out_too():
    if backends.unavailable_backends(device=CPU).get("cpu"):
        pytest.skip("the native module was not built")
    q = torch.randn(1, 2, 8, 16)
    found(CHECK, {"cpu": WRONG})
    with pytest.warns(RuntimeWarning, match=LEFT_OUT):
        assert explain(q, q, q, None, None).backend == "torch"
    with pytest.raises(gradroute.BackendError, match="until a check passes"):
        backends.with_kernels("a step", CPU, torch.float32)
    with gradroute.use_backend("cpu"):
        assert backends.with_kernels("a step", CPU, torch.float32) == "cpu"


def test_where_every_backend_was_found_wrong_the_error_says_so():
    found(CHECK, dict.fromkeys(backends.BACKENDS, WRONG))
    with (
        pytest.warns(RuntimeWarning, match="found it wrong"),
        pytest.raises(gradroute.BackendError, match=r"reference: .* until a check passes"),
    ):
        backends.choose("route_grad", None, torch.randn(3))


@pytest.mark.filterwarnings("error")
def test_where_warnings_are_errors_every_choice_raises_the_same_one():
    found(CHECK, dict.fromkeys(("torch", "cpu"), WRONG))
    for _ in range(2):
        with pytest.raises(RuntimeWarning, match=r"backend 'torch' on cpu: .*; backend 'cpu' on cpu: "):
            backends.choose("route_grad", None, torch.randn(3))


def test_the_measured_order_is_taken_by_size():
    measured("backends/route_grad/float32", [[100, ["torch"]], [None, ["reference", "torch"]]])
    with pytest.warns(RuntimeWarning, match="slower backend 'reference'"):
        assert backends.choose("route_grad", None, torch.randn(101)) == "reference"
    assert backends.choose("route_grad", None, torch.randn(100)) == "torch"
    assert backends.choose("route_grad", None, torch.randn(100).double()) in ("cpu", "torch")
    choice = backends.explain("route_grad", torch.randn(5))
    assert (choice.backend, choice.evidence) == ("torch", "measured here")
    assert backends.explain("route_grad", torch.randn(5).double()).evidence == "shipped estimate"
    assert backends.explain("route_grad", torch.randn(5), backend="reference").reason == "it was asked for"


def test_backends_that_were_not_measured_come_last():
    measured("backends/route_grad/float32", [[None, ["reference"]]])
    assert backends.order_of("route_grad", torch.randn(3)) == ("reference", "triton", "cuda", "cpu", "torch")


def test_results_are_those_of_the_measured_backend():
    call = testing.sample("routed_linear", tokens=7)
    measured("backends/routed_linear/float32", [[None, ["torch"]]])
    testing.assert_same_bits(call.run(), call.run("torch"), "routed_linear")
    testing.assert_same_bits(call.run(), call.run(), "routed_linear")


@pytest.mark.slow
def test_compiled_code_takes_the_order_of_the_largest_size_and_depends_on_none():
    measured("backends/route_grad/float32", [[100, ["cpu"]], [None, ["torch"]]])
    table = gradroute.Table(torch.tensor([[1.0] * 4, [0.5] * 4]))
    graphs, chosen = [], []

    def remember(graph, example):
        graphs.append(graph)
        chosen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    @torch.compile(fullgraph=True, backend=remember, dynamic=True)
    def step(x, routes):
        return gradroute.route_grad(x, routes, table)

    for tokens in (5, 70):
        x = torch.randn(tokens, 4, requires_grad=True)
        routes = gradroute.Routes.of(torch.arange(tokens) % 2, 2)
        step(x, routes).sum().backward()
        expected = torch.tensor([1.0, 0.5])[torch.arange(tokens) % 2][:, None].expand(tokens, 4)
        assert torch.equal(x.grad, expected)
    assert len(graphs) == 1


def test_attention_says_what_its_choice_rests_on():
    q = torch.randn(1, 2, 8, 16)
    assert explain(q, q, q, None, None).evidence == "shipped estimate"
    measured("backends/routed_attention/float32", [[None, ["torch", "cpu"]]])
    plan = explain(q, q, q, None, None)
    assert (plan.backend, plan.evidence) == ("torch", "measured here")
    assert isinstance(plan, attention.Plan)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device that is there, as far as findings are concerned."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(identity, "name_of", lambda device: "NVIDIA X1")
    monkeypatch.setattr(identity, "of", lambda device, with_threads: {"device": "NVIDIA X1"})
    monkeypatch.setattr(verdicts, "_is_told", False)
    return torch.device("cuda", 0)


def test_an_unchecked_gpu_is_told_once(gpu, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, "gradroute"):
        assert verdicts.why_not("triton", gpu) is None
        verdicts.forget()
        assert verdicts.why_not("cuda", gpu) is None
    assert [record.getMessage() for record in caplog.records] == [
        "gradroute was never checked on this NVIDIA X1: `python -m gradroute check` does it in minutes, and `python -m "
        "gradroute tune` measures what is fastest here"
    ]


@pytest.mark.parametrize(
    "where",
    [
        "another rank",
        "another rank of Slurm",
        "another rank without a launcher",
        "a worker",
        "a child",
        "a checked GPU",
    ],
)
def test_it_is_told_by_the_first_rank_alone_and_where_there_was_no_check(gpu, caplog, monkeypatch, where):
    if where == "another rank":
        monkeypatch.setenv("LOCAL_RANK", "3")
    elif where == "another rank of Slurm":
        monkeypatch.setenv("SLURM_LOCALID", "1")
    elif where == "another rank without a launcher":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    elif where == "a child":
        monkeypatch.setattr(verdicts.multiprocessing, "parent_process", lambda: "something")
    elif where == "a worker":
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "something")
    else:
        found(CHECK, {"triton": RIGHT}, gpu)
    with caplog.at_level(logging.WARNING, "gradroute"):
        assert verdicts.why_not("triton", gpu) is None
    assert caplog.records == []


@pytest.mark.parametrize("launched", [True, False])
def test_the_first_of_ranks_that_are_children_tells(gpu, caplog, monkeypatch, launched):
    """torch.multiprocessing.spawn makes every rank a child, and there is no other process that would tell."""
    monkeypatch.setattr(verdicts.multiprocessing, "parent_process", lambda: "something")
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    else:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with caplog.at_level(logging.WARNING, "gradroute"):
        verdicts.why_not("triton", gpu)
    assert len(caplog.records) == 1


@pytest.mark.slow
def test_nothing_is_read_or_said_at_import(tmp_path, monkeypatch):
    """A file that would be warned of stays unread until a backend is chosen."""
    record = Record(CHECK, CPU)
    record.update({"torch": WRONG})
    code = (
        "import gradroute; from gradroute.machine import verdicts; print(verdicts._found, verdicts._is_told)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("{} False\n", 0), done.stderr


def test_an_answer_about_launches_replaces_the_shipped_configuration(gpu, monkeypatch):
    launch = pytest.importorskip("gradroute.kernels.launch")
    from gradroute.kernels.optim import adamw_step_kernel

    monkeypatch.setattr(launch, "_capability", lambda device: 90)
    shipped = launch.config_of(adamw_step_kernel, gpu)
    with answers.trying(gpu, {"launch/adamw_step_kernel": {"ELEMENTS": 512, "num_warps": 2}}):
        assert launch.config_of(adamw_step_kernel, gpu) == {"ELEMENTS": 512, "num_warps": 2}
        with launch.record(90):
            assert launch.config_of(adamw_step_kernel, gpu) == shipped
    assert launch.config_of(adamw_step_kernel, gpu) == shipped


@pytest.mark.parametrize(
    ("entry", "config"),
    [
        ("nobody_kernel", {"ELEMENTS": 512}),
        ("adamw_step_kernel", {"ELEMENTS": "many"}),
        ("adamw_step_kernel", {"num_warps": 4}),
        ("adamw_step_kernel", {"ELEMENTS": 512, "BLOCK_T": 4}),
        ("adamw_step_kernel", {"ELEMENTS": 0}),
        ("adamw_step_kernel", None),
    ],
)
def test_a_launch_that_the_kernel_does_not_know_is_reported_and_ignored(entry, config):
    pytest.importorskip("gradroute.kernels.launch")
    measured(f"launch/{entry}", config)
    with pytest.warns(RuntimeWarning, match=f"launch/{entry} in .* is ignored: .*gradroute tune` removes it"):
        assert answers.launch(entry, CPU) is None


def test_answers_of_what_is_not_loaded_wait_until_it_is(monkeypatch):
    """As launches do where Triton is loaded only when somebody asks for it."""
    monkeypatch.delitem(answers._readers, "skip_below")
    measured("skip_below/float32", 0.5)
    assert answers.share_for_own(CPU, torch.float32) is None
    answers.read_by("skip_below", lambda what, value: (what, value))
    assert answers.share_for_own(CPU, torch.float32) == ((torch.float32,), 0.5)
