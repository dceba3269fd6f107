"""Questions about attention: vendors' kernels, from where on own kernels are faster, and tiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ... import attention, backends
from ...backends import attention_plan, vendor
from ...backends.tiled import tiling
from ...tables import Table
from ...testing import Sample, sample
from .. import answers
from .measuring import Backward, Contest, Judged, Measuring, Trial, ranking
from .question import Outcome, Question, threshold
from .workloads import Size, call_of, largest

OP = "routed_attention"

# Shares of a backward's work that masks leave, at which own kernels and vendors' are timed.
SHARES = (0.9, 0.75, 0.5, 0.25, 0.125)
NEVER = 0.0
ALWAYS = 1.0

# Rows × keys of a tile.
TILES = ((128, 256), (256, 256), (256, 512), (384, 512), (512, 512), (512, 1024))


class Vendors(Question):
    """In which order vendors' kernels of attention are tried on CUDA."""

    decides = "the order in which the kernels of attention that PyTorch brings are tried"

    def __init__(self, dtype: torch.dtype, backend: str, names: tuple[str, ...]) -> None:
        super().__init__("vendors", dtype, shipped=list(names))
        self.dtype = dtype
        self.backend = backend
        self.names = names

    def measure(self, measuring: Measuring) -> Outcome:
        """Forward and backward of a call whose masks go around each of the kernels."""
        size = largest(measuring.device, measuring.effort)
        candidates: dict[str, list[Trial]] = {name: [] for name in self.names}
        for seed in range(measuring.effort.sets):
            judged = Judged(call_of(OP, size, self.dtype, measuring.device, seed))
            for name in self.names:
                candidates[name].append(
                    Trial(
                        partial(judged.call.run, self.backend),
                        partial(self._check, judged, name),
                        {self.name: [name]},
                    )
                )
        contest = measuring.contest(candidates)
        outcome = Outcome(ranking(contest.milliseconds))
        outcome.add(contest)
        return outcome

    def _check(self, judged: Judged, name: str) -> None:
        plan = _plan(judged.call, self.backend)
        if plan.vendor != name:
            raise AssertionError(f"it does not run the call: {plan.reason}")
        judged.check(self.backend, is_deterministic=False)


class SkipBelow(Question):
    """Below which share of a backward's work own kernels, which leave out what has no weight, beat vendors'.

    Own kernels are timed as the automatic choice takes them: in the backward, under the forward of a vendor's kernel.
    """

    decides = (
        "the share of attention's work below which own kernels, which make no more, are taken before vendors'"
    )

    def __init__(self, dtype: torch.dtype, own: str, around_vendors: str) -> None:
        super().__init__("skip_below", dtype, shipped=attention_plan.SKIP_BELOW)
        self.dtype = dtype
        self.own = own
        self.around_vendors = around_vendors

    def measure(self, measuring: Measuring) -> Outcome:
        """Both kinds of kernels, over how many heads masks leave."""
        shares = SHARES[::2] if measuring.effort.is_quick else SHARES
        points = {share: self._contest(measuring, share, len(shares)) for share in shares}
        outcome = Outcome()
        for share, contest in points.items():
            outcome.add(contest, f"{share:.0%} left: ")
        first = threshold(points, self.own, self._takes_own, self.shipped, NEVER)
        outcome.answer = first if first in (self.shipped, NEVER) else above(first, shares)
        return outcome

    def _takes_own(self, share: float) -> bool:
        return share < self.shipped

    def _contest(self, measuring: Measuring, share: float, points: int) -> Contest:
        size = largest(measuring.device, measuring.effort)
        names = [self.own, self.around_vendors]
        candidates: dict[str, list[Trial]] = {
            name: [] for name in (names if self._takes_own(share) else names[::-1])
        }
        for seed in range(measuring.effort.sets):
            judged = Judged(with_share(share, size, self.dtype, measuring.device, seed))
            for name, trials in candidates.items():
                backend, answered = (None, {self.name: ALWAYS}) if name == self.own else (name, {})
                check = partial(judged.check, backend, is_deterministic=name == self.own)
                trials.append(Trial(partial(judged.call.run, backend), check, answered))
        return measuring.contest(candidates, points)


class Tiles(Question):
    """How attention that no vendor's kernel can do is cut into tiles on the CPU."""

    decides = "the tiles in which attention is computed where no vendor's kernel can do what a call asks for"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__("tiles", dtype, shipped=as_answer(tiling.ROWS, tiling.KEYS))
        self.dtype = dtype

    def measure(self, measuring: Measuring) -> Outcome:
        """Backwards of a call with a window, which the CPU's vendor kernel does not have."""
        size = largest(measuring.device, measuring.effort)
        shipped = (tiling.ROWS, tiling.KEYS)
        tiles = [shipped, *(each for each in TILES if each != shipped)]
        candidates: dict[str, list[Trial]] = {f"{rows} × {keys}": [] for rows, keys in tiles}
        for seed in range(measuring.effort.sets):
            length = 2 * size.sequence[1]
            call = sample(
                OP,
                dtype=self.dtype,
                tokens=(1, length),
                tables="blocks",
                sites="heads",
                sizes=size.widths,
                seed=seed,
                device=measuring.device,
                window=length // 2,
            )
            backend = backends.choose(OP, None, call.upstream)
            judged, backward = Judged(call), Backward(call, backend)
            for trials, each in zip(candidates.values(), tiles, strict=True):
                trials.append(Trial(backward, partial(judged.check, backend), {self.name: as_answer(*each)}))
        contest = measuring.contest(candidates)
        rows, keys = ranking(contest.milliseconds)[0].split(" × ")
        outcome = Outcome(as_answer(int(rows), int(keys)))
        outcome.add(contest)
        return outcome


def above(share: float, shares: tuple[float, ...]) -> float:
    """The limit below which a share lies: the next larger one that was timed, at which own kernels were slower."""
    larger = [other for other in shares if other > share]
    return min(larger, default=1.0)


def as_answer(rows: int, keys: int) -> dict[str, int]:
    """A tile as files have it."""
    return {"rows": rows, "keys": keys}


def with_share(share: float, size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Sample:
    """A call whose masks leave about this share of a backward: of the heads of every route."""
    call = call_of(OP, size, dtype, device, seed)
    assert call.routes is not None
    heads = torch.arange(size.widths.heads, device="cpu") < round(share * size.widths.heads)
    table = Table(heads.float().expand(call.routes.num_routes, -1))
    return call.with_sites(attention.AttentionSites(heads=table))


def _plan(call: Sample, backend: str) -> attention_plan.Plan:
    q, k, v = (call.tensors[name] for name in "qkv")
    assert q is not None and k is not None and v is not None
    sites: Any = call.sites
    return attention.explain(q, k, v, call.routes, sites, **call.keywords, backend=backend)


def _around_vendors(device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, ...], str | None]:
    """The backends that a call of attention may take on a device, and the first that masks around vendors' kernels."""
    names = backends.candidates(OP, torch.empty(0, dtype=dtype, device=device))
    return names, next((name for name in names if name not in attention_plan.OWN), None)


def vendors(device: torch.device, dtype: torch.dtype) -> Iterator[Question]:
    """The one about vendors' kernels, of which CUDA has several."""
    _, around = _around_vendors(device, dtype)
    if device.type == "cuda" and around is not None:
        with answers.trying(device, {}):
            names, _ = vendor.preference(torch.empty(0, dtype=dtype, device=device))
        yield Vendors(dtype, around, names)


def skip_below(device: torch.device, dtype: torch.dtype) -> Iterator[Question]:
    """The one about own kernels, where there are some besides vendors'."""
    names, around = _around_vendors(device, dtype)
    own = next((name for name in names if name in attention_plan.OWN), None)
    if own is not None and around is not None:
        yield SkipBelow(dtype, own, around)


def tiles(device: torch.device, dtype: torch.dtype) -> Iterator[Question]:
    """The one about tiles, which are measured on the CPU alone."""
    if device.type == "cpu":
        yield Tiles(dtype)
