"""The rivals of a routed op: the idioms that are published, in eager PyTorch and compiled, and peers.

The idioms come from the formula by which `gradroute.testing` states an op in plain PyTorch, so they mask what the op
masks. Their dense masks are made beforehand, outside of what is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradroute.testing import OPS, Marks, Sample

from . import memory
from .op_table import OPS as OP_TABLE
from .op_table import SHORTHANDS

Forward = Callable[..., Tensor]  # (**tensors) → the op's output, differentiable


class DenseMasks(Marks):
    """Marks whose dense masks, `[*tokens, features]`, are made beforehand.

    Activations are masked by `m*x + (1-m)*x.detach()`, or with `hooks` by a hook on their gradient; a parameter that
    some tokens may not update gets a second product, which adds zero and has the gradient of those that may.

    Args:
        call: the call to compute.
        dtype: that of the activations' masks.
        hooks: whether activations have hooks.
    """

    def __init__(self, call: Sample, dtype: torch.dtype, hooks: bool = False) -> None:
        super().__init__(call.routes, call.tables)
        self.hooks = hooks
        assert call.routes is not None
        tokens = torch.Size(call.routes.shape)
        # The parent's method by its full name, because this class's `mask` returns what is made here.
        # Masks of a parameter's gradient multiply operands of a product, which must have one dtype.
        own = call.upstream.dtype
        self.masks = {
            site: Marks.mask(self, table, own if site.startswith("update") else dtype, tokens)
            for site, table in call.tables.items()
        }

    def table(self, site: str, shorthand: str | None = None) -> Any:
        """The mask of a site, in place of its table."""
        found = self.masks.get(site)
        return self.masks.get(shorthand) if found is None and shorthand else found

    def mask(self, table: Tensor, dtype: torch.dtype, tokens: torch.Size) -> Tensor:
        return table

    def detached(self, m: Tensor, x: Tensor) -> Tensor:
        if not self.hooks:
            return (m * x + (1 - m) * x.detach()).to(x.dtype)
        y = x.expand(
            torch.broadcast_shapes(m.shape, x.shape)
        )  # a tensor of its own, which has the mask's length
        if y.requires_grad:
            y.register_hook(lambda g: (m * g).to(g.dtype))
        return y


def unmasked(call: Sample) -> Forward:
    """Eager PyTorch without routing: the floor."""
    ordinary = call.with_routes(None)
    return lambda **tensors: ordinary.call_plain(tensors)


def detach(call: Sample, dtype: torch.dtype) -> Forward:
    """The published idiom, its masks in a dtype."""
    return _marked(call, DenseMasks(call, dtype))


def hook(call: Sample) -> Forward:
    """A tensor hook that multiplies the gradient with a dense mask; parameters are masked as in the idiom."""
    return _marked(call, DenseMasks(call, call.upstream.dtype, hooks=True))


def _marked(call: Sample, marks: Marks) -> Forward:
    formula, keywords = OPS[call.op].formula, call.keywords
    return lambda **tensors: formula(marks, **tensors, **keywords)


#: The outputs and the activations' gradients by route, and the sums of the parameters' gradients.
Gradients = tuple[list[Tensor], list[dict[str, Tensor]], dict[str, Tensor]]


class HomogeneousSteps:
    """The way that SGTM's code trains: one label a step, and a parameter's gradient is masked as a whole.

    Tokens are split by route before anything is timed, as a data loader would do it; what is timed is a forward and a
    backward for every route, the masking of its parameters' gradients, and their sum.

    Args:
        call: the call to compute; its routes have no strength.
    """

    def __init__(self, call: Sample) -> None:
        assert call.routes is not None
        self.call = call
        ids = call.routes.ids
        self.indices = [(ids == route).nonzero().squeeze(-1) for route in range(call.routes.num_routes)]
        self.routes = [route for route, index in enumerate(self.indices) if len(index)]
        self.formulas = {route: self._formula(route) for route in self.routes}
        self.masks = {
            route: {name: self._mask(name, route) for name in OP_TABLE[call.op].updates}
            for route in self.routes
        }

    def step(self, tensors: dict[str, Tensor | None], upstream: Tensor) -> Callable[[], Gradients]:
        """A step → the outputs and the activations' gradients by route, and the sums of the parameters' gradients."""
        activations = OPS[self.call.op].activations
        parts = {route: self._leaves(route, tensors, activations) for route in self.routes}
        upstreams = {route: upstream.flatten(0, -2)[self.indices[route]] for route in self.routes}

        def run() -> Gradients:
            outputs, of_tokens = [], []
            of_parameters: dict[str, Tensor] = {}
            for route, leaves in parts.items():
                wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
                output = self.formulas[route](**leaves)
                found = torch.autograd.grad(output, tuple(wanted.values()), upstreams[route])
                gradients = dict(zip(wanted, found, strict=True))
                outputs.append(output)
                of_tokens.append({name: gradients.pop(name) for name in activations})
                self._add(route, gradients, of_parameters)
            return outputs, of_tokens, of_parameters

        return run

    def saved_bytes(self, tensors: dict[str, Tensor | None]) -> int:
        """Bytes that autograd keeps for the largest step, parameters aside: each is done before the next begins."""
        activations = OPS[self.call.op].activations
        sizes = []
        for route in self.routes:
            leaves = self._leaves(route, tensors, activations)
            parameters = [
                leaf for name, leaf in leaves.items() if leaf is not None and name not in activations
            ]
            sizes.append(memory.saved(partial(self.formulas[route], **leaves), parameters))
        return max(sizes)

    def together(self, found: Gradients) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and the gradients of the whole call, from those of a step."""
        outputs, of_tokens, gradients = found
        names = of_tokens[0]
        whole = {name: self._in_order([one[name] for one in of_tokens]) for name in names} | gradients
        return self._in_order(outputs), whole

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        index, sorted_by_route = torch.cat([self.indices[r] for r in self.routes]), torch.cat(parts).detach()
        return torch.empty_like(sorted_by_route).index_copy_(0, index, sorted_by_route)

    def _add(self, route: int, gradients: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            for mask in self.masks[route][name]:
                gradient.mul_(mask)
            sums[name] = sums[name].add_(gradient) if name in sums else gradient

    def _leaves(self, route: int, tensors: dict[str, Tensor | None], activations: tuple[str, ...]) -> Any:
        index = self.indices[route]
        return {
            name: tensor
            if tensor is None
            else (
                tensor.detach().flatten(0, -2)[index] if name in activations else tensor.detach()
            ).requires_grad_()
            for name, tensor in tensors.items()
        }

    def _formula(self, route: int) -> Forward:
        """The op on one route's tokens, whose activations are masked by the idiom with one row of the table."""
        call = self.call
        ordinary = {site: table for site, table in call.tables.items() if not site.startswith("update")}
        index = self.indices[route]
        part = call.of_tokens(index[:1]).with_sites(OPS[call.op].sites_class()(**ordinary))
        return _marked(call, DenseMasks(part, call.upstream.dtype))

    def _mask(self, parameter: str, route: int) -> list[Tensor]:
        """The factors of a parameter's gradient that are not one everywhere."""
        sites, tables, factors = OP_TABLE[self.call.op].updates[parameter], self.call.tables, []
        tensor = self.call.tensors[parameter]
        is_matrix = tensor is not None and tensor.dim() == 2
        for dimension, site in enumerate(sites):
            table = tables.get(site, tables.get(SHORTHANDS.get(site, "")))
            if table is None or bool((table.weights[route] == 1).all()):
                continue
            row = table.weights[route].to(self.call.upstream)
            factors.append(row.unsqueeze(-1) if dimension == 0 and is_matrix else row)
        return factors


LIGER_MISSING = None if importlib.util.find_spec("liger_kernel") else "liger_kernel is not installed"


def has_liger(call: Sample) -> bool:
    """Whether Liger-Kernel has the op; its gated activation alone is left out, for it writes over shared inputs."""
    return call.op in _LIGER and call.keywords.get("activation", "silu") == "silu"


def liger(call: Sample) -> Forward:
    """Liger-Kernel's op in place of eager PyTorch's, without routing."""
    return _LIGER[call.op]()


def _liger_op(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply


def _liger_gated_mlp() -> Forward:
    def forward(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, **biases: Tensor | None) -> Tensor:
        gate = F.linear(x, w_gate, biases.get("b_gate"))
        up = F.linear(x, w_up, biases.get("b_up"))
        middle = _liger_op("swiglu", "LigerSiLUMulFunction")(gate, up)
        return F.linear(middle, w_down, biases.get("b_down"))

    return forward


def _liger_rms_norm() -> Forward:
    return lambda x, weight: _liger_op("rms_norm", "LigerRMSNormFunction")(
        x, weight, 1e-6, 0.0, "llama", False
    )


def _liger_layer_norm() -> Forward:
    zeros: dict[torch.Size, Tensor] = {}  # Liger's function needs a bias

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            bias = zeros.setdefault(weight.shape, torch.zeros_like(weight))
        return _liger_op("layer_norm", "LigerLayerNormFunction")(x, weight, bias, 1e-5)

    return forward


_LIGER: dict[str, Callable[[], Forward]] = {
    "routed_gated_mlp": _liger_gated_mlp,
    "routed_rms_norm": _liger_rms_norm,
    "routed_layer_norm": _liger_layer_norm,
}


def compiled(forward: Forward) -> Forward:
    """A forward under torch.compile whose backward can be run again, which timing it alone needs."""
    import torch._functorch.config as functorch

    functorch.donated_buffer = False
    return torch.compile(forward, dynamic=False)
