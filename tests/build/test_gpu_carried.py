"""A carried native module is taken or refused with a reason, and Triton finds carried kernels in another folder."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu_carried
import pytest

ROOT = Path(__file__).parents[2]

# One kernel is compiled as `make gpu-prepare` does, packed, unpacked elsewhere, and asked for as the runtime does.
FOUND = """
import os, sys
from pathlib import Path
sys.path[:0] = ["tools", "", "tests", "tests/ops", "tests/toolkit"]
packed, unpacked = map(Path, sys.argv[1:])
os.environ["TRITON_CACHE_DIR"], os.environ["TRITON_STORE_BINARY_ONLY"] = str(packed), "1"
import gpu_carried, gpu_kernels, offline, torch
from triton import knobs
from triton.runtime import driver
from gradroute import testing
from gradroute.backends import triton as kernels

with kernels.record(90) as launches:
    testing.sample("routed_embedding", tokens=8, dtype=torch.float32).run("triton")
driver.set_active(gpu_kernels.Driver(90))
launch, hits = launches[0], []
launch.kernel.run(grid=(1,), warmup=True, **launch.arguments, **launch.config)
gpu_carried.CACHE = packed.with_suffix(".tar.xz")
gpu_carried.pack(packed)
for file in [*packed.rglob("*")]:
    if file.is_file():
        file.unlink()
gpu_carried.unpack_cache(unpacked)

os.environ["TRITON_CACHE_DIR"] = str(unpacked)
del os.environ["TRITON_STORE_BINARY_ONLY"]
knobs.compilation.listener = lambda cache_hit, **others: hits.append(cache_hit)
launch.kernel.device_caches.clear()
launch.kernel.run(grid=(1,), warmup=True, **launch.arguments, **launch.config)
print(hits)
"""


@pytest.mark.slow
def test_the_runtime_finds_a_carried_kernel_in_another_folder(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", FOUND, str(tmp_path / "packed"), str(tmp_path / "unpacked")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[True]"
    assert list((tmp_path / "unpacked").rglob("*.cubin"))


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A checkout with a carried module for this Python."""
    (tmp_path / "gradroute").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("a")
    for name, place in {"ROOT": "", "CARRIED": "build/gpu", "MODULE": "build/gpu/native"}.items():
        monkeypatch.setattr(gpu_carried, name, tmp_path / place)
    monkeypatch.setattr(gpu_carried, "BUILT", tmp_path / "build/gpu/built.json")
    gpu_carried.MODULE.mkdir(parents=True)
    gpu_carried.BUILT.write_text(json.dumps({"sources": gpu_carried.native_digest()}))
    name = f"_native{gpu_carried.asked(sys.executable, gpu_carried.ASK_PYTHON).split()[1]}"
    (gpu_carried.MODULE / name).write_text("module")
    return name


def test_a_carried_module_of_these_sources_is_taken(carried, monkeypatch):
    monkeypatch.setattr(gpu_carried, "why_not_loaded", lambda module: "")
    assert gpu_carried.take_module() == ""
    assert (gpu_carried.ROOT / "gradroute" / carried).read_text() == "module"


def test_a_carried_module_of_other_sources_is_not(carried):
    (gpu_carried.ROOT / "csrc" / "a.cpp").write_text("b")
    assert "was built from another csrc" in gpu_carried.take_module()
    assert not (gpu_carried.ROOT / "gradroute" / carried).exists()


def test_a_carried_module_that_does_not_load_is_not(carried):
    assert "does not load here: ImportError" in gpu_carried.take_module()
    assert not (gpu_carried.ROOT / "gradroute" / carried).exists()


def test_the_built_module_loads():
    built = pytest.importorskip("gradroute._native")
    assert gpu_carried.why_not_loaded(built.__file__) == ""


def test_a_module_for_another_python_is_not(carried):
    (gpu_carried.MODULE / carried).rename(gpu_carried.MODULE / "_native.cpython-27.so")
    assert f"has no {carried}" in gpu_carried.take_module()


def test_a_python_that_does_not_run_is_named():
    with pytest.raises(ValueError, match="GPU_PYTHON: no-such-python does not run"):
        gpu_carried.asked("no-such-python", "")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        gpu_carried.asked(sys.executable, "1 / 0")


def test_a_cache_has_no_intermediate_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_carried, "CACHE", tmp_path / "cache.tar.xz")
    (tmp_path / "key").mkdir()
    for name in ("a.cubin", "a.source"):
        (tmp_path / "key" / name).write_text(name)
    gpu_carried.pack(tmp_path / "key")
    with tarfile.open(gpu_carried.CACHE) as archive:
        assert [Path(name).name for name in archive.getnames() if "a." in name] == ["a.cubin"]
