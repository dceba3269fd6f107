"""Labels: every refusal, by the argument that its message names."""

import math

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from labels_cases import expect

from gradroute.labels import (
    candidates,
    documents,
    episode_numbers,
    episodes,
    frequency_ratio,
    match_ngrams,
    match_tokens,
    next_token,
    prioritise,
    samples,
    soft_weights,
    summarize,
    token_counts,
    with_errors,
)

IDS = torch.zeros(2, 3, dtype=torch.long)
MASK = torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: match_tokens(IDS.float(), [1]),
            TypeError,
            "input_ids: got dtype torch.float32, expected integers",
        ),
        (lambda: match_tokens(MASK, [1]), TypeError, "input_ids: got dtype torch.bool"),
        (
            lambda: match_tokens("text", [1]),
            TypeError,
            "input_ids: got 'text', expected a tensor, an array, or numbers",
        ),
        (lambda: match_tokens(IDS, []), ValueError, "token_ids: got none, expected at least one"),
        (
            lambda: match_tokens(IDS, [3, -2]),
            ValueError,
            "token_ids: got -2 at [1], expected token ids from 0",
        ),
        (lambda: match_tokens(IDS, [1 << 30]), ValueError, "token_ids: got 1073741824"),
        (lambda: match_tokens(IDS, [1.5]), TypeError, "token_ids: got dtype torch.float64"),
        (lambda: match_tokens(IDS, [[1]]), ValueError, "token_ids: got shape [1, 1], expected one dimension"),
        (lambda: match_ngrams(IDS.double(), [[1]]), TypeError, "input_ids: got dtype torch.float64"),
        (lambda: match_ngrams(IDS, []), ValueError, "sequences: got none, expected at least one"),
        (lambda: match_ngrams(IDS, 5), TypeError, "sequences: got a int, expected a list of sequences"),
        (
            lambda: match_ngrams(IDS, [1, 2]),
            TypeError,
            "sequences[0]: got 1, expected a sequence of token ids",
        ),
        (lambda: match_ngrams(IDS, ["cat"]), TypeError, "sequences[0]: got 'cat', expected a sequence"),
        (lambda: match_ngrams(IDS, [[1], []]), ValueError, "sequences[1]: got no token ids"),
        (lambda: match_ngrams(IDS, [[1, -1]]), ValueError, "sequences[0]: got -1, expected token ids from 0"),
        (
            lambda: match_ngrams(IDS, [[1.0]]),
            TypeError,
            "sequences[0]: got 1.0, expected token ids, integers",
        ),
        (lambda: match_ngrams(IDS, [[1]], "middle"), ValueError, "mark: got 'middle', expected one of 'all'"),
        (
            lambda: match_ngrams(IDS, [[1]], cu_seqlens=[0, 6]),
            ValueError,
            "cu_seqlens: got tokens of shape [2, 3], expected one packed row, [T] or [1, T]",
        ),
        (
            lambda: match_ngrams(IDS[0], [[1]], cu_seqlens=[0, 2, 1, 3]),
            ValueError,
            "cu_seqlens: got [0, 2, 1, 3], expected ascending bounds from 0 to 3",
        ),
        (lambda: match_ngrams(IDS[0], [[1]], cu_seqlens=[0, 2]), ValueError, "cu_seqlens: got [0, 2]"),
        (lambda: match_ngrams(IDS[0], [[1]], cu_seqlens=[]), ValueError, "cu_seqlens: got []"),
        (
            lambda: match_ngrams(IDS[0], [[1]], cu_seqlens=[0.0, 3.0]),
            TypeError,
            "cu_seqlens: got dtype torch.float",
        ),
        (
            lambda: token_counts([1, 9, -1], 5),
            ValueError,
            "input_ids: got 2 of 3 out of range, values [-1, 9]; expected 0 <= id < 5, the vocab_size",
        ),
        (lambda: token_counts([1.0], 5), TypeError, "input_ids: got dtype torch.float64"),
        (lambda: token_counts([1], 0), ValueError, "vocab_size: got 0, expected an int from 1"),
        (lambda: token_counts([1], 5.0), TypeError, "vocab_size: got 5.0, expected an int"),
        (
            lambda: frequency_ratio([1, 2], [1]),
            ValueError,
            "retain_counts: got shape [1], expected that of forget_counts [2]",
        ),
        (
            lambda: frequency_ratio([[1]], [[1]]),
            ValueError,
            "forget_counts: got shape [1, 1], expected [vocab_size]",
        ),
        (
            lambda: frequency_ratio([1, -2], [1, 2]),
            ValueError,
            "forget_counts: got -2 at [1], expected finite",
        ),
        (lambda: frequency_ratio([1.0], [math.inf]), ValueError, "retain_counts: got inf at [0]"),
        (lambda: frequency_ratio([1], [True]), TypeError, "retain_counts: got dtype torch.bool"),
        (
            lambda: frequency_ratio([1], [1], -1),
            ValueError,
            "smoothing: got -1, expected a number of 0 or more",
        ),
        (lambda: frequency_ratio([1], [1], (1, 2, 3)), ValueError, "smoothing: got (1, 2, 3)"),
        (lambda: frequency_ratio([1], [0], 0), ValueError, "retain_counts: got no counts above 0"),
        (lambda: soft_weights([-0.5]), ValueError, "ratio: got -0.5 at [0], expected numbers of 0 or more"),
        (lambda: soft_weights([math.nan]), ValueError, "ratio: got nan at [0]"),
        (lambda: soft_weights([1.0], scale=0), ValueError, "scale: got 0, expected a positive number"),
        (lambda: soft_weights([1.0], bias=math.inf), ValueError, "bias: got inf, expected a finite number"),
        (lambda: candidates([1], [1], min_count=-1, min_ratio=1), ValueError, "min_count: got -1"),
        (lambda: candidates([1], [1], min_count=1, min_ratio=-1.0), ValueError, "min_ratio: got -1.0"),
        (lambda: candidates([1], [1], min_count=1, min_ratio=1, limit=-1), ValueError, "limit: got -1"),
        (lambda: documents([1, 0], [2]), ValueError, "lengths: got 1, expected 2, as many as labels"),
        (
            lambda: documents([1, 0], cu_seqlens=[0, 2]),
            ValueError,
            "cu_seqlens: got 2, expected 3, one more than",
        ),
        (lambda: documents([1], cu_seqlens=[1, 2]), ValueError, "cu_seqlens: got 1 as the first, expected 0"),
        (
            lambda: documents([1, 0], cu_seqlens=[0, 2, 1]),
            ValueError,
            "cu_seqlens: got -1 at [1], expected lengths",
        ),
        (
            lambda: documents([1], [2], cu_seqlens=[0, 2]),
            TypeError,
            "lengths, cu_seqlens: got both or neither",
        ),
        (lambda: documents([1]), TypeError, "lengths, cu_seqlens: got both or neither"),
        (lambda: documents([1], [-1]), ValueError, "lengths: got -1 at [0], expected lengths of 0 or more"),
        (lambda: documents([1], [1.5]), TypeError, "lengths: got dtype torch.float64"),
        (lambda: documents(IDS, [1, 2]), ValueError, "labels: got shape [2, 3], expected one dimension"),
        (
            lambda: samples([1, 0], (3, 4)),
            ValueError,
            "labels: got 2, expected one for each row of shape, which is [3, 4]",
        ),
        (lambda: samples(IDS, (2, 4)), ValueError, "labels: got shape [2, 3], expected one dimension"),
        (lambda: episode_numbers(), TypeError, "starts, dones: got both or neither, expected one of them"),
        (lambda: episode_numbers(dones=MASK, starts=MASK), TypeError, "starts, dones: got both or neither"),
        (lambda: episode_numbers(dones=IDS), TypeError, "dones: got dtype torch.int64, expected bool"),
        (
            lambda: episode_numbers(starts=MASK[0]),
            ValueError,
            "starts: got shape [3], expected [time, environments]",
        ),
        (
            lambda: episodes([1, 0], dones=MASK),
            ValueError,
            "labels: got 2, expected 3, one for each episode in dones",
        ),
        (
            lambda: episodes(IDS.T, dones=MASK),
            ValueError,
            "labels: got shape [3, 2], expected that of dones [2, 3]",
        ),
        (
            lambda: episodes(IDS, dones=MASK, take="any"),
            ValueError,
            "take: got 'any', expected 'first' or 'last'",
        ),
        (
            lambda: next_token(torch.tensor(1)),
            ValueError,
            "labels: got one number, expected labels of tokens",
        ),
        (lambda: next_token(IDS, [0, 6]), ValueError, "cu_seqlens: got tokens of shape [2, 3]"),
        (lambda: next_token(IDS[0], [1, 3]), ValueError, "cu_seqlens: got [1, 3], expected ascending bounds"),
        (
            lambda: next_token(IDS[0], [0, 3], attention_mask=IDS[0]),
            ValueError,
            "cu_seqlens, attention_mask: got both",
        ),
        (
            lambda: next_token(IDS, attention_mask=IDS[0]),
            ValueError,
            "attention_mask: got shape [3], expected that of labels [2, 3]",
        ),
        (
            lambda: with_errors(IDS, seed=0, false_negative=1.5),
            ValueError,
            "false_negative: got 1.5, expected a rate",
        ),
        (lambda: with_errors(IDS, seed=0, false_positive=-0.1), ValueError, "false_positive: got -0.1"),
        (lambda: with_errors(IDS, seed=0, false_positive=math.nan), ValueError, "false_positive: got nan"),
        (lambda: with_errors(IDS, seed=0.5), TypeError, "seed: got 0.5, expected an int"),
        (
            lambda: with_errors(IDS, seed=0, route=0),
            ValueError,
            "route, base: got 0 for both, expected two routes",
        ),
        (lambda: with_errors(MASK, seed=0, route=2), ValueError, "route: got 2, expected an int from 0 to 1"),
        (
            lambda: with_errors(IDS.float(), seed=0),
            TypeError,
            "labels: got dtype torch.float32, expected integers",
        ),
        (
            lambda: with_errors(IDS, seed=0, groups=IDS[0]),
            ValueError,
            "groups: got shape [3], expected that of labels [2, 3]",
        ),
        (
            lambda: with_errors([0, 1, 1], seed=0, groups=[4, 7, 4]),
            ValueError,
            "groups: got group 4 with the labels [0, 1], expected one label in every group",
        ),
        (lambda: prioritise({}), ValueError, "masks: got none, expected at least one"),
        (lambda: prioritise([MASK]), TypeError, "masks: got a list, expected a mapping from routes to masks"),
        (lambda: prioritise({1: IDS}), TypeError, "masks[1]: got dtype torch.int64, expected bool"),
        (
            lambda: prioritise({1: MASK, 2: MASK[0]}),
            ValueError,
            "masks[2]: got shape [3], expected that of masks[1] [2, 3]",
        ),
        (
            lambda: prioritise({1: MASK, 2: MASK.to("meta")}),
            ValueError,
            "masks[2]: got a tensor on meta, expected the device of masks[1] cpu",
        ),
        (lambda: prioritise({-1: MASK}), ValueError, "masks, a route: got -1, expected an int from 0"),
        (lambda: prioritise({"forget": MASK}), TypeError, "masks, a route: got 'forget', expected an int"),
        (lambda: prioritise({1: MASK}, base=-1), ValueError, "base: got -1"),
        (
            lambda: summarize(IDS + 2, 2),
            ValueError,
            "ids: got 6 of 6 out of range, values [2]; expected 0 <= id < 2",
        ),
        (lambda: summarize(IDS.float(), 2), TypeError, "ids: got dtype torch.float32"),
        (
            lambda: summarize(IDS, "ab"),
            TypeError,
            "routes: got 'ab', expected the number of routes, or their names",
        ),
        (lambda: summarize(IDS, [1, 2]), TypeError, "routes: got [1, 2]"),
        (
            lambda: summarize(IDS.to("meta"), 2),
            ValueError,
            "ids: got a tensor on the meta device, expected one with values",
        ),
        (
            lambda: token_counts(IDS.to("meta"), 2),
            ValueError,
            "input_ids: got a tensor on the meta device, expected one with values",
        ),
        (lambda: summarize(IDS, 0), ValueError, "routes: got 0, expected an int from 1 to 32768"),
        (
            lambda: summarize(IDS, 1, IDS[0]),
            ValueError,
            "input_ids: got shape [3], expected that of ids [2, 3]",
        ),
        (
            lambda: summarize(IDS, 1, IDS, cu_seqlens=[0, 6]),
            ValueError,
            "cu_seqlens: got tokens of shape [2, 3]",
        ),
        (
            lambda: summarize(IDS, 1, IDS, examples=-1),
            ValueError,
            "examples: got -1, expected an int of 0 or more",
        ),
        (
            lambda: summarize(IDS, 1, IDS, context=0),
            ValueError,
            "context: got 0, expected an int of 1 or more",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with expect(error, message):
        call()
