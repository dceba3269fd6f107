"""Backends `cpu` and `cuda`: the leaf computations of the autograd.Functions, launched from the native module.

Which of the two runs is the device of the tensors. The module takes addresses, shapes and strides; so what has no
memory of its own, lies elsewhere or is not aligned is refused here. Sums over tokens come in runs, which are added in
order: results do not depend on the number of threads.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..primitives import shared
from ..primitives.arguments import (
    ADAMW_SCHEMA,
    MIDDLE_SCHEMA,
    AdamWOptions,
    Middle,
    NormArguments,
    has_data,
    product_dtype,
    tokens_of,
    wanted,
    weights_on,
)
from ..primitives.attention_pattern import Pattern
from ..primitives.registration import kernel_op
from ..routes import Routes
from ..tables import Table
from . import composed
from . import native as primitives  # this module, as shared algorithms take it

# As in csrc/types.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _load() -> tuple[Any, str | None]:
    """The module, or None and the reason. torch is imported by now: they share its OpenMP runtime."""
    try:
        return importlib.import_module("gradroute._native"), None
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "gradroute._native"
        return (
            None,
            "the native module was not built" if missing else f"the native module fails to load: {error}",
        )


module, load_error = _load()


def _instruction_set() -> str | None:
    """The best one that this machine runs, or the one that GRADROUTE_CPU_CAPABILITY names."""
    if module is None:
        return None
    chosen = os.environ.get("GRADROUTE_CPU_CAPABILITY")
    if chosen and chosen not in module.INSTRUCTION_SETS:
        raise ValueError(
            f"GRADROUTE_CPU_CAPABILITY: got {chosen!r}, expected one of {', '.join(module.INSTRUCTION_SETS)}"
        )
    return chosen or module.INSTRUCTION_SETS[0]


def why_not_on(capability: tuple[int, int]) -> str | None:
    """Why the CUDA kernels do not run on a device of this compute capability; None when they do."""
    built = json.loads(module.BUILD)["cuda_architectures"].split()
    if any(_runs_on(architecture, capability) for architecture in built):
        return None
    major, minor = capability
    return f"the native module was built for {' '.join(built)}, and the device is sm_{major}{minor}"


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """As nvcc's: 80-real runs on 8.0 to 8.9, 90a-real on 9.0, 100 (with PTX) on anything from 10.0."""
    number, _, kind = architecture.partition("-")
    major, minor = divmod(int(number.rstrip("af")), 10)
    if number[-1] in "af":
        return capability == (major, minor)
    if kind == "real":
        return capability[0] == major and capability[1] >= minor
    return capability >= (major, minor)


#: The instruction set of the CPU's kernels: "avx512", "avx2" or "baseline".
instruction_set = _instruction_set()


def why_not(name: str) -> str | None:
    """Why the native module has no kernels for backend `name`, "cpu" or "cuda"; None when it has."""
    if module is None:
        return f'{load_error}: see "Build wheels for a cluster" in the README'
    if name == "cuda" and not hasattr(module, "cuda"):
        return "the native module was built without CUDA"
    return None


class Routing(NamedTuple):
    """The argument `routing` of a kernel: ids `[T]`, strength `[T]`, 0-dim or None."""

    ids: Tensor
    strength: Tensor | None

    def taken(self, device: torch.device) -> tuple[int, int, int, bool]:
        """(address of ids, address of strength, its stride, whether it is double)."""
        if self.strength is None:
            return _address(self.ids, device), 0, 0, False
        per_token = self.strength.dim() > 0
        double = self.strength.dtype == torch.float64
        return _address(self.ids, device), _address(self.strength, device), int(per_token), double


class Weights(NamedTuple):
    """A table's weights `[R, F]` or `[R, 1]`, fp32; or None."""

    weights: Tensor | None

    def taken(self, device: torch.device) -> tuple[int, int] | None:
        """(address, columns)."""
        return None if self.weights is None else (_address(self.weights, device), self.weights.shape[1])


class Positions(NamedTuple):
    """Positions `[T]`, int64."""

    positions: Tensor

    def taken(self, device: torch.device) -> int:
        """The address."""
        return _address(self.positions, device)


class View(NamedTuple):
    """A matrix `[rows, cols]`, a vector (one row), or `[batch, heads, sequence, features]`."""

    tensor: Tensor

    def taken(self, device: torch.device) -> tuple[Any, ...]:
        """(address, rows, cols, row stride, column stride, dtype), or (address, shape, strides, dtype)."""
        tensor = self.tensor
        address, dtype = _address(tensor, device), DTYPES.get(tensor.dtype)
        if dtype is None:
            raise ValueError(
                f"native kernels: got a {tensor.dtype} tensor, expected {', '.join(map(str, DTYPES))}"
            )
        if tensor.dim() == 4:
            return address, tuple(tensor.shape), tensor.stride(), dtype
        if tensor.dim() == 1:
            return address, 1, tensor.shape[0], 0, tensor.stride(0), dtype
        return address, *tensor.shape, *tensor.stride(), dtype


def launch(name: str, *arguments: Any) -> None:
    """Calls a kernel with its arguments in the order of csrc/declarations.inc, on the device of the first tensor.

    Raises:
        TypeError: a tensor subclass that wraps others, such as DTensor: it has no memory of its own.
        ValueError: a tensor of a dtype that no kernel takes, on another device than the first, without memory, or not
            aligned to its elements.
        RuntimeError: CUDA refuses; the message names the kernel.
    """
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    if not has_data(first) or first.numel() == 0:
        return
    device = first.device
    taken = []
    for argument in arguments:
        given = View(argument) if isinstance(argument, Tensor) else argument
        taken.append(given.taken(device) if hasattr(given, "taken") else given)
    if device.type == "cpu":
        getattr(getattr(module, f"cpu_{instruction_set}"), name)(*taken, (0, 0))
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(module.cuda, name)(*taken, (device.index, stream))


def _address(tensor: Tensor, device: torch.device) -> int:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"native kernels: got a {type(tensor).__name__}, expected a torch.Tensor with memory of its own; "
            "pass a DTensor's local tensor (to_local)"
        )
    if tensor.device != device:
        raise ValueError(
            f"native kernels: got a tensor on {tensor.device}, expected {device} as the first one"
        )
    address = tensor.data_ptr()
    if address == 0 and tensor.numel() > 0:
        raise ValueError(f"native kernels: got a tensor {list(tensor.shape)} without memory")
    if address % tensor.element_size():
        raise ValueError(
            f"native kernels: got a {tensor.dtype} tensor at an address that is not a multiple of "
            f"{tensor.element_size()}; clone it"
        )
    return address


def _sums(g: Tensor) -> Tensor:
    """The sums of each run of tokens: `[runs, F]`."""
    runs = -(-g.shape[0] // module.TOKENS_PER_SUM)
    return g.new_empty(runs, g.shape[1], dtype=product_dtype(g.dtype))


def _summed(sums: Tensor | None, g: Tensor) -> Tensor:
    """The sums over all tokens `[F]`; without elements where they are not wanted."""
    return g.new_empty(0) if sums is None else sums.sum(0)


def masked_product(g: Tensor, routes: Routes, table: Table | None) -> Tensor:
    if table is None:
        return g
    return masked_product_op(g, *tokens_of(routes), table.on(g.device), _bounds(table))


def masked_product_(g: Tensor, routes: Routes, table: Table | None) -> None:
    """m ⊙ g in place, on a gradient that the caller allocated."""
    if table is not None:
        masked_product_in_place_op(g, *tokens_of(routes), table.on(g.device), _bounds(table))


def _bounds(table: Table) -> list[int]:
    """Start and stop of each constant segment; one that is broadcast has no bounds of its own."""
    return [] if table.features == 1 else [bound for segment in table.segments for bound in segment]


@kernel_op(
    "native_masked_product(Tensor g, Tensor ids, Tensor? strength, Tensor weights, int[] segments) -> Tensor"
)
def masked_product_op(
    g: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor, segments: list[int]
) -> Tensor:
    out = g.new_empty(g.shape)
    launch("masked_product", g, out, Routing(ids, strength), Weights(weights), segments)
    return out


@kernel_op(
    "native_masked_product_(Tensor(a!) g, Tensor ids, Tensor? strength, Tensor weights, int[] segments) -> ()"
)
def masked_product_in_place_op(
    g: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor, segments: list[int]
) -> None:
    launch("masked_product", g, g, Routing(ids, strength), Weights(weights), segments)


def bias_grad(g: Tensor, routes: Routes, table: Table | None) -> Tensor:
    """Σ_t m ⊙ g: g `[T, O]` → `[O]`."""
    if table is None:
        return g.sum(0)
    return bias_grad_op(g, *tokens_of(routes), table.on(g.device))


@kernel_op("native_bias_grad(Tensor g, Tensor ids, Tensor? strength, Tensor weights) -> Tensor")
def bias_grad_op(g: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor) -> Tensor:
    sums = _sums(g)
    launch("bias_grad", g, sums, Routing(ids, strength), Weights(weights))
    return _summed(sums, g).to(g.dtype)


def input_grad(g: Tensor, weight: Tensor, routes: Routes, table: Table | None) -> Tensor:
    return shared.input_grad(g, weight, routes, table, primitives)


def weight_grad(g: Tensor, x: Tensor, routes: Routes, rows: Table | None, cols: Table | None) -> Tensor:
    return shared.weight_grad(g, x, routes, rows, cols, primitives)


def activation_backward(
    dz: Tensor | None,
    a: Tensor,
    routes: Routes,
    sites: Any,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.backends.composed.activation_backward`."""
    dz = None if dz is None else dz.to(a.dtype)
    middle = Middle.of(a, routes, sites, activation, want_z, want_bias)
    if overwrite:
        db = activation_backward_in_place_op(dz, a, *middle)
        return wanted((dz, True), (a, want_z), (db, want_bias))
    da, z, db = activation_backward_op(dz, a, *middle)
    return wanted((da, dz is not None), (z, want_z), (db, want_bias))


@kernel_op(f"native_activation_backward(Tensor? dz, Tensor a, {MIDDLE_SCHEMA}) -> (Tensor, Tensor, Tensor)")
def activation_backward_op(
    dz: Tensor | None,
    a: Tensor,
    *rest: Any,  # of Middle
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    middle = Middle(*rest)
    da, z = _like(a, dz is not None), _like(a, middle.want_z)
    present = (da if dz is not None else None, z if middle.want_z else None)
    return da, z, _activation_backward(dz, a, present, middle)


@kernel_op(f"native_activation_backward_(Tensor(a!)? dz, Tensor(b!) a, {MIDDLE_SCHEMA}) -> Tensor")
def activation_backward_in_place_op(
    dz: Tensor | None,
    a: Tensor,
    *rest: Any,  # of Middle
) -> Tensor:
    """Leaves da in dz and, where it is wanted, z in a."""
    middle = Middle(*rest)
    return _activation_backward(dz, a, (dz, a if middle.want_z else None), middle)


def _activation_backward(
    dz: Tensor | None, a: Tensor, outputs: tuple[Tensor | None, Tensor | None], middle: Middle
) -> Tensor:
    """Fills the outputs da and z; the bias gradient `[F]`, without elements where it is not wanted."""
    sums = _sums(a) if middle.want_bias else None
    launch(
        "activation_backward",
        dz,
        a,
        *outputs,
        sums,
        Routing(middle.ids, middle.strength),
        *map(Weights, middle.tables.values()),
        middle.activation,
    )
    return _summed(sums, a).to(a.dtype)


def _like(a: Tensor, is_wanted: bool) -> Tensor:
    """An output `[T, F]` in a's dtype, of no tokens where it is not wanted."""
    return a.new_empty(a.shape[0] if is_wanted else 0, a.shape[1])


def glu_backward(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    routes: Routes,
    sites: Any,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.backends.composed.glu_backward`."""
    dz = None if dz is None else dz.to(gate.dtype)
    middle = Middle.of(gate, routes, sites, activation, want_z, want_bias)
    has_grad = dz is not None
    dgate, dup, z = dz, up, gate
    if overwrite:
        db_gate, db_up = glu_backward_in_place_op(dz, gate, up, *middle)
    else:
        dgate, dup, z, db_gate, db_up = glu_backward_op(dz, gate, up, *middle)
    return wanted((dgate, has_grad), (dup, has_grad), (z, want_z), (db_gate, want_bias), (db_up, want_bias))


@kernel_op(
    f"native_glu_backward(Tensor? dz, Tensor gate, Tensor up, {MIDDLE_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def glu_backward_op(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    *rest: Any,  # of Middle
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    middle = Middle(*rest)
    has_grad = dz is not None
    dgate, dup, z = _like(gate, has_grad), _like(gate, has_grad), _like(gate, middle.want_z)
    present = (dgate if has_grad else None, dup if has_grad else None, z if middle.want_z else None)
    return dgate, dup, z, *_glu_backward(dz, gate, up, present, middle)


@kernel_op(
    f"native_glu_backward_(Tensor(a!)? dz, Tensor(b!) gate, Tensor(c!) up, {MIDDLE_SCHEMA}) -> (Tensor, Tensor)"
)
def glu_backward_in_place_op(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    *rest: Any,  # of Middle
) -> tuple[Tensor, Tensor]:
    """Leaves dgate in dz, dup in up and, where it is wanted, z in gate."""
    middle = Middle(*rest)
    outputs = (dz, None if dz is None else up, gate if middle.want_z else None)
    return _glu_backward(dz, gate, up, outputs, middle)


def _glu_backward(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    middle: Middle,
) -> tuple[Tensor, Tensor]:
    """Fills the outputs dgate, dup and z; the bias gradients `[F]`, without elements where they are not wanted."""
    gate_sums, up_sums = (_sums(gate), _sums(gate)) if middle.want_bias else (None, None)
    launch(
        "glu_backward",
        dz,
        gate,
        up,
        *outputs,
        gate_sums,
        up_sums,
        Routing(middle.ids, middle.strength),
        *map(Weights, middle.tables.values()),
        middle.activation,
    )
    return _summed(gate_sums, gate).to(gate.dtype), _summed(up_sums, gate).to(gate.dtype)


@kernel_op(
    "native_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor ids, Tensor? strength, Tensor? update, "
    "float eps, float offset, bool centered, bool round_x_hat, bool want_weight, bool want_bias) "
    "-> (Tensor, Tensor, Tensor)"
)
def norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    strength: Tensor | None,
    update: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
    round_x_hat: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    dx = _like(x, weight is not None)
    weight_sums, bias_sums = _sums(x) if want_weight else None, _sums(x) if want_bias else None
    launch(
        "norm_backward",
        dy,
        x,
        weight,
        dx if weight is not None else None,
        weight_sums,
        bias_sums,
        Routing(ids, strength),
        Weights(update),
        eps,
        offset,
        centered,
        round_x_hat,
    )
    return dx, _summed(weight_sums, x), _summed(bias_sums, x)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    routes: Routes,
    update: Table | None,
    norm: NormArguments,
    *,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.primitives.protocol.Primitives`; one op serves both norms."""
    masks = (*tokens_of(routes), *weights_on(x.device, update))
    dx, dweight, dbias = norm_backward_op(dy, x, weight, *masks, *norm, want_weight, want_bias)
    return wanted((dx, weight is not None), (dweight, want_weight), (dbias, want_bias))


def embedding_backward(
    dy: Tensor,
    tokens: Tensor,
    routes: Routes,
    update: Table | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> Tensor:
    """See `gradroute.backends.composed.embedding_backward`."""
    masks = (*tokens_of(routes), *weights_on(dy.device, update))
    return embedding_backward_op(dy, tokens, *masks, num_embeddings, padding_idx)


@kernel_op(
    "native_embedding_backward(Tensor dy, Tensor tokens, Tensor ids, Tensor? strength, Tensor? update, "
    "SymInt num_embeddings, int? padding_idx) -> Tensor"
)
def embedding_backward_op(
    dy: Tensor,
    tokens: Tensor,
    ids: Tensor,
    strength: Tensor | None,
    update: Tensor | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> Tensor:
    out = dy.new_zeros(num_embeddings, dy.shape[1])
    ordered, order = torch.sort(tokens.to(torch.int64), stable=True)
    launch(
        "embedding_backward",
        dy,
        out,
        Positions(ordered),
        Positions(order),
        -1 if padding_idx is None else padding_idx,
        Routing(ids, strength),
        Weights(update),
    )
    return out


def masked_heads(x: Tensor, routes: Routes | None, table: Table | None) -> Tensor:
    """See `gradroute.backends.composed.masked_heads`."""
    if table is None:
        return x
    assert routes is not None
    return masked_heads_op(x, *tokens_of(routes), table.on(x.device))


def masked_heads_(x: Tensor, routes: Routes | None, table: Table | None) -> None:
    """See `gradroute.backends.composed.masked_heads_`."""
    if table is not None:
        assert routes is not None
        masked_heads_in_place_op(x, *tokens_of(routes), table.on(x.device))


@kernel_op("native_masked_heads(Tensor x, Tensor ids, Tensor? strength, Tensor weights) -> Tensor")
def masked_heads_op(x: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor) -> Tensor:
    out = torch.empty_like(x)
    launch("masked_heads", x, out, Routing(ids, strength), Weights(weights))
    return out


@kernel_op("native_masked_heads_(Tensor(a!) x, Tensor ids, Tensor? strength, Tensor weights) -> ()")
def masked_heads_in_place_op(x: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor) -> None:
    launch("masked_heads", x, x, Routing(ids, strength), Weights(weights))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: Any,
    pattern: Pattern,
    vendor: str | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See `gradroute.backends.composed.attention_forward`."""
    return composed.attention_forward(q, k, v, routes, sites, pattern, vendor, masked_heads)


def attention_output_grad(
    dz: Tensor, o: Tensor, routes: Routes | None, sites: Any, *, want_delta: bool
) -> tuple[Tensor, Tensor | None]:
    """See `gradroute.backends.composed.attention_output_grad`: both masks, and delta, in one pass."""
    has_both = sites.heads is not None and sites.forward_heads is not None
    if routes is None or not (want_delta or has_both):
        return composed.attention_output_grad(dz, o, routes, sites, want_delta=False)
    has_any = sites.heads is not None or sites.forward_heads is not None
    tables = weights_on(dz.device, sites.heads, sites.forward_heads)
    d_o, delta = attention_delta_op(dz, o, *tokens_of(routes), *tables)
    return d_o if has_any else dz, delta


@kernel_op(
    "native_attention_delta(Tensor dz, Tensor o, Tensor ids, Tensor? strength, Tensor? heads, Tensor? forward_heads) "
    "-> (Tensor, Tensor)"
)
def attention_delta_op(
    dz: Tensor,
    o: Tensor,
    ids: Tensor,
    strength: Tensor | None,
    heads: Tensor | None,
    forward_heads: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """do has no elements where there is no table."""
    has_tables = heads is not None or forward_heads is not None
    d_o = torch.empty_like(dz) if has_tables else dz.new_empty(0)
    delta = dz.new_empty(dz.shape[:3], dtype=product_dtype(dz.dtype))
    routing = Routing(ids, strength)
    launch(
        "attention_delta",
        dz,
        o,
        d_o if has_tables else None,
        delta.flatten(0, 1),
        routing,
        Weights(heads),
        Weights(forward_heads),
    )
    return d_o, delta


def attention_backward(
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    saved: tuple[Tensor, ...],
    routes: Routes | None,
    sites: Any,
    pattern: Pattern,
    vendor: str | None,
    *,
    want_query: bool,
    want_key_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.backends.composed.attention_backward`."""
    return composed.attention_backward(
        dz,
        q,
        k,
        v,
        z,
        saved,
        routes,
        sites,
        pattern,
        vendor,
        want_query=want_query,
        want_key_value=want_key_value,
        output_grad=attention_output_grad,
        product_=masked_heads_,
    )


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    factors: Tensor,
    by_column: bool,
    options: AdamWOptions,
) -> None:
    """See `gradroute.backends.composed.adamw_step`."""
    adamw_step_op(parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq, factors, by_column, *options)


@kernel_op(f"native_adamw_step{ADAMW_SCHEMA}")
def adamw_step_op(parameter: Tensor, *rest: Any) -> None:
    launch("adamw_step", parameter, *rest)
