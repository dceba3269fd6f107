"""Every CUDA kernel, as shipped, compiles for every architecture without spills and within its shared memory."""

import re

import cuda_build
import pytest

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100"}

# The limit of a block that asks for no more, which no launcher does: so dynamic shared memory is within it, too.
SHARED_MEMORY = 48 * 1024

needs_compiler = pytest.mark.skipif(
    bool(cuda_build.missing_tools()),
    reason=f"no {', '.join(cuda_build.missing_tools())} to compile CUDA with",
)


# What a kernel's mangled name says: what it is called; that it reads vectors, by the number of elements or, of rows of
# a norm, always; that dy is fp32 beside an x of 16 bits, so that vectors of x have 8 bytes.
NAME = re.compile(r"\d([a-z_]+_kernel)I")
VECTORS = re.compile(r"Li[48]E|norm_backward_rows_kernel")
MIXED = re.compile(r"kernelIf(13__nv_bfloat16|6__half)")

# The vectors that each kernel stores, at the least: of norm_backward those of dx, which is written in x's dtype.
VECTORS_STORED = {
    "activation_backward_kernel": 4,
    "activation_forward_kernel": 2,
    "adamw_step_kernel": 3,
    "attention_delta_kernel": 2,
    "bias_grad_kernel": 0,
    "embedding_backward_kernel": 2,
    "glu_backward_kernel": 6,
    "masked_heads_kernel": 4,
    "masked_product_kernel": 4,
    "norm_backward_chunks_kernel": 4,
    "norm_backward_rows_kernel": 2,
    "touched_blocks_kernel": 0,
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The folder of a configured build, its commands by source, and the reports of the sources that are compiled."""
    folder = tmp_path_factory.mktemp("cuda_build")
    return folder, cuda_build.commands(folder), {}


def reports_of(build, source):
    folder, commands, known = build
    if source not in known:
        known[source] = cuda_build.compiled(commands[source], folder)
    return known[source]


def test_no_launcher_asks_for_more_shared_memory():
    for source in [*cuda_build.CSRC.glob("*.cu"), *cuda_build.CSRC.glob("*.cuh")]:
        assert "cudaFuncSetAttribute" not in source.read_text(), source.name


SOURCES = sorted(path.name for path in cuda_build.CSRC.glob("*.cu"))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills_or_exceeds_shared_memory(build, source):
    reports = reports_of(build, source)
    wrong = [
        report
        for report in reports
        if report.spilled > 0 or report.stack > 0 or report.shared > SHARED_MEMORY or report.registers < 1
    ]
    assert not wrong, "\n".join(map(str, wrong))
    # Each kernel, on each architecture.
    kernels = {report.kernel for report in reports}
    assert len(reports) == len(kernels) * len(ARCHITECTURES) > 0
    assert {report.architecture for report in reports} == ARCHITECTURES


@needs_compiler
@pytest.mark.skipif(cuda_build.find_cuobjdump() is None, reason="no cuobjdump to read machine code with")
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_vectors_are_stored_by_one_instruction(build, source):
    """A compiler that takes vectors apart makes four stores of each, or eight."""
    reports = reports_of(build, source)
    stores = cuda_build.stores(build[1][source], build[0])
    assert set(stores) == {(report.kernel, report.architecture) for report in reports}
    for (kernel, architecture), widths in stores.items():
        if not VECTORS.search(kernel):
            continue
        least = VECTORS_STORED[NAME.search(kernel)[1]]
        bits = 64 if MIXED.search(kernel) else 128
        assert widths[bits] >= least, f"{kernel} on {architecture}: {dict(widths)}"
        assert widths[16] == 0, f"{kernel} on {architecture}: {dict(widths)}"
