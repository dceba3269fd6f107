"""What traced code cannot do itself, because torch.compile would have to look into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Read = TypeVar("Read", bound=Callable[..., Any])


def constant_when_traced(read: Read) -> Read:
    """A function that Dynamo calls once, while it traces, and whose result is a constant of the compiled code.

    As torch.compiler.assume_constant_result, which would import the compiler (and Triton) for its mark alone.
    """
    read._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return read
