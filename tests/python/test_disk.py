"""Durable appends, suspend and resume, against a server with a data directory that is killed."""

import subprocess

import numpy as np
import pytest

from kvservice import Client, KvServiceError
from kvservice.tensors import to_bf16
from kvservice.v1 import model_pb2, sequence_pb2, types_pb2
from kvservice_demo.server import find_program

MODEL = model_pb2.Model(
    name="stored",
    layer_count=2,
    query_head_count=4,
    kv_head_count=2,
    head_dim=64,
    cache_dtype=types_pb2.DATA_TYPE_BFLOAT16,
    scale=0.125,
)


class StoredServer:
    """A server whose data stay in a folder from one start to the next."""

    def __init__(self, folder):
        self.endpoint = f"unix:{folder}/socket"
        self._command = [
            str(find_program()),
            f"--listen={self.endpoint}",
            "--admin-listen=none",
            "--pool-bytes=16MiB",
            f"--data-dir={folder}/store",
        ]
        self._process = None

    def start(self):
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert "ready\n" in iter(self._process.stdout.readline, "")
        client = Client(self.endpoint)
        client.register_model(MODEL)
        return client

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture
def server(tmp_path):
    stored = StoredServer(tmp_path)
    yield stored
    stored.kill()


def tokens(count, seed):
    shape = (2, count, 2, 64)
    rng = np.random.default_rng(seed)
    return to_bf16(rng.standard_normal(shape)), to_bf16(rng.standard_normal(shape))


def test_what_was_durable_survives_a_kill(server):
    k, v = tokens(100, 1)
    with server.start() as client:
        sequence = client.sequence("stored")
        reply = sequence.append(0, k, v, durable=True)
        assert reply.sequence.durable_tokens == 100
        sequence.append(100, *tokens(5, 2))
    server.kill()
    with server.start() as client:
        sequence._client = client
        assert sequence.describe().tier == sequence_pb2.TIER_DISK
        with pytest.raises(KvServiceError, match="generation"):
            sequence.append(105, *tokens(1, 3))
        found = sequence.refresh()
        assert found.length_tokens == 100
        again = sequence.append(0, k, v)
        assert again.duplicate_count == again.message_count


def test_suspend_and_resume(server):
    k, v = tokens(70, 4)
    with server.start() as client, client.sequence("stored") as sequence:
        sequence.append(0, k, v)
        suspended = sequence.suspend()
        assert suspended.suspended
        assert suspended.bytes == 0
        with pytest.raises(KvServiceError, match="suspended"):
            sequence.append(70, *tokens(1, 5))
        before = sequence.generation
        sequence.resume()
        assert sequence.generation == before + 1
        again = sequence.append(0, k, v)
        assert again.duplicate_count == again.message_count
