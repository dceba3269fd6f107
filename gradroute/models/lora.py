"""PEFT's LoRA around linear layers of a routed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import LinearSites
from ..route_grad import route_grad
from ..routes import Routes
from ..sites import given
from ..tables import Table
from .modules import Linear, call_linear, full_name, is_dtensor, swap_linear
from .swapped import Swapped, swap


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's around a layer, of any method. PEFT need not be imported for that."""
    return type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer")


def is_lora(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA around a linear layer that is not quantised."""
    return (type(module).__module__, type(module).__name__) == ("peft.tuners.lora.layer", "Linear")


class Adapter(Swapped):
    """Any adapter of PEFT around a linear layer: it is called as it is, because nothing of its own can be routed."""

    sites_type = LinearSites

    def _sites_of_ops(self, sites: LinearSites) -> tuple[Any, ...]:
        raise TypeError(
            f"got sites for {full_name(self)}, expected them for layers without it or with plain LoRA"
        )

    def forward(self, x: Tensor, *args: Any, routes: Routes | None = None, **kwargs: Any) -> Any:
        return super().forward(x, *args, **kwargs)


class LoRALinear(Swapped):
    """PEFT's LoRA around a torch.nn.Linear or a Conv1D of transformers: y = base(x) + Σ scaling B A dropout(x).

    The linear layer's sites mean this, for every active adapter:

    - `output` masks the gradient that arrives, and `input` the one that leaves, once for the base layer and all its
      adapters together.
    - `update_rows` says which rows of B a token may update: they are the output features, as those of the base weight
      are. A's rows are the rank, which all output features share; a token may update A if its route has a weight other
      than 0 anywhere in `update_rows`, and if so it updates A whole.
    - `update_cols` says which columns of A a token may update: they are the input features. A token may update B if
      its route has a weight other than 0 anywhere in `update_cols`.
    - `update_bias` (default `update_rows`) is for the base layer's bias and for B's (lora_bias).

    So a token that may update only some rows still moves, through A, what the adapter adds to the others, by as much
    as B has of them. Where that must not be, give each route an adapter of its own: `RoutingPlan(adapters=...)`, whose
    table `[R, 1]` (1: the route may train this adapter, 0: it may not) multiplies all of the above, for A and for B.
    It masks no gradient that flows on: an adapter that a token may not train still adds to its output, and to the
    gradient of x, what it always does.

    Attributes:
        adapters: by name the table of an adapter, `[R, 1]`; without one, every token may train it.
    """

    sites_type = LinearSites
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: Any
    scaling: Any
    in_features: int
    out_features: int

    @property
    def adapters(self) -> Mapping[str, Table]:
        """Which routes may train which adapter."""
        return self._routing.get("adapters", {})

    def route_adapters(self, adapters: Mapping[str, Table]) -> None:
        """Restricts adapters to routes, beside what the sites do.

        Raises:
            TypeError: an adapter is not plain LoRA.
        """
        self._routing["adapters"] = adapters
        self.swap_children()

    def _widths(self) -> Mapping[str, int | str]:
        bias = self.base_layer.bias
        if bias is None:
            bias = next((part.bias for part in self.lora_B.values() if part.bias is not None), None)
        return LinearSites.widths(self.in_features, self.out_features, bias)

    def swap_children(self) -> None:
        if not self._is_routed():
            return
        for name, variant in self.lora_variant.items():
            raise TypeError(f"got {type(variant).__name__} in adapter {name!r}, expected plain LoRA")
        if not isinstance(self.base_layer, Swapped):
            swap_linear(self.base_layer, self._base_sites(), self.backend)
        for name, lora_a in self.lora_A.items():
            lora_b = self.lora_B[name]
            sites_a, sites_b = self._adapter_sites(name, lora_b.bias is not None)
            for part, sites in ((lora_a, sites_a), (lora_b, sites_b)):
                if isinstance(part, Swapped):
                    part.sites = sites
                else:
                    swap(part, Linear, sites, self.backend)

    def _is_routed(self) -> bool:
        """Whether anything of the layer itself is; else it is called as it is, whatever its adapters are."""
        return self._sites is not None or any(name in self.adapters for name in self.lora_A)

    def _table(self, site: str) -> Table | None:
        return None if self._sites is None else self._sites.tables.get(site)

    def _sites_of_ops(self, sites: LinearSites) -> tuple[Any, ...]:
        """The layer's own, whose `output` and `input` it masks itself, and those of the base layer."""
        sites.check(None, self._widths())
        of_base = ("update_rows", "update_cols", "update_bias")[: 2 if self.base_layer.bias is None else 3]
        return sites, given(LinearSites, **{name: sites.tables.get(name) for name in of_base})

    def _base_sites(self) -> LinearSites | None:
        return self._op_sites[1] if self._op_sites else None

    def _adapter_sites(self, name: str, has_bias: bool) -> tuple[LinearSites, LinearSites]:
        """Those of an adapter's A and of its B."""
        rows, cols, adapter = self._table("update_rows"), self._table("update_cols"), self.adapters.get(name)
        bias = self._table("update_bias") or rows
        return (
            LinearSites(update_rows=_product(_any(rows), adapter), update_cols=cols),
            LinearSites(
                update_rows=rows,
                update_cols=_product(_any(cols), adapter),
                update_bias=_product(bias, adapter) if has_bias else None,
            ),
        )

    def forward(self, x: Tensor, *args: Any, routes: Routes | None = None, **kwargs: Any) -> Any:
        if routes is None or not self._is_routed():
            return super().forward(x, *args, **kwargs)
        self._refuse(kwargs)
        x = self._masked("input", x, routes)
        y = call_linear(self.base_layer, x, routes, self._base_sites())
        dtype = y.dtype
        for name in self._active():
            y = y + self._adapted(name, x, routes) * self.scaling[name]
        return self._masked("output", y.to(dtype), routes)

    def _refuse(self, kwargs: Mapping[str, Any]) -> None:
        if self.merged:
            raise RuntimeError(
                f"{full_name(self)}: got merged adapters beside routes, expected unmerge_adapter() before training"
            )
        wrong = [name for name, value in kwargs.items() if value is not None]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: got a value beside routes, expected none: a batch has one set of adapters"
            )

    def _active(self) -> list[str]:
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]

    def _adapted(self, name: str, x: Tensor, routes: Routes) -> Tensor:
        lora_a, lora_b = self.lora_A[name], self.lora_B[name]
        if type(lora_a) is nn.Linear or type(lora_b) is nn.Linear:
            raise RuntimeError(
                f"{full_name(self)}: got adapter {name!r}, which was added since the model was routed; expected "
                "route() after that"
            )
        x = self.lora_dropout[name](self._cast_input_dtype(x, lora_a.weight.dtype))
        return lora_b(lora_a(x, routes=routes), routes=routes)

    def _masked(self, site: str, x: Tensor, routes: Routes) -> Tensor:
        table = self._table(site)
        return x if table is None else route_grad(x, routes, table, backend=self.backend)


def route_adapters(model: nn.Module, adapters: Mapping[str, Table]) -> None:
    """Restricts the adapters of a routed model to routes.

    Raises:
        TypeError: an adapter is not plain LoRA, or is not around linear layers of attention, MLPs and the output head.
        ValueError: the model has no adapter of that name.
    """
    present = dict.fromkeys(name for module in model.modules() for name in adapters_of(module))
    unknown = [name for name in adapters if name not in present]
    if unknown:
        names = f"one of {', '.join(map(repr, present))}" if present else "a model with LoRA adapters"
        raise ValueError(f"got {', '.join(map(repr, unknown))}, expected {names}")
    for path, module in model.named_modules():
        if any(name in adapters for name in adapters_of(module)):
            if not isinstance(module, LoRALinear):
                raise TypeError(
                    f"got {full_name(module)} at {path}, expected plain LoRA around linear layers of attention, of "
                    "MLPs or of the output head"
                )
            module.route_adapters(adapters)


def adapters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that one module of PEFT holds."""
    if not type(module).__module__.startswith("peft.tuners."):
        return ()
    holders = (getattr(module, name, None) for name in getattr(module, "adapter_layer_names", ()))
    found = (holder for holder in holders if isinstance(holder, (nn.ModuleDict, nn.ParameterDict)))
    return tuple(dict.fromkeys(name for holder in found for name in holder))


def holds_adapters(module: nn.Module, adapters: Mapping[str, Table]) -> bool:
    """Whether an adapter of one of these names is in a module, at any depth."""
    return any(name in adapters for part in module.modules() for name in adapters_of(part))


def _any(table: Table | None) -> Table | None:  # [R, 1]
    """Which routes may update anything at all."""
    return None if table is None else Table((table.weights != 0).any(dim=1, keepdim=True).to(torch.float32))


def _product(*tables: Table | None) -> Table | None:
    """All of the masks at once; None masks nothing."""
    weights = [table.weights for table in tables if table is not None]
    if not weights:
        return None
    product = weights[0]
    for other in weights[1:]:
        product = product * other
    return Table(product)


def refuse_unreadable(path: str, linear: Any) -> None:
    """Raises where a linear layer's own parameters are not all that it computes with, or are distributed."""
    if is_adapter(linear) or any(map(is_dtensor, linear.parameters(recurse=False))):
        raise TypeError(
            f"{path}: got adapters or sharded parameters, expected a plain linear layer: merge adapters first "
            "(merge_and_unload), and do this before sharding"
        )
