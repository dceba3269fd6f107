"""The masked product of a gradient: into a new tensor, or in place on the elements that a table changes."""

import triton
import triton.language as tl
from torch import Tensor

from ..primitives.arguments import tokens_of
from ..primitives.overwriting import may_overwrite
from ..primitives.registration import kernel_op
from ..routes import Routes
from ..tables import Table
from .launch import config_of, launch
from .masks import Routing, Weights, load_tokens, load_weights
from .matrices import ACCESS, Matrix, in_whole_vectors, load_tile, pointers
from .rounding import rounded


@triton.jit
def masked_product_kernel(
    g,  # Matrix [T, F]
    out,  # Matrix [T, F], g itself where IN_PLACE
    routing,  # Routing of [T]
    weights,  # Weights [R, F] or [R, 1]
    num_tokens,
    num_features,
    IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out = m ⊙ g. In place, vectors in which every m is 1 are neither read nor written; elsewhere all of g is read.

    Where m is 0 whatever was read is replaced. To leave it unread would cost more: a predicate for every element
    splits the loads into single elements, and each would wait until routes and weights have been looked up.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    features = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    present, inside = rows < num_tokens, features < num_features
    changed = present[:, None] & inside[None, :]
    tokens = load_tokens(routing, rows, present)
    if not IN_PLACE:
        g_tile = load_tile(g, rows, features, changed)
        tl.debug_barrier()  # or the assembler moves these loads behind those of weights, which wait for routes
    m = load_weights(weights, routing, tokens, features, inside)
    if IN_PLACE:
        VECTOR: tl.constexpr = ACCESS // g.pointer.dtype.element_ty.primitive_bitwidth
        changed = changed & in_whole_vectors(m != 1.0, VECTOR)
        g_tile = load_tile(g, rows, features, changed)
    product = rounded(m * tl.where(m == 0.0, 0.0, g_tile.to(tl.float32)), out.pointer.dtype.element_ty)
    if IN_PLACE:
        product = tl.where(m == 1.0, g_tile, product)  # its neighbours keep every bit, a NaN's too
    tl.store(pointers(out, rows, features), product, mask=changed)


def masked_product(g: Tensor, routes: Routes, table: Table | None, *, overwrite: bool = False) -> Tensor:
    """See `gradroute.primitives.protocol.Primitives`."""
    if table is None:
        return g
    masks = (*tokens_of(routes), table.on(g.device))
    if overwrite and may_overwrite(g):
        masked_product_in_place_op(g, *masks)
        return g
    return masked_product_op(g, *masks)


@kernel_op("masked_product(Tensor g, Tensor ids, Tensor? strength, Tensor weights) -> Tensor")
def masked_product_op(g: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor) -> Tensor:
    out = g.new_empty(g.shape)
    _launch(g, out, ids, strength, weights, in_place=False)
    return out


@kernel_op("masked_product_(Tensor(a!) g, Tensor ids, Tensor? strength, Tensor weights) -> ()")
def masked_product_in_place_op(g: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor) -> None:
    _launch(g, g, ids, strength, weights, in_place=True)


def _launch(
    g: Tensor, out: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor, in_place: bool
) -> None:
    tokens, features = g.shape
    config = config_of(masked_product_kernel, g.device)
    grid = (triton.cdiv(tokens, config["BLOCK_T"]), triton.cdiv(features, config["BLOCK_F"]))
    launch(
        masked_product_kernel,
        grid,
        config,
        g=Matrix.of(g),
        out=Matrix.of(out),
        routing=Routing.of(ids, strength),
        weights=Weights.of(weights),
        num_tokens=tokens,
        num_features=features,
        IN_PLACE=in_place,
    )
