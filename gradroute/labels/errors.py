"""Labels that are wrong on purpose, and masks turned into ids by priority."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..routes import MAX_ROUTES
from .arguments import Values, as_integers, as_tensor, check_int, check_like, is_number


def with_errors(
    labels: Values,
    *,
    seed: int,
    false_negative: float = 0.0,
    false_positive: float = 0.0,
    route: int = 1,
    base: int = 0,
    groups: Values | None = None,
) -> Tensor:
    """Labels with simulated mistakes, such as a classifier's, to find out how many of them routing bears.

    Exactly `round(false_negative * n)` of the n tokens of `route` become `base`, and `round(false_positive * n)` of the
    n tokens of `base` become `route` (a half is rounded to even). Other routes are left alone.

    A generator on the CPU chooses these tokens: the same ones on every device. A higher rate makes the same mistakes
    and more, and neither rate changes which mistakes the other one makes. The host waits for the device.

    Args:
        labels: integers or bools `[*tokens]`; bools are routes 1 and 0.
        seed: the seed of the generator.
        false_negative: the share of `route` that is missed, 0 to 1.
        false_positive: the share of `base` that is taken for `route`, 0 to 1.
        route: the route whose tokens are missed.
        base: the route whose tokens are taken for `route`.
        groups: integers `[*tokens]`, the document, sample or episode of each token (any numbers): whole groups are
            mislabelled, and n counts groups.

    Returns:
        New memory of the labels' shape, dtype and device.

    Raises:
        TypeError: labels, groups, routes or a seed that are not integers.
        ValueError: a rate outside 0 to 1; routes that are equal or out of range; groups of another shape or device, or
            with different labels inside one.
    """
    given = as_tensor("labels", labels)
    ids = given if given.dtype == torch.bool else as_integers("labels", given)
    for name, rate in (("false_negative", false_negative), ("false_positive", false_positive)):
        if not (is_number(rate) and 0 <= rate <= 1):
            raise ValueError(f"{name}: got {rate!r}, expected a rate from 0 to 1")
    most = 2 if ids.dtype == torch.bool else MAX_ROUTES
    check_int("route", route, 0, most - 1)
    check_int("base", base, 0, most - 1)
    check_int("seed", seed, -(2**63), 2**64 - 1)  # as many as torch.Generator takes
    if route == base:
        raise ValueError(f"route, base: got {route} for both, expected two routes")
    if groups is None:
        return _mislabelled(ids, seed, {route: (base, false_negative), base: (route, false_positive)})
    of_groups, group = _grouped(ids, groups)
    wrong = _mislabelled(of_groups, seed, {route: (base, false_negative), base: (route, false_positive)})
    return wrong[group]


def _mislabelled(ids: Tensor, seed: int, mistakes: dict[int, tuple[int, float]]) -> Tensor:
    """`ids` with mistakes: route → the route that a share of its tokens takes instead, and that share."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    flat = ids.reshape(-1)
    wrong = flat.clone()
    for route, (other, rate) in mistakes.items():
        members = (flat == route).nonzero().squeeze(1)
        # A whole permutation is drawn, so that the order of the mistakes depends on no rate.
        drawn = torch.randperm(len(members), generator=generator, device="cpu")
        chosen = drawn[: round(rate * len(members))]
        wrong[members[chosen.to(ids.device)]] = other
    return wrong.view(ids.shape)


def _grouped(ids: Tensor, groups: Values) -> tuple[Tensor, Tensor]:
    """The label of each group `[G]`, and the index of each token's group `[*tokens]`."""
    groups = as_integers("groups", groups)
    check_like("groups", groups, "labels", ids)
    names, group = groups.unique(return_inverse=True)
    of_groups = ids.new_zeros(len(names))
    of_groups[group.reshape(-1)] = ids.reshape(-1)
    different = of_groups[group] != ids
    if bool(different.any()):
        name = int(groups[different][0])
        raise ValueError(
            f"groups: got group {name} with the labels {ids[groups == name].unique().tolist()}, "
            "expected one label in every group"
        )
    return of_groups, group


def prioritise(masks: Mapping[int, Tensor], base: int = 0) -> Tensor:
    """Route ids from masks: a token takes the first route whose mask has it, or `base` where no mask does.

    Args:
        masks: route → bool `[*tokens]`, the most important first. An entry for `base` keeps its tokens from later ones.
        base: the route of all other tokens.

    Returns:
        int64 `[*tokens]`, on the masks' device.

    Raises:
        TypeError: routes that are not integers, masks that are not bool.
        ValueError: no masks; routes out of range; masks of different shapes or devices.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks: got a {type(masks).__name__}, expected a mapping from routes to masks")
    if not masks:
        raise ValueError("masks: got none, expected at least one")
    check_int("base", base, 0, MAX_ROUTES - 1)
    checked: dict[int, Tensor] = {}
    for route, mask in masks.items():
        check_int("masks, a route", route, 0, MAX_ROUTES - 1)
        checked[route] = as_tensor(f"masks[{route}]", mask)
        if checked[route].dtype != torch.bool:
            raise TypeError(f"masks[{route}]: got dtype {checked[route].dtype}, expected bool")
        first = next(iter(checked))
        check_like(f"masks[{route}]", checked[route], f"masks[{first}]", checked[first])
    first_mask = next(iter(checked.values()))
    ids = torch.full(first_mask.shape, base, dtype=torch.int64, device=first_mask.device)
    for route, mask in reversed(checked.items()):
        ids.masked_fill_(mask, route)
    return ids
