"""The decoder against a naive float64 loop on a tiny random model, and exact local attention."""

import numpy as np
import pytest

from kvservice.tensors import from_bf16, to_bf16
from kvservice_demo.gguf_model import (
    LayerWeights,
    LlamaConfig,
    LlamaWeights,
    split_rotary_halves,
)
from kvservice_demo.llama import Llama
from kvservice_demo.local_attention import LocalAttention

CONFIG = LlamaConfig(
    layer_count=2,
    query_head_count=6,
    kv_head_count=2,
    head_dim=8,
    hidden_size=16,
    feed_forward_size=24,
    context_tokens_max=64,
    rope_base=100.0,
    norm_epsilon=1e-5,
)
VOCABULARY = 11
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]


def random_weights(seed=1):
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-1]))

    def norm():
        return 1 + matrix(CONFIG.hidden_size) / 4

    heads = CONFIG.query_head_count + 2 * CONFIG.kv_head_count
    layers = [
        LayerWeights(
            attention_norm=norm(),
            qkv=2 * matrix(heads * CONFIG.head_dim, CONFIG.hidden_size),
            output=matrix(CONFIG.hidden_size, CONFIG.query_head_count * CONFIG.head_dim),
            feed_forward_norm=norm(),
            gate_up=matrix(2 * CONFIG.feed_forward_size, CONFIG.hidden_size),
            down=matrix(CONFIG.hidden_size, CONFIG.feed_forward_size),
        )
        for _ in range(CONFIG.layer_count)
    ]
    return LlamaWeights(matrix(VOCABULARY, CONFIG.hidden_size), layers, norm())


def naive_norm(x, weight):
    return x / np.sqrt((x * x).mean() + CONFIG.norm_epsilon) * weight


def naive_rotate(head, position):
    half = CONFIG.head_dim // 2
    turned = np.empty(CONFIG.head_dim)
    for i in range(half):
        angle = position * CONFIG.rope_base ** (-2 * i / CONFIG.head_dim)
        a, b = head[i], head[i + half]
        turned[i] = a * np.cos(angle) - b * np.sin(angle)
        turned[i + half] = b * np.cos(angle) + a * np.sin(angle)
    return turned


def naive_attention(q, keys, values):
    """One query head over lists of keys and values."""
    scores = np.array([CONFIG.scale * float(q @ key) for key in keys])
    weights = np.exp(scores - scores.max())
    return sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True))


def naive_layer(weights, x, position, keys, values):
    """One token through one layer; keys and values are lists [KV head] of lists [position]."""
    d, query_heads, kv_heads = CONFIG.head_dim, CONFIG.query_head_count, CONFIG.kv_head_count
    rows = (weights.qkv.astype(np.float64) @ naive_norm(x, weights.attention_norm)).reshape(-1, d)
    for head in range(kv_heads):
        key = naive_rotate(rows[query_heads + head], position)
        keys[head].append(from_bf16(to_bf16(key)).astype(np.float64))
        value = rows[query_heads + kv_heads + head]
        values[head].append(from_bf16(to_bf16(value)).astype(np.float64))
    out = np.empty((query_heads, d))
    for head in range(query_heads):
        kv_head = head * kv_heads // query_heads
        q = naive_rotate(rows[head], position)
        out[head] = naive_attention(q, keys[kv_head], values[kv_head])
    x = x + weights.output.astype(np.float64) @ out.reshape(-1)
    gate, up = np.split(weights.gate_up @ naive_norm(x, weights.feed_forward_norm), 2)
    return x + weights.down @ (gate / (1 + np.exp(-gate)) * up)


def naive_logits(weights, token_ids):
    caches = [([[] for _ in range(CONFIG.kv_head_count)], [[] for _ in range(CONFIG.kv_head_count)])
              for _ in weights.layers]
    for position, token in enumerate(token_ids):
        x = weights.embedding[token].astype(np.float64)
        for layer, (keys, values) in zip(weights.layers, caches, strict=True):
            x = naive_layer(layer, x, position, keys, values)
    return weights.embedding.astype(np.float64) @ naive_norm(x, weights.output_norm)


# A float32 pass may round a key to the other bf16 neighbour than float64 does, which moves a logit
# by up to 2^-9 of a score; an error in rotation, grouping or masking moves it by tenths.
TOLERANCE = 5e-3


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 256])
def test_prefill_agrees_with_the_naive_loop(chunk_tokens):
    weights = random_weights()
    logits = Llama(CONFIG, weights).prefill(PROMPT, lambda *_: None, chunk_tokens)
    np.testing.assert_allclose(logits, naive_logits(weights, PROMPT), atol=TOLERANCE)


def test_decoding_agrees_with_the_naive_loop():
    weights = random_weights(2)
    model, cache = Llama(CONFIG, weights), LocalAttention(CONFIG, len(PROMPT))
    split = 6
    model.prefill(PROMPT[:split], cache.append_chunk)
    for position in range(split, len(PROMPT)):
        logits = model.decode(PROMPT[position], position, cache.attend_output)
    np.testing.assert_allclose(logits, naive_logits(weights, PROMPT), atol=TOLERANCE)


def test_prefill_hands_out_the_same_cache_for_every_chunk_size():
    model = Llama(CONFIG, random_weights())
    whole, pieces = [], []
    model.prefill(PROMPT, lambda start, k, v: whole.append((start, k, v)), 64)
    model.prefill(PROMPT, lambda start, k, v: pieces.append((start, k, v)), 4)
    assert [start for start, _, _ in pieces] == [0, 4, 8, 12]
    joined = np.concatenate([k for _, k, _ in pieces], axis=1)
    shape = (CONFIG.layer_count, len(PROMPT), CONFIG.kv_head_count, CONFIG.head_dim)
    assert joined.shape == whole[0][1].shape == shape
    np.testing.assert_allclose(from_bf16(joined), from_bf16(whole[0][1]), atol=0.05)
    np.testing.assert_array_equal(joined[0], whole[0][1][0])


@pytest.mark.parametrize("count", [0, CONFIG.context_tokens_max + 1])
def test_prefill_refuses_a_prompt_that_does_not_fit(count):
    with pytest.raises(ValueError, match="a prompt has 1 to 64 tokens"):
        Llama(CONFIG, random_weights()).prefill([1] * count, lambda *_: None)


def test_split_rotary_halves():
    rows = np.arange(8, dtype=np.float32)[:, None]
    halves = split_rotary_halves(rows, head_count=2)
    np.testing.assert_array_equal(halves[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


def filled_cache(tokens=20):
    rng = np.random.default_rng(3)
    shape = (CONFIG.layer_count, tokens, CONFIG.kv_head_count, CONFIG.head_dim)
    cache = LocalAttention(CONFIG, tokens + 1)
    cache.append_chunk(0, to_bf16(rng.standard_normal(shape)), to_bf16(rng.standard_normal(shape)))
    token = (CONFIG.kv_head_count, CONFIG.head_dim)
    k, v = to_bf16(rng.standard_normal(token)), to_bf16(rng.standard_normal(token))
    return cache, rng.standard_normal((CONFIG.query_head_count, CONFIG.head_dim)), k, v


def test_masses_sum_to_one_and_split_into_kept_and_dropped():
    cache, q, k, v = filled_cache()
    exact = cache.attend(1, q, k, v)
    np.testing.assert_allclose(exact.mass.sum(axis=1), 1, rtol=1e-14)
    kept = [np.array([0, 3, 20]), np.arange(5, 21)]
    np.testing.assert_allclose(exact.kept_mass(kept) + exact.dropped_mass(kept), 1, rtol=1e-14)
    np.testing.assert_allclose(exact.kept_mass(kept)[:3], exact.mass[:3, [0, 3, 20]].sum(axis=1))
    np.testing.assert_allclose(exact.kept_mass(kept)[3:], exact.mass[3:, 5:].sum(axis=1))


def test_nothing_dropped_is_exactly_zero():
    cache, q, k, v = filled_cache()
    exact = cache.attend(0, q, k, v)
    assert np.all(exact.dropped_mass([np.arange(21), np.arange(21)]) == 0.0)


def test_lse_and_output_agree_with_the_definition():
    cache, q, k, v = filled_cache()
    exact = cache.attend(0, q, k, v)
    keys, values = cache._keys[0, 1, :21], cache._values[0, 1, :21]
    scores = CONFIG.scale * (keys @ q[4])
    np.testing.assert_allclose(exact.lse[4], np.log(np.exp(scores).sum()), rtol=1e-13)
    np.testing.assert_allclose(exact.output[4], naive_attention(q[4], keys, values), rtol=1e-12)


def test_truncate_forgets_and_capacity_is_a_bound():
    cache, q, k, v = filled_cache()
    before = cache.attend(0, q, k, v)
    with pytest.raises(ValueError, match="capacity"):
        cache.attend(0, q, k, v)
    cache.truncate(20)
    assert cache.length(0) == 20 and cache.length(1) == 20
    np.testing.assert_array_equal(cache.attend(0, q, k, v).mass, before.mass)


def test_chunks_must_follow_each_other():
    cache, _, _, _ = filled_cache()
    empty = np.zeros((CONFIG.layer_count, 0, CONFIG.kv_head_count, CONFIG.head_dim), np.uint16)
    with pytest.raises(ValueError, match="holds 20 tokens, not 19"):
        cache.append_chunk(19, empty, empty)
