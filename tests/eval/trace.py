#!/usr/bin/env python3
"""Runs a small real model over real text and writes what its attention saw (see trace_file.py).

    build/venv/bin/python tests/eval/trace.py --model=smollm2 --text=prose --tokens=8192

writes build/traces/smollm2-8192-prose.kvtrace; --all writes the traces of the certificate study
that are not there yet. Uses one thread at low priority. Gemma needs tests/eval/requirements.txt.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Read once, when numpy is loaded.
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "build/python"),
                str(ROOT / "build/eval_packages")]

import numpy as np  # noqa: E402
from gemma import GEMMA_CHARACTERS_PER_TOKEN, load_gemma  # noqa: E402
from texts import TEXTS  # noqa: E402
from trace_file import Recorder, TraceShape, make_positions  # noqa: E402

from kvservice.tensors import Float32Array  # noqa: E402
from kvservice_demo.gguf_model import LayerWeights, find_installed_model, load_gguf  # noqa: E402
from kvservice_demo.llama import Llama  # noqa: E402
from kvservice_demo.tokenizer import ChatTokenizer  # noqa: E402

_NICE = 15
# Generous, so that the text has enough tokens; what is too much is cut off at its start.
_CHARACTERS_PER_TOKEN = 5.5
_LOWEST_CHARACTERS = 4000
# Models, lengths and texts of the certificate study; 32,000 tokens are 500 whole blocks.
_STUDY_TEXTS = ("code", "needles", "prose")
_STUDY = (("smollm2", 2048), ("smollm2", 8192), ("gemma3", 32000))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="trace.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=("smollm2", "gemma3"), default="smollm2")
    parser.add_argument("--text", choices=sorted(TEXTS), default="prose")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--judged", type=int, default=64, help="queries at the end")
    parser.add_argument("--sampled", type=int, default=256, help="queries to learn tables from")
    parser.add_argument("--all", action="store_true", help="every trace of the study")
    parser.add_argument("--out", type=Path, default=ROOT / "build/traces", help="folder")
    return parser.parse_args()


class _RecordingLlama(Llama):
    """A Llama that shows the rotated queries of every chunk to a recorder."""

    def __init__(self, *arguments: object, recorder: Recorder) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._recorder = recorder
        self._layer_of = {id(layer): index for index, layer in enumerate(self._weights.layers)}

    def _project(
        self, weights: LayerWeights, hidden: Float32Array, start: int
    ) -> tuple[Float32Array, Float32Array, Float32Array]:
        q, k, v = super()._project(weights, hidden, start)
        self._recorder.add_queries(self._layer_of[id(weights)], start, q)
        return q, k, v


def _last_tokens(ids: list[int], count: int) -> list[int]:
    if len(ids) < count:
        raise ValueError(f"the text has {len(ids)} tokens, {count} wanted")
    return ids[-count:]


def trace_smollm2(options: argparse.Namespace) -> Recorder:
    """One pass of the demo's model."""
    model = load_gguf(find_installed_model())
    config = model.config
    text = TEXTS[options.text](int(options.tokens * _CHARACTERS_PER_TOKEN) + _LOWEST_CHARACTERS)
    ids = _last_tokens(ChatTokenizer(model.metadata).encode(text), options.tokens)
    judged, sampled = make_positions(options.tokens, options.judged, options.sampled)
    recorder = Recorder(TraceShape(range(config.layer_count), config.query_head_count,
                                   config.kv_head_count, config.head_dim, options.tokens,
                                   config.scale, judged, sampled))
    llama = _RecordingLlama(config, model.weights, recorder=recorder)

    def on_chunk(start: int, k: np.ndarray, v: np.ndarray) -> None:
        for layer in range(config.layer_count):
            recorder.add_rows(layer, start, k[layer], v[layer])

    llama.prefill(ids, on_chunk)
    return recorder


def trace_gemma3(options: argparse.Namespace) -> Recorder:
    """One pass of the second family; only its layers without a sliding window are recorded."""
    gemma = load_gemma(ROOT / "build/eval_packages/gemma.gguf")
    text = TEXTS[options.text](int(options.tokens * GEMMA_CHARACTERS_PER_TOKEN))
    ids = gemma.encode(text)
    ids = ids[:1] + _last_tokens(ids[1:], options.tokens - 1)  # The start token is its sink.
    judged, sampled = make_positions(options.tokens, options.judged, options.sampled)
    config = gemma.config
    recorder = Recorder(TraceShape(config.global_layers, config.query_heads, config.kv_heads,
                                   config.head_dim, options.tokens, config.scale, judged, sampled))
    gemma.trace(ids, recorder)
    return recorder


def write_trace(options: argparse.Namespace) -> None:
    """Makes one trace file and says so."""
    started_s = time.monotonic()
    recorder = {"smollm2": trace_smollm2, "gemma3": trace_gemma3}[options.model](options)
    path = trace_path(options)
    recorder.write(path)
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB in {time.monotonic() - started_s:.0f} s")


def trace_path(options: argparse.Namespace) -> Path:
    """Where a trace goes."""
    return options.out / f"{options.model}-{options.tokens}-{options.text}.kvtrace"


def main() -> int:
    """The program; returns its exit status."""
    options = parse_arguments()
    os.nice(_NICE)
    if not options.all:
        write_trace(options)
        return 0
    for model, tokens in _STUDY:
        for text in _STUDY_TEXTS:
            one = argparse.Namespace(**(vars(options) | {"model": model, "tokens": tokens,
                                                         "text": text}))
            if not trace_path(one).exists():
                write_trace(one)
    return 0


if __name__ == "__main__":
    sys.exit(main())
