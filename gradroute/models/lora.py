"""PEFT's LoRA around linear layers of a routed model, and the choice of what routes a linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ..layers.lora import is_adapter as is_adapter
from ..layers.lora import is_lora
from ..layers.lora_sites import anything, product
from ..layers.reading import full_name
from ..linear import LinearSites
from ..route_grad import route_grad
from ..routes import Routes
from ..sites import given
from ..tables import Table
from .linear import CalledLinear, Conv1D, Linear, call_linear, is_conv1d
from .modules import AnyModule, Argument, special_parameters
from .swapped import Swapped, swap


class Adapter(Swapped):
    """Any adapter of PEFT around a linear layer: it is called as it is, because nothing of its own can be routed."""

    sites_type = LinearSites
    computes = False

    def _sites_of_ops(self, sites: LinearSites) -> tuple[LinearSites, ...]:
        raise TypeError(
            f"got sites for {full_name(self)}, expected them for layers without it or with plain LoRA"
        )

    def forward(self, x: Tensor, *args: Argument, routes: Routes | None = None, **kwargs: Argument) -> Tensor:
        return super().forward(x, *args, **kwargs)


class AdapterRouting(NamedTuple):
    """The routing of a LoRALinear besides its sites.

    Attributes:
        adapters: the table `[R, 1]` of an adapter by its name; without one, every token may train it.
    """

    adapters: Mapping[str, Table]


class LoRAOps(NamedTuple):
    """The sites of a LoRALinear's own masks, and of its base layer; None: nothing of the base layer is routed."""

    own: LinearSites
    base: LinearSites | None


class LoRALinear(Swapped):
    """PEFT's LoRA around a torch.nn.Linear or a Conv1D of transformers: y = base(x) + Σ scaling B A dropout(x).

    The base layer may be quantised (torchao, bitsandbytes): it is then frozen, and called as it is.

    The linear layer's sites mean this, for every active adapter:

    - `output` masks the gradient that arrives, and `input` the one that leaves, once for the base layer and all its
      adapters together.
    - `update_rows` says which rows of B a token may update: they are the output features, as those of the base weight
      are. A's rows are the rank, which all output features share; a token may update A if its route has a weight other
      than 0 anywhere in `update_rows`, and if so it updates A whole.
    - `update_cols` says which columns of A a token may update: they are the input features. A token may update B if
      its route has a weight other than 0 anywhere in `update_cols`.
    - `update_bias` (default `update_rows`) is for the base layer's bias and for B's (lora_bias).

    A token that may update only some rows therefore still moves, through A, what the adapter adds to the others, by as
    much as B has of them. Where that must not be, give each route an adapter of its own: `RoutingPlan(adapters=...)`,
    whose table `[R, 1]` (1: the route may train this adapter, 0: it may not) multiplies all of the above, for A and for
    B. It masks no gradient that flows on: an adapter that a token may not train still adds to its output, and to the
    gradient of x, what it always does.
    """

    sites_type = LinearSites
    base_layer: AnyModule
    lora_A: Mapping[str, AnyModule]
    lora_B: Mapping[str, AnyModule]
    lora_dropout: Mapping[str, nn.Module]
    lora_variant: Mapping[str, object]
    scaling: Mapping[str, float]
    in_features: int
    out_features: int
    _routing: AdapterRouting | None
    _op_sites: LoRAOps

    @property
    def adapters(self) -> Mapping[str, Table]:
        """The table `[R, 1]` of each adapter that not every route may train."""
        return {} if self._routing is None else self._routing.adapters

    def route_adapters(self, adapters: Mapping[str, Table]) -> None:
        """Restricts adapters to routes, beside what the sites do.

        Raises:
            TypeError: an adapter is not plain LoRA.
        """
        self._routing = AdapterRouting(adapters)
        self.swap_children()

    def _widths(self) -> Mapping[str, int | str]:
        bias = self.base_layer.bias
        if bias is None:
            bias = next((lora_b.bias for lora_b in self.lora_B.values() if lora_b.bias is not None), None)
        return LinearSites.widths(self.in_features, self.out_features, bias)

    def swap_children(self) -> None:
        if not self._is_routed():
            return
        for name, variant in self.lora_variant.items():
            raise TypeError(f"got {type(variant).__name__} in adapter {name!r}, expected plain LoRA")
        if not isinstance(self.base_layer, Swapped):
            swap_linear(self.base_layer, self._base_sites(), self.backend)
            self._check_frozen_base()
        for name, lora_a in self.lora_A.items():
            lora_b = self.lora_B[name]
            sites_a, sites_b = self._adapter_sites(name, lora_b.bias is not None)
            for linear, sites in ((lora_a, sites_a), (lora_b, sites_b)):
                if isinstance(linear, Swapped):
                    linear.sites = sites
                else:
                    swap(linear, Linear, sites, self.backend)

    def _is_routed(self) -> bool:
        """Whether anything of the layer itself is routed; else it is called as it is, whatever its adapters are."""
        return self._sites is not None or any(name in self.adapters for name in self.lora_A)

    def _table(self, site: str) -> Table | None:
        return None if self._sites is None else self._sites.tables.get(site)

    def _sites_of_ops(self, sites: LinearSites) -> LoRAOps:
        sites.check(None, self._widths())
        names = ("update_rows", "update_cols", "update_bias")[: 2 if self.base_layer.bias is None else 3]
        return LoRAOps(sites, given(LinearSites, **{name: sites.tables.get(name) for name in names}))

    def _base_sites(self) -> LinearSites | None:
        return self._op_sites.base if self._op_sites and not _is_quantised(self.base_layer) else None

    def _check_frozen_base(self) -> None:
        """Raises where a token may update a part of a quantised base layer: nothing of it is routed."""
        if self._op_sites and self._op_sites.base is not None and _is_quantised(self.base_layer):
            trained = [name for name, one in self.base_layer.named_parameters() if one.requires_grad]
            if trained:
                raise TypeError(
                    f"{full_name(self.base_layer)}.{trained[0]}: got requires_grad=True beside sites, expected a "
                    "quantised base layer to be frozen"
                )

    def _adapter_sites(self, name: str, has_bias: bool) -> tuple[LinearSites, LinearSites]:
        """The sites of an adapter's A, and those of its B."""
        rows, cols, adapter = self._table("update_rows"), self._table("update_cols"), self.adapters.get(name)
        bias = self._table("update_bias") or rows
        return (
            LinearSites(update_rows=product(anything(rows), adapter), update_cols=cols),
            LinearSites(
                update_rows=rows,
                update_cols=product(anything(cols), adapter),
                update_bias=product(bias, adapter) if has_bias else None,
            ),
        )

    def forward(self, x: Tensor, *args: Argument, routes: Routes | None = None, **kwargs: Argument) -> Tensor:
        if routes is None or not self._is_routed():
            return super().forward(x, *args, **kwargs)
        self._refuse(kwargs)
        x = self._masked("input", x, routes)
        y = call_linear(self.base_layer, x, routes, self._base_sites(), self.backend)
        dtype = y.dtype
        for name in self._active():
            y = y + self._adapted(name, x, routes) * self.scaling[name]
        return self._masked("output", y.to(dtype), routes)

    def _refuse(self, kwargs: Mapping[str, object]) -> None:
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


def _is_quantised(base: nn.Module) -> bool:
    """Whether a base layer is called as it is: by its class, or because of its weight's."""
    made = type(base).original if isinstance(base, Swapped) else type(base)
    return bool(special_parameters(base)) or (made is not nn.Linear and isinstance(base, nn.Linear))


def linear_mixin(module: nn.Module) -> type[Swapped]:
    """The mixin that routes a linear layer; what cannot be routed is refused when it is swapped."""
    if is_adapter(module):
        return LoRALinear if is_lora(module) else Adapter
    if is_conv1d(module):
        return Conv1D
    return Linear if type(module) is nn.Linear else CalledLinear


def swap_linear(module: nn.Module, sites: LinearSites | None, backend: str | None) -> None:
    """Routes a linear layer that a routed module calls; where nothing of it is routed it may be of any class.

    Raises:
        TypeError: something is routed, and it is neither a torch.nn.Linear nor a Conv1D nor PEFT's LoRA of one; or a
            table says who may update a layer that is quantised.
    """
    if sites is not None or is_adapter(module):
        swap(module, linear_mixin(module), sites, backend)


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
    return any(name in adapters for inner in module.modules() for name in adapters_of(inner))


def refuse_unreadable(path: str, linear: nn.Module) -> None:
    """Raises where a linear layer's own parameters are not all that it computes with, or are quantised.

    Those that FSDP2 shards pass: they are ordinary tensors when the layer computes.
    """
    special = special_parameters(linear)
    if special:
        raise TypeError(f"{path}: got {special}, expected ordinary tensors: do this before quantising")
    weight = linear._parameters.get("weight")
    if weight is not None and not weight.is_floating_point():
        raise TypeError(
            f"{path}: got a weight of dtype {weight.dtype}, expected floating point: do this before quantising"
        )
    if is_adapter(linear):
        raise TypeError(
            f"{path}: got adapters, expected a plain linear layer: merge adapters first (merge_and_unload)"
        )
    if hasattr(linear, "sharded_widths"):
        raise TypeError(
            f"{path}: got a tensor-parallel layer, expected a whole one, or shards of fully_shard: do this before "
            "tensor_parallel"
        )
