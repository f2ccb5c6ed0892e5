"""What a call of the Python client costs there and back: through gRPC (unary) and through shared
memory (lane), against a floor measured in the same run: as many bytes written to a Unix socket by
Python, read by another process, and written back. Ways take turns; placement is the system's.

As kvbench's rpc_latency, the engine has next to nothing to do: one row attends one token, the rest
of the payload belongs to a row that names no sequence. "lane_in_place" has its queries in shared
memory and leaves the outputs there. "results" makes every array of the certificates, too.

    PYTHONPATH=client/python:build/python build/venv/bin/python tests/bench/python_latency.py
"""

import os
import socket
import time

import numpy as np

from kvservice import Client, Row, Sequence, make_policy
from kvservice.v1 import model_pb2, types_pb2
from kvservice_demo.server import OwnServer

HEAD_DIM = 256
TOKENS = 8
ROUNDS = 20
CALLS = 100
SIZES_KIB = (4, 64, 256)


class Echo:
    """A process that sends back what it gets."""

    def __init__(self, byte_count):
        self._bytes = bytearray(byte_count)
        self._socket, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            self._socket.close()
            while read_all(theirs, self._bytes):
                theirs.sendall(self._bytes)
            os._exit(0)
        theirs.close()

    def call(self):
        self._socket.sendall(self._bytes)
        read_all(self._socket, self._bytes)

    def close(self):
        self._socket.close()
        os.waitpid(self._pid, 0)


def read_all(connection, buffer):
    view, at = memoryview(buffer), 0
    while at < len(buffer):
        got = connection.recv_into(view[at:])
        if got == 0:
            return False
        at += got
    return True


class Caller:
    """One client and its calls."""

    def __init__(self, endpoint, byte_count, transport, *, in_place=False, results=False):
        self._client = Client(endpoint, transport=transport)
        tokens = 1 if byte_count <= 4096 else TOKENS
        heads = byte_count // 4 // HEAD_DIM // tokens
        kv_heads = max(1, heads // 16)
        name = f"heads{heads}"
        self._client.register_model(
            model_pb2.Model(
                name=name, layer_count=1, query_head_count=heads, kv_head_count=kv_heads,
                head_dim=HEAD_DIM, cache_dtype=types_pb2.DATA_TYPE_BFLOAT16, scale=1.0,
            )
        )
        sequence = self._client.sequence(name, policy=make_policy("dense"))
        ones = np.full((1, 1, kv_heads, HEAD_DIM), 0x3F80, np.uint16)
        sequence.append(0, ones, ones)
        self._rows = [Row(sequence, 0)]
        if tokens > 1:
            stranger = types_pb2.SequenceHandle(id=b"x" * 16, generation=1)
            self._rows.append(Row(Sequence(self._client, stranger), 0, tokens - 1))
        self._q = np.full((tokens, heads, HEAD_DIM), 0.5, np.float32)
        self._transport, self._results = transport, results
        self._buffers = None
        if in_place:
            self._buffers = self._client.step_buffers(tokens, heads, kv_heads, HEAD_DIM)
            self._buffers.q[:] = self._q
            self._q = self._buffers.q

    def call(self):
        reply = self._client.attend_rows(0, self._rows, self._q, buffers=self._buffers)
        if reply.transport != self._transport or reply.out[0, 0, 0] != 1.0:
            raise RuntimeError("an output is not the value, or came another way")
        if self._results:
            _ = reply.rows[0].certificates, reply.rows[0].groups

    def close(self):
        if self._buffers is not None:
            self._buffers.close()
        self._client.close()


def measure(endpoint, kib, echo):
    """Seconds of each call by name of the way."""
    ways = {"raw_socket": echo}
    for transport in ("unary", "lane"):
        ways[transport] = Caller(endpoint, kib << 10, transport)
        ways[f"{transport}_results"] = Caller(endpoint, kib << 10, transport, results=True)
    ways["lane_in_place"] = Caller(endpoint, kib << 10, "lane", in_place=True)
    seconds = {name: [] for name in ways}
    for round_number in range(-1, ROUNDS):
        for name, way in ways.items():
            for _ in range(CALLS):
                began = time.perf_counter()
                way.call()
                elapsed = time.perf_counter() - began
                if round_number >= 0:  # the one before warmed up
                    seconds[name].append(elapsed)
    for name, way in ways.items():
        if name != "raw_socket":
            way.close()
    return seconds


def append_rates(endpoint):
    """Gigabytes per second of appends of 32 MiB by name of the way, several of each."""
    tokens, heads = 8192, 8
    k = np.zeros((1, tokens, heads, HEAD_DIM // 2), np.uint16)
    rates = {"unary": [], "lane": []}
    for round_number in range(-1, 8):
        for transport, samples in rates.items():
            with Client(endpoint, transport=transport) as client:
                client.register_model(
                    model_pb2.Model(
                        name="append", layer_count=1, query_head_count=heads, kv_head_count=heads,
                        head_dim=HEAD_DIM // 2, cache_dtype=types_pb2.DATA_TYPE_BFLOAT16, scale=1.0,
                    )
                )
                with client.sequence("append") as sequence:
                    began = time.perf_counter()
                    sequence.append(0, k, k)
                    elapsed = time.perf_counter() - began
            if round_number >= 0:
                samples.append(2 * k.nbytes / elapsed / 1e9)
    return rates


def main():
    # Before gRPC has threads, which a forked process would miss.
    echoes = {kib: Echo(kib << 10) for kib in SIZES_KIB}
    with OwnServer() as server:
        for kib, echo in echoes.items():
            seconds = measure(server.endpoint, kib, echo)
            for suffix, share in (("p50", 50), ("p99", 99)):
                floor = np.percentile(seconds["raw_socket"], share)
                unary = np.percentile(seconds["unary"], share)
                for name, samples in seconds.items():
                    value = np.percentile(samples, share)
                    case = f"free_{kib}KiB_{name}_{suffix}"
                    print(
                        f"python_latency  {case:42} {value * 1e6:10.1f} us "
                        f"{value / floor:8.2f}x raw_socket {value / unary:8.2f}x unary",
                        flush=True,
                    )
        rates = append_rates(server.endpoint)
        unary = np.median(rates["unary"])
        for name, samples in rates.items():
            value = np.median(samples)
            case = f"append_32MiB_{name}"
            print(f"python_latency  {case:42} {value:10.2f} GB/s {value / unary:37.2f}x unary")
    # The later ones hold copies of the earlier ones' sockets.
    for echo in reversed(echoes.values()):
        echo.close()


if __name__ == "__main__":
    main()
