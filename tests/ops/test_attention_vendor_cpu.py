"""PyTorch's attention kernel for the CPU, called below autograd."""

import itertools

import cases
import pytest
import torch
import torch.nn.functional as F
from vendor_cases import (
    CPU,
    DTYPES,
    HALVES,
    HEADS,
    LAYOUTS,
    TOP_LEFT,
    assert_within_budget,
    inputs,
    pattern,
    run,
    same_bits,
)


@pytest.mark.parametrize("dtype", cases.tiered(DTYPES))
@pytest.mark.parametrize("causal", [True, False])
def test_cpu_budget(dtype, causal):
    for kv_heads, (length, head_dim) in itertools.product((8, 2, 1), ((37, 16), (130, 13), (257, 32))):
        tensors = inputs(length, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        for scale in (0.3, head_dim**-0.5):
            asked = pattern(causal=causal, scale=scale)
            assert_within_budget(CPU, tensors, asked, f"{dtype} {kv_heads} {length}")


@pytest.mark.parametrize("dtype", cases.tiered(DTYPES))
@pytest.mark.parametrize("causal", [True, False])
def test_cpu_forward_has_the_bits_of_scaled_dot_product_attention(dtype, causal):
    for kv_heads, (length, head_dim) in itertools.product((8, 2, 1), ((37, 16), (257, 13), (513, 64))):
        q, k, v, _ = inputs(length, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        o, _ = CPU.forward(q, k, v, pattern(causal=causal))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
        assert torch.equal(o, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_cpu_budget_with_padding(dtype, causal):
    """Also before the first token, and of a whole sequence: queries that see no key give 0, and no gradient."""
    for length in (37, 130):
        q, k, v, d_o = inputs(length, batch=4, dtype=dtype)
        key_mask = torch.ones(4, length, dtype=torch.bool)
        key_mask[0, -5:], key_mask[1, :7], key_mask[2] = False, False, False
        asked = pattern(causal=causal, key_mask=key_mask)
        assert_within_budget(CPU, [q, k, v, d_o], asked, f"{dtype} {length}")
        result, _ = run(CPU, q, k, v, d_o, asked)
        for hidden in (result.output, *result.gradients.values()):
            assert not hidden[2].any()
        if not causal:
            ordinary = F.scaled_dot_product_attention(
                q, k, v, attn_mask=key_mask[:, None, None], scale=0.3, enable_gqa=True
            )
            assert torch.equal(result.output, ordinary)


@pytest.mark.parametrize("causal", [True, False])
def test_cpu_single_query_sees_every_key(causal):
    tensors = inputs(1, 37)
    assert_within_budget(CPU, tensors, pattern(causal=causal), "one query")
    key_mask = (torch.arange(37) > 18).expand(2, -1)
    assert_within_budget(CPU, tensors, pattern(causal=causal, key_mask=key_mask), "one query, with padding")


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_single_key(dtype):
    """Its probability is 1: o = v, and the gradients of scores are differences of equal sums of 16 products."""
    q, k, v, d_o = inputs(1, kv_heads=HEADS, dtype=dtype)
    result, lse = run(CPU, q, k, v, d_o, pattern())
    assert torch.equal(result.output, v)
    assert torch.equal(result.gradients["v"], d_o)
    torch.testing.assert_close(lse, (0.3 * q.to(lse.dtype) * k.to(lse.dtype)).sum(-1))
    for name in "qk":
        assert float(result.gradients[name].abs().max()) < 64 * torch.finfo(lse.dtype).eps


@pytest.mark.parametrize(("queries", "keys"), [(20, 37), (37, 20)])
def test_cpu_other_numbers_of_queries_and_keys(queries, keys):
    tensors = inputs(queries, keys)
    assert_within_budget(CPU, tensors, pattern(causal=False), f"{queries} {keys}")
    reason = CPU.why_not(*tensors[:3], pattern())
    assert reason == TOP_LEFT


@pytest.mark.parametrize("dtype", cases.tiered(DTYPES))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_layouts(layout, dtype):
    tensors = inputs(130, dtype=dtype, head_dim=24)
    for chosen in itertools.product((False, True), repeat=4):
        laid_out = [LAYOUTS[layout](t) if other else t for t, other in zip(tensors, chosen, strict=True)]
        assert_within_budget(CPU, laid_out, pattern(), f"{dtype} {layout} {chosen}")
        q, k, v, _ = laid_out
        if all(t.stride(-1) == 1 for t in (q, k, v)):
            expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
            assert torch.equal(CPU.forward(q, k, v, pattern())[0], expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_has_the_same_bits_on_the_same_number_of_threads(dtype, threads):
    """Between numbers of threads its bits differ where its products are MKL's: on Intel, not on AMD."""
    tensors = inputs(300, dtype=dtype)
    try:
        torch.set_num_threads(threads)
        expected, _ = run(CPU, *tensors, pattern())
        for _ in range(3):
            assert same_bits(run(CPU, *tensors, pattern())[0], expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", HALVES)
def test_cpu_gradients_of_a_group_are_rounded_once_more(dtype):
    q, k, v, d_o = inputs(300, dtype=dtype)
    grouped, _ = run(CPU, q, k, v, d_o, pattern())
    ungrouped, _ = run(CPU, q, *(t.repeat_interleave(4, 1) for t in (k, v)), d_o, pattern())
    assert torch.equal(grouped.gradients["q"], ungrouped.gradients["q"])
    for name in "kv":
        summed = ungrouped.gradients[name].float().unflatten(1, (2, 4)).sum(2).to(dtype)
        assert torch.equal(grouped.gradients[name], summed)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_writes_nothing_that_it_was_given_and_its_gradients_are_free_to_write(dtype, kv_heads):
    tensors = inputs(dtype=dtype, kv_heads=kv_heads)
    key_mask = torch.arange(37).expand(2, -1) < 30
    asked = pattern(key_mask=key_mask)
    saved = CPU.forward(*tensors[:3], asked)
    given = (*tensors, *saved, key_mask)
    before = [t.clone() for t in given]
    gradients = CPU.backward(tensors[3], *tensors[:3], saved, asked)
    for gradient in gradients:
        gradient.fill_(torch.nan)
    for t, copy in zip(given, before, strict=True):
        assert torch.equal(t, copy)
    again = CPU.backward(tensors[3], *tensors[:3], saved, asked)
    again[0].zero_()
    again[1].zero_()
    assert all(gradient.isfinite().all() for gradient in again)
    assert again[2].any()
    assert all(gradient.isnan().all() for gradient in gradients)
