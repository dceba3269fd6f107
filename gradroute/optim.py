"""RoutedAdamW: an AdamW that leaves alone what no gradient touches, and the blocks of a routed model's parameters."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from . import backends
from .attention import AttentionSites
from .embedding import EmbeddingSites
from .layers import RoutedModule
from .linear import LinearSites
from .mlp import MLPSites
from .primitives.arguments import AdamWOptions
from .tables import Table

# Options of torch.optim.AdamW's groups that say how it computes.
_HOW_TORCH_COMPUTES = ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # the last with amsgrad

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


class RoutedAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) that leaves blocks without a gradient as they are.

    A masked gradient is an exact zero, but `torch.optim.AdamW` moves the parameter all the same: by the momentum of
    earlier steps, and by weight decay. So what gradient routing (Cloud et al. 2024, arXiv 2410.04332) and SGTM (Shilov
    et al. 2025, arXiv 2512.05648) confine to a part of a model leaks: steps on retain data alone go on moving the
    forget part, and let its moments fade. Here a step changes a block (a row, a column or all of a parameter) only if
    some gradient in it is not 0. With u(b) = 1 if some g in block b is not 0, else 0 (NaN and infinity are not 0):

        t(b) ← t(b) + u(b), and where u(b) = 1, for every element of b:
        θ ← θ - lr λ θ;  m ← β₁ m + (1 - β₁) g;  v ← β₂ v + (1 - β₂) g²
        θ ← θ - lr m / (1 - β₁^t(b)) / (√v / √(1 - β₂^t(b)) + ε)

    Where u(b) = 0, parameters, moments and counts keep every bit. Each block so has an AdamW of its own, which steps
    when it is touched. Where every block is touched in every step this is `torch.optim.AdamW`, on the CPU bit for bit
    that of `foreach=False`. Routes of negative weight give gradients that are not 0, and touch blocks like any other.
    Within a touched block an element that is masked alone drifts as under AdamW, so blocks should be what masks:
    `routed_param_groups` says which.

    Gradients are those of the whole batch: a block is touched if any token of any rank touched it. DDP has reduced them
    before `step`. Ranks that hold parts of one block (of DTensors: FSDP2, tensor parallelism) agree whether it is
    touched by one small all-reduce a process group. The flat parameters of FSDP1 have no rows and columns.

    Nothing here waits for the device or branches on values, so steps can be compiled, and captured in a CUDA graph.

    State of a parameter: "exp_avg", "exp_avg_sq" and, with amsgrad, "max_exp_avg_sq", of its shape and dtype; "step",
    t(b), fp32 (exact up to 2²⁴) of shape `[n, 1, ...]`, `[1, m, ...]` or `[]`, which broadcasts against it. They are
    DTensors where it is one.

    Args:
        params: parameters, or dicts of them with options of their own, as of every optimizer.
        lr: the learning rate; a tensor of one element is not read on the host.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        block_dim: what a block is. 0: a row, which is all that has one index in the first dimension; of a parameter of
            one dimension an element. 1: a column. None: the whole parameter.
        amsgrad: divide by the largest v so far (Reddi et al. 2018).
        maximize: ascend.
        fused: take a step by one kernel a parameter, of backend cpu, triton or cuda, instead of a dozen operations. It
            computes in fp32 (fp64 for fp64) and rounds once, so it differs from the other way, and from
            `torch.optim.AdamW`, in the last places, as torch's `fused=True` does. With a warning the other way is taken
            for parameters of three dimensions or more that are not contiguous, and for moments of another dtype.

    Raises:
        TypeError: complex parameters.
        ValueError: an option out of its range; `block_dim=1` for a parameter of fewer than two dimensions.
        gradroute.BackendError: `fused`, and no backend has a kernel for a parameter's device and dtype.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_dim: int | None = 0,
        amsgrad: bool = False,
        maximize: bool = False,
        fused: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "block_dim": block_dim,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters. Raises as the constructor does; the group is then not added."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError, backends.BackendError):
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates what is touched. A parameter whose `grad` is None is left out.

        Args:
            closure: evaluates the model again, and returns the loss.

        Raises:
            RuntimeError: sparse gradients.
            ValueError: a group's `block_dim`, or a parameter's shape, has changed since its first step.
            gradroute.BackendError: as of the constructor, where parameters have moved since.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[Any, list[_Update]] = {}
        gradients = self._gradients()
        for device, dtype in {(g.local.device, g.parameter.dtype) for g in gradients if g.group["fused"]}:
            _fused_backend(device, dtype)  # raises before anything is counted
        for gradient, touched in zip(gradients, _touched(gradients), strict=True):
            update = self._update_of(gradient, touched)
            kind = id(update.group), update.parameter.device, update.parameter.dtype, update.is_fused()
            alike.setdefault(kind, []).append(update)
        for (*_, is_fused), updates in alike.items():
            corrections = _Corrections.of(updates)
            if is_fused:
                _apply_fused(updates, corrections)
                continue
            for update, factors in zip(updates, _Factors.of(updates, corrections), strict=True):
                update.apply(factors)
        return loss

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Scales all gradients to a norm of at most `max_norm`: g ← g min(1, max_norm / (norm + 1e-6)).

        That of `torch.nn.utils.clip_grad_norm_`, with two differences. Where the norm is NaN, gradients of blocks that
        are not touched stay 0; 0 times NaN would touch them. And ordinary gradients may stand beside DTensors, and
        DTensors of several meshes side by side, as under `gradroute.models.tensor_parallel`.

        Args:
            max_norm: the largest norm allowed.
            norm_type: p of the p-norm; `math.inf` is the largest entry.
            error_if_nonfinite: raise where the norm is infinite or NaN, which waits for the device.

        Returns:
            The norm of all gradients before they were scaled, of no dimensions.

        Raises:
            RuntimeError: sparse gradients; a norm that is not finite, if `error_if_nonfinite`.
        """
        gradients = self._gradients()
        norm = _total_norm(gradients, float(norm_type))
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"error_if_nonfinite: got gradients of norm {float(norm)} (norm_type={norm_type}), expected a finite "
                "one"
            )
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient, touched in zip(gradients, _touched(gradients), strict=True):
            factor = torch.where(touched, scale.to(touched.device), 1.0)
            gradient.local.mul_(factor.to(_factor_dtype(gradient.local)))
        return norm

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for options in (self.defaults, *self.param_groups):  # of a copy from before there was the option
            options.setdefault("fused", False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state of this class, or of `torch.optim.AdamW`, whose step count becomes that of every block.

        Raises:
            ValueError: step counts that are not those of a parameter's blocks, or moments of another shape; the state
                of an Adam that adds weight decay to the gradient; groups that do not fit. Nothing is then taken over.
        """
        saved = state_dict["param_groups"]
        adopted = [_adopted(theirs, own) for theirs, own in zip(saved, self.param_groups, strict=False)]
        for theirs, own in zip(adopted, self.param_groups, strict=False):
            # Another number of groups or parameters is refused by torch's, before it takes anything over.
            for index, parameter in zip(theirs["params"], own["params"], strict=False):
                _check_state(parameter, theirs["block_dim"], state_dict["state"].get(index, {}))
        super().load_state_dict({**state_dict, "param_groups": adopted + saved[len(adopted) :]})
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "step" in state:
                    state["step"] = _loaded_steps(parameter, group["block_dim"], state["step"])

    def _gradients(self) -> list[_Gradient]:
        """Of every parameter that has one."""
        return [
            _Gradient.of(group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _update_of(self, gradient: _Gradient, touched: Tensor) -> _Update:
        """What a step does to a parameter. Its state is made where there is none, and the step counted."""
        group, parameter = gradient.group, gradient.parameter
        state = self.state[parameter]
        if not state:
            state["step"] = _steps(parameter, group["block_dim"])
            for name in _MOMENTS[: 3 if group["amsgrad"] else 2]:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        local = {name: _local(value) for name, value in state.items()}
        if local["step"].shape != touched.shape:
            raise ValueError(
                f"block_dim: got {group['block_dim']} for a parameter of shape {list(parameter.shape)} whose steps "
                f"are counted in blocks of shape {list(state['step'].shape)}, expected it not to change"
            )
        for name in _MOMENTS:
            if name in local and local[name].shape != gradient.local.shape:
                raise ValueError(
                    f"params: got a parameter of shape {list(parameter.shape)} whose {name} is of shape "
                    f"{list(state[name].shape)}, expected it not to change"
                )
        local["step"].add_(touched)
        return _Update(group, _local(parameter), gradient.local, local, touched)


def _check_group(group: Mapping[str, Any]) -> None:
    lr, betas, block_dim = group["lr"], group["betas"], group["block_dim"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: got a tensor of shape {list(lr.shape)}, expected one element")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name}: got {group[name]}, expected 0 or more")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: got {betas}, expected two numbers, 0 <= beta < 1")
    if isinstance(block_dim, bool) or block_dim not in (0, 1, None):
        raise ValueError(f"block_dim: got {block_dim!r}, expected 0, 1 or None")
    if not isinstance(group["fused"], bool):
        raise ValueError(f"fused: got {group['fused']!r}, expected True or False")
    for parameter in group["params"]:
        shape = list(parameter.shape)
        if parameter.is_complex():
            raise TypeError(
                f"params: got a parameter of {parameter.dtype} and shape {shape}, expected real numbers: make the "
                "parameter real, and view it as complex in forward"
            )
        if block_dim == 1 and len(shape) < 2:
            raise ValueError(
                f"block_dim: got 1 for a parameter of shape {shape}, expected 0 or None: it has no columns"
            )
        if group["fused"]:
            _fused_backend(parameter.device, parameter.dtype)


def _fused_backend(device: torch.device, dtype: torch.dtype) -> str:
    return backends.with_kernels("RoutedAdamW(fused=True)", device, dtype)


class _Gradient(NamedTuple):
    """Of one parameter.

    Attributes:
        group: the parameter's options.
        parameter: which may be a DTensor.
        local: its gradient, this rank's part.
    """

    group: Mapping[str, Any]
    parameter: Tensor
    local: Tensor

    @classmethod
    def of(cls, group: Mapping[str, Any], parameter: Any) -> _Gradient:
        if parameter.grad.layout != torch.strided:
            raise RuntimeError(
                f"params: got a sparse gradient for a parameter of shape {list(parameter.shape)}, expected a dense "
                "one, whose zeros say what is not touched"
            )
        if _is_distributed(parameter) and parameter.grad.placements != parameter.placements:
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        return cls(group, parameter, _local(parameter.grad))


class _Update(NamedTuple):
    """What a step does to one parameter; of all tensors this rank's part.

    Attributes:
        group: the parameter's options.
        parameter: θ.
        gradient: g.
        state: the moments, and the steps with this one.
        touched: u, of the shape of the parameter's blocks.
    """

    group: Mapping[str, Any]
    parameter: Tensor
    gradient: Tensor
    state: Mapping[str, Tensor]
    touched: Tensor

    @property
    def changed(self) -> list[Tensor]:
        """The parameter and its moments."""
        names = _MOMENTS[: 3 if self.group["amsgrad"] else 2]
        return [self.parameter, *(self.state[name] for name in names)]

    def is_fused(self) -> bool:
        """Whether a kernel takes the step: its group says so, and no tensor is one that kernels do not take."""
        if not self.group["fused"]:
            return False
        reason = self._why_not_fused()
        if reason is not None and not torch.compiler.is_compiling():
            warnings.warn(
                f"RoutedAdamW(fused=True): a parameter of shape {list(self.parameter.shape)} is updated by a dozen "
                f"operations instead of one kernel: {reason}",
                RuntimeWarning,
                stacklevel=5,
            )
        return reason is None

    def _why_not_fused(self) -> str | None:
        dtypes = {tensor.dtype for tensor in (self.gradient, *self.changed)}
        if len(dtypes) > 1:
            return f"it, its gradient and its moments are of {', '.join(sorted(map(str, dtypes)))}"
        if self.parameter.dim() > 2 and not all(tensor.is_contiguous() for tensor in self.changed):
            return "its elements, or those of its moments, do not lie in order; make it contiguous"
        return None

    def apply_fused(self, kernel: Callable[..., None], factors: Tensor, options: AdamWOptions) -> None:
        """Moves what is touched by one kernel; factors `[4, blocks]`, see `gradroute.backends.composed.adamw_step`."""
        parameter, *moments = self.changed
        if parameter.numel() == 0:
            return
        dims, block_dim = parameter.dim(), self.group["block_dim"]
        gradient = self.gradient if dims <= 2 else self.gradient.contiguous()
        if dims > 2 and block_dim == 1:  # each block is several columns of the matrix
            factors = factors.repeat_interleave(parameter[0, 0].numel(), dim=1)
        matrices = [
            tensor if dims == 2 else tensor.view(len(tensor) if dims > 2 else 1, -1)  # [N, M]
            for tensor in (parameter, gradient, *moments)
        ]
        by_column = block_dim == (1 if dims >= 2 else 0)
        kernel(*matrices, *[None] * (5 - len(matrices)), factors, by_column, options)
        if not torch.compiler.is_compiling():
            # As operations of torch do, so that a backward which still needs the old values raises.
            increment_version(self.changed)

    def apply(self, factors: _Factors) -> None:
        """Moves what is touched. Every operation is that of torch's loop over tensors, and rounds where it does."""
        group, state, parameter = self.group, self.state, self.parameter
        gradient = -self.gradient if group["maximize"] else self.gradient
        beta1, beta2 = group["betas"]
        if group["weight_decay"] != 0:
            parameter.mul_(factors.decay)
        spent = _average(state["exp_avg"], gradient, 1 - beta1, factors.mask)
        # What is not touched is multiplied by 1, and 0 is added. That keeps every bit, because v is never -0.
        second = state["exp_avg_sq"].mul_(factors.second).addcmul_(gradient, gradient, value=1 - beta2)
        if group["amsgrad"]:
            _write(torch.maximum(state["max_exp_avg_sq"], second), state["max_exp_avg_sq"], factors.mask)
            second = state["max_exp_avg_sq"]
        # Dynamo knows no `out` that is not contiguous.
        root = second.sqrt() if torch.compiler.is_compiling() else torch.sqrt(second, out=spent)
        denominator = root.div_(factors.root).add_(group["eps"])
        change = torch.mul(state["exp_avg"], factors.size).div_(denominator)
        _bits(change).bitwise_and_(factors.change_mask)
        parameter.sub_(change)


class _Corrections(NamedTuple):
    """What blocks are multiplied by, of all parameters of one group, device and dtype one after the other: `[blocks]`.

    Computed for all of them at once: one by one, these twenty small operations were a third of what a step of 39 tiny
    parameters took on the CPU.

    Attributes:
        touched: bool.
        decay: 1 - lr λ; 1 for blocks that are not touched.
        size: lr / (1 - β₁^t).
        root: √(1 - β₂^t).
    """

    touched: Tensor
    decay: Tensor
    size: Tensor
    root: Tensor

    @classmethod
    def of(cls, updates: Sequence[_Update]) -> _Corrections:
        group = updates[0].group
        dtype = _factor_dtype(updates[0].parameter)
        touched = _flat([update.touched for update in updates])
        counts = _flat([update.state["step"] for update in updates]).double()
        exact = dtype == torch.float64
        first, second = (1 - _power(beta, counts, exact) for beta in group["betas"])
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        return cls(
            touched,
            _where(touched, 1 - lr * group["weight_decay"], dtype),
            _quotient(lr, first).to(dtype),
            _power(second, torch.full_like(second, 0.5), exact).to(dtype),
        )


def _apply_fused(updates: Sequence[_Update], corrections: _Corrections) -> None:
    """Takes the steps of parameters of one group, device and dtype, each by one kernel."""
    group, parameter = updates[0].group, updates[0].parameter
    kernel = backends.primitives(_fused_backend(parameter.device, parameter.dtype)).adamw_step
    beta1, beta2 = group["betas"]
    options = AdamWOptions(beta1, beta2, group["eps"], group["maximize"])
    touched, decay, size, root = corrections
    factors = torch.stack([decay, size, root.reciprocal(), touched.to(decay.dtype)])  # [4, blocks]
    of_each = factors.split([update.touched.numel() for update in updates], dim=1)
    for update, its_factors in zip(updates, of_each, strict=True):
        update.apply_fused(kernel, its_factors, options)


class _Factors(NamedTuple):
    """What the elements of a parameter's blocks are multiplied by, each of the shape of the blocks.

    Attributes:
        decay: of `_Corrections`, as are `size` and `root`.
        second: β₂; 1 for blocks that are not touched.
        mask: all bits for blocks that are touched and none for others, as wide as the parameter's elements.
        change_mask: likewise, as wide as what is a product with `size`.
    """

    decay: Tensor
    second: Tensor
    size: Tensor
    root: Tensor
    mask: Tensor
    change_mask: Tensor

    @classmethod
    def of(cls, updates: Sequence[_Update], corrections: _Corrections) -> Iterator[_Factors]:
        """Those of parameters of one group, device and dtype."""
        group, parameter = updates[0].group, updates[0].parameter
        touched, decay, size, root = corrections
        masks = (touched.to(_INTEGERS[width]).neg_() for width in (parameter.itemsize, decay.itemsize))
        flat = [decay, _where(touched, group["betas"][1], decay.dtype), size, root, *masks]
        # Numbers of no dimensions would be cast to the dtype of what they are multiplied with.
        like = [
            update.touched if update.touched.dim() else update.touched.view([1] * update.parameter.dim())
            for update in updates
        ]
        of_each = (_split(values, like) for values in flat)
        return (cls(*factors) for factors in zip(*of_each, strict=True))


def _power(base: float | Tensor, exponent: Tensor, exact: bool) -> Tensor:
    """base ** exponent in fp64; exact: as of Python's floats, which torch's bias corrections are.

    torch's vectorised power is off by a bit now and then, and so is a square root, which is a power of 0.5 there. Of
    elements that do not lie side by side torch takes the C library's power, as Python does, at 40 ns each instead of 7.
    For fp32 that is not needed: for 11 values of β₁ and β₂ from 0.5 to 0.99999 and all steps up to 2²² the factors were
    the same after rounding.
    """
    if exact:
        exponent = exponent.new_empty((*exponent.shape, 2))[..., 0].copy_(exponent)
    return torch.pow(base, exponent)


def _quotient(lr: float | Tensor, divisor: Tensor) -> Tensor:
    """lr / divisor, rounded once: torch makes a product with the reciprocal of a number over a tensor."""
    if isinstance(lr, Tensor):
        return lr / divisor.to(lr.dtype)
    return torch.full_like(divisor, lr).div_(divisor)


def _where(touched: Tensor, value: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`value` where touched, else 1; rounded to `dtype` once."""
    return torch.ones_like(touched, dtype=torch.float64).masked_fill_(touched, value).to(dtype)


def _factor_dtype(tensor: Tensor) -> torch.dtype:
    """What torch computes the product of a tensor and a Python number in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _average(average: Tensor, gradient: Tensor, weight: float, mask: Tensor) -> Tensor:
    """average ← lerp(average, gradient, weight) within the mask; returns memory of that size that is free again.

    Two ways with the same bits; what torch rounds once both do. The first takes a tenth less of a whole step's time.
    """
    if weight < 0.5 and average.itemsize > 2:
        # a + w (g - a), as torch.lerp has it for weights below a half. To subtract +0 keeps every bit, also of -0.
        difference = average - gradient
        _bits(difference).bitwise_and_(mask)
        average.sub_(difference, alpha=weight)
        return difference
    new = torch.lerp(average, gradient, weight)
    _write(new, average, mask)
    return new


def _write(new: Tensor, old: Tensor, mask: Tensor) -> None:
    """Writes the bits of `new` that are in the mask over those of `old`; `new` is spent.

    On the CPU torch.where is slow: for 2¹⁸ elements in cache it took 0.17 ms, and each of these three operations 0.02
    to 0.03, as a product does (fp32, AVX-512).
    """
    _bits(old).bitwise_xor_(_bits(new).bitwise_xor_(_bits(old)).bitwise_and_(mask))


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.view(_INTEGERS[tensor.itemsize])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a flat tensor, in the shapes of `like`."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _blocks(shape: torch.Size, block_dim: int | None) -> torch.Size:
    """The shape of one number for every block of a tensor."""
    if block_dim is None or not shape:
        return torch.Size(())
    return torch.Size(size if dim == block_dim else 1 for dim, size in enumerate(shape))


def _touched(gradients: Sequence[_Gradient]) -> list[Tensor]:
    """By gradient, bool: which blocks of this rank's part have an element on any rank that is not 0."""
    touched = [_touched_here(gradient.local, gradient.group["block_dim"]) for gradient in gradients]
    shared: dict[_Group, list[int]] = {}  # processes → whose blocks they have parts of
    for index, gradient in enumerate(gradients):
        for dim, group in _shards(gradient.parameter):
            if dim != gradient.group["block_dim"]:
                shared.setdefault(group, []).append(index)
    for group, indices in shared.items():
        parts = [touched[index] for index in indices]
        on_any = _reduced(_flat(parts).to(torch.uint8), "max", group).bool()
        for index, part in zip(indices, _split(on_any, parts), strict=True):
            touched[index] = part
    return touched


def _touched_here(gradient: Tensor, block_dim: int | None) -> Tensor:
    shape = _blocks(gradient.shape, block_dim)
    if gradient.numel() == 0:
        return torch.zeros(shape, dtype=torch.bool, device=gradient.device)
    if shape == gradient.shape:
        return gradient != 0
    # On the CPU these took 0.04 ms for 2¹⁸ elements, and `(gradient != 0).any(...)` 0.37. They hand NaN on: it is true.
    within = [dim for dim in range(gradient.dim()) if not shape or dim != block_dim]
    least, most = (reduce(gradient, within, keepdim=bool(shape)) for reduce in (torch.amin, torch.amax))
    return torch.logical_or(least, most)


class _Group(NamedTuple):
    """Processes that have the shards of a parameter along one dimension.

    Attributes:
        name: of the process group.
        ranks: how many there are.
        number: this one's.
    """

    name: str
    ranks: int
    number: int


def _shards(parameter: Any) -> Iterator[tuple[int, _Group]]:
    """The dimensions along which a parameter is sharded, each with the processes that have the shards."""
    if not _is_distributed(parameter):
        return
    mesh = parameter.device_mesh
    for mesh_dim, placement in enumerate(parameter.placements):
        dim, ranks = getattr(placement, "dim", None), mesh.size(mesh_dim)
        if dim is not None and ranks > 1:
            yield dim, _Group(mesh.get_group(mesh_dim).group_name, ranks, mesh.get_local_rank(mesh_dim))


def _reduced(tensor: Tensor, operation: str, group: _Group) -> Tensor:
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(tensor, operation, group.name))  # type: ignore[arg-type]


def _steps(parameter: Any, block_dim: int | None, count: float = 0.0) -> Tensor:
    """The steps of every block of a parameter; a DTensor where it is one."""
    shape = _blocks(_local(parameter).shape, block_dim)
    local = torch.full(shape, count, dtype=torch.float32, device=parameter.device)
    if not _is_distributed(parameter):
        return local
    from torch.distributed.tensor import DTensor, Replicate

    whole = _blocks(parameter.shape, block_dim)
    placements = [
        placement if whole and getattr(placement, "dim", None) == block_dim else Replicate()
        for placement in parameter.placements
    ]
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, placements, run_check=False, shape=whole, stride=stride
    )


def _is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor; to import that takes a second where nothing else has."""
    return hasattr(tensor, "to_local")


def _local(tensor: Any) -> Tensor:
    """This rank's part, in the same memory."""
    return tensor.to_local() if _is_distributed(tensor) else tensor


def _total_norm(gradients: Sequence[_Gradient], norm_type: float) -> Tensor:
    """The norm of all gradients; of those that are sharded alike it takes one collective a process group.

    torch's of DTensors has no largest entry of an empty shard, and cannot stand beside that of ordinary tensors.
    """
    alike: dict[tuple[_Group, ...], list[Tensor]] = {}
    for gradient in gradients:
        groups = tuple(group for _, group in _shards(gradient.parameter))
        alike.setdefault(groups, []).append(gradient.local)
    norms = [_norm_of_ranks(tensors, norm_type, groups) for groups, tensors in alike.items()]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms, norm_type)


def _norm_of_ranks(tensors: Sequence[Tensor], norm_type: float, groups: tuple[_Group, ...]) -> Tensor:
    """The norm of tensors of which the ranks of these groups have parts."""
    if not groups:
        return nn.utils.get_total_norm(tensors, norm_type)
    # Another rank may have other empty parts, and so other dtypes among the rest.
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    norm = nn.utils.get_total_norm([tensor for tensor in tensors if tensor.numel()], norm_type)
    norm = norm.to(tensors[0].device, dtype)
    for group in groups:
        # Every rank adds its own to a list: the largest of several numbers need not be NaN where one of them is.
        norms = norm.new_zeros(group.ranks)
        norms[group.number] = norm
        norm = torch.linalg.vector_norm(_reduced(norms, "sum", group), norm_type)
    return norm


def _adopted(saved: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group, or one of torch.optim.AdamW as one of this class; `own` is the group that takes its options."""
    if "block_dim" in saved:
        return {**saved, "fused": own["fused"]}  # how this one computes is no state
    if not saved.get("decoupled_weight_decay", True):
        raise ValueError(
            "state_dict: got the state of an Adam that adds weight decay to the gradient, expected that of an AdamW"
        )
    options = {name: value for name, value in saved.items() if name not in _HOW_TORCH_COMPUTES}
    return options | {"block_dim": own["block_dim"], "fused": own["fused"]}


def _check_state(parameter: Tensor, block_dim: int | None, saved: Mapping[str, Any]) -> None:
    """Raises ValueError where a parameter's saved state is not of its shape."""
    shape, blocks = parameter.shape, _blocks(parameter.shape, block_dim)
    steps = torch.as_tensor(saved.get("step", 0))
    if steps.dim() and steps.shape != blocks:
        raise ValueError(
            f"state_dict: got steps of shape {list(steps.shape)} for a parameter of shape {list(shape)} and "
            f"block_dim={block_dim}, expected {list(blocks)} or one number"
        )
    for name in _MOMENTS:
        if name in saved and saved[name].shape != shape:
            raise ValueError(
                f"state_dict: got {name} of shape {list(saved[name].shape)} for a parameter of shape {list(shape)}, "
                "expected the parameter's"
            )


def _loaded_steps(parameter: Tensor, block_dim: int | None, saved: Any) -> Tensor:
    """Saved steps on the parameter's device; one number is that of every block."""
    steps = torch.as_tensor(saved)
    has_blocks = len(_blocks(parameter.shape, block_dim)) > 0
    if steps.dim() == 0 and (has_blocks or _is_distributed(parameter) != _is_distributed(steps)):
        return _steps(parameter, block_dim, float(_local(steps)))
    return steps.to(device=parameter.device, dtype=torch.float32)


def routed_param_groups(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    no_decay: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters of a routed model in groups for `RoutedAdamW`, with the `block_dim` of each.

    Blocks are what the sites of a parameter's layers mask:

    - rows (outputs) of linear layers that make hidden units, queries, keys and values, of those with `output` or
      `update_rows`, and wherever nothing says otherwise; tokens of an embedding; elements of biases and norms;
    - columns (inputs) of the output layers of an MLP (`update`, `update_out`, `forward`) and of attention (`update`,
      `update_out`, `forward_heads`), of linear layers with `update_cols`, and of an embedding whose `update` differs
      from feature to feature;
    - of LoRA adapters columns of A, which are input features, and rows of B, which are output features.

    Where both rows and columns are masked, blocks are those of which more weights are 0 (counted in routes that mask
    some and not all of them), and rows if there are as many: what the others mask drifts in blocks that are touched.
    By rows an embedding's tokens that a batch lacks wait, moments and all, as under lazy optimizers; small models train
    the worse for it. Where everybody trains the embedding, give it a group of its own with `block_dim=None`.
    A tied parameter has columns only if all of its layers mask them. The Conv1D of transformers stores its weight
    transposed, so its rows are `block_dim=1`.

    Args:
        model: routed by `gradroute.models.route`, with adapters or without, sharded or not; or any module with routed
            layers in it. Of what is not routed blocks are rows.
        weight_decay: of parameters that decay; None: that of the optimizer, for all of them.
        no_decay: (name, parameter) → whether its weight decay is 0; default, where there is a `weight_decay`: those of
            fewer than two dimensions, which are biases and norms.

    Returns:
        Groups that hold every parameter that requires a gradient once.

    Raises:
        ValueError: `no_decay` without `weight_decay`.
    """
    if weight_decay is None and no_decay is not None:
        raise ValueError(
            "no_decay: got a rule beside weight_decay=None, expected the weight decay of the rest"
        )
    no_decay = _has_one_dimension if no_decay is None else no_decay
    layers = _layers_of(model)
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            options: dict[str, Any] = {"block_dim": _block_dim(parameter, layers[id(parameter)])}
            if weight_decay is not None:
                options["weight_decay"] = 0.0 if no_decay(name, parameter) else weight_decay
            group = groups.setdefault(tuple(options.values()), {"params": [], **options})
            group["params"].append(parameter)
    return list(groups.values())


def _has_one_dimension(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() < 2


class _Layer(NamedTuple):
    """What a layer's sites mask of its weight.

    Attributes:
        rows: tables of its outputs.
        columns: tables of its inputs.
        rows_dim: the dimension of the weight along which blocks are, if none is masked.
    """

    rows: Sequence[Table | None] = ()
    columns: Sequence[Table | None] = ()
    rows_dim: int = 0

    def zeros(self, dim: int, size: int) -> Tensor | None:  # [R, size]
        """Where the weights of the tables along a dimension are 0."""
        tables = [
            table for table in (self.rows if dim == self.rows_dim else self.columns) if table is not None
        ]
        zeros = [(table.weights == 0).repeat_interleave(size // table.features, dim=1) for table in tables]
        return torch.stack(zeros).any(0) if zeros else None


def _block_dim(parameter: Tensor, layers: Sequence[_Layer]) -> int:
    if parameter.dim() < 2:
        return 0
    rows_dim = layers[0].rows_dim
    rows, columns = (_masked_share(layers, dim, parameter.shape[dim]) for dim in (rows_dim, 1 - rows_dim))
    return rows_dim if rows >= columns else 1 - rows_dim


def _masked_share(layers: Sequence[_Layer], dim: int, size: int) -> float:
    """The share of weights that are 0 in all of a parameter's layers, in routes where some are and some are not."""
    zeros = [layer.zeros(dim, size) for layer in layers]
    found = [one for one in zeros if one is not None]
    if len(found) < len(zeros):
        return 0.0
    masked = torch.stack(found).all(0)
    return float((masked & ~masked.all(1, keepdim=True)).float().mean())


def _layers_of(model: nn.Module) -> dict[int, list[_Layer]]:
    """By the id of a parameter all layers that have it."""
    modules = list(model.modules())
    known: dict[int, _Layer] = {}  # by the id of a module, what another one says of it
    for module in modules:
        if isinstance(module, RoutedModule) and isinstance(module.sites, (MLPSites, AttentionSites)):
            names: Any = module.names
            outer = getattr(module, names[-1])
            known[id(getattr(outer, "base_layer", outer))] = _outer_layer(module.sites)
        for inner in _inputs_of_adapters(module):
            known[id(inner)] = _Layer(rows_dim=1)
    layers: dict[int, list[_Layer]] = {}
    for module in modules:
        layer = known.get(id(module)) or _layer_of(module)
        layer = layer._replace(rows_dim=1) if _is_conv1d(module) else layer
        for parameter in module._parameters.values():
            layers.setdefault(id(parameter), []).append(layer)
    return layers


def _outer_layer(sites: MLPSites | AttentionSites) -> _Layer:
    """The linear layer after hidden units or heads, which reads those that forward zeroes as zeros."""
    tables = sites.tables
    seen = tables.get("forward", tables.get("forward_heads"))
    rows = [tables.get("output")] if isinstance(sites, MLPSites) else []
    return _Layer(rows, [tables.get("update_out", tables.get("update")), seen])


def _layer_of(module: nn.Module) -> _Layer:
    sites = module.sites if isinstance(module, RoutedModule) else None
    if isinstance(sites, LinearSites):
        tables = sites.tables
        return _Layer([tables.get("output"), tables.get("update_rows")], [tables.get("update_cols")])
    if isinstance(sites, EmbeddingSites):
        return _Layer(columns=[sites.tables.get("update")])
    return _Layer()


def _inputs_of_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """The A of a LoRA layer's adapters, whose rows are the rank."""
    linears = getattr(module, "lora_A", None)
    if isinstance(linears, nn.ModuleDict):
        yield from linears.values()
    embeddings = getattr(module, "lora_embedding_A", None)
    if isinstance(embeddings, nn.ParameterDict):
        yield embeddings


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers, or a class made of it, by `route` or `fully_shard`."""
    names = ((kind.__module__, kind.__name__) for kind in type(module).__mro__)
    return ("transformers.pytorch_utils", "Conv1D") in names
