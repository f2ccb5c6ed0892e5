"""Calls to a server. All of them are unary except `Sequence.append`, which streams.

Every call carries a deadline and raises `KvServiceError`. A `Client` may be shared between threads;
a `Sequence` belongs to one thread at a time, as the tokens of a sequence have an order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from kvservice.errors import KvServiceError, error_from_call, error_from_row
from kvservice.results import AttendResult, result_from_row
from kvservice.tensors import from_message, to_message
from kvservice.v1 import (
    admin_pb2,
    attention_pb2,
    model_pb2,
    sequence_pb2,
    types_pb2,
)

DEADLINE_S = 30.0

# A server refuses larger messages; appends are cut into pieces that stay well below.
_MESSAGE_BYTES_MAX = 64 << 20
_APPEND_BYTES_MAX = 1 << 20
# Sampled queries of one message, as the server allows them.
_QUERY_SAMPLE_TOKENS_MAX = 256

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
]


class Client:
    """A connection to one server, made at the first call."""

    def __init__(self, endpoint: str, *, deadline_s: float = DEADLINE_S) -> None:
        """`endpoint` is `unix:/path/to/socket` or `host:port`; `deadline_s` applies per call."""
        self.endpoint = endpoint
        self._deadline_s = deadline_s
        self._channel = grpc.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
        self._methods: dict[str, Any] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection. Sequences stay on the server until they are dropped or expire."""
        self._channel.close()

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns once the server accepts connections; TimeoutError if that takes too long."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            raise TimeoutError(f"{self.endpoint} is not ready after {timeout_s:g} s") from None

    def server_info(self) -> admin_pb2.GetServerInfoResponse:
        """Version, device and limits; the endpoint must be the server's admin listener."""
        request = admin_pb2.GetServerInfoRequest()
        return self._call("AdminService/GetServerInfo", request, admin_pb2.GetServerInfoResponse)

    def register_model(self, model: model_pb2.Model) -> int:
        """Makes a model known and returns its fingerprint; harmless if it is known already."""
        request = model_pb2.RegisterRequest(model=model)
        return self._call("ModelService/Register", request, model_pb2.RegisterResponse).fingerprint

    def get_model(self, name: str) -> model_pb2.Model:
        """The model of that name as it was registered."""
        request = model_pb2.GetModelRequest(name=name)
        return self._call("ModelService/Get", request, model_pb2.GetModelResponse).model

    def sequence(
        self,
        model: str,
        *,
        policy: types_pb2.Policy | None = None,
        lease_ms: int = 0,
        request_id: str = "",
    ) -> Sequence:
        """Creates an empty sequence; use it with `with`, which drops it at the end."""
        request = sequence_pb2.CreateRequest(
            model=model, policy=policy, lease_ms=lease_ms, request_id=request_id
        )
        reply = self._call("SequenceService/Create", request, sequence_pb2.CreateResponse)
        return Sequence(self, reply.sequence.handle)

    def attend(self, request: attention_pb2.AttendRequest) -> list[AttendResult | KvServiceError]:
        """One layer of a batch of rows, each with its own result or its own error, in order."""
        reply = self._call("AttentionService/Attend", request, attention_pb2.AttendResponse)
        out, lse = from_message(reply.out), from_message(reply.lse)
        results: list[AttendResult | KvServiceError] = []
        begin = 0
        call_name = f"{reply.epoch.hex()}:{reply.draw_secret_id:x}:{reply.call_number}"
        for index, (row, result) in enumerate(zip(request.rows, reply.results, strict=True)):
            end = begin + max(1, row.query_count)
            if result.code != 0:
                results.append(error_from_row(result))
            else:
                name = f"{call_name}:{index}"
                results.append(result_from_row(result, out[begin:end], lse[begin:end], name))
            begin = end
        return results

    def _call(self, method: str, request: Any, response_type: Any) -> Any:
        return self._invoke(self._channel.unary_unary, method, request, response_type)

    def _stream(self, method: str, requests: Iterator[Any], response_type: Any) -> Any:
        return self._invoke(self._channel.stream_unary, method, requests, response_type)

    def _invoke(self, kind: Any, method: str, request: Any, response_type: Any) -> Any:
        call = self._methods.get(method)
        if call is None:
            # Messages bring their own serialisers, so no generated service code is needed.
            call = self._methods[method] = kind(
                f"/kvservice.v1.{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=response_type.FromString,
            )
        try:
            return call(request, timeout=self._deadline_s)
        except grpc.RpcError as error:
            raise error_from_call(error) from None


class Sequence:
    """One growing KV history on the server. `with` drops it at the end of the block."""

    def __init__(self, client: Client, handle: types_pb2.SequenceHandle) -> None:
        """Takes a handle that the server gave; `Client.sequence` makes new ones."""
        self._client = client
        self._handle = handle

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A sequence that cannot be dropped expires by itself; the block's own error matters more.
        with contextlib.suppress(KvServiceError):
            self.drop()

    @property
    def id(self) -> bytes:
        """16 random bytes."""
        return self._handle.id

    @property
    def generation(self) -> int:
        """Version of the contents that this object speaks about; `truncate` raises it."""
        return self._handle.generation

    def append(
        self,
        start_position: int,
        k: np.ndarray,
        v: np.ndarray,
        *,
        layer: int | None = None,
        query_sample: np.ndarray | None = None,
        query_sample_positions: np.ndarray | list[int] | None = None,
    ) -> sequence_pb2.AppendResponse:
        """Streams the K and V of consecutive tokens; repeating the same bytes is harmless.

        k, v [layers, tokens, KV heads, head_dim] fill all layers from layer 0 on; with `layer`,
        [tokens, KV heads, head_dim] fill that one. `query_sample` [layers, n, query heads,
        head_dim], or without layers, holds some rotated queries of these tokens, from which the
        server learns to make its bounds tighter; without `query_sample_positions` at most 256. With
        positions [n], ascending and of these tokens, the latest of them also become anchors, which
        saves the first steps of "cis" and "cpe" their scans. What was sent before an error stays.
        """
        if k.shape != v.shape:
            raise ValueError(f"k and v differ in shape: {k.shape} and {v.shape}")
        if layer is not None:
            k, v = k[None], v[None]
            query_sample = None if query_sample is None else query_sample[None]
        if query_sample is not None and len(query_sample) != len(k):
            raise ValueError(f"queries of {len(query_sample)} layers come with keys of {len(k)}")
        positions = None
        if query_sample_positions is not None:
            positions = np.asarray(query_sample_positions, np.int64)
            _check_positions(positions, query_sample, start_position, k.shape[1])
        requests = self._append_requests(
            start_position, layer or 0, k, v, query_sample, positions
        )
        return self._client._stream(
            "SequenceService/Append", requests, sequence_pb2.AppendResponse
        )

    def attend(
        self,
        layer: int,
        q: np.ndarray,
        k: np.ndarray | None = None,
        v: np.ndarray | None = None,
        *,
        position: int,
        policy: types_pb2.Policy | None = None,
        given: list[np.ndarray] | None = None,
        return_selected: bool = False,
    ) -> AttendResult:
        """Appends k and v, if given, at `position` and attends over all tokens up to there.

        q [queries, query heads, head_dim] or, for one query token, [query heads, head_dim]; k and
        v alike with the KV heads. `given` holds ascending positions per KV head, for a policy that
        asks for them. Safe to repeat.
        """
        row = attention_pb2.AttendRow(
            handle=self._handle, position=position, query_count=1 if q.ndim == 2 else len(q)
        )
        if given is not None:
            row.given_offsets.extend(np.cumsum([0, *map(len, given)]).tolist())
            row.given_positions.extend(np.concatenate(given).tolist())
        request = attention_pb2.AttendRequest(
            layer=layer,
            rows=[row],
            policy=policy,
            return_selected=return_selected,
            q=_rows_message(q),
            k=None if k is None else _rows_message(k),
            v=None if v is None else _rows_message(v),
        )
        result = self._client.attend(request)[0]
        if isinstance(result, KvServiceError):
            raise result
        return result

    def fork(self, length_tokens: int | None = None, *, lease_ms: int = 0) -> Sequence:
        """A copy-on-write child with the first tokens, by default all that every layer has."""
        request = sequence_pb2.ForkRequest(
            handle=self._handle, length_tokens=length_tokens, lease_ms=lease_ms
        )
        reply = self._client._call("SequenceService/Fork", request, sequence_pb2.ForkResponse)
        return Sequence(self._client, reply.sequence.handle)

    def truncate(self, length_tokens: int) -> sequence_pb2.Sequence:
        """Forgets the newest tokens; this object moves on to the new generation."""
        request = sequence_pb2.TruncateRequest(handle=self._handle, length_tokens=length_tokens)
        reply = self._client._call(
            "SequenceService/Truncate", request, sequence_pb2.TruncateResponse
        )
        self._handle = reply.sequence.handle
        return reply.sequence

    def describe(self) -> sequence_pb2.Sequence:
        """Lengths, memory, lease and the certificate summary."""
        request = sequence_pb2.GetRequest(handle=self._handle)
        reply = self._client._call("SequenceService/Get", request, sequence_pb2.GetResponse)
        return reply.sequence

    def renew_lease(self, lease_ms: int = 0) -> int:
        """Keeps the sequence alive; returns the remaining milliseconds."""
        request = sequence_pb2.RenewLeaseRequest(handle=self._handle, lease_ms=lease_ms)
        reply = self._client._call(
            "SequenceService/RenewLease", request, sequence_pb2.RenewLeaseResponse
        )
        return reply.lease_remaining_ms

    def drop(self) -> None:
        """Forgets the sequence on the server."""
        request = sequence_pb2.DropRequest(handle=self._handle)
        self._client._call("SequenceService/Drop", request, sequence_pb2.DropResponse)

    def _append_requests(
        self,
        start_position: int,
        first_layer: int,
        k: np.ndarray,
        v: np.ndarray,
        query_sample: np.ndarray | None,
        positions: np.ndarray | None,
    ) -> Iterator[sequence_pb2.AppendRequest]:
        token_bytes = 2 * k[:1, :1].nbytes
        step = max(1, _APPEND_BYTES_MAX // max(1, token_bytes))
        offsets = None if positions is None else positions - start_position
        for piece in _pieces(k.shape[1], step, offsets):
            # Queries without positions travel with the first message of their layer.
            sampled = slice(None) if piece.start == 0 else slice(0)
            if offsets is not None:
                sampled = slice(*np.searchsorted(offsets, [piece.start, piece.stop]))
            for index, (keys, values) in enumerate(zip(k, v, strict=True)):
                sample = None
                if query_sample is not None and len(query_sample[index][sampled]) > 0:
                    sample = to_message(query_sample[index][sampled].astype(np.float32))
                yield sequence_pb2.AppendRequest(
                    handle=self._handle,
                    layer=first_layer + index,
                    position=start_position + piece.start,
                    query_sample=sample,
                    query_sample_positions=() if positions is None else positions[sampled],
                    k=to_message(keys[piece]),
                    v=to_message(values[piece]),
                )


def _check_positions(
    positions: np.ndarray, queries: np.ndarray | None, start: int, token_count: int
) -> None:
    if queries is None or positions.shape != (queries.shape[1],):
        raise ValueError("query_sample_positions are not one for each query of a layer")
    ascending = np.all(np.diff(positions) > 0)
    if len(positions) and not (
        ascending and positions[0] >= start and positions[-1] < start + token_count
    ):
        raise ValueError("query_sample_positions are not ascending positions of the tokens")


def _pieces(token_count: int, step: int, offsets: np.ndarray | None) -> Iterator[slice]:
    """Cuts tokens into messages of `step`, or of as many as have the most queries allowed."""
    begin = 0
    while begin < token_count:
        end = min(begin + step, token_count)
        if offsets is not None:
            first, last = np.searchsorted(offsets, [begin, end])
            if last - first > _QUERY_SAMPLE_TOKENS_MAX:
                end = int(offsets[first + _QUERY_SAMPLE_TOKENS_MAX])
        yield slice(begin, end)
        begin = end


def _rows_message(values: np.ndarray) -> types_pb2.Tensor:
    return to_message(values if values.ndim == 3 else values[None])
