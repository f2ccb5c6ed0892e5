"""Arrays that live in the memory shared with the server, so that a call copies nothing there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvservice.lane import Lane
from kvservice.lane_memory import align_up

_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class StepShape:
    """Tokens of all rows together, heads and channels; types as in `Client.step_buffers`."""

    token_count: int
    query_heads: int
    kv_heads: int
    head_dim: int
    q_dtype: str
    kv_dtype: str


class StepBuffers:
    """q, k and v of calls of one shape, to be written before each; one thread at a time.

    A call leaves them as they are. The server may still read those of one that ended with
    DEADLINE_EXCEEDED: repeat it before they are written again. They are ordinary arrays where there
    is no lane to be had.
    bf16 is uint16 bits; `torch.from_dlpack(buffers.k).view(torch.bfloat16)` shows them to torch.
    """

    def __init__(self, shape: StepShape, lane: Lane | None) -> None:
        """`Client.step_buffers` makes them; ValueError for a type that tensors cannot have."""
        for name in (shape.q_dtype, shape.kv_dtype):
            if name not in _DTYPES:
                raise ValueError(f"dtype is {name!r}, expected one of {', '.join(_DTYPES)}")
        self.shape = shape
        keys = (shape.token_count, shape.kv_heads, shape.head_dim)
        queries = (shape.token_count, shape.query_heads, shape.head_dim)
        arrays = [
            (queries, _DTYPES[shape.q_dtype]),
            (keys, _DTYPES[shape.kv_dtype]),
            (keys, _DTYPES[shape.kv_dtype]),
        ]
        sizes = [align_up(math.prod(extents) * dtype.itemsize) for extents, dtype in arrays]
        # The slot that they are in, if there was one to have.
        self.reserved = None if lane is None else lane.reserve_slot(sum(sizes))
        views, offset = [], 0
        for (extents, dtype), size in zip(arrays, sizes, strict=True):
            if self.reserved is not None:
                shared = self.reserved.lane
                views.append(shared.request_array(self.reserved, offset, extents, dtype))
            else:
                views.append(np.zeros(extents, dtype))
            offset += size
        self.q, self.k, self.v = views

    def __enter__(self) -> StepBuffers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the slot back; others write where its arrays, and outputs that stayed, are."""
        if self.reserved is not None:
            self.reserved.lane.return_slot(self.reserved)
        self.reserved = None

    @property
    def shared_memory(self) -> np.ndarray | None:
        """All bytes of the shared memory that q, k and v, and outputs that stay, are in: what to
        register with a GPU's driver, so that it copies there by itself. None without a lane."""
        return None if self.reserved is None else self.reserved.lane.shared_bytes

    def is_in(self, lane: Lane) -> bool:
        """Whether the arrays are in this lane's memory."""
        return self.reserved is not None and self.reserved.lane is lane

    def hold(self, tensors: dict[str, np.ndarray]) -> bool:
        """Whether the tensors of a call, by field name, are these arrays, whole."""
        return all(
            array.__array_interface__["data"] == own.__array_interface__["data"]
            and (array.shape, array.dtype) == (own.shape, own.dtype)
            and array.flags.c_contiguous
            for own, array in ((getattr(self, name), array) for name, array in tensors.items())
        )
