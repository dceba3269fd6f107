"""Configurations beside the shipped ones that are worth measuring on a GPU, for `python -m gradroute tune`.

Nothing here was measured: they are neighbours of what is shipped, in the size of tiles, in warps and in stages. Like
the shipped ones they compile without spills and fit the shared memory (tests/build/test_offline.py). All of them
compute the same sums; tiles of another size may add the terms in another order, and so change a result's last bits.
"""

from __future__ import annotations

from .configs import ARCHITECTURES, CONFIGS, nearest, tiles

_OF_ELEMENTS = (
    {"BLOCK_T": 1, "BLOCK_F": 1024, "STAGES": 3, "num_warps": 4, "maxnreg": 255},
    {"BLOCK_T": 2, "BLOCK_F": 512, "STAGES": 5, "num_warps": 4, "maxnreg": 255},
)

_OF_ALL: dict[str, tuple[dict[str, int], ...]] = {
    "masked_product_kernel": (
        {"BLOCK_T": 8, "BLOCK_F": 512, "num_warps": 4, "maxnreg": 255},
        {"BLOCK_T": 8, "BLOCK_F": 512, "num_warps": 8, "maxnreg": 128},
    ),
    "bias_grad_kernel": (
        {"BLOCK_T": 32, "BLOCK_F": 128, "num_warps": 8},
        {"BLOCK_T": 16, "BLOCK_F": 256, "num_warps": 8},
    ),
    "embedding_bwd_kernel": (
        {"BLOCK_T": 4, "BLOCK_F": 256, "num_warps": 4},
        {"BLOCK_T": 8, "BLOCK_F": 512, "num_warps": 8},
    ),
    "glu_bwd_kernel": _OF_ELEMENTS,
    "activation_bwd_kernel": _OF_ELEMENTS,
    "attention_fwd_kernel.64": (tiles(128, 64, 8, 3), tiles(64, 64, 4, 3)),
    "attention_fwd_kernel.128": (tiles(128, 64, 8, 2), tiles(128, 32, 8, 3), tiles(128, 64, 8, 3)),
    "attention_fwd_kernel.128.masked": (tiles(128, 64, 8, 2), tiles(128, 32, 8, 3)),
    "attention_dkdv_kernel.64": (tiles(64, 128, 8, 2), tiles(32, 128, 8, 2)),
    "attention_dkdv_kernel.128": (tiles(32, 128, 8, 2),),
    "attention_dq_kernel.64": (tiles(128, 64, 8, 2), tiles(128, 32, 8, 3)),
    "attention_dq_kernel.128": (tiles(128, 32, 8, 3), tiles(64, 64, 8, 2)),
}

# Architecture → entry of CONFIGS → what to measure beside it. What spills is left out.
ALTERNATIVES: dict[int, dict[str, tuple[dict[str, int], ...]]] = {
    80: _OF_ALL
    | {
        "attention_fwd_kernel.128": (),
        "attention_fwd_kernel.128.masked": (),
        "attention_dkdv_kernel.64": (tiles(32, 128, 8, 2),),
        "attention_dkdv_kernel.128": (),
    },
    90: _OF_ALL,
    100: _OF_ALL,
}


def candidates(entry: str, architecture: int) -> tuple[dict[str, int], ...]:
    """The configurations of an entry that are worth measuring on an architecture, the shipped one first.

    They may change the last bits of results, and nothing else.

    Args:
        entry: a key of `gradroute.kernels.configs.CONFIGS`.
        architecture: a compute capability times ten.

    Raises:
        KeyError: no such entry.
    """
    shipped = nearest(CONFIGS[entry], architecture) or CONFIGS[entry][ARCHITECTURES[0]]
    known = max((each for each in ARCHITECTURES if each <= architecture), default=ARCHITECTURES[0])
    return (shipped, *(other for other in ALTERNATIVES[known].get(entry, ()) if other != shipped))
