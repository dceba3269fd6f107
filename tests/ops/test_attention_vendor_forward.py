"""A vendor's forward under the own backward: what the automatic choice takes for edges on CUDA; emulated on the CPU."""

import functools

import cases
import emulated_vendors
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradroute import AttentionSites, Routes, Table, backends, testing
from gradroute.backends.attention import VENDORS
from gradroute.testing import assert_result_within_budget, assert_same_bits

SWITCHES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SIZES = testing.Sizes(heads=2, kv_heads=1, head_dim=16)
EDGES = ("score_edges", "value_edges")


@pytest.fixture
def chosen(device, monkeypatch):
    """chosen(vendor): the automatic choice is as on a GPU, where the user lets this vendor's kernel run alone."""
    if device.type == "cpu":
        if "triton" not in backends.available_backends("routed_attention", "cpu"):
            pytest.skip("triton does not run here")
        on_cpu = backends._BACKENDS["triton"]._replace(home="cpu")
        monkeypatch.setitem(backends._BACKENDS, "triton", on_cpu)
        emulated_vendors.use_on_the_cpu(monkeypatch)
    return lambda vendor: sdpa_kernel([SWITCHES[vendor], SDPBackend.MATH])


def sample(device, **options):
    """A call of fp16, the dtype of halves that Triton's interpreter multiplies rightly, with edges unless told."""
    made = {"dtype": torch.float16, "tokens": (2, 37), "tables": "dense", "sites": EDGES, "sizes": SIZES}
    return testing.sample("routed_attention", device=device, **made | options)


def plan_of(call):
    return cases.plan_of(call, None)


def assert_right(call, vendor):
    """The call runs as planned, keeps the budget, and its output has the bits of the call without routes."""
    plan = plan_of(call)
    assert (plan.backend, plan.vendor, plan.backward) == ("triton", vendor, "own")
    result = call.run()
    cancelling = testing.OPS[call.op].cancelling(call.tensors, call.keywords, call.upstream)
    exact, plain = call.in_float64().run("reference"), call.run_plain()
    assert_result_within_budget(result, exact, plain, vendor, cancelling)
    assert_same_bits(call.run(), result, "run again")
    return result


CASES = [
    ("cudnn", {}),
    ("cudnn", {"causal": False, "sites": "all"}),
    ("cudnn", {"sizes": SIZES._replace(head_dim=13), "gradient": "zero_stride"}),
    ("flash", {"window": 9}),
    ("flash", {"documents": 3, "tokens": (1, 50), "sites": "all"}),
    ("flash", {"documents": 4, "tokens": (1, 50), "window": 7, "causal": False}),
    ("efficient", {"sites": "all", "strength": "token"}),
    ("efficient", {"padding": 5, "dtype": torch.float32}),
    ("efficient", {"tokens": (3, 1)}),
]


@pytest.mark.parametrize(("vendor", "options"), CASES)
@pytest.mark.usefixtures("free")
def test_edges_take_the_vendors_forward_and_the_own_backward(vendor, options, chosen, device):
    """The output has the bits of the call without routes, which runs on that kernel alone."""
    call = sample(device, **options)
    with chosen(vendor):
        result = assert_right(call, vendor)
        if "forward_heads" in call.tables:
            call = call.with_sites(AttentionSites(**{site: call.tables[site] for site in EDGES}))
            result = call.run()
        unrouted = call.with_routes(None)
        assert plan_of(unrouted)[1:3] == (vendor, "vendor")
        assert torch.equal(unrouted.run().output, result.output)


@pytest.mark.usefixtures("free")
def test_masks_that_leave_little_change_no_bit_of_the_output(chosen, device):
    """Of both heads one learns nothing: half of the work is left."""
    heads = Table(torch.tensor([[1.0, 0.0], [0.5, 0.0]]))
    call = sample(device, num_routes=2).with_sites(AttentionSites(heads=heads))
    with chosen("cudnn"):
        result = assert_right(call, "cudnn")
        assert not result.gradients["q"][:, 1].any()
        assert "masks leave so little of the backward's work" in plan_of(call).reason
        assert torch.equal(call.with_routes(None).run().output, result.output)


@pytest.mark.usefixtures("free")
def test_a_backend_that_was_asked_for_runs_own_kernels_alone(chosen, device):
    call = sample(device)
    with chosen("cudnn"):
        assert cases.plan_of(call, "triton")[:4] == ("triton", None, "own", "it was asked for")
        with backends.use_backend("triton"):
            assert plan_of(call)[:3] == ("triton", None, "own")


@pytest.mark.slow
@pytest.mark.usefixtures("free")
def test_no_gradient_depends_on_the_lse_of_a_query_that_sees_no_key(chosen, device, monkeypatch):
    """Vendors give 0, an infinity or NaN there. The first sequence is padding alone."""
    call = sample(device, dtype=torch.float32, padding=0)
    call.keywords["key_mask"] = call.keywords["key_mask"].clone()
    call.keywords["key_mask"][0] = False
    with chosen("efficient"):
        expected = assert_right(call, "efficient")
        forward = VENDORS["efficient"].forward

        def given(lse, *args):
            o, found, *rest = forward(*args)
            found = found.clone()
            found[0] = lse
            return o, found, *rest

        for lse in (-torch.inf, torch.inf, torch.nan, 0.0):
            monkeypatch.setattr(VENDORS["efficient"], "forward", functools.partial(given, lse))
            assert_same_bits(call.run(), expected, str(lse))
    for gradient in expected.gradients.values():
        assert not gradient[0].any()


@pytest.mark.parametrize("vendor", SWITCHES)
@pytest.mark.usefixtures("free")
def test_only_the_output_and_the_lse_are_saved(vendor, chosen, device):
    """Not what the vendor's own backward would need."""
    call, saved = sample(device), []
    leaves = call.leaves()
    with chosen(vendor), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        output = call.call(leaves)
    inputs = {leaf.data_ptr() for leaf in leaves.values()}
    (z, lse) = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    assert z.data_ptr() == output.data_ptr()
    assert (lse.shape, lse.dtype) == (output.shape[:3], torch.float32)
    assert lse.is_contiguous()
    assert lse.untyped_storage().nbytes() == 4 * lse.numel()


def test_deterministic_algorithms_choose_the_forward_as_they_do_without_routes(chosen, device):
    """cuDNN's backward is not deterministic, so neither call takes its forward."""
    call = sample(device)
    plan, unrouted = plan_of(call), plan_of(call.with_routes(None))
    assert (plan.vendor, plan.backward) == (unrouted.vendor, "own")
    assert plan.vendor != "cudnn"
    assert "cudnn: its backward is not deterministic" in plan.reason
    assert torch.equal(call.run().output, call.with_routes(None).run().output)


@pytest.mark.slow
@pytest.mark.parametrize("sites", [EDGES, "all"], ids=["edges", "all"])
@pytest.mark.usefixtures("free")
def test_a_compiled_call_has_the_bits_of_the_eager_one(sites, chosen, device):
    call = sample(device, sites=sites)

    def step(q, k, v, ids):
        routes = Routes.of(ids, call.routes.num_routes, validate=False)
        return call.with_routes(routes).call({"q": q, "k": k, "v": v})

    ids = call.routes.ids.view(2, 37)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with chosen("cudnn"):
        found = []
        for function in (step, compiled):
            leaves = call.leaves()
            output = function(*leaves.values(), ids)
            gradients = torch.autograd.grad(output, list(leaves.values()), call.upstream)
            found.append([output.detach(), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.usefixtures("free")
def test_what_is_frozen_has_no_gradient_and_changes_no_other(chosen, device):
    call = sample(device, sites="all")
    with chosen("flash"):
        whole = call.run()
        for frozen in (("q",), ("k", "v"), ("k",)):
            part = call.run(frozen=frozen)
            for name, gradient in part.gradients.items():
                assert (gradient is None) == (name in frozen)
                assert gradient is None or torch.equal(gradient, whole.gradients[name])
