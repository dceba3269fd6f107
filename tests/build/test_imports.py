"""No module of gradroute imports, however indirectly, a module that imports it: read from the source, nothing is run.

Imports inside of functions count too, because a circle that is only put off is still one; imports for type checkers
alone do not. A package's `__init__` is a module of its own, which re-exports: importing a submodule is not importing
its package, so that a package may re-export what is built on its submodules.
"""

import ast
import os
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "gradroute"


# Commands stand above everything, though they lie beside what the choice of a backend reads.
COMMANDS = ("gradroute.machine.check", "gradroute.machine.report", "gradroute.machine.tune")


def room_of(name):
    """What a module counts as where packages are compared: a command, or what stands directly in gradroute."""
    return next(
        (room for room in COMMANDS if f"{name}.".startswith(f"{room}.")), ".".join(name.split(".")[:2])
    )


def modules_of(package):
    """The dotted name of every module → its file. `gradroute/kernels` is a link, and its modules count."""
    modules = {}
    for folder, _, files in os.walk(package, followlinks=True):
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            names = path.relative_to(package.parent).with_suffix("").parts
            modules[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return modules


def imports_of(tree):
    """The import statements of a module, at any depth, but those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.orelse:
                yield from imports_of(ast.Module([statement], []))
        else:
            yield from imports_of(node)


def targets_of(node, name, is_package):
    """The dotted names that an import statement of the module `name` may mean, each as (module, name in it)."""
    if isinstance(node, ast.Import):
        return [(alias.name, None) for alias in node.names]
    base = name.split(".") if is_package else name.split(".")[:-1]
    base = base[: len(base) - node.level + 1] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    return [(module, alias.name) for alias in node.names]


def graph_of(package):
    """Every module → the modules that it imports, each with the line."""
    modules = modules_of(package)
    graph = {}
    for name, path in modules.items():
        edges = graph.setdefault(name, {})
        for node in imports_of(ast.parse(path.read_text())):
            for module, member in targets_of(node, name, path.name == "__init__.py"):
                whole = f"{module}.{member}" in modules
                target = f"{module}.{member}" if whole else module
                # A backend hands itself, or the package that it is in, to the algorithms that it shares with others.
                if target in modules and not (whole and f"{name}.".startswith(f"{target}.")):
                    edges.setdefault(target, node.lineno)
    return graph


def circle_in(graph):
    """Modules, the first one again as the last, each of which imports the next; None where there are none."""
    done = set()

    def search(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in graph.get(name, ()):
            if found := search(target, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in graph if (found := search(name, []))), None)


def test_no_module_imports_itself_through_others():
    graph = graph_of(PACKAGE)
    assert len(graph) > 80, "the walk has lost most of the package"
    assert sum(map(len, graph.values())) > 200, "the imports are not understood any more"
    circle = circle_in(graph)
    assert circle is None, " → ".join(
        f"{name} (line {graph[name].get(target)})" for name, target in pairwise(circle or ())
    )


def test_no_package_imports_itself_through_others():
    """The same for rooms, see room_of, but for what an `__init__` re-exports."""
    rooms = {}
    modules = modules_of(PACKAGE)
    for name, targets in graph_of(PACKAGE).items():
        if modules[name].name != "__init__.py":
            room, *others = map(room_of, (name, *targets))
            rooms.setdefault(room, {}).update(dict.fromkeys(other for other in others if other != room))
    assert "gradroute.models" in rooms["gradroute.era"], "rooms are not understood any more"
    assert circle_in(rooms) is None


@pytest.mark.parametrize(
    ("a", "b", "circle"),
    [
        ("from . import b", "from .a import x", True),
        ("import pack.b", "def f():\n    from .a import x", True),
        ("from pack.b import x", "class A:\n    if True:\n        from pack import a", True),
        ("from .b import x", "if TYPE_CHECKING:\n    from .a import x", False),
        ("from .b import x", "if typing.TYPE_CHECKING:\n    pass\nelse:\n    from .a import x", True),
        ("from .b import x", "from . import c", False),
        ("from . import sub", "x = 1", True),
        ("from . import a", "x = 1", False),
    ],
    ids=[
        "relative",
        "in a function",
        "in a class",
        "for types",
        "else",
        "none",
        "package and submodule",
        "itself",
    ],
)
def test_circles_are_found(tmp_path, a, b, circle):
    files = {"__init__": "", "a": a, "b": b, "c": "", "sub/__init__": "from .inner import x"}
    files["sub/inner"] = "from ..a import x"
    for name, text in files.items():
        path = tmp_path / "pack" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = circle_in(graph_of(tmp_path / "pack"))
    assert (found is not None) == circle
    if found:
        assert found[0] == found[-1]
        assert {"pack.a"} < set(found)
