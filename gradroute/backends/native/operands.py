"""The operands of the native module's kernels: what csrc/kernels.inc lists, field by field and in the same order.

`taken` turns them into the tuples that csrc/casters.h reads: tensors into addresses, shapes and strides. So a tensor
that has no memory of its own, lies elsewhere or is not aligned to its elements is refused here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The numbers are those of Dtype in csrc/types.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class Routing(NamedTuple):
    """The routes of the tokens: ids `[T]`, strength `[T]`, 0-dim or None."""

    ids: Tensor
    strength: Tensor | None

    def taken(self, device: torch.device) -> tuple[int, int, int, bool]:
        """(address of ids, address of strength, its stride, whether it is double)."""
        ids, strength = self
        if strength is None:
            return _address(ids, device), 0, 0, False
        double = strength.dtype == torch.float64
        return _address(ids, device), _address(strength, device), int(strength.dim() > 0), double


class Weights(NamedTuple):
    """A table's weights `[R, F]` or `[R, 1]`, fp32; or None."""

    weights: Tensor | None

    def taken(self, device: torch.device) -> tuple[int, int] | None:
        """(address, columns)."""
        weights = self.weights
        return None if weights is None else (_address(weights, device), weights.shape[1])


class Positions(NamedTuple):
    """Positions `[T]`, int64."""

    positions: Tensor

    def taken(self, device: torch.device) -> int:
        """The address."""
        return _address(self.positions, device)


class Mask(NamedTuple):
    """One site's mask: the routes of the tokens, and the weights of each route."""

    routing: Routing
    table: Weights

    @staticmethod
    def of(ids: Tensor, strength: Tensor | None, weights: Tensor | None) -> Mask:
        """The mask from an op's flat arguments."""
        return Mask(Routing(ids, strength), Weights(weights))


class MLPMasks(NamedTuple):
    """The masks of an MLP's gradients before the activation, of its hidden activations, and of its input updates."""

    routing: Routing
    gradient: tuple[Weights, ...]
    z: tuple[Weights, ...]
    update: tuple[Weights, ...]

    def taken(self, device: torch.device) -> tuple[Any, ...]:
        """(the routing, the tables of each group); by `taken` below it took 2 of the 20 µs of a small call."""
        groups = [tuple([weights.taken(device) for weights in group]) for group in self[1:]]
        return self.routing.taken(device), *groups


class HeadMasks(NamedTuple):
    """The masks of attention's output, whose tables have one column per head."""

    routing: Routing
    heads: Weights
    forward_heads: Weights


class ProductOperands(NamedTuple):
    """g, out `[T, F]`; segments: start and stop of each run of features on which a route's weight is constant."""

    g: Tensor
    out: Tensor
    mask: Mask
    segments: list[int]


class BiasOperands(NamedTuple):
    """g `[T, F]`, sums `[runs, F]`."""

    g: Tensor
    sums: Tensor
    mask: Mask


class ActivationOperands(NamedTuple):
    """dz, a, da, z `[T, F]`, sums `[runs, F]`; None: not wanted."""

    dz: Tensor | None
    a: Tensor
    da: Tensor | None
    z: Tensor | None
    sums: Tensor | None
    masks: MLPMasks
    activation: str


class GluOperands(NamedTuple):
    """dz, gate, up, dgate, dup, z `[T, F]`, gate_sums and up_sums `[runs, F]`; None: not wanted."""

    dz: Tensor | None
    gate: Tensor
    up: Tensor
    dgate: Tensor | None
    dup: Tensor | None
    z: Tensor | None
    gate_sums: Tensor | None
    up_sums: Tensor | None
    masks: MLPMasks
    activation: str


class ForwardOperands(NamedTuple):
    """a, up, z `[T, F]`; up None: there is none."""

    a: Tensor
    up: Tensor | None
    z: Tensor
    mask: Mask
    activation: str


class NormOperands(NamedTuple):
    """dy, x, dx `[T, D]`, weight `[D]`, weight_sums and bias_sums `[runs, D]`; None: not wanted."""

    dy: Tensor
    x: Tensor
    weight: Tensor | None
    dx: Tensor | None
    weight_sums: Tensor | None
    bias_sums: Tensor | None
    update: Mask
    eps: float
    offset: float
    centered: bool
    round_x_hat: bool


class EmbeddingOperands(NamedTuple):
    """dy `[T, D]`, out `[V, D]`, tokens and order `[T]`; padding_idx -1: none."""

    dy: Tensor
    out: Tensor
    tokens: Positions
    order: Positions
    padding_idx: int
    update: Mask


class HeadOperands(NamedTuple):
    """x, out `[B, H, S, D]`."""

    x: Tensor
    out: Tensor
    mask: Mask


class DeltaOperands(NamedTuple):
    """dz, o, d_o `[B, H, S, D]`, delta `[B * H, S]`; d_o None: not wanted."""

    dz: Tensor
    o: Tensor
    d_o: Tensor | None
    delta: Tensor
    masks: HeadMasks


class BlockedGradient(NamedTuple):
    """A gradient `[N, M]` or `[M]`, what its blocks are, and the number of its first block among those of all.

    Tensors are taken already, by `matrices`.
    """

    gradient: tuple[Any, ...]
    blocks: int
    first: int


class TouchedOperands(NamedTuple):
    """Gradients, and the address of a byte for each of their blocks."""

    gradients: list[BlockedGradient]
    touched: int


class AdamWTensors(NamedTuple):
    """A parameter, its gradient and moments, each `[N, M]` or `[M]`; and of its blocks what `BlockedGradient` says."""

    parameter: tuple[Any, ...]
    gradient: tuple[Any, ...]
    exp_avg: tuple[Any, ...]
    exp_avg_sq: tuple[Any, ...]
    max_exp_avg_sq: tuple[Any, ...] | None
    blocks: int
    first: int


class AdamWOperands(NamedTuple):
    """Parameters of one dtype; factors `[5, n]`."""

    tensors: list[AdamWTensors]
    factors: Tensor
    beta1: float
    beta2: float
    eps: float
    maximize: bool
    stochastic: bool


#: The structs of csrc/kernels.inc that are made field by field.
STRUCTS = (
    *(Mask, MLPMasks, HeadMasks),
    *(ProductOperands, BiasOperands, ActivationOperands, GluOperands, ForwardOperands),
    NormOperands,
    *(EmbeddingOperands, HeadOperands, DeltaOperands),
    *(BlockedGradient, TouchedOperands, AdamWTensors, AdamWOperands),
)


def taken(operand: Any, device: torch.device) -> Any:
    """An operand, or a struct of them, as csrc/casters.h reads it.

    Raises:
        TypeError: a tensor subclass that wraps others, such as DTensor: it has no memory of its own.
        ValueError: a tensor of a dtype that no kernel takes, on another device, without memory, or not aligned to its
            elements.
    """
    take = _TAKEN.get(type(operand))
    if take is not None:
        return take(operand, device)
    if isinstance(operand, Tensor):
        return _view(operand, device)
    return _fields(operand, device) if isinstance(operand, tuple) else operand


def _fields(struct: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    return tuple([taken(field, device) for field in struct])


def _itself(operand: Any, device: torch.device) -> Any:
    return operand


def matrices(
    tensors: Sequence[Tensor], shapes: Sequence[torch.Size], device: torch.device
) -> list[tuple[Any, ...]]:
    """`taken` of matrices and vectors of these shapes, for thousands of them: one by one, they took twice as long.

    The shapes are given because a parameter, its gradient and its moments share one, which is read once.
    """
    addresses = list(map(Tensor.data_ptr, tensors))
    is_plain = (
        _PLAIN.issuperset(map(type, tensors))
        and len({tensor.dtype for tensor in tensors}) == 1
        and {tensor.device for tensor in tensors} == {device}
        and 0 not in addresses
        and functools.reduce(operator.or_, addresses) % ALIGNMENT == 0
    )
    if not is_plain:
        return [_view(tensor, device) for tensor in tensors]
    dtype = DTYPES[tensors[0].dtype]
    places = zip(addresses, shapes, map(Tensor.stride, tensors), strict=True)
    return [
        (address, shape[0], shape[1], strides[0], strides[1], dtype)
        if len(shape) == 2
        else (address, 1, shape[0], 0, strides[0], dtype)
        for address, shape, strides in places
    ]


def _view(tensor: Tensor, device: torch.device) -> tuple[Any, ...]:
    """A matrix `[rows, cols]`, a vector (one row), or `[batch, heads, sequence, features]`.

    Returns:
        (address, rows, cols, row stride, column stride, dtype), or (address, shape, strides, dtype).
    """
    address, dtype = _address(tensor, device), DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ValueError(
            f"native kernels: got a {tensor.dtype} tensor, expected {', '.join(map(str, DTYPES))}"
        )
    shape, strides = tensor.shape, tensor.stride()
    if len(shape) == 4:
        return address, tuple(shape), strides, dtype
    if len(shape) == 1:
        return address, 1, shape[0], 0, strides[0], dtype
    return address, *shape, *strides, dtype


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


# Types whose tensors have memory of their own, and the alignment of any element.
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
ALIGNMENT = 8

# How operands of these very types are taken; asking for one class after the other took a third of the time of `taken`.
_TAKEN: dict[type, Callable[[Any, torch.device], Any]] = {
    **dict.fromkeys((type(None), bool, int, float, str, list), _itself),
    **dict.fromkeys((Tensor, torch.nn.Parameter), _view),
    **dict.fromkeys(STRUCTS, _fields),
    **{kind: kind.taken for kind in (Routing, Weights, Positions, MLPMasks)},
}
