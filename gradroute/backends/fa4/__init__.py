"""Edges between routes by the backward of FlashAttention-4, the package flash-attn-4, where it is installed.

A vendor's kernel runs the forward, which knows no edges. The backward gets its output and log-sum-exp, and a bias of
the scores: with P̃ = exp(S + log E - lse) = E ⊙ P, FlashAttention's backward makes

    dv = P̃ᵀ do,    dS = P̃ ⊙ (do vᵀ - delta),

which are the gradients through value_edges = score_edges = E. `passes` makes those of other tables of such passes.
Edges of 0 and 1 are a mask of the scores, and no bias at all. Which blocks of 128 queries and 128 keys have all edges,
some or none is found on the device (`blocks`); those without any are left out.

Nothing of it has run on a GPU: its kernels were compiled for sm_90a and sm_100a, and everything around them runs in the
tests with an emulation of the library.
"""

from .backward import attention_backward
from .refusals import HEAD_DIMS, why_not

__all__ = ["HEAD_DIMS", "attention_backward", "why_not"]
