"""What the adapter cannot do raises here, before anything has been computed or sent."""

from __future__ import annotations

from typing import Any

# Decoders whose rotary embedding pairs channel c with c + d/2 and whose attention is
# softmax(scale * q.k) v with grouped heads and nothing else: what the service computes.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Rows of a call, as the service allows them.
ROWS_MAX = 256

# Frequencies that change with the length would rotate stored keys and later queries differently.
_FIXED_ROTARY_TYPES = ("default", "linear", "yarn", "llama3")

# Arguments of generate() that need what is not there, the values that mean "not used", and why.
_REFUSED_ARGUMENTS = {
    "num_beams": ((None, 1), "beam search reorders caches"),
    "num_beam_groups": ((None, 1), "beam search reorders caches"),
    "assistant_model": ((None,), "assisted decoding crops caches"),
    "prompt_lookup_num_tokens": ((None, 0), "assisted decoding crops caches"),
    "assistant_early_exit": ((None,), "assisted decoding crops caches"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search repeats caches"),
    "dola_layers": ((None,), "its decoding reads other layers"),
    "guidance_scale": ((None, 1, 1.0), "its second prompt has a cache of its own"),
    "custom_generate": ((None,), "what it does with the cache is unknown"),
    "cache_implementation": ((None, "dynamic"), "the service is the cache"),
    "past_key_values": ((None,), "the service is the cache"),
    "cache": ((None,), "the service is the cache"),
    "use_cache": ((None, True), "the service is the cache"),
    "prefill_chunk_size": ((None,), "prompts are read in one piece"),
    "output_attentions": ((None, False), "the service does not return attention weights"),
}


class UnsupportedError(NotImplementedError):
    """Asked for what the adapter does not do; nothing has been computed differently instead."""


def check_model(model: Any) -> None:
    """UnsupportedError unless the service can do the attention of every layer of the model."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedError(
            f"models of type {config.model_type!r} are not supported, only {', '.join(MODEL_TYPES)}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError("encoders with decoders are not supported")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedError(f"layers of types {sorted(kinds)} are not supported")
    has_window = getattr(config, "sliding_window", None) is not None
    if has_window and getattr(config, "use_sliding_window", True):
        raise UnsupportedError("sliding windows are not supported")
    rotary = _rotary_type(config)
    if rotary not in _FIXED_ROTARY_TYPES:
        raise UnsupportedError(f"rotary embeddings of type {rotary!r} are not supported")


def _rotary_type(config: Any) -> str:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    parameters = parameters or {}
    return parameters.get("rope_type", parameters.get("type", "default"))


class GenerationArguments:
    """The arguments of one generate() as transformers will see them."""

    def __init__(self, model: Any, inputs: Any, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        # What one config leaves open is the next one's.
        self._configs = (arguments.get("generation_config"), model.generation_config)
        self._inputs = inputs

    def value(self, name: str) -> Any:
        """An argument, else what the generation configs say."""
        values = (self._arguments.get(name), *(getattr(each, name, None) for each in self._configs))
        return next((value for value in values if value is not None), None)

    @property
    def copies(self) -> int:
        """Sequences per prompt."""
        return self.value("num_return_sequences") or 1

    @property
    def prompts(self) -> int:
        """Prompts of the batch; 0 if that cannot be told."""
        for inputs in (self._inputs, *map(self._arguments.get, ("input_ids", "inputs_embeds"))):
            if inputs is not None:
                return int(inputs.shape[0])
        return 0

    def check(self) -> None:
        """UnsupportedError for what the adapter does not do."""
        for name, (unused, reason) in _REFUSED_ARGUMENTS.items():
            value = self.value(name)
            if not any(value is each or value == each for each in unused):
                raise UnsupportedError(f"generate({name}={value!r}) is not supported: {reason}")
        if self.prompts == 0:
            raise UnsupportedError("generate() needs input_ids or inputs_embeds")
        rows = self.prompts * self.copies
        if rows > ROWS_MAX:
            raise UnsupportedError(f"{rows} sequences at a time, at most {ROWS_MAX} are supported")


def check_attention(module: Any, arguments: dict[str, Any], scale: float) -> None:
    """UnsupportedError for a call of attention that is not plain causal inference."""
    if module.training:
        raise UnsupportedError("the model is in training mode: call model.eval()")
    for name in ("sliding_window", "softcap", "position_bias", "s_aux", "head_mask"):
        if arguments.get(name) is not None:
            raise UnsupportedError(f"attention with {name} is not supported")
    if arguments.get("output_attentions"):
        raise UnsupportedError("the service does not return attention weights")
    if arguments.get("dropout"):
        raise UnsupportedError("attention with dropout is not supported")
    scaling = arguments.get("scaling")
    if scaling is None or abs(scaling - scale) > 1e-6 * scale:
        raise UnsupportedError(f"a layer scales by {scaling}, the model is registered with {scale}")
