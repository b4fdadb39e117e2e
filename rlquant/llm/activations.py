"""Bytes that tensors of a forward and a backward pass take, token by token, from a model's sizes.

What autograd keeps of a block is counted tensor by tensor, as Korthikanti et al. 2022 do (arXiv:2205.05198,
section 4.1), but for the blocks of today in transformers, with LoRA on every linear layer (Hu et al. 2021,
arXiv:2106.09685) over a base that takes no gradients. Of such a block, each of these is kept (sizes per token, in
elements; h hidden, i intermediate, q and k the sizes of queries and keys, r the rank):

- the input of each RMSNorm in float32 and one number of its size: h + 1 a norm; likewise q and k, head by head,
  where queries and keys are normalised too
- the inputs of the adapters: normed h before attention and before the MLP (q, k and v share one, gate and up too),
  attention's output q and the MLP's product i, which other layers keep anyway; and r of each adapter's middle
- queries q, keys and values k, attention's output q (the same as above), and a float32 a head for its softmax
  (FlashAttention, Dao et al. 2022, arXiv:2205.14135, keeps no scores)
- of the gated MLP: gate i, activated gate i, up i and their product i

The frozen linear layers keep nothing: without a gradient for the weight, the input is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlquant.llm.architecture import Architecture

__all__ = ["TILE_TOKENS", "TILE_VOCABULARY", "Activations"]

FLOAT32 = 4
# Log-probabilities are computed in tiles of so many tokens and words (TRL 1.16, kernels/chunked_logprob.py).
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
# float32 numbers per token that such a pass carries: running maximum, sums, targets and results.
_TILE_STATISTICS = 16


@dataclass(frozen=True)
class Activations:
    """Bytes of activations.

    Attributes:
        model: the sizes.
        compute: bytes of an element of a matrix product, 2 or 4.
        stream: of an element of what runs between the layers: that of the embedding's dtype.
        rank: of the adapters; 0 where there are none.
        padded: whether sequences of a batch differ in length: a mask, and keys and values repeated for all heads.
    """

    model: Architecture
    compute: int = 2
    stream: int = 2
    rank: int = 0
    padded: bool = False

    def saved(self, seq: int) -> int:
        """Bytes a token that one block keeps for the backward pass, in sequences of ``seq`` tokens."""
        m = self.model
        h, i, q, k = m.hidden, m.intermediate, m.query_size, m.kv_size
        norms = FLOAT32 * m.norms * (h + 1)
        norms += FLOAT32 * (q + k + m.heads + m.kv_heads) if m.head_norms else 0
        mlp = 4 * i * self.stream
        inputs = 2 * h * self.compute
        if self.stream != self.compute:  # each adapter then casts its input for itself
            inputs = (5 * h + i) * self.compute
        middles = self.rank * len(m.linears) * self.compute
        return norms + inputs + middles + self._attention(seq) + mlp

    def _attention(self, seq: int) -> int:
        m = self.model
        keys = m.query_size if self.padded else m.kv_size
        mask = self.compute * seq if self.padded else 0
        return self.compute * (2 * m.query_size + 2 * keys) + FLOAT32 * m.heads + mask

    @property
    def checkpoint(self) -> int:
        """Bytes a token that one block keeps under gradient checkpointing: its input."""
        return self.model.hidden * self.stream

    @property
    def final(self) -> int:
        """Bytes a token that the last norm keeps, its output included."""
        return self.model.hidden * (FLOAT32 + self.stream)

    @property
    def norm_gradients(self) -> int:
        """Bytes a token of gradients within a norm's backward pass, in float32 but for the one that arrives."""
        return (5 * FLOAT32 + self.stream) * self.model.hidden

    @property
    def gradients(self) -> int:
        """Bytes a token of gradients while a block's backward pass starts: at its MLP, or a norm behind that."""
        m = self.model
        mlp = (2 * m.intermediate + m.hidden) * self.stream
        return max(mlp, self.norm_gradients) if m.norms > 2 else mlp

    @property
    def forward(self) -> int:
        """Bytes a token that a block's forward pass needs for a moment, where no gradient is asked for."""
        m = self.model
        # Always: the embedding's output, the block's input, the normed input, cosines and sines.
        held = (3 * m.hidden + 2 * m.head_dim) * self.stream
        mlp = (m.hidden + (4 if self.rank else 3) * m.intermediate) * self.stream
        rotation = max(4 * m.query_size + 2 * m.kv_size, 2 * m.query_size + 5 * m.kv_size) * self.stream
        repeated = 2 * self.compute * m.query_size if self.padded else 0
        norm = 3 * FLOAT32 * m.hidden
        return held + max(mlp, rotation + repeated, norm)

    def kv_cache(self, rows: int, seq: int, bits: float) -> int:
        """Bytes of the keys and values of ``rows`` sequences of ``seq`` tokens, all layers."""
        return int(rows * self.model.cached_tokens(seq) * 2 * self.model.kv_size * bits / 8)

    def log_probabilities(self, tokens: int, *, cast: bool, unpacked: int) -> int:
        """Bytes of the output layer and the loss over ``tokens`` tokens, computed in tiles.

        ``cast``: the output layer is stored in another dtype than products are computed in; ``unpacked``: bytes
        that unpacking it takes.
        """
        m = self.model
        words = min(m.vocabulary, TILE_VOCABULARY)
        tile = min(tokens, TILE_TOKENS) * words * self.compute
        hidden = tokens * m.hidden * (self.stream + FLOAT32)  # the scored rows and their gradient
        return tile + hidden + tokens * _TILE_STATISTICS + cast * words * m.hidden * self.compute + unpacked

    def all_logits(self, tokens: int) -> int:
        """Bytes of all logits of ``tokens`` tokens, their float32 copy and its log-softmax."""
        return tokens * self.model.vocabulary * (self.compute + 2 * FLOAT32)

    def logits_and_gradients(self, tokens: int) -> int:
        """Bytes of a plain cross-entropy over all logits: log-softmax and two gradients of its size, in float32."""
        return tokens * self.model.vocabulary * 3 * FLOAT32

    def next_tokens(self, rows: int) -> int:
        """Bytes of choosing the next token of each row: logits, their float32 copy, and probabilities to draw from."""
        return rows * self.model.vocabulary * (self.compute + 3 * FLOAT32)
