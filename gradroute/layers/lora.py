"""PEFT's LoRA around a linear layer or an embedding that is routed. PEFT need not be imported for that.

PEFT puts its module in the place of a RoutedLinear or a RoutedEmbedding, and calls that one with the same arguments:
the layer would mask its own gradients, and the adapter's A and B would learn from every token. So a module of PEFT that
is given a routed layer as its `base_layer` becomes, at that moment, of a subclass of its own class that routes A and B
too by the layer's sites, or refuses routes where it is no plain LoRA. Its name, state_dict keys and isinstance checks
stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, SupportsIndex

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..embedding import EmbeddingSites, routed_embedding
from ..linear import LinearSites, routed_linear
from ..route_grad import route_grad
from ..routes import Routes
from ..sites import given
from ..tables import Table
from .embedding import RoutedEmbedding
from .linear import RoutedLinear
from .lora_sites import sites_around
from .module import name_routes, names_of
from .reading import full_name, is_readable

# Modules of PEFT have classes that only PEFT knows.
AnyModule = Any
Argument = Any

_LORA = "peft.tuners.lora.layer"
# The classes of PEFT that add B A x to what the layer within computes: by the module and the name.
_LORA_LINEARS = {
    (_LORA, "Linear"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
}


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's around a layer, of any method."""
    return type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer")


def is_lora(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA around a linear layer, which may be quantised."""
    return (type(module).__module__, type(module).__name__) in _LORA_LINEARS


def lora_linear(
    lora: AnyModule, x: Tensor, routes: Routes, sites: LinearSites, backend: str | None
) -> Tensor:
    """The output of PEFT's LoRA around a linear layer with these sites, as its own forward computes it.

    `output` masks the gradient that arrives, and `input` the one that leaves, once for the base layer and its adapters;
    `update_*` say who may update the base layer, and A and B (`adapter_sites`).

    Raises:
        TypeError: a variant such as DoRA, or hooks on what has to be read.
        RuntimeError: merged adapters.
    """
    _refuse_variants(lora)
    around = sites_around(sites)
    x = _masked(x, routes, sites.input, backend)
    y = _base_output(lora.base_layer, x, routes, around.base, backend)
    dtype = y.dtype
    for name in _active(lora, lora.lora_A):
        lora_a, lora_b = lora.lora_A[name], lora.lora_B[name]
        z = lora.lora_dropout[name](lora._cast_input_dtype(x, lora_a.weight.dtype))
        z = _part(f"lora_A.{name}", lora_a, z, routes, around.a, backend)
        b_sites = _with_bias(around.b, sites) if lora_b.bias is not None else around.b
        y = y + _part(f"lora_B.{name}", lora_b, z, routes, b_sites, backend) * lora.scaling[name]
    return _masked(y.to(dtype), routes, sites.output, backend)


def lora_embedding(
    lora: AnyModule, tokens: Tensor, routes: Routes, sites: EmbeddingSites, backend: str | None
) -> Tensor:
    """The output of PEFT's LoRA around a RoutedEmbedding. Which features a token may update are rows of B."""
    _refuse_variants(lora)
    around = sites_around(sites)
    y = lora.base_layer(tokens, routes=routes, sites=sites)
    dtype = y.dtype
    padding = lora.get_base_layer().padding_idx
    for name in _active(lora, lora.lora_embedding_A):
        a, b = lora.lora_embedding_A[name].T, lora.lora_embedding_B[name]
        z = routed_embedding(tokens, a, routes, around.a, padding, backend=backend)
        y = y + routed_linear(z, b, None, routes, around.b, backend=backend) * lora.scaling[name]
    return y.to(dtype)


def _base_output(
    base: AnyModule, x: Tensor, routes: Routes, sites: LinearSites | None, backend: str | None
) -> Any:
    if isinstance(base, RoutedLinear):
        return base(x) if sites is None else base(x, routes=routes, sites=sites)
    if not any(parameter.requires_grad for parameter in base.parameters()):
        return base(x)  # nobody may update it, and it may be quantised
    return _part("base_layer", base, x, routes, sites, backend)


def _part(
    name: str, linear: AnyModule, x: Tensor, routes: Routes, sites: LinearSites | None, backend: str | None
) -> Tensor:
    if sites is None:
        return linear(x)
    if not is_readable(linear):
        raise TypeError(
            f"{name}: got a {full_name(linear)} with hooks or with parameters of its own kind beside sites that say "
            "who may update it, expected a torch.nn.Linear without, because its parameters are read"
        )
    return routed_linear(x, linear.weight, linear.bias, routes, sites, backend=backend)


def _with_bias(b: LinearSites | None, sites: LinearSites) -> LinearSites | None:
    bias = sites.update_bias
    return b if bias is None else given(LinearSites, **({} if b is None else b.tables), update_bias=bias)


def _refuse_variants(lora: AnyModule) -> None:
    for name, variant in lora.lora_variant.items():
        raise TypeError(
            f"{full_name(lora)}: got {type(variant).__name__} in adapter {name!r} beside routes, expected plain LoRA"
        )
    if lora.merged:
        raise RuntimeError(
            f"{full_name(lora)}: got merged adapters beside routes, expected unmerge_adapter() before training"
        )


def _active(lora: AnyModule, adapters: Mapping[str, object]) -> list[str]:
    return [] if lora.disable_adapters else [name for name in lora.active_adapters if name in adapters]


def _masked(x: Tensor, routes: Routes, table: Table | None, backend: str | None) -> Tensor:
    return x if table is None else route_grad(x, routes, table, backend=backend)


class RoutedAdapter(nn.Module):
    """Any module of PEFT around a routed layer. It is called as it is without routes, or where the layer has no sites.

    Attributes:
        adopted: PEFT's class.
        mixin: the class that routes it.
    """

    adopted: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[RoutedAdapter]]

    def __call__(self, *args: Argument, **kwargs: Argument) -> Argument:
        args, kwargs = name_routes(args, kwargs)
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        x: Tensor,
        *args: Argument,
        routes: Routes | None = None,
        sites: Any = None,
        **kwargs: Argument,
    ) -> Tensor:
        layer: AnyModule = self.get_base_layer()  # type: ignore[operator]
        if sites is None:
            sites = layer.sites
        if routes is None or sites is None:
            return super().forward(x, *args, **kwargs)
        wrong = [name for name, value in kwargs.items() if value is not None]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: got a value beside routes, expected none: a batch has one set of adapters"
            )
        return self._routed(x, routes, sites, layer.backend)

    def _routed(self, x: Tensor, routes: Routes, sites: Any, backend: str | None) -> Tensor:
        layer: AnyModule = self.get_base_layer()  # type: ignore[operator]
        raise TypeError(
            f"{full_name(self)}: got routes for an adapter around a {type(layer).__name__}, expected PEFT's plain "
            "LoRA: nothing else of it can be routed; call it without routes, or set the layer's sites to None"
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # The class is made at run time, so it cannot be pickled by its name.
        if "mixin" not in type(self).__dict__:
            return super().__reduce_ex__(protocol)
        state = vars(self).copy()
        state.pop("_compiled_call_impl", None)  # as torch.nn.Module does: it is bound to this very instance
        return _empty, (self.mixin, self.adopted), state


class RoutedLoRALinear(RoutedAdapter):
    """PEFT's LoRA around a RoutedLinear."""

    def _routed(self, x: Tensor, routes: Routes, sites: LinearSites, backend: str | None) -> Tensor:
        return lora_linear(self, x, routes, sites, backend)


class RoutedLoRAEmbedding(RoutedAdapter):
    """PEFT's LoRA around a RoutedEmbedding."""

    def _routed(self, x: Tensor, routes: Routes, sites: EmbeddingSites, backend: str | None) -> Tensor:
        return lora_embedding(self, x, routes, sites, backend)


_MIXINS: dict[tuple[str, str], type[RoutedAdapter]] = {
    (_LORA, "Linear"): RoutedLoRALinear,
    (_LORA, "Embedding"): RoutedLoRAEmbedding,
}
_CLASSES: dict[tuple[type[RoutedAdapter], type[nn.Module]], type[nn.Module]] = {}


def _class_of(mixin: type[RoutedAdapter], original: type[nn.Module]) -> type[nn.Module]:
    if (mixin, original) not in _CLASSES:
        made = type(
            original.__name__, (mixin, original), names_of(original) | {"adopted": original, "mixin": mixin}
        )
        _CLASSES[mixin, original] = made
    return _CLASSES[mixin, original]


def _empty(mixin: type[RoutedAdapter], original: type[nn.Module]) -> nn.Module:
    made = _class_of(mixin, original)
    return made.__new__(made)


def _adopt(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Routes a module of PEFT from the moment on that it has a routed layer as its base layer."""
    if name != "base_layer" or not isinstance(submodule, (RoutedLinear, RoutedEmbedding)):
        return
    kind = type(module)
    if kind.__module__.startswith("peft.tuners.") and not isinstance(module, RoutedAdapter):
        module.__class__ = _class_of(_MIXINS.get((kind.__module__, kind.__name__), RoutedAdapter), kind)


register_module_module_registration_hook(_adopt)
