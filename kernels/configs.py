"""Shipped launch configurations: kernel → architecture (compute capability times ten) → configuration.

A kernel that needs another one for a dtype has an entry `kernel.dtype` too.

An architecture without an entry uses that of the nearest older one, so an entry under 80 serves every chip. There is
no autotuning at run time: first calls are as fast as later ones, and results do not depend on a race.
All of them compile for sm_80, sm_90 and sm_100 without spills, with Triton 3.6 and 3.7 (tests/build/test_offline.py; in
a sample for two). A kernel may spill a few bytes with one of them and none with the other: shipped is a configuration
that is free of spills with both, with `maxnreg` where the assembler takes too few registers by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Chosen = TypeVar("Chosen")

ARCHITECTURES = (80, 90, 100)


def nearest(by_architecture: Mapping[int, Chosen], architecture: int) -> Chosen | None:
    """What stands under an architecture, or under the nearest older one; None where nothing does."""
    older = [known for known in by_architecture if known <= architecture]
    return by_architecture[max(older)] if older else None


def tiles(block_q: int, block_k: int, num_warps: int, num_stages: int, **options: int) -> dict[str, int]:
    """A configuration of attention, by the queries and the keys of a tile."""
    sides = {"BLOCK_Q": block_q, "BLOCK_K": block_k}
    return sides | {"num_warps": num_warps, "num_stages": num_stages} | options


CONFIGS: dict[str, dict[int, dict[str, int]]] = {
    "masked_product_kernel": {80: {"BLOCK_T": 16, "BLOCK_F": 512, "num_warps": 8, "maxnreg": 255}},
    "bias_grad_kernel": {80: {"BLOCK_T": 16, "BLOCK_F": 128, "num_warps": 4}},
    # Without enable_fp_fusion each product and each sum is rounded by itself, as in PyTorch's operations.
    "activation_fwd_kernel": {80: {"BLOCK_T": 4, "BLOCK_F": 512, "num_warps": 4, "enable_fp_fusion": False}},
    "activation_bwd_kernel": {
        80: {"BLOCK_T": 2, "BLOCK_F": 512, "STAGES": 3, "num_warps": 4, "maxnreg": 255}
    },
    "glu_bwd_kernel": {80: {"BLOCK_T": 2, "BLOCK_F": 512, "STAGES": 3, "num_warps": 4, "maxnreg": 255}},
    # Tiles are whole rows: BLOCK_F is D rounded up, the rest follows from these (kernels/norm.py). Where maxnreg does
    # not say how many registers there are, the assembler spills 8 to 16 bytes here and there to fit another program.
    # Larger tiles than PREFETCHED elements are not read ahead: with all masks they would exceed the shared memory.
    "norm_bwd_kernel": {
        80: {"ELEMENTS": 2048, "ELEMENTS_PER_WARP": 256, "STAGES": 3, "PREFETCHED": 4096},
        90: {"ELEMENTS": 2048, "ELEMENTS_PER_WARP": 256, "STAGES": 3, "PREFETCHED": 8192},
    },
    "norm_bwd_chunked_kernel": {
        80: {"BLOCK_T": 4, "BLOCK_F": 512, "STAGES": 3, "num_warps": 8, "maxnreg": 128}
    },
    # Without a limit ptxas of Triton 3.6 takes 40 registers for one on Blackwell, and spills.
    "embedding_bwd_kernel": {
        80: {"BLOCK_T": 8, "BLOCK_F": 256, "num_warps": 4},
        100: {"BLOCK_T": 8, "BLOCK_F": 256, "num_warps": 4, "maxnreg": 128},
    },
    # ELEMENTS is the size of a tile, whose shape follows from the matrix (kernels/optim.py).
    "adamw_step_kernel": {80: {"ELEMENTS": 1024, "num_warps": 4}},
    # Attention, by head dimension (padded to a power of two; 64 serves the smaller), and by what else needs registers:
    # edges of the value 1 (edges), of other values or many routes (edges.masked), or gathered; masks or padding
    # (masked), with a window or columns that are padded too, or documents (bounded). fp32 products are sums of FMAs in
    # registers, which leave room for smaller tiles only.
    "attention_documents_kernel": {80: {"BLOCK": 256, "num_warps": 4}},
    "attention_delta_kernel": {80: {"num_warps": 4}},
    "attention_tiles_kernel": {80: {"CHUNK": 256, "num_warps": 4, "maxnreg": 255}},
    "attention_fwd_kernel.64": {
        80: tiles(128, 64, 8, 3),
        90: tiles(128, 128, 8, 3),
        100: tiles(128, 64, 8, 3),
    },
    "attention_fwd_kernel.64.float32": {80: tiles(32, 32, 8, 2, maxnreg=255)},
    "attention_fwd_kernel.128": {
        80: tiles(128, 32, 8, 3),
        90: tiles(128, 128, 8, 2),
        100: tiles(128, 64, 8, 3),
    },
    "attention_fwd_kernel.128.masked": {80: tiles(128, 32, 8, 3), 90: tiles(128, 64, 8, 3)},
    "attention_fwd_kernel.128.float32": {80: tiles(32, 16, 8, 2, maxnreg=255)},
    "attention_fwd_kernel.256": {80: tiles(64, 32, 8, 2), 90: tiles(64, 64, 8, 2)},
    "attention_fwd_kernel.256.float32": {80: tiles(16, 16, 8, 2, maxnreg=255)},
    "attention_dkdv_kernel.64": {80: tiles(32, 128, 8, 2), 90: tiles(64, 128, 8, 3)},
    "attention_dkdv_kernel.64.bounded": {
        80: tiles(32, 32, 8, 2),
        90: tiles(64, 128, 8, 3),
        100: tiles(32, 128, 8, 2, maxnreg=255),
    },
    "attention_dkdv_kernel.64.masked": {80: tiles(32, 32, 8, 2), 90: tiles(64, 128, 8, 3)},
    "attention_dkdv_kernel.64.edges": {
        80: tiles(32, 128, 8, 2),
        90: tiles(64, 128, 8, 3),
        100: tiles(32, 128, 8, 2),
    },
    "attention_dkdv_kernel.64.edges.masked": {
        80: tiles(32, 32, 8, 2),
        90: tiles(32, 128, 8, 2),
    },
    "attention_dkdv_kernel.64.gather": {80: tiles(32, 32, 4, 2, maxnreg=255), 90: tiles(64, 128, 8, 2)},
    "attention_dkdv_kernel.64.float32": {80: tiles(32, 16, 8, 2, maxnreg=255)},
    "attention_dkdv_kernel.128": {
        80: tiles(64, 64, 8, 2),
        90: tiles(64, 128, 8, 2),
        100: tiles(64, 128, 8, 3),
    },
    "attention_dkdv_kernel.128.bounded": {80: tiles(32, 64, 8, 2), 90: tiles(32, 128, 8, 2)},
    "attention_dkdv_kernel.128.masked": {
        80: tiles(32, 64, 8, 2),
        90: tiles(64, 128, 8, 2),
        100: tiles(64, 128, 8, 3),
    },
    "attention_dkdv_kernel.128.edges": {
        80: tiles(64, 64, 8, 2),
        90: tiles(64, 128, 8, 2),
        100: tiles(64, 128, 8, 3),
    },
    "attention_dkdv_kernel.128.edges.masked": {80: tiles(32, 64, 8, 2), 100: tiles(32, 128, 8, 2)},
    "attention_dkdv_kernel.128.gather": {80: tiles(32, 64, 8, 2), 90: tiles(32, 128, 8, 2)},
    "attention_dkdv_kernel.128.float32": {80: tiles(16, 16, 8, 2, maxnreg=168)},
    "attention_dkdv_kernel.256": {80: tiles(32, 32, 8, 2), 100: tiles(32, 64, 8, 2)},
    "attention_dkdv_kernel.256.bounded": {80: tiles(32, 32, 8, 2)},
    "attention_dkdv_kernel.256.masked": {80: tiles(32, 32, 8, 2)},
    "attention_dkdv_kernel.256.edges": {80: tiles(32, 32, 8, 2), 100: tiles(32, 64, 8, 2)},
    "attention_dkdv_kernel.256.edges.masked": {80: tiles(32, 32, 8, 2), 100: tiles(32, 64, 8, 2)},
    "attention_dkdv_kernel.256.gather": {80: tiles(32, 32, 8, 2), 100: tiles(32, 64, 8, 2)},
    "attention_dkdv_kernel.256.float32": {
        80: tiles(16, 16, 8, 2, maxnreg=168),
        90: tiles(16, 16, 8, 2, maxnreg=192),
    },
    "attention_dq_kernel.64": {80: tiles(128, 64, 8, 3, maxnreg=255), 90: tiles(128, 64, 8, 3)},
    "attention_dq_kernel.64.edges": {80: tiles(128, 64, 8, 3)},
    "attention_dq_kernel.64.gather": {80: tiles(128, 64, 8, 3)},
    "attention_dq_kernel.64.float32": {
        80: tiles(32, 16, 4, 2, maxnreg=255),
        90: tiles(32, 32, 4, 2, maxnreg=255),
        100: tiles(16, 16, 4, 2, maxnreg=255),
    },
    "attention_dq_kernel.128": {
        80: tiles(128, 32, 8, 3),
        90: tiles(128, 64, 8, 2),
        100: tiles(128, 32, 8, 3, maxnreg=255),
    },
    "attention_dq_kernel.128.bounded": {80: tiles(128, 32, 8, 3), 100: tiles(128, 32, 8, 3, maxnreg=255)},
    "attention_dq_kernel.128.edges": {80: tiles(128, 32, 8, 3), 90: tiles(128, 64, 8, 3)},
    "attention_dq_kernel.128.gather": {
        80: tiles(128, 32, 8, 3),
        100: tiles(128, 64, 8, 3),
    },
    "attention_dq_kernel.128.float32": {80: tiles(32, 16, 8, 2, maxnreg=255)},
    "attention_dq_kernel.256": {80: tiles(64, 32, 8, 2), 100: tiles(64, 64, 8, 2, maxnreg=255)},
    "attention_dq_kernel.256.edges": {80: tiles(64, 32, 8, 2), 100: tiles(64, 64, 8, 2)},
    "attention_dq_kernel.256.gather": {
        80: tiles(64, 32, 8, 2),
        90: tiles(64, 64, 8, 2),
        100: tiles(32, 32, 8, 2, maxnreg=192),
    },
    "attention_dq_kernel.256.float32": {80: tiles(16, 16, 8, 2, maxnreg=255)},
}
