"""What `python -m gradroute check` finds in combinations of kernels that the automatic choice takes on CUDA alone.

Without a GPU vendors' kernels and FlashAttention-4's are emulated on the CPU, and Triton's are interpreted.
"""

import emulated_fa4
import emulated_vendors
import pytest
import torch
from cases import tiered

from gradroute import backends
from gradroute.backends import attention_plan
from gradroute.backends import triton as own
from gradroute.backends.attention_plan import FA4
from gradroute.machine import records, report
from gradroute.machine.check import around_vendors, cases, command, trials
from gradroute.machine.check.cases import Case, Selection
from gradroute.machine.check.judging import REFUSED, RIGHT, WRONG, judged
from gradroute.skipping import grouped_linear, grouped_mlp, rule, sums

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def cases_of(covers, dtypes, quick=True):
    return list(cases._of_covers(around_vendors.OP, covers, dtypes, Selection(quick=quick)))


UNDER_VENDORS = cases_of(around_vendors.covers_under_vendors(CUDA), ("float32", "float16"))
BY_FA4 = cases_of(around_vendors.covers_of_fa4(CUDA), ("bfloat16", "float16"))


def numbers(found, **wanted):
    return [
        case
        for case in found
        if case.kind == "numbers" and all(case.options[name] == value for name, value in wanted.items())
    ]


@pytest.fixture
def vendors(monkeypatch, free):
    emulated_vendors.use_on_the_cpu(monkeypatch)


@pytest.fixture
def library(monkeypatch, vendors):
    return emulated_fa4.use_on_the_cpu(monkeypatch)


def under_vendor(kind="numbers", dtype="float16", **options):
    given = {"tokens": 37, "tables": "blocks", "under_vendor": True, "sites": "all"}
    return Case(kind, around_vendors.OP, dtype, given | options)


EQUAL = ("score_edges", "value_edges")
#: Functions of the emulated library that take no notice of edges.
FORGETTING = {
    "has_edge": lambda batch, query, key, operands: key >= 0,
    "by_routes": lambda table, batch, query, key, operands: torch.ones_like(query + key, dtype=torch.float32),
}


def by_fa4(kind="numbers", **options):
    given = {
        "tokens": 150,
        "tables": "fractional",
        "sites": ("score_edges",),
        "sizes": BY_FA4[0].options["sizes"],
    }
    return Case(kind, around_vendors.OP, "bfloat16", given | options)


@pytest.mark.parametrize("kind", tiered(["numbers", "determinism", "bounds"]))
@pytest.mark.parametrize("dtype", tiered(["float16", "float32"]))
def test_own_kernels_under_a_vendors_forward_are_right(kind, dtype, vendors, monkeypatch):
    vendor = {"float16": "cudnn", "float32": "efficient"}[dtype]
    ran = []
    forward = own.attention_forward

    def noted(*given):
        ran.append(given[-1])
        return forward(*given)

    monkeypatch.setattr(own, "attention_forward", noted)
    assert judged(under_vendor(kind, dtype), "triton", CPU, 0) == (RIGHT, "")
    assert set(ran) == {(vendor, "own")}


def test_an_own_backward_that_is_wrong_with_a_vendors_lse_is_found(vendors, monkeypatch):
    right = own.own_attention.saved_with

    def in_base_two(lse, documents):
        return right(lse * 1.4427, documents)

    monkeypatch.setattr(own.own_attention, "saved_with", in_base_two)
    found = judged(under_vendor(), "triton", CPU, 0)
    assert found.state == WRONG
    assert "routed_attention: " in found.text
    # The kernels themselves are right, and without a vendor's forward nothing is found.
    assert (
        judged(Case("numbers", around_vendors.OP, "float16", {"tokens": 37}), "triton", CPU, 0).state == RIGHT
    )


def test_what_no_vendor_runs_is_refused(monkeypatch, free):
    monkeypatch.setattr(attention_plan.vendors, "choose", lambda *_: (None, "none is there"))
    found = judged(under_vendor(), "triton", CPU, 0)
    assert found.state == REFUSED
    assert "no vendor's kernel can run the forward: none is there" in found.text


def test_the_combinations_are_cases_of_the_backend_whose_kernels_run_the_backward(monkeypatch):
    monkeypatch.setattr(cases, "dtypes_of", lambda backend, device: ("float32", "bfloat16"))
    of = {name: cases.cases(name, CUDA, Selection(quick=True)) for name in ("triton", "cuda", FA4)}
    kinds = {case.kind for case in of["triton"] if "under_vendor" in case.options}
    assert kinds == {"numbers", "determinism", "bounds", "graphs", "streams"}
    assert not [case for case in of["cuda"] if "under_vendor" in case.options]
    assert {case.op for case in of[FA4]} == {"routed_attention"}
    assert {case.kind for case in of[FA4]} == {"numbers", "strides", "graphs", "streams"}
    on_cpu = cases.cases("triton", CPU, Selection(quick=True))
    assert not [case for case in on_cpu if "under_vendor" in case.options]


@pytest.mark.parametrize("capability", tiered([(9, 0), (10, 0)]))
@pytest.mark.parametrize("sites", around_vendors.WEIGHTS, ids="+".join)
def test_every_kind_of_edges_is_run_by_fa4(sites, capability, vendors, monkeypatch):
    library = emulated_fa4.use_on_the_cpu(monkeypatch, capability)
    for weights in around_vendors.WEIGHTS[sites]:
        case = by_fa4(sites=sites, tables=weights, same_edges=len(sites) > 1)
        library.masked.clear()
        assert judged(case, FA4, CPU, 0) == (RIGHT, "")
        assert library.masked


@pytest.mark.slow
@pytest.mark.parametrize("case", numbers(BY_FA4), ids=str)
def test_the_cases_of_fa4_are_right(case, library):
    assert judged(case, FA4, CPU, 0).state in (RIGHT, REFUSED)


def test_few_cases_of_fa4_are_refused(library):
    refused = []
    for case in BY_FA4:
        try:
            trials.made(case, FA4, CPU, 0)
        except trials.Refused as reason:
            refused.append(str(reason))
    assert len(refused) < len(BY_FA4) / 3, refused


@pytest.mark.parametrize(("broken", "sites"), [("has_edge", EQUAL), ("by_routes", ("score_edges",))])
def test_a_backward_of_fa4_that_forgets_edges_is_found(broken, sites, library, monkeypatch):
    case = by_fa4(sites=sites, tables="blocks", same_edges=sites == EQUAL)
    assert judged(case, FA4, CPU, 0).state == RIGHT
    monkeypatch.setattr(emulated_fa4, broken, FORGETTING[broken])
    found = judged(case, FA4, CPU, 0)
    assert found.state == WRONG
    assert "maximum error" in found.text


def test_other_backends_are_not_asked_for_what_fa4_runs(library):
    made = trials.made(by_fa4(), "torch", CPU, 0)
    assert made.call.sites.score_edges is None
    assert trials.made(by_fa4(), FA4, CPU, 0).call.sites.score_edges is not None
    assert judged(by_fa4(), "torch", CPU, 0).state == RIGHT
    assert not library.masked


def test_fa4_is_not_checked_where_it_does_not_run():
    assert cases.why_not(FA4, CPU, "bfloat16") is not None
    assert cases.cases(FA4, CPU, Selection(quick=True)) == []


def test_fa4_is_checked_by_its_name_and_kept_out_where_it_is_wrong(library, monkeypatch, tmp_path, capsys):
    """A wrong mask is found; the automatic choice then takes tiles, until a check passes."""
    monkeypatch.setenv("GRADROUTE_CACHE", str(tmp_path))
    backends.choose_anew()
    one = by_fa4(tables="blocks", sites=EQUAL, same_edges=True)
    monkeypatch.setattr(cases, "_of_covers", lambda *_: iter([one]))
    monkeypatch.setattr(command, "outcomes", _in_this_process)
    call = trials.made(one, FA4, CPU, 0).call
    assert plan_of(call).backward == FA4
    right = emulated_fa4.has_edge
    monkeypatch.setattr(emulated_fa4, "has_edge", FORGETTING["has_edge"])
    assert check_of_fa4() == 1
    assert "--backend fa4 --op routed_attention" in capsys.readouterr().out
    assert set(records.Record(records.CHECK, CPU).read()) == {FA4}
    with pytest.warns(RuntimeWarning, match="backend 'fa4' on cpu: .*found it wrong"):
        plan = plan_of(call)
    assert plan.backward == "tiles"
    assert plan_of(call, "torch").backward == FA4  # who asks for a backend gets what it has
    assert "WRONG" in report.checks_text(report.findings())
    monkeypatch.setattr(emulated_fa4, "has_edge", right)
    assert check_of_fa4() == 0
    assert plan_of(call).backward == FA4


def check_of_fa4():
    return command.main(["--device", "cpu", "--backend", FA4, "--quick"])


def plan_of(call, backend=None):
    given = {"routes": call.routes, "sites": call.sites}
    return around_vendors.attention.explain(**call.tensors, **call.keywords, **given, backend=backend)


def _in_this_process(found, plan):
    for case in found:
        yield case, judged(case, plan.backend, plan.device, plan.seed)


UNCOUNTED = {
    op: [
        case
        for case in cases.cases("torch", CPU, Selection(quick=True, ops=(op,), kinds=("numbers",)))
        if "uncounted" in case.options
    ]
    for op in rule.PRODUCTS.values()
}


@pytest.mark.parametrize("backend", tiered(["cpu", "torch", "triton"]))
@pytest.mark.parametrize("op", UNCOUNTED)
def test_grouped_products_are_checked_on_every_backend(op, backend, monkeypatch):
    if backend in backends.unavailable_backends(op, CPU):
        pytest.skip(f"{backend} does not run here")
    calls = counted(monkeypatch)
    options = UNCOUNTED[op][0].options | {"sites": "all"}
    for kind in ("numbers", "determinism", "bounds"):
        calls.clear()
        assert judged(Case(kind, op, "float32", options), backend, CPU, 0) == (RIGHT, "")
        assert {"grouped_rows", "grouped_sums"} <= calls


def counted(monkeypatch, broken=None):
    """The names of the grouped products that were called; `broken` changes what each gives."""
    calls = set()
    for module in (grouped_linear, grouped_mlp, sums):
        for name in ("grouped_rows", "grouped_sums"):
            right = getattr(module, name, None)
            if right is not None:
                monkeypatch.setattr(module, name, _noting(name, right, calls, broken))
    return calls


def _noting(name, right, calls, broken):
    def product(*given):
        calls.add(name)
        return right(*given) if broken is None else broken(name, right(*given), given[2])

    return product


def leaves_the_last_group_out(wrong):
    def broken(name, out, ends):
        if name == wrong == "grouped_sums":
            out[-1] = 0
        elif name == wrong:
            out[int(ends[-2]) : int(ends[-1])] = 0
        return out

    return broken


@pytest.mark.parametrize("wrong", ["grouped_rows", "grouped_sums"])
@pytest.mark.parametrize("op", tiered(list(UNCOUNTED)))
def test_a_group_that_is_left_out_is_found(op, wrong, monkeypatch):
    counted(monkeypatch, leaves_the_last_group_out(wrong))
    assert WRONG in [judged(case, "torch", CPU, 0).state for case in UNCOUNTED[op]]
