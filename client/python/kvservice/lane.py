"""Calls through memory shared with a server on the same host: client/lane.cc in Python.

Nothing here makes a call fail that gRPC could carry: what does not fit, finds no slot or meets a
server that goes down is handed back to take the other way, and repeating it there is safe.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from kvservice import lane_memory
from kvservice.errors import KvServiceError, error_from_status
from kvservice.lane_memory import LaneMemory, LaneShape, SlotWords, align_up
from kvservice.tensors import describe_tensor, element_type, numpy_type
from kvservice.v1 import attention_pb2, error_details_pb2, lane_pb2, sequence_pb2, types_pb2

UNIX_PREFIX = "unix:"

# A server that died without answering is noticed within this.
_CONNECTION_CHECK_S = 0.1
# Between attempts to open a lane.
_REOPEN_PAUSE_S = 1.0
# As the C++ client: only where the threads that look leave enough CPUs to the others.
_SPIN_CPUS_MIN = 8
_SPIN_S = 2e-3
# Between looks at a call that somebody else hands over, who wakes nobody.
_NAP_S = 50e-6
_WORD_MAX = 0xFFFFFFFF

_log = logging.getLogger("kvservice")


@dataclass(frozen=True)
class LaneOptions:
    """The shared memory of a client. A call for which there is no room travels by gRPC."""

    # At a time, 1 to 16.
    calls_max: int = 4
    # Tensors and message of one call, in either direction; takes memory only as it is used.
    call_bytes_max: int = 2 << 20
    # For how long a calling thread looks for the answer before it sleeps: sooner awake, and a CPU
    # busy meanwhile. Default: 2 ms with eight CPUs or more, else not at all.
    spin_s: float | None = None


@dataclass
class _Slot:
    words: SlotWords
    number: int = 0
    is_taken: bool = False
    # Belongs to a `StepBuffers`, between its calls too.
    is_reserved: bool = False
    # Its call was given up; the server may still answer it.
    is_abandoned: bool = False
    # A request lies ready, or is under way, that somebody else hands over.
    is_prepared: bool = False
    # Whoever waited for its answer was let go without one, whatever the server still writes.
    is_released: bool = False


@dataclass(frozen=True)
class Reservation:
    """A slot that belongs to a `StepBuffers`, with its tensors at the begin of the slot's area."""

    lane: Lane
    index: int
    tensor_bytes: int


@dataclass
class LaneReply:
    """A server's answer; the arrays are copies unless the caller's buffers own the slot."""

    message: attention_pb2.AttendResponse
    out: np.ndarray
    lse: np.ndarray


Tensors = dict[str, np.ndarray]
Request = attention_pb2.AttendRequest | sequence_pb2.AppendRequest


def _unavailable(problem: str) -> KvServiceError:
    return KvServiceError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"no calls through shared memory: {problem}",
        reason="LANE_UNAVAILABLE",
    )


def _malformed(name: str, problem: str) -> KvServiceError:
    return KvServiceError(
        grpc.StatusCode.INTERNAL,
        f"the reply's {name} {problem}",
        reason="REPLY_MALFORMED",
        field=name,
    )


def _lost(is_over: bool) -> KvServiceError:
    return KvServiceError(
        grpc.StatusCode.DEADLINE_EXCEEDED if is_over else grpc.StatusCode.UNAVAILABLE,
        "the server did not answer in time" if is_over else "the server is gone, or the lane broke",
        reason="LANE_BROKEN",
    )


class Lane:
    """One open lane. Any thread; each call has a slot of its own, and the calling thread waits."""

    def __init__(self, endpoint: str, options: LaneOptions, deadline_s: float) -> None:
        """Opens it; KvServiceError with LANE_UNAVAILABLE if nobody offers one, else as refused."""
        if not endpoint.startswith(UNIX_PREFIX):
            raise _unavailable(f"{endpoint} is no Unix socket")
        if not lane_memory.is_supported():
            raise _unavailable("lanes need Linux on x86-64")
        area = align_up(max(1, options.call_bytes_max), lane_memory.PAGE_BYTES)
        calls = min(max(1, options.calls_max), lane_memory.SLOTS_MAX)
        path = endpoint.removeprefix(UNIX_PREFIX).removeprefix("//") + lane_memory.PATH_SUFFIX
        self._socket = _connect(path, deadline_s)
        try:
            self._memory = _share_memory(self._socket, LaneShape(calls, area, area))
            # Python waits on a socket with a timeout whatever the flags of a call say.
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise
        self._spin_s = _default_spin_s() if options.spin_s is None else options.spin_s
        self._process = os.getpid()
        self._is_broken = False
        self._mutex = threading.Lock()
        # Guarded by the mutex, but for the number, which is the taker's.
        self._append_count = 0
        self._slots = [_Slot(words) for words in self._memory.slots]

    @property
    def is_usable(self) -> bool:
        """False once it broke, and in a child process, to which its slots do not belong."""
        return not self._is_broken and self._process == os.getpid()

    @property
    def shared_bytes(self) -> np.ndarray:
        """All bytes of the memory."""
        return self._memory.bytes

    def close(self) -> None:
        """Ends the connection; memory that arrays still show stays theirs."""
        self._is_broken = True
        self._socket.close()

    def attend(
        self,
        request: attention_pb2.AttendRequest,
        tensors: Tensors,
        deadline: float,
        reserved: Reservation | None = None,
    ) -> LaneReply | None:
        """The answer to `request` with its `tensors` by field name, q first, each of 3 extents.

        None if it must take another way: all slots are busy, it is too large for one, the server
        goes down or is gone. `deadline` is a time of time.monotonic(). Fills in the tensors' places
        in the memory. With a slot that is `reserved` the tensors are in place there.
        """
        index = self._take_slot(reserved)
        if index is None:
            return None
        kept = reserved.tensor_bytes if reserved is not None else 0
        try:
            message = self._exchange(index, lane_memory.ATTEND, request, tensors, deadline, kept)
            if message is None:
                return None
            response = self._parse(attention_pb2.AttendResponse, message)
            return self._take_outputs(index, request, response, reserved is not None)
        finally:
            self._leave_slot(index)

    def append(
        self, request: sequence_pb2.AppendRequest, tensors: Tensors, deadline: float
    ) -> sequence_pb2.AppendResponse | None:
        """Stores the tokens of one message; the answer has counts alone. As `attend` otherwise."""
        index = self._take_slot(None)
        if index is None:
            return None
        try:
            message = self._exchange(index, lane_memory.APPEND, request, tensors, deadline)
            if message is None:
                return None
            return self._parse(sequence_pb2.AppendResponse, message)
        finally:
            self._leave_slot(index)

    def prepare(
        self, request: attention_pb2.AttendRequest, tensors: Tensors, reserved: Reservation
    ) -> bool:
        """Lays out a call in a reserved slot, where its tensors are or will be, for whoever stores
        its number there. False if the slot has another call, or no room for it or its outputs.

        Ended by `finish_prepared` or `drop_prepared`, once.
        """
        index = self._take_slot(reserved)
        if index is None or not self.is_usable:
            return False
        slot = self._slots[index]
        placed = self._place_request(index, request, tensors, reserved.tensor_bytes)
        if placed is None or not self._has_room_for_outputs(request):
            return False
        slot.words.describe_request(lane_memory.ATTEND, 0, *placed)
        # Also the number of a call that was dropped is not used again: whoever rings for it late
        # shall not begin this one.
        slot.number = (slot.number + 1) & _WORD_MAX
        slot.is_prepared = True
        return True

    def _has_room_for_outputs(self, request: attention_pb2.AttendRequest) -> bool:
        tokens, heads, dim = request.q.shape
        dtype = numpy_type(request.output_dtype or types_pb2.DATA_TYPE_FLOAT32)
        end = align_up(4 * tokens * heads) + tokens * heads * dim * dtype.itemsize
        return end <= self._memory.shape.reply_bytes

    def slot(self, reserved: Reservation) -> _Slot:
        """A reserved slot."""
        return self._slots[reserved.index]

    def output_arrays(
        self, reserved: Reservation, q_shape: tuple[int, int, int], dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where out and lse of a call in this slot will be."""
        begin = self._slots[reserved.index].words.reply_begin
        lse = self._memory.array(begin, q_shape[:2], np.dtype("<f4"))
        out = self._memory.array(align_up(begin + lse.nbytes), q_shape, dtype)
        return out, lse

    def hand_over(self, reserved: Reservation) -> None:
        """Hands a prepared call to the server, whose end is noticed by who waits."""
        slot = self._slots[reserved.index]
        slot.words.hand_over(slot.number)
        self._ring()

    def wait_for_prepared(self, reserved: Reservation, deadline: float) -> None:
        """Returns once a prepared call is answered, and wakes the server for whoever handed it
        over. Else raises, and whoever waits for the answer goes on with what is there."""
        slot = self._slots[reserved.index]
        if slot.is_released:
            raise _lost(False)
        spin_end = time.monotonic() + self._spin_s
        check_at = time.monotonic() + _CONNECTION_CHECK_S
        while slot.words.reply_number() != slot.number:
            now = time.monotonic()
            is_over = now >= deadline
            is_gone = self._is_broken or (now >= check_at and not self._is_connected())
            if is_over or is_gone or not self._ring_for(slot):
                self._break_prepared()
                raise _lost(is_over)
            if now >= check_at:
                check_at = now + _CONNECTION_CHECK_S
            if now < spin_end:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)

    def finish_prepared(
        self,
        reserved: Reservation,
        request: attention_pb2.AttendRequest,
        places: tuple[np.ndarray, np.ndarray],
    ) -> LaneReply:
        """The answer to a prepared call that came, with outputs at these `places`; raises what the
        server says."""
        try:
            message = self._take_message(reserved.index)
            response = self._parse(attention_pb2.AttendResponse, message)
            reply = self._take_outputs(reserved.index, request, response, True)
            for name, place in zip(("out", "lse"), places, strict=True):
                own = getattr(reply, name)
                if own.__array_interface__ != place.__array_interface__:
                    raise _malformed(name, "is elsewhere than it was expected")
            return reply
        finally:
            self.drop_prepared(reserved)

    def drop_prepared(self, reserved: Reservation) -> None:
        """The slot is free: at once if nobody has handed the call over, else once it is answered.
        """
        slot = self._slots[reserved.index]
        is_begun = slot.words.request_number() == slot.number
        if is_begun:
            self._ring()
        else:
            # Should somebody hand it over all the same, the server refuses it.
            slot.words.describe_request(lane_memory.ATTEND, 0, lane_memory.NOWHERE, 0)
        with self._mutex:
            slot.is_prepared = False
            slot.is_abandoned = is_begun and slot.words.reply_number() != slot.number
            slot.is_taken = slot.is_reserved or slot.is_abandoned

    def _ring_for(self, slot: _Slot) -> bool:
        """Wakes the server for who handed a call over; False when it is gone."""
        return slot.words.request_number() != slot.number or self._ring()

    def _break_prepared(self) -> None:
        """Ends all prepared calls: whoever waits for an answer goes on, and what it rings for next
        is nothing that a server takes, as its tensors would be made of outputs that nobody
        computed. The server may still write here, so nobody uses this lane again."""
        self._is_broken = True
        waiting = [slot for slot in self._slots
                   if slot.is_prepared and slot.words.reply_number() != slot.number]
        for slot in waiting:
            slot.words.describe_request(lane_memory.ATTEND, 0, lane_memory.NOWHERE, 0)
        code = grpc.StatusCode.UNAVAILABLE.value[0]
        for slot in waiting:
            slot.is_released = True
            slot.words.answer_instead(code, slot.number)

    def reserve_slot(self, tensor_bytes: int) -> Reservation | None:
        """A slot for `StepBuffers` of so many bytes; None if there is none to have."""
        if tensor_bytes >= self._memory.shape.request_bytes or not self.is_usable:
            return None
        index = self._take_slot(None)
        if index is None:
            return None
        with self._mutex:
            self._slots[index].is_reserved = True
        return Reservation(self, index, tensor_bytes)

    def return_slot(self, reserved: Reservation) -> None:
        """Gives a reserved slot back; no call of it may be under way."""
        with self._mutex:
            slot = self._slots[reserved.index]
            slot.is_reserved = False
            slot.is_taken = slot.is_abandoned or slot.is_prepared

    def request_array(
        self, reserved: Reservation, offset: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray:
        """An array in a reserved slot's request area; `offset` from its begin."""
        begin = self._slots[reserved.index].words.request_begin
        return self._memory.array(begin + offset, shape, dtype)

    def _take_slot(self, reserved: Reservation | None) -> int | None:
        with self._mutex:
            if reserved is not None:
                slot = self._slots[reserved.index]
                self._reclaim(slot)
                return None if slot.is_abandoned or slot.is_prepared else reserved.index
            for index, slot in enumerate(self._slots):
                self._reclaim(slot)
                if not slot.is_taken:
                    slot.is_taken = True
                    return index
        return None

    def _reclaim(self, slot: _Slot) -> None:
        if slot.is_abandoned and slot.words.reply_number() == slot.number:
            slot.is_abandoned = False
            slot.is_taken = slot.is_reserved

    def _leave_slot(self, index: int) -> None:
        with self._mutex:
            slot = self._slots[index]
            # However the call ended: what was handed over and not answered is the server's still.
            slot.number = slot.words.request_number()
            slot.is_abandoned = slot.words.reply_number() != slot.number
            slot.is_taken = slot.is_abandoned or slot.is_reserved

    def _exchange(
        self,
        index: int,
        method: int,
        request: Request,
        tensors: Tensors,
        deadline: float,
        kept_bytes: int = 0,
    ) -> bytes | None:
        """The answer's message; None for another way. The area's first `kept_bytes` are left to
        tensors."""
        placed = self._place_request(index, request, tensors, kept_bytes)
        if placed is None:
            return None
        slot = self._slots[index]
        slot.number = (slot.number + 1) & _WORD_MAX
        order = self._next_order() if method == lane_memory.APPEND else 0
        slot.words.put_request(method, order, *placed, slot.number)
        answered = self._wait(index, deadline)
        if answered is None:
            self._is_broken = True
            return None
        if not answered:
            raise KvServiceError(
                grpc.StatusCode.DEADLINE_EXCEEDED, "the server did not answer in time"
            )
        try:
            return self._take_message(index)
        except KvServiceError as error:
            # Another way may do better.
            if error.code is grpc.StatusCode.UNAVAILABLE or error.reason == "REPLY_TOO_LARGE":
                return None
            raise

    def _place_request(
        self, index: int, request: Request, tensors: Tensors, kept_bytes: int
    ) -> tuple[int, int] | None:
        """Writes tensors and message into the slot; offset and bytes of the message, or None if
        there is no room."""
        memory, slot = self._memory, self._slots[index]
        offset = slot.words.request_begin
        end = offset + memory.shape.request_bytes
        for name, array in tensors.items():
            if array.nbytes > end - offset:
                return None
            # Those of a reserved slot are in place already.
            if kept_bytes == 0:
                np.copyto(memory.array(offset, array.shape, array.dtype), array)
            region = describe_tensor(getattr(request, name), array).region
            region.offset_bytes = offset
            region.length_bytes = array.nbytes
            offset = align_up(offset + array.nbytes)
        offset = max(offset, slot.words.request_begin + kept_bytes)
        message = request.SerializeToString()
        if len(message) > end - offset:
            return None
        memory.bytes[offset : offset + len(message)] = np.frombuffer(message, np.uint8)
        return offset, len(message)

    def _next_order(self) -> int:
        with self._mutex:
            self._append_count = (self._append_count + 1) & _WORD_MAX
            return self._append_count

    def _ring(self) -> bool:
        """Wakes the server if it sleeps; False when it is gone."""
        try:
            if self._memory.server_sleeps():
                self._socket.send(b"\0", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            pass  # A full socket holds bytes that the server has not read yet, and will.
        except OSError:
            return False
        return True

    def _wait(self, index: int, deadline: float) -> bool | None:
        """True once the call is answered, False when time is over, None when the lane broke."""
        slot = self._slots[index]
        words, number = slot.words, slot.number
        if not self._ring():
            return None
        if self._spin_s > 0 and self._spin_for_reply(words, number):
            return True
        words.say_asleep()
        check_at = time.monotonic() + _CONNECTION_CHECK_S
        while (seen := words.reply_number()) != number:
            now = time.monotonic()
            if now >= deadline:
                return False
            if now >= check_at:
                # The server may have fallen asleep between two looks at it.
                if not self._is_connected() or not self._ring():
                    return None
                check_at = now + _CONNECTION_CHECK_S
            words.sleep_while(seen, min(deadline, check_at) - now)
        return True

    def _spin_for_reply(self, words: SlotWords, number: int) -> bool:
        end = time.monotonic() + self._spin_s
        while time.monotonic() < end:
            if words.reply_number() == number:
                return True
            os.sched_yield()  # Other threads of Python go on meanwhile.
        return False

    def _is_connected(self) -> bool:
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False

    def _take_message(self, index: int) -> bytes:
        words = self._slots[index].words
        code, offset, byte_count = words.reply()
        if not words.reply_begin <= offset <= offset + byte_count <= words.reply_end:
            self._is_broken = True
            raise _malformed("reply_offset", "is not in the slot")
        message = self._memory.bytes[offset : offset + byte_count].tobytes()
        if code == 0:
            return message
        raise error_from_status(code, self._parse(error_details_pb2.Status, message))

    def _parse(self, message_type: Any, message: bytes) -> Any:
        try:
            return message_type.FromString(message)
        except DecodeError:
            self._is_broken = True
            raise _malformed("message", "does not parse") from None

    def _take_outputs(
        self,
        index: int,
        request: attention_pb2.AttendRequest,
        response: attention_pb2.AttendResponse,
        in_place: bool,
    ) -> LaneReply:
        words = self._slots[index].words
        shape = tuple(request.q.shape)
        out = self._output(words, response.out, "out", shape, in_place)
        lse = self._output(words, response.lse, "lse", shape[:2], in_place)
        return LaneReply(response, out, lse)

    def _output(
        self,
        words: SlotWords,
        tensor: types_pb2.Tensor,
        name: str,
        shape: tuple[int, ...],
        in_place: bool,
    ) -> np.ndarray:
        dtype = element_type(tensor)
        begin, byte_count = tensor.region.offset_bytes, tensor.region.length_bytes
        problem = ""
        if dtype is None or tuple(tensor.shape) != shape:
            problem = f"has shape {tuple(tensor.shape)}, not {shape}"
        elif byte_count != math.prod(shape) * dtype.itemsize:
            problem = "has another size than its shape"
        elif not words.reply_begin <= begin <= begin + byte_count <= words.reply_end:
            problem = "is not in the slot"
        if problem:
            self._is_broken = True
            raise _malformed(name, problem)
        array = self._memory.array(begin, shape, dtype)
        return array if in_place else array.copy()


def _default_spin_s() -> float:
    return 0.0 if (os.cpu_count() or 1) < _SPIN_CPUS_MIN else _SPIN_S


def _connect(path: str, deadline_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(deadline_s)
        connection.connect(path)
    except OSError:
        connection.close()
        raise _unavailable(f"nobody listens at {path}") from None
    return connection


def _share_memory(connection: socket.socket, shape: LaneShape) -> LaneMemory:
    """Makes the memory and gives the server its part; the server's refusal is raised."""
    try:
        memory = LaneMemory(shape)
    except (OSError, OverflowError, ValueError) as error:
        raise _unavailable(f"the system gives no memory ({error})") from None
    request = lane_pb2.OpenLaneRequest(
        version=lane_memory.VERSION,
        slot_count=shape.slot_count,
        request_bytes=shape.request_bytes,
        reply_bytes=shape.reply_bytes,
    ).SerializeToString()
    try:
        if socket.send_fds(connection, [request], [memory.fd]) != len(request):
            raise _unavailable("the server closed the connection")
        answer = connection.recv(lane_memory.MESSAGE_BYTES_MAX)
    except OSError:
        raise _unavailable("the server did not answer") from None
    finally:
        memory.close_fd()
    response = lane_pb2.OpenLaneResponse()
    with contextlib.suppress(DecodeError):
        response.ParseFromString(answer)
    if response.version == 0:
        raise _unavailable("the server's answer makes no sense")
    if response.HasField("error"):
        if response.error.code == 0:
            raise _unavailable("the server gives no reason")
        raise error_from_status(response.error.code, response.error)
    return memory


@dataclass
class LanePath:
    """The lane of a client, opened at the first call and again some time after it broke."""

    endpoint: str
    options: LaneOptions
    deadline_s: float
    clock: Callable[[], float] = time.monotonic
    # Why there is none at present; None while there is one, and before the first attempt.
    error: KvServiceError | None = None
    _lane: Lane | None = None
    _retry_at: float = -math.inf
    _is_opening: bool = False
    _is_closed: bool = False
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> None:
        """Opens the lane now; raises why it cannot be."""
        if self.get() is None:
            raise self.error or _unavailable("it is being opened")

    def get(self) -> Lane | None:
        """The open lane; None when there is none at present."""
        lane = self._lane
        if lane is not None and lane.is_usable:
            return lane
        with self._mutex:
            self._forget_broken()
            # Whoever opens a lane lets the others go another way meanwhile.
            if self._is_opening or self._is_closed or self.clock() < self._retry_at:
                return self._lane
            self._is_opening = True
        opened, error = None, None
        try:
            opened = Lane(self.endpoint, self.options, self.deadline_s)
        except KvServiceError as refused:
            error = refused
        finally:
            with self._mutex:
                self._is_opening = False
                self._retry_at = self.clock() + _REOPEN_PAUSE_S
                self._note(opened, error)
        return opened

    def close(self) -> None:
        """For good."""
        with self._mutex:
            self._is_closed = True
            if self._lane is not None:
                self._lane.close()
            self._lane = None

    def _forget_broken(self) -> None:
        if self._lane is None or self._lane.is_usable:
            return
        self._lane.close()
        self._lane = None
        self._retry_at = self.clock() + _REOPEN_PAUSE_S
        self.error = _unavailable("the server closed the connection")
        _log.warning("%s: the lane broke, calls travel by gRPC meanwhile", self.endpoint)

    def _note(self, opened: Lane | None, error: KvServiceError | None) -> None:
        if opened is not None and self._is_closed:
            opened.close()
        elif opened is not None:
            self._lane, self.error = opened, None
        elif self.error is None and error is not None:
            _log.info("%s: calls travel by gRPC: %s", self.endpoint, error)
        if error is not None:
            self.error = error

