"""Skipping: the products of a backward made as rectangles, the tokens of a route × the features with its gradient.

A mask of zeros makes parts of a gradient vanish, and of the products that follow. With the tokens sorted by route what
is left are rectangles, so the cost of the GEMMs falls with the tables' density. On the CPU an MLP takes tokens in runs
besides, so that what lies between two products stays in the cache: a fresh matrix of T × d_ff costs page faults (10 ms
for 33 MB, where the GEMM that fills it takes 36).

How many tokens a route has must be known on the host, or the device would be waited for: routes whose ids came from
there know it, others have their products made whole.

`rule` decides whether a product is made whole or as rectangles, and `plan` says so to users; `parts` splits a batch,
`totals` puts gradients together, `linear` and `mlp` make the products of the ops.
"""
