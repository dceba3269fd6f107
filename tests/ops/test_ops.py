"""Every op on every backend: the error budget on covering samples of all axes, and the laws that hold exactly."""

import dataclasses

import cases
import pytest
import torch
import vendor_cases
from cases import every_function_backend, every_op_backend

from gradroute import Routes, Table, backends, testing
from gradroute.testing import assert_result_within_budget, assert_same_bits, excess, sample, saved_bytes

# The tensors that are not activations are the parameters.
PARAMETERS = {
    op: tuple(
        name for name in cases.make(op, tokens=2).differentiable if name not in testing.OPS[op].activations
    )
    for op in backends.OPS
}


def budget_axes(op, backend):
    """All axes of the proof. No vendor's kernel, and so not backend cuda, runs attention without tokens."""
    tokens, sites = cases.TOKENS, cases.sites_on(backend, testing.site_names(op))
    if op == "routed_attention":
        tokens = ((1, 37), (1, 0), (1, 1), (2, 19)) if backend != "cuda" else ((1, 37), (1, 1), (2, 19))
    return {
        "dtype": cases.dtypes(backend),
        "tables": testing.TABLE_KINDS,
        "strength": testing.STRENGTHS,
        "tokens": tokens,
        "gradient": testing.LAYOUTS,
        "inputs": ("contiguous", "sliced", "transposed"),
        "variant": testing.variants(op),
        "sites": ("all", *sites),
        "bias": (True, False),
        "flat_ids": (False, True),
    }


def budget_cases():
    """Every two values of different axes meet for every op on every backend; on CUDA, and emulated, every value."""
    for op, backend in cases.OP_BACKENDS:
        for device in ("cpu", "cuda"):
            marks = [pytest.mark.gpu] if device == "cuda" else []
            strength = 1 if "cuda" in (device, backend) else 2
            for number, case in enumerate(cases.covering(budget_axes(op, backend), strength)):
                name = f"{op}-{backend}-{device}-{number}"
                yield pytest.param(op, backend, case, device, id=name, marks=marks)


@pytest.mark.parametrize(("op", "backend", "case", "device"), list(budget_cases()), indirect=["device"])
def test_budget(op, backend, case, device):
    run_budget_case(op, backend, case, device)


def run_budget_case(op, backend, case, device):
    cases.require(backend, device)
    case = dict(case)
    variant, bias = case.pop("variant"), case.pop("bias")
    if case["sites"] != "all" and case["sites"] not in testing.site_names(op, bias):
        bias = True
    if "documents" in variant:
        case["tokens"] = (1, 37)
    call = cases.make(op, on=backend, device=device, bias=bias, **variant, **case)
    call.assert_within_budget(backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every_function_backend
def test_budget_over_several_tiles(op, backend, dtype, device):
    """Widths and tokens that no block size divides, larger than every block."""
    cases.require(backend, device)
    if backend == "triton" and device.type == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter runs these sizes in fp32 only: seconds each")
    sizes = testing.Sizes(d_model=131, d_ff=261)
    call = cases.make(op, on=backend, dtype=dtype, tokens=150, strength="token", sizes=sizes, device=device)
    call.assert_within_budget(backend)


@pytest.mark.parametrize("strength", testing.STRENGTHS)
@every_function_backend
def test_budget_over_several_runs_of_tokens(op, backend, strength, device):
    """More tokens than backend torch masks at a time (1024), or a program of Triton's sums into one partial (512).

    The norms' programs take turns above 1024. Attention has fewer: its detach idiom has a value for every query.
    """
    cases.require(backend, device)
    sizes = testing.Sizes(d_model=5, d_ff=7)
    tokens = 200 if op == "routed_attention" else 1100
    if backend == "triton" and device.type == "cpu" and not op.endswith("_norm"):
        tokens = tokens // 2 + 1  # the interpreter is slow, and two partials show what three do
    cases.make(
        op, on=backend, tokens=tokens, strength=strength, sizes=sizes, device=device
    ).assert_within_budget(backend)


@pytest.mark.parametrize("casting_mode", ["llama", "torch"])
@pytest.mark.parametrize("backend", backends.OPS["routed_rms_norm"])
def test_rms_norm_of_long_rows(backend, casting_mode, device):
    """Longer than what a kernel keeps in registers."""
    cases.require(backend, device)
    sizes = testing.Sizes(d_model=8209)
    call = sample("routed_rms_norm", tokens=5, sizes=sizes, device=device, casting_mode=casting_mode)
    call.assert_within_budget(backend)


@pytest.mark.parametrize("backend", backends.OPS["routed_layer_norm"])
def test_layer_norm_of_long_rows(backend, device):
    cases.require(backend, device)
    sizes = testing.Sizes(d_model=8209)
    sample("routed_layer_norm", tokens=5, sizes=sizes, device=device).assert_within_budget(backend)


def gradient_sites(op):
    return tuple(name for name in testing.site_names(op) if not name.startswith("forward"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_op_backend
def test_forward_has_the_bits_of_the_ordinary_op(op, backend, dtype, device):
    cases.require(backend, device)
    for variant in testing.variants(op):
        call = cases.make(op, on=backend, dtype=dtype, sites=gradient_sites(op), device=device, **variant)
        ordinary = call.with_routes(None)
        expected = ordinary.run(backend) if op == "routed_attention" else ordinary.run_plain()
        assert torch.equal(call.run(backend).output, expected.output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("op", "backend"), [pair for pair in cases.FUNCTION_BACKENDS if "forward" in testing.site_names(pair[0])]
)
def test_forward_table_has_the_bits_of_the_masked_eager_op(op, backend, dtype, device):
    """Without a strength a mask is a table's own weight, and z is rounded once."""
    cases.require(backend, device)
    call = cases.make(op, on=backend, dtype=dtype, sites="forward", tables="negative", device=device)
    assert torch.equal(call.run(backend).output, call.run("reference").output)


@every_op_backend
def test_without_routes_or_sites_it_is_the_ordinary_op(op, backend, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, device=device)
    expected = call.with_routes(None).run_plain()
    for ordinary in (call.with_routes(None), call.with_sites(None)):
        result = ordinary.run(backend)
        if op == "routed_attention":
            exact = ordinary.in_float64().with_routes(None).run_plain()
            assert_result_within_budget(result, exact, expected, op)
        else:
            assert_same_bits(result, expected, op)


def test_route_grad_returns_an_alias(device):
    call = sample("route_grad", device=device)
    for backend in backends.available_backends("route_grad", device):
        assert call.run(backend).output.data_ptr() == call.tensors["x"].data_ptr()


@every_op_backend
def test_all_ones_is_unrouted(op, backend, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, tables="ones", strength="token", device=device)
    ordinary = call.with_routes(None)
    exact = ordinary.in_float64().run_plain()
    assert_result_within_budget(call.run(backend), exact, ordinary.run_plain(), op)


@pytest.mark.parametrize("tables", ["blocks", "dense", "broadcast"])
@every_op_backend
def test_strength_of_one_is_no_strength(op, backend, tables, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, tables=tables, strength="ones", device=device)
    routes = Routes.of(call.routes.ids.view(call.routes.shape), call.routes.num_routes)
    cases.assert_same_numbers(call.run(backend), call.with_routes(routes).run(backend), op)


# op → site → gradients that a token masked to 0 at that site does not reach, whatever arrives at its output.
SHIELDED = {
    "route_grad": {"table": ("x",)},
    "routed_linear": {
        "output": ("x", "weight", "bias"),
        "input": ("x",),
        "update_rows": ("weight", "bias"),
        "update_bias": ("bias",),
    },
    "routed_activation": dict.fromkeys(("pre", "hidden", "forward"), ("a",)),
    "routed_glu": dict.fromkeys(("pre", "hidden", "forward"), ("gate", "up")),
    "routed_mlp": {
        "output": ("x", "w_in", "b_in", "w_out", "b_out"),
        "pre": ("x", "w_in", "b_in"),
        "hidden": ("x", "w_in", "b_in"),
        "forward": ("x", "w_in", "b_in"),
        "update": ("w_in", "b_in"),
        "update_in": ("w_in", "b_in"),
        "update_output_bias": ("b_out",),
    },
    "routed_gated_mlp": {
        "output": ("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"),
        "pre": ("x", "w_gate", "w_up", "b_gate", "b_up"),
        "hidden": ("x", "w_gate", "w_up", "b_gate", "b_up"),
        "forward": ("x", "w_gate", "w_up", "b_gate", "b_up"),
        "update": ("w_gate", "w_up", "b_gate", "b_up"),
        "update_in": ("w_gate", "w_up", "b_gate", "b_up"),
        "update_output_bias": ("b_down",),
    },
    "routed_rms_norm": {"update": ("weight",)},
    "routed_layer_norm": {"update": ("weight", "bias")},
    "routed_embedding": {"update": ("weight",)},
    "routed_attention": {"heads": ("q", "k", "v"), "forward_heads": ("q", "k", "v")},
}

# Sites that shield no gradient: what arrives goes through a product before their mask, or together with it.
UNSHIELDED = {
    "routed_linear": {"update_cols"},
    "routed_mlp": {"update_out"},
    "routed_gated_mlp": {"update_out"},
    "routed_attention": {"query", "key", "value", "score_edges", "value_edges"},
}

# Sites whose columns are those of the upstream gradient: there single elements are shielded.
ELEMENTWISE = {
    "route_grad": ("table",),
    "routed_linear": ("output",),
    "routed_activation": ("pre", "hidden", "forward"),
    "routed_glu": ("pre", "hidden", "forward"),
    "routed_mlp": ("output",),
    "routed_gated_mlp": ("output",),
    "routed_rms_norm": ("update",),
    "routed_layer_norm": ("update",),
    "routed_embedding": ("update",),
}


@pytest.mark.parametrize("op", backends.OPS)
def test_every_site_is_known_to_shield_or_not(op):
    """A site that is in neither table would be tested by nothing."""
    unshielded = UNSHIELDED.get(op, set())
    assert unshielded.isdisjoint(SHIELDED[op])
    assert unshielded | set(SHIELDED[op]) == set(testing.site_names(op))


def shielding(op, site, irregular):
    """Route 1 masked to 0 at `site`, entirely or, where the site is elementwise, on some features; the rest is 1."""
    call = cases.make(op, tables="ones", sites=site)
    (table,) = call.tables.values()
    weights = table.weights.clone()
    columns = slice(None, None, 2) if irregular else slice(5, 12)
    weights[1, columns if site in ELEMENTWISE.get(op, ()) else slice(None)] = 0
    return weights


def hit_by(weights, op, site, call):
    """The elements of the upstream gradient that belong to tokens (elementwise: and features) of weight 0."""
    masked = (weights.to(call.routes.device) == 0)[call.routes.ids.long()]
    if site not in ELEMENTWISE.get(op, ()):
        masked = masked.any(-1, keepdim=True)
    if op == "routed_attention":
        return masked.view(1, 1, -1, 1).expand_as(call.upstream)
    return masked.expand(-1, call.upstream.shape[-1]).reshape(call.upstream.shape)


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered in (multiply|reduce):RuntimeWarning"
)  # NumPy, interpreting
@pytest.mark.parametrize("irregular", [False, True], ids=["blocks", "dense"])
@every_op_backend
def test_what_is_masked_off_is_zero_whatever_arrives(op, backend, irregular, device):
    """inf and NaN upstream give the bits that zeros give."""
    cases.require(backend, device)
    for site, names in SHIELDED[op].items():
        call = cases.make(op, on=backend, tables="ones", sites=site, device=device)
        weights = shielding(op, site, irregular)
        sites = Table(weights) if op == "route_grad" else type(call.sites)(**{site: weights})
        call = call.with_sites(sites)
        hit = hit_by(weights, op, site, call)
        assert hit.any()
        assert not hit.all()
        bad = torch.tensor([torch.inf, torch.nan, -torch.inf], device=device)
        bad = bad[torch.arange(hit.numel(), device=device) % 3].view(hit.shape)
        results = [
            call.with_upstream(torch.where(hit, value, call.upstream)).run(backend)
            for value in (bad, torch.zeros((), device=device))
        ]
        for name in names:
            got, expected = (result.gradients[name] for result in results)
            assert torch.equal(got, expected), f"{site}: d{name}"
            assert expected.isfinite().all()


@pytest.mark.parametrize("tables", ["zeros", "blocks", "dense"])
@every_op_backend
def test_nothing_that_it_was_given_or_saved_is_written(op, backend, tables, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, tables=tables, strength="token", device=device)
    before = {name: tensor.clone() for name, tensor in call.tensors.items() if tensor is not None}
    upstream, saved = call.upstream.clone(), []

    def pack(tensor):
        saved.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call.run(backend)
    assert torch.equal(call.upstream, upstream)
    for name, tensor in before.items():
        assert torch.equal(call.tensors[name], tensor), name
    for kept, copy in saved:
        assert torch.equal(cases.bytes_of(kept), cases.bytes_of(copy))


@every_op_backend
def test_two_runs_and_two_backwards_give_the_same_bits(op, backend, device):
    cases.require(backend, device)
    tokens = 70 if op == "routed_attention" else 130
    call = cases.make(op, on=backend, tokens=tokens, strength="token", device=device)
    first = call.run(backend)
    assert_same_bits(call.run(backend), first, "second run")
    leaves = call.leaves()
    wanted = {name: leaves[name] for name in call.differentiable}
    output = call.call(leaves, backend)
    for _ in range(2):
        gradients = torch.autograd.grad(output, list(wanted.values()), call.upstream, retain_graph=True)
        again = testing.Result(output.detach(), dict(zip(wanted, gradients, strict=True)))
        assert_same_bits(again, first, "retain_graph")


@every_op_backend
def test_backward_of_a_sum(op, backend, device):
    """The gradient of a sum is one number with zero strides."""
    cases.require(backend, device)
    call = cases.make(op, on=backend, strength="token", device=device)
    leaves = call.leaves()
    output = call.call(leaves, backend)
    output.sum().backward()
    result = testing.Result(output.detach(), {name: leaves[name].grad for name in call.differentiable})
    ones = call.with_upstream(torch.ones_like(call.upstream))
    assert_result_within_budget(result, ones.in_float64().run("reference"), ones.run_plain(), op)


@every_op_backend
def test_frozen_inputs(op, backend, device):
    """One frozen input has no gradient, the others keep their bits, and no more is saved."""
    cases.require(backend, device)
    call = cases.make(op, on=backend, device=device)
    whole = call.run(backend)
    for frozen in call.differentiable:
        if len(call.differentiable) == 1:
            assert not call.call(call.leaves([frozen]), backend).requires_grad
            continue
        result = call.run(backend, frozen=[frozen])
        assert result.gradients[frozen] is None
        expected = testing.Result(whole.output, whole.gradients | {frozen: None})
        cases.assert_same_numbers(result, expected, f"{frozen} frozen")


# Frozen inputs without which less is saved: what only their gradients need.
SAVES_LESS = {
    "routed_linear": (("x",), ("weight",), ("x", "weight")),
    "routed_mlp": (("x",), ("w_in",), ("w_in", "b_in", "x")),
    "routed_gated_mlp": (("x",), ("w_gate", "w_up"), ("x", "w_gate", "w_up", "b_gate", "b_up")),
    "routed_rms_norm": (("x",),),
    "routed_layer_norm": (("x",), ("x", "weight")),
}


@pytest.mark.parametrize(
    ("op", "backend"), [pair for pair in cases.FUNCTION_BACKENDS if pair[0] in SAVES_LESS]
)
def test_frozen_inputs_save_less(op, backend, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, device=device)

    def saved(frozen):
        return saved_bytes(lambda: call.call(call.leaves(frozen), backend))

    whole = saved(())
    for frozen in SAVES_LESS[op]:
        assert saved(frozen).packed < whole.packed, frozen
    for frozen in call.differentiable:
        assert saved((frozen,)).packed <= whole.packed, frozen
        assert saved((frozen,)).once <= whole.once, frozen


@pytest.mark.parametrize("seen", ["whole", "expanded ids"])
@every_function_backend
def test_tables_and_masks_are_not_saved(op, backend, seen, device):
    """The saved tensors have the size of the activations: at most x, its pre-activations and the weights.

    What a vendor's kernel of attention saves for its own backward is allowed for.
    """
    cases.require(backend, device)
    tables = "dense" if seen == "whole" else "broadcast"
    call = cases.make(op, on=backend, tokens=130, tables=tables, strength="token", device=device)
    width = {
        "routed_mlp": 20 + 37,
        "routed_gated_mlp": 20 + 2 * 37,
        "routed_glu": 2 * 37,
        "routed_activation": 37,
    }
    width |= {"route_grad": 0, "routed_embedding": 2}  # int64 tokens are two fp32 values
    width |= {"routed_attention": 3 * 32 + 2 * 16 + 4}  # q, o, its masked output; k, v; the log-sum-exp
    parameters = sum(call.tensors[name].numel() for name in PARAMETERS[op])
    limit = 4 * (130 * width.get(op, 20) + parameters)
    if op == "routed_attention" and backend != "reference":
        limit += vendor_cases.bytes_of_its_own(cases.plan_of(call, backend).vendor, call.tensors["q"])
    assert saved_bytes(lambda: call.call(call.leaves(), backend)).packed <= limit


@every_op_backend
def test_parameters_that_no_token_may_update_have_zero_gradients(op, backend, device):
    cases.require(backend, device)
    sites = tuple(site for site in testing.site_names(op) if site.startswith("update"))
    for tokens in (37, 0):
        call = cases.make(op, on=backend, tokens=tokens, tables="zeros", sites=sites, device=device)
        if op == "route_grad":
            continue
        gradients = call.run(backend).gradients
        for name in PARAMETERS[op]:
            assert gradients[name] is not None, name
            assert gradients[name].shape == call.tensors[name].shape
            assert not gradients[name].any(), name


@pytest.mark.parametrize("strength", testing.STRENGTHS)
@every_op_backend
def test_the_shape_of_tokens_and_ids_does_not_matter(op, backend, strength, device):
    cases.require(backend, device)
    shaped = cases.make(
        op,
        on=backend,
        tokens=(2, 3, 7) if op != "routed_attention" else (2, 7),
        strength=strength,
        device=device,
    )
    flat_ids = cases.make(
        op, on=backend, tokens=shaped.routes.shape, strength=strength, flat_ids=True, device=device
    )
    expected = shaped.run(backend)
    cases.assert_same_numbers(flat_ids.run(backend), expected, "flat ids")
    if op == "routed_attention":
        return
    flattened = shaped.of_tokens(torch.arange(len(shaped.routes), device=device)).run(backend)
    same_shapes = testing.Result(
        flattened.output.view(expected.output.shape),
        {
            name: gradient.view(expected.gradients[name].shape)
            for name, gradient in flattened.gradients.items()
        },
    )
    cases.assert_same_numbers(same_shapes, expected, "flat tokens")


@every_op_backend
def test_create_graph_is_refused(op, backend, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, device=device)
    leaves = call.leaves()
    output = call.call(leaves, backend)
    with pytest.raises(
        RuntimeError, match=f"{op}: backward was called with create_graph=True.*no second derivative"
    ):
        torch.autograd.grad(output.sum(), leaves[call.differentiable[0]], create_graph=True)


@pytest.mark.parametrize("tables", ["blocks", "dense", "unused"])
@pytest.mark.parametrize(("op", "backend"), [pair for pair in cases.OP_BACKENDS if PARAMETERS[pair[0]]])
def test_a_mixed_batch_updates_as_its_single_route_batches_do(op, backend, tables, device):
    """The law of parameter routing: the mixed batch's parameter gradients are the sums of its routes' own."""
    cases.require(backend, device)
    sites = tuple(site for site in testing.site_names(op) if site.startswith("update"))
    dtype = torch.float64 if torch.float64 in cases.dtypes(backend) else torch.float32
    call = cases.make(op, on=backend, tokens=(2, 40), dtype=dtype, tables=tables, sites=sites, device=device)
    exact, plain = call.in_float64().run("reference"), call.run_plain()
    sums = dict.fromkeys(PARAMETERS[op], 0.0)
    for route in range(call.routes.num_routes):
        part = call.of_tokens((call.routes.ids == route).nonzero().flatten()).run(backend)
        sums = {name: total + part.gradients[name] for name, total in sums.items()}
    for name, total in sums.items():
        assert excess(total, exact.gradients[name], plain.gradients[name]) is None, name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gated_mlp_saves_little(backend, device):
    """x and two pre-activations instead of x twice and four intermediates: 0.52 to 0.54 of eager PyTorch's bytes."""
    cases.require(backend, device)
    sizes = testing.Sizes(d_model=256, d_ff=1024)
    sites = ("pre", "update", "output")
    call = sample("routed_gated_mlp", tokens=8192, sizes=sizes, bias=False, sites=sites, device=device)
    routed = saved_bytes(lambda: call.call(call.leaves(), backend))
    ordinary = call.with_routes(None)
    eager = saved_bytes(lambda: ordinary.call_plain(ordinary.leaves()))
    assert routed.once <= 0.55 * eager.once
    assert routed.packed <= 0.55 * eager.packed


def preceded(call, tokens):
    """The call with `tokens` more tokens before its own, of route 0, with inputs and gradients of 0.

    In attention they are padding: its keys' mask hides them.
    """
    along = token_dimension(call.op)

    def longer(tensor):
        shape = [*tensor.shape[:along], tokens, *tensor.shape[along + 1 :]]
        return torch.cat([tensor.new_zeros(shape), tensor], along)

    names = testing.OPS[call.op].activations
    extended = {name: longer(tensor) for name, tensor in call.tensors.items() if name in names}
    ids = torch.cat([call.routes.ids.new_zeros(tokens), call.routes.ids])
    keywords = dict(call.keywords)
    if call.op == "routed_attention":
        keywords["key_mask"] = (torch.arange(len(ids), device=ids.device) >= tokens).unsqueeze(0)
    return dataclasses.replace(
        call,
        tensors=call.tensors | extended,
        upstream=longer(call.upstream),
        routes=Routes.of(ids, call.routes.num_routes),
        keywords=keywords,
    )


def token_dimension(op):
    """Where an activation's tokens are: attention's are `[1, H, S, D]`."""
    return 2 if op == "routed_attention" else 0


@every_function_backend
def test_tokens_without_gradient_change_nothing(op, backend, device):
    cases.require(backend, device)
    assert_preceded(cases.make(op, on=backend, device=device), backend, 21)


@pytest.mark.gpu
@pytest.mark.memory
@pytest.mark.usefixtures("whole_gpu")
@every_function_backend
def test_more_elements_than_int32_counts(op, backend):
    """The last tokens of tensors of more than 2³¹ elements.

    What that needs is measured by a call of a 64th of the tokens, with which tensors grow. A tenth more is for lists of
    tiles in attention, which grow with their square, and for memory that is free but in pieces.
    """
    call = wide_call(op, backend)
    assert_preceded(call, backend, TOKENS_BEFORE // 64)
    needed, free = 1.1 * 64 * torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory; there are {free / 2**30:.0f}")
    assert_preceded(call, backend, TOKENS_BEFORE)


TOKENS_BEFORE = 2**19


def wide_call(op, backend):
    """A call whose activations have 4096 features, or 32 heads of 128."""
    if op == "routed_attention":
        if backend != "triton":
            pytest.skip("no vendor's kernel has padding and a window")
        sizes, options = testing.Sizes(heads=32, kv_heads=8, head_dim=128), {"window": 50}
    else:
        narrow = "mlp" in op or op == "routed_linear"
        sizes, options = testing.Sizes(d_model=32 if narrow else 4096, d_ff=4096), {}
    return cases.make(op, dtype=torch.bfloat16, tokens=64, sizes=sizes, device="cuda", **options)


def assert_preceded(call, backend, tokens):
    """The gradients of the last tokens, and of the parameters, are those without the tokens before."""
    extended = preceded(call, tokens).run(backend)
    names, along = testing.OPS[call.op].activations, token_dimension(call.op)

    def own(tensor):
        return tensor.narrow(along, tokens, tensor.shape[along] - tokens)

    gradients = {
        name: own(gradient) if name in names else gradient for name, gradient in extended.gradients.items()
    }
    result = testing.Result(own(extended.output), gradients)
    assert_result_within_budget(result, call.in_float64().run("reference"), call.run_plain(), call.op)
