"""The client for asyncio: the same calls, awaited.

    async with aio.Client("unix:/run/kvservice.sock") as client:
        async with await client.sequence("llama") as sequence:
            await sequence.append(0, k, v)
            result = await sequence.attend(0, q, k1, v1, position=n)

Calls run in threads of the client's own, `calls_max` at a time, more wait for their turn: a call by
shared memory is shorter than what an event loop could save, and it leaves the loop free. A call
whose awaiting is cancelled goes on to its end, and repeating it is safe. A sequence belongs to one
task at a time.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from kvservice import client as blocking
from kvservice import sequence as blocking_sequence
from kvservice.attend import AttendReply, Row
from kvservice.errors import KvServiceError
from kvservice.results import AttendResult
from kvservice.v1 import admin_pb2, model_pb2, sequence_pb2, types_pb2

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Client:
    """`kvservice.Client` for one event loop; arguments and answers are its."""

    def __init__(self, endpoint: str, *, calls_max: int = 4, **options: Any) -> None:
        """`calls_max` calls at a time; `options` as for `kvservice.Client`."""
        self._client = blocking.Client(endpoint, **options)
        self._threads = ThreadPoolExecutor(calls_max, thread_name_prefix="kvservice")

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection once the calls under way have ended."""
        await asyncio.to_thread(self._threads.shutdown)
        self._client.close()

    @property
    def transport(self) -> blocking.Transport:
        """How Attend would travel now."""
        return self._client.transport

    @property
    def lane_error(self) -> KvServiceError | None:
        """Why `transport` is "unary"."""
        return self._client.lane_error

    async def server_info(self) -> admin_pb2.GetServerInfoResponse:
        """See `kvservice.Client`."""
        return await self.run(self._client.server_info)

    async def register_model(self, model: model_pb2.Model) -> int:
        """See `kvservice.Client`."""
        return await self.run(self._client.register_model, model)

    async def get_model(self, name: str) -> model_pb2.Model:
        """See `kvservice.Client`."""
        return await self.run(self._client.get_model, name)

    async def sequence(self, model: str, **options: Any) -> Sequence:
        """See `kvservice.Client`; use it with `async with`, which drops it at the end."""
        return Sequence(self, await self.run(self._client.sequence, model, **options))

    async def attend_rows(
        self,
        layer: int,
        rows: Iterable[Row],
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        **options: Any,
    ) -> AttendReply:
        """See `kvservice.Client`; rows take the sequences of this module."""
        return await self.run(self._client.attend_rows, layer, list(rows), q, k, v, **options)

    async def run(
        self,
        call: Callable[Arguments, Answer],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Runs a call in one of the threads."""
        bound = functools.partial(call, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads, bound)


class Sequence:
    """`kvservice.Sequence`, awaited; `async with` drops it at the end of the block."""

    def __init__(self, client: Client, sequence: blocking_sequence.Sequence) -> None:
        """`Client.sequence` makes new ones."""
        self._client = client
        self._sequence = sequence

    async def __aenter__(self) -> Sequence:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.run(self._sequence.__exit__)

    @property
    def handle(self) -> types_pb2.SequenceHandle:
        """Id and generation, as messages name the sequence."""
        return self._sequence.handle

    @property
    def id(self) -> bytes:
        """16 random bytes."""
        return self._sequence.id

    @property
    def generation(self) -> int:
        """See `kvservice.Sequence`."""
        return self._sequence.generation

    @property
    def matched_tokens(self) -> int:
        """See `kvservice.Sequence`."""
        return self._sequence.matched_tokens

    async def append(
        self, start_position: int, k: Any, v: Any, **options: Any
    ) -> sequence_pb2.AppendResponse:
        """See `kvservice.Sequence`."""
        return await self._client.run(self._sequence.append, start_position, k, v, **options)

    async def attend(
        self, layer: int, q: Any, k: Any | None = None, v: Any | None = None, **options: Any
    ) -> AttendResult:
        """See `kvservice.Sequence`."""
        return await self._client.run(self._sequence.attend, layer, q, k, v, **options)

    async def fork(self, length_tokens: int | None = None, **options: Any) -> Sequence:
        """See `kvservice.Sequence`."""
        fork = self._sequence.fork
        return Sequence(self._client, await self._client.run(fork, length_tokens, **options))

    async def truncate(self, length_tokens: int) -> sequence_pb2.Sequence:
        """See `kvservice.Sequence`."""
        return await self._client.run(self._sequence.truncate, length_tokens)

    async def describe(self) -> sequence_pb2.Sequence:
        """See `kvservice.Sequence`."""
        return await self._client.run(self._sequence.describe)

    async def suspend(self) -> sequence_pb2.Sequence:
        """See `kvservice.Sequence`."""
        return await self._client.run(self._sequence.suspend)

    async def resume(self) -> sequence_pb2.Sequence:
        """See `kvservice.Sequence`."""
        return await self._client.run(self._sequence.resume)

    async def transfer(
        self, target_endpoint: str, *, move: bool = False
    ) -> sequence_pb2.TransferResponse:
        """See `kvservice.Sequence`."""
        return await self._client.run(self._sequence.transfer, target_endpoint, move=move)

    async def refresh(self) -> sequence_pb2.Sequence:
        """See `kvservice.Sequence`."""
        return await self._client.run(self._sequence.refresh)

    async def renew_lease(self, lease_ms: int = 0) -> int:
        """See `kvservice.Sequence`."""
        return await self._client.run(self._sequence.renew_lease, lease_ms)

    async def drop(self) -> None:
        """See `kvservice.Sequence`."""
        await self._client.run(self._sequence.drop)
