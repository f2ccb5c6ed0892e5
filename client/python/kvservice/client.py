"""Calls to a server.

Attend and Append take the fastest way that works, call by call: memory shared with a server on the
same host (`lane`), else gRPC. Everything else goes through gRPC. Every call carries a deadline and
raises `KvServiceError`. A `Client` may be shared between threads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import grpc
import numpy as np

from kvservice.attend import AttendReply, Row, put_row, read_rows, row_tensor
from kvservice.errors import KvServiceError, error_from_call
from kvservice.lane import LaneOptions, LanePath, LaneReply, Tensors
from kvservice.prepared import PreparedAttend, tensors_of
from kvservice.results import AttendResult
from kvservice.sequence import Sequence
from kvservice.step_buffers import StepBuffers, StepShape
from kvservice.tensors import from_message, like, put_inside
from kvservice.tls import TlsFiles, open_channel
from kvservice.v1 import (
    admin_pb2,
    attention_pb2,
    model_pb2,
    sequence_pb2,
    types_pb2,
)

DEADLINE_S = 30.0

# A server refuses larger messages.
_MESSAGE_BYTES_MAX = 64 << 20

Transport = Literal["lane", "unary"]

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
]


def _attend_request(
    layer: int,
    rows: Iterable[Row],
    policy: types_pb2.Policy | None,
    return_selected: bool,
    output_dtype: types_pb2.DataType,
) -> attention_pb2.AttendRequest:
    """Without its tensors."""
    request = attention_pb2.AttendRequest(
        layer=layer,
        policy=policy,
        return_selected=return_selected,
        output_dtype=output_dtype,
    )
    for row in rows:
        put_row(row, request.rows.add())
    return request


def _read_reply(
    request: attention_pb2.AttendRequest,
    message: attention_pb2.AttendResponse,
    out: Any,
    lse: Any,
    transport: Transport,
) -> AttendReply:
    return AttendReply(
        rows=read_rows(request, message, out, lse),
        out=out,
        lse=lse,
        transport=transport,
        queue_s=message.queue_ns * 1e-9,
        service_s=message.service_ns * 1e-9,
        message=message,
    )


def _not_prepared(problem: str) -> KvServiceError:
    return KvServiceError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"no prepared call: {problem}",
        reason="LANE_UNAVAILABLE",
        field="buffers",
    )


class Client:
    """A connection to one server, made at the first call."""

    def __init__(
        self,
        endpoint: str,
        *,
        deadline_s: float = DEADLINE_S,
        transport: Literal["auto", "lane", "unary"] = "auto",
        lane: LaneOptions | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        """`endpoint` is `unix:/path/to/socket` or `host:port`; `deadline_s` applies per call.

        `tls` is for `host:port`: the client's certificate says to the server who this is.

        `transport`: how Attend and Append travel. "auto" takes a lane where there is one and gRPC
        otherwise, "unary" gRPC alone; with "lane" the lane is opened here, and KvServiceError
        (LANE_UNAVAILABLE, or as the server refuses) says why it cannot be. Single calls may always
        take the slower way.
        """
        if transport not in ("auto", "lane", "unary"):
            raise ValueError(f"transport is {transport!r}, expected 'auto', 'lane' or 'unary'")
        self.endpoint = endpoint
        self._deadline_s = deadline_s
        self._lanes: LanePath | None = None
        if transport != "unary":
            self._lanes = LanePath(endpoint, lane or LaneOptions(), min(deadline_s, 5.0))
            if transport == "lane":
                self._lanes.open()
        self._channel = open_channel(endpoint, tls, _CHANNEL_OPTIONS)
        self._methods: dict[str, Any] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection. Sequences stay on the server until they are dropped or expire."""
        self._channel.close()
        if self._lanes is not None:
            self._lanes.close()

    @property
    def transport(self) -> Transport:
        """How Attend would travel now; `AttendReply.transport` says how a call did."""
        return "unary" if self._lane() is None else "lane"

    @property
    def lane_error(self) -> KvServiceError | None:
        """Why `transport` is "unary"; None while it is "lane", or when it was asked for."""
        return None if self._lane() is not None or self._lanes is None else self._lanes.error

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
        token_ids: Iterable[int] = (),
    ) -> Sequence:
        """Creates a sequence; use it with `with`, which drops it at the end.

        It is empty, unless the ids of its prompt's tokens are given: then it begins with as many
        of them, in whole blocks of 64, as the same tenant has in the cache of the same model, and
        `Sequence.matched_tokens` says how many that are. Append from there.
        """
        request = sequence_pb2.CreateRequest(
            model=model,
            policy=policy,
            lease_ms=lease_ms,
            request_id=request_id,
            token_ids=[int(token) for token in token_ids],
        )
        reply = self._call("SequenceService/Create", request, sequence_pb2.CreateResponse)
        return Sequence(self, reply.sequence.handle, reply.matched_tokens)

    def attend_rows(
        self,
        layer: int,
        rows: Iterable[Row],
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        *,
        policy: types_pb2.Policy | None = None,
        return_selected: bool = False,
        output_dtype: types_pb2.DataType = types_pb2.DATA_TYPE_UNSPECIFIED,
        buffers: StepBuffers | None = None,
    ) -> AttendReply:
        """One layer of a batch of rows, 1 to 256, all of one model. Safe to repeat.

        With T the sum of the rows' query counts, in their order: q [T, query heads, head_dim],
        rotated, of any float type; k and v [T, KV heads, head_dim] in the cache's type, appended
        before attending, or both left out. numpy arrays or what speaks DLPack, bf16 as uint16 bits
        or torch.bfloat16; with a torch q the outputs are torch tensors. Each row has its own result
        or its own error.

        `buffers` are the ones whose whole arrays q, k and v are: then outputs too stay where the
        server wrote them if they can, and are overwritten by the next call with these buffers.
        """
        request = _attend_request(layer, rows, policy, return_selected, output_dtype)
        tensors = {"q": row_tensor(q, "q")}
        if k is not None or v is not None:
            if k is None or v is None:
                raise ValueError("k and v come together or not at all")
            tensors |= {"k": row_tensor(k, "k"), "v": row_tensor(v, "v")}
        reply, transport = self._attend(request, tensors, buffers)
        out, lse = reply.out, reply.lse
        if not isinstance(q, np.ndarray):
            # torch has no tensors that only read.
            out, lse = (like(x if x.flags.writeable else x.copy(), q) for x in (out, lse))
        return _read_reply(request, reply.message, out, lse, transport)

    def prepare_rows(
        self,
        layer: int,
        rows: Iterable[Row],
        buffers: StepBuffers,
        *,
        store: bool = True,
        policy: types_pb2.Policy | None = None,
        return_selected: bool = False,
        output_dtype: types_pb2.DataType = types_pb2.DATA_TYPE_UNSPECIFIED,
    ) -> PreparedAttend:
        """The call that `attend_rows` would make with the buffers' arrays, left for somebody else
        to begin, a stream of a GPU above all: see `kvservice.prepared`.

        q, and with `store` k and v, are written by then, not yet. KvServiceError with
        LANE_UNAVAILABLE if the buffers share no memory with the server, or have a call already.
        """
        request = _attend_request(layer, rows, policy, return_selected, output_dtype)
        lane, reserved = self._lane(), buffers.reserved
        if lane is None or reserved is None or not buffers.is_in(lane):
            raise _not_prepared("these buffers share no memory with the server")
        if not lane.prepare(request, tensors_of(buffers, store=store), reserved):
            raise _not_prepared("these buffers have a call under way, or no room for this one")

        def read(request: attention_pb2.AttendRequest, reply: LaneReply) -> AttendReply:
            return _read_reply(request, reply.message, reply.out, reply.lse, "lane")

        return PreparedAttend(buffers, reserved, request, read, self._deadline_s)

    def attend(self, request: attention_pb2.AttendRequest) -> list[AttendResult | KvServiceError]:
        """The same for a message that holds its tensors."""
        reply, _ = self._attend(request, {}, None)
        return read_rows(request, reply.message, reply.out, reply.lse)

    def step_buffers(
        self,
        token_count: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        q_dtype: str = "float32",
        kv_dtype: str = "bfloat16",
    ) -> StepBuffers:
        """Arrays to write q, k and v of calls into, in the shared memory if there is a lane.

        Holds one of `LaneOptions.calls_max` until it is closed.
        """
        shape = StepShape(token_count, query_heads, kv_heads, head_dim, q_dtype, kv_dtype)
        return StepBuffers(shape, self._lane())

    def _lane(self) -> Any:
        return None if self._lanes is None else self._lanes.get()

    def _attend(
        self,
        request: attention_pb2.AttendRequest,
        tensors: Tensors,
        buffers: StepBuffers | None,
    ) -> tuple[LaneReply, Transport]:
        deadline = time.monotonic() + self._deadline_s
        lane = self._lane()
        if lane is not None:
            # Those of another client, or of a lane that broke, are arrays like others.
            is_own = buffers is not None and buffers.is_in(lane) and buffers.hold(tensors)
            reserved = buffers.reserved if is_own else None
            reply = lane.attend(request, tensors, deadline, reserved)
            if reply is not None:
                return reply, "lane"
        put_inside(request, tensors)
        timeout_s = max(0.0, deadline - time.monotonic())
        message = self._call(
            "AttentionService/Attend", request, attention_pb2.AttendResponse, timeout_s
        )
        return LaneReply(message, from_message(message.out), from_message(message.lse)), "unary"

    def _append(
        self,
        handle: types_pb2.SequenceHandle,
        parts: Iterator[tuple[sequence_pb2.AppendRequest, Tensors]],
    ) -> sequence_pb2.AppendResponse:
        """Stores the tokens of all messages, in order; `parts` are requests and their tensors."""
        deadline = time.monotonic() + self._deadline_s
        lane, counted = self._lane(), sequence_pb2.AppendResponse()
        rest = parts
        for request, tensors in parts if lane is not None else ():
            reply = lane.append(request, tensors, deadline)
            if reply is None:
                # It and those behind it take the other way, where repeating it is harmless.
                rest = itertools.chain([(request, tensors)], parts)
                break
            counted.message_count += reply.message_count
            counted.duplicate_count += reply.duplicate_count
        else:
            if counted.message_count > 0:
                got = sequence_pb2.GetRequest(handle=handle)
                described = self._call("SequenceService/Get", got, sequence_pb2.GetResponse)
                counted.sequence.CopyFrom(described.sequence)
                return counted
        response = self._stream(
            "SequenceService/Append",
            (put_inside(request, tensors) for request, tensors in rest),
            sequence_pb2.AppendResponse,
        )
        response.message_count += counted.message_count
        response.duplicate_count += counted.duplicate_count
        return response

    def _call(
        self, method: str, request: Any, response_type: Any, timeout_s: float | None = None
    ) -> Any:
        return self._invoke(self._channel.unary_unary, method, request, response_type, timeout_s)

    def _stream(self, method: str, requests: Iterator[Any], response_type: Any) -> Any:
        return self._invoke(self._channel.stream_unary, method, requests, response_type)

    def _invoke(
        self,
        kind: Any,
        method: str,
        request: Any,
        response_type: Any,
        timeout_s: float | None = None,
    ) -> Any:
        call = self._methods.get(method)
        if call is None:
            # Messages bring their own serialisers, so no generated service code is needed.
            call = self._methods[method] = kind(
                f"/kvservice.v1.{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=response_type.FromString,
            )
        try:
            return call(request, timeout=self._deadline_s if timeout_s is None else timeout_s)
        except grpc.RpcError as error:
            raise error_from_call(error) from None
