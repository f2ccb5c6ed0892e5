#!/usr/bin/env python3
"""Writes the weights of a small real model for decoder.h, which reads nothing else of it.

    build/venv/bin/python tests/eval/export_model.py smollm2 gemma3

writes build/eval/smollm2.kvmodel and build/eval/gemma3.kvmodel; files that are there already stay
unless --force is given. Gemma needs tests/eval/requirements.txt.

The file, little endian: magic "KVMODEL1"; u32 family (0 Llama, 1 Gemma 3), layers, query_heads,
kv_heads, head_dim, hidden, feed_forward, vocabulary; f32 scale, norm_epsilon; u32 window [layers]
(tokens that a query sees, itself included; 0 = all); f32 inverse_frequency [layers][head_dim / 2];
then the tensors, matrices as f16 [out][in] and the weights of norms as f32:

    embedding           [vocabulary][hidden]         the output projection too
    output_norm         [hidden]
    per layer
      attention_norm    [hidden]
      qkv               [(query_heads + 2 kv_heads) head_dim][hidden]
      q_norm, k_norm    [head_dim]                   Gemma 3 only
      output            [hidden][query_heads head_dim]
      post_attention    [hidden]                     Gemma 3 only
      feed_forward_norm [hidden]
      gate_up           [2 feed_forward][hidden]
      down              [hidden][feed_forward]
      post_feed_forward [hidden]                     Gemma 3 only

Rotary channels c and c + head_dim / 2 turn together. Dequantised weights are rounded to f16: that
is the model which is measured, dense or sparse.
"""

from __future__ import annotations

import argparse
import dataclasses
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "build/python"),
                str(ROOT / "build/eval_packages")]

import numpy as np  # noqa: E402
from gemma import Gemma, load_gemma  # noqa: E402

from kvservice.tensors import Float32Array  # noqa: E402
from kvservice_demo.gguf_model import GgufModel, find_installed_model, load_gguf  # noqa: E402

MAGIC = b"KVMODEL1"
LLAMA, GEMMA3 = 0, 1
_FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class ModelHeader:
    """Everything of a model but its weights; fields are named as in the module's description."""

    family: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    feed_forward: int
    vocabulary: int
    scale: float
    norm_epsilon: float
    windows: Sequence[int]
    inverse_frequencies: np.ndarray  # [layers, head_dim / 2]


def write_model(path: Path, header: ModelHeader, tensors: Iterator[Float32Array]) -> None:
    """Writes the file in one go; `tensors` come in the file's order, two axes or one.

    ValueError if a weight does not fit into f16.
    """
    counts = (header.family, header.layers, header.query_heads, header.kv_heads, header.head_dim,
              header.hidden, header.feed_forward, header.vocabulary)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(MAGIC + struct.pack("<8I2f", *counts, header.scale, header.norm_epsilon))
        file.write(np.asarray(header.windows, "<u4").tobytes())
        file.write(np.asarray(header.inverse_frequencies, "<f4").tobytes())
        for tensor in tensors:
            if not np.abs(tensor).max() <= _FLOAT16_MAX:
                raise ValueError(f"{path.name}: a weight is beyond float16")
            file.write(tensor.astype("<f2" if tensor.ndim == 2 else "<f4").tobytes())
    unfinished.rename(path)


def export_llama(path: Path, model: GgufModel) -> None:
    """Writes a Llama-family model."""
    config, weights = model.config, model.weights
    header = ModelHeader(
        LLAMA, config.layer_count, config.query_head_count, config.kv_head_count, config.head_dim,
        config.hidden_size, config.feed_forward_size, len(weights.embedding), config.scale,
        config.norm_epsilon, [0] * config.layer_count,
        np.tile(config.inverse_frequencies, (config.layer_count, 1)))

    def tensors() -> Iterator[Float32Array]:
        yield weights.embedding
        yield weights.output_norm
        for layer in weights.layers:
            for field in dataclasses.fields(layer):
                yield getattr(layer, field.name)

    write_model(path, header, tensors())


def export_gemma3(path: Path, model: Gemma) -> None:
    """Writes a Gemma 3 text model."""
    config = model.config
    half = np.arange(config.head_dim // 2, dtype=np.float64) / (config.head_dim // 2)
    embedding = model.read("token_embd")
    header = ModelHeader(
        GEMMA3, config.layers, config.query_heads, config.kv_heads, config.head_dim, config.hidden,
        len(model.read("blk.0.ffn_gate")), len(embedding), config.scale, config.epsilon,
        [config.window_of(layer) or 0 for layer in range(config.layers)],
        np.stack([config.rope_base_of(layer) ** -half for layer in range(config.layers)]))

    def tensors() -> Iterator[Float32Array]:
        yield embedding
        yield model.read("output_norm")
        for layer in range(config.layers):
            prefix = f"blk.{layer}."
            yield model.read(prefix + "attn_norm")
            yield np.concatenate([model.read(f"{prefix}attn_{name}") for name in "qkv"])
            for name in ("attn_q_norm", "attn_k_norm", "attn_output", "post_attention_norm",
                         "ffn_norm"):
                yield model.read(prefix + name)
            yield np.concatenate([model.read(f"{prefix}ffn_{name}") for name in ("gate", "up")])
            yield model.read(prefix + "ffn_down")
            yield model.read(prefix + "post_ffw_norm")

    write_model(path, header, tensors())


def export(name: str, folder: Path, force: bool = False) -> Path:
    """Makes <folder>/<name>.kvmodel if it is not there."""
    path = folder / f"{name}.kvmodel"
    if path.exists() and not force:
        return path
    if name == "smollm2":
        export_llama(path, load_gguf(find_installed_model()))
    else:
        export_gemma3(path, load_gemma(ROOT / "build/eval_packages/gemma.gguf"))
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB", flush=True)
    return path


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="export_model.py",
                                     description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", choices=("smollm2", "gemma3"))
    parser.add_argument("--out", type=Path, default=ROOT / "build/eval", help="folder")
    parser.add_argument("--force", action="store_true", help="write files that are there already")
    options = parser.parse_args()
    for name in options.models:
        export(name, options.out, options.force)
    return 0


if __name__ == "__main__":
    sys.exit(main())
