"""routed_attention on every backend against its statement in NumPy: sites, tiles, patterns and shapes."""

import contextlib
import itertools

import attention_statement as statement
import cases
import pytest
import torch
from cases import EDGES

from gradroute import AttentionSites, BackendError, Routes, Table, backends, routed_attention, testing
from gradroute.testing import Result, Sample, assert_result_within_budget, assert_same_bits

BACKENDS = backends.OPS["routed_attention"]
SITES = testing.site_names("routed_attention")

# The error that is allowed to an element, as a share of its exact value, or of 0.1 where that is smaller.
# fp32: 250 eps, because a gradient sums up to 400 products, which cancel; the reference's worst error in 384 calls of
# test_all_sites_together, of 12 seeds, is 6e-6. fp64: 5e4 eps, far above rounding and far below any wrong mask.
TOLERANCES = {torch.float32: 3e-5, torch.float64: 1e-11}

# Efficient attention multiplies fp32 on tensor cores, in three products of TF32. TF32 has 10 bits of mantissa: of an
# operand cut off at them and the rest rounded to them, 2⁻²¹ is left, and the product of both operands' rests, 2⁻²⁰, is
# not made: together up to 2⁻¹⁹, 16 eps of a product. Four products follow one another from the scores to dq and dk,
# which makes 64 eps, of terms that cancel to a quarter of their size: about 250 eps more. The worst error of these
# tests with such products emulated is 1.1e-5.
TOLERANCE_OF_3XTF32 = TOLERANCES[torch.float32] + 256 * 2**-23

# For sequences of several tiles: Triton's interpreter takes up to a second a head.
SMALL = {"batch": 1, "heads": 2, "kv_heads": 1}

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def on_every_backend(axes):
    """A case for every combination of values; under triton, which interprets, covering ones.

    `axes` are values by name; a function makes those of a backend.
    """
    found = []
    for backend in BACKENDS:
        own = {name: values(backend) if callable(values) else values for name, values in axes.items()}
        full = (dict(zip(own, values, strict=True)) for values in itertools.product(*own.values()))
        for number, case in enumerate(cases.covering(own) if backend == "triton" else full):
            found.append(pytest.param(backend, case, id=f"{backend}-{number}"))
    return pytest.mark.parametrize(("backend", "case"), found)


def is_interpreted(backend, device):
    return backend == "triton" and device.type == "cpu"


def dtypes(backend):
    return [
        dtype for dtype in (torch.float32, torch.bfloat16, torch.float64) if dtype in cases.dtypes(backend)
    ]


def sites_on(backend, sites=SITES):
    return cases.sites_on(backend, sites)


def width(site, heads, kv_heads, num_routes):
    sizes = testing.Sizes(heads=heads, kv_heads=kv_heads)
    return testing.OPS["routed_attention"].site_features(sizes, num_routes, False)[site]


def random_table(rows, columns, generator):
    """Half the weights any of {0, 1, 0.5, -0.75}, half arbitrary, most of them smaller than 1."""
    few = torch.tensor([0.0, 1.0, 0.5, -0.75])[torch.randint(4, (rows, columns), generator=generator)]
    arbitrary = 0.6 * torch.randn(rows, columns, generator=generator)
    return Table(torch.where(torch.rand(rows, columns, generator=generator) < 0.5, few, arbitrary))


def random_strength(shape, generator):
    """0 and 1 in part, otherwise anything in [0, 1.25)."""
    strength = 1.25 * torch.rand(shape, generator=generator)
    strength.view(-1)[::3], strength.view(-1)[1::5] = 1, 0
    return strength


def make_call(
    device,
    *,
    length=33,
    queries=None,
    batch=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    num_routes=4,
    sites=(),
    tables=None,
    ids=None,
    strength=False,
    dtype=torch.float32,
    seed=0,
    **keywords,
):
    """A call with random tables at `sites` and given ones by site; ids [batch, queries] are random by default."""
    generator = torch.Generator().manual_seed(seed)
    queries = length if queries is None else queries

    def normal(heads, length):
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(device, dtype)

    made = {
        site: random_table(num_routes, width(site, heads, kv_heads, num_routes), generator) for site in sites
    }
    if ids is None:
        ids = torch.randint(num_routes, (batch, queries), generator=generator)
    strengths = random_strength(ids.shape, generator) if strength else None
    return Sample(
        op="routed_attention",
        tensors={"q": normal(heads, queries), "k": normal(kv_heads, length), "v": normal(kv_heads, length)},
        routes=Routes.of(ids, num_routes, strength=strengths).to(device),
        sites=AttentionSites(**made | (tables or {})),
        keywords={
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in keywords.items()
        },
        upstream=normal(heads, queries),
    )


def array(value):
    """A tensor as NumPy has it, floating-point values in float64."""
    if not isinstance(value, torch.Tensor):
        return value
    return (value.double() if value.is_floating_point() else value).cpu().numpy()


def stated(call):
    """The statement's result of a call, on the CPU in fp64."""
    q, k, v, dz = (array(tensor) for tensor in (*call.tensors.values(), call.upstream))
    routing = None
    if call.routes is not None:
        shape, strength = (q.shape[0], q.shape[2]), call.routes.strength
        routing = statement.Routing(
            ids=array(call.routes.ids.reshape(shape)),
            tables={site: array(table.weights) for site, table in call.tables.items()},
            strength=None if strength is None else array(strength.reshape(shape)),
        )
    options = statement.Options(**{name: array(value) for name, value in call.keywords.items()})
    z, *gradients = map(torch.from_numpy, statement.attention(q, k, v, dz, routing, options))
    return Result(z, dict(zip("qkv", gradients, strict=True)))


def on_cpu(result):
    return Result(result.output.cpu(), {name: g.cpu() for name, g in result.gradients.items()})


def assert_close(actual, expected, name, tolerance=None):
    """Within a tolerance; by default that of TOLERANCES for the dtype."""
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected).abs() / expected.abs().clamp(min=0.1)
    worst = error.max().item() if error.numel() else 0.0  # NaN where any is
    tolerance = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    assert worst <= tolerance, f"{name}: error {worst:.2e}"


def assert_results_close(actual, expected, name, tolerance=None):
    assert_close(actual.output, expected.output, f"z on {name}", tolerance)
    for argument, gradient in expected.gradients.items():
        assert_close(actual.gradients[argument], gradient, f"d{argument} on {name}", tolerance)


def tolerance_of(call, backend):
    """The tolerance for the kernels that run a call; None: that of its dtype."""
    is_in_parts = call.upstream.dtype == torch.float32 and cases.plan_of(call, backend).vendor == "efficient"
    return TOLERANCE_OF_3XTF32 if is_in_parts else None


@contextlib.contextmanager
def skipping_refusals(backend):
    """Backend cuda masks around vendors' kernels, and none of them runs every call."""
    try:
        yield
    except BackendError as refusal:
        if backend != "cuda":
            raise
        pytest.skip(str(refusal))


def assert_as_stated(call, backend):
    """Runs the call and returns its result, for what else holds of it."""
    with skipping_refusals(backend):
        result = on_cpu(call.run(backend))
    expected = stated(call)
    if result.output.dtype in TOLERANCES:
        assert_results_close(result, expected, backend, tolerance_of(call, backend))
    else:
        keys = call.tensors["k"].shape[2]
        budgeted = without_cancelled(result) if keys == 1 else result
        assert_result_within_budget(budgeted, expected, on_cpu(call.run_plain()), backend)
    return result


def without_cancelled(result):
    """The result less the gradients through the softmax of one score, which is 1: they are differences of equal sums.

    The sums are of order one, so an eps of the dtype is their rounding. Plain PyTorch subtracts the very same sum and
    gets 0: twice its error is no budget.
    """
    for argument in "qk":
        gradient = result.gradients[argument]
        assert gradient.abs().max() <= torch.finfo(gradient.dtype).eps
    return Result(result.output, {"v": result.gradients["v"]})


@on_every_backend(
    {
        "length": (1, 9, 65, 200),
        "causal": (True, False),
        "window": (None, 7),
        "strength": (False, True),
        "dtype": dtypes,
    }
)
def test_all_sites_together(backend, case, device):
    cases.require(backend, device)
    sizes = SMALL if is_interpreted(backend, device) and case["length"] > 9 else {}
    call = make_call(device, sites=sites_on(backend), seed=case["length"], **sizes, **case)
    assert_as_stated(call, backend)


def few_sites():
    """(backend, sites): every one and every two; under triton sets in which any two are both, either, or neither."""
    for backend in BACKENDS:
        sets = [*itertools.combinations(SITES, 1), *itertools.combinations(SITES, 2)]
        if backend == "triton":
            covering = cases.covering(dict.fromkeys(SITES, (False, True)))
            sets = [[site for site in SITES if given[site]] for given in covering]
        for sites in sets:
            yield pytest.param(backend, sites, id="-".join((backend, *sites)))


@pytest.mark.parametrize(("backend", "sites"), list(few_sites()))
def test_few_sites(backend, sites, device):
    cases.require(backend, device)
    sizes = SMALL if is_interpreted(backend, device) else {}
    call = make_call(device, sites=sites_on(backend, sites), strength=len(sites) > 1, **sizes)
    assert_as_stated(call, backend)


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@every_backend
def test_heads_that_share_a_key_head(backend, kv_heads, device):
    cases.require(backend, device)
    sizes = {"batch": 1, "heads": 8, "kv_heads": kv_heads}
    call = make_call(device, **sizes, length=20, sites=sites_on(backend), strength=True)
    assert_as_stated(call, backend)


@pytest.mark.parametrize("head_dim", [16, 24, 40, 80, 128, 256])
@every_backend
def test_head_dimensions(backend, head_dim, device):
    cases.require(backend, device)
    call = make_call(device, length=9, head_dim=head_dim, sites=sites_on(backend), strength=True)
    assert_as_stated(call, backend)


def part_of(call, start, stop):
    """The call on the tokens [start, stop) alone."""
    return Sample(
        op=call.op,
        tensors={name: tensor[:, :, start:stop] for name, tensor in call.tensors.items()},
        routes=call.routes[:, start:stop],
        sites=call.sites,
        keywords={name: value for name, value in call.keywords.items() if name != "cu_seqlens"},
        upstream=call.upstream[:, :, start:stop],
    )


@pytest.mark.parametrize("backend", [None, "reference"])
def test_documents_need_bounds(backend):
    q = torch.zeros(1, 1, 4, 8)
    none = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: got no elements"):
        routed_attention(q, q, q, None, None, cu_seqlens=none, backend=backend)


@pytest.mark.parametrize("options", [{}, {"causal": False, "window": 7}], ids=["causal", "window"])
@every_backend
def test_documents_are_separate_batches(backend, options, device):
    cases.require(backend, device)
    bounds = [0, 1, 30, 30, 100]  # one token; an empty document; one of two tiles
    call = make_call(
        device,
        **SMALL,
        length=bounds[-1],
        sites=sites_on(backend),
        strength=True,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        **options,
    )
    whole = assert_as_stated(call, backend)
    for start, stop in itertools.pairwise(bounds):
        part = part_of(call, start, stop).run(backend)
        rows = Result(
            whole.output[:, :, start:stop], {n: g[:, :, start:stop] for n, g in whole.gradients.items()}
        )
        separate = Result(
            part.output.double().cpu(), {n: g.double().cpu() for n, g in part.gradients.items()}
        )
        assert_results_close(rows, separate, backend, tolerance_of(call, backend))


@pytest.mark.parametrize("site", ["heads", "forward_heads"])
@every_backend
def test_a_masked_head_contributes_nothing(backend, site, device):
    """Not even where the gradient that arrives is inf or NaN."""
    cases.require(backend, device)
    weights = random_table(4, 2, torch.Generator().manual_seed(1)).weights
    weights[:, 1] = 0
    others = [other for other in sites_on(backend) if other != site]
    call = make_call(device, **SMALL, sites=others, tables={site: weights})
    result = assert_as_stated(call, backend)
    assert not result.gradients["q"][:, 1].any()
    upstream = call.upstream.clone()
    upstream[:, 1, ::2], upstream[:, 1, 1::2] = float("nan"), float("inf")
    assert_same_bits(on_cpu(call.with_upstream(upstream).run(backend)), result, backend)


@pytest.mark.parametrize("weight", [0.0, 1e-3, 1e-5])
@every_backend
def test_small_weights_in_fp16(backend, weight, device):
    """Their products with probabilities are below what fp16 can tell apart."""
    cases.require(backend, device)
    sizes = testing.Sizes(heads=2, kv_heads=1, head_dim=16)
    call = cases.make(
        "routed_attention",
        tokens=(1, 96),
        num_routes=2,
        sizes=sizes,
        sites=(),
        dtype=torch.float16,
        device=device,
    )
    table = torch.full((2, 2), weight, device="cpu")
    table[0, 0] = 2.0 * weight  # not all alike
    for site in sites_on(backend, ("heads", "value_edges")):
        call.with_sites(AttentionSites(**{site: table})).assert_within_budget(backend)


@pytest.mark.parametrize("num_routes", [1, 5])
@every_backend
def test_routes_that_are_few_or_unused(backend, num_routes, device):
    """All tokens of one route, the only one or one of many."""
    cases.require(backend, device)
    ids = torch.full((2, 33), num_routes // 2)
    call = make_call(device, num_routes=num_routes, ids=ids, sites=sites_on(backend), strength=True)
    assert_as_stated(call, backend)


@pytest.mark.parametrize("sites", [("query",), ("heads",), ("key", "value"), SITES[:5]], ids="-".join)
@pytest.mark.parametrize("where", [slice(136), slice(64, None)], ids=["start", "end"])
@every_backend
def test_tiles_that_are_masked_whole(backend, where, sites, device):
    """Tokens of route 1 have no gradient at these sites, and fill tiles of up to 128."""
    cases.require(backend, device)
    ids = torch.zeros(1, 200, dtype=torch.int64)
    ids[:, where] = 1
    tables = {site: torch.tensor([[1.0], [0.0]]) for site in sites}
    if len(sites) == 2:
        tables |= dict.fromkeys(sites_on(backend, EDGES), torch.tensor([[1.5, -0.75], [0.5, 0.0]]))
    call = make_call(device, **SMALL, length=200, num_routes=2, ids=ids, tables=tables)
    result = assert_as_stated(call, backend)
    for site, argument in {"query": "q", "key": "k", "value": "v"}.items():
        gradient = result.gradients[argument].transpose(1, 2)  # [B, S, heads, D]
        assert gradient[ids == 0].any()
        assert site not in sites or not gradient[ids == 1].any()


@every_backend
def test_edges_that_forbid_everything(backend, device):
    cases.require(backend, device)
    require_edges(backend)
    call = make_call(device, tables=dict.fromkeys(EDGES, torch.zeros(4, 4)), sites=("forward_heads",))
    result = assert_as_stated(call, backend)
    assert result.output.any()
    assert not any(gradient.any() for gradient in result.gradients.values())


def require_edges(backend):
    if not sites_on(backend, EDGES):
        pytest.skip(f"{backend} has no kernel for edges")


def ids_in_runs(num_routes, length, run, generator):  # [1, length]
    """Every `run` tokens another route; so that few routes, of many, meet in a tile."""
    routes = torch.randint(num_routes, (-(-length // run),), generator=generator)
    return routes.repeat_interleave(run)[None, :length]


@pytest.mark.parametrize("num_routes", [2, 33, 64])
@every_backend
def test_binary_edges_between_runs(backend, num_routes, device):
    """Whole tiles of scores and values are allowed, or forbidden, or both in part."""
    cases.require(backend, device)
    require_edges(backend)
    generator = torch.Generator().manual_seed(num_routes)
    ids = ids_in_runs(num_routes, 200, 40, generator)
    ids[0, 0], ids[0, -1] = num_routes - 1, num_routes - 2
    tables = {site: torch.randint(2, (num_routes, num_routes), generator=generator) for site in EDGES}
    call = make_call(
        device, **SMALL, length=200, num_routes=num_routes, ids=ids, tables=tables, strength=True
    )
    assert_as_stated(call, backend)


@every_backend
def test_edges_have_at_most_64_routes(backend, device):
    cases.require(backend, device)
    others = [site for site in SITES if site not in EDGES]
    assert_as_stated(make_call(device, num_routes=65, sites=others, length=9), backend)
    for site in EDGES:
        call = make_call(device, num_routes=65, sites=(site,), length=9)
        with pytest.raises(ValueError, match=rf"{site}.*64"):
            call.run(backend)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 3}], ids=["causal", "all", "window"])
@every_backend
def test_queries_that_see_no_key(backend, options, device):
    """Padding before, inside and after a sequence, over a whole tile; and a sequence of padding alone."""
    cases.require(backend, device)
    key_mask = torch.ones(3, 80, dtype=torch.bool)
    key_mask[0, :66] = False
    key_mask[1, 20:30] = key_mask[1, 70:] = False
    key_mask[2] = False
    call = make_call(
        device, batch=3, length=80, heads=1, kv_heads=1, sites=sites_on(backend), key_mask=key_mask, **options
    )
    result = assert_as_stated(call, backend)
    assert not result.output[2].any()
    hidden = ~key_mask[:, None, :, None]
    for argument in "kv":
        assert not result.gradients[argument].masked_select(hidden).any()
    if options.get("causal", True):
        assert not result.output[0, :, :66].any()
        assert not result.gradients["q"][0, :, :66].any()


@every_backend
def test_no_tokens(backend, device):
    cases.require(backend, device)
    assert_as_stated(make_call(device, length=0, sites=sites_on(backend), strength=True), backend)


OTHER_NUMBERS_OF_QUERIES = on_every_backend(
    {"queries_and_keys": ((3, 40), (1, 70), (40, 33)), "causal": (True, False), "window": (None, 7)}
)


def call_on_a_cache(device, case, **more):
    case = dict(case)
    queries, keys = case.pop("queries_and_keys")
    return make_call(device, queries=queries, length=keys, **case, **more)


@OTHER_NUMBERS_OF_QUERIES
def test_unrouted_attention_on_a_cache(backend, case, device):
    cases.require(backend, device)
    call = call_on_a_cache(device, case).with_routes(None)
    result = assert_as_stated(call, backend)
    with torch.no_grad():
        again = call.call(call.tensors, backend).cpu()
    assert_close(again, result.output.double(), f"z on {backend}")


@OTHER_NUMBERS_OF_QUERIES
def test_routed_attention_on_a_cache(backend, case, device):
    """For inference: the routes are those of the queries, and there is no gradient."""
    cases.require(backend, device)
    call = call_on_a_cache(device, case, sites=sites_on(backend), strength=True)
    expected = stated(call.with_sites(AttentionSites(forward_heads=call.sites.forward_heads))).output
    with torch.no_grad(), skipping_refusals(backend):
        z = call.call(call.tensors, backend).cpu()
    assert_close(z, expected, f"z on {backend}", tolerance_of(call, backend))
    with pytest.raises(ValueError, match="queries"):
        call.run(backend)
