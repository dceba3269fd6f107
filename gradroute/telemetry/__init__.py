"""Telemetry: whether routing works, seen while a model trains, by route and by block.

A route is a label of tokens (`Routes`), a block a part of the parameters that a route's tokens are to train (`Block`).
`Telemetry` says, for every measured step: the loss of each route's tokens, how much of the gradient of activations
belongs to them, how large the gradients and updates of each block are, and whether a block stayed untouched where none
of its tokens was there; and on demand, by a probe, how much of a route's gradient leaks out of its block.
"""

from .monitor import Telemetry
from .record import Record
from .report import summary_writer

__all__ = ["Record", "Telemetry", "summary_writer"]
