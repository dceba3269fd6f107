"""One call of an op by its values on the axes: tokens and sizes, tables, and the order of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradroute import Routes, Table
from gradroute.tables import localize
from gradroute.testing import OPS, Draw, Marks, Sample, Sizes, make_table, site_names

from .op_table import OPS as OP_TABLE

BLOCK = 64  # features in the block of tables "block"
RUN_LENGTHS = (64, 512)  # the shortest and the longest run of tokens of one route, in the order "runs"
DTYPES = ("float32", "bfloat16", "float16", "float64")

#: Every kind of table, with its meaning; those below "fractional" are the tests' own.
TABLES = {
    "block": f"two routes: tokens of route 1 train the last {BLOCK} features alone",
    "refuse": "two routes: tokens of route 1 train nothing",
    "interval": "four routes: each trains an interval of the features, --density of them",
    "fractional": "four routes: any weights from 0 to 1",
    "ones": "four routes: every weight is 1",
    "zeros": "four routes: every weight is 0",
    "blocks": "four routes: up to four pieces of the features, each of weight 0 or 1",
    "negative": "four routes: as blocks, each of weight -0.75 or 1",
    "dense": "four routes: every weight is any of 0, 1, 0.5 and -0.75",
    "sparse": "four routes: as dense, most weights 0",
    "unused": "four routes: as dense, and the last route has no token",
    "broadcast": "four routes: one weight each, for all features",
}
TWO_ROUTES = ("block", "refuse")
SITES = {
    "activation": "gradients of activations are masked (norms and embeddings have none: update)",
    "update": "gradients of parameters are masked",
    "both": "gradients of activations and of parameters are masked",
    "all": "every site of the op has a table",
}
STRENGTHS = {
    "none": "masks act in full",
    "token": "a random strength in [0, 1.25) for every token",
    "scalar": "0.3 for all tokens",
}
ORDERS = {
    "mixed": "routes of tokens are random",
    "sorted": "tokens come by route",
    "runs": f"{RUN_LENGTHS[0]} to {RUN_LENGTHS[1]} tokens in a row have the same route",
}

#: The values of axes by name, as a command gives them.
Axes = dict[str, list[Any]]


class Setting(NamedTuple):
    """A point on the axes.

    Attributes:
        op: its name.
        tokens, d_model, d_ff: T and the widths; the output width of a linear layer is d_ff.
        dtype: one of DTYPES, for all floating-point tensors.
        tables: one of TABLES.
        density: the share of features that "interval" leaves to a route.
        share: the share of tokens of route 1, with "block" and "refuse".
        sites: one of SITES.
        strength: one of STRENGTHS; None stands for "none".
        order: one of ORDERS.
    """

    op: str
    tokens: int
    d_model: int
    d_ff: int
    dtype: str = "float32"
    tables: str = "block"
    density: float = 0.25
    share: float = 0.037
    sites: str = "activation"
    strength: str | None = None
    order: str = "mixed"

    @property
    def axes(self) -> dict[str, Any]:
        """The values by name, without those that mean nothing here."""
        axes = self._asdict()
        del axes["op"]
        if self.tables != "interval":
            del axes["density"]
        if self.tables not in TWO_ROUTES:
            del axes["share"]
        return axes

    @property
    def title(self) -> str:
        """A name that tells this setting from every other."""
        values = [f"{name} {value}" for name, value in self.axes.items() if value is not None]
        return f"{self.op}, " + ", ".join(values)

    @property
    def site_names(self) -> tuple[str, ...]:
        """The op's sites that have tables; none: the op lacks such sites."""
        if self.sites == "all":
            return site_names(self.op, bias=False)
        op = OP_TABLE[self.op]
        wanted = {"activation": (op.activation,), "update": (op.update,)}.get(
            self.sites, (op.activation, op.update)
        )
        return tuple(site for sites in wanted for site in sites) if all(wanted) else ()

    def check(self) -> None:
        """Refuses values that an axis does not have.

        Raises:
            ValueError: naming the axis, what came and what was expected.
        """
        for axis in ("op", "tables", "sites", "order", "dtype", "strength"):
            self._check_word(axis)
        for axis in ("density", "share"):
            if not 0 <= getattr(self, axis) <= 1:
                raise ValueError(f"{axis}: got {getattr(self, axis)}, expected a share from 0 to 1")
        for axis in ("tokens", "d_model", "d_ff"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis}: got {getattr(self, axis)}, expected at least 1")
        if not self.site_names:
            others = [sites for sites in SITES if self._replace(sites=sites).site_names]
            raise ValueError(f"sites: got {self.sites!r}, expected {' or '.join(others)} for {self.op}")

    def _check_word(self, axis: str) -> None:
        """Refuses a value of an axis of words that is none of them."""
        words = {
            "op": OP_TABLE,
            "tables": TABLES,
            "sites": SITES,
            "order": ORDERS,
            "dtype": DTYPES,
            "strength": STRENGTHS,
        }
        got = getattr(self, axis)
        if axis == "op" and got == "routed_attention":
            raise ValueError(
                "op: got 'routed_attention', which is in the suite attention, with axes of its own"
            )
        if got not in words[axis] and not (axis == "strength" and got is None):
            raise ValueError(f"{axis}: got {got!r}, expected one of {', '.join(words[axis])}")


def samples(setting: Setting, device: torch.device, number: int) -> list[Sample]:
    """Calls of one setting with the same routes and sites, each with other random tensors."""
    sizes = Sizes(d_model=setting.d_model, d_ff=setting.d_ff, vocabulary=setting.d_ff)
    routes, sites = make_routes(setting).to(device), make_sites(setting, sizes)
    return [
        _sample(
            setting,
            Draw(seed, _dtype(setting), device, (setting.tokens,), sizes, with_bias=False, on_device=True),
        )
        .with_routes(routes)
        .with_sites(sites)
        for seed in range(number)
    ]


def _dtype(setting: Setting) -> torch.dtype:
    return getattr(torch, setting.dtype)


def _sample(setting: Setting, draw: Draw) -> Sample:
    """A call without routes and sites."""
    op = OPS[setting.op]
    tensors = op.inputs(draw)
    # On the meta device, because the upstream gradient needs the output's shape alone.
    shapes = {name: None if tensor is None else tensor.to("meta") for name, tensor in tensors.items()}
    keywords = op.keywords(draw, {})
    output = op.formula(Marks(None, {}), **shapes, **keywords)
    return Sample(setting.op, tensors, None, None, keywords, draw.normal(*output.shape))


def make_routes(setting: Setting) -> Routes:
    """The routes of a setting, always the same ones; made on the host, where ids come from in training."""
    generator = torch.Generator().manual_seed(0)
    tokens = setting.tokens
    ids = _in_order(setting, _random_ids(setting, tokens, generator), generator)
    strengths = {
        "none": None,
        "token": 1.25 * torch.rand(tokens, generator=generator),
        "scalar": torch.tensor(0.3),
    }
    return Routes.of(ids, num_routes(setting), strength=strengths[setting.strength or "none"])


def _random_ids(setting: Setting, number: int, generator: torch.Generator) -> Tensor:  # [number]
    if setting.tables in TWO_ROUTES:
        return (torch.rand(number, generator=generator) < setting.share).long()
    used = num_routes(setting) - (setting.tables == "unused")
    return torch.randint(used, (number,), generator=generator)


def _in_order(setting: Setting, ids: Tensor, generator: torch.Generator) -> Tensor:  # [T]
    if setting.order == "sorted":
        return ids.sort()[0]
    if setting.order == "runs":
        shortest, longest = RUN_LENGTHS
        number = -(-len(ids) // shortest)
        lengths = torch.randint(shortest, longest + 1, (number,), generator=generator)
        return _random_ids(setting, number, generator).repeat_interleave(lengths)[: len(ids)]
    return ids


def num_routes(setting: Setting) -> int:
    return 2 if setting.tables in TWO_ROUTES else 4


def make_sites(setting: Setting, sizes: Sizes) -> Any:
    """The sites of a setting's op; route_grad has a table instead."""
    op, routes = OPS[setting.op], num_routes(setting)
    widths = op.site_features(sizes, routes, False)
    made = {name: make_setting_table(setting, widths[name]) for name in setting.site_names}
    return made["table"] if setting.op == "route_grad" else op.sites_class()(**made)


def make_setting_table(setting: Setting, features: int) -> Table:
    """The table of a setting for a site of so many features."""
    routes, kind = num_routes(setting), setting.tables
    if kind == "block":
        return localize(2, features, {1: slice(max(0, features - BLOCK), features)})
    if kind == "refuse":
        return Table([[1.0], [0.0]])
    if kind == "fractional":
        return Table(torch.rand(routes, features, generator=torch.Generator().manual_seed(0)))
    if kind == "interval":
        kept = round(setting.density * features)
        feature = torch.arange(features)
        starts = torch.arange(routes).unsqueeze(1) * features // routes
        return Table(((feature - starts) % features < kept).float())
    return make_table(kind, routes, features)
