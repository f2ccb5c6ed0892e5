"""What traces of the certificate study are made of: texts, the file, the second model's parts."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import texts  # noqa: E402
from gemma import Vocabulary, _attention  # noqa: E402
from trace_file import MAGIC, Recorder, TraceShape, make_positions  # noqa: E402


@pytest.mark.parametrize("name", sorted(texts.TEXTS))
@pytest.mark.parametrize("characters", [9_000, 150_000])
def test_texts_are_long_enough_and_the_same_each_time(name, characters):
    text = texts.TEXTS[name](characters)
    assert 0.95 * characters < len(text) <= characters
    assert text == texts.TEXTS[name](characters)


def test_needles_end_with_the_answers():
    text = texts.needles(20_000)
    end = text[text.index("Which numbers do the boxes have?") :]
    answers = [sentence for sentence in end.split(". ") if "number of the" in sentence]
    assert len(answers) == 8
    for answer in answers:
        words = answer.rstrip(".").split()
        fact = f"Remember: the number of the {words[-4]} box is {words[-1]}."
        assert fact in text[: -len(end)]


def test_positions_to_learn_from_come_before_those_to_judge():
    judged, sampled = make_positions(2000, judged=64, sampled=256)
    assert list(judged) == list(range(1936, 2000))
    assert len(set(sampled)) == 256
    assert sampled.min() >= 1000 and sampled.max() < 1936
    with pytest.raises(ValueError, match="too few"):
        make_positions(100, judged=30, sampled=30)


def test_a_trace_holds_what_was_shown(tmp_path):
    judged, sampled = make_positions(40, judged=3, sampled=5)
    shape = TraceShape([4, 7], query_heads=2, kv_heads=1, head_dim=3, tokens=40, scale=0.5,
                       judged=judged, sampled=sampled)
    recorder = Recorder(shape)
    generator = np.random.default_rng(1)
    q = generator.normal(size=(8, 40, 2, 3)).astype(np.float32)
    rows = generator.integers(0, 2**16, size=(2, 8, 40, 1, 3), dtype=np.uint16)
    for start in (0, 25):
        end = min(start + 25, 40)
        for layer in range(8):  # Layers that the trace does not hold are ignored.
            recorder.add_queries(layer, start, q[layer, start:end])
            recorder.add_rows(layer, start, rows[0, layer, start:end], rows[1, layer, start:end])
    path = tmp_path / "a.kvtrace"
    recorder.write(path)
    data = path.read_bytes()
    assert data[:8] == MAGIC
    assert struct.unpack("<7If", data[8:40]) == (2, 2, 1, 3, 40, 3, 5, 0.5)
    numbers = np.frombuffer(data, "<u4", count=2 + 3 + 5, offset=40)
    assert list(numbers) == [4, 7, *judged, *sampled]
    at = 40 + 4 * 10
    for layer in (4, 7):
        for kind in range(2):
            stored = np.frombuffer(data, "<u2", count=120, offset=at)
            assert (stored == rows[kind, layer].reshape(-1)).all()
            at += 240
        stored = np.frombuffer(data, "<f4", count=8 * 6, offset=at).reshape(8, 2, 3)
        assert (stored == q[layer, [*judged, *sampled]]).all()
        at += 4 * 48
    assert at == len(data)
    assert list(tmp_path.iterdir()) == [path]


def test_the_vocabulary_merges_the_best_scored_neighbours():
    tokens = ["<s>", "<0xC3>", "<0xA9>", "a", "b", "c", "ab", "bc", "abc", "▁", "▁a"]
    scores = [0, 0, 0, -9, -9, -9, -2, -1, -3, -9, -4]
    vocabulary = Vocabulary({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
                             "tokenizer.ggml.bos_token_id": 0})
    # "bc" is better than "ab", and only then "abc" is formed.
    assert vocabulary.encode("abc") == [0, 8]
    assert vocabulary.encode("ab a") == [0, 6, 10]
    # What has no token is spelt in bytes.
    assert vocabulary.encode("é") == [0, 1, 2]


@pytest.mark.parametrize("window", [None, 5])
def test_windowed_attention_is_that_of_a_plain_loop(window):
    generator = np.random.default_rng(2)
    q = generator.normal(size=(6, 4, 8)).astype(np.float32)
    keys, values = generator.normal(size=(2, 2, 16, 8)).astype(np.float32)
    out = _attention(q, keys, values, 0.4, window)
    for token in range(6):
        position = 10 + token
        first = 0 if window is None else position - window + 1
        for head in range(4):
            logits = 0.4 * keys[head // 2, first : position + 1].astype(np.float64) @ q[token, head]
            weights = np.exp(logits - logits.max())
            expected = weights @ values[head // 2, first : position + 1] / weights.sum()
            np.testing.assert_allclose(out[token, head], expected, rtol=1e-4, atol=1e-5)
