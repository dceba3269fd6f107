"""bench/sources.py: the commit of a checkout, and of a copy without git that carries it along."""

import json
import shutil
import subprocess

import pytest

from bench import sources


@pytest.fixture
def checkout(tmp_path):
    """A checkout with two files of sources and one of results, all committed."""
    root = tmp_path / "checkout"
    for name in ("gradroute/a.py", "kernels/b.py", "bench/results/cpu.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".gitignore").write_text("/build/\n*.so\n__pycache__/\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "first")
    return root


@pytest.fixture
def copy(checkout, tmp_path):
    """The same without git, with the file that is carried along."""
    carried = checkout / sources.CARRIED
    carried.parent.mkdir(parents=True)
    carried.write_text(json.dumps(sources.description(checkout)))
    return shutil.copytree(checkout, tmp_path / "copy", ignore=shutil.ignore_patterns(".git"))


def git(root, *arguments):
    subprocess.run(["git", "-C", root, *arguments], check=True)


def test_a_checkout_knows_its_commit_and_whether_its_sources_are_unchanged(checkout):
    known = sources.commit(checkout)
    assert (known["commit"], known["clean"]) == (sources.git("rev-parse", "HEAD", root=checkout), True)
    assert "without_commit" not in known
    (checkout / "bench" / "results" / "cpu.json").write_text("new")
    (checkout / "gradroute" / "_native.so").write_text("built")
    assert sources.commit(checkout) == known
    (checkout / "kernels" / "b.py").write_text("changed")
    changed = sources.commit(checkout)
    assert (changed["commit"], changed["clean"]) == (known["commit"], False)
    assert changed["sources"] != known["sources"]


def test_a_copy_without_git_has_the_carried_commit(checkout, copy):
    assert sources.commit(copy) == sources.commit(checkout)


@pytest.mark.parametrize("path", ["kernels/b.py", "kernels/new.py"])
def test_a_copy_of_other_sources_has_no_commit_and_says_why(copy, path):
    before = sources.commit(copy)["sources"]
    (copy / path).write_text("changed")
    known = sources.commit(copy)
    assert (known["commit"], known["clean"]) == (None, None)
    assert known["without_commit"].endswith(f"1 files differ, first {path}")
    assert known["sources"] != before


@pytest.mark.parametrize(
    ("text", "says"), [("{", "is damaged"), ("[]", "is damaged"), (None, "neither git nor")]
)
def test_a_copy_without_a_sound_file_says_so(copy, text, says):
    if text is None:
        (copy / sources.CARRIED).unlink()
    else:
        (copy / sources.CARRIED).write_text(text)
    known = sources.commit(copy)
    assert known["commit"] is None
    assert says in known["without_commit"]


def test_what_is_no_checkout_cannot_be_described(copy):
    with pytest.raises(ValueError, match="not the top of a git checkout"):
        sources.description(copy)


def test_a_link_to_a_folder_is_not_followed(checkout):
    before = sources.digests(("gradroute",), checkout)
    (checkout / "gradroute" / "kernels").symlink_to("../kernels")
    assert sources.digests(("gradroute",), checkout) == before
