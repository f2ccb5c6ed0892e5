"""CUDA streams that make prepared calls (`kvservice.prepared`) by themselves.

Needs the driver's library alone; a stream is its handle, as `torch.cuda.Stream.cuda_stream` is. On
one GPU the server and this process need MPS, or each call costs two changes of context.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvservice.prepared import PreparedAttend
    from kvservice.step_buffers import StepBuffers

# CUstreamBatchMemOpType and flags of cuda.h.
_WAIT_VALUE_32 = 1
_WRITE_VALUE_32 = 2
# CU_STREAM_WAIT_VALUE_GEQ: numbers of calls count up, and a lane that breaks may have gone on.
_WAIT_REACHED = 0
_WRITE_AFTER_FENCE = 0  # CU_STREAM_WRITE_VALUE_DEFAULT
_NO_CONTEXT = 201
_PORTABLE_MAPPED = 3  # CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP


# Kept: what is registered must stay mapped.
_registered: dict[int, Any] = {}


class CudaError(RuntimeError):
    """The driver refused."""


class _MemoryOperation(ctypes.Structure):
    """CUstreamBatchMemOpParams, which is 48 bytes."""

    _fields_ = [
        ("operation", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("padding", ctypes.c_uint64),
    ]


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"there is no CUDA driver here: {error}") from None
    driver.cuStreamBatchMemOp_v2.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.POINTER(_MemoryOperation),
        ctypes.c_uint,
    ]
    driver.cuMemHostRegister_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    return driver


def _check(code: int, what: str) -> None:
    if code != 0:
        raise CudaError(f"{what} failed with CUresult {code}")


def register(buffers: StepBuffers) -> None:
    """Makes the memory that these buffers share with the server, and those of all other buffers of
    the client, known to the driver, so that streams of the current context work in it; harmless to
    repeat. It stays known until the process ends. CudaError if the driver refuses."""
    memory = buffers.shared_memory
    if memory is None:
        raise CudaError("these buffers share no memory with a server")
    address = memory.__array_interface__["data"][0]
    if address not in _registered:
        code = _driver().cuMemHostRegister_v2(address, memory.nbytes, _PORTABLE_MAPPED)
        if code == _NO_CONTEXT:
            raise CudaError("this thread has no CUDA context yet: make a tensor on the GPU first")
        _check(code, "cuMemHostRegister")
        _registered[address] = memory


def call(stream: int, prepared: PreparedAttend) -> None:
    """Enqueues the call: whatever is on `stream` before has written its tensors, whatever comes
    after finds its outputs. CudaError if the driver refuses, and then nothing was enqueued."""
    bell = prepared.doorbell
    operations = (_MemoryOperation * 2)(
        (_WRITE_VALUE_32, bell.request, bell.value, _WRITE_AFTER_FENCE),
        (_WAIT_VALUE_32, bell.reply, bell.value, _WAIT_REACHED),
    )
    _check(_driver().cuStreamBatchMemOp_v2(stream, 2, operations, 0), "cuStreamBatchMemOp")
