"""RoutedAdamW: an AdamW that leaves alone what no gradient touches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .. import backends
from ..arguments import check_bool, is_number, shown
from .arithmetic import factor_dtype
from .gradients import Gradient, touched_blocks
from .norms import total_norm
from .options import check_group, checked_parameters, fused_backend
from .quantised import CODES, SCALES, Quantised, is_quantised, require_torchao
from .shards import is_distributed, local_part
from .state import (
    MOMENTS,
    adopt_group,
    block_shape,
    check_state,
    loaded_moments,
    loaded_steps,
    new_moments,
    new_steps,
)
from .update import Corrections, Factors, Update, step_by_primitive


class RoutedAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) that leaves blocks without a gradient as they are.

    A masked gradient is an exact zero, but `torch.optim.AdamW` moves the parameter all the same: by the momentum of
    earlier steps, and by weight decay. So what gradient routing (Cloud et al. 2024, arXiv 2410.04332) and SGTM (Shilov
    et al. 2025, arXiv 2512.05648) confine to a part of a model leaks: steps on retain data alone go on moving the
    forget part, and let its moments fade. Here a step changes a block (a row, a column or all of a parameter) only if
    some gradient in it is not 0; a row or column is the block `Block.of(model, {name: (block_dim, [i])})` of
    `gradroute.blocks`. With u(b) = 1 if some g in block b is not 0, else 0 (NaN and infinity are not 0):

        t(b) ← t(b) + u(b), and where u(b) = 1, for every element of b:
        θ ← θ - lr λ θ;  m ← β₁ m + (1 - β₁) g;  v ← β₂ v + (1 - β₂) g²
        θ ← θ - lr m / (1 - β₁^t(b)) / (√v / √(1 - β₂^t(b)) + ε)

    Where u(b) = 0, parameters, moments and counts keep every bit. So each block has an AdamW of its own, which steps
    when the block is touched. Where every block is touched in every step this is `torch.optim.AdamW`, on the CPU bit
    for bit that of `foreach=False`. Routes of negative weight give gradients that are not 0, and touch blocks like any
    other. Within a touched block an element that is masked alone drifts as under AdamW, so blocks should be what sites
    mask: `routed_param_groups` finds them.

    Gradients are those of the whole batch: a block is touched if any token of any rank touched it. DDP has reduced them
    before `step`. Ranks that hold parts of one block (of DTensors: FSDP2, tensor parallelism) agree whether it is
    touched by one small all-reduce a process group. The flat parameters of FSDP1 have no rows and columns.

    Nothing here waits for the device or branches on values, so steps can be compiled, and captured in a CUDA graph.

    The state of a parameter is "exp_avg", "exp_avg_sq" and, with amsgrad, "max_exp_avg_sq", all of its shape, and of
    its dtype or `state_dtype`; and "step", t(b), fp32 (exact up to 2²⁴) of shape `[n, 1, ...]`, `[1, m, ...]` or `[]`,
    which broadcasts against the parameter. They are DTensors where the parameter is one. With `state_dtype="8bit"` a
    moment is "exp_avg_codes" and "exp_avg_scales", and the others likewise.

    Args:
        params: parameters, or dicts of parameters with options of their own, as every optimizer takes them.
        lr: the learning rate; a tensor of one element is not read on the host.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        block_dim: the dimension along which a parameter is divided into blocks. 0: a block is a row, which is all that
            has one index in the first dimension (in a parameter of one dimension, an element). 1: a block is a column.
            None: the whole parameter is one block.
        amsgrad: divide by the largest v so far (Reddi et al. 2018).
        maximize: ascend instead of descending.
        fused: take a step by kernels of backend cpu, triton or cuda instead of a dozen operations a parameter: all
            parameters of a group in one call on the CPU, 24 in a launch on backend cuda, and on backend triton 8 of
            one shape. They compute in fp32 (fp64 for fp64) and round once, so that results differ from those of the
            operations, and of `torch.optim.AdamW`, in the last places, as those of torch's `fused=True` do. The
            operations are taken, with a warning, for parameters of three dimensions or more that are not contiguous,
            and for moments of another dtype than `state_dtype` says.
        state_dtype: the dtype of the moments, torch.float32 or torch.bfloat16; None: the parameter's, which rounds as
            torch does; "8bit": codes of one byte. Any other than None has every step computed in fp32 and rounded once,
            also without `fused`.
            Moments in bfloat16 are rounded up or down at random, so that their expectation is right: to the nearest,
            exp_avg_sq could not fade at all, because β₂ = 0.999 takes a thousandth off and half a unit in the last
            place is two. The random bits are a hash of an element's gradient, value and moments and of its block's
            count of steps: the same run has the same bits.
            "8bit" is the blockwise 8-bit quantisation with dynamic maps of Dettmers et al. 2022 (arXiv 2110.02861), by
            the package torchao: a uint8 code for each element, and an fp32 scale for up to 256 of them, so 1 + 4/256
            bytes an element. Elements that share a scale lie along one dimension of the parameter, within one row or
            one column where those are the blocks: as many as divide its size, at least 16. What is not touched keeps
            codes and scales. Moments are rounded to the nearest code, which is within 0.7 % of the largest value
            beside it, and exp_avg_sq never to 0 where it is not. Parameters of fewer than 4096 elements, or
            whose sizes have no such divisor, and those of one dimension in rows, have moments in fp32. A step copies
            the moments of one parameter at a time in fp32.

    Raises:
        TypeError: complex parameters.
        ImportError: `state_dtype="8bit"`, and no package torchao (`pip install 'gradroute[torchao]'`).
        ValueError: an option out of its range; `block_dim=1` for a parameter of fewer than two dimensions.
        gradroute.BackendError: `fused`, and no backend has a kernel for a parameter's device and dtype.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_dim: int | None = 0,
        amsgrad: bool = False,
        maximize: bool = False,
        fused: bool = False,
        state_dtype: torch.dtype | Literal["8bit"] | None = None,
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
            "state_dtype": state_dtype,
        }
        super().__init__(checked_parameters("params", params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters. Raises as the constructor does; the group is then not added."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group: got {shown(param_group)}, expected a dict with params")
        params = param_group["params"]
        if not isinstance(params, Tensor):
            params = checked_parameters("param_group['params']", params)
        super().add_param_group({**param_group, "params": params})
        try:
            check_group(self.param_groups[-1])
        except (TypeError, ValueError, ImportError, backends.BackendError):
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the blocks that are touched. A parameter whose `grad` is None is left out.

        Args:
            closure: a function that evaluates the model again, and returns the loss.

        Raises:
            RuntimeError: sparse gradients.
            ImportError: moments are codes, and there is no package torchao.
            ValueError: a group's `block_dim`, or a parameter's shape, has changed since its first step, or its shape
                since its gradient was computed.
            gradroute.BackendError: as the constructor raises it, where parameters have moved since.
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"closure: got {shown(closure)}, expected a function or None")
            with torch.enable_grad():
                loss = closure()
        gradients = self._gradients()
        backends_of: dict[tuple[torch.device, torch.dtype], str] = {}
        for kind in {(g.local.device, g.parameter.dtype) for g in gradients if g.group["fused"]}:
            backends_of[kind] = fused_backend(*kind)  # raises before anything is counted
        alike: dict[tuple[Any, ...], list[Update]] = {}
        for index, (gradient, touched) in enumerate(zip(gradients, touched_blocks(gradients), strict=True)):
            update = self._update_of(gradient, touched)
            parameter = update.parameter
            key = gradient.number, parameter.device, parameter.dtype, update.moment_dtype(), update.way()
            # Quantised moments are copied in fp32, and so one parameter's at a time.
            alike.setdefault((*key, index if update.quantised else None), []).append(update)
        for (_, device, dtype, _, way, _), updates in alike.items():
            corrections = Corrections.of(updates)
            if way == "loop":
                for update, factors in zip(updates, Factors.of(updates, corrections), strict=True):
                    update.apply(factors)
            else:
                backend = backends_of[device, dtype] if way == "kernel" else "torch"
                step_by_primitive(updates, corrections, backend)
        return loss

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Scales all gradients to a norm of at most `max_norm`: g ← g min(1, max_norm / (norm + 1e-6)).

        It does what `torch.nn.utils.clip_grad_norm_` does, with two differences. Where the norm is NaN, gradients of
        blocks that are not touched stay 0; 0 times NaN would touch them. And ordinary gradients may stand beside
        DTensors, and DTensors of several meshes side by side, as under `gradroute.models.tensor_parallel`.

        Args:
            max_norm: the largest norm allowed.
            norm_type: the p of the p-norm; `math.inf` takes the largest entry.
            error_if_nonfinite: raise where the norm is infinite or NaN, which waits for the device.

        Returns:
            The norm of all gradients before they were scaled, a tensor without dimensions.

        Raises:
            RuntimeError: sparse gradients; a norm that is not finite, if `error_if_nonfinite`.
        """
        _check_norm("max_norm", max_norm)
        _check_norm("norm_type", norm_type, above=True)
        check_bool("error_if_nonfinite", error_if_nonfinite)
        gradients = self._gradients()
        norm = total_norm(gradients, float(norm_type))
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"error_if_nonfinite: got gradients of norm {float(norm)} (norm_type={norm_type}), expected a finite "
                "one"
            )
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient, touched in zip(gradients, touched_blocks(gradients), strict=True):
            touched = touched.view(block_shape(gradient.local.shape, gradient.group["block_dim"]))
            factor = torch.where(touched, scale.to(touched.device), 1.0)
            gradient.local.mul_(factor.to(factor_dtype(gradient.local)))
        return norm

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for options in (
            self.defaults,
            *self.param_groups,
        ):  # copies from before these options existed lack them
            options.setdefault("fused", False)
            options.setdefault("state_dtype", None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state of this class or of `torch.optim.AdamW`, whose step count becomes that of every block.

        Moments are converted to the `state_dtype` of this optimizer. Codes of "8bit" are copied bit for bit if this
        optimizer stores such codes for the same elements. The states of torchao's `AdamW8bit` are taken over too.

        Raises:
            ImportError: codes have to be converted, and there is no package torchao.
            ValueError: step counts that are not those of a parameter's blocks, or moments of another shape; the state
                of an Adam that adds weight decay to the gradient; groups that do not fit; codes that are sharded
                otherwise than their parameter. Nothing is then taken over.
        """
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise TypeError(f"state_dict: got {shown(state_dict)}, expected a dict of state and param_groups")
        saved = state_dict["param_groups"]
        adopted = [adopt_group(theirs, own) for theirs, own in zip(saved, self.param_groups, strict=False)]
        for theirs, own in zip(adopted, self.param_groups, strict=False):
            # torch's load_state_dict refuses another number of groups or parameters, before it takes anything over.
            for index, parameter in zip(theirs["params"], own["params"], strict=False):
                check_state(parameter, theirs["block_dim"], state_dict["state"].get(index, {}))
        rest = dict(state_dict["state"])  # torch's load_state_dict would round to the parameter's dtype
        moments: dict[Any, dict[str, Tensor]] = {}
        for theirs, own in zip(adopted, self.param_groups, strict=False):
            for index, parameter in zip(theirs["params"], own["params"], strict=False):
                of_parameter = rest.get(index, {})
                converted = loaded_moments(parameter, theirs, of_parameter)
                if converted is not None:
                    moments[index] = converted
                    names = {name + end for name in MOMENTS for end in ("", CODES, SCALES)}
                    rest[index] = {key: value for key, value in of_parameter.items() if key not in names}
        groups = adopted + saved[len(adopted) :]
        super().load_state_dict({**state_dict, "state": rest, "param_groups": groups})
        for theirs, group in zip(adopted, self.param_groups, strict=True):
            for index, parameter in zip(theirs["params"], group["params"], strict=True):
                state = self.state.get(parameter, {})
                if "step" in state:
                    state["step"] = loaded_steps(parameter, group["block_dim"], state["step"])
                state.update(moments.get(index, {}))

    def _gradients(self) -> list[Gradient]:
        """The gradient of every parameter that has one."""
        return [
            Gradient.of(number, group, parameter)
            for number, group in enumerate(self.param_groups)
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _update_of(self, gradient: Gradient, touched: Tensor) -> Update:
        """The update of a parameter. Makes the parameter's state where there is none."""
        group, parameter = gradient.group, gradient.parameter
        own = local_part(parameter)
        shape = own.shape
        if gradient.local.shape != shape:  # the parameter's data have been replaced since backward
            raise ValueError(
                f"params: got a parameter of shape {list(shape)} whose gradient is of shape "
                f"{list(gradient.local.shape)}, expected the parameter's"
            )
        state = self.state[parameter]
        if not state:
            state["step"] = new_steps(parameter, group["block_dim"])
            state.update(new_moments(parameter, group))
        local = state
        if is_distributed(parameter):
            local = {name: local_part(value) for name, value in state.items()}
        names = MOMENTS[: 3 if group["amsgrad"] else 2]
        if is_quantised(state):
            if not torch.compiler.is_compiling():  # an unpickled optimizer may be the first that needs it
                require_torchao()
            names = tuple(name + CODES for name in names)
        moments = [local[name] for name in names]
        if local["step"].shape != block_shape(shape, group["block_dim"]):
            raise ValueError(
                f"block_dim: got {group['block_dim']} for a parameter of shape {list(parameter.shape)} whose steps "
                f"are counted in blocks of shape {list(state['step'].shape)}, expected it not to change"
            )
        for name, moment in zip(names, moments, strict=True):
            if moment.shape != shape:
                raise ValueError(
                    f"params: got a parameter of shape {list(parameter.shape)} whose {name} is of shape "
                    f"{list(state[name].shape)}, expected it not to change"
                )
        quantised: list[Quantised] = []
        if is_quantised(state):
            quantised = [Quantised.of(state, name.removesuffix(CODES)) for name in names]
            moments = []
        return Update(
            group, own, gradient.local, gradient.division, local["step"], moments, touched, state, quantised
        )


def _check_norm(name: str, value: Any, above: bool = False) -> None:
    """Raises unless a number is 0 or more, or above 0; infinity is one."""
    expected = "a number above 0" if above else "a number of 0 or more"
    if isinstance(value, Tensor):
        return
    if not is_number(value):
        raise TypeError(f"{name}: got {shown(value)}, expected {expected}")
    if not value >= 0 or (above and value == 0):
        raise ValueError(f"{name}: got {value}, expected {expected}")
