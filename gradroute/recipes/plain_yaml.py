"""YAML as its version 1.2 reads it: `on`, `no` and dates are strings, 1e-5 is a number, and no key stands twice."""

from __future__ import annotations

import functools
import re
from typing import Any, ClassVar

_WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?\d+|0x[\da-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
_TAG = "tag:yaml.org,2002:"


def parse(text: str) -> Any:
    """The plain values of a text in YAML or JSON.

    Raises:
        ValueError: it is neither, or a mapping has a key twice.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_classes()[0])
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def dump(values: Any) -> str:
    """Plain values as a text in YAML, in their order; `parse` is the way back."""
    import yaml

    return str(yaml.dump(values, Dumper=_classes()[1], sort_keys=False, allow_unicode=True, width=110))


@functools.cache
def _classes() -> tuple[Any, Any]:
    """PyYAML's safe loader and dumper, with the words above in place of those of YAML 1.1."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: list[Any] = []
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                name = key.value if isinstance(key, yaml.ScalarNode) else None
                if name is not None and (key.tag, name) in seen:
                    raise ValueError(f"the key {name} stands there twice, line {key.start_mark.line + 1}")
                seen.append((key.tag, name))
            return super().construct_mapping(node, deep)

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def ignore_aliases(self, data: Any) -> bool:
            return True

    for made in (Loader, Dumper):
        for name, (words, first) in _WORDS.items():
            made.add_implicit_resolver(_TAG + name, re.compile(f"^(?:{words})$"), first)
    return Loader, Dumper
