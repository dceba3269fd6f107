"""Measures a checkout of gradroute: `python tools/measure.py [CHECKOUT] [AFTER]` prints a Markdown table.

With two checkouts the table has a column for each: before and after. `--details` lists what stands behind the numbers:
the long files and functions, the long argument lists, the words to mend, and the places of every recipe.

It reads files and imports nothing of what it measures, so it measures any commit with any Python.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

CPP = {".cpp", ".cu", ".h", ".cuh", ".inc"}
SUFFIXES = {".py"} | CPP
BUILD_FILES = {".txt", ".cmake"}  # CMake's, which name the sources that they compile
NOT_SOURCES = {"__pycache__", "results"}

MOST_LINES = 600  # a file's, outside the kernels of attention
LONG_FUNCTION = 60
MOST_ARGUMENTS = 30

#: Openings with which a text needs the name above it to be understood.
FRAGMENT = re.compile(r"(of|that of|those of|so many|so much|who|whose|as in|what)\b", re.IGNORECASE)
#: Words in whose company an opening of the list begins a whole sentence.
WHOLE = re.compile(r"of course|what (is|are|does|do) .*\?|who (is|are) .*\?", re.IGNORECASE)
BANNER = re.compile(r"(#|//)\s*[-=*#/]{10,}\s*$")
ANY = re.compile(r": Any\b")


class Function(NamedTuple):
    """A function of Python, Triton or C++, where it is, and its size."""

    where: str
    name: str
    lines: int
    arguments: int


class Comment(NamedTuple):
    """A line's comment: where it begins, what it says, and whether the line has nothing else."""

    line: int
    column: int
    words: str
    alone: bool


class Text(NamedTuple):
    """A docstring or a comment: where it is, and what it says."""

    where: str
    words: str


@dataclass
class File:
    """A file of source.

    Attributes:
        path: below the checkout.
        text: as it stands on disk.
        functions: every function of it.
        texts: its docstrings and its comments; comments on successive lines are one.
        docstring_lines, comment_lines: how many of its lines have one; a comment may stand after code.
        unlabelled: the places where a backward returns a None without a comment beside it.
        code: the text without docstrings and comments.
    """

    path: Path
    text: str
    functions: list[Function] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    docstring_lines: int = 0
    comment_lines: int = 0
    unlabelled: list[str] = field(default_factory=list)
    code: str = ""

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def banners(self) -> list[str]:
        lines = enumerate(self.text.splitlines(), 1)
        return [f"{self.path}:{number}" for number, line in lines if BANNER.match(line.strip())]

    @property
    def fragments(self) -> list[str]:
        return [
            f"{text.where}: {' '.join(text.words.split())[:70]}"
            for text in self.texts
            if is_fragment(text.words)
        ]


def is_fragment(words: str) -> bool:
    """Whether a docstring or comment opens as a noun fragment."""
    return bool(FRAGMENT.match(words)) and not WHOLE.match(words)


def read(path: Path, root: Path) -> File:
    """A file of a checkout, taken apart."""
    file = File(path.relative_to(root), path.read_text(encoding="utf-8"))
    if path.suffix == ".py":
        read_python(file)
    elif path.suffix in CPP:
        read_cpp(file)
    else:
        file.code = re.sub(r"#.*", "", file.text)
    return file


def read_python(file: File) -> None:
    tree = ast.parse(file.text)
    docstrings = list(docstrings_of(tree))
    for node in docstrings:
        file.docstring_lines += length(node)
        file.texts.append(Text(f"{file.path}:{node.lineno}", str(node.value).strip()))
    comments = comments_of(file.text)
    file.comment_lines = len(comments)
    file.texts += [Text(f"{file.path}:{line}", words) for line, words in joined(comments)]
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            file.functions.append(python_function(file.path, function))
            if function.name == "backward":
                file.unlabelled += unlabelled_nones(file, function)
    file.code = without(file.text, docstrings, comments)


def length(node: ast.Constant | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many lines a node has."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def docstrings_of(tree: ast.Module) -> Iterator[ast.Constant]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            assert isinstance(statement.value, ast.Constant)
            yield statement.value


def comments_of(text: str) -> list[Comment]:
    """Every comment of Python."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [
        Comment(line, column, token.string.lstrip("#: "), not token.line[:column].strip())
        for token in tokens
        if token.type == tokenize.COMMENT
        for line, column in [token.start]
    ]


def joined(comments: Iterable[Comment]) -> list[tuple[int, str]]:
    """The comments that stand alone joined where they follow each other; the others as they are."""
    found: list[tuple[int, str]] = []
    last = -1
    for line, _, words, alone in comments:
        if alone and line == last + 1:
            first, before = found[-1]
            found[-1] = (first, f"{before} {words}")
        else:
            found.append((line, words))
        last = line if alone else -1
    return found


def python_function(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    count = len([one for one in named if one.arg not in ("self", "cls")])
    count += bool(arguments.vararg) + bool(arguments.kwarg)
    return Function(f"{path}:{node.lineno}", node.name, length(node), count)


def unlabelled_nones(file: File, backward: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    lines = file.text.splitlines()
    return [
        f"{file.path}:{part.lineno}"
        for statement in ast.walk(backward)
        if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Tuple)
        for part in statement.value.elts
        if isinstance(part, ast.Constant) and part.value is None and "#" not in lines[part.lineno - 1]
    ]


def without(text: str, docstrings: list[ast.Constant], comments: list[Comment]) -> str:
    """The text with docstrings and comments blank, and every line where it was."""
    lines: list[str] = text.splitlines()
    for node in docstrings:
        lines[node.lineno - 1 : node.lineno - 1 + length(node)] = [""] * length(node)
    for comment in comments:
        lines[comment.line - 1] = lines[comment.line - 1][: comment.column]
    return "\n".join(lines)


CPP_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
CPP_HEAD = re.compile(r"([~\w]+|operator\S+)\s*\(")
NO_FUNCTIONS = {"if", "for", "while", "switch", "return", "catch", "sizeof", "alignof", "decltype", "defined"}


def read_cpp(file: File) -> None:
    comments = []
    for number, line in enumerate(file.text.splitlines(), 1):
        match = re.search(r"(?<![:\"])//\s?(.*)", line)
        if match:
            alone = not line[: match.start()].strip()
            comments.append(Comment(number, match.start(), match[1], alone))
    file.comment_lines = len(comments)
    file.texts = [Text(f"{file.path}:{line}", words) for line, words in joined(comments)]
    file.code = CPP_COMMENT.sub(lambda match: "\n" * match[0].count("\n"), file.text)
    file.functions = list(cpp_functions(file.path, without_directives(file.code)))


def without_directives(code: str) -> str:
    """The code without lines of the preprocessor and their continuations, which have other rules."""
    kept, continues = [], False
    for line in code.splitlines():
        directive = continues or line.lstrip().startswith("#")
        kept.append("" if directive else line)
        continues = directive and line.endswith("\\")
    return "\n".join(kept)


def cpp_functions(path: Path, code: str) -> Iterator[Function]:
    """Functions that are defined, and those that are declared by a type, a name and arguments."""
    for match in CPP_HEAD.finditer(code):
        name, before = match[1], code[: match.start()].rstrip()
        if name in NO_FUNCTIONS or not re.search(r"[\w>&*\]]$", before) or before.endswith("return"):
            continue
        stop = closing(code, match.end() - 1)
        after = re.match(r"\s*(const|noexcept|\s|->\s*[\w:<>]+)*([{;:])", code[stop + 1 :])
        if after is None or (after[2] != "{" and path.suffix != ".inc"):
            continue
        end = closing(code, stop + 1 + after.end() - 1) if after[2] == "{" else stop
        line = code.count("\n", 0, match.start()) + 1
        arguments = split_arguments(code[match.end() : stop])
        yield Function(f"{path}:{line}", name, code.count("\n", match.start(), end) + 1, arguments)


def closing(code: str, start: int) -> int:
    """The index of the bracket that closes the one at `start`."""
    opening, depth = code[start], 0
    other = {"(": ")", "{": "}"}[opening]
    for index in range(start, len(code)):
        depth += (code[index] == opening) - (code[index] == other)
        if depth == 0:
            return index
    return len(code) - 1


def split_arguments(text: str) -> int:
    """How many arguments a list has: commas outside of brackets, and one."""
    depth = commas = 0
    for character in text:
        depth += (character in "(<[{") - (character in ")>]}")
        commas += character == "," and depth == 0
    return commas + 1 if text.strip() and text.strip() != "void" else 0


class Checkout:
    """The sources of a checkout, by folder."""

    def __init__(self, root: Path) -> None:
        if not (root / "gradroute" / "__init__.py").is_file():
            raise ValueError(f"checkout: got {root}, expected a folder with gradroute/__init__.py")
        self.root = root
        self._folders: dict[str, list[File]] = {}

    def files(self, *folders: str) -> list[File]:
        return [file for folder in folders for file in self._folder(folder)]

    def _folder(self, folder: str) -> list[File]:
        if folder not in self._folders:
            paths = sorted(self._paths(self.root / folder))
            self._folders[folder] = [read(path, self.root) for path in paths]
        return self._folders[folder]

    def _paths(self, folder: Path) -> Iterator[Path]:
        """Sources below a folder; a link, such as gradroute/kernels, is counted where it leads to."""
        if folder.is_symlink() or not folder.is_dir():
            return
        for path in folder.iterdir():
            if path.is_dir():
                is_output = path == self.root / "build" or path.name in NOT_SOURCES
                if not is_output and not path.name.startswith("."):
                    yield from self._paths(path)
            elif path.suffix in SUFFIXES | BUILD_FILES:
                yield path

    @cached_property
    def readme(self) -> str:
        return (self.root / "README.md").read_text(encoding="utf-8")


def is_source(file: File) -> bool:
    return file.path.suffix in SUFFIXES


def spread(numbers: Iterable[int]) -> str:
    """Median, 90th percentile and maximum."""
    ordered = sorted(numbers)
    if not ordered:
        return "–"
    return " / ".join(str(ordered[int(share * (len(ordered) - 1))]) for share in (0.5, 0.9, 1.0))


class Measurement(NamedTuple):
    """A row of the table: its value, and what stands behind it where there is more to say."""

    value: str
    details: Sequence[str] = ()


def counted(found: Sequence[str]) -> Measurement:
    return Measurement(str(len(found)), found)


def long_files(files: list[File]) -> list[str]:
    exempt = ("kernels/attention", "gradroute/kernels/attention")
    return [
        f"{file.path}: {file.lines}"
        for file in files
        if file.lines > MOST_LINES and not str(file.path.with_suffix("")).startswith(exempt)
    ]


def functions_over(files: list[File], size: Callable[[Function], int], most: int) -> list[str]:
    found = [one for file in files for one in file.functions if size(one) > most]
    return [f"{one.where} {one.name}: {size(one)}" for one in sorted(found, key=size, reverse=True)]


def rate(count: int, files: list[File]) -> str:
    lines = sum(file.lines for file in files)
    return f"{1000 * count / lines:.1f}" if lines else "–"


def share(count: int, files: list[File]) -> str:
    lines = sum(file.lines for file in files)
    return f"{100 * count / lines:.1f} %" if lines else "–"


def measure(files: list[File]) -> dict[str, Measurement]:
    """The rows of a group of files."""
    files = [file for file in files if is_source(file)]
    functions = [one for file in files for one in file.functions]
    of_any = [
        f"{file.path}:{number}"
        for file in files
        for number, line in enumerate(file.text.splitlines(), 1)
        if ANY.search(line)
    ]
    folders = {str(file.path.parent) for file in files}
    return {
        "files": Measurement(str(len(files))),
        "lines": Measurement(str(sum(file.lines for file in files))),
        "directories": Measurement(str(len(folders)), sorted(folders)),
        "lines a file, median / p90 / max": Measurement(spread(file.lines for file in files)),
        f"files over {MOST_LINES} lines outside kernels/attention": counted(long_files(files)),
        "lines a function, median / p90 / max": Measurement(spread(one.lines for one in functions)),
        f"functions over {LONG_FUNCTION} lines": counted(
            functions_over(files, lambda one: one.lines, LONG_FUNCTION)
        ),
        "arguments, median / p90 / max": Measurement(spread(one.arguments for one in functions)),
        f"functions and kernels with over {MOST_ARGUMENTS} arguments": counted(
            functions_over(files, lambda one: one.arguments, MOST_ARGUMENTS)
        ),
        "docstrings, share of lines": Measurement(share(sum(file.docstring_lines for file in files), files)),
        "comments, share of lines": Measurement(share(sum(file.comment_lines for file in files), files)),
        "`: Any` per 1000 lines": Measurement(rate(len(of_any), files), of_any),
        "Nones of a backward without a label": counted([one for file in files for one in file.unlabelled]),
        "banner lines": counted([one for file in files for one in file.banners]),
        "texts that open as a fragment": counted([one for file in files for one in file.fragments]),
    }


#: What uses an op or a site that exists, and would be written after it, if at all.
USERS = ("gradroute/layers", "gradroute/models", "gradroute/optim")


def naming(checkout: Checkout, pattern: str, folders: Sequence[str], aside: Sequence[str] = ()) -> list[str]:
    """Files whose code, comments and docstrings aside, names what a pattern says, or whose own name is of it."""
    compiled = re.compile(pattern)
    return [
        str(file.path)
        for file in checkout.files(*folders)
        if not str(file.path).startswith(tuple(aside)) and compiled.search(file.code)
    ]


PRODUCT = ("gradroute", "kernels", "csrc", "bench")


def places_of_op(checkout: Checkout) -> Measurement:
    """Files that name the op; those that bear its stem are new for a new op, and the others are edited."""
    pattern = (
        r"\b(routed_embedding|EmbeddingSites|EmbeddingFunction|embedding_backward|embedding\.(cpp|cu)\b)"
    )
    found = naming(checkout, pattern, PRODUCT, USERS)
    own = sum(Path(file).stem == "embedding" for file in found)
    return Measurement(f"{len(found)}: {own} new, {len(found) - own} edited", found)


def places_of_site(checkout: Checkout) -> Measurement:
    return counted(naming(checkout, r"\bupdate_in\b", PRODUCT, USERS))


def places_of_backend(checkout: Checkout) -> Measurement:
    """Lines of the package, outside of the backend's own files, that name it."""
    own = re.compile(r"(^|/)(triton|kernels)(/|\.py$)")
    found = [
        f"{file.path}:{number}"
        for file in checkout.files("gradroute")
        if not own.search(str(file.path))
        for number, line in enumerate(file.code.splitlines(), 1)
        if re.search(r"""["']triton["']|\btriton_kernels\b|gradroute\.kernels["']""", line)
        and "version(" not in line
    ]
    files = {place.rpartition(":")[0] for place in found}
    value = f"{len(found)} lines in {len(files)} files; {number_of_primitives(checkout)} primitives"
    return Measurement(value, found)


def number_of_primitives(checkout: Checkout) -> int:
    """How many functions a backend implements: the methods of the Protocol, else what kernels/ lists."""
    tree = [
        node
        for file in checkout.files("gradroute", "kernels")
        if file.path.name in ("protocol.py", "__init__.py")
        for node in ast.walk(ast.parse(file.text))
    ]
    for node in tree:
        if isinstance(node, ast.ClassDef) and node.name == "Primitives":
            return sum(isinstance(one, ast.FunctionDef) for one in node.body)
    init = checkout.root / "kernels" / "__init__.py"
    names = re.findall(r'^    "(\w+)",$', init.read_text(encoding="utf-8"), re.M) if init.exists() else []
    return len(names)


def places_of_architecture(checkout: Checkout) -> Measurement:
    found = naming(checkout, r"GPTNeo|gpt_neo", ("gradroute",))
    zoo = [one for one in naming(checkout, r"GPTNeo|gpt_neo", ("tests",)) if one.endswith("model_zoo.py")]
    return counted(found + zoo)


PLACES: dict[str, Callable[[Checkout], Measurement]] = {
    "files that a new op touches": places_of_op,
    "files that a new site touches": places_of_site,
    "places that a new backend touches": places_of_backend,
    "files that a new architecture touches": places_of_architecture,
}
RULES = """\
A place to touch for something new is a place that names something like it, which exists; comments and docstrings are no
places, and tests find by themselves what is new, but for an architecture's tiny model.
- op: `routed_embedding`, its sites, Function and primitive, and its stem in the build: the files of gradroute, kernels,
  csrc and bench that name one, without those that use the op (layers, models, optim); new ones bear its stem.
- site: `update_in`, of the MLPs: likewise.
- backend: `triton`: the lines of the package that name it, outside of kernels/ and of files of that name; and the
  primitives that it has to implement.
- architecture: GPT-Neo: the files of the package that name it, and its entry in the zoo of tests."""


GROUPS = {
    "gradroute + kernels": ("gradroute", "kernels"),
    "csrc": ("csrc",),
    "bench": ("bench",),
    "examples": ("examples",),
    "tests": ("tests",),
}


def rows(checkout: Checkout) -> dict[str, dict[str, Measurement]]:
    """Everything, by group."""
    found = {group: measure(checkout.files(*folders)) for group, folders in GROUPS.items()}
    found["README"] = {
        "lines": Measurement(str(len(checkout.readme.splitlines()))),
        "words": Measurement(str(len(checkout.readme.split()))),
    }
    found["places to touch"] = {name: count(checkout) for name, count in PLACES.items()}
    return found


def is_empty(values: Sequence[Measurement]) -> bool:
    return all(one.value in ("0", "–", "0.0", "0.0 %") for one in values)


def report(checkouts: Sequence[Checkout], names: Sequence[str]) -> str:
    """A Markdown table with a column for each checkout; rows that are empty in all are left out."""
    measured = [rows(checkout) for checkout in checkouts]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for group in measured[0]:
        lines.append(f"| **{group}** |" + " |" * len(names))
        for name in measured[0][group]:
            values = [one[group][name] for one in measured]
            if not is_empty(values):
                lines.append(f"| {name} | " + " | ".join(one.value for one in values) + " |")
    return "\n".join([*lines, "", RULES])


def details(checkout: Checkout, name: str) -> str:
    lines = [f"## {name}"]
    for group, of_group in rows(checkout).items():
        for row, measurement in of_group.items():
            if measurement.details:
                lines += ["", f"{group}, {row}:", *(f"- {one}" for one in measurement.details)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "checkouts", nargs="*", type=Path, metavar="CHECKOUT", help="one, or before and after"
    )
    parser.add_argument("--details", action="store_true", help="also list what stands behind the numbers")
    chosen = parser.parse_args(arguments)
    paths = chosen.checkouts or [Path(__file__).parent.parent]
    if len(paths) > 2:
        parser.error(f"CHECKOUT: got {len(paths)}, expected one or two")
    try:
        checkouts = [Checkout(path) for path in paths]
    except ValueError as error:
        parser.error(str(error))
    names = ["now"] if len(paths) == 1 else ["before", "after"]
    print(report(checkouts, names))
    if chosen.details:
        for checkout, name in zip(checkouts, names, strict=True):
            print("\n" + details(checkout, name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
