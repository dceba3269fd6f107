"""The contract between ops and backends: every primitive, with its shapes and its meaning.

A backend is a module whose functions are the primitives of `Primitives`: the ops' autograd.Functions and the shared
algorithms take such a module as an argument and know nothing else of it. `gradroute.backends` lists the backends, mypy
checks each of them against this Protocol, and what a backend's function says of itself is only what differs from here.

Tokens are flat: a matrix of T tokens is `[T, F]`, of any strides. R is the number of routes. A table is
`[R, F]` or `[R, 1]`, and None in its place means no mask. m ⊙ g is formed in fp32 (fp64 for fp64), rounded once, and is
exactly 0 where m is 0. None of these functions writes into an argument unless it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..routes import Routes
from ..tables import Table
from .arguments import ActivationMasks, AdamWOptions, NormArguments
from .attention_kernels import AttentionKernels
from .attention_pattern import Pattern


class AttentionTables(Protocol):
    """The tables that attention reads: of effective `AttentionSites`."""

    @property
    def query(self) -> Table | None:
        """m_query `[R, H]`."""

    @property
    def key(self) -> Table | None:
        """m_key `[R, G]`."""

    @property
    def value(self) -> Table | None:
        """m_value `[R, G]`."""

    @property
    def heads(self) -> Table | None:
        """m_heads `[R, H]`."""

    @property
    def forward_heads(self) -> Table | None:
        """m_forward_heads `[R, H]`."""

    @property
    def score_edges(self) -> Table | None:
        """E_score `[R, R]`."""

    @property
    def value_edges(self) -> Table | None:
        """E_value `[R, R]`."""


class Primitives(Protocol):
    """The functions that a backend implements."""

    def masked_product(
        self, g: Tensor, routes: Routes, table: Table | None, *, overwrite: bool = False
    ) -> Tensor:
        """m ⊙ g for g `[T, F]`, in a new tensor; `g` itself without a table.

        With `overwrite` g is the caller's own, and the caller reads it no more: the product is left in g where
        `gradroute.primitives.overwriting.may_overwrite` allows it.
        """

    def bias_grad(self, g: Tensor, routes: Routes, table: Table | None) -> Tensor:
        """Σ_t m ⊙ g: g `[T, O]` → `[O]` in g's dtype."""

    def input_grad(self, g: Tensor, weight: Tensor, routes: Routes, table: Table | None) -> Tensor:
        """m ⊙ (g W): g `[T, O]`, weight `[O, I]` → `[T, I]`."""

    def weight_grad(
        self, g: Tensor, x: Tensor, routes: Routes, rows: Table | None, cols: Table | None
    ) -> Tensor:
        """(m_rows ⊙ g)ᵀ (m_cols ⊙ x): g `[T, O]`, x `[T, I]` → `[O, I]`; of neither operand is a whole copy made."""

    def activation_forward(
        self, a: Tensor, up: Tensor | None, routes: Routes, table: Table | None, activation: str
    ) -> Tensor:
        """z = m ⊙ (act(a) * up), with the bits of eager PyTorch's operations on the same device.

        Each operation is rounded to the dtype: act(a), then its product with up, then the masked product.

        Args:
            a: `[*tokens, F]`.
            up: `[*tokens, F]` of a's dtype, or None: z = m ⊙ act(a).
            routes: the batch's routes.
            table: m_forward.
            activation: a name of `gradroute.activations.ACTIVATIONS`.

        Returns:
            `[*tokens, F]`, which no one else has.
        """

    def activation_backward(
        self,
        dz: Tensor | None,
        a: Tensor,
        routes: Routes,
        masks: ActivationMasks,
        activation: str,
        *,
        want_z: bool,
        want_bias: bool,
        overwrite: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradient of z = m_z ⊙ act(a), and what the weights beside it need: m_z is of `masks`, as m_dh is.

        Args:
            dz: `[T, F]`, or None where only z is wanted.
            a: `[T, F]`.
            routes: the batch's routes.
            masks: what is masked.
            activation: a name of `gradroute.activations.ACTIVATIONS`.
            want_z: compute z.
            want_bias: sum the bias gradient; dz is given.
            overwrite: dz and a are the caller's own, and the caller reads neither again: a backend may leave da in dz
                and z in a instead of allocating, where `may_overwrite` allows it. On the CPU that pays, where new
                matrices cost page faults: with them a gated MLP's backward took 0.94 times the ordinary one's instead
                of 0.82 (1024 tokens, 128 × 512, fp32, 2 cores).

        Returns:
            da = m_da ⊙ m_dh ⊙ dz ⊙ act'(a) `[T, F]`; z `[T, F]`; Σ_t m_update ⊙ da `[F]`; None for what is not wanted.
        """

    def glu_backward(
        self,
        dz: Tensor | None,
        gate: Tensor,
        up: Tensor,
        routes: Routes,
        masks: ActivationMasks,
        activation: str,
        *,
        want_z: bool,
        want_bias: bool,
        overwrite: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of z = m_z ⊙ (act(gate) * up), and what the weights beside it need: see activation_backward.

        Args:
            dz: `[T, F]`, or None where only z is wanted.
            gate: `[T, F]`.
            up: `[T, F]`.
            routes: the batch's routes.
            masks: what is masked.
            activation: a name of `gradroute.activations.ACTIVATIONS`.
            want_z: compute z.
            want_bias: sum the bias gradients; dz is given.
            overwrite: as for activation_backward: a backend may leave dgate in dz, dup in up and z in gate.

        Returns:
            With dh = m_dh ⊙ dz: dgate = m_da ⊙ dh ⊙ up ⊙ act'(gate) and dup = m_da ⊙ dh ⊙ act(gate) `[T, F]`;
            z `[T, F]`; Σ_t m_update ⊙ dgate and Σ_t m_update ⊙ dup `[F]`; None for what is not wanted.
        """

    def norm_backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        routes: Routes,
        update: Table | None,
        norm: NormArguments,
        *,
        want_weight: bool,
        want_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of an RMS norm or a layer norm, those of the weight and the bias masked; x̂ is computed again.

        Args:
            dy: `[T, D]`.
            x: `[T, D]`.
            weight: `[D]`, or None where dx is not wanted.
            routes: the batch's routes.
            update: m_update.
            norm: which norm it is.
            want_weight: compute dW.
            want_bias: compute db.

        Returns:
            dx `[T, D]` in x's dtype; dW and db `[D]` in fp32 (fp64 for fp64); None for what is not wanted.
        """

    def embedding_backward(
        self,
        dy: Tensor,
        tokens: Tensor,
        routes: Routes,
        update: Table | None,
        num_embeddings: int,
        padding_idx: int | None,
    ) -> Tensor:
        """dW[v] = Σ_{t: token_t = v} m_update ⊙ dy_t, nothing for padding_idx.

        Args:
            dy: `[T, D]`.
            tokens: `[T]`, int32 or int64.
            routes: the batch's routes.
            update: m_update.
            num_embeddings: V.
            padding_idx: the row that no token updates, in `[0, V)`, or None.

        Returns:
            `[V, D]` in dy's dtype, summed in fp32 (fp64 for fp64).
        """

    def attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Routes | None,
        sites: AttentionTables,
        pattern: Pattern,
        kernels: AttentionKernels,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """z = m_forward_heads ⊙ softmax(scale q kᵀ) v, and what its backward needs beside it.

        Args:
            q: `[B, H, S_q, D]`.
            k: `[B, G, S_k, D]`; H is a multiple of G.
            v: `[B, G, S_k, D]`.
            routes: of the tokens `[B, S_q]`; None: no masks.
            sites: effective sites.
            pattern: which keys a query sees.
            kernels: which kernels run it and its backward.

        Returns:
            z `[B, H, S_q, D]`; the tensors to save beside q, k, v and z: those that the kernels of the backward need.
        """

    def attention_backward(
        self,
        dz: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor,
        saved: tuple[Tensor, ...],
        routes: Routes | None,
        sites: AttentionTables,
        pattern: Pattern,
        kernels: AttentionKernels,
        *,
        want_query: bool,
        want_key_value: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dq, dk and dv of attention with every mask.

        Args:
            dz: `[B, H, S_q, D]`, in any layout.
            q: as for attention_forward, like k and v.
            k: see q.
            v: see q.
            z: what attention_forward returned.
            saved: what attention_forward returned beside z.
            routes: of the tokens; None: no masks.
            sites: effective sites.
            pattern: which keys a query sees.
            kernels: as for attention_forward.
            want_query: compute dq.
            want_key_value: compute dk and dv.

        Returns:
            dq, dk, dv, in the shapes of q, k, v; None for what is not wanted.
        """

    def touched_blocks(self, gradients: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
        """Which blocks of parameters have an element of their gradients that is not 0; NaN and infinity are not 0.

        Args:
            gradients: of one dtype and device, each a matrix `[N, M]` or a vector `[M]`, which is a matrix of one row.
            blocks: what a block of each is (`arguments.Blocks`).

        Returns:
            bool `[n]`: the blocks of the first one in order, then those of the second, and so on.
        """

    def adamw_step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        factors: Tensor,
        blocks: Sequence[int],
        options: AdamWOptions,
    ) -> None:
        """One step of `gradroute.optim.RoutedAdamW` on parameters, in place: in fp32 (fp64 for fp64), rounded once.

        What a parameter becomes does not depend on what other parameters there are. All tensors of one parameter have
        one shape, `[N, M]` or `[M]`, which is a matrix of one row.

        Args:
            parameters: θ, of one dtype and device.
            gradients: g, of the parameters' dtype.
            exp_avgs: m, in fp32, bfloat16 or the parameters' dtype.
            exp_avg_sqs: v, of the dtype of m.
            max_exp_avg_sqs: the largest v so far, of the dtype of m, with amsgrad; else nothing.
            factors: `[5, n]`, of the dtype to compute in, for the blocks of the first parameter, then those of the
                second, and so on: 1 - lr λ, lr / (1 - β₁^t), 1 / √(1 - β₂^t), 1 for blocks that are touched, 0 for
                others, and t.
            blocks: what a block of each parameter is (`arguments.Blocks`).
            options: β₁, β₂, ε, maximize, stochastic.
        """


class HeadPrimitives(Protocol):
    """Further functions of a backend that puts masks around a vendor's attention kernels."""

    def masked_heads(
        self, x: Tensor, routes: Routes | None, table: Table | None, *, overwrite: bool = False
    ) -> Tensor:
        """m ⊙ x for x `[B, H, S, D]` and a table `[R, H]` or `[R, 1]`, in a new tensor; `x` itself without a table.

        `overwrite` is that of masked_product.
        """

    def attention_output_grad(
        self, dz: Tensor, o: Tensor, routes: Routes | None, sites: AttentionTables, *, want_delta: bool
    ) -> tuple[Tensor, Tensor | None]:
        """do = m_heads ⊙ m_forward_heads ⊙ dz, and rowsum(do ⊙ o).

        Args:
            dz: `[B, H, S, D]`.
            o: `[B, H, S, D]`, attention's output, not masked.
            routes: of the tokens; None: no masks.
            sites: effective sites.
            want_delta: the caller needs rowsum(do ⊙ o).

        Returns:
            do `[B, H, S, D]`, dz itself where neither site has a table; delta `[B, H, S]` in fp32 (fp64 for fp64), or
            None where the backend leaves it to who needs it.
        """
