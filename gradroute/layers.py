"""Layers: those of torch.nn with routed gradients. Each is thin and calls its op; `forward(x, routes=None)`.

Parameters and state_dict keys are the ordinary layer's. The sites are a plain attribute: no part of the state_dict,
untouched by `.to(dtype)` and meta devices, and free to be reassigned between steps.

The `from_*` constructors share the very Parameters of an existing layer (and so their device, dtype and
requires_grad) and take over its training mode. Hooks are not copied: what a hook of the existing layer did is not
done by the routed one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .activations import check_activation
from .attention import AttentionSites, routed_attention
from .attention_projections import ProjectionSites, check_sites, widths
from .checks import check_shape, unrouted
from .embedding import EmbeddingSites, routed_embedding
from .gated_mlp import routed_gated_mlp
from .linear import LinearSites, routed_linear
from .mlp import MLPSites, routed_mlp
from .norm import CASTING_MODES, NormSites, routed_layer_norm, routed_rms_norm
from .routes import Routes
from .sites import Sites

if TYPE_CHECKING:
    from typing_extensions import Self


class RoutedModule(nn.Module):
    """What every routed layer does with its sites: checks them once, shows them, copies their tables to its device."""

    sites_type: ClassVar[type[Sites]]
    backend: str | None = None
    _sites: Any = None
    _op_sites: tuple[Any, ...] = ()

    def _widths(self) -> Mapping[str, int | str]:
        """For each site its number of features, or the reason why this layer cannot honour it."""
        raise NotImplementedError

    @property
    def sites(self) -> Any:
        """Where the layer masks, or None. Assigning checks the tables against the layer's widths."""
        return self._sites

    @sites.setter
    def sites(self, sites: Any) -> None:
        unrouted(None, sites, self.sites_type)  # raises where sites are not this layer's
        self._op_sites = () if sites is None else self._sites_of_ops(sites)
        self._sites = sites
        self._copy_tables()

    def _sites_of_ops(self, sites: Any) -> tuple[Any, ...]:
        """What each op of the layer is given, a Sites or None; raises where a table does not fit."""
        sites.check(None, self._widths())
        return (sites,)

    def _copy_tables(self) -> None:
        """Fills the tables' caches for the parameters' devices: traced code cannot, and would copy in every call."""
        devices = {parameter.device for parameter in self.parameters() if not parameter.is_meta}
        for sites in filter(None, self._op_sites):
            for table in sites.effective.tables.values():
                for device in devices:
                    table.on(device)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        module = super()._apply(*args, **kwargs)
        self._copy_tables()
        return module

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._copy_tables()

    def extra_repr(self) -> str:
        backend = "" if self.backend is None else f"backend={self.backend!r}"
        return ", ".join(filter(None, (super().extra_repr(), f"sites={self.sites}", backend)))


def _check_plain(name: str, module: Any, kind: type[nn.Module], instead: str) -> None:
    """Raises unless `module` computes what its type says: routed layers read parameters and call no forward."""
    got = None
    if type(module) is not kind:
        got = f"a {type(module).__name__}"
    elif "forward" in vars(module) or "weight" not in module._parameters:
        got = f"a {kind.__name__} whose forward or weight was replaced"
    if got is not None:
        raise TypeError(
            f"{name}: got {got}, expected a torch.nn.{kind.__name__} itself, because its parameters are read and its "
            f"forward is not called; {instead}"
        )


def _share(layer: Any, source: nn.Module, sites: Any) -> Any:
    """`layer`, with the Parameters of `source` in the place of its own, its training mode, and the sites."""
    for name in layer._parameters:
        setattr(layer, name, getattr(source, name))
    layer.training = source.training
    layer.sites = sites
    return layer


class RoutedLinear(RoutedModule, nn.Linear):
    """torch.nn.Linear with routed gradients: `gradroute.routed_linear`.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.
        sites: where to mask.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: a table does not fit the layer, or `update_bias` without a bias.
    """

    sites_type = LinearSites

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        sites: LinearSites | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.backend = backend
        self.sites = sites

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, sites: LinearSites | None = None, *, backend: str | None = None
    ) -> Self:
        """A routed layer that shares the parameters of `linear`; its hooks are not copied.

        Raises:
            TypeError: `linear` is not a torch.nn.Linear itself but, say, a LoRA or quantised one.
            ValueError: a table does not fit the layer.
        """
        _check_plain("linear", linear, nn.Linear, "call it, and mask around it with gradroute.route_grad")
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, device="meta", backend=backend)
        return _share(layer, linear, sites)

    def _widths(self) -> Mapping[str, int | str]:
        return LinearSites.widths(self.in_features, self.out_features, self.bias)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        return routed_linear(x, self.weight, self.bias, routes, self.sites, backend=self.backend)


# What an MLP's own activation module is called here.
_ACTIVATION_NAMES = {nn.SiLU: "silu", nn.GELU: "gelu", nn.ReLU: "relu"}


class _OfLinears(RoutedModule):
    """A layer of linear submodules, called `names` in the order of the op's weights, that are read and not called."""

    names: tuple[str, ...]

    def _linears(self) -> list[Any]:
        return [getattr(self, name) for name in self.names]

    def _take_linears(self, argument: str, module: nn.Module, names: Sequence[str], instead: str) -> None:
        """Shares the submodules `names` of `module`, which may have no other parameters."""
        if len(names) != len(self.names):
            raise ValueError(
                f"names: got {tuple(names)}, expected {len(self.names)} names, such as {self.names}"
            )
        self.names = tuple(names)
        for name in self.names:
            self.add_module(name, _linear_of(argument, module, name, instead))
        _check_no_other_parameters(argument, module, self.names)
        self.training = module.training


class _RoutedMLPs(_OfLinears):
    """What both MLPs share: sites, activation, and how linear layers fit together."""

    sites_type = MLPSites
    activation: str

    @classmethod
    def from_mlp(
        cls,
        mlp: nn.Module,
        sites: MLPSites | None = None,
        *,
        names: Sequence[str] | None = None,
        activation: str | None = None,
        backend: str | None = None,
    ) -> Self:
        """A routed MLP that shares the linear submodules of `mlp` under their names, and so has its state_dict keys.

        The forward of `mlp` must be that of the op: linear layers and an activation, nothing else. Hooks are not
        copied, and those of the submodules do not run, because the submodules are read and not called.

        Args:
            mlp: the existing module.
            sites: where to mask.
            names: its linear submodules in the order of the op's weights; default: those of this class.
                nanoGPT's MLP has `("c_fc", "c_proj")`.
            activation: its activation; default: that of this class.
            backend: see `gradroute.use_backend`.

        Raises:
            TypeError: a submodule is not a torch.nn.Linear itself but, say, a LoRA or quantised one.
            ValueError: `mlp` has other parameters, dropout, or another activation; a table does not fit.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.activation = cls.activation if activation is None else activation
        layer.backend = backend
        check_activation(layer.activation)
        instead = (
            "call such modules, with gradroute.routed_activation (gated: gradroute.routed_glu) between them"
        )
        layer._take_linears("mlp", mlp, cls.names if names is None else names, instead)
        dropout = "a routed MLP has no dropout; apply it to the output yourself and set p = 0"
        _check_no_dropout("mlp", mlp, dropout)
        _check_activations(mlp, layer.activation)
        layer._check_linears()
        layer.sites = sites
        return layer

    def _check_linears(self) -> None:
        """Raises unless the layers fit together."""
        *inner, outer = self._linears()
        for name, linear in zip(self.names, inner, strict=False):
            if (linear.out_features, linear.in_features) != (outer.in_features, inner[0].in_features):
                raise ValueError(
                    f"names: got {name} of shape {[linear.out_features, linear.in_features]}, "
                    f"expected {[outer.in_features, inner[0].in_features]}: "
                    f"{self.names[-1]} is {[outer.out_features, outer.in_features]}"
                )

    def _widths(self) -> Mapping[str, int | str]:
        outer = self._linears()[-1]
        return MLPSites.widths(outer.out_features, outer.in_features, outer.bias)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, {super().extra_repr()}"


def _linear_of(argument: str, module: nn.Module, name: str, instead: str) -> nn.Linear:
    modules = dict(module.named_children())
    if name not in modules:
        raise ValueError(
            f"names: got {name!r}, expected submodules of {type(module).__name__}: "
            f"{', '.join(modules) or 'it has none'}"
        )
    _check_plain(f"{argument}.{name}", modules[name], nn.Linear, instead)
    return modules[name]  # type: ignore[return-value]


def _check_no_other_parameters(argument: str, module: nn.Module, names: tuple[str, ...]) -> None:
    """Raises where a module visibly computes with more than its named linear layers."""
    keys = (key for key, _ in chain(module.named_parameters(), module.named_buffers()))
    others = [key for key in keys if key.split(".")[0] not in names]
    if others:
        raise ValueError(
            f"{argument}: got parameters or buffers {', '.join(others)}, expected only those of {names}"
        )


def _check_no_dropout(argument: str, module: nn.Module, instead: str) -> None:
    for name, child in module.named_modules():
        if isinstance(child, nn.Dropout) and child.p > 0:
            raise ValueError(f"{argument}.{name}: got dropout with p = {child.p}, expected none: {instead}")


def _check_activations(mlp: nn.Module, activation: str) -> None:
    for name, module in mlp.named_modules():
        known = _ACTIVATION_NAMES.get(type(module))
        if known == "gelu" and module.approximate == "tanh":
            known = "gelu_tanh"
        if known not in (None, activation):
            raise ValueError(f"activation: got {activation!r}, expected {known!r}, which mlp.{name} is")


class RoutedMLP(_RoutedMLPs):
    """Linear, activation, linear, with routed gradients: `gradroute.routed_mlp`. Submodules fc_in and fc_out.

    Args:
        d_model: width of the input and the output.
        d_ff: width of the hidden layer.
        bias: whether the linear layers have a bias.
        device: of the parameters.
        dtype: of the parameters.
        sites: where to mask.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "relu2" (squared ReLU).
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: no such activation, or a table does not fit the layer.
    """

    names = ("fc_in", "fc_out")
    activation = "gelu"

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        sites: MLPSites | None = None,
        activation: str = "gelu",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.backend = backend
        self.fc_in = nn.Linear(d_model, d_ff, bias, device, dtype)
        self.fc_out = nn.Linear(d_ff, d_model, bias, device, dtype)
        self.sites = sites

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        fc_in, fc_out = self._linears()
        return routed_mlp(
            x,
            fc_in.weight,
            fc_in.bias,
            fc_out.weight,
            fc_out.bias,
            routes,
            self.sites,
            self.activation,
            backend=self.backend,
        )


class RoutedGatedMLP(_RoutedMLPs):
    """A gated MLP (SwiGLU, GeGLU) with routed gradients: `gradroute.routed_gated_mlp`.

    Submodules gate_proj, up_proj and down_proj, as in Llama.

    Args:
        d_model: width of the input and the output.
        d_ff: width of the hidden layer.
        sites: where to mask.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "relu2" (squared ReLU).
        bias: whether the linear layers have a bias.
        device: of the parameters.
        dtype: of the parameters.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: no such activation, or a table does not fit the layer.
    """

    names = ("gate_proj", "up_proj", "down_proj")
    activation = "silu"

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        sites: MLPSites | None = None,
        activation: str = "silu",
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.backend = backend
        self.gate_proj = nn.Linear(d_model, d_ff, bias, device, dtype)
        self.up_proj = nn.Linear(d_model, d_ff, bias, device, dtype)
        self.down_proj = nn.Linear(d_ff, d_model, bias, device, dtype)
        self.sites = sites

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        gate, up, down = self._linears()
        return routed_gated_mlp(
            x,
            gate.weight,
            up.weight,
            down.weight,
            routes,
            self.sites,
            self.activation,
            gate.bias,
            up.bias,
            down.bias,
            backend=self.backend,
        )


class _RoutedNorm(RoutedModule):
    """What both norms share: one normalised dimension, with a weight."""

    sites_type = NormSites
    normalized_shape: tuple[int, ...]
    weight: Any

    def _check_affine(self) -> None:
        if self.weight is None:
            raise ValueError(
                "elementwise_affine: got False, expected True: a norm without a weight has nothing to route"
            )
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape: got {self.normalized_shape}, expected one dimension")

    def _widths(self) -> Mapping[str, int | str]:
        return {"update": self.weight.shape[0]}


class RoutedRMSNorm(_RoutedNorm, nn.RMSNorm):
    """torch.nn.RMSNorm, or that of Llama or Gemma, with routed updates: `gradroute.routed_rms_norm`.

    Args:
        normalized_shape: D.
        eps: added to the mean square; None: torch.nn.RMSNorm's own.
        elementwise_affine: must be True.
        device: of the weight.
        dtype: of the weight.
        sites: where to mask.
        offset: added to the weight, which starts at 1 - offset. Gemma's is 1.
        casting_mode: "torch", "llama" or "gemma": whose rounding of intermediates.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: no weight, more than one dimension, no such casting mode, or a table does not fit.
    """

    offset: float = 0.0
    casting_mode: str = "torch"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        sites: NormSites | None = None,
        offset: float = 0.0,
        casting_mode: str = "torch",
        backend: str | None = None,
    ) -> None:
        if casting_mode not in CASTING_MODES:
            raise ValueError(
                f"casting_mode: got {casting_mode!r}, expected one of {', '.join(CASTING_MODES)}"
            )
        self.offset = offset  # reset_parameters, which the constructor calls, reads it
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._check_affine()
        self.casting_mode = casting_mode
        self.backend = backend
        self.sites = sites

    @classmethod
    def from_rms_norm(
        cls,
        norm: nn.Module,
        sites: NormSites | None = None,
        *,
        offset: float = 0.0,
        casting_mode: str | None = None,
        backend: str | None = None,
    ) -> Self:
        """A routed norm that shares the weight of `norm`; its hooks are not copied.

        Args:
            norm: a torch.nn.RMSNorm, or a module with a weight and `variance_epsilon` or `eps`.
            sites: where to mask.
            offset: what its forward adds to the weight. Gemma's is 1.
            casting_mode: whose rounding its forward has: "torch", "llama" (Llama, Mistral, Qwen) or "gemma". Needed
                where it is not a torch.nn.RMSNorm; default there: "torch".
            backend: see `gradroute.use_backend`.

        Raises:
            TypeError: `norm` has no weight of one dimension, has other parameters, or no epsilon.
            ValueError: a casting mode is needed, or there is no such one; a table does not fit.
        """
        kind = type(norm).__name__
        tensors = dict(chain(norm.named_parameters(), norm.named_buffers()))
        weight = tensors.pop("weight", None)
        if weight is None or weight.dim() != 1 or tensors:
            shapes = {name: list(tensor.shape) for name, tensor in norm.state_dict().items()}
            raise TypeError(
                f"norm: got a {kind} of parameters {shapes}, expected a weight [D] and nothing else"
            )
        epsilon = next((name for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
        if epsilon is None:
            raise TypeError(f"norm: got a {kind}, expected a module with variance_epsilon or eps")
        if casting_mode is None:
            if type(norm) is not nn.RMSNorm:
                raise ValueError(
                    f"casting_mode: got None for a {kind}, expected the one whose rounding its forward has: "
                    "'llama', 'gemma' (mostly with offset=1.0) or 'torch'"
                )
            casting_mode = "torch"
        layer = cls(
            weight.shape[0],
            getattr(norm, epsilon),
            device="meta",
            offset=offset,
            casting_mode=casting_mode,
            backend=backend,
        )
        return _share(layer, norm, sites)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        return routed_rms_norm(
            x,
            self.weight,
            routes,
            self.sites,
            self.eps,
            self.offset,
            self.casting_mode,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset={self.offset}, casting_mode={self.casting_mode!r}"


class RoutedLayerNorm(_RoutedNorm, nn.LayerNorm):
    """torch.nn.LayerNorm with routed updates of weight and bias: `gradroute.routed_layer_norm`.

    Args:
        normalized_shape: D.
        eps: added to the variance.
        elementwise_affine: must be True.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.
        sites: where to mask.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: no weight, more than one dimension, or a table does not fit.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        sites: NormSites | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._check_affine()
        self.backend = backend
        self.sites = sites

    @classmethod
    def from_layer_norm(
        cls, norm: nn.LayerNorm, sites: NormSites | None = None, *, backend: str | None = None
    ) -> Self:
        """A routed norm that shares the parameters of `norm`; its hooks are not copied.

        Raises:
            TypeError: `norm` is not a torch.nn.LayerNorm itself.
            ValueError: it has no weight or more than one dimension, or a table does not fit.
        """
        _check_plain("norm", norm, nn.LayerNorm, "call it as it is")
        affine, bias = norm.elementwise_affine, norm.bias is not None
        layer = cls(norm.normalized_shape, norm.eps, affine, bias, device="meta", backend=backend)
        return _share(layer, norm, sites)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        return routed_layer_norm(
            x, self.weight, self.bias, routes, self.sites, self.eps, backend=self.backend
        )


class RoutedEmbedding(RoutedModule, nn.Embedding):
    """torch.nn.Embedding with routed updates: `gradroute.routed_embedding`.

    Args:
        num_embeddings: V, the size of the vocabulary.
        embedding_dim: D.
        padding_idx: the token whose embedding gets no gradient.
        max_norm: must be None.
        norm_type: as in torch.nn.Embedding, and without effect.
        scale_grad_by_freq: must be False.
        sparse: must be False.
        _weight: as in torch.nn.Embedding, whose `from_pretrained` gives it.
        _freeze: likewise.
        device: of the weight.
        dtype: of the weight.
        sites: where to mask.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: an argument that cannot be honoured, or a table does not fit the layer.
    """

    sites_type = EmbeddingSites

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        sites: EmbeddingSites | None = None,
        backend: str | None = None,
    ) -> None:
        check_embedding(max_norm, scale_grad_by_freq, sparse)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            norm_type=norm_type,
            _weight=_weight,
            _freeze=_freeze,
            device=device,
            dtype=dtype,
        )
        self.backend = backend
        self.sites = sites

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, sites: EmbeddingSites | None = None, *, backend: str | None = None
    ) -> Self:
        """A routed layer that shares the weight of `embedding`; its hooks are not copied.

        Raises:
            TypeError: `embedding` is not a torch.nn.Embedding itself but, say, one that scales its output.
            ValueError: it has max_norm, scale_grad_by_freq or sparse, or a table does not fit.
        """
        instead = "call it, and mask its output with gradroute.route_grad"
        _check_plain("embedding", embedding, nn.Embedding, instead)
        check_embedding(embedding.max_norm, embedding.scale_grad_by_freq, embedding.sparse)
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            device="meta",
            backend=backend,
        )
        return _share(layer, embedding, sites)

    def _widths(self) -> Mapping[str, int | str]:
        return {"update": self.embedding_dim}

    def forward(self, tokens: Tensor, routes: Routes | None = None) -> Tensor:
        return routed_embedding(
            tokens, self.weight, routes, self.sites, self.padding_idx, backend=self.backend
        )


def check_embedding(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    """Raises where an embedding's options cannot be honoured."""
    if max_norm is not None:
        raise ValueError(
            f"max_norm: got {max_norm}, expected None: renormalising in forward changes the weight outside any route"
        )
    if scale_grad_by_freq:
        raise ValueError(
            "scale_grad_by_freq: got True, expected False: the frequency would count tokens of every route"
        )
    if sparse:
        raise ValueError("sparse: got True, expected False: routed gradients are dense")


class RoutedAttention(_OfLinears):
    """Self-attention with routed gradients: `gradroute.routed_attention` between four linear layers.

    Submodules q_proj, k_proj, v_proj and o_proj, as in Llama. The update sites route their parameters, as SGTM does
    (arXiv 2512.05648): `update_q` the rows of q_proj, `update_kv` those of k_proj and v_proj, with their biases,
    `update_out` the columns of o_proj, each by head. The other sites mask attention itself (arXiv 2410.04332).

    Args:
        d_model: width of the input and the output.
        heads: H, the number of query heads.
        kv_heads: G, the number of key and value heads, a divisor of H; default: H.
        head_dim: D, the width of a head; default: d_model / H.
        sites: where to mask. Where G < H, `update` needs `update_kv` beside it.
        causal: a query sees no later key.
        window: key j is visible only if i - j < window (and j - i < window when not causal).
        scale: of the scores; default: 1/√D.
        dropout: of the probabilities, in training mode only.
        bias: whether the linear layers have a bias.
        device: of the parameters.
        dtype: of the parameters.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: numbers of heads or features that do not fit together; a table that does not fit the layer,
            `update` without `update_kv` where G < H, or `update_output_bias` without a bias.
    """

    sites_type = AttentionSites
    names = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        sites: AttentionSites | None = None,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        _check_heads(heads, kv_heads)
        self.head_dim = _head_dim(d_model, heads, "d_model") if head_dim is None else head_dim
        if self.head_dim < 1:
            raise ValueError(f"head_dim: got {head_dim}, expected a positive number of features per head")
        self.heads, self.kv_heads = heads, kv_heads
        self.causal, self.window, self.scale, self.dropout = causal, window, scale, dropout
        self.backend = backend
        for name, (outputs, inputs) in zip(self.names, self._shapes(d_model), strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias, device, dtype))
        self.sites = sites

    @classmethod
    def from_projections(
        cls,
        module: nn.Module,
        heads: int,
        kv_heads: int | None = None,
        sites: AttentionSites | None = None,
        *,
        names: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> Self:
        """Routed attention that shares the linear submodules of `module` under their names, and so has its keys.

        The forward of `module` must be that of the layer: four linear layers and attention, nothing else. Hooks are
        not copied, and those of the submodules do not run, because the submodules are read and not called.

        Args:
            module: the existing module.
            heads: H, its number of query heads.
            kv_heads: G, its number of key and value heads; default: H.
            sites: where to mask.
            names: its projections of the query, the key, the value and the output.
            causal: see the constructor, as for the other arguments.
            window: likewise.
            scale: likewise.
            dropout: likewise.
            backend: see `gradroute.use_backend`.

        Raises:
            TypeError: a submodule is not a torch.nn.Linear itself but, say, a LoRA or quantised one.
            ValueError: `module` has other parameters or dropout, shapes do not fit, or a table does not.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        instead = "call such modules, with gradroute.routed_attention between them"
        layer._take_linears("module", module, names, instead)
        _check_no_dropout("module", module, "that of the probabilities is given as dropout; set p = 0")
        kv_heads = heads if kv_heads is None else kv_heads
        _check_heads(heads, kv_heads)
        query = layer._linears()[0]
        layer.head_dim = _head_dim(query.out_features, heads, f"the outputs of {layer.names[0]}")
        layer.heads, layer.kv_heads = heads, kv_heads
        layer._check_linears()
        layer.causal, layer.window, layer.scale, layer.dropout = causal, window, scale, dropout
        layer.backend = backend
        layer.sites = sites
        return layer

    def _shapes(self, d_model: int) -> list[tuple[int, int]]:
        """Of the linear layers' weights."""
        of_queries, of_keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(of_queries, d_model), (of_keys, d_model), (of_keys, d_model), (d_model, of_queries)]

    def _check_linears(self) -> None:
        """Raises unless the layers fit together."""
        linears = self._linears()
        d_model = linears[0].in_features
        for name, linear, expected in zip(self.names, linears, self._shapes(d_model), strict=True):
            if tuple(linear.weight.shape) != expected:
                raise ValueError(
                    f"names: got {name} of shape {list(linear.weight.shape)}, expected {list(expected)}: "
                    f"{self.names[0]} is {list(linears[0].weight.shape)}, with {self.heads} heads and "
                    f"{self.kv_heads} key and value heads"
                )

    def _sites_of_ops(self, sites: AttentionSites) -> tuple[Any, ...]:
        """Those of the query's, the key's and value's, and the output's linear layers, and of attention."""
        check_sites(sites, self.heads, self.kv_heads, self._output_bias())
        return ProjectionSites.of(sites, self.head_dim)

    def _output_bias(self) -> int | str:
        output = self._linears()[-1]
        return f"{self.names[-1]} has no bias" if output.bias is None else output.out_features

    def forward(
        self,
        x: Tensor,
        routes: Routes | None = None,
        *,
        rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        cu_seqlens: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """x `[B, S, d_model]` → `[B, S, d_model]`.

        Args:
            x: the input.
            routes: the batch's, of the tokens `[B, S]`; None: the ordinary layer.
            rotate: what positions do to q `[B, H, S, D]` and k `[B, G, S, D]`, such as RoPE.
            cache: what a cache makes of the new k and v `[B, G, S, D]`: all of them, `[B, G, S_k, D]`. For inference.
            cu_seqlens: `[documents + 1]` int32, for a batch of one: attention stays inside documents.
            key_mask: `[B, S_k]` bool; False keys are padding.
        """
        q_proj, k_proj, v_proj, o_proj = self._linears()
        check_shape("x", x, -1, -1, q_proj.in_features)
        if not unrouted(routes, self._sites, AttentionSites):
            assert routes is not None
            routes.check(x, "x")
            self._sites.check(
                routes, widths(routes.num_routes, self.heads, self.kv_heads, self._output_bias())
            )
        q_sites, kv_sites, out_sites, sites = self._op_sites or (None,) * 4
        q = self._by_head(self._project(q_proj, x, routes, q_sites))
        k = self._by_head(self._project(k_proj, x, routes, kv_sites))
        v = self._by_head(self._project(v_proj, x, routes, kv_sites))
        if rotate is not None:
            q, k = rotate(q, k)
        if cache is not None:
            k, v = cache(k, v)
        z = routed_attention(
            q,
            k,
            v,
            routes,
            sites,
            self.causal,
            self.window,
            self.scale,
            cu_seqlens,
            key_mask,
            self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self._project(o_proj, z.transpose(1, 2).flatten(2), routes, out_sites)

    def _project(self, linear: Any, x: Tensor, routes: Routes | None, sites: LinearSites | None) -> Tensor:
        return routed_linear(x, linear.weight, linear.bias, routes, sites, backend=self.backend)

    def _by_head(self, x: Tensor) -> Tensor:  # [B, S, heads * D] → [B, heads, S, D]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        names = ("heads", "kv_heads", "head_dim", "causal", "window", "scale", "dropout")
        options = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{options}, {super().extra_repr()}"


def _check_heads(heads: int, kv_heads: int) -> None:
    if heads < 1:
        raise ValueError(f"heads: got {heads}, expected a positive number of query heads")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads: got {kv_heads}, expected a divisor of heads = {heads}")


def _head_dim(features: int, heads: int, what: str) -> int:
    if features < heads or features % heads:
        raise ValueError(f"heads: got {heads}, expected a divisor of {what}, {features}")
    return features // heads
