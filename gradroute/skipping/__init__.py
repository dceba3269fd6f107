"""Skipping: products of a backward without what masks make vanish, as rectangles or grouped.

A mask of zeros makes parts of a gradient vanish, and of the products that follow. With the tokens sorted by route what
is left are rectangles, so the cost of the GEMMs falls with the tables' density. On the CPU an MLP takes tokens in runs
besides, so that what lies between two products stays in the cache: a fresh matrix of T × d_ff costs page faults (10 ms
for 33 MB, where the GEMM that fills it takes 36).

How many tokens a route has must be known on the host for that, or the device would be waited for: routes whose ids
came from there know it. For others, and in compiled code, features are cut into tiles of one width, and the products of
all tiles are one call whose sizes the device reads.

`rule` decides whether a product is made whole, as rectangles or grouped, and `plan` says so to users. Of rectangles
`parts` splits a batch, `totals` puts gradients together, and `linear` and `mlp` make the products of the ops. Of
grouped products `tiling` cuts the features, `entries` lists a batch's tokens by tile, `grouped` has the two products
themselves, `sums` puts gradients together, and `grouped_linear` and `grouped_mlp` make those of the ops.
"""
