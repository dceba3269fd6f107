"""The experts of a mixture, routed in place: transformers' batched experts, whose grouped products stay theirs.

A token visits several experts, so it has a row for each, and the rows are sorted by expert. Masks are applied in that
order: a row's route is that of its token, and where tables differ from expert to expert the pair of route and expert
stands for a route. Nothing is counted on the host, and no mask is made.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import activations
from ..gated_mlp import routed_glu
from ..layers.reading import is_watched
from ..linear import LinearSites, routed_linear
from ..reference import masked_by
from ..route_grad import route_grad
from ..routes import Routes
from ..tables import Table
from .computed import unknown_forward
from .dtensors import replicated, whole
from .grouped_experts import INTEGRATION, GroupedProducts, WeightedFunction, primitives_for
from .modules import AnyModule, refuse_dtensors, refuse_special
from .moe_sites import ExpertOps, Experts, MoESites, base_differs, check, ops_of
from .swapped import Swapped

#: The implementations of experts that have a routed form.
IMPLEMENTATIONS = ("eager", "grouped_mm")

# The attributes that transformers' `use_experts_implementation` leaves on experts.
_FORM = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts", "_apply_gate")


class BatchedExperts(Swapped):
    """Experts whose weights are one parameter each, `gate_up_proj` and `down_proj` (transformers 5).

    With routes it computes what the model's implementation of experts does, "grouped_mm" or "eager", bit for bit where
    no `forward` table masks.
    """

    sites_type = MoESites
    _op_sites: tuple[Any, ...]  # ExpertOps, or () without sites
    _by_expert: bool
    _needs_same_base: bool

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        missing = [name for name in (*_FORM, "gate_up_proj", "down_proj") if not hasattr(module, name)]
        if missing:
            raise TypeError(
                f"got a {type(module).__name__} without {', '.join(missing)}, expected transformers' batched experts"
            )
        form: AnyModule = module
        if not form.has_gate or getattr(form, "has_post_expert_norm", False):
            raise TypeError(
                f"got a {type(module).__name__} without gates or with norms inside, expected gated experts"
            )
        refuse_special(module)

    @classmethod
    def extents_of(cls, module: AnyModule, chosen: int = 1) -> Experts:
        """The extents of experts that this mixin can route or has routed; `chosen` as in Experts."""
        count, *shape = module.down_proj.shape
        units, d_model = shape if module.is_transposed else reversed(shape)
        return Experts(count, units, d_model, chosen, module.has_bias)

    def _sites_of_ops(self, sites: MoESites) -> ExpertOps:
        extents = self.extents_of(self)
        check(sites, extents)
        ops, self._by_expert = ops_of(sites, extents, not self.is_concatenated)
        self._needs_same_base = self._by_expert and base_differs(ops, extents.count)
        return ops

    def forward_table(self) -> Table | None:
        """What tokens of each route see: of every expert its hidden units, then itself, `[R, E * (d_expert + 1)]`."""
        sites = None if self._sites is None else self._sites.effective
        if sites is None or (sites.forward is None and sites.forward_experts is None):
            return None
        extents, num_routes = self.extents_of(self), next(iter(sites.tables.values())).num_routes
        one = torch.ones(num_routes, 1, 1, dtype=torch.float32, device="cpu")
        units, each = one, one
        if sites.forward is not None:
            units = sites.forward.weights
            is_alike = units.shape[1] in (1, extents.units)
            units = units[:, None] if is_alike else units.view(num_routes, extents.count, -1)
        if sites.forward_experts is not None:
            each = sites.forward_experts.weights[..., None]
        shape = (num_routes, extents.count)
        seen = (units * each).expand(*shape, extents.units)
        return Table(torch.cat((seen, each.expand(*shape, 1)), dim=2).flatten(1))

    @torch.no_grad()
    def scale_features(self, weights: Tensor) -> None:
        """Scales what the experts add by weights as those of `forward_table`; what makes units of 0 becomes 0."""
        units, seen = self._seen(weights)
        made = (units != 0).to(units.dtype)
        made = torch.cat((made, made), 1) if self.is_concatenated else made.repeat_interleave(2, dim=1)
        scales = {
            "gate_up_proj": made[:, None] if self.is_transposed else made[:, :, None],
            "down_proj": units[:, :, None] if self.is_transposed else units[:, None],
        }
        if self.has_bias:
            scales |= {"gate_up_proj_bias": made, "down_proj_bias": seen}
        for name, values in scales.items():
            parameter = getattr(self, name)
            parameter.mul_(replicated(values, parameter))

    def adds(self, weights: Tensor) -> bool:
        """Whether such weights would change what the experts add."""
        units, seen = self._seen(weights)
        down = whole(self.down_proj)
        is_same = torch.equal(down * (units[:, :, None] if self.is_transposed else units[:, None]), down)
        if is_same and self.has_bias:
            bias = whole(self.down_proj_bias)
            is_same = torch.equal(bias * seen, bias)
        return not is_same

    def _seen(self, weights: Tensor) -> tuple[Tensor, Tensor]:  # [E, d_expert], [E, 1]
        by_expert = weights.view(self.num_experts, -1).to(self.down_proj)
        return by_expert[:, :-1], by_expert[:, -1:]

    def forward(
        self, hidden_states: Tensor, *args: Tensor, routes: Routes | None = None, **kwargs: Tensor
    ) -> Tensor:
        if routes is None or not any(self._op_sites):
            return super().forward(hidden_states, *args, **kwargs)
        index, weights = (*args, *kwargs.values())  # a mixture hands both on by position
        refuse_dtensors(self)
        self._refuse_strength(routes)
        routes = routes.reshape(-1)
        if self._implementation() == "eager":
            return self._one_by_one(hidden_states, index, weights, routes)
        return self._grouped(hidden_states, index, weights, routes)

    def _implementation(self) -> str:
        """The model's implementation of experts; raises where it has no routed form."""
        name = self.config._experts_implementation or "eager"
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"experts_implementation: got {name!r} beside routes, expected one of {', '.join(IMPLEMENTATIONS)}: "
                "model.set_experts_implementation('grouped_mm')"
            )
        if self._is_expert_parallel:
            raise ValueError(
                f"{type(self).__name__}: got experts that expert parallelism has shared out, expected all of them on "
                "every rank beside routes"
            )
        return name

    def _refuse_strength(self, routes: Routes) -> None:
        if routes.strength is not None and self._needs_same_base:
            raise ValueError(
                "route_strength: got one beside MoESites whose weights of route 0 differ from expert to expert, "
                "expected the same for all experts there: strength interpolates from route 0"
            )

    def _rows(self, routes: Routes, tokens: Tensor, experts: Tensor) -> Routes:
        """The routes of rows: of their tokens, or of their tokens and experts."""
        if not self._by_expert:
            return routes._at(tokens)
        return routes._crossed(tokens, experts, self.num_experts)

    def _grouped(self, x: Tensor, index: Tensor, weights: Tensor, routes: Routes) -> Tensor:
        """transformers' grouped_mm_experts_forward, with its operations in its order, so with its bits.

        Args:
            x: `[T, d_model]`.
            index: `[T, k]`, the experts of each token.
            weights: `[T, k]`, the router's weights of them.
            routes: of the tokens `[T]`.
        """
        chosen = index.size(-1)
        experts, order = torch.sort(index.reshape(-1))  # [T * k]
        counted = experts.float() if x.device.type in ("cpu", "mps") else experts.int()
        counts = torch.histc(counted, bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        tokens = order // chosen
        rows = self._rows(routes, tokens, experts)
        product = GroupedProducts(ends, rows, self.is_transposed, self.backend)
        a = product.linear(x[tokens], self.gate_up_proj, self._op_sites[0])
        a = self._with_bias(a, "gate_up_proj_bias", experts, rows)
        y = product.linear(self._hidden(a, rows), self.down_proj, self._op_sites[2])
        y = self._with_bias(y, "down_proj_bias", experts, rows)
        y = self._weighted(y, weights.reshape(-1)[order], rows)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0), device=x.device)
        return y[inverse].view(x.size(0), chosen, x.size(-1)).sum(dim=1).to(x.dtype)

    def _one_by_one(self, x: Tensor, index: Tensor, weights: Tensor, routes: Routes) -> Tensor:
        """The loop over experts of the ordinary forward, which reads on the host who is visited; see `_grouped`."""
        out = torch.zeros_like(x)
        visited = F.one_hot(index, num_classes=self.num_experts).permute(2, 1, 0)  # [E, k, T]
        for expert in torch.greater(visited.sum(dim=(-1, -2)), 0).nonzero()[:, 0]:
            place, tokens = torch.where(visited[expert])
            experts = expert.expand_as(tokens)
            rows = self._rows(routes, tokens, experts)
            a = self._one(x[tokens], self.gate_up_proj[expert], rows, self._op_sites[0])
            a = self._with_bias(a, "gate_up_proj_bias", experts, rows)
            y = self._one(self._hidden(a, rows), self.down_proj[expert], rows, self._op_sites[2])
            y = self._with_bias(y, "down_proj_bias", experts, rows)
            y = self._weighted(y, weights[tokens, place], rows)
            out.index_add_(0, tokens, y.to(out.dtype))
        return out

    def _one(self, x: Tensor, weight: Tensor, rows: Routes, sites: LinearSites | None) -> Tensor:
        """A linear layer of one expert."""
        matrix = weight.t() if self.is_transposed else weight
        return routed_linear(x, matrix, None, rows, sites, backend=self.backend)

    def _with_bias(self, y: Tensor, name: str, experts: Tensor, rows: Routes) -> Tensor:
        """y and each row's bias of its expert, into y."""
        if not self.has_bias:
            return y
        bias = getattr(self, name)[experts]  # [n, O]
        site = "update_input_bias" if name == "gate_up_proj_bias" else "update_output_bias"
        return y + route_grad(bias, rows, self._row_table(site), backend=self.backend)

    def _row_table(self, site: str) -> Table | None:
        sites = self._op_sites[3]
        return None if sites is None else getattr(sites.effective, site)

    def _hidden(self, a: Tensor, rows: Routes) -> Tensor:
        """The hidden units of rows: [n, 2 * d_expert] → [n, d_expert]."""
        sites = self._op_sites[1]
        if sites is None:
            return self._apply_gate(a)
        activation = self._activation()
        if activation is not None:
            gate, up = a.chunk(2, dim=-1)
            return routed_glu(gate, up, rows, sites, activation, backend=self.backend)
        tables = sites.effective
        z = self._apply_gate(self._masked(a, self._row_table("pre"), rows))
        z = self._masked(z, tables.hidden, rows)
        return z if tables.forward is None else masked_by(rows)(tables.forward, z)

    def _activation(self) -> str | None:
        """The activation between gate and up, where the experts have the usual gate and nothing watches it."""
        usual = sys.modules[INTEGRATION]._default_apply_gate
        if getattr(type(self).original, "_apply_gate", None) is not usual or not self.is_concatenated:
            return None
        is_compiling = torch.compiler.is_compiling()
        if is_watched(self.act_fn) or (not is_compiling and unknown_forward(type(self.act_fn)) is not None):
            return None
        return activations.name_of_module(self.act_fn)

    def _masked(self, x: Tensor, table: Table | None, rows: Routes) -> Tensor:
        return route_grad(x, rows, table, backend=self.backend)

    def _weighted(self, y: Tensor, weights: Tensor, rows: Routes) -> Tensor:
        """Each row times the router's weight of it."""
        seen, taught = self._row_table("forward_experts"), self._row_table("experts")
        if seen is not None:
            weights = masked_by(rows)(seen, weights[:, None])[:, 0]
        if taught is None:
            return y * weights.unsqueeze(-1)
        return WeightedFunction.apply(y, weights, rows, taught, primitives_for(y, self.backend))
