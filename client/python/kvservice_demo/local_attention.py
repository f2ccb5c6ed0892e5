"""Exact attention over a local copy of the cache: the oracle that every reply of the service is
checked against.

Everything is float64. The products q.k are exact (24 bits times 8 bits), so a mass computed here is
wrong by a few units in the fifteenth digit, far below the outward rounding of a certificate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvservice.tensors import Bf16Array, from_bf16
from kvservice_demo.gguf_model import LlamaConfig


@dataclass(frozen=True)
class ExactAttention:
    """Attention of one query token over all tokens of one layer, exact up to float64 rounding."""

    output: np.ndarray  # [query heads, head_dim]
    lse: np.ndarray  # [query heads], natural log of the sum of exp(scale * q.k)
    mass: np.ndarray  # [query heads, tokens], softmax weights; each row sums to 1

    def kept_mass(self, kept: list[np.ndarray]) -> np.ndarray:
        """Mass of the kept positions per query head; `kept` holds one index array per KV head."""
        return self._sum_per_group(kept)

    def dropped_mass(self, kept: list[np.ndarray]) -> np.ndarray:
        """Mass outside the kept positions per query head, [query heads].

        Sums the dropped weights themselves: one minus the kept mass would lose every digit of a
        small result, and is not zero when nothing was dropped.
        """
        tokens = self.mass.shape[1]
        return self._sum_per_group([_complement(positions, tokens) for positions in kept])

    def _sum_per_group(self, positions: list[np.ndarray]) -> np.ndarray:
        group = self.mass.shape[0] // len(positions)
        heads = np.empty(self.mass.shape[0])
        for kv_head, chosen in enumerate(positions):
            rows = slice(kv_head * group, (kv_head + 1) * group)
            heads[rows] = self.mass[rows, chosen].sum(axis=1)
        return heads


class LocalAttention:
    """K and V of one sequence, all layers, and dense attention over them.

    Not safe to share between threads. Its capacity is fixed: K and V take 16 bytes * layers *
    KV heads * head_dim per token.
    """

    def __init__(self, config: LlamaConfig, capacity_tokens: int) -> None:
        self._config = config
        shape = (config.layer_count, config.kv_head_count, capacity_tokens, config.head_dim)
        self._keys = np.empty(shape, np.float64)
        self._values = np.empty(shape, np.float64)
        self._lengths = [0] * config.layer_count

    def length(self, layer: int) -> int:
        """Tokens that a layer holds."""
        return self._lengths[layer]

    def append_chunk(self, start: int, k: Bf16Array, v: Bf16Array) -> None:
        """Adds the same tokens to every layer; k, v [layers, tokens, KV heads, head_dim]."""
        for layer in range(self._config.layer_count):
            if self._lengths[layer] != start:
                raise ValueError(f"layer {layer} holds {self._lengths[layer]} tokens, not {start}")
            self._append(layer, k[layer], v[layer])

    def truncate(self, length: int) -> None:
        """Forgets all tokens from position `length` on, in every layer."""
        self._lengths = [min(held, length) for held in self._lengths]

    def attend(self, layer: int, q: np.ndarray, k: Bf16Array, v: Bf16Array) -> ExactAttention:
        """Appends one token and attends over all tokens, the new one included.

        q [query heads, head_dim]; k, v [KV heads, head_dim].
        """
        self._append(layer, k[None], v[None])
        length, config = self._lengths[layer], self._config
        grouped = q.astype(np.float64).reshape(config.kv_head_count, config.group_size, -1)
        scores = config.scale * (grouped @ self._keys[layer, :, :length].swapaxes(1, 2))
        peak = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - peak)
        total = weights.sum(axis=-1, keepdims=True)
        weights /= total
        output = weights @ self._values[layer, :, :length]
        heads = config.query_head_count
        return ExactAttention(
            output=output.reshape(heads, -1),
            lse=(peak + np.log(total)).reshape(heads),
            mass=weights.reshape(heads, length),
        )

    def attend_output(
        self, layer: int, q: np.ndarray, k: Bf16Array, v: Bf16Array
    ) -> np.ndarray:
        """`attend` in the form that `Llama.decode` takes: the float32 output alone."""
        return self.attend(layer, q, k, v).output.astype(np.float32)

    def _append(self, layer: int, k: Bf16Array, v: Bf16Array) -> None:
        start, end = self._lengths[layer], self._lengths[layer] + len(k)
        if end > self._keys.shape[2]:
            capacity = self._keys.shape[2]
            raise ValueError(f"layer {layer}: {end} tokens exceed the capacity {capacity}")
        self._keys[layer, :, start:end] = from_bf16(k).swapaxes(0, 1)
        self._values[layer, :, start:end] = from_bf16(v).swapaxes(0, 1)
        self._lengths[layer] = end


def _complement(positions: np.ndarray, tokens: int) -> np.ndarray:
    dropped = np.ones(tokens, dtype=bool)
    dropped[positions] = False
    return dropped
