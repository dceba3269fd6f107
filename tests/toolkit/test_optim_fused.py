"""RoutedAdamW(fused=True): every backend's kernel against the formula in fp64, the optimizer against its own loop."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradroute
from gradroute import BackendError, backends
from gradroute.backends import composed, native
from gradroute.optim import RoutedAdamW
from gradroute.primitives.arguments import AdamWOptions, Blocks

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)  # CUDA kernels take the first three
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

INSTRUCTION_SETS = native.module.INSTRUCTION_SETS if native.module else ()
needs_native = pytest.mark.skipif(native.module is None, reason=str(native.load_error))


def bits(tensor):
    return tensor.detach().contiguous().view(INTEGERS[tensor.itemsize])


def same(one, other):
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def listed(tensors):
    """The tensors of one parameter as `adamw_step` takes those of several."""
    return [[] if tensor is None else [tensor] for tensor in tensors]


class Step:
    """The arguments of a step on a matrix: any numbers, but moments of which v is no smaller than g² may make it.

    Attributes:
        tensors: parameter, gradient, exp_avg, exp_avg_sq and max_exp_avg_sq or None, `[N, M]`.
        factors: `[5, n]` in fp64.
        touched: bool `[N, M]`.
    """

    def __init__(self, shape, dtype, blocks, amsgrad, transposed=False, beta1=0.9, maximize=False, share=0.6):
        number = {"rows": shape[0], "columns": shape[1], "one": 1}[blocks]
        self.by_column = blocks == "columns"
        self.kind = int(Blocks[blocks.upper()])
        self.options = AdamWOptions(beta1, 0.99, 1e-3, maximize)
        made = [torch.randn(shape[::-1] if transposed else shape) for _ in range(5)]
        made[3:] = [tensor.square() for tensor in made[3:]]
        made = [(tensor.T if transposed else tensor).to(dtype) for tensor in made]
        self.tensors = [*made[:4], made[4] if amsgrad else None]
        steps = torch.randint(1, 9, (number,)).double()
        touched = (torch.rand(number) < share).double()
        self.factors = torch.stack(
            [
                torch.full_like(steps, 0.97),
                0.1 / (1 - beta1**steps),
                (1 - 0.99**steps).rsqrt(),
                touched,
                steps,
            ]
        )
        self.touched = (touched[None, :] if self.by_column else touched[:, None]).bool().expand(shape)

    def copies(self, dtype=None, device=None):
        """Copies of the tensors with the same strides."""
        made = [None if tensor is None else torch.empty_like(tensor, dtype=dtype) for tensor in self.tensors]
        for tensor, source in zip(made, self.tensors, strict=True):
            if tensor is not None:
                tensor.copy_(source)
        return [None if tensor is None else tensor.to(device) for tensor in made]

    def take(self, kernel, device=None):
        """The tensors after the step."""
        tensors = self.copies(device=device)
        computed = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        # The tensors are views of larger memory, as in the optimizer: rows are further apart than they are long.
        factors = torch.cat([self.factors, self.factors], 1).to(device, computed)[:, : self.factors.shape[1]]
        kernel(*listed(tensors), factors, [self.kind], self.options)
        return [None if tensor is None else tensor.cpu() for tensor in tensors]

    def exact(self):
        """The tensors after the step, in fp64."""
        tensors = self.copies(torch.float64)
        composed.adamw_step(*listed(tensors), self.factors, [self.kind], self.options)
        return tensors

    def bounds(self, exact):
        """The bounds of the error of a right result, for parameter, m, v, and the largest v.

        They count roundings: one for every operation in the dtype of the computation, at most four in a row before the
        change of the parameter and six in the change, and one in the dtype that is stored.
        """
        dtype = self.tensors[0].dtype
        computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        stored = 0.5 * torch.finfo(dtype).eps if dtype in HALVES else 0.0
        p, g, m, _, largest = (None if t is None else t.double().abs() for t in self.tensors)
        decay, size, scale = ((row[None, :] if self.by_column else row[:, None]) for row in self.factors[:3])
        of_m = 4 * computed * (m + g)
        of_v = 4 * computed * exact[3]
        divisor = (exact[3] if largest is None else exact[4]).sqrt() * scale + self.options.eps
        change = size * exact[2].abs() / divisor
        of_p = 4 * computed * decay * p + size * of_m / divisor + 6 * computed * change
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        each = zip((of_p, of_m, of_v, of_v), (exact[0], *exact[2:]), strict=True)
        return [None if e is None else bound + stored * (e.abs() + bound) + tiny for bound, e in each]

    def check(self, kernel, device=None):
        """Results are within the bounds; the gradient, and what is not touched, keep every bit."""
        got, exact = self.take(kernel, device), self.exact()
        assert same(got[1], self.tensors[1])
        changed = zip(got[:1] + got[2:], exact[:1] + exact[2:], self.bounds(exact), strict=True)
        before = self.tensors[:1] + self.tensors[2:]
        for (one, expected, bound), old in zip(changed, before, strict=True):
            if old is None:
                continue
            assert same(one[~self.touched], old[~self.touched])
            wrong = ~((one.double() - expected).abs() <= bound) & self.touched
            assert not wrong.any(), (one[wrong], expected[wrong])


def take_steps(kernel, device=None):
    """Steps with and without amsgrad, for tests that look at calls."""
    for amsgrad in (False, True):
        Step((3, 7), torch.float32, "columns", amsgrad).take(kernel, device)


SHAPES = ((1, 1), (3, 700), (70, 5), (1, 300), (40, 40))
BLOCKS = ("rows", "columns", "one")


def check_kernel(kernel, dtype, device=None, shapes=SHAPES):
    """Steps of rows, columns and whole matrices, with and without amsgrad, transposed; and one where all is touched."""
    for shape in shapes:
        for index, blocks in enumerate(BLOCKS):
            for amsgrad in (False, True):
                Step(shape, dtype, blocks, amsgrad, share=1.0).check(kernel, device)
                Step(shape, dtype, blocks, amsgrad, transposed=index != 1).check(kernel, device)
            Step(shape, dtype, blocks, False, beta1=0.3, maximize=True).check(kernel, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_composed(dtype):
    check_kernel(composed.adamw_step, dtype)


@needs_native
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native(dtype, instruction_set, monkeypatch):
    monkeypatch.setattr(native.loading, "instruction_set", instruction_set)
    check_kernel(native.adamw_step, dtype)
    # This matrix is large enough to be shared among threads.
    check_kernel(native.adamw_step, dtype, shapes=((200, 300),))


@pytest.mark.skipif("triton" not in backends._PRIMITIVES, reason="the package triton is not installed")
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_triton(dtype, device):
    shapes = SHAPES if device.type == "cuda" else ((3, 300), (9, 5))
    check_kernel(backends.primitives("triton").adamw_step, dtype, device, shapes)


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_cuda(dtype, backend, device):
    check_kernel(backends.primitives(backend).adamw_step, dtype, device)


def strange_numbers(dtype):
    """Blocks that are not touched keep zeros of both signs, infinities, NaN, numbers without a normal exponent."""
    tiny = torch.finfo(dtype).smallest_normal
    numbers = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, tiny / 4, -tiny / 4, 1.0], dtype=dtype
    )
    with_payload = bits(numbers).clone()
    with_payload[4] |= 1
    return with_payload.view(dtype)


def check_strange_numbers(kernel, dtype, device=None):
    for blocks in ("rows", "columns"):
        step = Step((8, 8), dtype, blocks, True)
        step.factors[3] = torch.arange(8) == 3
        step.touched = (torch.arange(8) == 3)[:, None].expand(8, 8)
        numbers = strange_numbers(dtype).expand(8, 8).clone()
        numbers[3] = 1
        if blocks == "columns":
            step.touched, numbers = step.touched.T, numbers.T
        step.tensors = [numbers, torch.ones(8, 8, dtype=dtype), *([numbers] * 3)]
        for index, got in enumerate(step.take(kernel, device)):
            assert same(got[~step.touched], step.tensors[index][~step.touched])
        assert not same(step.take(kernel, device)[0][step.touched], step.tensors[0][step.touched])


STRANGE = [("torch", dtype) for dtype in DTYPES]
STRANGE += [("cpu", dtype) for dtype in DTYPES if native.module is not None]
STRANGE += [("triton", dtype) for dtype in DTYPES[:3] if "triton" in backends._PRIMITIVES]


@pytest.mark.parametrize(("backend", "dtype"), STRANGE)
def test_what_is_not_touched_keeps_every_bit_whatever_it_is(backend, dtype):
    check_strange_numbers(backends.primitives(backend).adamw_step, dtype)


def check_touched(primitives, dtype, device=None):
    """Blocks with one element that is not 0 are found, whatever it is and wherever; zeros of both signs are not."""
    tiny = torch.finfo(dtype).tiny / 4
    gradients, kinds, expected = [], [], []
    for shape in ((70, 300), (300, 70), (9, 40), (1, 5), (7,)):
        for kind in Blocks:
            for transposed in (False, True) if len(shape) == 2 else (False,):
                gradient = torch.full(shape, -0.0, dtype=dtype)
                if transposed:
                    gradient = gradient.T.contiguous().T
                for value in (torch.nan, -tiny, 3.0):
                    at = tuple(int(torch.randint(size, ())) for size in shape)
                    gradient[at] = value
                matrix = gradient if gradient.dim() == 2 else gradient[None]
                by = {Blocks.ROWS: 1, Blocks.COLUMNS: 0, Blocks.ONE: (0, 1)}[kind]
                expected.append((matrix != 0).any(by).reshape(-1))
                gradients.append(gradient.to(device))
                kinds.append(int(kind))
        gradients.append(torch.zeros(shape, dtype=dtype, device=device))
        kinds.append(0)
        expected.append(torch.zeros(shape[0] if len(shape) == 2 else 1, dtype=torch.bool))
    found = primitives.touched_blocks(gradients, kinds)
    assert torch.equal(found.cpu(), torch.cat(expected))


def check_several(primitives, dtype, moments=None, shapes=(*SHAPES, (2, 1024))):
    """The step of many parameters, of all kinds and layouts, is bit for bit the step of each by itself."""
    steps = [
        Step(shape, dtype, blocks, True, transposed)
        for shape in shapes
        for blocks in BLOCKS
        for transposed in (False, True)
    ]
    own = [step.copies() for step in steps]
    options = steps[0].options._replace(stochastic=moments is not None)
    if moments is not None:
        own = [[*tensors[:2], *(tensor.to(moments) for tensor in tensors[2:])] for tensors in own]
    together = [[tensor.clone() for tensor in tensors] for tensors in own]
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    for tensors, step in zip(own, steps, strict=True):
        primitives.adamw_step(*listed(tensors), step.factors.to(computed), [step.kind], options)
    factors = torch.cat([step.factors for step in steps], 1).to(computed)
    columns = [list(column) for column in zip(*together, strict=True)]
    primitives.adamw_step(*columns, factors, [step.kind for step in steps], options)
    for one, other in zip(own, together, strict=True):
        assert all(map(same, one, other))


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_are_touched(backend, dtype):
    check_touched(backends.primitives(backend), dtype)


@needs_native
@pytest.mark.parametrize(("dtype", "moments"), [(torch.float32, None), (torch.float32, torch.bfloat16)])
def test_many_parameters_are_stepped_as_each_by_itself(dtype, moments):
    check_several(backends.primitives("cpu"), dtype, moments)


@pytest.mark.skipif("triton" not in backends._PRIMITIVES, reason="the package triton is not installed")
@pytest.mark.parametrize(("dtype", "moments"), [(torch.float32, None), (torch.float32, torch.bfloat16)])
def test_triton_steps_parameters_of_one_shape_together(dtype, moments):
    check_several(backends.primitives("triton"), dtype, moments, shapes=((3, 70), (5, 9), (3, 70), (3, 70)))


@pytest.mark.skipif("triton" not in backends._PRIMITIVES, reason="the package triton is not installed")
def test_triton_launches_once_for_eight_parameters_of_a_shape():
    steps = [Step((3, 40), torch.float32, "rows", True) for _ in range(9)]
    steps.insert(4, Step((3, 40), torch.float32, "columns", True))
    columns = [list(column) for column in zip(*(step.copies() for step in steps), strict=True)]
    factors = torch.cat([step.factors for step in steps], 1).float()
    with backends.triton.record(90) as launches:
        kinds = [step.kind for step in steps]
        backends.primitives("triton").adamw_step(*columns, factors, kinds, steps[0].options)
    assert [len(launched.arguments["p"]) for launched in launches] == [8, 1, 1]
    by_rows = [step.factors for step in steps if step.kind == Blocks.ROWS]
    assert torch.equal(launches[0].arguments["factors"], torch.cat(by_rows[:8], 1).float())


MISTAKES = {
    "another epsilon": {"eps": 1.01e-3},
    "another weight of squares": {"beta2": 0.9901},
    "another weight of gradients": {"beta1": 0.9001},
    "descent": {"maximize": True},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    def kernel(*arguments):
        *rest, options = arguments
        composed.adamw_step(*rest, options._replace(**MISTAKES[mistake]))

    with pytest.raises(AssertionError):
        check_kernel(kernel, torch.float32)


def test_a_block_too_many_is_found():
    def kernel(*arguments):
        *rest, factors, kinds, options = arguments
        factors[3] = 1
        composed.adamw_step(*rest, factors, kinds, options)

    with pytest.raises(AssertionError):
        check_kernel(kernel, torch.float32)


def check_nan(kernel, device=None):
    """A gradient that is NaN makes NaN of all; the largest v is NaN from then on."""
    for blocks in BLOCKS:
        step = Step((3, 40), torch.float32, blocks, True, share=1.0)
        step.tensors[1][0] = torch.nan
        step.tensors[4][1] = torch.nan
        got = step.take(kernel, device)
        assert all(torch.isnan(tensor[0]).all() for tensor in (got[0], *got[2:]))
        assert torch.isnan(torch.cat([got[4][1], got[0][1]])).all()
        assert not torch.isnan(torch.cat([got[2][1], got[0][2], got[4][2]])).any()


@pytest.mark.parametrize("backend", dict(STRANGE))
def test_nan_is_not_hidden(backend):
    check_nan(backends.primitives(backend).adamw_step)


@pytest.mark.skipif("triton" not in backends._PRIMITIVES, reason="the package triton is not installed")
@pytest.mark.parametrize("shape", [(1, 2**27), (2**27, 1), (8, 2**24)])
def test_grids_of_large_matrices(shape):
    """A grid is within the limits of CUDA, which the interpreter lacks; the matrices have no memory of that size."""
    with backends.triton.record(90) as launches:
        large = torch.zeros(1, 1).expand(shape)
        options = AdamWOptions(0.9, 0.99, 1e-8, False)
        backends.primitives("triton").adamw_step(*[[large]] * 4, [], torch.zeros(5, 1), [2], options)
    (launched,) = launches
    tiles = shape[0] * shape[1] // (launched.config["BLOCK_N"] * launched.config["BLOCK_M"])
    assert tiles == 2**17


@needs_native
@settings(max_examples=80)
@given(
    st.lists(st.integers(1, 19), max_size=4),
    st.sampled_from([0, 1, None]),
    st.booleans(),
    st.fixed_dictionaries(
        {
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.99), (0.3, 0.9)]),
            "weight_decay": st.sampled_from([0.0, 0.3]),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
)
def test_it_is_the_loop_in_other_words(shape, block_dim, tensor_lr, options):
    """Both ways agree in fp64, up to rounding, and blocks that are not touched keep every bit."""
    block_dim = block_dim if len(shape) >= 2 else 0
    loop = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    fused = copy.deepcopy(loop)
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
    own = RoutedAdamW([loop], lr, block_dim=block_dim, **options)
    ours = RoutedAdamW([fused], lr, block_dim=block_dim, **options, fused=True)
    dims = [d for d in range(len(shape)) if d != block_dim or block_dim is None]
    for _ in range(4):
        keep = torch.rand([1 if d in dims else size for d, size in enumerate(shape)]) < 0.6
        loop.grad = torch.randn(shape, dtype=torch.float64) * keep
        fused.grad = loop.grad.clone()
        before = fused.detach().clone()
        own.step()
        ours.step()
        untouched = ~keep.expand(shape)
        assert same(fused[untouched], before[untouched])
        torch.testing.assert_close(fused, loop, rtol=1e-12, atol=1e-12)
    for name, value in own.state[loop].items():
        torch.testing.assert_close(ours.state[fused][name], value, rtol=1e-12, atol=1e-14)


@needs_native
def test_untouched_parameters_of_a_group_and_empty_ones():
    weights = [nn.Parameter(torch.randn(size)) for size in ((3, 2), (0, 2), (4,), ())]
    before = [weight.detach().clone() for weight in weights]
    optimizer = RoutedAdamW(weights, fused=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    weights[2].grad[1] = 1
    optimizer.step()
    assert [same(weight, old) for weight, old in zip(weights, before, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    assert same(weights[2][[0, 2, 3]], before[2][[0, 2, 3]])


@needs_native
def test_elements_out_of_order_are_left_to_the_loop():
    """The loop steps with a warning. A transposed matrix is not out of order, and a gradient may be out of order."""
    transposed = nn.Parameter(torch.randn(3, 4).T)
    ordered = nn.Parameter(torch.randn(2, 3, 4, 5))
    for weight in (transposed, ordered):
        weight.grad = torch.randn_like(weight)
    ordered.grad = ordered.grad.contiguous(memory_format=torch.channels_last)
    RoutedAdamW([transposed, ordered], fused=True).step()
    shuffled = nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    expected = copy.deepcopy(shuffled)
    shuffled.grad = torch.randn_like(shuffled)
    expected.grad = shuffled.grad.clone()
    optimizer = RoutedAdamW([shuffled], fused=True)
    with pytest.warns(
        RuntimeWarning, match=r"shape \[2, 3, 4, 5\] is updated by .* do not lie in order"
    ) as told:
        optimizer.step()
    assert told[0].filename == __file__
    RoutedAdamW([expected]).step()
    assert same(shuffled, expected)
    torch._dynamo.reset()
    torch.compile(optimizer.step, backend="eager", fullgraph=True)()


@needs_native
def test_moments_of_another_dtype_are_left_to_the_loop():
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2)
    optimizer = RoutedAdamW([weight], fused=True)
    optimizer.step()
    weight.data, weight.grad = weight.data.bfloat16(), None
    weight.grad = torch.ones(3, 2, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match=r"its moments are of torch.bfloat16, torch.float32"):
        optimizer.step()
    assert (optimizer.state[weight]["step"] == 2).all()


@needs_native
def test_a_backward_that_needs_the_old_values_raises():
    weight = nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    RoutedAdamW([weight], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_native)])
def test_a_parameter_of_another_shape_is_refused(fused):
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = RoutedAdamW([weight], fused=fused)
    optimizer.step()
    weight.data = torch.ones(2, 5)
    with pytest.raises(
        ValueError, match=r"shape \[2, 5\] whose gradient is of shape \[2, 2\], expected the parameter's"
    ):
        optimizer.step()
    weight.grad = None
    weight.grad = torch.ones(2, 5)
    with pytest.raises(
        ValueError, match=r"shape \[2, 5\] whose exp_avg is of shape \[2, 2\], expected it not to"
    ):
        optimizer.step()
    assert (optimizer.state[weight]["step"] == 1).all()
    assert (weight == 1).all()


@needs_native
def test_the_largest_square_counts_with_amsgrad_only():
    """States are the same both ways, also where the option changes between steps."""
    weights = [nn.Parameter(torch.ones(3, 2, dtype=torch.float64)) for _ in range(2)]
    loop, fused = (RoutedAdamW([w], amsgrad=True, fused=w is weights[1]) for w in weights)
    for step, amsgrad in enumerate((True, False)):
        for optimizer in (loop, fused):
            optimizer.param_groups[0]["amsgrad"] = amsgrad
            optimizer.param_groups[0]["params"][0].grad = torch.full(
                (3, 2), 1.0 - step / 2, dtype=torch.float64
            )
            optimizer.step()
    torch.testing.assert_close(*weights, rtol=1e-14, atol=0)


@pytest.mark.parametrize("fused", [None, 1, "yes"])
def test_fused_is_a_bool(fused):
    with pytest.raises(TypeError, match=f"fused: got {fused!r}, expected True or False"):
        RoutedAdamW([nn.Parameter(torch.zeros(2))], fused=fused)


def without_native(monkeypatch):
    monkeypatch.setattr(native.loading, "module", None)
    monkeypatch.setattr(native.loading, "load_error", "the native module was not built")
    return r"fused=True\): no backend can run it: cpu: the native module was not built"


def test_without_kernels_it_is_refused(monkeypatch):
    message = without_native(monkeypatch)
    optimizer = RoutedAdamW([nn.Parameter(torch.zeros(2))])
    group = {"params": [nn.Parameter(torch.zeros(3, dtype=torch.float16))], "fused": True}
    with pytest.raises(BackendError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@needs_native
def test_a_step_that_is_refused_is_not_counted(monkeypatch):
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    optimizer = RoutedAdamW([weight], fused=True)
    optimizer.step()
    with monkeypatch.context() as patched, pytest.raises(BackendError, match=without_native(patched)):
        optimizer.step()
    assert (optimizer.state[weight]["step"] == 1).all()
    optimizer.step()
    assert (optimizer.state[weight]["step"] == 2).all()


def test_the_backend_that_is_chosen_for_the_process(monkeypatch):
    """The backend that is asked for computes the step, or is refused with a reason."""
    called = []
    monkeypatch.setattr(composed, "adamw_step", lambda *arguments: called.append(arguments))
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    with gradroute.use_backend("torch"):
        RoutedAdamW([weight], fused=True).step()
    assert len(called) == 1
    with (
        gradroute.use_backend("reference"),
        pytest.raises(BackendError, match="no backend can run it: reference: it has no kernels"),
    ):
        RoutedAdamW([weight], fused=True)


@needs_native
@pytest.mark.parametrize("saved_fused", [False, True])
def test_how_it_computes_is_no_state(saved_fused):
    def optimizer(fused):
        weight = nn.Parameter(torch.ones(3, 2))
        weight.grad = torch.ones(3, 2)
        made = RoutedAdamW([weight], fused=fused)
        made.step()
        return made

    loaded = optimizer(not saved_fused)
    loaded.load_state_dict(optimizer(saved_fused).state_dict())
    assert loaded.param_groups[0]["fused"] is not saved_fused
    loaded.step()
    # A state of a version that had no such option.
    state = optimizer(saved_fused).state_dict()
    del state["param_groups"][0]["fused"]
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["fused"] is not saved_fused
    pickled = optimizer(False)
    del pickled.param_groups[0]["fused"], pickled.defaults["fused"]
    copy.deepcopy(pickled).step()


@needs_native
def test_a_compiled_step():
    """A step compiles whole and with the same bits, because the kernel is an operation of torch.library."""
    weights = [nn.Parameter(torch.randn(size)) for size in ((5, 3), (4,), (2, 3, 4))]
    optimizer = RoutedAdamW(weights, torch.tensor(0.1), fused=True)
    other = copy.deepcopy(optimizer)
    for one in (optimizer, other):
        for weight in one.param_groups[0]["params"]:
            weight.grad = torch.ones_like(weight)
            weight.grad[1] = 0
        one.step()
    torch._dynamo.reset()
    compiled = torch.compile(other.step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        optimizer.step()
        compiled()
    for one, two in zip(weights, other.param_groups[0]["params"], strict=True):
        assert same(one, two)
        assert all(same(optimizer.state[one][name], other.state[two][name]) for name in MOMENTS[:2])
