"""Every folder of tests is collected: pytest leaves some names out without a word."""

import fnmatch
from pathlib import Path


def test_no_folder_of_tests_is_left_out(pytestconfig):
    left_out = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in Path(__file__).parent.rglob("test_*.py")}
    assert {"build", "ops"} <= {folder.name for folder in folders}
    for folder in folders:
        assert not any(fnmatch.fnmatch(folder.name, pattern) for pattern in left_out), folder
