"""Attention in tiles of rows and keys, composed of matrix products: memory O(S · tile), any device, edges included.

The queries of the heads that share a key/value head are folded into rows `[N, D]`, position by position. A row sees an
interval of keys, and neither bound of it ever decreases from row to row: the first and the last row of a band say
which keys to visit, and which of those must be hidden from some row. Bands of rows, split by keys, make the tiles.

On the CPU, where looking at data costs nothing, everything else is a choice of rows and keys: padding is left out, and
so are rows without a gradient, and keys without an edge. Elsewhere nothing may wait for data: padding, documents and
edges are applied to every tile.
"""

from .backward import attention_backward
from .forward import attention_forward

__all__ = ["attention_backward", "attention_forward"]
