"""One label for all tokens of a document, sample or episode; and labels moved to where their tokens are predicted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import check_int, shown
from .arguments import (
    Values,
    as_bounds,
    as_integers,
    as_labels,
    as_row,
    as_tensor,
    check_all,
    check_like,
    check_row,
    on_host,
)


def documents(labels: Values, lengths: Values | None = None, *, cu_seqlens: Values | None = None) -> Tensor:
    """The labels of documents, for the tokens of one packed row. `documents(torch.arange(D), lengths)` numbers them.

    Args:
        labels: `[D]` ids, strengths or bools.
        lengths: `[D]` integers, 0 or more: how many tokens each document has.
        cu_seqlens: `[D + 1]` integers from 0, where each document starts and the last one ends; instead of `lengths`.
            Either is read on the host, which waits for the device that it is on.

    Returns:
        `[T]`, of the labels' dtype and device.

    Raises:
        TypeError: both or neither of `lengths` and `cu_seqlens`, or not integers.
        ValueError: lengths or bounds whose number does not fit to the labels, or that fall below 0.
    """
    labels = as_row("labels", labels)
    if lengths is not None and cu_seqlens is None:
        name, sizes = "lengths", on_host("lengths", as_integers("lengths", lengths))
        check_row("lengths", sizes, len(labels), "as many as labels")
    elif lengths is not None or cu_seqlens is None:
        raise TypeError("lengths, cu_seqlens: got both or neither, expected one of them")
    else:
        name, bounds = "cu_seqlens", on_host("cu_seqlens", as_integers("cu_seqlens", cu_seqlens))
        check_row("cu_seqlens", bounds, len(labels) + 1, "one more than labels")
        if bounds[0] != 0:
            raise ValueError(f"cu_seqlens: got {int(bounds[0])} as the first, expected 0")
        sizes = bounds.diff()
    check_all(name, sizes, sizes >= 0, "lengths of 0 or more")
    return labels.repeat_interleave(sizes.to(labels.device), output_size=int(sizes.sum()))


def samples(labels: Values, shape: Sequence[int]) -> Tensor:
    """The labels of samples, for all their tokens.

    Args:
        labels: `[B]` ids, strengths or bools.
        shape: `[B, ...]`, usually `input_ids.shape`.

    Returns:
        `shape`, of the labels' dtype and device.

    Raises:
        ValueError: another number of labels than `shape` has rows.
    """
    labels = as_row("labels", labels)
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape: got {shown(shape)}, expected [B, ...]")
    shape = tuple(check_int("shape", size, 0) for size in shape)
    if not shape or shape[0] != len(labels):
        raise ValueError(
            f"labels: got {len(labels)}, expected one for each row of shape, which is {list(shape)}"
        )
    return labels.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()


def episode_numbers(*, starts: Values | None = None, dones: Values | None = None) -> Tensor:
    """The number of the episode to which each step of a rollout belongs.

    A step that is *done* is the last of its episode (Gymnasium's `terminated | truncated` for that very step); the step
    after it begins a new one. A step that *starts* is the first of its episode (`episode_starts` of stable-baselines3).
    The first step of every environment begins an episode, even if it goes on with one of the rollout before.

    Args:
        starts: `[time, environments]` bools, True for the first step of an episode.
        dones: `[time, environments]` bools, True for the last step of an episode; instead of `starts`.

    Returns:
        int64 `[time, environments]`: 0, 1, ... in the order of the environments, and in each in the order of time.

    Raises:
        TypeError: both or neither; not bools.
        ValueError: not two-dimensional.
    """
    first = _episode_starts(starts, dones)
    return first.T.reshape(-1).cumsum(0).sub_(1).view(first.T.shape).T.contiguous()


def _episode_starts(starts: Values | None, dones: Values | None) -> Tensor:
    """Whether each step is the first of its episode in the rollout: bool `[time, environments]`, new memory."""
    if starts is not None and dones is None:
        name, flags = "starts", as_tensor("starts", starts)
    elif starts is not None or dones is None:
        raise TypeError("starts, dones: got both or neither, expected one of them")
    else:
        name, flags = "dones", as_tensor("dones", dones)
    if flags.dtype != torch.bool:
        raise TypeError(f"{name}: got dtype {flags.dtype}, expected bool")
    if flags.dim() != 2:
        raise ValueError(f"{name}: got shape {list(flags.shape)}, expected [time, environments]")
    first = torch.ones_like(flags)
    first[1:] = flags[1:] if dones is None else flags[:-1]
    return first


def episodes(
    labels: Values, *, starts: Values | None = None, dones: Values | None = None, take: str = "first"
) -> Tensor:
    """The labels of episodes, for all steps of a rollout.

    Args:
        labels: one for each episode, `[E]`, in the order of `episode_numbers`: then the host waits for the device, to
            compare their numbers. Or one for each step, `[time, environments]`: then every episode takes one of its
            steps' labels.
        starts: see `episode_numbers`.
        dones: see `episode_numbers`.
        take: which of its steps' labels an episode takes: the label of its "first" step in the rollout, or of its
            "last", for something that is known at the end. An episode that goes on after the rollout has its last step
            at the rollout's end.

    Returns:
        `[time, environments]`, of the labels' dtype and device.

    Raises:
        TypeError: both or neither of `starts` and `dones`; not bools.
        ValueError: labels of another number or shape, or on another device; another `take`.
    """
    if take not in ("first", "last"):
        raise ValueError(f"take: got {take!r}, expected 'first' or 'last'")
    labels = as_labels("labels", labels)
    first = _episode_starts(starts, dones)
    name = "starts" if dones is None else "dones"
    if labels.device != first.device:
        raise ValueError(
            f"labels: got a tensor on {labels.device}, expected the device of {name} {first.device}"
        )
    if labels.dim() == 1:
        number = int(first.sum())
        if len(labels) != number:
            raise ValueError(f"labels: got {len(labels)}, expected {number}, one for each episode in {name}")
        return labels[episode_numbers(starts=first)]
    check_like("labels", labels, name, first)
    return labels.gather(0, _first_steps(first) if take == "first" else _last_steps(first))


def _first_steps(first: Tensor) -> Tensor:
    """The time at which the episode of each step began: int64 `[time, environments]`."""
    time = torch.arange(len(first), device=first.device).unsqueeze(1)
    return torch.where(first, time, 0).cummax(0)[0]


def _last_steps(first: Tensor) -> Tensor:
    """The time at which the episode of each step ends: int64 `[time, environments]`."""
    last = torch.ones_like(first)
    last[:-1] = first[1:]
    return len(first) - 1 - _first_steps(last.flip(0)).flip(0)


def next_token(
    labels: Values, cu_seqlens: Values | None = None, *, attention_mask: Values | None = None
) -> Tensor:
    """Labels moved to the positions that predict their tokens: position t takes the label of the token at t + 1.

    A mask is applied to all gradient that arrives at a position, and a causal language model predicts token t + 1 at
    position t. The last position of a row or document predicts nothing and keeps its own label. This is the rule of
    `RouteCollator(align="next_token")`: use one of the two.

    Args:
        labels: `[*, S]` ids, strengths or bools.
        cu_seqlens: integers `[documents + 1]` from 0 to T, the bounds of the documents in one packed row. They are
            checked where they are on the host.
        attention_mask: `[*, S]` bools or zeros and ones, for rows that are padded on the right: the last token before
            the padding keeps its own label, and so does padding.

    Returns:
        New memory of the labels' shape, dtype and device.

    Raises:
        TypeError: labels that are no numbers or bools, bounds that are no integers.
        ValueError: a number without a dimension; `cu_seqlens` as in `match_ngrams`; a mask of another shape; both
            `cu_seqlens` and `attention_mask`.
    """
    labels = as_labels("labels", labels)
    if labels.dim() == 0:
        raise ValueError("labels: got one number, expected labels of tokens, [*, S]")
    if cu_seqlens is not None and attention_mask is not None:
        raise ValueError("cu_seqlens, attention_mask: got both, expected a packed row or padded ones")
    moved = torch.cat((labels[..., 1:], labels[..., -1:]), dim=-1)
    if cu_seqlens is not None:
        last = as_bounds(cu_seqlens, labels)[1:] - 1
        if labels.numel():
            # Empty documents do no harm: they name the last position of the one before, or -1, the row's.
            moved.view(-1)[last] = labels.reshape(-1)[last]
    if attention_mask is not None:
        mask = as_tensor("attention_mask", attention_mask)
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"attention_mask: got dtype {mask.dtype}, expected bools or zeros and ones")
        if mask.device.type == "cpu":
            check_all("attention_mask", mask, (mask == 0) | (mask == 1), "bools or zeros and ones")
        check_like("attention_mask", mask, "labels", labels)
        moved[..., :-1] = torch.where(mask[..., 1:] != 0, moved[..., :-1], labels[..., :-1])
    return moved
