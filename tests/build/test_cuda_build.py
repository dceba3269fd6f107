"""Every CUDA kernel, as shipped, compiles for every architecture without spills and within its shared memory."""

import cuda_build
import pytest

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100"}

# The limit of a block that asks for no more, which no launcher does: so dynamic shared memory is within it, too.
SHARED_MEMORY = 48 * 1024

needs_compiler = pytest.mark.skipif(
    bool(cuda_build.missing_tools()),
    reason=f"no {', '.join(cuda_build.missing_tools())} to compile CUDA with",
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The folder of a configured build, and its commands by source."""
    folder = tmp_path_factory.mktemp("cuda_build")
    return folder, cuda_build.commands(folder)


def test_no_launcher_asks_for_more_shared_memory():
    for source in [*cuda_build.CSRC.glob("*.cu"), *cuda_build.CSRC.glob("*.cuh")]:
        assert "cudaFuncSetAttribute" not in source.read_text(), source.name


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(path.name for path in cuda_build.CSRC.glob("*.cu")))
def test_no_kernel_spills_or_exceeds_shared_memory(build, source):
    folder, commands = build
    reports = cuda_build.compiled(commands[source], folder)
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
