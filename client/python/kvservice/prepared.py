"""Calls that lie ready in the shared memory and begin when somebody stores one word.

A decode worker on a GPU otherwise waits for its stream before every layer's call, so that q, k and
v are there, and starts the stream again after it. Here the stream does all of that by itself:

    buffers = client.step_buffers(batch, query_heads, kv_heads, head_dim, q_dtype="bfloat16")
    cuda_stream.register(buffers)                      # once
    call = client.prepare_rows(layer, rows, buffers)
    ...                                                # the stream writes buffers.q, .k, .v
    cuda_stream.call(stream, call)                     # and rings, and waits for the answer
    ...                                                # and reads call.out
    reply = call.finish()                              # the CPU, any time later: certificates

Prepare a layer's call while the GPU is at the one before: with buffers for several, the CPU's part
is hidden behind the GPU's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import numpy as np

from kvservice.attend import AttendReply
from kvservice.errors import KvServiceError
from kvservice.lane import LaneReply, Reservation
from kvservice.tensors import numpy_type
from kvservice.v1 import attention_pb2, types_pb2

if TYPE_CHECKING:
    from kvservice.step_buffers import StepBuffers


@dataclass(frozen=True)
class Doorbell:
    """Addresses of two 32-bit words in this process.

    The call begins when `value` is stored at `request`, after its tensors; it is answered, and its
    outputs are there, when the word at `reply` has reached `value` (their difference, as a signed
    number, is not negative: a lane that breaks counts on).
    """

    request: int
    reply: int
    value: int


class PreparedAttend:
    """An Attend call that somebody else begins; `Client.prepare_rows` makes it. One thread at a
    time.

    To be finished, or dropped when nobody has rung and nobody will, before its buffers are used
    again: the server answers whatever is rung for.
    """

    def __init__(
        self,
        buffers: StepBuffers,
        reserved: Reservation,
        request: attention_pb2.AttendRequest,
        read: Callable[[attention_pb2.AttendRequest, LaneReply], AttendReply],
        deadline_s: float,
    ) -> None:
        """The request lies in the slot already."""
        self._reserved: Reservation | None = reserved
        self._buffers = buffers  # whose memory the arrays show
        self._request, self._read, self._deadline_s = request, read, deadline_s
        slot = reserved.lane.slot(reserved)
        self.doorbell = Doorbell(
            slot.words.request_address, slot.words.reply_address, slot.number
        )
        dtype = request.output_dtype or types_pb2.DATA_TYPE_FLOAT32
        # [T, query heads, head_dim] and [T, query heads]: what the answer puts there, once it has
        # come, until the buffers' next call.
        self.out, self.lse = reserved.lane.output_arrays(
            reserved, tuple(request.q.shape), numpy_type(dtype)
        )

    def ring(self) -> None:
        """Begins the call from the CPU."""
        reserved = self._own()
        reserved.lane.hand_over(reserved)

    def wait(self) -> None:
        """Returns once the call is answered. KvServiceError if the server is gone or the client's
        deadline, counted from here, is over: whoever waits for the answer then goes on with outputs
        that mean nothing, and calls of other buffers in flight end like this one.

        Somebody has to be here, or in `finish`, until the answer comes: a GPU cannot wake a server
        that sleeps.
        """
        reserved = self._own()
        try:
            reserved.lane.wait_for_prepared(reserved, time.monotonic() + self._deadline_s)
        except KvServiceError:
            self.drop()
            raise

    def finish(self) -> AttendReply:
        """The answer, waited for; its outputs are `out` and `lse`, in place. Once.

        Raises as `Client.attend_rows` does; then the outputs mean nothing. Nothing is repeated, and
        a stream that goes on has later layers store what it makes of them: truncate the sequences
        to this step's position before it is tried again. Finish in the order of ringing.
        """
        self.wait()
        reserved = self._own()
        self._reserved = None
        reply = reserved.lane.finish_prepared(reserved, self._request, (self.out, self.lse))
        return self._read(self._request, reply)

    def drop(self) -> None:
        """Takes the call back if it has not begun, else leaves its answer; harmless to repeat.
        Whoever rings for it later is refused."""
        if self._reserved is not None:
            self._reserved.lane.drop_prepared(self._reserved)
        self._reserved = None

    def _own(self) -> Reservation:
        if self._reserved is None:
            raise KvServiceError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "this call is over",
                reason="PREPARED_CALL_OVER",
            )
        return self._reserved


def tensors_of(buffers: StepBuffers, *, store: bool) -> dict[str, np.ndarray]:
    """The buffers' arrays by field name; k and v are stored before attending."""
    names = ("q", "k", "v") if store else ("q",)
    return {name: getattr(buffers, name) for name in names}
