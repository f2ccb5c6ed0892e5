"""Arrays on their way to the service: bf16 rounding, other libraries' arrays, tensors as messages.

numpy has no bfloat16, so a bf16 array is a `uint16` array that holds the bits. This is the one
place that rounds: everything that compares numbers with the service must round the same way.

Arrays of other libraries (torch tensors above all) come in and go out by DLPack, which shows the
same memory. torch's bfloat16 is taken as it is; nothing here imports torch.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from kvservice.v1 import types_pb2

Float32Array = npt.NDArray[np.float32]
Bf16Array = npt.NDArray[np.uint16]

# The wire is little endian, whatever this machine is.
_NUMPY_TYPES: dict[types_pb2.DataType, np.dtype[Any]] = {
    types_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    types_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    types_pb2.DATA_TYPE_BFLOAT16: np.dtype("<u2"),
}
_DATA_TYPES = {dtype: name for name, dtype in _NUMPY_TYPES.items()}

# DLPack's kDLCPU and kDLCUDAHost.
_HOST_DEVICES = (1, 3)

_QUIET_NAN_BIT = np.uint32(0x0040)
_ROUNDING_BIAS = np.uint32(0x7FFF)


def to_bf16(values: npt.ArrayLike) -> Bf16Array:
    """Rounds float32 to bf16 bits: to nearest, ties to even, same shape.

    Finite values beyond the largest bf16 become infinity, as IEEE 754 rounds. A NaN stays a (quiet)
    NaN of the same sign: adding the rounding bias could otherwise carry it into infinity or wrap it
    to zero.
    """
    floats = np.ascontiguousarray(values, dtype=np.float32)
    bits = floats.view(np.uint32)
    high = bits >> np.uint32(16)
    rounded = (bits + (_ROUNDING_BIAS + (high & np.uint32(1)))) >> np.uint32(16)
    nan = np.isnan(floats)
    if nan.any():
        rounded = np.where(nan, high | _QUIET_NAN_BIT, rounded)
    return rounded.astype(np.uint16).reshape(np.shape(values))


def from_bf16(bits: Bf16Array) -> Float32Array:
    """Widens bf16 bits to float32; exact, same shape."""
    if bits.dtype != np.uint16:
        raise TypeError(f"bf16 bits must be uint16, got {bits.dtype}")
    widened = np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)
    return widened.view(np.float32).reshape(bits.shape)


def as_array(values: Any) -> np.ndarray:
    """The same memory as a numpy array, bf16 as uint16 bits; TypeError if that cannot be.

    Takes numpy arrays and what speaks DLPack, in this machine's memory.
    """
    if isinstance(values, np.ndarray):
        return values
    if not hasattr(values, "__dlpack__"):
        raise TypeError(f"expected an array, got {type(values).__name__}")
    try:
        is_here = values.__dlpack_device__()[0] in _HOST_DEVICES
    except (BufferError, ValueError):  # a device that DLPack does not know
        is_here = False
    if not is_here:
        raise TypeError(f"the array is on {values.device}, not in this machine's memory")
    if hasattr(values, "detach"):
        values = values.detach()
    if str(values.dtype) == "torch.bfloat16":
        return np.from_dlpack(values.view(sys.modules["torch"].int16)).view(np.uint16)
    return np.from_dlpack(values)


def as_float32(values: Any) -> Float32Array:
    """An array as `as_array` takes it, in float32."""
    array = as_array(values)
    return from_bf16(array) if array.dtype == np.uint16 else np.asarray(array, np.float32)


def like(array: np.ndarray, values: Any) -> Any:
    """A numpy array as the kind of array that `values` is, without a copy: numpy's or torch's.

    bf16 bits become torch's bfloat16.
    """
    if type(values).__module__.partition(".")[0] != "torch":
        return array
    torch = sys.modules["torch"]
    if array.dtype == np.uint16:
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def describe_tensor(tensor: types_pb2.Tensor, values: np.ndarray) -> types_pb2.Tensor:
    """Gives a message the array's type and shape; TypeError for a type it cannot have."""
    dtype = _DATA_TYPES.get(values.dtype)
    if dtype is None:
        raise TypeError(f"expected float32, float16 or uint16 (bf16 bits), got {values.dtype}")
    tensor.dtype = dtype
    tensor.shape[:] = values.shape
    return tensor


def to_message(values: np.ndarray) -> types_pb2.Tensor:
    """A tensor message of a float32, float16 or bf16 (uint16) array; TypeError for any other."""
    tensor = describe_tensor(types_pb2.Tensor(), values)
    tensor.data = values.tobytes()
    return tensor


def put_inside(request: Any, tensors: dict[str, np.ndarray]) -> Any:
    """Writes tensors into their fields of a request, payload and all; returns the request."""
    for name, array in tensors.items():
        tensor = describe_tensor(getattr(request, name), array)
        tensor.ClearField("region")
        tensor.data = array.tobytes()
    return request


def element_type(tensor: types_pb2.Tensor) -> np.dtype | None:
    """numpy's name of a message's element type; None for one that is not known here."""
    return _NUMPY_TYPES.get(tensor.dtype)


def numpy_type(dtype: types_pb2.DataType) -> np.dtype:
    """numpy's name of an element type."""
    return _NUMPY_TYPES[dtype]


def from_message(tensor: types_pb2.Tensor) -> np.ndarray:
    """The array in a tensor message, read-only; bf16 comes as uint16 bits."""
    dtype = _NUMPY_TYPES[tensor.dtype]
    return np.frombuffer(tensor.data, dtype).reshape(tuple(tensor.shape))
