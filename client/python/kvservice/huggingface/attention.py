"""The functions that transformers calls for an attached model, registered under one name."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvservice.huggingface.cache import take_masking, take_step
from kvservice.huggingface.checks import UnsupportedError

NAME = "kvservice"


def service_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """[batch, tokens, query heads, head_dim] of q [batch, query heads, tokens, head_dim], rotated;
    key and value are those of the new tokens alone."""
    step = take_step(module.layer_idx)
    tensors = (query, key, value)
    return step.cache.attend(step, module, tensors, attention_mask, arguments), None


def service_mask(**arguments: Any) -> torch.Tensor | None:
    """A prompt's mask is that of local attention; later tokens see all that the service has."""
    cache = take_masking()
    if arguments.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise UnsupportedError("only causal attention is supported")
    new = arguments.get("q_length")
    if new is None:  # until transformers 5
        new = arguments["cache_position"].shape[0]
    length = arguments["kv_length"]
    cache.note_mask(arguments.get("attention_mask"), arguments["batch_size"], length)
    return sdpa_mask(**arguments) if length == new else None


def register() -> None:
    """Makes the name known to transformers; harmless to repeat."""
    AttentionInterface.register(NAME, service_attention)
    AttentionMaskInterface.register(NAME, service_mask)
