"""Two made-up runs, and a checkout that has them."""

import pytest
from bench_runs import CPU, GPU, README, add_case, add_rows, limit, make_run, mlp_axes, spread


@pytest.fixture
def cpu_run():
    """Two headline cases, and sweeps of three numbers of tokens and of three densities."""
    run = make_run("cpu", CPU, {"copy": 20.0, "gemm": {"float32": 0.25}})
    limits = [
        limit("cpu", 0.95, "unmasked", 0.84),
        limit("cpu", 1.5, "unmasked", 3.0, "memory"),
        limit("cpu", 0.5, "Liger", None, "saved"),
    ]
    times = {"full": {"unmasked": 100.0, "detach": 118.0, "cpu": 84.0}}
    add_case(run, "gated MLP, block", "gated_mlp", mlp_axes(), times, limits=limits)
    run.cases["gated MLP, block"]["variants"]["Liger"] = {
        "is_rival": True,
        "missing": "liger_kernel is not installed",
    }
    rates = {"useful rate": spread(0.2), "dense-equivalent rate": spread(0.3)}
    add_rows(run, "gated MLP, block", "cpu", "full", rates)
    times = {"forward": {"unmasked": 30.0, "cpu": 31.0}, "full": {"unmasked": 0.09, "cpu": 0.0405}}
    limits = [limit("cpu", 1.1, "unmasked", 31 / 30, mode="forward")]
    axes = mlp_axes() | {"tables": "quarters"}
    add_case(run, "gated MLP, quarters", "gated_mlp", axes, times, limits=limits, facts={"share": 0.25})
    for tokens in (1024, 4096):
        times = {"full": {"unmasked": tokens / 80, "cpu": tokens / 90}}
        add_case(run, f"tokens {tokens}", "gated_mlp", mlp_axes(tokens), times)
    for density in (0.25, 0.5, 1.0):
        times = {"full": {"unmasked": 100.0, "cpu": 40 + 60 * density}}
        add_case(run, f"density {density}", "gated_mlp", mlp_axes(8192, density), times, x="density")
    return run


@pytest.fixture
def gpu_run():
    """A suite that is bound by bytes, and a model's step, which has a limit on what is added."""
    run = make_run("cuda", GPU, {"copy": 4000.0, "gemm": {"bfloat16": 700.0}})
    times = {"backward": {"unmasked": 0.5, "copy": 0.25, "triton": 0.26}}
    limits = [limit("triton", 1.1, "copy", 1.04, mode="backward")]
    axes = {"tokens": 16384, "dtype": "bfloat16"}
    add_case(run, "norm", "norm", axes, times, limits=limits, rivals=["unmasked", "copy"])
    for variant, rate in {"unmasked": 1900.0, "copy": 3800.0, "triton": 3650.0}.items():
        add_rows(run, "norm", variant, "backward", {"bandwidth": spread(rate)})
    run.cases["norm"]["variants"] |= {
        "Flex": {"is_rival": True, "wrong": "dx: error 3 | 1"},
        "cuda": {"is_rival": False, "error": "RuntimeError: no such device"},
    }
    times = {"step": {"unrouted": 1000.0, "detach": 1400.0, "routed": 1250.0}}
    limits = [limit("routed", 0.5, "detach", 0.625, mode="step", added="unrouted")]
    add_case(
        run, "Llama", "model", axes | {"tokens": 2048}, times, limits=limits, rivals=["unrouted", "detach"]
    )
    run.description["interrupted"] = True
    return run


@pytest.fixture
def root(tmp_path, cpu_run, gpu_run):
    """A checkout with results of two machines, and of one that is nobody else's."""
    results = tmp_path / "bench" / "results"
    cpu_run.save(results / "two-cores")
    cpu_run.save(results / "local")
    gpu_run.save(results / "h200")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    return tmp_path
