"""The wheel: pure Python, kernels inside the package, nothing beside it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("gradroute", "kernels", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in the wheel that `pip wheel` builds, offline, of a copy: building writes beside the sources."""
    pytest.importorskip("setuptools", minversion="64")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    build = subprocess.run(
        [*command, "-w", "wheels", "."], cwd=folder, capture_output=True, text=True, check=False
    )
    assert build.returncode == 0, build.stderr
    (path,) = (folder / "wheels").iterdir()
    assert path.name.endswith("-py3-none-any.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_nothing_lies_beside_the_package(wheel):
    """A top-level `kernels` would shadow the package of that name on PyPI."""
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gradroute"}


def test_every_module_is_in_it(wheel):
    for folder, inside in (("gradroute", "gradroute"), ("kernels", "gradroute/kernels")):
        for source in (ROOT / folder).rglob("*.py"):
            assert f"{inside}/{source.relative_to(ROOT / folder).as_posix()}" in wheel
    assert "gradroute/py.typed" in wheel


def test_tests_and_examples_are_not(wheel):
    assert not {
        name for name in wheel if any(part in name for part in ("tests", "examples", "bench", "conftest"))
    }
    assert all(
        name.endswith(".py") or name == "gradroute/py.typed" or ".dist-info/" in name for name in wheel
    )
