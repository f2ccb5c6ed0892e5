"""Calls that somebody else begins: a thread does here what a GPU's stream does."""

import contextlib
import ctypes
import os
import struct
import threading

import grpc
import numpy as np
import pytest
from kvservice import (
    Client,
    KvServiceError,
    LaneOptions,
    Row,
    Sequence,
    cuda_stream,
    make_policy,
)
from kvservice.tensors import to_bf16
from kvservice.v1 import error_details_pb2, types_pb2
from kvservice_demo.gguf_model import LlamaConfig
from kvservice_demo.server import OwnServer
from kvservice_demo.session import register

from scripted_lane import ScriptedLane

CONFIG = LlamaConfig(
    layer_count=2,
    query_head_count=4,
    kv_head_count=2,
    head_dim=64,
    hidden_size=256,
    feed_forward_size=1,
    context_tokens_max=8192,
    rope_base=10000.0,
    norm_epsilon=1e-5,
)
TOKENS = 300
CERTIFIED = make_policy("certified", max_dropped_mass=0.05, dense_below_tokens=64)
BF16 = types_pb2.DATA_TYPE_BFLOAT16
SHAPES = [(1, heads, CONFIG.head_dim) for heads in (CONFIG.query_head_count, CONFIG.kv_head_count)]
WAIT_S = 20.0


@pytest.fixture(scope="module")
def server():
    with OwnServer() as running:
        with Client(running.endpoint) as client:
            register(client, "tiny", CONFIG)
        yield running


@pytest.fixture(name="client")
def make_client(server):
    with Client(server.endpoint, transport="lane") as client:
        yield client


@pytest.fixture
def filled(client):
    rng = np.random.default_rng(0)
    shape = (CONFIG.layer_count, TOKENS, CONFIG.kv_head_count, CONFIG.head_dim)
    with client.sequence("tiny", policy=CERTIFIED) as sequence:
        sequence.append(0, *(to_bf16(rng.standard_normal(shape)) for _ in range(2)))
        yield sequence


def new_buffers(client):
    return client.step_buffers(1, CONFIG.query_head_count, CONFIG.kv_head_count, CONFIG.head_dim,
                               q_dtype="bfloat16")


def step_tensors(seed):
    rng = np.random.default_rng(seed)
    q, k = (to_bf16(rng.standard_normal(shape)) for shape in SHAPES)
    return q, k, to_bf16(rng.standard_normal(SHAPES[1]))


def word(address):
    return ctypes.c_uint32.from_address(address)


class Stream(threading.Thread):
    """Writes a call's tensors, rings, waits for the answer, and takes the outputs, as a GPU would.
    """

    def __init__(self, calls, *, is_late=False):
        """`calls`: buffers, prepared call and tensors of each, one after the other. A late one
        rings when the server has fallen asleep."""
        super().__init__(daemon=True)
        self.calls, self.is_late, self.outs = calls, is_late, []
        self.start()

    def run(self):
        for buffers, prepared, tensors in self.calls:
            while self.is_late and not buffers.reserved.lane._memory.server_sleeps():
                os.sched_yield()
            for to, tensor in zip((buffers.q, buffers.k, buffers.v), tensors, strict=True):
                to[...] = tensor
            bell = prepared.doorbell
            word(bell.request).value = bell.value
            while (word(bell.reply).value - bell.value) % 2**32 >= 2**31:
                os.sched_yield()
            self.outs.append(prepared.out.copy())


def assert_ended(stream):
    stream.join(WAIT_S)
    assert not stream.is_alive()


def prepare(client, sequence, buffers, position=TOKENS, layer=0, **options):
    return client.prepare_rows(layer, [Row(sequence, position)], buffers, output_dtype=BF16,
                               **options)


def test_answers_are_those_of_calls_that_the_cpu_makes(client, filled):
    with filled.fork() as other, new_buffers(client) as buffers:
        tensors = step_tensors(1)
        prepared = prepare(client, filled, buffers)
        assert word(prepared.doorbell.request).value != prepared.doorbell.value
        stream = Stream([(buffers, prepared, tensors)])
        reply = prepared.finish()
        assert_ended(stream)
        expected = client.attend_rows(0, [Row(other, TOKENS)], *tensors, output_dtype=BF16)
        assert reply.transport == "lane" and np.any(reply.out)
        np.testing.assert_array_equal(reply.out, expected.out)
        np.testing.assert_array_equal(reply.lse, expected.lse)
        np.testing.assert_array_equal(stream.outs[0], expected.out)
        for mine, theirs in zip(reply.rows, expected.rows, strict=True):
            np.testing.assert_array_equal(mine.certificates.dropped_mass_upper,
                                          theirs.certificates.dropped_mass_upper)
            assert mine.attended_tokens == theirs.attended_tokens == TOKENS + 1
        # In place: what the stream reads next.
        assert reply.out.__array_interface__["data"] == prepared.out.__array_interface__["data"]


def test_a_stream_makes_one_call_after_the_other(client, filled):
    with contextlib.ExitStack() as stack:
        buffers = [stack.enter_context(new_buffers(client)) for _ in range(3)]
        for first in range(TOKENS, TOKENS + 4, 2):
            calls = [
                (own, prepare(client, filled, own, position, layer), step_tensors(position))
                for own, (position, layer) in zip(
                    buffers, ((first, 0), (first, 1), (first + 1, 0)), strict=True)
            ]
            stream = Stream(calls)
            replies = [prepared.finish() for _, prepared, _ in calls]
            assert_ended(stream)
            for reply, out in zip(replies, stream.outs, strict=True):
                np.testing.assert_array_equal(reply.out, out)
            assert [reply.rows[0].attended_tokens for reply in replies] == [
                first + 1, first + 1, first + 2]
            last = prepare(client, filled, buffers[0], first + 1, 1)
            last.ring()
            last.finish()


def test_a_server_that_sleeps_is_woken(server, filled):
    # Neither side looks before it sleeps on a machine of few CPUs, and a stream wakes nobody.
    with Client(server.endpoint, lane=LaneOptions(spin_s=0.0)) as client:
        own = Sequence(client, filled.handle)
        with new_buffers(client) as buffers:
            for position in range(TOKENS, TOKENS + 5):
                prepared = prepare(client, own, buffers, position)
                stream = Stream([(buffers, prepared, step_tensors(position))], is_late=True)
                assert prepared.finish().rows[0].attended_tokens == position + 1
                assert_ended(stream)


def test_a_call_that_nobody_begins_is_taken_back(client, filled):
    with new_buffers(client) as buffers:
        first = prepare(client, filled, buffers)
        with pytest.raises(KvServiceError) as refused:
            prepare(client, filled, buffers)
        assert (refused.value.reason, refused.value.field) == ("LANE_UNAVAILABLE", "buffers")
        # Meanwhile others have to go another way.
        reply = client.attend_rows(0, [Row(filled, TOKENS - 1)], buffers.q, buffers=buffers)
        assert reply.transport == "unary"
        first.drop()
        first.drop()
        with pytest.raises(KvServiceError) as over:
            first.finish()
        assert over.value.reason == "PREPARED_CALL_OVER"
        second = prepare(client, filled, buffers)
        # Whoever rings for the first one late does not begin the second.
        assert second.doorbell.value == first.doorbell.value + 1
        second.ring()
        assert second.finish().rows[0].attended_tokens == TOKENS + 1


def test_a_call_that_was_dropped_is_refused(client, filled):
    with new_buffers(client) as buffers:
        dropped = prepare(client, filled, buffers)
        bell = dropped.doorbell
        dropped.drop()
        word(bell.request).value = bell.value
        own = buffers.reserved.lane
        own._ring()
        while word(bell.reply).value != bell.value:
            os.sched_yield()
        code = own.slot(buffers.reserved).words.reply()[0]
        assert code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    # Nothing was stored.
    assert filled.describe().length_tokens == TOKENS


def test_buffers_that_are_closed_leave_their_call_its_place(client, filled):
    buffers = new_buffers(client)
    prepared = prepare(client, filled, buffers)
    buffers.close()
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(new_buffers(client)) for _ in range(4)]
        places = {own.q.ctypes.data for own in others}
        assert buffers.q.ctypes.data not in places
        prepared.drop()
        assert new_buffers(client).q.ctypes.data == buffers.q.ctypes.data


def test_a_call_whose_outputs_have_no_room_is_not_prepared(server, filled):
    lane = LaneOptions(call_bytes_max=8192)
    with Client(server.endpoint, lane=lane) as client:
        with client.step_buffers(10, 4, 1, CONFIG.head_dim, q_dtype="float16") as buffers:
            assert buffers.shared_memory is not None
            rows = [Row(Sequence(client, filled.handle), TOKENS, 10)]
            with pytest.raises(KvServiceError) as refused:
                client.prepare_rows(0, rows, buffers, store=False)
            assert refused.value.reason == "LANE_UNAVAILABLE"


def test_a_refused_call_lets_the_stream_go_on(client, filled):
    with new_buffers(client) as buffers:
        prepared = prepare(client, filled, buffers, layer=CONFIG.layer_count)
        stream = Stream([(buffers, prepared, step_tensors(1))])
        with pytest.raises(KvServiceError) as refused:
            prepared.finish()
        assert refused.value.field == "layer"
        assert_ended(stream)
        row = prepare(client, filled, buffers, TOKENS + 5)
        row.ring()
        assert row.finish().rows[0].reason == "POSITION_GAP"
        # The next one finds everything as it was.
        after = prepare(client, filled, buffers)
        after.ring()
        assert after.finish().rows[0].attended_tokens == TOKENS + 1


def test_buffers_without_shared_memory_have_no_prepared_calls(server, filled):
    with Client(server.endpoint, transport="unary") as client, new_buffers(client) as buffers:
        with pytest.raises(KvServiceError) as refused:
            prepare(client, Sequence(client, filled.handle), buffers)
        assert refused.value.reason == "LANE_UNAVAILABLE"


def scripted(tmp_path, server, answer, **options):
    stack = contextlib.ExitStack()
    script = stack.enter_context(ScriptedLane(tmp_path, server.endpoint, answer))
    client = stack.enter_context(
        Client(script.endpoint, transport="lane", lane=LaneOptions(calls_max=2), **options))
    return stack, client


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_a_stream_does_not_wait_for_a_server_that_never_answers(tmp_path, server, filled, code):
    is_gone = code is grpc.StatusCode.UNAVAILABLE

    def answer(lane):
        if is_gone:
            lane.close_connection()

    stack, client = scripted(tmp_path, server, answer, deadline_s=30.0 if is_gone else 0.3)
    with stack, new_buffers(client) as buffers, new_buffers(client) as others:
        prepared = prepare(client, filled, buffers)
        behind = prepare(client, filled, others)
        stream = Stream([(buffers, prepared, step_tensors(1)), (others, behind, step_tensors(2))])
        with pytest.raises(KvServiceError) as lost:
            prepared.finish()
        assert (lost.value.code, lost.value.reason) == (code, "LANE_BROKEN")
        # What a slow server writes there after the stream was let go is no answer any more.
        others.reserved.lane.slot(others.reserved).words.answer_instead(0, behind.doorbell.value)
        with pytest.raises(KvServiceError) as lost:
            behind.finish()
        # At once, without another deadline.
        assert lost.value.code is grpc.StatusCode.UNAVAILABLE
        assert lost.value.reason == "LANE_BROKEN"
        assert_ended(stream)
        # What the stream rings for then is nothing that a server takes.
        words = others.reserved.lane.slot(others.reserved).words
        assert words._longs[words._long + 1] == 2**64 - 1
        with pytest.raises(KvServiceError) as over:
            prepared.finish()
        assert over.value.reason == "PREPARED_CALL_OVER"


def test_what_the_server_says_of_the_call_is_not_repeated_elsewhere(tmp_path, server, filled):
    status = error_details_pb2.Status(code=14, message="draining").SerializeToString()
    stack, client = scripted(tmp_path, server, lambda lane: lane.reply(status, code=14))
    with stack, new_buffers(client) as buffers:
        prepared = prepare(client, filled, buffers)
        prepared.ring()
        with pytest.raises(KvServiceError) as down:
            prepared.finish()
        assert (down.value.code, down.value.message) == (grpc.StatusCode.UNAVAILABLE, "draining")


class Driver:
    """Notes what is asked of it; `code` is its answer."""

    def __init__(self, code=0):
        self.code, self.asked = code, []

    def cuMemHostRegister_v2(self, *arguments):  # noqa: N802
        self.asked.append(arguments)
        return self.code

    def cuStreamBatchMemOp_v2(self, stream, count, operations, flags):  # noqa: N802
        self.asked.append((stream, count, bytes(operations), flags))
        return self.code


def test_a_stream_is_told_to_write_the_word_and_to_wait(client, filled, monkeypatch):
    driver = Driver()
    monkeypatch.setattr(cuda_stream, "_driver", lambda: driver)
    with new_buffers(client) as buffers, new_buffers(client) as others:
        cuda_stream.register(buffers)
        cuda_stream.register(others)
        memory = buffers.shared_memory
        # Both are in the same memory: once. 3: for all contexts, and mapped.
        assert driver.asked == [(memory.ctypes.data, memory.nbytes, 3)]
        prepared = prepare(client, filled, buffers)
        cuda_stream.call(77, prepared)
        stream, count, operations, flags = driver.asked[1]
        assert (stream, count, flags, len(operations)) == (77, 2, 0, 96)
        bell = prepared.doorbell
        # CUstreamBatchMemOpParams of cuda.h: operation, address, value, flags.
        ring, wait = (struct.unpack_from("<I4xQI4xI", operations, at) for at in (0, 48))
        assert ring == (2, bell.request, bell.value, 0)  # WRITE_VALUE_32, with a fence before it
        assert wait == (1, bell.reply, bell.value, 0)  # WAIT_VALUE_32, GEQ
        driver.code = 801
        with pytest.raises(cuda_stream.CudaError, match="801"):
            cuda_stream.call(77, prepared)
        prepared.drop()


def test_what_a_driver_refuses_is_said(server, monkeypatch):
    monkeypatch.setattr(cuda_stream, "_driver", lambda: Driver(code=1))
    with Client(server.endpoint) as client, new_buffers(client) as buffers:
        with pytest.raises(cuda_stream.CudaError, match="cuMemHostRegister failed with CUresult 1"):
            cuda_stream.register(buffers)
        monkeypatch.setattr(cuda_stream, "_driver", lambda: Driver(code=201))
        with pytest.raises(cuda_stream.CudaError, match="no CUDA context yet"):
            cuda_stream.register(buffers)
    with Client(server.endpoint, transport="unary") as client, new_buffers(client) as buffers:
        with pytest.raises(cuda_stream.CudaError, match="share no memory"):
            cuda_stream.register(buffers)


def test_a_real_stream_makes_calls(client, filled):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with filled.fork() as other, new_buffers(client) as buffers:
        torch.zeros(1, device="cuda")
        cuda_stream.register(buffers)
        stream = torch.cuda.Stream()
        for position in range(TOKENS, TOKENS + 20):
            tensors = step_tensors(position)
            with torch.cuda.stream(stream):
                prepared = prepare(client, filled, buffers, position)
                for to, tensor in zip((buffers.q, buffers.k, buffers.v), tensors, strict=True):
                    on_gpu = torch.from_numpy(tensor.view(np.int16)).cuda()
                    torch.from_numpy(to.view(np.int16)).copy_(on_gpu, non_blocking=True)
                cuda_stream.call(stream.cuda_stream, prepared)
                out = torch.from_numpy(prepared.out.view(np.int16)).cuda(non_blocking=True)
            reply = prepared.finish()
            stream.synchronize()
            expected = client.attend_rows(0, [Row(other, position)], *tensors, output_dtype=BF16)
            np.testing.assert_array_equal(out.cpu().numpy(), expected.out.view(np.int16))
            assert reply.rows[0].attended_tokens == position + 1
