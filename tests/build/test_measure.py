"""tools/measure.py on a small checkout whose numbers are counted by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "tools" / "measure.py"
SPEC = importlib.util.spec_from_file_location("measure", PATH)
measure = importlib.util.module_from_spec(SPEC)
sys.modules["measure"] = measure  # dataclasses look their module up
SPEC.loader.exec_module(measure)

PYTHON = '''"""Of what is above it."""

from typing import Any

# ----------------------------
# A comment on
# two lines.
WIDTH = 3  # of a row, "update_in"


def backward(ctx, grad: Any, *rest):
    """Give the gradients."""
    return grad, None, None  # rest


class Backward:
    def backward(self, grad):
        return (
            grad,
            None,  # routes
            None,
        )
'''
CPP = """// So many rows are read at once.
#define SKIPPED(name) name(1, 2, 3)

static int rows(const Matrix<int, 2>& x, int count) {
  if (count > 0) {
    return (count);
  }
  return other(x, 1, 2);
}
"""


@pytest.fixture
def checkout(tmp_path):
    for folder in ("gradroute", "kernels", "csrc"):
        (tmp_path / folder).mkdir()
    (tmp_path / "gradroute" / "__init__.py").write_text(PYTHON)
    (tmp_path / "csrc" / "rows.cpp").write_text(CPP)
    (tmp_path / "csrc" / "CMakeLists.txt").write_text("sources(embedding.cpp) # no update_in\n")
    (tmp_path / "kernels" / "mlp.py").write_text("def kernel(update_in, b, *, c=1, **rest):\n    pass\n")
    (tmp_path / "gradroute" / "kernels").symlink_to("../kernels")
    (tmp_path / "README.md").write_text("# Three words\n\nhere\n")
    return tmp_path


def test_the_numbers_are_those_counted_by_hand(checkout):
    rows = measure.rows(measure.Checkout(checkout))
    package = {name: one.value for name, one in rows["gradroute + kernels"].items()}
    assert package["files"] == "2"  # the link to kernels/ is not a third
    assert package["lines"] == str(len(PYTHON.splitlines()) + 2)
    assert package["lines a function, median / p90 / max"] == "3 / 3 / 6"
    assert package["arguments, median / p90 / max"] == "3 / 3 / 4"
    assert package["banner lines"] == "1"
    assert package["texts that open as a fragment"] == "2"
    assert package["Nones of a backward without a label"] == "1"
    assert package["`: Any` per 1000 lines"] == f"{1000 / (len(PYTHON.splitlines()) + 2):.1f}"
    csrc = {name: one.value for name, one in rows["csrc"].items()}
    assert csrc["lines a function, median / p90 / max"] == "6 / 6 / 6"
    assert csrc["arguments, median / p90 / max"] == "2 / 2 / 2"
    assert csrc["texts that open as a fragment"] == "1"
    assert rows["README"]["words"].value == "4"


def test_places_are_found_in_code_and_not_in_comments(checkout):
    found = measure.Checkout(checkout)
    assert measure.places_of_site(found).details == ["kernels/mlp.py"]
    assert measure.places_of_op(found).details == ["csrc/CMakeLists.txt"]


def test_long_functions_and_argument_lists_are_named(checkout):
    many = ", ".join(f"a{index}" for index in range(31))
    (checkout / "kernels" / "long.py").write_text(f"def long({many}):\n" + "    pass\n" * 60)
    package = measure.rows(measure.Checkout(checkout))["gradroute + kernels"]
    assert package["functions over 60 lines"].details == ["kernels/long.py:1 long: 61"]
    assert package["functions and kernels with over 30 arguments"].details == ["kernels/long.py:1 long: 31"]


def test_this_checkout_is_measured_and_compared_with_itself(capsys):
    root = str(PATH.parents[1])
    assert measure.main([root, root]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| files |")]
    assert lines
    assert all(line.split("|")[2] == line.split("|")[3] for line in lines)
    assert any("files that a new op touches" in name for name in measure.PLACES)


def test_what_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        measure.main([str(tmp_path)])
    assert "expected a folder with gradroute/__init__.py" in capsys.readouterr().err
