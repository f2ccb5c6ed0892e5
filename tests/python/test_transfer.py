"""Sequences that go from one server program to another."""

import subprocess

import numpy as np
import pytest

from kvservice import Client, KvServiceError
from kvservice.sequence import Sequence
from kvservice.tensors import to_bf16
from kvservice.v1 import model_pb2, types_pb2
from kvservice_demo.server import find_program

MODEL = model_pb2.Model(
    name="handed over",
    layer_count=2,
    query_head_count=4,
    kv_head_count=2,
    head_dim=64,
    cache_dtype=types_pb2.DATA_TYPE_BFLOAT16,
    scale=0.125,
)


@pytest.fixture
def servers(tmp_path):
    endpoints = [f"unix:{tmp_path}/{name}" for name in ("source", "target")]
    processes = []
    for endpoint, more in zip(endpoints, ([f"--transfer-targets={endpoints[1]}"], []), strict=True):
        command = [str(find_program()), f"--listen={endpoint}", "--admin-listen=none"]
        process = subprocess.Popen(
            [*command, "--pool-bytes=16MiB", *more], stdout=subprocess.PIPE, text=True
        )
        assert "ready\n" in iter(process.stdout.readline, "")
        processes.append(process)
    with Client(endpoints[0]) as source, Client(endpoints[1]) as target:
        for client in (source, target):
            client.register_model(MODEL)
        yield source, target
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_transfer_and_move(servers):
    source, target = servers
    rng = np.random.default_rng(3)
    k, v = (to_bf16(rng.standard_normal((2, 300, 2, 64))) for _ in range(2))
    q = rng.standard_normal((4, 64)).astype(np.float32)
    sequence = source.sequence(MODEL.name)
    sequence.append(0, k, v)
    with pytest.raises(KvServiceError) as refused:
        sequence.transfer("unix:/elsewhere")
    assert refused.value.reason == "TRANSFER_TARGET_NOT_ALLOWED"
    assert refused.value.field == "target_endpoint"
    sent = sequence.transfer(target.endpoint)
    assert sent.sent_bytes == k.nbytes + v.nbytes
    assert not sent.moved
    copy = Sequence(target, sent.handle)
    here, there = (each.attend(1, q, position=299) for each in (sequence, copy))
    np.testing.assert_array_equal(here.out, there.out)
    moved = sequence.transfer(target.endpoint, move=True)
    assert moved.moved
    assert moved.handle == sent.handle
    with pytest.raises(KvServiceError, match="no such sequence"):
        sequence.describe()
    assert copy.describe().length_tokens == 300
