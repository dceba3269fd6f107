"""The arguments of Telemetry, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..arguments import check_int, check_is, shown
from ..attention import AttentionSites
from ..blocks import Block
from ..layers import RoutedModule
from ..mlp import MLPSites
from .sums import ALL, REST

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def checked_names(argument: str, names: Sequence[str], empty: bool = False) -> tuple[str, ...]:
    """The names of an argument, different ones that no key of a record has for itself; there may be none if `empty`."""
    if (
        not isinstance(names, Sequence)
        or isinstance(names, str)
        or not all(isinstance(n, str) for n in names)
    ):
        raise TypeError(f"{argument}: got {names!r}, expected a sequence of names")
    if not names and not empty:
        raise ValueError(f"{argument}: got none, expected at least one name")
    wrong = [name for name in names if not name or "/" in name or name in (ALL, REST)]
    if wrong or len(set(names)) < len(names):
        raise ValueError(
            f"{argument}: got {list(names)}, expected different names without '/', other than {ALL!r} and {REST!r}"
        )
    return tuple(names)


def checked_home(
    home: Mapping[str, str] | None, routes: Sequence[str], blocks: Mapping[str, Block]
) -> dict[str, str]:
    """Route → the block that the route's tokens are to train; by default the block of the same name."""
    if home is None:
        return {route: route for route in routes if route in blocks}
    check_is("home", home, Mapping, "a dict {route: block}")
    for route, block in home.items():
        if route not in routes:
            raise ValueError(f"home: got the route {route!r}, expected one of {', '.join(routes)}")
        if block not in blocks:
            raise ValueError(f"home: got the block {block!r}, expected one of {', '.join(blocks) or 'none'}")
    return dict(home)


def checked_every(every: int) -> int:
    """The number of steps from one measured step to the next."""
    return int(check_int("every", every, 1))


def checked_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of these names, each of which the model calls: routed MLPs and attention read their parts."""
    present = dict(model.named_modules())
    chosen = {}
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"modules: got {shown(names)}, expected names of the model's modules")
    for name in names:
        if name not in present:
            raise ValueError(f"modules: got {name!r}, expected names of the model's modules")
        parents = (name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
        fused = [parent for parent in (*parents, "") if parent != name and _is_fused(present[parent])]
        if fused:
            whole = type(present[fused[0]]).__name__
            raise ValueError(
                f"modules: got {name!r}, a part that a routed {whole} reads instead of calling it, expected the {whole}"
            )
        if name == ALL:
            raise ValueError(
                f"modules: got {ALL!r}, expected another name: it is that of the sum over modules"
            )
        chosen[name or type(model).__name__] = present[name]
    return chosen


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, RoutedModule) and module.sites_type in (MLPSites, AttentionSites)


def checked_optimizers(optimizer: Optimizers | None) -> list[torch.optim.Optimizer]:
    """The optimizers of a step, of which there may be none."""
    if optimizer is None:
        return []
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: got a {type(one).__name__}, expected a torch.optim.Optimizer; without one call "
                "before_update and after_update"
            )
    return optimizers
