"""Calls in CUDA graphs, and on a stream beside a busy one.

What needs the device is `captured` and `beside_a_busy_stream`; the rest is the same for any way to make a call again,
and tests do it without a device. Neither has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ...testing import Result, assert_same_bits
from .buffers import NAN, Guards
from .trials import Trial

#: (call, device) → the result that it leaves in the same memory every time, and a function that leaves it there.
Capture = Callable[[Callable[[], Result], torch.device], tuple[Result, Callable[[], None]]]
Beside = Callable[[torch.device], AbstractContextManager[None]]

# How long the default stream is kept busy: about 0.05 s of a GPU's clock.
BUSY_CYCLES = 10**8


def captured(step: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]]:
    """Captures a call in a CUDA graph, after a call outside of it, as torch.cuda.graph asks for."""
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        step()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return result, graph.replay


@contextmanager
def beside_a_busy_stream(device: torch.device) -> Iterator[None]:
    """Within it a new stream is current, and the one that was current before has long work to do."""
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    torch.cuda._sleep(BUSY_CYCLES)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def check_graph(trials: Sequence[Trial], device: torch.device, capture: Capture = captured) -> None:
    """A call that is captured once, and replayed with the inputs of others, gives the bits of ordinary runs.

    Raises:
        AssertionError: it gives others.
    """
    static: dict[str, Tensor] = {}

    def kept(name: str, tensor: Tensor) -> Tensor:
        return static.setdefault(_numbered(name, static), tensor.clone())

    first = trials[0]
    result, replay = capture(first.prepared(kept, makes_routes=True), device)
    for number, trial in enumerate(trials):
        same_tables = trial.like(first)
        expected = same_tables.prepared(lambda _, tensor: tensor)()
        for attempt in ("replay", "second replay"):
            _refill(static, same_tables)
            replay()
            assert_same_bits(result, expected, f"{attempt} with inputs {number + 1} of {len(trials)}")


def _refill(static: dict[str, Tensor], trial: Trial) -> None:
    """Writes a call's tensors where those of the captured call lie."""
    filled: dict[str, Tensor] = {}

    def fill(name: str, tensor: Tensor) -> Tensor:
        name = _numbered(name, filled)
        filled[name] = tensor
        static[name].copy_(tensor)
        return tensor

    trial.prepared(fill)


def _numbered(name: str, taken: dict[str, Tensor]) -> str:
    """The name, with a number where another tensor has it: there are several tables."""
    number = sum(known.partition("#")[0] == name for known in taken)
    return f"{name}#{number}"


def check_stream(trial: Trial, device: torch.device, beside: Beside = beside_a_busy_stream) -> None:
    """A call on another stream gives the bits of an ordinary run, though the default stream is busy.

    Raises:
        AssertionError: it gives others.
    """
    expected = trial.prepared(lambda _, tensor: tensor)()
    run = trial.prepared(lambda _, tensor: tensor)
    with beside(device):
        with Guards(NAN).allocating():  # so that what was not written yet is not the numbers of a call before
            result = run()
        copies = {
            name: None if gradient is None else gradient.clone()
            for name, gradient in result.gradients.items()
        }
        seen = Result(result.output.clone(), copies)
    assert_same_bits(seen, expected, "another stream")
