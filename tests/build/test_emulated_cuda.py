"""The CUDA kernels of csrc/ without a GPU: on an emulation of CUDA they keep the error budget of every backend."""

import dataclasses
import itertools

import cases
import emulated_cuda
import pytest
import test_activation_forward
import test_native
import test_ops
import test_optim_fused
import torch

from gradroute import backends, testing
from gradroute.backends import composed, native
from gradroute.primitives.arguments import NormArguments

pytestmark = [
    pytest.mark.skipif(
        bool(emulated_cuda.missing_tools()),
        reason=f"no {', '.join(emulated_cuda.missing_tools())} to compile the emulation of CUDA with",
    ),
    pytest.mark.usefixtures("emulated"),
]

OPS = [op for op, row in backends.OPS.items() if "cpu" in row]
DTYPES = cases.dtypes("cuda")
CPU = torch.device("cpu")

# Vectors over several tiles, of fp32 only, none; a kernel's tile is 32 vectors of 16 bytes.
SIZES = (
    testing.Sizes(d_model=40, d_ff=264),
    testing.Sizes(d_model=264, d_ff=40),
    testing.Sizes(d_model=20, d_ff=36),
    testing.Sizes(d_model=37, d_ff=45),
)


@pytest.fixture
def emulated(emulated_cuda_module, monkeypatch):
    """Backend cpu runs the emulated kernels."""
    emulated_cuda.use(emulated_cuda_module, monkeypatch)


TOKENS = (0, 1, 70, 130, (2, 19))  # sums are over runs of 64


def budget_cases():
    """All axes of the error budget, and widths and tokens that take all paths of the kernels."""
    found = []
    for op in OPS:
        axes = {
            "dtype": DTYPES,
            "tables": testing.TABLE_KINDS,
            "strength": testing.STRENGTHS,
            "tokens": ((1, 0), (1, 1), (1, 70), (2, 19)) if op == "routed_attention" else TOKENS,
            "gradient": testing.LAYOUTS,
            "inputs": ("contiguous", "sliced", "transposed"),
            "variant": testing.variants(op),
            "sites": ("all", *testing.site_names(op)),
            "bias": (True, False),
            "sizes": SIZES,
        }
        for number, case in enumerate(cases.covering(axes)):
            found.append(pytest.param(op, case, id=f"{op}-{number}"))
    return found


@pytest.mark.parametrize(("op", "case"), budget_cases())
def test_budget(op, case):
    test_ops.run_budget_case(op, "cpu", case, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_the_order_of_threads_does_not_matter(op, dtype):
    """Two runs, in which threads and so warps take turns in another order, have the same bits."""
    for sizes in SIZES[1::2]:
        call = cases.make(op, dtype=dtype, tokens=130, sizes=sizes, strength="token")
        testing.assert_same_bits(call.run("cpu"), call.run("cpu"), op)


# Rows that stay in registers, up to the longest (of fp32, of halves); that are read again; that take no vectors.
@pytest.mark.slow
@pytest.mark.parametrize("d_model", [4096, 8192, 8200, 8209])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["routed_rms_norm", "routed_layer_norm"])
def test_norms_of_long_rows(op, dtype, d_model):
    sizes = testing.Sizes(d_model=d_model)
    for variant in testing.variants(op):
        cases.make(op, dtype=dtype, tokens=5, sizes=sizes, **variant).assert_within_budget("cpu")
    cases.make(op, dtype=dtype, tokens=67, sizes=sizes, strength="token").assert_within_budget("cpu")


MIXED = [(dy, x) for dy in DTYPES for x in DTYPES if dy != x]


@pytest.mark.parametrize("d_model", [264, 45])
@pytest.mark.parametrize(("dy_dtype", "x_dtype"), MIXED)
def test_norms_of_two_dtypes(dy_dtype, x_dtype, d_model):
    """dy in another dtype than x, and an fp32 weight."""
    call = cases.make("routed_layer_norm", tokens=70, sizes=testing.Sizes(d_model=d_model), strength="token")
    dy, x = call.upstream.to(dy_dtype), call.tensors["x"].to(x_dtype)

    layer_norm = NormArguments(1e-5, 0.0, centered=True, round_x_hat=False)
    rms_norm = NormArguments(1e-6, 1.0, centered=False, round_x_hat=False)

    def gradients(backend, dy, x, weight):
        masks = call.routes, call.sites.update
        return (
            *backend.norm_backward(dy, x, weight, *masks, layer_norm, want_weight=True, want_bias=True),
            *backend.norm_backward(dy, x, weight, *masks, rms_norm, want_weight=True, want_bias=False)[:2],
        )

    weight = call.tensors["weight"]
    exact = gradients(composed, dy.double(), x.double(), weight.double())
    plain, actual = (gradients(backend, dy, x, weight) for backend in (composed, native))
    for one in zip(actual, exact, plain, strict=True):
        assert testing.excess(*one) is None


@pytest.mark.slow
@pytest.mark.parametrize("variant", testing.variants("routed_embedding"))
@pytest.mark.parametrize("d_model", [40, 264, 37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_repeat(dtype, d_model, variant):
    """As often as a warp has lanes, as a block has, more often."""
    repeats = torch.tensor([31, 32, 33, 1, 384, 385, 0, 500])
    sizes = testing.Sizes(d_model=d_model, vocabulary=len(repeats))
    call = cases.make(
        "routed_embedding", dtype=dtype, tokens=int(repeats.sum()), sizes=sizes, strength="token", **variant
    )
    tokens = torch.repeat_interleave(torch.arange(len(repeats)), repeats)[torch.randperm(int(repeats.sum()))]
    call = dataclasses.replace(call, tensors=call.tensors | {"tokens": tokens})
    call.assert_within_budget("cpu")


HEADS = [(2, 3, 5, 7), (2, 3, 37, 64), (1, 3, 9, 320), (1, 3, 70, 8)]


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_attention(dtype, shape):
    for in_place in (False, True):
        test_native.check_masks_by_token_and_head(dtype, in_place, shape)
    test_native.check_delta_of_attention(dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strange_numbers_in_steps_of_adamw(dtype):
    test_optim_fused.check_strange_numbers(native.adamw_step, dtype)
    test_optim_fused.check_nan(native.adamw_step)
    test_optim_fused.check_touched(native, dtype)
    test_optim_fused.check_several(native, dtype)


@pytest.mark.parametrize("tables", testing.TABLE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_in_place(dtype, tables):
    """The bits of a product in a new matrix, whatever a segment shares with the vectors that it touches."""
    for features, layout in itertools.product((264, 45), ("contiguous", "sliced", "transposed")):
        sizes = testing.Sizes(d_model=features)
        call = cases.make(
            "route_grad",
            dtype=dtype,
            tokens=70,
            tables=tables,
            strength="token",
            gradient=layout,
            sizes=sizes,
        )
        expected = native.masked_product(call.upstream, call.routes, call.sites)
        assert call.sites.density == 1 or not torch.equal(expected, call.upstream)
        native.masked_product(call.upstream, call.routes, call.sites, overwrite=True)
        assert torch.equal(call.upstream, expected)


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0)])
def test_nothing_is_launched_for_empty_matrices(emulated_cuda_module, rows, cols):
    """The launch of an empty grid would be an error. The operands are as backend cuda hands them over."""
    m, heads = (0, rows, cols, cols, 1, 0), (0, (1, 2, rows, cols), (0, 0, 0, 0), 0)
    routing, stream = (0, 0, 0, False), (0, 0)
    mask, masks = (routing, None), (routing, (), (), ())
    calls = {
        "masked_product": (m, m, (routing, (0, 1)), []),
        "bias_grad": (m, m, mask),
        "activation_backward": (m, m, m, m, m, masks, "silu"),
        "glu_backward": (m, m, m, m, m, m, m, m, masks, "silu"),
        "activation_forward": (m, m, m, mask, "silu"),
        "norm_backward": (m, m, m, m, m, m, mask, 1e-5, 0.0, False, False),
        "embedding_backward": (m, m, 0, 0, -1, mask),
        "masked_heads": (heads, heads, (routing, (0, 1))),
        "attention_delta": (heads, heads, heads, m, (routing, None, None)),
        "touched_blocks": ([(m, 0, 0)], 0),
        "adamw_step": ([(m, m, m, m, None, 0, 0)], m, 0.9, 0.99, 1e-8, False, False),
    }
    assert set(calls) == set(emulated_cuda_module.KERNELS)
    for name, operands in calls.items():
        assert getattr(emulated_cuda_module.cpu_baseline, name)(operands, stream) is None, name


def run_float64(op, **options):
    return lambda: cases.make(op, dtype=torch.float64, **options).run("cpu")


REFUSING = {
    "masked_product": run_float64("route_grad"),
    "bias_grad": run_float64("routed_linear", sites="update_bias"),
    "activation_backward": run_float64("routed_activation", sites="pre"),
    "glu_backward": run_float64("routed_glu", sites="pre"),
    "activation_forward": lambda: test_activation_forward.run_forward(torch.float64),
    "norm_backward": run_float64("routed_layer_norm"),
    "embedding_backward": run_float64("routed_embedding"),
    "masked_heads": lambda: test_native.check_masks_by_token_and_head(torch.float64, False, HEADS[0]),
    "attention_delta": lambda: test_native.check_delta_of_attention(torch.float64, HEADS[0]),
    "touched_blocks": lambda: test_optim_fused.check_touched(native, torch.float64),
    "adamw_step": lambda: test_optim_fused.check_kernel(native.adamw_step, torch.float64),
}


def test_every_kernel_is_asked_to_refuse(emulated_cuda_module):
    assert set(REFUSING) == set(emulated_cuda_module.KERNELS)


@pytest.mark.parametrize("function", REFUSING)
def test_float64_is_refused(function):
    with pytest.raises(ValueError, match=f"^{function}: CUDA kernels take no float64$"):
        REFUSING[function]()


# A line of bias_grad's kernel (old, new), and what its mistake ends in.
MISTAKES = {
    "a barrier that is missing": (
        "  __syncthreads();\n  for (int feature = threadIdx.y * TILE_LANES",
        "  for (int feature = threadIdx.y * TILE_LANES",
        r"dbias: maximum error .* exceeds",
    ),
    "a barrier that not all threads reach": (
        "store_sums(p.sums, run, tile, total);",
        "if (first < p.g.cols) store_sums(p.sums, run, tile, total);",
        "deadlock: a barrier or a warp's operation that not all threads reach",
    ),
    "vectors that are not aligned": (
        "return reinterpret_cast<uintptr_t>(data) % BYTES_PER_ACCESS == 0;",
        "return true;",
        "a misaligned address, .*cuda.cuh:[0-9]+",
    ),
    "shared memory that is too small": (
        "totals[TILE_ROWS][TILE_LANES * N]",
        "totals[TILE_ROWS - 1][TILE_LANES * N]",
        "an index outside of an array, .*cuda.cuh:[0-9]+",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(emulated_cuda_folder, mistake, tmp_path, monkeypatch):
    old, new, message = MISTAKES[mistake]
    emulated_cuda.build_changed(tmp_path, emulated_cuda_folder, "linear.cu", old, new)
    emulated_cuda.use(emulated_cuda.load(tmp_path), monkeypatch)
    call = cases.make("routed_linear", tokens=70, sites="update_bias", sizes=testing.Sizes(d_ff=40))
    if "aligned" in mistake:
        call = call.with_upstream(torch.randn(70 * 40 + 1)[1:].view(70, 40))
    with pytest.raises((AssertionError, RuntimeError), match=message):
        call.assert_within_budget("cpu")
