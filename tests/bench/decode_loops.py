"""Decode loops of one model: with dense attention in the same process, and with every layer's
attention in a server."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import sdpa_kernel

from decode_machine import host_tensor
from decode_model import SHIFT_TOKENS, Decoder, exact_attention, part_of_steps
from kvservice import Client, KvServiceError, LaneOptions, Row, Sequence
from kvservice.v1 import model_pb2, types_pb2

FILL_THREADS = 4
FILL_TOKENS = 1024
CALL_BYTES_MAX = 1 << 20
# Of a part whose stream makes its calls by itself: layers that the CPU is ahead of the GPU.
CALLS_AHEAD = 4
CALLS_MAX = 12
BARRIER_S = 30.0
# Squared error of dense outputs in bf16, normalised; and of a dropped mass, that of two float32
# logarithms of sums.
OUTPUT_ERROR_MAX = 1e-5
MASS_ERROR_MAX = 1e-5


class CheckFailedError(RuntimeError):
    """An answer is wrong."""


@dataclass(frozen=True)
class Plan:
    """What is measured: `steps` after `warm` ones, and one more at the end, so that nobody's last
    measured step has the machine for itself."""

    batch: int
    prompt_tokens: int
    layers: int  # that have weights and caches
    warm: int
    steps: int

    @property
    def all_steps(self):
        return self.warm + self.steps + 1


class Limit:
    """A time after which whoever asks is stopped."""

    def __init__(self, seconds):
        self._end = time.monotonic() + seconds

    @property
    def left_s(self):
        return self._end - time.monotonic()

    def check(self):
        """TimeoutError once it is over."""
        if self.left_s < 0:
            raise TimeoutError("out of time")


def squared_error(values, truth):
    """Normalised."""
    truth = truth.double()
    return float(((values.double() - truth) ** 2).sum() / (truth**2).sum())


class DenseLoop:
    """Steps with scaled dot product attention of torch, a whole step as one graph. It attends as
    many tokens as there are halfway through the measured steps: a graph has one length."""

    def __init__(self, machine, weights, planted, steps, plan):
        self._machine, self._plan = machine, plan
        self._shape = weights.shape
        self._stream = machine.new_stream()
        self._decoder = Decoder(weights, steps, plan.batch)
        self._length = plan.prompt_tokens + plan.warm + plan.steps // 2
        self._position = torch.zeros_like(self._decoder.step)
        self._keys, self._values = ([self._cache(made, planted)]
                                    for made in (planted.keys, planted.values))
        for caches in (self._keys, self._values):
            caches.extend(caches[0].clone() for _ in range(plan.layers - 1))

    def _cache(self, made, planted):
        plan, shape = self._plan, self._shape
        length = plan.prompt_tokens + plan.all_steps
        cache = torch.zeros(plan.batch, shape.kv_heads, length, shape.head_dim, dtype=made.dtype,
                            device=made.device)
        for b in range(plan.batch):
            cache[b] = made[planted.places(b, 0, length)].permute(1, 0, 2)
        return cache

    def _attend(self, layer, is_grouped):
        """Heads of a group as query tokens of one head are the same sums; some kernels are faster
        that way."""
        shape, q = self._shape, self._decoder.q
        k, v = (caches[layer][:, :, : self._length] for caches in (self._keys, self._values))
        if is_grouped:
            q = q.view(len(q), shape.kv_heads, -1, shape.head_dim)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=shape.scale)
        return torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], k, v, scale=shape.scale, enable_gqa=shape.query_heads != shape.kv_heads)

    def _step(self, is_grouped):
        decoder = self._decoder
        decoder.begin()
        torch.add(decoder.step, self._plan.prompt_tokens, out=self._position)
        for layer in range(self._plan.layers):
            decoder.before_attention(layer)
            for caches, new in ((self._keys, decoder.k), (self._values, decoder.v)):
                caches[layer].index_copy_(2, self._position, new[:, :, None])
            decoder.after_attention(layer, self._attend(layer, is_grouped))
        decoder.end()

    def _seconds(self, function):
        """Of a step, the mean over the measured ones."""
        # A pool cannot be used again when its last graph is gone.
        run = self._machine.capture(function, self._stream, self._machine.new_pool())
        with self._machine.on(self._stream):
            self._decoder.reset()
            for step in range(self._plan.warm + self._plan.steps):
                if step == self._plan.warm:
                    self._machine.synchronize(self._stream)
                    began = time.perf_counter()
                run()
            self._machine.synchronize(self._stream)
        return (time.perf_counter() - began) / self._plan.steps

    def _check(self, is_grouped):
        """The last layer's outputs for the first sequence."""
        keys, values = (caches[-1][0, :, : self._length].permute(1, 0, 2)
                        for caches in (self._keys, self._values))
        truth, _ = exact_attention(self._decoder.q[0], keys, values, self._shape.scale)
        error = squared_error(self._attend(-1, is_grouped)[0].reshape(truth.shape), truth)
        if not error <= OUTPUT_ERROR_MAX:
            raise CheckFailedError(f"local attention is off by {error:.1e}")

    def ends_seconds(self):
        """Of a step without layers."""

        def ends():
            self._decoder.begin()
            self._decoder.end()

        return self._seconds(ends)

    def backend_seconds(self, limit):
        """Of a step, by the name of what attended; those that cannot are not there."""
        seconds = {}
        forms = [False] if self._shape.query_heads == self._shape.kv_heads else [False, True]
        for name, backend in self._machine.backends.items():
            for is_grouped in forms:
                limit.check()
                with sdpa_kernel(backend):
                    try:
                        taken = self._seconds(lambda form=is_grouped: self._step(form))
                    except RuntimeError as error:
                        print(f"  {name}: {str(error).splitlines()[0]}", flush=True)
                        continue
                    self._check(is_grouped)
                seconds[f"{name}, grouped" if is_grouped else name] = taken
        return seconds


def register(client, plan, shape):
    """The model as the server knows it."""
    name = f"{shape.name}-{plan.layers}"
    client.register_model(model_pb2.Model(
        name=name, layer_count=plan.layers, query_head_count=shape.query_heads,
        kv_head_count=shape.kv_heads, head_dim=shape.head_dim,
        cache_dtype=types_pb2.DATA_TYPE_BFLOAT16, scale=shape.scale))
    return name


def fill(endpoint, model, planted, plan, limit):
    """Sequences with the prompts' planted rows, each in memory of its own; returns their handles.
    """
    k, v = (made.view(torch.int16).cpu().numpy().view(np.uint16)
            for made in (planted.keys, planted.values))

    def fill_one(b):
        with Client(endpoint, lane=LaneOptions(calls_max=1)) as client:
            sequence, first = client.sequence(model), 0
            while first < plan.prompt_tokens:
                limit.check()
                place = (first + b * SHIFT_TOKENS) % len(k)
                count = min(FILL_TOKENS, plan.prompt_tokens - first, len(k) - place)
                rows = (np.broadcast_to(made[place : place + count],
                                        (plan.layers, count, *made.shape[1:])) for made in (k, v))
                sequence.append(first, *rows)
                first += count
            return sequence.handle

    with ThreadPoolExecutor(FILL_THREADS) as threads:
        return list(threads.map(fill_one, range(plan.batch)))


class Part:
    """Some of the batch's sequences in a loop of their own: all of them, or one of two halves that
    take turns at the weights and at the server."""

    def __init__(self, machine, weights, steps, client, plan, rows):
        """`rows` is the part's slice of the batch."""
        shape = weights.shape
        self.rows, self.batch = rows, len(range(plan.batch)[rows])
        self._machine, self._plan, self._client = machine, plan, client
        self._stream = machine.new_stream()
        self.steps = part_of_steps(steps, shape, plan.batch, rows)
        self._decoder = Decoder(weights, self.steps, self.batch)
        self._buffers = client.step_buffers(self.batch, shape.query_heads, shape.kv_heads,
                                            shape.head_dim, q_dtype="bfloat16")
        self._share_row()
        self._capture()

    def close(self):
        self._buffers.close()

    def _share_row(self):
        self._shared_row = shared_row(self._client, self._buffers, self.steps)
        self.is_direct = self._machine.pin(self._buffers.shared_memory)
        if not self.is_direct:
            self._row_detour = self._machine.pinned_like(self._decoder.row[0])
            self._out_detour = self._machine.pinned_like(self._decoder.out)

    def _capture(self):
        decoder, last, pool = self._decoder, self._plan.layers - 1, self._machine.new_pool()

        def first():
            decoder.begin()
            decoder.before_attention(0)

        def between(layer):
            decoder.after_attention(layer - 1, decoder.out)
            decoder.before_attention(layer)

        def tail():
            decoder.after_attention(last, decoder.out)
            decoder.end()

        segments = [first, *(lambda n=n: between(n) for n in range(1, last + 1)), tail]
        *self._segments, self._tail = (
            self._machine.capture(segment, self._stream, pool) for segment in segments)

    def _send_row(self):
        """Returns once it is in the shared memory."""
        if self.is_direct:
            self._shared_row.copy_(self._decoder.row[0], non_blocking=True)
            self._machine.synchronize(self._stream)
        else:
            self._row_detour.copy_(self._decoder.row[0], non_blocking=True)
            self._machine.synchronize(self._stream)
            self._shared_row.copy_(self._row_detour)

    def _take_out(self, out):
        """The stream goes on with it. Until its next wait nobody writes there."""
        source = host_tensor(out)
        if not self.is_direct:
            self._out_detour.copy_(source)
            source = self._out_detour
        self._decoder.out.copy_(source, non_blocking=True)

    def run(self, handles, policy, begin, limit):
        """Decodes with forks of the prompts; returns Times and the last call's reply. `begin` is a
        barrier for those who run at the same time."""
        plan, buffers = self._plan, self._buffers
        sequences = [Sequence(self._client, handle).fork() for handle in handles[self.rows]]
        times = Times(plan)
        begin.wait(BARRIER_S)
        with self._machine.on(self._stream):
            self._decoder.reset()
            for step in range(plan.all_steps):
                limit.check()
                rows = [Row(sequence, plan.prompt_tokens + step) for sequence in sequences]
                for layer, segment in enumerate(self._segments):
                    segment()
                    self._send_row()
                    ready = time.perf_counter()
                    reply = self._client.attend_rows(
                        layer, rows, buffers.q, buffers.k, buffers.v, policy=policy,
                        output_dtype=types_pb2.DATA_TYPE_BFLOAT16, buffers=buffers)
                    times.note(step, layer, ready, reply)
                    self._take_out(reply.out)
                self._tail()
            self._machine.synchronize(self._stream)
        for sequence in sequences:
            sequence.drop()
        return times, reply


class StreamPart:
    """The same in one stream that never waits for the CPU: each layer's call is prepared while the
    GPU is at earlier ones, begun by the stream, and its answer read when it has long come."""

    def __init__(self, machine, weights, steps, client, plan, rows):
        """As Part. RuntimeError where the memory cannot be registered with the driver."""
        shape = weights.shape
        self.rows, self.batch, self.is_direct = rows, len(range(plan.batch)[rows]), True
        self._machine, self._plan, self._client = machine, plan, client
        self._stream = machine.new_stream()
        self.steps = part_of_steps(steps, shape, plan.batch, rows)
        self._decoder = Decoder(weights, self.steps, self.batch)
        self._places = [CallPlace(machine, client, shape, self.batch, self.steps)
                        for _ in range(min(CALLS_AHEAD, plan.layers))]
        self._capture()

    def close(self):
        for place in self._places:
            place.buffers.close()

    def _place(self, layer):
        return self._places[layer % len(self._places)]

    def _capture(self):
        """Graphs of what lies between two calls, copies from and to the shared memory included."""
        decoder, last, pool = self._decoder, self._plan.layers - 1, self._machine.new_pool()

        def before(layer):
            decoder.before_attention(layer)
            self._place(layer).row.copy_(decoder.row[0], non_blocking=True)

        def after(layer):
            decoder.out.copy_(self._place(layer).out, non_blocking=True)
            decoder.after_attention(layer, decoder.out)

        def first():
            decoder.begin()
            before(0)

        def between(layer):
            after(layer - 1)
            before(layer)

        def tail():
            after(last)
            decoder.end()

        segments = [first, *(lambda n=n: between(n) for n in range(1, last + 1)), tail]
        *self._segments, self._tail = (
            self._machine.capture(segment, self._stream, pool) for segment in segments)

    def run(self, handles, policy, begin, limit):
        """As Part's."""
        plan = self._plan
        sequences = [Sequence(self._client, handle).fork() for handle in handles[self.rows]]
        times, marks = Times(plan), []
        begin.wait(BARRIER_S)
        with self._machine.on(self._stream):
            self._decoder.reset()
            marks.append(self._machine.mark(self._stream))
            for step in range(plan.all_steps):
                limit.check()
                rows = [Row(sequence, plan.prompt_tokens + step) for sequence in sequences]
                for layer, segment in enumerate(self._segments):
                    place = self._place(layer)
                    place.finish(times)
                    place.prepare((step, layer), rows, policy)
                    segment()
                    marks.append(self._machine.mark(self._stream))
                    self._machine.attend(place.call, self._stream)
                    marks.append(self._machine.mark(self._stream))
                self._tail()
            for place in self._places:
                place.finish(times)
            self._machine.synchronize(self._stream)
        reply = self._place(plan.layers - 1).reply
        since = [self._machine.seconds_between(marks[0], mark) for mark in marks[1:]]
        times.ready.flat, times.done.flat = since[::2], since[1::2]
        for sequence in sequences:
            sequence.drop()
        return times, reply


class CallPlace:
    """Shared memory of one call at a time, and the call."""

    def __init__(self, machine, client, shape, batch, steps):
        self._client = client
        self.buffers = client.step_buffers(batch, shape.query_heads, shape.kv_heads,
                                           shape.head_dim, q_dtype="bfloat16")
        self.row = shared_row(client, self.buffers, steps)
        if not machine.pin(self.buffers.shared_memory):
            raise CheckFailedError("the driver does not register the shared memory")
        self.call = self.reply = self._at = None
        # Where outputs will be is known from any call.
        handle = types_pb2.SequenceHandle(id=bytes(16), generation=1)
        rows = [Row(Sequence(client, handle), 0)] * batch
        self.prepare(None, rows, None)
        self.out = host_tensor(self.call.out)
        self.call.drop()
        self.call = None

    def prepare(self, at, rows, policy):
        """Layer and step are the call's name."""
        self._at = at
        layer = 0 if at is None else at[1]
        self.call = self._client.prepare_rows(
            layer, rows, self.buffers, policy=policy,
            output_dtype=types_pb2.DATA_TYPE_BFLOAT16)

    def finish(self, times):
        """Reads the answer of the last call, if there is one."""
        if self.call is None:
            return
        self.reply = self.call.finish()
        self.call = None
        times.note_reply(*self._at, self.reply)


def shared_row(client, buffers, steps):
    """q, k and v lie one behind the other in the shared memory as in a step, and are copied as
    one."""
    memory, q = buffers.shared_memory, buffers.q
    if memory is None:
        raise CheckFailedError(f"no shared memory: {client.lane_error}")
    first, k, v, begin = (array.__array_interface__["data"][0] for array in
                          (q, buffers.k, buffers.v, memory))
    if (k - first, v - k) != (q.nbytes, buffers.k.nbytes):
        raise CheckFailedError("q, k and v are not side by side")
    return host_tensor(memory[first - begin :][: steps[0].nbytes].view(np.uint16))


class Times:
    """When calls began and ended, and what the server says of them: [steps, layers]."""

    def __init__(self, plan):
        self._plan = plan
        self.ready, self.done, self.service, self.queue = np.zeros((4, plan.all_steps, plan.layers))

    def note(self, step, layer, ready, reply):
        self.done[step, layer] = time.perf_counter()
        self.ready[step, layer] = ready
        self.note_reply(step, layer, reply)

    def note_reply(self, step, layer, reply):
        """What a reply says; CheckFailedError or KvServiceError where it is not what it should be.
        """
        self.service[step, layer], self.queue[step, layer] = reply.service_s, reply.queue_s
        if reply.transport != "lane":
            raise CheckFailedError("a call did not travel by shared memory")
        for row in reply.rows:
            if isinstance(row, KvServiceError):
                raise row

    def step_seconds(self, layers):
        """Of a step of a model of so many layers. A layer's time is from the answer of the one
        before to its own; the first one's has the ends of the model in it. All but the first two
        are alike: those that are missing take as long as the mean of those that are there."""
        plan = self._plan
        done = self.done[plan.warm - 1 : plan.warm + plan.steps]
        taken = np.diff(done.flatten()[plan.layers - 1 :]).reshape(plan.steps, plan.layers)
        mean = taken.mean(axis=0)
        return float(mean[:2].sum() + mean[2:].mean() * (layers - 2))

    def medians_us(self):
        """Of one layer after the first two: computing up to the call, the call, and of it the
        server's share and its queue's."""
        measured = slice(self._plan.warm, self._plan.warm + self._plan.steps)
        before = self.ready[measured, 2:] - self.done[measured, 1:-1]
        call = self.done[measured] - self.ready[measured]
        parts = {"compute": before, "call": call[:, 2:], "service": self.service[measured, 2:],
                 "queue": self.queue[measured, 2:]}
        return {name: float(np.median(part)) * 1e6 for name, part in parts.items()}


def run_parts(parts, handles, policy, limit):
    """All parts at the same time; their Times and last replies."""
    begin = threading.Barrier(len(parts))
    with ThreadPoolExecutor(len(parts)) as threads:
        runs = [threads.submit(part.run, handles, policy, begin, limit) for part in parts]
        return [run.result() for run in runs]


def check_reply(planted, part, plan, reply, *, is_dense, limit_mass):
    """Compares the first and the last row of a last call with exact attention. Returns the share
    of the tokens read and the largest error of an output."""
    shape, total, errors = planted.shape, plan.prompt_tokens + plan.all_steps, []
    out = host_tensor(reply.out)
    queries = part.steps[-1][: part.batch * shape.query_heads * shape.head_dim]
    queries = queries.view(part.batch, shape.query_heads, shape.head_dim)
    for row in {0, part.batch - 1}:
        places = planted.places(range(plan.batch)[part.rows][row], 0, total)
        truth, lse = exact_attention(queries[row], planted.keys[places], planted.values[places],
                                     shape.scale)
        errors.append(squared_error(out[row].to(truth.device), truth))
        if is_dense and not errors[-1] <= OUTPUT_ERROR_MAX:
            raise CheckFailedError(f"the server's dense attention is off by {errors[-1]:.1e}")
        if limit_mass is None:
            continue
        upper = reply.rows[row].certificates.dropped_mass_upper[0]
        kept = np.exp(np.asarray(reply.lse[row], np.float64) - lse.cpu().numpy())
        if (1.0 - kept - upper).max() > MASS_ERROR_MAX or upper.max() > limit_mass:
            raise CheckFailedError("a bound is violated, or above the limit")
    read = np.mean([row.groups.tokens_read.mean() for row in reply.rows]) / total
    return float(read), max(errors)


def pool_bytes(shape, plan, forks):
    """Keys, values and sketches of the prompts, and of the tokens of so many runs."""
    blocks = math.ceil(plan.prompt_tokens / 64) + forks * (math.ceil(plan.all_steps / 64) + 2)
    slices = plan.batch * plan.layers * blocks
    return slices * 64 * shape.layer_token_bytes * 5 // 4 + (64 << 20)
