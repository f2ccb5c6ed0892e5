"""The forward pass of a Llama-family decoder in numpy float32.

K (after rotation) and V are rounded to bf16 before anything reads them, in the prefill as in
decoding. A cache that stores bf16 therefore holds exactly the numbers that the model itself saw,
wherever that cache lives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvservice.tensors import Bf16Array, Float32Array, from_bf16, to_bf16
from kvservice_demo.gguf_model import LayerWeights, LlamaConfig, LlamaWeights

# attend(layer, q [query heads, head_dim], k, v [KV heads, head_dim]) -> output [query heads,
# head_dim]. It stores k and v as the newest token of that layer and then attends over all tokens of
# the layer, the newest included.
Attend = Callable[[int, Float32Array, Bf16Array, Bf16Array], Float32Array]

# on_chunk(start position, k, v), both [layers, tokens, KV heads, head_dim]: the cache entries of
# one prefill chunk.
OnChunk = Callable[[int, Bf16Array, Bf16Array], None]

# on_queries(positions, queries): a few queries of the chunk that on_chunk gives next and their
# positions [n], rotated, [layers, n, query heads, head_dim], n about QUERY_SAMPLE_TOKENS.
OnQueries = Callable[[list[int], Float32Array], None]
QUERY_SAMPLE_TOKENS = 16

# One chunk's scores (3 heads x 256 rows x 3,000 columns) take 9 MB; larger chunks gain nothing over
# this.
PREFILL_CHUNK_TOKENS = 256


class Llama:
    """A decoder without a cache of its own: the caller's `attend` owns the keys and values.

    Immutable after construction; safe to share between threads.
    """

    def __init__(self, config: LlamaConfig, weights: LlamaWeights) -> None:
        self.config = config
        self._weights = weights
        angles = np.outer(np.arange(config.context_tokens_max), config.inverse_frequencies)
        self._cos = np.cos(angles).astype(np.float32)  # [position, head_dim / 2]
        self._sin = np.sin(angles).astype(np.float32)

    def prefill(
        self,
        token_ids: Sequence[int],
        on_chunk: OnChunk,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        on_queries: OnQueries | None = None,
    ) -> Float32Array:
        """Reads a prompt and returns the logits [vocabulary] after its last token.

        `on_chunk` receives every chunk's K and V in order and owns the arrays. ValueError if the
        prompt is empty or longer than the context.
        """
        config = self.config
        if not 0 < len(token_ids) <= config.context_tokens_max:
            raise ValueError(
                f"a prompt has 1 to {config.context_tokens_max} tokens, got {len(token_ids)}"
            )
        shape = (config.layer_count, config.kv_head_count, len(token_ids), config.head_dim)
        keys, values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        hidden = np.empty((0, config.hidden_size), np.float32)
        for start in range(0, len(token_ids), chunk_tokens):
            chunk = np.asarray(token_ids[start : start + chunk_tokens])
            hidden, k_bits, v_bits, queries = self._prefill_chunk(chunk, start, keys, values)
            if on_queries is not None:
                stride = _sample_stride(len(chunk))
                on_queries(list(range(start, start + len(chunk), stride)), queries)
            on_chunk(start, k_bits, v_bits)
        return self._logits(hidden[-1])

    def decode(self, token_id: int, position: int, attend: Attend) -> Float32Array:
        """Runs one token at `position` through all layers; returns its logits [vocabulary]."""
        hidden = self._weights.embedding[token_id]
        for layer, weights in enumerate(self._weights.layers):
            q, k, v = self._project(weights, hidden[None], position)
            out = attend(layer, q[0], to_bf16(k[0]), to_bf16(v[0]))
            hidden = hidden + weights.output @ out.astype(np.float32, copy=False).reshape(-1)
            hidden = hidden + self._feed_forward(weights, hidden[None])[0]
        return self._logits(hidden)

    def _prefill_chunk(
        self, chunk: np.ndarray, start: int, keys: Float32Array, values: Float32Array
    ) -> tuple[Float32Array, Bf16Array, Bf16Array, Float32Array]:
        config, end = self.config, start + len(chunk)
        stride = _sample_stride(len(chunk))
        queries = []
        shape = (config.layer_count, len(chunk), config.kv_head_count, config.head_dim)
        k_bits, v_bits = np.empty(shape, np.uint16), np.empty(shape, np.uint16)
        hidden = self._weights.embedding[chunk]
        for layer, weights in enumerate(self._weights.layers):
            q, k, v = self._project(weights, hidden, start)
            queries.append(q[::stride])
            k_bits[layer], v_bits[layer] = to_bf16(k), to_bf16(v)
            keys[layer, :, start:end] = from_bf16(k_bits[layer]).swapaxes(0, 1)
            values[layer, :, start:end] = from_bf16(v_bits[layer]).swapaxes(0, 1)
            out = causal_attention(q, keys[layer, :, :end], values[layer, :, :end], config.scale)
            hidden = hidden + out.reshape(len(chunk), -1) @ weights.output.T
            hidden = hidden + self._feed_forward(weights, hidden)
        return hidden, k_bits, v_bits, np.stack(queries)

    def _project(
        self, weights: LayerWeights, hidden: Float32Array, start: int
    ) -> tuple[Float32Array, Float32Array, Float32Array]:
        """Rotated q and k, and v, of `hidden` [tokens, hidden]; each [tokens, heads, head_dim]."""
        config = self.config
        rows = _multiply(self._norm(hidden, weights.attention_norm), weights.qkv)
        heads = rows.reshape(len(hidden), -1, config.head_dim)
        rotated_count = config.query_head_count + config.kv_head_count
        rotated = self._rotate(heads[:, :rotated_count], start)
        split = config.query_head_count
        return rotated[:, :split], rotated[:, split:], heads[:, rotated_count:]

    def _rotate(self, heads: Float32Array, start: int) -> Float32Array:
        """Rotary embedding of [tokens, heads, head_dim] at positions start, start + 1, ..."""
        cos = self._cos[start : start + len(heads), None]
        sin = self._sin[start : start + len(heads), None]
        half = self.config.head_dim // 2
        first, second = heads[..., :half], heads[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _norm(self, hidden: Float32Array, weight: Float32Array) -> Float32Array:
        mean_square = np.mean(np.square(hidden), axis=-1, keepdims=True)
        return hidden / np.sqrt(mean_square + np.float32(self.config.norm_epsilon)) * weight

    def _feed_forward(self, weights: LayerWeights, hidden: Float32Array) -> Float32Array:
        gate_up = _multiply(self._norm(hidden, weights.feed_forward_norm), weights.gate_up)
        gate, up = np.split(gate_up, 2, axis=-1)
        # silu(x) = x * sigmoid(x), with the sigmoid as a tanh because that one cannot overflow.
        half = np.float32(0.5)
        return _multiply(gate * (half * np.tanh(half * gate) + half) * up, weights.down)

    def _logits(self, hidden: Float32Array) -> Float32Array:
        return self._weights.embedding @ self._norm(hidden, self._weights.output_norm)


def _sample_stride(chunk_tokens: int) -> int:
    return -(-chunk_tokens // QUERY_SAMPLE_TOKENS)


def _multiply(rows: Float32Array, matrix: Float32Array) -> Float32Array:
    """rows [n, in] times matrix [out, in] transposed; one row takes the matrix-vector path."""
    if len(rows) == 1:
        return (matrix @ rows[0])[None]
    return rows @ matrix.T


def causal_attention(
    q: Float32Array, keys: Float32Array, values: Float32Array, scale: float
) -> Float32Array:
    """Attention of the last tokens of a sequence over the sequence, causal among themselves.

    q [tokens, query heads, head_dim]; keys, values [KV heads, length, head_dim], of which the last
    `tokens` are q's own. Returns [tokens, query heads, head_dim].
    """
    tokens, query_heads, head_dim = q.shape
    kv_heads, length, _ = keys.shape
    group = query_heads // kv_heads
    past = length - tokens
    hidden_future = np.triu(np.full((tokens, tokens), -np.inf, np.float32), k=1)
    out = np.empty((kv_heads, group, tokens, head_dim), np.float32)
    grouped = (q * np.float32(scale)).reshape(tokens, kv_heads, group, head_dim)
    for head in range(kv_heads):
        rows = grouped[:, head].swapaxes(0, 1).reshape(group * tokens, head_dim)
        scores = (rows @ keys[head].T).reshape(group, tokens, length)
        scores[..., past:] += hidden_future
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        weighted = scores.reshape(group * tokens, length) @ values[head]
        out[head] = weighted.reshape(group, tokens, head_dim) / total
    return out.transpose(2, 0, 1, 3).reshape(tokens, query_heads, head_dim)
