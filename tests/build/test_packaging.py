"""The wheel: with the native module, pure Python without a toolchain, and what building says when it cannot."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    "csrc",
    "gradroute",
    "kernels",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
# What of the package is no Python.
DATA = {
    f"gradroute/{name}"
    for name in (
        "py.typed",
        "setups.json",
        "recipes/report/page.html",
        "recipes/configs/plan_llama_8b.yaml",
        "recipes/configs/plan_neox_6.9b.yaml",
        "recipes/configs/plan_qwen3_moe_30b.yaml",
        "recipes/configs/unlearn_smollm2.yaml",
    )
}
NO_COMPILER = {"CXX": "/nonexistent/c++"}
NO_NVCC = {"CMAKE_ARGS": "-DGRADROUTE_NVCC=0"}  # csrc/cuda.cmake looks for it, in system folders too
# An unoptimised build takes half the time.
QUICK = {"GRADROUTE_CUDA": "0", "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Debug"}


def load(path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load(ROOT / "setup.py")
check_wheel = load(ROOT / ".ci" / "check_wheel.py")
needs_toolchain = pytest.mark.skipif(bool(setup.missing_tools()), reason="there is no C++ toolchain")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy: building writes beside the sources."""
    folder = tmp_path_factory.mktemp("sources")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(sources, to, **environment):
    """`pip wheel`, offline: the process, with what it said on one line in `said`."""
    pytest.importorskip("setuptools", minversion="64")
    named = {name for name in os.environ if re.match("GRADROUTE_|CMAKE_|CUDA|CXX|MAX_JOBS", name)}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "-w", str(to), "."],
        cwd=sources,
        env={name: value for name, value in os.environ.items() if name not in named} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    done.said = " ".join(done.stdout.split())
    return done


def built(sources, to, **environment):
    """The wheel of a build that succeeds, and what was said."""
    done = build(sources, to, **environment)
    assert done.returncode == 0, done.stdout
    (wheel,) = to.iterdir()
    return wheel, done.said


# Pure Python


@pytest.fixture(scope="module")
def pure(sources, tmp_path_factory):
    """The names in the wheel of a machine without a C++ compiler, and what building it said."""
    wheel, said = built(sources, tmp_path_factory.mktemp("pure"), **NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl")
    return set(zipfile.ZipFile(wheel).namelist()), said


def test_nothing_lies_beside_the_package(pure):
    """A top-level `kernels` would shadow the package of that name on PyPI."""
    tops = {name.split("/")[0] for name in pure[0]}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gradroute"}


def test_every_module_is_in_it(pure):
    for folder, inside in (("gradroute", "gradroute"), ("kernels", "gradroute/kernels")):
        for source in (ROOT / folder).rglob("*.py"):
            assert f"{inside}/{source.relative_to(ROOT / folder).as_posix()}" in pure[0]
    assert set(pure[0]) >= DATA


def test_tests_examples_and_sources_are_not(pure):
    unwanted = ("tests", "examples", "bench", "conftest", "csrc")
    assert not {name for name in pure[0] if any(part in name for part in unwanted)}
    assert all(name.endswith(".py") or name in DATA or ".dist-info/" in name for name in pure[0])


def test_without_a_compiler_one_warning_says_what_that_costs(pure):
    assert pure[1].count("gradroute: WARNING") == 1
    assert (
        "gradroute: WARNING: pure Python only, without the backends cpu and cuda, because this machine lacks a C++ "
        "compiler (/nonexistent/c++)."
    ) in pure[1]


def test_pure_python_on_purpose_is_silent(sources, tmp_path):
    wheel, said = built(sources, tmp_path, GRADROUTE_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "WARNING" not in said


# Refusals


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            NO_COMPILER | {"GRADROUTE_CUDA": "1"},
            "the native module is required, but this machine lacks a C++ compiler",
        ),
        (
            NO_COMPILER | {"GRADROUTE_NATIVE": "1"},
            "the native module is required, but this machine lacks a C++ compiler",
        ),
        (
            {"GRADROUTE_CUDA": "1", "GRADROUTE_NATIVE": "0"},
            "GRADROUTE_CUDA=1 contradicts GRADROUTE_NATIVE=0",
        ),
        (
            {"GRADROUTE_CUDA": "yes"},
            "GRADROUTE_CUDA: got 'yes', expected 1 (required), 0 (left out), auto or nothing",
        ),
    ],
)
def test_what_cannot_be_honoured_is_an_error(sources, tmp_path, environment, message):
    done = build(sources, tmp_path, **environment)
    assert done.returncode != 0
    assert f"gradroute: {message}" in done.said


@needs_toolchain
def test_cuda_that_is_required_without_nvcc_is_an_error(sources, tmp_path):
    done = build(sources, tmp_path, **NO_NVCC, GRADROUTE_CUDA="1")
    assert done.returncode != 0
    assert "GRADROUTE_CUDA=1, but no nvcc was found" in done.said


@needs_toolchain
def test_a_compile_error_is_loud(sources, tmp_path):
    """Never a wheel without what was meant to be in it."""
    broken = shutil.copytree(sources, tmp_path / "broken")
    for source in broken.glob("csrc/*.cpp"):
        source.write_text("#error a mistake\n", encoding="utf-8")
    done = build(broken, tmp_path / "wheels", **QUICK)
    assert done.returncode != 0
    assert "error: #error a mistake" in done.said
    assert "GRADROUTE_NATIVE=0 all of it (backends cpu and cuda)" in done.said


# The native module


@pytest.fixture(scope="module")
def native_wheel(sources, tmp_path_factory):
    """A wheel with CPU kernels, and what building it said."""
    return built(sources, tmp_path_factory.mktemp("native"), **QUICK)


@pytest.mark.slow
@needs_toolchain
def test_native_wheel(native_wheel, tmp_path):
    wheel, said = native_wheel
    assert "WARNING" not in said
    assert "Deprecat" not in said
    python, platform = f"cp{sys.version_info[0]}{sys.version_info[1]}", sysconfig.get_platform()
    tag = f"{python}-{python}-{platform.replace('-', '_').replace('.', '_')}"
    assert wheel.stem.endswith(f"-{tag}")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if not name.endswith(".py") and "_native" in name)
        assert name == f"gradroute/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        archive.extract(name, tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'gradroute')!r}); import _native; print(_native.BUILD)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert '"cuda": ""' in run.stdout, run.stderr
    check_wheel.check_links(tmp_path / name, wheel)


@pytest.mark.slow
@needs_toolchain
@pytest.mark.skipif(setup.find_tool("ninja") is None, reason="there is no ninja, which says what it compiles")
def test_another_installation_compiles_nothing_again(sources, native_wheel, tmp_path):
    """pip's build isolation installs pybind11 elsewhere each time: here it is a copy in a new folder."""
    assert "Building CXX object" in native_wheel[1]
    package = Path(importlib.util.find_spec("pybind11").origin).parent
    shutil.copytree(package, tmp_path / "isolated" / "pybind11")
    _, said = built(sources, tmp_path / "wheels", PYTHONPATH=str(tmp_path / "isolated"), **QUICK)
    assert f"{tmp_path}/isolated" in said
    assert "Building CXX object" not in said
    assert "no work to do" in said


@pytest.mark.parametrize(
    ("environment", "device", "asked"),
    [
        ({}, False, "OFF"),
        ({}, True, "AUTO"),
        ({"CIBUILDWHEEL": "1"}, False, "AUTO"),
        ({"GRADROUTE_CUDA": "auto"}, False, "AUTO"),
        ({"GRADROUTE_CUDA": "1"}, False, "ON"),
        ({"GRADROUTE_CUDA": "0", "CIBUILDWHEEL": "1"}, True, "OFF"),
    ],
)
def test_cuda_is_compiled_for_a_device_and_for_wheels(monkeypatch, environment, device, asked):
    for name in ("CIBUILDWHEEL", "GRADROUTE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setup, "sees_cuda_device", lambda: device)
    assert setup.cuda() == asked


def test_a_device_is_seen_where_torch_sees_one():
    torch = pytest.importorskip("torch")
    assert setup.sees_cuda_device() == torch.cuda.is_available()


def test_check_wheel_takes_the_newest_wheel_of_this_python(tmp_path):
    own = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    with pytest.raises(SystemExit, match=f"dist/ has a wheel for {own}; make wheel builds one"):
        check_wheel.newest_wheel(tmp_path)
    for age, tag in enumerate([f"{own}-{own}-linux_x86_64", "cp399-cp399-linux_x86_64"], start=1):
        (tmp_path / f"gradroute-0.1.0-{tag}.whl").touch()
        os.utime(tmp_path / f"gradroute-0.1.0-{tag}.whl", (age, age))
    assert check_wheel.newest_wheel(tmp_path).name == f"gradroute-0.1.0-{own}-{own}-linux_x86_64.whl"
    (tmp_path / "gradroute-0.1.0-py3-none-any.whl").touch()
    assert check_wheel.newest_wheel(tmp_path).name == "gradroute-0.1.0-py3-none-any.whl"


# The mistakes that `make check-wheel` finds

USES_TORCH = 'namespace c10 { void warn(int); }\nextern "C" void f() { c10::warn(1); }\n'


@needs_toolchain
def test_check_wheel_notices_symbols_of_torch(tmp_path):
    source, library = tmp_path / "uses.cpp", tmp_path / "uses.so"
    source.write_text(USES_TORCH, encoding="utf-8")
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", library], check=True)
    with pytest.raises(
        SystemExit, match=r"FAILED: \d+ symbols are undefined, none of torch or CUDA: .*c10::warn"
    ):
        check_wheel.check_links(library, library)


@needs_toolchain
def test_check_wheel_notices_libraries_of_torch(tmp_path):
    source, library, user = tmp_path / "uses.cpp", tmp_path / "libc10.so", tmp_path / "uses.so"
    source.write_text("void f() {}\n", encoding="utf-8")
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", library, "-Wl,-soname,libc10.so"], check=True)
    link = ["-Wl,--no-as-needed", f"-L{tmp_path}", "-lc10"]
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", user, *link], check=True)
    with pytest.raises(
        SystemExit, match=r"FAILED: it needs the runtimes of C, C\+\+ and OpenMP only: .*libc10\.so"
    ):
        check_wheel.check_links(user, user)


# How many compilers run at once

GIB = 1 << 30


def fake_machine(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


MEMINFO = "MemTotal:       65011712 kB\nMemAvailable:   33554432 kB\n"  # 32 GiB are free


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"}, 32),
        (  # version 2: the tightest group around the process counts
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/jobs/one\n",
                "sys/fs/cgroup/jobs/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/jobs/one/memory.max": "max\n",
            },
            8,
        ),
        (  # version 1, in a container that sees its own group as the root
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "5:cpu:/one\n4:memory:/one\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
            },
            4,
        ),
    ],
)
def test_available_memory(tmp_path, files, gib):
    assert setup.available_memory(fake_machine(tmp_path, files)) == gib * GIB


def test_available_memory_is_unknown_without_proc(tmp_path):
    assert setup.available_memory(tmp_path) is None


@pytest.mark.parametrize(
    ("asked", "memory", "jobs"),
    [("64", 8 * GIB, 8), ("4", 8 * GIB, 4), ("64", GIB // 2, 1), ("64", None, 64)],
)
def test_jobs_are_capped_by_memory(monkeypatch, asked, memory, jobs):
    monkeypatch.setenv("MAX_JOBS", asked)
    monkeypatch.setattr(setup, "available_memory", lambda: memory)
    assert setup.jobs() == jobs


def test_jobs_without_max_jobs_are_those_of_the_cores(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(setup, "available_memory", lambda: None)
    assert 1 <= setup.jobs() <= os.cpu_count()


@pytest.mark.parametrize("asked", ["0", "-1", "many"])
def test_max_jobs_that_is_no_number(monkeypatch, asked):
    monkeypatch.setenv("MAX_JOBS", asked)
    with pytest.raises(setup.CompileError, match=f"MAX_JOBS: got '{asked}', expected a positive number"):
        setup.jobs()


# cibuildwheel


def test_cibuildwheel_builds_every_supported_python():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheels = project["tool"]["cibuildwheel"]
    minors = re.fullmatch(r"cp3\{([\d,]+)\}-manylinux_\*", wheels["build"])[1].split(",")
    claimed = re.findall(r"Python :: 3\.(\d+)", "\n".join(project["project"]["classifiers"]))
    assert minors == claimed
    assert wheels["linux"]["archs"] == ["x86_64", "aarch64"]
    assert wheels["manylinux-x86_64-image"] == wheels["manylinux-aarch64-image"] == "manylinux_2_28"
    # A vendored copy would be a second OpenMP runtime beside torch's.
    assert "--exclude libgomp.so.1" in wheels["linux"]["repair-wheel-command"]
