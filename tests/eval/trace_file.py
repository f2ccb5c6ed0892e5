"""The binary form of a trace: what a text made a model's attention see. trace.cc reads it.

Little endian: magic "KVTRACE1"; u32 layers, query_heads, kv_heads, head_dim, tokens, judged,
sampled; f32 scale; u32 layer numbers [layers], judged positions [judged], sampled positions
[sampled]; then per layer

    keys, values   bf16 [tokens][kv_heads][head_dim]        K after rotation
    judged         f32  [judged][query_heads][head_dim]     queries that certificates are judged on
    sampled        f32  [sampled][query_heads][head_dim]    queries to learn sketch tables from
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAGIC = b"KVTRACE1"


@dataclass(frozen=True)
class TraceShape:
    """What a trace holds; positions are token indices."""

    layers: Sequence[int]
    query_heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    scale: float
    judged: np.ndarray
    sampled: np.ndarray


def make_positions(tokens: int, judged: int, sampled: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `judged` positions, and `sampled` ones spread over the second half before them.

    Rotary embeddings turn slow channels by a fraction of a circle over a whole text, so queries
    show what later ones look like only if they come from about the same positions.
    """
    if tokens < 2 * (judged + sampled):
        raise ValueError(f"{tokens} tokens are too few for {judged} + {sampled} queries")
    spread = np.linspace(tokens // 2, tokens - judged - 1, sampled).astype(np.uint32)
    return np.arange(tokens - judged, tokens, dtype=np.uint32), spread


@dataclass
class Recorder:
    """Takes what a forward pass computes, chunk by chunk, and writes the file at the end."""

    shape: TraceShape
    _keys: dict[int, np.ndarray] = field(default_factory=dict)
    _values: dict[int, np.ndarray] = field(default_factory=dict)
    _queries: dict[int, np.ndarray] = field(default_factory=dict)
    _row_of: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Makes room for everything."""
        shape = self.shape
        rows = (shape.tokens, shape.kv_heads, shape.head_dim)
        wanted = np.concatenate([shape.judged, shape.sampled])
        self._row_of = {int(position): row for row, position in enumerate(wanted)}
        for layer in shape.layers:
            self._keys[layer] = np.zeros(rows, np.uint16)
            self._values[layer] = np.zeros(rows, np.uint16)
            self._queries[layer] = np.zeros((len(wanted), shape.query_heads, shape.head_dim),
                                            np.float32)

    def add_queries(self, layer: int, start: int, q: np.ndarray) -> None:
        """Rotated queries of a chunk, [tokens, query heads, head_dim]."""
        if layer not in self._queries:
            return
        for index in range(len(q)):
            row = self._row_of.get(start + index)
            if row is not None:
                self._queries[layer][row] = q[index]

    def add_rows(self, layer: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        """Bits of K (rotated) and V of a chunk, [tokens, KV heads, head_dim] each."""
        if layer in self._keys:
            self._keys[layer][start : start + len(k)] = k
            self._values[layer][start : start + len(v)] = v

    def write(self, path: Path) -> None:
        """Writes the file in one go: a reader never sees half of it."""
        shape = self.shape
        counts = (len(shape.layers), shape.query_heads, shape.kv_heads, shape.head_dim,
                  shape.tokens, len(shape.judged), len(shape.sampled))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            file.write(MAGIC + struct.pack("<7If", *counts, shape.scale))
            for positions in (np.asarray(shape.layers), shape.judged, shape.sampled):
                file.write(positions.astype("<u4").tobytes())
            for layer in shape.layers:
                file.write(self._keys[layer].astype("<u2").tobytes())
                file.write(self._values[layer].astype("<u2").tobytes())
                file.write(self._queries[layer].astype("<f4").tobytes())
        unfinished.rename(path)
