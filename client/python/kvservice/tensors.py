"""Arrays on their way to the service: bf16 rounding, and tensors as messages.

numpy has no bfloat16, so a bf16 array is a `uint16` array that holds the bits. This is the one
place that rounds: everything that compares numbers with the service must round the same way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvservice.v1 import types_pb2

Float32Array = npt.NDArray[np.float32]
Bf16Array = npt.NDArray[np.uint16]

# The wire is little endian, whatever this machine is.
_NUMPY_TYPES = {
    types_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    types_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    types_pb2.DATA_TYPE_BFLOAT16: np.dtype("<u2"),
}
_DATA_TYPES = {dtype: name for name, dtype in _NUMPY_TYPES.items()}

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


def to_message(values: np.ndarray) -> types_pb2.Tensor:
    """A tensor message of a float32, float16 or bf16 (uint16) array; TypeError for any other."""
    dtype = _DATA_TYPES.get(values.dtype)
    if dtype is None:
        raise TypeError(f"expected float32, float16 or uint16 (bf16 bits), got {values.dtype}")
    return types_pb2.Tensor(dtype=dtype, shape=values.shape, data=values.tobytes())


def from_message(tensor: types_pb2.Tensor) -> np.ndarray:
    """The array in a tensor message, read-only; bf16 comes as uint16 bits."""
    dtype = _NUMPY_TYPES[tensor.dtype]
    return np.frombuffer(tensor.data, dtype).reshape(tuple(tensor.shape))
