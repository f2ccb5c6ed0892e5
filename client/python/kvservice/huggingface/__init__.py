"""Hugging Face models that decode through the service.

    model = kvservice.attach(model, "unix:/run/kvservice.sock", policy="certified",
                             max_dropped_mass=0.05)
    model.generate(...)                    # as ever
    print(model.kvservice.report)          # what was dropped, read and waited for

What is not supported raises `UnsupportedError`; see docs/huggingface.md.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from typing import Any

import torch

from kvservice.client import Client
from kvservice.errors import KvServiceError
from kvservice.huggingface.attention import NAME, register
from kvservice.huggingface.cache import ServiceCache
from kvservice.huggingface.checks import GenerationArguments, UnsupportedError, check_model
from kvservice.huggingface.report import GenerationReport
from kvservice.policies import make_policy
from kvservice.v1 import model_pb2, types_pb2

__all__ = ["Attachment", "GenerationReport", "UnsupportedError", "attach", "detach"]

_DTYPES = {
    torch.float32: types_pb2.DATA_TYPE_FLOAT32,
    torch.float16: types_pb2.DATA_TYPE_FLOAT16,
    torch.bfloat16: types_pb2.DATA_TYPE_BFLOAT16,
}


class Attachment:
    """What binds a model to a server; `model.kvservice`. One generate() at a time."""

    def __init__(self, model: Any, client: Client, policy: types_pb2.Policy, dtype: Any) -> None:
        """Registers the model's geometry with the server; KvServiceError as it refuses."""
        self.client = client
        self.policy = policy
        self.report: GenerationReport | None = None  # of the latest generate()
        self._busy = threading.Lock()
        self._model = model
        self._dtype = dtype or model.dtype
        if self._dtype not in _DTYPES:
            raise UnsupportedError(f"a cache of {self._dtype} is not supported")
        self._description = _describe(model, _DTYPES[self._dtype])
        client.register_model(self._description)
        self._plain_generate = model.generate
        self._plain_attention = model.config._attn_implementation
        # transformers calls its caches past_key_values until 5.
        parameters = inspect.signature(type(model).forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"

    def generate(
        self, inputs: Any = None, generation_config: Any = None, **arguments: Any
    ) -> Any:
        """`model.generate` with the attention of every token after the prompt in the service."""
        if not self._busy.acquire(blocking=False):
            raise UnsupportedError("one generate() of an attached model at a time")
        try:
            return self._generate(inputs, generation_config=generation_config, **arguments)
        finally:
            self._busy.release()

    def _generate(self, inputs: Any, **arguments: Any) -> Any:
        asked = GenerationArguments(self._model, inputs, arguments)
        asked.check()
        self.report = GenerationReport(
            model=self._description.name,
            policy=types_pb2.Selector.Name(self.policy.selector).removeprefix("SELECTOR_").lower(),
            max_dropped_mass=(
                self.policy.max_dropped_mass if self.policy.HasField("max_dropped_mass") else None
            ),
            sequences=asked.prompts * asked.copies,
            layers=self._description.layer_count,
        )
        cache = ServiceCache(
            self.client,
            self._description.name,
            layer_count=self._description.layer_count,
            scale=self._description.scale,
            dtype=self._dtype,
            policy=self.policy,
            copies=asked.copies,
            report=self.report,
        )
        arguments[self._cache_argument] = cache
        try:
            with self.report.timing():
                return self._plain_generate(inputs, **arguments)
        finally:
            cache.close()

    def undo(self) -> None:
        """Makes the model what it was."""
        del self._model.generate
        del self._model.kvservice
        self._model.set_attn_implementation(self._plain_attention)
        self.client.close()


def attach(
    model: Any,
    endpoint: str,
    policy: str | types_pb2.Policy = "certified",
    *,
    cache_dtype: Any = None,
    client: Client | None = None,
    **limits: Any,
) -> Any:
    """Makes `model.generate` decode through the server at `endpoint`; returns the model.

    `policy` and `limits` are those of `make_policy`, for example "certified" with
    max_dropped_mass=0.05; or a policy message. `cache_dtype` (a torch dtype) is that of stored keys
    and values, by default the model's. `client` is used instead of one of its own; it is closed
    with the model's detachment either way.
    """
    if hasattr(model, "kvservice"):
        raise ValueError("the model is attached already: detach it first")
    check_model(model)
    if isinstance(policy, str):
        policy = make_policy(policy, **limits)
    elif limits:
        raise ValueError(f"a policy message comes with its limits, got {', '.join(limits)} as well")
    connected = client or Client(endpoint)
    try:
        attachment = Attachment(model, connected, policy, cache_dtype)
    except (KvServiceError, UnsupportedError):
        connected.close()
        raise
    register()
    model.set_attn_implementation(NAME)
    model.generate = attachment.generate
    model.kvservice = attachment
    return model


def detach(model: Any) -> Any:
    """Undoes `attach`; returns the model."""
    model.kvservice.undo()
    return model


def _describe(model: Any, cache_dtype: int) -> model_pb2.Model:
    config = model.config
    heads = config.num_attention_heads
    attention = next(module for module in model.modules() if hasattr(module, "layer_idx"))
    rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    description = model_pb2.Model(
        layer_count=config.num_hidden_layers,
        query_head_count=heads,
        kv_head_count=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        cache_dtype=cache_dtype,
        scale=attention.scaling,
        rotary_style=model_pb2.ROTARY_STYLE_HALF,
        inverse_frequencies=rotary.inv_freq.float().cpu().tolist(),
    )
    # What the server learns about a model's keys belongs to these weights alone.
    digest = hashlib.sha256(description.SerializeToString())
    for _, parameter in zip(range(4), model.parameters(), strict=False):
        part = parameter.detach().flatten()[:4096].float().cpu()
        digest.update(part.numpy().tobytes())
    description.name = f"hf-{config.model_type}-{digest.hexdigest()[:24]}"
    return description
