"""Which of PyTorch's attention kernels runs a call, and why others are refused."""

import pytest
import torch
from torch.nn.attention import SDPBackend, _registry, sdpa_kernel
from vendor_cases import CPU, TOP_LEFT, empty, inputs, pattern, run, same_bits

from gradroute.backends.vendor import VENDORS, choose, machine

REFUSED = [
    ("cpu_flash", {}, {"window": 4}, "it has no window"),
    ("cpu_flash", {"batch": 1}, {"cu_seqlens": "documents"}, "it takes no cu_seqlens"),
    ("cpu_flash", {}, {"dropout": 0.5}, "it has no dropout that can be relied on"),
    ("cpu_flash", {"queries": 0}, {}, "it takes no empty tensors; got q [2, 8, 0, 64] and k [2, 2, 0, 64]"),
    (
        "cpu_flash",
        {"queries": 3, "keys": 0},
        {},
        "it takes no empty tensors; got q [2, 8, 3, 64] and k [2, 2, 0, 64]",
    ),
    ("cudnn", {}, {"window": 4}, "it has no window"),
    ("cudnn", {"batch": 1}, {"cu_seqlens": "documents"}, "it takes no cu_seqlens"),
    ("cudnn", {}, {"key_mask": "mask"}, "it takes no key_mask"),
    ("cudnn", {}, {"dropout": 0.5}, "it has no dropout that can be relied on"),
    ("cudnn", {"head_dim": 136}, {}, "its backward is certain for head dimensions up to 128; got 136"),
    ("cudnn", {"queries": 1}, {}, "single queries and keys are wrong in some of its versions; got 1 and 1"),
    (
        "cudnn",
        {"queries": 1, "keys": 9},
        {},
        "single queries and keys are wrong in some of its versions; got 1 and 9",
    ),
    (
        "cudnn",
        {"queries": 5, "keys": 9},
        {},
        TOP_LEFT,
    ),
    (
        "cudnn",
        {"dtype": torch.float32},
        {},
        "it takes q, k and v of one dtype out of torch.float16, torch.bfloat16; got torch.float32, torch.float32 and "
        "torch.float32",
    ),
    ("flash", {}, {"key_mask": "mask"}, "it takes no key_mask"),
    ("flash", {"head_dim": 264}, {}, "it has head dimensions up to 256; got 264"),
    (
        "flash",
        {"queries": 9, "keys": 5},
        {},
        "with S_q > S_k the first queries see no key, and not every version gives them 0",
    ),
    (
        "flash",
        {"queries": 5, "keys": 9, "batch": 1},
        {"cu_seqlens": "documents"},
        "cu_seqlens are those of the queries and of the keys, and S_q ≠ S_k",
    ),
    ("efficient", {}, {"window": 4}, "it has no window"),
    ("efficient", {"batch": 1}, {"cu_seqlens": "documents"}, "it takes no cu_seqlens"),
    (
        "efficient",
        {"dtype": torch.float64},
        {},
        "it takes q, k and v of one dtype out of torch.float16, torch.bfloat16, torch.float32; got torch.float64, "
        "torch.float64 and torch.float64",
    ),
    (
        "efficient",
        {"batch": 65536, "queries": 1},
        {},
        "a grid of CUDA has room for 65535 sequences and 65535 heads",
    ),
]


@pytest.mark.parametrize(("name", "shape", "fields", "reason"), REFUSED)
@pytest.mark.usefixtures("free", "without_data")
def test_refusals(name, shape, fields, reason):
    device = "cpu" if name == "cpu_flash" else "cuda"
    q, k, v, _ = empty(**shape, device=device)
    made = {
        "documents": torch.empty(3, dtype=torch.int32, device=device),
        "mask": torch.empty(2, k.shape[2], dtype=torch.bool, device=device),
    }
    fields = {field: made.get(value, value) for field, value in fields.items()}
    assert VENDORS[name].why_not(q, k, v, pattern(**fields)) == reason
    chosen, why = choose(q, k, v, pattern(**fields))
    assert chosen != name
    assert chosen is not None or f"{name}: {reason}" in why


@pytest.mark.usefixtures("free", "without_data")
def test_refusals_of_devices():
    on_gpu, on_cpu = empty()[:3], empty(device="cpu")[:3]
    assert CPU.why_not(*on_gpu, pattern()) == "it takes tensors on cpu; these are on cuda:0"
    for name in ("cudnn", "flash", "efficient"):
        assert VENDORS[name].why_not(*on_cpu, pattern()) == "it takes tensors on cuda; these are on cpu"
    name, reason = choose(*empty(device="xpu")[:3], pattern())
    assert name is None
    assert reason.count("; these are on xpu") == 4


def gpu(monkeypatch, capability, cudnn=91900):
    monkeypatch.setattr(machine, "capability", lambda index: capability)
    monkeypatch.setattr(machine, "cudnn_version", lambda: cudnn)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((7, 5), None), ((8, 0), "flash"), ((9, 0), "cudnn"), ((10, 0), "cudnn"), ((12, 0), "flash")],
)
@pytest.mark.usefixtures("free", "without_data")
def test_choice_by_gpu(monkeypatch, capability, name):
    gpu(monkeypatch, capability)
    chosen, reason = choose(*empty()[:3], pattern())
    assert chosen == name
    if name is None:
        too_old = "it needs compute capability 8.0; cuda:0 has 7.5"
        assert reason == "; ".join(f"{other}: {too_old}" for other in ("flash", "cudnn", "efficient"))
    elif name == "cudnn":
        assert reason == (
            f"on compute capability {capability[0]}.{capability[1]} cuDNN's backward is 1.7 to 2.3 times as fast as "
            "FlashAttention 2's"
        )
    assert choose(*empty(dtype=torch.float32)[:3], pattern())[0] == (None if name is None else "efficient")


@pytest.mark.usefixtures("free", "without_data")
def test_choice_moves_on_with_the_reasons(monkeypatch):
    gpu(monkeypatch, (9, 0), cudnn=91002)
    name, reason = choose(*empty()[:3], pattern())
    assert name == "flash"
    assert reason.endswith(
        "; cudnn: before version 9.15.1 it is wrong for some lengths; got version number 91002"
    )
    gpu(monkeypatch, (9, 0))
    assert choose(*empty(head_dim=256)[:3], pattern())[0] == "flash"
    assert choose(*empty()[:3], pattern(window=4))[0] == "flash"
    key_mask = torch.empty(2, 128, dtype=torch.bool, device="cuda")
    name, reason = choose(*empty()[:3], pattern(key_mask=key_mask))
    assert name == "efficient"
    assert reason.endswith("cudnn: it takes no key_mask; flash: it takes no key_mask")
    name, reason = choose(*empty()[:3], pattern(key_mask=key_mask, window=4))
    assert name is None
    assert reason == "cudnn: it has no window; flash: it takes no key_mask; efficient: it has no window"


@pytest.mark.usefixtures("free", "without_data")
def test_head_dimensions_that_small_gpus_cannot_train(monkeypatch):
    gpu(monkeypatch, (8, 9))
    for head_dim, dropout, fits in ((192, 0.5, True), (200, 0.0, False), (256, 0.0, True), (256, 0.5, False)):
        reason = VENDORS["flash"].why_not(*empty(head_dim=head_dim)[:3], pattern(dropout=dropout))
        assert (reason is None) == fits
        if not fits:
            assert (
                reason
                == f"its backward needs more shared memory than cuda:0 has for head dimension {head_dim}"
            )


@pytest.mark.usefixtures("free", "without_data")
def test_the_users_switches_are_honoured(monkeypatch):
    gpu(monkeypatch, (9, 0))
    tensors = empty()[:3]
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        name, reason = choose(*tensors, pattern())
        assert name == "efficient"
        for switch in ("cudnn", "flash"):
            assert (
                f"{switch}: it is switched off (torch.nn.attention.sdpa_kernel or "
                f"torch.backends.cuda.enable_{switch}_sdp)"
            ) in reason
        assert choose(*empty(device="cpu")[:3], pattern())[0] is None
    with sdpa_kernel(SDPBackend.MATH):
        name, reason = choose(*tensors, pattern())
        assert name is None
        assert reason.count("it is switched off") == 3
    assert choose(*tensors, pattern())[0] == "cudnn"


@pytest.mark.usefixtures("without_data")
def test_deterministic_algorithms_exclude_kernels(monkeypatch):
    gpu(monkeypatch, (9, 0))
    name, reason = choose(*empty()[:3], pattern())
    assert name == "flash"
    assert "cudnn: its backward is not deterministic, and deterministic algorithms are asked for" in reason
    assert VENDORS["efficient"].why_not(*empty()[:3], pattern()) is None
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        name, reason = choose(*empty()[:3], pattern())
    finally:
        torch.use_deterministic_algorithms(True)
    assert name is None
    only = (
        "its backward is deterministic only under torch.use_deterministic_algorithms(True, warn_only=False)"
    )
    assert f"flash: {only}" in reason
    assert f"efficient: {only}" in reason


ACTIVATED = [
    ("FA3", (9, 0), {}, {}, None),
    ("FA3", (9, 0), {"head_dim": 256}, {"window": 5}, None),
    ("FA3", (10, 0), {}, {}, "the activated FA3 does not run on compute capability 10.0"),
    ("FA3", (9, 0), {}, {"dropout": 0.1}, "the activated FA3 has no dropout"),
    ("FA4", (10, 0), {}, {}, None),
    (
        "FA4",
        (9, 0),
        {"head_dim": 192},
        {},
        "the activated FA4 is certain for head dimensions up to 128; got 192",
    ),
    ("FA4", (8, 0), {}, {}, "the activated FA4 does not run on compute capability 8.0"),
    ("FA9", (9, 0), {}, {}, "the activated FA9 is not known"),
]


@pytest.mark.parametrize(("active", "capability", "shape", "fields", "reason"), ACTIVATED)
@pytest.mark.usefixtures("free", "without_data")
def test_activated_flash_attention(monkeypatch, active, capability, shape, fields, reason):
    gpu(monkeypatch, capability)
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", (active, None))
    tensors = empty(**shape)[:3]
    assert VENDORS["flash"].why_not(*tensors, pattern(**fields)) == reason
    name, why = choose(*tensors, pattern(**fields))
    assert (name == "flash") == (reason is None)
    assert why.startswith(
        f"{active} was activated in place of FlashAttention 2" if name is not None else "flash: "
    )
    torch.use_deterministic_algorithms(True)
    reason = VENDORS["flash"].why_not(*empty()[:3], pattern())
    assert reason == f"the backward of the activated {active} is not deterministic in all of its versions"


def test_shapes_on_the_meta_device():
    q, k, v, d_o = empty(37, head_dim=20, device="meta")
    assert choose(q, k, v, pattern())[0] == "cpu_flash"
    result, lse = run(CPU, q, k, v, d_o, pattern())
    assert lse.shape == q.shape[:3]
    assert [t.shape for t in (result.output, *result.gradients.values())] == [t.shape for t in (q, q, k, v)]


def test_dynamo_specialises_no_refusal_to_a_length():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(q, k, v):
        return q * (2 if choose(q, k, v, pattern())[0] is None else 3)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for queries, keys in ((20, 37), (21, 40), (30, 55)):
        q, k, v, _ = inputs(queries, keys)
        assert torch.equal(compiled(q, k, v), 2 * q)
    assert len(graphs) == 1


def test_dynamo_traces_choice_and_kernels():
    tensors = inputs(dtype=torch.bfloat16)
    key_mask = torch.arange(37).expand(2, -1) < 30
    asked = pattern(key_mask=key_mask)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v, d_o):
        with torch.no_grad():
            name, _ = choose(q, k, v, asked)
            return run(VENDORS[name], q, k, v, d_o, asked)

    (actual, lse), (expected, expected_lse) = step(*tensors), run(CPU, *tensors, asked)
    assert same_bits(actual, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.usefixtures("free")
def test_dynamo_traces_the_cuda_kernels(name):
    """No GPU is needed to trace: the graph's calls are counted, and never run."""
    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    calls = []

    def count(graph, _):
        calls.extend(str(node.target) for node in graph.graph.nodes if "attention" in str(node.target))
        return lambda *args: args[-1:]

    def step(x):
        q, k, v, d_o = empty()
        chosen, _ = choose(q, k, v, pattern())
        run(VENDORS[chosen], q, k, v, d_o, pattern())
        return x + 1

    torch._dynamo.reset()
    with sdpa_kernel([backends[name], SDPBackend.MATH]):
        torch.compile(step, fullgraph=True, backend=count)(torch.zeros(3))
    kernel = {"cudnn": "cudnn_attention", "flash": "flash_attention", "efficient": "efficient_attention"}[
        name
    ]
    assert len(calls) == 2
    assert all(kernel in call for call in calls)
