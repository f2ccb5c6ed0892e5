"""The memory that a lane shares with a server, and the system calls around it.

The layout is that of wire/lane_layout.h, version 2. Its words need loads and stores that no other
load or store passes. Python has no fences; x86-64 reorders nothing but a store with a later load of
another word, which `fence` keeps in order. Other processors are not `is_supported`.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import sys
import threading
from dataclasses import dataclass

import numpy as np

VERSION = 2
PATH_SUFFIX = ".lane"
MESSAGE_BYTES_MAX = 4096
SLOTS_MAX = 16
PAGE_BYTES = 4096
ALIGNMENT = 64

# An offset that no message has.
NOWHERE = (1 << 64) - 1

# Methods of calls.
ATTEND = 0
APPEND = 1

_LANE_HEAD_BYTES = 64
_SLOT_HEAD_BYTES = 128

_SYS_FUTEX = 202  # of x86-64
_FUTEX_WAIT = 0

_SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")


def is_supported() -> bool:
    """Whether this system can share memory in the way that lanes need."""
    return (
        sys.platform == "linux"
        and platform.machine() == "x86_64"
        and hasattr(os, "memfd_create")
        and all(hasattr(fcntl, name) for name in ("F_ADD_SEALS", *_SEALS))
    )


def align_up(offset: int, unit: int = ALIGNMENT) -> int:
    """The smallest multiple of `unit` that is at least `offset`."""
    return -(-offset // unit) * unit


@dataclass(frozen=True)
class LaneShape:
    """How many calls at a time, and the bytes of each one's request and reply area."""

    slot_count: int
    request_bytes: int
    reply_bytes: int

    @property
    def head_bytes(self) -> int:
        """Bytes before the first area."""
        return align_up(_LANE_HEAD_BYTES + self.slot_count * _SLOT_HEAD_BYTES, PAGE_BYTES)

    @property
    def bytes(self) -> int:
        """Bytes of the whole memory."""
        return self.head_bytes + self.slot_count * (self.request_bytes + self.reply_bytes)


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def _futex_call():
    call = ctypes.CDLL(None).syscall
    call.argtypes = [
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_long,
        ctypes.c_long,
        ctypes.POINTER(_Timespec),
        ctypes.c_void_p,
        ctypes.c_long,
    ]
    call.restype = ctypes.c_long
    return call


class SlotWords:
    """One slot's words. Numbers written by the server are read once and checked by the reader."""

    def __init__(self, memory: LaneMemory, index: int) -> None:
        shape = memory.shape
        first = _LANE_HEAD_BYTES + index * _SLOT_HEAD_BYTES
        self._words = memory.words
        self._longs = memory.longs
        self._word = first // 4
        self._long = first // 8
        self.request_address = memory.address + first
        self.reply_address = memory.address + first + 64
        self._futex = memory.futex
        self.request_begin = shape.head_bytes + index * (shape.request_bytes + shape.reply_bytes)
        self.reply_begin = self.request_begin + shape.request_bytes
        self.reply_end = self.reply_begin + shape.reply_bytes

    def put_request(
        self, method: int, order: int, offset: int, byte_count: int, number: int
    ) -> None:
        """Hands the slot to the server; `number` differs from the one before.

        `order` counts the appends of a lane.
        """
        self.describe_request(method, order, offset, byte_count)
        self.hand_over(number)

    def hand_over(self, number: int) -> None:
        """Makes what was described a request."""
        self._words[self._word] = number

    def describe_request(self, method: int, order: int, offset: int, byte_count: int) -> None:
        """What the next request is; the server looks once it has the slot."""
        self._words[self._word + 4] = method
        self._words[self._word + 5] = order
        self._longs[self._long + 1] = offset
        self._words[self._word + 1] = byte_count
        self._words[self._word + 21] = 0

    def request_number(self) -> int:
        """The number of the last request that was handed over."""
        return self._words[self._word]

    def reply_number(self) -> int:
        """The number of the last request that was answered."""
        return self._words[self._word + 16]

    def reply(self) -> tuple[int, int, int]:
        """Code, offset and bytes of the answer."""
        words, word = self._words, self._word
        return words[word + 17], self._longs[self._long + 9], words[word + 20]

    def answer_instead(self, code: int, number: int) -> None:
        """Ends a call that the server will not: whoever waits for its number goes on."""
        self._words[self._word + 17] = code
        self._words[self._word + 16] = number

    def say_asleep(self) -> None:
        """From now on the server wakes whoever sleeps."""
        self._words[self._word + 21] = 1

    def sleep_while(self, seen: int, seconds: float) -> None:
        """Sleeps while the reply's number is `seen`, at most so long; may return early.

        The system looks at the number again after everything stored before is visible.
        """
        whole = int(seconds)
        time_max = _Timespec(whole, int((seconds - whole) * 1e9))
        self._futex(
            _SYS_FUTEX, self.reply_address, _FUTEX_WAIT, seen, ctypes.byref(time_max), None, 0
        )


class LaneMemory:
    """A sealed memory file of this process, mapped. Freed with the last array made of it."""

    futex = staticmethod(_futex_call()) if is_supported() else None

    def __init__(self, shape: LaneShape) -> None:
        """OSError if the system gives no memory. `fd` is to be closed once the server has it."""
        self.shape = shape
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        self.fd = os.memfd_create("kvservice-lane", flags)
        try:
            os.ftruncate(self.fd, shape.bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            mapping = mmap.mmap(self.fd, shape.bytes)
        except BaseException:
            self.close_fd()
            raise
        view = memoryview(mapping)
        # Single words go through these: an access is one load or store of the processor.
        self.words = view.cast("I")
        self.longs = view.cast("Q")
        self.bytes = np.frombuffer(mapping, np.uint8)
        self.address: int = self.bytes.__array_interface__["data"][0]
        self.slots = [SlotWords(self, index) for index in range(shape.slot_count)]
        self._fence = threading.Lock()

    def close_fd(self) -> None:
        """The mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def server_sleeps(self) -> bool:
        """Whether the server must be woken; looks after all stores before have become visible."""
        # Taking a lock is an atomic read-modify-write, which no load passes on x86-64.
        with self._fence:
            pass
        return self.words[0] != 0

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in the memory itself."""
        byte_count = dtype.itemsize
        for extent in shape:
            byte_count *= extent
        return self.bytes[offset : offset + byte_count].view(dtype).reshape(shape)
