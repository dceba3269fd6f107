"""The processes of torchrun: the first one decides and writes, the others wait and are told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

Value = TypeVar("Value")

# How long the others wait for a stage that the first process alone runs.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """The processes of one run.

    Attributes:
        rank: the number of this one.
        world: how many there are.
        group: the group by which they wait for each other, of gloo; None for a single process.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @classmethod
    def of_environment(cls) -> Processes:
        """Those that torchrun has started, by its variables RANK and WORLD_SIZE."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        import torch
        from torch import distributed

        if not distributed.is_initialized():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if torch.cuda.is_available():
                torch.cuda.set_device(local)
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        # A group of its own, because the default one gives up after minutes.
        group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        return cls(distributed.get_rank(), world, group)

    def share(self, value: Value | None) -> Value:
        """The first process's value, in all of them; the others give None. All wait for it."""
        values = [value]
        if self.group is not None:
            from torch import distributed

            distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.group is not None:
            from torch import distributed

            distributed.barrier(group=self.group)
