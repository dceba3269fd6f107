"""How much more frequent a token is in one corpus than in another, as a strength or as candidates for a list."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import (
    MAX_VOCABULARY,
    Values,
    as_integers,
    as_numbers,
    check_all,
    check_int,
    check_like,
    check_range,
    is_number,
)


def token_counts(input_ids: Values, vocab_size: int) -> Tensor:
    """How often each token of the vocabulary occurs. Counts of parts of a corpus add up.

    The host waits for the device once, to check the ids.

    Args:
        input_ids: integers `[*tokens]`, every one in `[0, vocab_size)`, padding too.
        vocab_size: V, the number of tokens in the vocabulary.

    Returns:
        int64 `[V]`.

    Raises:
        TypeError: ids that are not integers, or a `vocab_size` that is none.
        ValueError: ids out of the vocabulary.
    """
    ids = as_integers("input_ids", input_ids).reshape(-1)
    check_int("vocab_size", vocab_size, 1, MAX_VOCABULARY)
    check_range("input_ids", ids, vocab_size, "vocab_size")
    if ids.device.type == "cpu":
        return torch.bincount(ids, minlength=vocab_size)
    # bincount would wait for the device again, to learn how long its output is.
    counts = torch.zeros(vocab_size, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids.long(), torch.ones_like(ids, dtype=torch.int64))


def frequency_ratio(
    forget_counts: Values, retain_counts: Values, smoothing: float | tuple[float, float] = 1.0
) -> Tensor:
    """How many times more frequent each token is in the forget corpus than in the retain corpus.

    `r = f / q` with the relative frequencies `f = (forget_counts + a) / sum(forget_counts + a)` and q likewise. Without
    smoothing, a token that neither corpus has gets the ratio 1, and one that the retain corpus alone lacks inf.

    The host waits for the device once, to check the counts.

    Args:
        forget_counts: `[V]` numbers, 0 or more; see `token_counts`.
        retain_counts: `[V]`, the counts in the other corpus.
        smoothing: the number a that is added to every count, or one number for each corpus, forget first. Published
            code adds (1, 20) to the counts of 25,000 stories each.

    Returns:
        fp64 `[V]`.

    Raises:
        TypeError: counts that are not numbers.
        ValueError: counts of another shape or device than the others', that are negative or not finite, or sum to 0
            after smoothing; a negative `smoothing`.
    """
    forget, retain = _two_counts(forget_counts, retain_counts)
    added = smoothing if isinstance(smoothing, tuple) else (smoothing, smoothing)
    if len(added) != 2 or not all(is_number(a) and 0 <= a < math.inf for a in added):
        raise ValueError(f"smoothing: got {smoothing!r}, expected a number of 0 or more, or two of them")
    for name, counts, a in (("forget_counts", forget, added[0]), ("retain_counts", retain, added[1])):
        if not bool((counts + a).sum() > 0):
            raise ValueError(f"{name}: got no counts above 0, expected some, or a smoothing above 0")
    f, q = ((counts + a) / (counts + a).sum() for counts, a in zip((forget, retain), added, strict=True))
    return torch.where((f == 0) & (q == 0), 1.0, f / q)


def soft_weights(ratio: Values, scale: float = 1.0, bias: float = -4.0) -> Tensor:
    """The weight that gradients of the *original* parameters get: `w = 1 - σ(r - 1/r - 4)`.

    The soft labels of Expand, Route, Ablate on TinyStories (Cloud et al. 2024, arXiv 2410.04332, section 4.2.2 and the
    appendix with its details): tokens that forget texts have more often train the original parameters less. A ratio of
    1 has the weight 0.982, of 4 has 0.562, of 5 has 0.310, of 10 has 0.003.

    Args:
        ratio: numbers of any shape, 0 or more, or inf; see `frequency_ratio`. The host waits for the device to check.
        scale: `w = 1 - σ(scale * (r - 1/r) + bias)`, as in the published code.
        bias: see `scale`.

    Returns:
        fp32, of the ratio's shape; every weight is a multiple of 2⁻²⁴, so that `1 - (1 - w)` is w exactly.

    Raises:
        TypeError: a ratio that is not a number.
        ValueError: a negative ratio or NaN; a `scale` that is not positive, a `bias` that is not finite.
    """
    r = as_numbers("ratio", ratio).double()
    check_all("ratio", r, r >= 0, "numbers of 0 or more")
    if not (is_number(scale) and 0 < scale < math.inf):
        raise ValueError(f"scale: got {scale!r}, expected a positive number")
    if not (is_number(bias) and math.isfinite(bias)):
        raise ValueError(f"bias: got {bias!r}, expected a finite number")
    forget = torch.sigmoid(scale * (r - 1 / r) + bias).float()
    # Subtracted in fp32: a weight below 1/2 is then exact, and one above is rounded to 2⁻²⁴. Numbers of that grid in
    # [0, 1] have an exact complement, and both cases of torch.lerp give that complement back.
    return 1.0 - forget


def frequency_strength(
    forget_counts: Values,
    retain_counts: Values,
    smoothing: float | tuple[float, float] = 1.0,
    *,
    scale: float = 1.0,
    bias: float = -4.0,
) -> Tensor:
    """The strength of each token of the vocabulary with which the mask of the original parameters is `soft_weights`.

    A strength takes a mask from the row of route 0 to the row of its own route: `lerp(W[0, f], W[r, f], s)`. With route
    0 all ones and the route's row 1 on its block and 0 off it (`tables.localize`), that is 1 on the block, and off it
    `lerp(1, 0, s) = 1 - s`, where `s = 1 - w`: exactly w, bit for bit. With a row of `off` off the block it is
    `w + (1 - w) * off`, rounded.

        strength = frequency_strength(token_counts(forget, V), token_counts(retain, V))
        table = localize(2, d_ff, {1: block})
        s = next_token(strength[input_ids])      # the mask is chosen by the token that is predicted
        routes = Routes.of(torch.ones_like(input_ids), 2, strength=s)

    Tokens of route 0 are not masked whatever their strength: route 0 for retain texts leaves them alone, and route 1
    for all leaves the decision to the frequencies.

    Args:
        forget_counts: see `frequency_ratio`.
        retain_counts: see there.
        smoothing: see there.
        scale: see `soft_weights`.
        bias: see there.

    Returns:
        fp32 `[V]`, from 0 to 1.

    Raises:
        TypeError, ValueError: as `frequency_ratio` and `soft_weights` do.
    """
    return 1.0 - soft_weights(frequency_ratio(forget_counts, retain_counts, smoothing), scale, bias)


def candidates(
    forget_counts: Values,
    retain_counts: Values,
    *,
    min_count: int,
    min_ratio: float,
    limit: int | None = None,
    smoothing: float | tuple[float, float] = 1.0,
) -> Tensor:
    """Tokens that the forget corpus has often enough, and more often than the retain corpus, the clearest first.

    A list of words such as the 20 of Cloud et al. 2024 (arXiv 2410.04332, section 4.2.3) for WMDP can be made of them;
    read it before you use it. The host waits for the device.

    Args:
        forget_counts: see `frequency_ratio`.
        retain_counts: see there.
        min_count: the least count in the forget corpus.
        min_ratio: the least ratio of the frequencies.
        limit: how many tokens are returned at the most.
        smoothing: see `frequency_ratio`.

    Returns:
        int64 `[n]`, token ids by descending ratio, equal ones by ascending id; possibly none.

    Raises:
        TypeError, ValueError: as `frequency_ratio` does; a `min_count`, `min_ratio` or `limit` that is negative.
    """
    forget, _ = _two_counts(forget_counts, retain_counts)
    ratio = frequency_ratio(forget_counts, retain_counts, smoothing)
    check_int("min_count", min_count, 0)
    if limit is not None:
        check_int("limit", limit, 0)
    if not (is_number(min_ratio) and min_ratio >= 0):
        raise ValueError(f"min_ratio: got {min_ratio!r}, expected a number of 0 or more")
    ids = ((forget >= min_count) & (ratio >= min_ratio)).nonzero().squeeze(1)
    order = torch.sort(ratio[ids], descending=True, stable=True)[1]
    return ids[order][:limit]


def _two_counts(forget_counts: Values, retain_counts: Values) -> tuple[Tensor, Tensor]:
    """The counts of both corpora, checked, as fp64 `[V]`."""
    forget, retain = as_numbers("forget_counts", forget_counts), as_numbers("retain_counts", retain_counts)
    if forget.dim() != 1 or len(forget) == 0:
        raise ValueError(f"forget_counts: got shape {list(forget.shape)}, expected [vocab_size]")
    check_like("retain_counts", retain, "forget_counts", forget)
    for name, counts in (("forget_counts", forget), ("retain_counts", retain)):
        check_all(name, counts, (counts >= 0) & torch.isfinite(counts), "finite numbers of 0 or more")
    return forget.double(), retain.double()
