"""Models for the tests: a real small one from its GGUF file, and tiny ones with random weights."""

import functools

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from kvservice_demo.gguf_model import find_installed_model, load_gguf
from kvservice_demo.tokenizer import ChatTokenizer


@functools.cache
def smollm2():
    """SmolLM2-135M-Instruct in float32 as transformers' own class, and its tokenizer."""
    gguf = load_gguf(find_installed_model())
    shape, weights = gguf.config, gguf.weights
    config = LlamaConfig(
        vocab_size=len(weights.embedding),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.feed_forward_size,
        num_hidden_layers=shape.layer_count,
        num_attention_heads=shape.query_head_count,
        num_key_value_heads=shape.kv_head_count,
        max_position_embeddings=shape.context_tokens_max,
        rms_norm_eps=shape.norm_epsilon,
        rope_theta=shape.rope_base,
        tie_word_embeddings=True,
    )
    tokenizer = ChatTokenizer(gguf.metadata)
    config.eos_token_id = tokenizer.end_of_turn_id
    config.pad_token_id = tokenizer.end_of_turn_id
    state = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.output_norm,
    }
    queries = shape.query_head_count * shape.head_dim
    keys = shape.kv_head_count * shape.head_dim
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        q, k, v = layer.qkv[:queries], layer.qkv[queries : queries + keys], layer.qkv[-keys:]
        gate, up = np.split(layer.gate_up, 2)
        state |= {
            prefix + "input_layernorm.weight": layer.attention_norm,
            prefix + "self_attn.q_proj.weight": q,
            prefix + "self_attn.k_proj.weight": k,
            prefix + "self_attn.v_proj.weight": v,
            prefix + "self_attn.o_proj.weight": layer.output,
            prefix + "post_attention_layernorm.weight": layer.feed_forward_norm,
            prefix + "mlp.gate_proj.weight": gate,
            prefix + "mlp.up_proj.weight": up,
            prefix + "mlp.down_proj.weight": layer.down,
        }
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    # Frequencies are computed, not loaded.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit: {missing} {unexpected}")
    return model.eval(), tokenizer


def tiny(kind="Llama", **changed):
    """A model of two layers with random weights; `kind` is the begin of transformers' names."""
    torch.manual_seed(0)
    options = {
        "vocab_size": 128,
        "hidden_size": 256,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{kind}Config")(**options | changed)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()
