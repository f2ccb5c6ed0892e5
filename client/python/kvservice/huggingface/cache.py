"""A cache for transformers that holds no keys and values: a server does.

A layer's `update` only counts; the attention function, which runs right after it in the same
thread, appends and attends (`attention.py`). A prompt is attended locally, as transformers would
do, and stored by Append; every later token is one Attend per layer for the whole batch.

HF counts padding as tokens, the service does not: row r's token at HF's position p is the service's
token p - pads[r].
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvservice.attend import Row
from kvservice.client import Client
from kvservice.errors import KvServiceError
from kvservice.huggingface.checks import UnsupportedError, check_attention
from kvservice.huggingface.report import GenerationReport
from kvservice.sequence import Sequence
from kvservice.v1 import types_pb2

# Prompt queries that travel along with the keys, from which the server learns to make its bounds
# tighter: one in so many, and as many as one message takes.
_QUERY_SAMPLE_STRIDE = 16
_QUERY_SAMPLES_MAX = 256


class Step(NamedTuple):
    """A layer's tokens on their way from `update` to the attention function."""

    cache: ServiceCache
    layer: int
    begin: int  # HF's position of the first one


class _Thread(threading.local):
    """What a thread's forward pass is about: its mask is made before its layers run."""

    masking: ServiceCache | None = None
    step: Step | None = None


_thread = _Thread()


def take_masking() -> ServiceCache:
    """The cache whose sizes were asked for last, for the mask that is made of them."""
    cache, _thread.masking = _thread.masking, None
    if cache is None:
        raise UnsupportedError("call generate(): an attached model has no cache of its own")
    return cache


def take_step(layer: int) -> Step:
    """The tokens that the layer's cache was given just now."""
    step, _thread.step = _thread.step, None
    if step is None or step.layer != layer:
        raise UnsupportedError("call generate(): an attached model has no cache of its own")
    return step


class ServiceLayer(CacheLayerMixin):
    """One layer: its length alone."""

    is_sliding = False

    def __init__(self, cache: ServiceCache, index: int) -> None:
        super().__init__()
        self._cache = cache
        self._index = index
        self._length = 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is kept here."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the new keys and values alone."""
        _thread.step = Step(self._cache, self._index, self._length)
        self._length += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length with the new tokens, and the offset; takes a count or the tokens' positions."""
        _thread.masking = self._cache
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self._length + new, 0

    def get_seq_length(self, *args: Any) -> int:
        """Tokens so far, padding included."""
        return self._length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    # Its name until transformers 5.
    get_max_cache_shape = get_max_length

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError("caches of the service are not reordered, cropped or moved")

    reorder_cache = crop = reset = offload = prefetch = _refuse
    batch_repeat_interleave = batch_select_indices = _refuse


class ServiceCache(Cache):
    """The cache of one generate(): one sequence of the service per row of the batch.

    One thread at a time. `close` drops the sequences.
    """

    def __init__(
        self,
        client: Client,
        model_name: str,
        *,
        layer_count: int,
        scale: float,
        dtype: torch.dtype,
        policy: types_pb2.Policy,
        copies: int,
        report: GenerationReport,
    ) -> None:
        """`dtype` is that of stored keys and values; `copies` are the sequences per prompt, which
        share the prompt: rows r of a prompt p are p * copies to (p + 1) * copies - 1."""
        super().__init__(layers=[ServiceLayer(self, index) for index in range(layer_count)])
        self._client = client
        self._model_name = model_name
        self._scale = scale
        self._dtype = dtype
        self._policy = policy
        self._copies = copies
        self._report = report
        # Per row, once a mask has been seen.
        self._pads: list[int] = []
        self._sequences: list[Sequence] = []
        self._is_forked = False

    def close(self) -> None:
        """Drops the sequences; those that cannot be dropped expire by themselves."""
        for sequence in self._sequences:
            with contextlib.suppress(KvServiceError):
                sequence.drop()
        self._sequences = []

    def note_mask(self, mask: torch.Tensor | None, batch: int, length: int) -> None:
        """Takes the 2D mask of a forward pass [batch, length], True = a token; None = all are.

        UnsupportedError unless every row is left padding and then tokens, as it was before.
        """
        if mask is None:
            pads = [0] * batch
        else:
            mask = mask.to(torch.bool)
            counts = length - mask.sum(dim=1)
            places = torch.arange(length, device=mask.device)
            if mask.shape != (batch, length) or not torch.equal(mask, places >= counts[:, None]):
                raise UnsupportedError("attention masks must be left padding, then tokens")
            pads = counts.tolist()
        if any(pad == length for pad in pads):
            raise UnsupportedError("a row of the batch has no token")
        if not self._pads:
            self._begin(pads)
        elif pads != self._pads:
            raise UnsupportedError("the padding of a batch must stay as it was")

    def attend(
        self, step: Step, module: Any, tensors: tuple[Any, Any, Any], mask: Any, arguments: Any
    ) -> torch.Tensor:
        """The outputs [batch, tokens, query heads, head_dim] of a layer's new tokens.

        `tensors` are q [batch, query heads, tokens, head_dim], k and v alike with the KV heads.
        """
        check_attention(module, arguments, self._scale)
        if not self._pads or (step.begin > 0 and mask is not None):
            raise UnsupportedError("attention masks must be 2D")
        if not self._sequences:
            raise UnsupportedError("the generation of this cache has ended")
        query, key, value = tensors
        if query.shape[0] != len(self._pads):
            raise UnsupportedError("the batch must keep its size")
        key, value = key.to(self._dtype), value.to(self._dtype)
        if step.begin == 0:
            return self._prefill(step, module, (query, key, value), mask, arguments)
        if query.shape[2] != 1:
            raise UnsupportedError("after the prompt tokens come one at a time")
        return self._decode(step, query, key, value)

    def _begin(self, pads: list[int]) -> None:
        if len(pads) % self._copies != 0:
            raise UnsupportedError(f"{len(pads)} rows are not {self._copies} of each prompt")
        firsts = pads[:: self._copies]
        if pads != [pad for pad in firsts for _ in range(self._copies)]:
            raise UnsupportedError("rows of one prompt must be padded alike")
        self._pads = pads
        for _ in firsts:
            self._sequences.append(self._client.sequence(self._model_name, policy=self._policy))

    def _prefill(
        self, step: Step, module: Any, tensors: tuple[Any, Any, Any], mask: Any, arguments: Any
    ) -> torch.Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        query, key, value = tensors
        began = time.perf_counter()
        out, _ = sdpa_attention_forward(
            module, query, key.to(query.dtype), value.to(query.dtype), mask, **arguments
        )
        attended = time.perf_counter()
        for prompt, sequence in enumerate(self._sequences):
            row = prompt * self._copies
            pad = self._pads[row]
            stride = max(_QUERY_SAMPLE_STRIDE, -(-(query.shape[2] - pad) // _QUERY_SAMPLES_MAX))
            k, v, sample = (
                tensor[row, :, pad::each].transpose(0, 1).cpu()
                for tensor, each in ((key, 1), (value, 1), (query, stride))
            )
            sequence.append(0, k, v, layer=step.layer, query_sample=sample.float())
        self._report.add_prefill(attended - began, time.perf_counter() - attended)
        return out

    def _decode(self, step: Step, query: Any, key: Any, value: Any) -> torch.Tensor:
        began = time.perf_counter()
        if not self._is_forked:
            self._fork()
        rows = [
            Row(sequence, step.begin - pad)
            for sequence, pad in zip(self._sequences, self._pads, strict=True)
        ]
        q, k, v = (tensor[:, :, 0].cpu() for tensor in (query, key, value))
        reply = self._client.attend_rows(step.layer, rows, q, k, v)
        for row in reply.rows:
            if isinstance(row, KvServiceError):
                raise row
        out = reply.out[:, None].to(query)
        self._report.add_step(step.layer, reply, time.perf_counter() - began)
        return out

    def _fork(self) -> None:
        """Each prompt's sequence and its copies, in the order of the rows."""
        rows: list[Sequence] = []
        prompts, self._sequences = self._sequences, rows
        for index, prompt in enumerate(prompts):
            rows.append(prompt)
            try:
                rows.extend(prompt.fork() for _ in range(self._copies - 1))
            except KvServiceError:
                rows.extend(prompts[index + 1 :])
                raise
        self._is_forked = True
