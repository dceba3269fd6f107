"""RouteColumns: the routes of a batch, put where another collator put its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_tensor
from .collator import Column, RouteCollator, checked_ids, checked_strength, next_token

ROUTE_COLUMNS = ("route_ids", "route_strength")

# This stands at padding: the base route, at full strength.
_PADDING = {"route_ids": 0, "route_strength": 1.0}

# A batch and an example as the collators of others make and take them.
Batch = Any
Example = Mapping[str, Any]


class RouteColumns:
    """Collates by another collator, and adds `route_ids` and `route_strength` at the positions of its `input_ids`.

    The other collator is called without these columns, so it may drop or refuse what it does not know. It pads the
    examples (on either side), or puts them one after the other in one row; in both cases all tokens must be found where
    the routes are put, or this raises. Padding has the base route. A `RouteCollator` does all this by itself.

    Args:
        collator: takes a list of examples and returns a batch with `input_ids` `[B, S]`.
        align: which position an id masks; see `RouteCollator`.
        routed: False: the batch has no routes, whether or not the examples have.
        pairs: the batch has a row of every example's chosen and then of every rejected completion, as TRL's
            DPOTrainer has; an example has one route, or one for each of both.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Batch],
        *,
        align: str = "position",
        routed: bool = True,
        pairs: bool = False,
    ) -> None:
        self.collator = collator
        self.align = align
        self.routed = routed
        self.pairs = pairs

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """One batch; the examples stay as they are.

        Raises:
            TypeError: routes that are not numbers.
            ValueError: an example without routes, or with another number of them than of tokens; a batch in which the
                tokens are not those of the examples.
        """
        if isinstance(self.collator, RouteCollator):
            return self._by_route_collator(examples)
        batch = self.collator([_without_routes(example) for example in examples])
        if self.routed:
            for name, column in self._columns(examples, batch).items():
                batch[name] = column
        return batch

    def _by_route_collator(self, examples: Sequence[Example]) -> Batch:
        if self.routed:
            return self.collator(list(examples))
        batch = self.collator([{"route_ids": 0} | dict(example) for example in examples])
        return _without_routes(batch)

    def _columns(self, examples: Sequence[Example], batch: Batch) -> dict[str, Tensor]:
        given = [name for name in ROUTE_COLUMNS if any(name in example for example in examples)]
        names = list(dict.fromkeys(["route_ids", *given]))
        for index, example in enumerate(examples):
            if any(name not in example for name in names):
                raise ValueError(
                    f"examples[{index}]: got the columns {', '.join(sorted(example))}, expected "
                    f"{', '.join(names)} too: of the document, or of each of its tokens"
                )
        if self.pairs:
            return {name: _of_pairs(name, examples, batch) for name in names}
        documents = [_tokens(index, example) for index, example in enumerate(examples)]
        places = _places(documents, batch["input_ids"], batch.get("attention_mask"), self.collator)
        return {name: self._placed(name, examples, documents, places, batch) for name in names}

    def _placed(
        self,
        name: str,
        examples: Sequence[Example],
        documents: list[Tensor],
        places: list[tuple[int, int]],
        batch: Batch,
    ) -> Tensor:
        """A column of the batch `[B, S]`: what the examples have of it, each at its row and its start."""
        column = _filled(name, batch["input_ids"])
        for index, (tokens, (row, start)) in enumerate(zip(documents, places, strict=True)):
            values = checked_column(f"examples[{index}]", name, examples[index][name], len(tokens))
            if self.align == "next_token":
                lengths = examples[index].get("seq_lengths", [len(tokens)])
                values = torch.cat([next_token(part) for part in values.split(list(lengths))])
            column[row, start : start + len(tokens)] = values
        return column


def _without_routes(example: Any) -> Any:
    if not isinstance(example, Mapping):
        raise TypeError(f"examples: got a {type(example).__name__}, expected mappings of columns")
    return {name: value for name, value in example.items() if name not in ROUTE_COLUMNS}


def _filled(name: str, like: Tensor) -> Tensor:
    dtype = torch.int64 if name == "route_ids" else torch.float32
    return torch.full(like.shape, _PADDING[name], dtype=dtype, device="cpu")


def _tokens(index: int, example: Example) -> Tensor:
    if "input_ids" not in example:
        raise ValueError(
            f"examples[{index}]: got the columns {', '.join(sorted(example))}, expected input_ids beside route_ids: a "
            "collator that tokenizes does not say which route a token has"
        )
    try:
        return as_tensor(example["input_ids"], "integers").cpu()
    except (TypeError, ValueError) as error:
        raise type(error)(f"examples[{index}]['input_ids']: {error}") from None


def checked_column(where: str, name: str, value: Column, n: int) -> Tensor:
    """A column of routes of one example as a tensor `[n]`."""
    check = checked_ids if name == "route_ids" else checked_strength
    return check(f"{where}[{name!r}]", value, n)


def _places(
    documents: list[Tensor], input_ids: Tensor, attention_mask: Tensor | None, collator: object
) -> list[tuple[int, int]]:
    """The row and the start of every document in the batch `[B, S]`."""
    lengths = [len(tokens) for tokens in documents]
    if len(input_ids) == len(documents):
        masks = [None] * len(documents) if attention_mask is None else list(attention_mask)
        places = [
            (index, _start(row, tokens, mask))
            for index, (row, tokens, mask) in enumerate(zip(input_ids, documents, masks, strict=True))
        ]
    elif len(input_ids) == 1:
        places = [(0, sum(lengths[:index])) for index in range(len(documents))]
    else:
        places = []
    found = [
        torch.equal(input_ids[row, start : start + len(tokens)].cpu(), tokens.to(input_ids.dtype))
        for tokens, (row, start) in zip(documents, places, strict=False)
    ]
    if len(found) < len(documents) or not all(found):
        raise ValueError(
            f"data_collator: got input_ids {list(input_ids.shape)} of a {type(collator).__name__} in which the "
            f"{len(documents)} examples of {lengths} tokens do not stand whole, expected a collator that pads them or "
            "puts them one after the other"
        )
    return places


def _start(row: Tensor, tokens: Tensor, mask: Tensor | None) -> int:
    """Where a document starts in its row: at the left, or at the right where padding stands before it."""
    right = len(row) - len(tokens)
    if right <= 0 or mask is None:
        return 0
    return 0 if mask[0] or not mask[-1] else right


def _of_pairs(name: str, examples: Sequence[Example], batch: Batch) -> Tensor:
    """A column `[2B, S]` of pairs: the route of the chosen completions, then of the rejected ones; 0 at padding."""
    mask = batch["attention_mask"]
    if len(mask) != 2 * len(examples):
        raise ValueError(
            f"data_collator: got {len(mask)} rows for {len(examples)} pairs, expected {2 * len(examples)}: the chosen "
            "completions, and then the rejected ones"
        )
    pairs = torch.stack(
        [_pair(f"examples[{i}][{name!r}]", name, example[name]) for i, example in enumerate(examples)]
    )
    rows = pairs.T.reshape(-1, 1)
    return torch.where(mask.cpu().bool(), rows, _filled(name, mask))


def _pair(where: str, name: str, value: Column) -> Tensor:
    """The route or the strength of a pair as `[2]`."""
    check = checked_ids if name == "route_ids" else checked_strength
    return check(where, value, 2, "the chosen and the rejected completion")
