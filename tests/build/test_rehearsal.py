"""Tests marked gpu, without a GPU: all can be collected, and those that do not also run on the CPU say why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: What only the device can show, by the test function that asks for it.
NEED_THE_DEVICE = {
    "tests/ops/test_activation_forward.py::test_bits_of_eager_pytorch_on_a_gpu": "bits of the device's exponentials",
    "tests/ops/test_activation_forward.py::test_ops_on_a_gpu_use_the_kernels": "ops take the fused forward there alone",
    "tests/ops/test_grouped.py::test_a_gpu_keeps_the_budget_without_waiting_and_under_capture": (
        "waiting for the device, and its graphs"
    ),
    "tests/bench/test_bench_command.py::test_suites_run_on_a_gpu": "the device's clock and its count of allocations",
    "tests/ops/test_attention_tiles.py::test_batches_of_more_heads_than_a_grid_has_rows": "the limits of a grid",
    "tests/ops/test_attention_vendor_cuda.py::test_cuda_dropout_drops_its_share": "vendors' generators of random bits",
    "tests/ops/test_attention_vendor_cuda.py::test_cuda_forward_has_the_bits_of_scaled_dot_product_attention": (
        "bits of vendors' kernels"
    ),
    "tests/ops/test_attention_vendor_cuda.py::test_cuda_has_the_same_bits_under_deterministic_algorithms": (
        "vendors' atomics"
    ),
    "tests/ops/test_attention_vendor_cuda.py::test_cuda_never_waits_for_the_device": "waiting for the device",
    "tests/ops/test_layers_compiled.py::test_tables_follow_a_layer_to_the_gpu": "copies from the host to the device",
    "tests/ops/test_ops.py::test_more_elements_than_int32_counts": "the device's memory",
    "tests/ops/test_ops_cuda.py::test_another_device": "two devices",
    "tests/ops/test_ops_cuda.py::test_another_stream": "streams",
    "tests/ops/test_ops_cuda.py::test_cuda_graph": "graphs",
    "tests/ops/test_ops_cuda.py::test_no_synchronisation_once_routes_exist": "waiting for the device",
    "tests/ops/test_routes.py::test_host_counts_of_ids_on_the_gpu": "copies from the host to the device",
    "tests/ops/test_routes.py::test_only_validation_waits_for_the_gpu": "waiting for the device",
}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """All cases, as collected where a GPU seems to be: dicts of `function`, `gpu` and `parameters`."""
    path = tmp_path_factory.mktemp("cases") / "cases.jsonl"
    command = [
        "-m",
        "pytest",
        "-p",
        "pretended_gpu",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        "-q",
        "--cases",
        path,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop("TRITON_INTERPRET", None)  # which this process has set where there is no GPU
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return [json.loads(line) for line in path.read_text().splitlines()]


def identity(case):
    return case["function"], tuple(case["parameters"].items())


@pytest.mark.slow
def test_cases_that_need_a_gpu(collected, capsys):
    """Prints how many there are, and how many of them the CPU also runs."""
    on_gpu = [case for case in collected if case["gpu"]]
    on_cpu = [case for case in collected if not case["gpu"]]
    functions, identities = {case["function"] for case in on_cpu}, {identity(case) for case in on_cpu}
    same = [case for case in on_gpu if identity(case) in identities]
    others = [case for case in on_gpu if case["function"] in functions and identity(case) not in identities]
    alone = [case for case in on_gpu if case["function"] not in functions]
    with capsys.disabled():
        print(
            f"\n{len(on_gpu)} cases need a GPU. Of these, {len(same)} also run on the CPU with the same parameters, "
            f"and {len(others)} with others. {len(alone)} need the device, of {len(NEED_THE_DEVICE)} functions."
        )
    assert {case["function"] for case in alone} == set(NEED_THE_DEVICE)
    assert len(same) > 10 * len(alone)
    assert not [case for case in on_gpu if case["parameters"].get("backend") == "'cpu'"]
    # All others of backend cuda are emulated: what the plan refuses there would be refused here.
    assert not [case for case in others if case["parameters"].get("backend") == "'cuda'"]


def test_the_manual_names_what_needs_the_device():
    """Each by its name, or with the file whose tests of that kind it names."""
    text = (ROOT / "docs" / "proof.md").read_text()
    for test in NEED_THE_DEVICE:
        path, _, name = test.partition("::")
        assert name in text or (name.startswith("test_cuda_") and f"`test_cuda_…` of `{path}`" in text), test
