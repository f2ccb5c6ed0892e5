"""Calls through shared memory: the same answers as by gRPC, whatever the other side does."""

import contextlib
import threading

import grpc
import numpy as np
import pytest
from numpy.lib.array_utils import byte_bounds

from kvservice import Client, KvServiceError, LaneOptions, Row, Sequence, make_policy
from kvservice.lane import Lane, LanePath
from kvservice.lane_memory import LaneMemory, LaneShape
from kvservice.step_buffers import StepBuffers, StepShape
from kvservice.tensors import to_bf16
from kvservice.v1 import attention_pb2, error_details_pb2, types_pb2
from kvservice_demo.gguf_model import LlamaConfig
from kvservice_demo.server import OwnServer
from kvservice_demo.session import register
from scripted_lane import ScriptedLane

CONFIG = LlamaConfig(
    layer_count=1,
    query_head_count=4,
    kv_head_count=2,
    head_dim=64,
    hidden_size=256,
    feed_forward_size=1,
    context_tokens_max=8192,
    rope_base=10000.0,
    norm_epsilon=1e-5,
)
MODEL = "tiny"
TOKENS = 300
DENSE = make_policy("dense")
OUT = (1, CONFIG.query_head_count, CONFIG.head_dim)
LSE = OUT[:2]


@pytest.fixture(scope="module")
def server():
    with OwnServer() as running:
        with Client(running.endpoint) as client:
            register(client, MODEL, CONFIG)
        yield running


@pytest.fixture(scope="module")
def unary(server):
    with Client(server.endpoint, transport="unary") as client:
        yield client


@pytest.fixture(scope="module")
def filled(unary):
    rng = np.random.default_rng(0)
    shape = (CONFIG.layer_count, TOKENS, CONFIG.kv_head_count, CONFIG.head_dim)
    with unary.sequence(MODEL, policy=DENSE) as sequence:
        k, v = to_bf16(rng.standard_normal(shape)), to_bf16(rng.standard_normal(shape))
        sequence.append(0, k, v)
        yield sequence


def queries(count, seed=1):
    rng = np.random.default_rng(seed)
    shape = (count, CONFIG.query_head_count, CONFIG.head_dim)
    return rng.standard_normal(shape).astype(np.float32)


def attend(client, sequence, q=None, **options):
    """A call about tokens that are there already."""
    q = queries(1) if q is None else q
    return client.attend_rows(0, [Row(sequence, TOKENS - len(q), len(q))], q, **options)


def assert_equal(reply, expected):
    """Bit for bit."""
    np.testing.assert_array_equal(reply.out, expected.out)
    np.testing.assert_array_equal(reply.lse, expected.lse)
    for row, other in zip(reply.rows, expected.rows, strict=True):
        np.testing.assert_array_equal(row.out, other.out)
        assert row.attended_tokens == other.attended_tokens == TOKENS


def test_a_lane_answers_as_grpc_does(server, unary, filled):
    with Client(server.endpoint) as client:
        assert client.transport == "lane"
        assert client.lane_error is None
        for count in (1, 2, 8):
            reply = attend(client, filled, queries(count))
            expected = attend(unary, filled, queries(count))
            assert (reply.transport, expected.transport) == ("lane", "unary")
            assert np.any(reply.out)
            assert_equal(reply, expected)
            assert reply.service_s > 0


def test_a_caller_may_look_for_the_answer_before_it_sleeps(server, unary, filled):
    # Longer than any answer takes, and shorter: both find it.
    for spin_s in (10.0, 1e-9):
        with Client(server.endpoint, lane=LaneOptions(spin_s=spin_s)) as client:
            reply = attend(client, filled, queries(8))
            assert reply.transport == "lane"
            assert_equal(reply, attend(unary, filled, queries(8)))


def test_rows_fail_on_their_own(server, filled):
    stranger = Sequence(None, types_pb2.SequenceHandle(id=b"x" * 16, generation=1))
    with Client(server.endpoint, transport="lane") as client:
        rows = [Row(filled, TOKENS - 1), Row(stranger, 3)]
        reply = client.attend_rows(0, rows, queries(2))
        assert reply.transport == "lane"
        assert reply.rows[0].attended_tokens == TOKENS
        assert reply.rows[1].reason == "SEQUENCE_NOT_FOUND"
        assert not reply.out[1].any()


def test_a_message_with_its_tensors_inside_travels_too(server, filled):
    q = queries(1)
    tensor = types_pb2.Tensor(
        dtype=types_pb2.DATA_TYPE_FLOAT32, shape=q.shape, data=q.tobytes()
    )
    row = attention_pb2.AttendRow(handle=filled.handle, position=TOKENS - 1)
    with Client(server.endpoint, transport="lane") as client:
        result = client.attend(attention_pb2.AttendRequest(rows=[row], q=tensor))[0]
        np.testing.assert_array_equal(result.out, attend(client, filled, q).out)


def test_an_error_of_the_call_says_what_grpc_says(server, unary, filled):
    errors = []
    with Client(server.endpoint, transport="lane") as client:
        for each in (client, unary):
            with pytest.raises(KvServiceError) as refused:
                each.attend_rows(7, [Row(filled, 0)], queries(1))
            errors.append(refused.value)
    lane, grpc_error = errors
    assert lane.code is grpc_error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (lane.reason, lane.field) == (grpc_error.reason, grpc_error.field)
    assert (lane.metadata, lane.message) == (grpc_error.metadata, grpc_error.message)


def test_bad_arrays_are_refused_before_they_travel(server, filled):
    with Client(server.endpoint, lane=LaneOptions(calls_max=1)) as client:
        with pytest.raises(TypeError, match="float64"):
            attend(client, filled, queries(1).astype(np.float64))
        with pytest.raises(ValueError, match="q has shape"):
            client.attend_rows(0, [Row(filled, 0)], queries(1)[0])
        with pytest.raises(ValueError, match="together"):
            client.attend_rows(0, [Row(filled, 0)], queries(1), queries(1))
        with pytest.raises(TypeError, match="expected an array"):
            client.attend_rows(0, [Row(filled, 0)], [1.0])
        # The only slot is free again.
        assert attend(client, filled).transport == "lane"


@pytest.mark.parametrize("endpoint", ["localhost:1", "unix:/nowhere/at/all"])
def test_where_there_is_no_lane(endpoint):
    with pytest.raises(KvServiceError) as refused:
        Client(endpoint, transport="lane")
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.reason == "LANE_UNAVAILABLE"
    with Client(endpoint) as client:
        assert client.transport == "unary"
        assert client.lane_error.reason == "LANE_UNAVAILABLE"
    with Client(endpoint, transport="unary") as client:
        assert (client.transport, client.lane_error) == ("unary", None)
    with pytest.raises(ValueError, match="transport"):
        Client(endpoint, transport="stream")


def test_a_lane_that_the_server_refuses(server, unary, filled):
    options = LaneOptions(calls_max=16, call_bytes_max=1 << 30)
    with pytest.raises(KvServiceError) as refused:
        Client(server.endpoint, transport="lane", lane=options)
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (refused.value.reason, refused.value.field) == ("LANE_TOO_LARGE", "request_bytes")
    with Client(server.endpoint, lane=options) as client:
        reply = attend(client, filled)
        assert reply.transport == "unary"
        assert client.lane_error.reason == "LANE_TOO_LARGE"
        assert_equal(reply, attend(unary, filled))


def test_what_does_not_fit_travels_by_grpc(server, unary, filled):
    with Client(server.endpoint, lane=LaneOptions(call_bytes_max=4096)) as client:
        assert attend(client, filled).transport == "lane"
        # Requests of 8 KiB, then a request that fits with a reply that does not.
        assert attend(client, filled, queries(8)).transport == "unary"
        reply = attend(client, filled, queries(3), return_selected=True)
        assert reply.transport == "unary"
        assert_equal(reply, attend(unary, filled, queries(3)))
        assert len(reply.rows[0].selected[0]) == TOKENS
        assert client.transport == "lane"


def test_buffers_are_read_and_written_in_place(server, unary, filled):
    heads = (CONFIG.query_head_count, CONFIG.kv_head_count, CONFIG.head_dim)
    with Client(server.endpoint, lane=LaneOptions(calls_max=1)) as client:
        with client.step_buffers(2, *heads) as buffers:
            assert buffers.q.__array_interface__["data"][0] % 64 == 0
            assert (buffers.k.shape, buffers.k.dtype) == ((2, *heads[1:]), np.uint16)
            shared = buffers.shared_memory
            assert shared.__array_interface__["data"][0] % 4096 == 0
            for seed in (1, 2):
                buffers.q[:] = queries(2, seed)
                reply = attend(client, filled, buffers.q, buffers=buffers)
                assert reply.transport == "lane"
                assert not reply.out.flags.owndata and reply.out.base is not None
                for array in (buffers.q, buffers.k, buffers.v, reply.out, reply.lse):
                    assert byte_bounds(shared)[0] <= byte_bounds(array)[0]
                    assert byte_bounds(array)[1] <= byte_bounds(shared)[1]
                assert_equal(reply, attend(unary, filled, queries(2, seed)))
            np.testing.assert_array_equal(buffers.q, queries(2, 2))
            # The only slot is theirs.
            assert attend(client, filled).transport == "unary"
        assert attend(client, filled).transport == "lane"
    with pytest.raises(ValueError, match="dtype"):
        unary.step_buffers(1, *heads, q_dtype="int8")
    with unary.step_buffers(2, *heads) as buffers:
        assert buffers.shared_memory is None
        buffers.q[:] = queries(2)
        reply = attend(unary, filled, buffers.q, buffers=buffers)
        assert_equal(reply, attend(unary, filled, queries(2)))


def test_buffers_are_left_as_they_are(server, unary, filled):
    heads = (CONFIG.query_head_count, CONFIG.kv_head_count, CONFIG.head_dim)
    with Client(server.endpoint) as client, client.step_buffers(2, *heads) as buffers:
        buffers.q[:], buffers.k[:], buffers.v[:] = queries(2), 7, 9
        reply = attend(client, filled, buffers.q, buffers=buffers)
        assert reply.transport == "lane" and not reply.out.flags.owndata
        # Arrays that are not theirs, or not whole, find their own way.
        for q in (queries(8), queries(1), buffers.q[:1], buffers.q[1:]):
            expected = attend(unary, filled, q.copy())
            reply = attend(client, filled, q, buffers=buffers)
            assert reply.transport == "lane" and reply.out.flags.owndata
            assert_equal(reply, expected)
        np.testing.assert_array_equal(buffers.q, queries(2))
        assert (buffers.k == 7).all() and (buffers.v == 9).all()


def test_arrays_of_closed_buffers_are_arrays_like_others(server, unary, filled):
    heads = (CONFIG.query_head_count, CONFIG.kv_head_count, CONFIG.head_dim)
    with Client(server.endpoint, lane=LaneOptions(calls_max=1)) as client:
        with client.step_buffers(4, *heads) as buffers:
            buffers.q[:] = queries(4)
        # The call takes the slot that they are in.
        expected = attend(unary, filled, queries(4)[::2])
        reply = attend(client, filled, buffers.q[::2], buffers=buffers)
        assert reply.transport == "lane" and reply.out.flags.owndata
        assert_equal(reply, expected)


def test_buffers_of_another_client_take_this_ones_way(server, unary, filled):
    heads = (CONFIG.query_head_count, CONFIG.kv_head_count, CONFIG.head_dim)
    with Client(server.endpoint) as client, client.step_buffers(1, *heads) as buffers:
        buffers.q[:] = queries(1)
        reply = attend(unary, filled, buffers.q, buffers=buffers)
        assert reply.transport == "unary"
        with Client(server.endpoint) as other:
            reply = attend(other, filled, buffers.q, buffers=buffers)
            assert reply.transport == "lane" and reply.out.flags.owndata
            assert_equal(reply, attend(unary, filled, queries(1)))


def test_new_tokens_through_buffers_are_stored(server, filled):
    heads = (CONFIG.query_head_count, CONFIG.kv_head_count, CONFIG.head_dim)
    rng = np.random.default_rng(5)
    with Client(server.endpoint) as client, client.step_buffers(1, *heads) as buffers:
        with filled.fork() as by_buffers, filled.fork() as by_arrays:
            k, v = (to_bf16(rng.standard_normal((1, *heads[1:]))) for _ in range(2))
            buffers.q[:], buffers.k[:], buffers.v[:] = queries(1), k, v
            reply = client.attend_rows(
                0, [Row(by_buffers, TOKENS)], buffers.q, buffers.k, buffers.v, buffers=buffers
            )
            expected = client.attend_rows(0, [Row(by_arrays, TOKENS)], queries(1), k, v)
            assert reply.transport == expected.transport == "lane"
            assert reply.rows[0].attended_tokens == TOKENS + 1
            np.testing.assert_array_equal(reply.out, expected.out)
            # The same bytes again, as the service keeps them.
            reply = client.attend_rows(
                0, [Row(by_arrays, TOKENS)], buffers.q, buffers.k, buffers.v, buffers=buffers
            )
            assert reply.rows[0].attended_tokens == TOKENS + 1


def random_keys(count, seed=0):
    rng = np.random.default_rng(seed)
    return to_bf16(rng.standard_normal((1, count, CONFIG.kv_head_count, CONFIG.head_dim)))


def test_appends_travel_through_the_lane(server, unary):
    k, v = random_keys(9000), random_keys(9000, 1)
    sample = np.random.default_rng(2).standard_normal((1, 200, *OUT[1:]))
    replies = []
    with Client(server.endpoint, transport="lane") as lane:
        # Nothing of it may go by gRPC.
        lane._stream = None
        for client in (lane, unary):
            with client.sequence(MODEL, policy=DENSE) as sequence:
                first = sequence.append(0, k, v, query_sample=sample)
                again = sequence.append(8990, k[:, 8990:], v[:, 8990:])
                reply = unary.attend_rows(0, [Row(sequence, 8999)], queries(1))
                assert first.sequence.length_tokens == 9000
                assert (again.message_count, again.duplicate_count) == (1, 1)
                replies.append((first.message_count, first.duplicate_count, reply.out.tobytes()))
    assert replies[0] == replies[1] and replies[0][0] > 1


def test_an_append_that_finds_no_room_goes_on_by_grpc(server, unary, monkeypatch):
    heads = (CONFIG.query_head_count, CONFIG.kv_head_count, CONFIG.head_dim)
    k, v = random_keys(9000), random_keys(9000, 1)
    answers, taken = [], []

    def append(lane, *arguments):
        # The first message goes by the lane; then its only slot is taken.
        if len(answers) == 1:
            taken.append(StepBuffers(StepShape(1, *heads, "float32", "bfloat16"), lane))
        answers.append(plain(lane, *arguments))
        return answers[-1]

    plain = Lane.append
    monkeypatch.setattr(Lane, "append", append)
    with Client(server.endpoint, lane=LaneOptions(calls_max=1)) as client:
        with client.sequence(MODEL, policy=DENSE) as sequence:
            reply = sequence.append(0, k, v)
            assert taken[0].reserved is not None
            assert answers[0].message_count == 1 and answers[1] is None
            assert reply.message_count > 1 and reply.duplicate_count == 0
            assert reply.sequence.length_tokens == 9000
            got = unary.attend_rows(0, [Row(sequence, 8999)], queries(1))
    with unary.sequence(MODEL, policy=DENSE) as other:
        other.append(0, k, v)
        expected = unary.attend_rows(0, [Row(other, 8999)], queries(1))
    np.testing.assert_array_equal(got.out, expected.out)


def test_errors_of_appends_are_those_of_grpc(server, unary):
    k, v = random_keys(8), random_keys(8, 1)
    with Client(server.endpoint, transport="lane") as lane:
        errors = []
        for client in (lane, unary):
            with client.sequence(MODEL) as sequence:
                with pytest.raises(KvServiceError) as refused:
                    sequence.append(3, k, v)
                errors.append(refused.value)
                with pytest.raises(KvServiceError, match="APPEND_EMPTY"):
                    sequence.append(0, k[:, :0], v[:, :0])
    assert errors[0].reason == errors[1].reason == "POSITION_GAP"
    assert errors[0].metadata == errors[1].metadata and errors[0].field == errors[1].field


def test_threads_share_a_client(server, unary, filled):
    expected = [attend(unary, filled, queries(1, seed)) for seed in range(8)]
    problems, ways = [], []

    def run(seed):
        try:
            for _ in range(40):
                reply = attend(client, filled, queries(1, seed))
                assert_equal(reply, expected[seed])
                ways.append(reply.transport)
        except Exception as error:  # of a thread: shown by the test
            problems.append(error)

    with Client(server.endpoint, lane=LaneOptions(calls_max=2)) as client:
        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []
    assert ways.count("lane") > 0 and len(ways) == 320


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_lane_is_opened_again_after_a_second(tmp_path, server):
    clock = Clock()
    with ScriptedLane(tmp_path, server.endpoint, lambda lane: None) as script:
        path = LanePath(script.endpoint, LaneOptions(), 5.0, clock)
        first = path.get()
        assert first.is_usable and path.get() is first
        first.close()
        assert path.get() is None
        assert path.error.reason == "LANE_UNAVAILABLE"
        clock.now += 0.9
        assert path.get() is None and script.opened == 1
        clock.now += 0.2
        second = path.get()
        assert second is not first and path.error is None and script.opened == 2
        # What a forked child finds is its parent's.
        second._process += 1
        assert path.get() is None
        path.close()
        clock.now += 10
        assert path.get() is None


def scripted(tmp_path, server, answer, **options):
    """A client of a scripted lane that has one slot, and what to leave."""
    stack = contextlib.ExitStack()
    script = stack.enter_context(ScriptedLane(tmp_path, server.endpoint, answer))
    client = stack.enter_context(
        Client(script.endpoint, transport="lane", lane=LaneOptions(calls_max=1), **options)
    )
    return stack, client


def test_a_server_that_leaves_in_the_middle_of_a_call(tmp_path, server, unary, filled):
    stack, client = scripted(tmp_path, server, ScriptedLane.close_connection)
    with stack:
        reply = attend(client, filled)
        assert reply.transport == "unary"
        assert_equal(reply, attend(unary, filled))
        assert client.transport == "unary"
        assert client.lane_error.reason == "LANE_UNAVAILABLE"


def test_a_slow_server_is_waited_for_and_rung_again(tmp_path, server, filled):
    rings = []

    def answer(lane):
        rings.append(lane)
        if len(rings) == 3:
            reply_with(lane)

    stack, client = scripted(tmp_path, server, answer)
    with stack:
        # It looks again each time that it looks whether the server is still there.
        assert attend(client, filled).transport == "lane"
        assert len(rings) == 3 and client.transport == "lane"


def test_a_server_that_goes_down_says_so(tmp_path, server, unary, filled):
    status = error_details_pb2.Status(code=14, message="draining").SerializeToString()
    stack, client = scripted(tmp_path, server, lambda lane: lane.reply(status, code=14))
    with stack:
        reply = attend(client, filled)
        assert reply.transport == "unary"
        assert_equal(reply, attend(unary, filled))


def test_a_call_that_is_given_up_keeps_its_slot_until_it_is_answered(tmp_path, server, filled):
    unanswered = []
    stack, client = scripted(tmp_path, server, unanswered.append, deadline_s=0.5)
    with stack:
        with pytest.raises(KvServiceError) as late:
            attend(client, filled)
        assert late.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        # The server may still write there.
        assert attend(client, filled).transport == "unary"
        unanswered[0].reply(error_details_pb2.Status(code=14).SerializeToString(), code=14)
        with pytest.raises(KvServiceError) as late:
            attend(client, filled)
        assert late.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def tensor(shape, offset, length=None):
    size = 4 * int(np.prod(shape)) if length is None else length
    region = types_pb2.TensorRegion(offset_bytes=offset, length_bytes=size)
    return types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=shape, region=region)


def reply_with(lane, **changed):
    begin = lane.shape.head_bytes + lane.shape.request_bytes
    tensors = {"out": tensor(OUT, begin + 1024), "lse": tensor(LSE, begin + 8192)}
    tensors |= {name: make(begin, lane.shape) for name, make in changed.items()}
    results = [attention_pb2.AttendRowResult(attended_tokens=TOKENS)]
    lane.reply(attention_pb2.AttendResponse(results=results, **tensors).SerializeToString())


LIES = {
    "message_before_the_slot": ("reply_offset", lambda lane: lane.reply(b"x", offset=0)),
    "message_behind_the_slot": (
        "reply_offset", lambda lane: lane.reply(b"xx", offset=lane.shape.bytes - 1)
    ),
    "message_far_away": ("reply_offset", lambda lane: lane.reply(b"x", offset=2**64 - 1)),
    "message_of_garbage": ("message", lambda lane: lane.reply(b"\xff" * 9)),
    "error_of_garbage": ("message", lambda lane: lane.reply(b"\xff" * 9, code=3)),
    "out_in_the_request": (
        "out", lambda lane: reply_with(lane, out=lambda begin, shape: tensor(OUT, begin - 64))
    ),
    "out_behind_the_slot": (
        "out",
        lambda lane: reply_with(
            lane, out=lambda begin, shape: tensor(OUT, begin + shape.reply_bytes - 64)
        ),
    ),
    "out_of_another_shape": (
        "out", lambda lane: reply_with(lane, out=lambda begin, _: tensor((2, *OUT[1:]), begin))
    ),
    "out_of_another_size": (
        "out", lambda lane: reply_with(lane, out=lambda begin, _: tensor(OUT, begin, 16))
    ),
    "lse_far_away": ("lse", lambda lane: reply_with(lane, lse=lambda *_: tensor(LSE, 2**64 - 8))),
    "lse_of_no_type": ("lse", lambda lane: reply_with(lane, lse=lambda *_: types_pb2.Tensor())),
}


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_lies_is_found_out(tmp_path, server, filled, name):
    field, answer = LIES[name]
    stack, client = scripted(tmp_path, server, answer)
    with stack:
        with pytest.raises(KvServiceError) as refused:
            attend(client, filled)
        assert refused.value.code is grpc.StatusCode.INTERNAL
        assert (refused.value.reason, refused.value.field) == ("REPLY_MALFORMED", field)
        # It gets no second chance for the time being.
        assert attend(client, filled).transport == "unary"


def test_an_honest_script_is_believed(tmp_path, server, filled):
    stack, client = scripted(tmp_path, server, reply_with)
    with stack:
        reply = attend(client, filled)
        assert reply.transport == "lane" and not reply.out.any()


def test_the_memory_can_neither_shrink_nor_grow():
    memory = LaneMemory(LaneShape(2, 4096, 8192))
    with contextlib.closing(open(memory.fd, "r+b", closefd=False)) as file:
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                file.truncate(size)
    memory.close_fd()
    assert memory.array(memory.shape.bytes - 8, (2,), np.dtype("<f4")).tolist() == [0, 0]
