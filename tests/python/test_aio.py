"""The asyncio client gives what the blocking one gives, several calls at a time."""

import asyncio
import threading

import numpy as np
import pytest

import kvservice
from kvservice import KvServiceError, Row, aio, make_policy
from kvservice.v1 import model_pb2, types_pb2
from kvservice_demo.server import OwnServer

MODEL = model_pb2.Model(
    name="m", layer_count=1, query_head_count=2, kv_head_count=1, head_dim=64, scale=1.0,
    cache_dtype=types_pb2.DATA_TYPE_FLOAT32,
)
DENSE = make_policy("dense")


@pytest.fixture(scope="module")
def server():
    with OwnServer() as running:
        yield running


def tokens(count, seed=0):
    return np.random.default_rng(seed).standard_normal((1, count, 1, 64)).astype(np.float32)


def query(seed):
    return np.random.default_rng(seed).standard_normal((2, 64)).astype(np.float32)


def test_every_call(server):
    async def run():
        async with aio.Client(server.endpoint) as client:
            assert await client.register_model(MODEL) != 0
            assert (await client.get_model("m")).head_dim == 64
            assert client.transport == "lane" and client.lane_error is None
            async with await client.sequence("m", policy=DENSE, token_ids=[1, 2]) as sequence:
                assert sequence.matched_tokens == 0
                await sequence.append(0, tokens(5), tokens(5, 1))
                assert (await sequence.describe()).length_tokens == 5
                result = await sequence.attend(0, query(1), position=4)
                async with await sequence.fork(3) as child:
                    assert (await child.describe()).length_tokens == 3
                    reply = await client.attend_rows(
                        0, [Row(sequence, 4), Row(child, 2)], np.stack([query(1), query(2)])
                    )
                    np.testing.assert_array_equal(reply.out[0], result.out[0])
                    assert reply.rows[1].attended_tokens == 3
                assert (await sequence.truncate(2)).length_tokens == 2
                assert await sequence.renew_lease() > 0
                await sequence.drop()
                with pytest.raises(KvServiceError, match="SEQUENCE_NOT_FOUND"):
                    await sequence.describe()
        async with aio.Client(server.admin_endpoint) as admin:
            assert (await admin.server_info()).version

    asyncio.run(run())


def test_many_tasks_share_a_client(server):
    with kvservice.Client(server.endpoint) as plain:
        plain.register_model(MODEL)
        with plain.sequence("m", policy=DENSE) as filled:
            filled.append(0, tokens(50), tokens(50, 1))
            expected = [filled.attend(0, query(seed), position=49).out for seed in range(24)]

            async def run():
                threads = set()

                def attend(seed):
                    threads.add(threading.get_ident())
                    return filled.attend(0, query(seed), position=49).out

                async with aio.Client(server.endpoint, calls_max=3) as client:
                    outs = await asyncio.gather(
                        *(client.run(attend, seed) for seed in range(24)),
                    )
                assert 1 <= len(threads) <= 3
                assert threading.get_ident() not in threads
                return outs

            for got, wanted in zip(asyncio.run(run()), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)


def test_a_sequence_has_every_call_of_the_blocking_one():
    def calls(kind):
        return {name for name in vars(kind) if not name.startswith("_")}

    assert calls(aio.Sequence) == calls(kvservice.Sequence)


def test_the_block_drops_the_sequence_also_after_an_error(server):
    async def run():
        async with aio.Client(server.endpoint) as client:
            await client.register_model(MODEL)
            with pytest.raises(ZeroDivisionError):
                async with await client.sequence("m") as sequence:
                    raise ZeroDivisionError
            with pytest.raises(KvServiceError, match="SEQUENCE_NOT_FOUND"):
                await sequence.describe()

    asyncio.run(run())
