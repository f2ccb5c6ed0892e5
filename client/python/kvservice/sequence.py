"""One sequence on a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from kvservice.attend import Row
from kvservice.errors import KvServiceError
from kvservice.lane import Tensors
from kvservice.results import AttendResult
from kvservice.tensors import as_array, as_float32
from kvservice.v1 import sequence_pb2, types_pb2

if TYPE_CHECKING:
    from kvservice.client import Client

# Appends are cut into messages that stay well below what a server takes.
_APPEND_BYTES_MAX = 1 << 20
# Sampled queries of one message, as the server allows them.
_QUERY_SAMPLE_TOKENS_MAX = 256


class Sequence:
    """One growing KV history on the server. `with` drops it at the end of the block.

    One thread at a time, as the tokens of a sequence have an order.
    """

    def __init__(
        self, client: Client, handle: types_pb2.SequenceHandle, matched_tokens: int = 0
    ) -> None:
        """Takes a handle that the server gave; `Client.sequence` makes new ones."""
        self._client = client
        self._handle = handle
        self._matched_tokens = matched_tokens

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *error: object) -> None:
        # A sequence that cannot be dropped expires by itself; the block's own error matters more.
        with contextlib.suppress(KvServiceError):
            self.drop()

    @property
    def handle(self) -> types_pb2.SequenceHandle:
        """Id and generation, as messages name the sequence."""
        return self._handle

    @property
    def id(self) -> bytes:
        """16 random bytes."""
        return self._handle.id

    @property
    def generation(self) -> int:
        """Version of the contents that this object speaks about; `truncate` raises it."""
        return self._handle.generation

    @property
    def matched_tokens(self) -> int:
        """Tokens that were there when it was created with token ids: append from here."""
        return self._matched_tokens

    def append(
        self,
        start_position: int,
        k: Any,
        v: Any,
        *,
        layer: int | None = None,
        query_sample: Any | None = None,
        query_sample_positions: np.ndarray | list[int] | None = None,
        durable: bool = False,
    ) -> sequence_pb2.AppendResponse:
        """Streams the K and V of consecutive tokens; repeating the same bytes is harmless.

        k, v [layers, tokens, KV heads, head_dim] fill all layers from layer 0 on; with `layer`,
        [tokens, KV heads, head_dim] fill that one. Arrays as in `Client.attend_rows`.
        `query_sample` [layers, n, query heads, head_dim], or without layers, holds some rotated
        queries of these tokens, from which the server learns to make its bounds tighter; without
        `query_sample_positions` at most 256. With positions [n], ascending and of these tokens, the
        latest of them also become anchors, which saves the first steps of "cis" and "cpe" their
        scans. What was sent before an error stays. With `durable` all of it is on the server's
        disk, synced, when this returns.
        """
        k, v = as_array(k), as_array(v)
        query_sample = None if query_sample is None else as_float32(query_sample)
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
        parts = self._append_parts(
            start_position, layer or 0, k, v, query_sample, positions, durable
        )
        return self._client._append(self._handle, parts)

    def attend(
        self,
        layer: int,
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        *,
        position: int,
        policy: types_pb2.Policy | None = None,
        given: list[np.ndarray] | None = None,
        return_selected: bool = False,
    ) -> AttendResult:
        """Appends k and v, if given, at `position` and attends over all tokens up to there.

        q [queries, query heads, head_dim] or, for one query token, [query heads, head_dim]; k and
        v alike with the KV heads. Arrays as in `Client.attend_rows`. `given` holds ascending
        positions per KV head, for a policy that asks for them. Safe to repeat.
        """
        if q.ndim == 2:
            q, k, v = (None if array is None else array[None] for array in (q, k, v))
        row = Row(self, position, query_count=len(q), given=given)
        result = self._client.attend_rows(
            layer, [row], q, k, v, policy=policy, return_selected=return_selected
        ).rows[0]
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

    def suspend(self) -> sequence_pb2.Sequence:
        """Out of the server's memory and onto its disk, until `resume`."""
        request = sequence_pb2.SuspendRequest(handle=self._handle)
        reply = self._client._call("SequenceService/Suspend", request, sequence_pb2.SuspendResponse)
        return reply.sequence

    def resume(self) -> sequence_pb2.Sequence:
        """Back into the server's memory; this object moves on to the new generation."""
        request = sequence_pb2.ResumeRequest(handle=self._handle)
        reply = self._client._call("SequenceService/Resume", request, sequence_pb2.ResumeResponse)
        self._handle = reply.sequence.handle
        return reply.sequence

    def transfer(
        self, target_endpoint: str, *, move: bool = False
    ) -> sequence_pb2.TransferResponse:
        """Sends it from its server to another one, one of that server's `--transfer-targets`.

        The reply's handle is what the other server calls it: `Sequence(client, reply.handle)` with
        a client of that server takes it over. With `move` this server drops it then. Safe to
        repeat: a repeat goes on where a broken transfer stopped.
        """
        request = sequence_pb2.TransferRequest(
            handle=self._handle, target_endpoint=target_endpoint, move=move
        )
        return self._client._call(
            "SequenceService/Transfer", request, sequence_pb2.TransferResponse
        )

    def refresh(self) -> sequence_pb2.Sequence:
        """Moves on to what a restarted server has of it, which may be less than was appended."""
        described = self.describe()
        self._handle = described.handle
        return described

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

    def _append_parts(
        self,
        start_position: int,
        first_layer: int,
        k: np.ndarray,
        v: np.ndarray,
        query_sample: np.ndarray | None,
        positions: np.ndarray | None,
        durable: bool,
    ) -> Iterator[tuple[sequence_pb2.AppendRequest, Tensors]]:
        durability = sequence_pb2.DURABILITY_DURABLE if durable else sequence_pb2.DURABILITY_MEMORY
        token_bytes = 2 * k[:1, :1].nbytes
        step = max(1, _APPEND_BYTES_MAX // max(1, token_bytes))
        offsets = None if positions is None else positions - start_position
        for piece in _pieces(k.shape[1], step, offsets):
            # Queries without positions travel with the first message of their layer.
            sampled = slice(None) if piece.start == 0 else slice(0)
            if offsets is not None:
                sampled = slice(*np.searchsorted(offsets, [piece.start, piece.stop]))
            for index, (keys, values) in enumerate(zip(k, v, strict=True)):
                request = sequence_pb2.AppendRequest(
                    handle=self._handle,
                    layer=first_layer + index,
                    position=start_position + piece.start,
                    durability=durability,
                    query_sample_positions=() if positions is None else positions[sampled],
                )
                tensors = {"k": keys[piece], "v": values[piece]}
                if query_sample is not None and len(query_sample[index][sampled]) > 0:
                    tensors["query_sample"] = query_sample[index][sampled]
                yield request, tensors


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
