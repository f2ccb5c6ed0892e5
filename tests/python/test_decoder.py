"""The exported model in the C++ decoder against the demo's numpy model, on real weights."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from kvservice_demo.gguf_model import LayerWeights, LlamaWeights, find_installed_model, load_gguf
from kvservice_demo.llama import Llama
from kvservice_demo.local_attention import LocalAttention
from kvservice_demo.tokenizer import ChatTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/eval"))

import texts  # noqa: E402
from export_model import export_llama  # noqa: E402

PROGRAM = Path(os.environ.get("KVSERVICE_BIN_DIR", ROOT / "build/bin")) / "kvlogits"
TOKENS = 64
PREFILLED = 48
# K and V are rounded to bf16, so that a difference in the last bit of a float32 now and then
# becomes one of 2^-8: numpy differs from itself by .046 at most and .009 in the mean when it
# prefills one token instead of PREFILLED. The logits spread by 5.
LARGEST_DIFFERENCE = 0.1
MEAN_DIFFERENCE = 0.02


def rounded(weights: LlamaWeights) -> LlamaWeights:
    """The weights as the exported file holds them."""

    def matrix(tensor):
        return tensor.astype(np.float16).astype(np.float32) if tensor.ndim == 2 else tensor

    layers = [LayerWeights(**{field.name: matrix(getattr(layer, field.name))
                              for field in fields(layer)}) for layer in weights.layers]
    return LlamaWeights(matrix(weights.embedding), layers, weights.output_norm)


def numpy_logits(llama: Llama, ids: list[int]) -> np.ndarray:
    """Logits after token PREFILLED - 1 and each later one, which is a decode step."""
    attention = LocalAttention(llama.config, len(ids))
    rows = [llama.prefill(ids[:PREFILLED], attention.append_chunk)]
    for position in range(PREFILLED, len(ids)):
        rows.append(llama.decode(ids[position], position,
                                 lambda *row: attention.attend(*row).output))
    return np.stack(rows)


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """Logits after tokens PREFILLED - 1 and later: of the C++ decoder, and of numpy."""
    folder = tmp_path_factory.mktemp("decoder")
    model = load_gguf(find_installed_model())
    export_llama(folder / "smollm2.kvmodel", model)
    ids = ChatTokenizer(model.metadata).encode(texts.prose(4000))[:TOKENS]
    (folder / "tokens.json").write_text(json.dumps(ids))
    subprocess.run([PROGRAM, f"--model={folder}/smollm2.kvmodel", f"--prefill={PREFILLED}",
                    f"--tokens={folder}/tokens.json", f"--out={folder}/logits"], check=True)
    found = np.fromfile(folder / "logits", np.float32).reshape(TOKENS - PREFILLED + 1, -1)
    (folder / "smollm2.kvmodel").unlink()
    model = replace(model, weights=rounded(model.weights))
    return found, numpy_logits(Llama(model.config, model.weights), ids)


def test_logits_are_those_of_numpy(logits):
    found, expected = logits
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    assert difference.max() <= LARGEST_DIFFERENCE
    assert difference.mean() <= MEAN_DIFFERENCE


def test_next_tokens_are_those_of_numpy(logits):
    found, expected = logits
    margins = np.diff(np.sort(expected, axis=-1)[:, -2:], axis=-1)[:, 0]
    clear = margins > 2 * LARGEST_DIFFERENCE
    assert clear.sum() > len(expected) / 2
    assert np.array_equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])
