"""Tables of edges as passes of a flash backward."""

from __future__ import annotations

from typing import NamedTuple

from ...tables import Table

# A table of values with weights below this takes two passes: in one, P̃ = E ⊙ P would lose P's small elements.
LEAST_DIVISOR = 2.0**-16


class Pass(NamedTuple):
    """One pass: dv = (E_value ⊙ P)ᵀ do; dS = E_score ⊙ P ⊙ (do vᵀ - delta), from which dq and dk are made.

    The kernel multiplies P by E_value, and the gradient of the scores that it makes of that by E_score / E_value. So
    E_value is not negative, and E_score is 0 where E_value is.

    Attributes:
        value: E_value `[R, R]`; None: ones.
        score: E_score `[R, R]`; None: ones.
        gives_scores: whether the pass gives dq and dk.
        gives_values: whether it gives dv.
    """

    value: Table | None
    score: Table | None
    gives_scores: bool = True
    gives_values: bool = True

    @property
    def has_support(self) -> bool:
        """Whether some elements of P are multiplied by 0, so that they need not be computed."""
        return self.value is not None and self.value.least == 0

    @property
    def has_bias(self) -> bool:
        """Whether others are multiplied by something else than 1."""
        return self.value is not None and not self.value.binary

    @property
    def has_factor(self) -> bool:
        """Whether the gradient of the scores has a factor."""
        return not same(self.score, self.value)


def passes(score_edges: Table | None, value_edges: Table | None) -> tuple[Pass, ...]:
    """The passes that make the gradients of tables which `why_not_tables` does not refuse; None: ones."""
    if value_edges is None or same(score_edges, value_edges) or value_edges.least >= LEAST_DIVISOR:
        return (Pass(value_edges, score_edges),)
    return (
        Pass(value_edges, value_edges, gives_scores=False),
        Pass(None, None, gives_values=False),
    )


def why_not_tables(score_edges: Table | None, value_edges: Table | None) -> str | None:
    """Why no passes make the gradients of these tables; None when some do."""
    if score_edges is not None and value_edges is not None and not same(score_edges, value_edges):
        return "score_edges and value_edges differ, and it takes one table for both, or for one of them"
    if value_edges is not None and value_edges.least < 0:
        return f"it adds the logarithm of value_edges to the scores, and their smallest weight is {value_edges.least:g}"
    return None


def same(one: Table | None, other: Table | None) -> bool:
    """Whether two tables have the same weights; None: ones."""
    return one is other or (one is not None and other is not None and one.digest == other.digest)
