"""The rows of an Attend call, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvservice.errors import KvServiceError, error_from_row
from kvservice.results import AttendResult, result_from_row
from kvservice.tensors import as_array
from kvservice.v1 import attention_pb2, types_pb2

if TYPE_CHECKING:
    from kvservice.sequence import Sequence


@dataclass(frozen=True)
class Row:
    """One sequence's part of a call.

    It attends tokens [0, position + query_count), causally among its own query tokens. `given`
    holds ascending positions per KV head, for a policy that asks for them.
    """

    sequence: Sequence
    position: int
    query_count: int = 1
    policy: types_pb2.Policy | None = None
    given: list[np.ndarray] | None = None


@dataclass(frozen=True)
class AttendReply:
    """The answer to a call; rows succeed and fail on their own, in their order.

    out [T, query heads, head_dim] and lse [T, query heads] are those of all rows together, zeros
    for rows that failed.
    """

    rows: list[AttendResult | KvServiceError]
    out: Any
    lse: Any
    transport: Literal["lane", "unary"]
    queue_s: float  # in the server, waiting for the executor
    service_s: float  # and working
    message: attention_pb2.AttendResponse  # as it came; its tensors may lie elsewhere


def row_tensor(values: Any, name: str) -> np.ndarray:
    """An array [T, heads, head_dim] of a call; ValueError names the one with other extents."""
    array = as_array(values)
    if array.ndim != 3:
        raise ValueError(f"{name} has shape {array.shape}, expected [tokens, heads, head_dim]")
    return array


def put_row(row: Row, message: attention_pb2.AttendRow) -> None:
    """Writes a row into its message."""
    message.handle.CopyFrom(row.sequence.handle)
    message.position = row.position
    message.query_count = row.query_count
    if row.policy is not None:
        message.policy.CopyFrom(row.policy)
    if row.given is not None:
        message.given_offsets.extend(np.cumsum([0, *map(len, row.given)]).tolist())
        message.given_positions.extend(np.concatenate(row.given).tolist())


def read_rows(
    request: attention_pb2.AttendRequest, reply: attention_pb2.AttendResponse, out: Any, lse: Any
) -> list[AttendResult | KvServiceError]:
    """What a reply says of each row; `out` and `lse` are the call's."""
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
