#!/usr/bin/env python3
"""Writes the first inputs of the fuzz targets: messages as a well-behaved client sends them.

    PYTHONPATH=build/python build/venv/bin/python tests/fuzz/make_corpus.py

corpus/stored.txt holds what an engine has written to its disk and to another server; nothing here
makes it. Inputs that a campaign has found (tests/fuzz/run_fuzz.py) are added to the files by hand.
"""

import pathlib
import struct

from kvservice.v1 import attention_pb2, model_pb2, sequence_pb2, types_pb2

FOLDER = pathlib.Path(__file__).resolve().parent / "corpus"
# tests/fuzz/lane_fuzz.cc puts the sequence that exists in its place.
ID = b"0123456789abcdef"
# In a lane of one slot with a request area of 64 KiB.
AREA = 4096
FLOAT32, BFLOAT16 = types_pb2.DATA_TYPE_FLOAT32, types_pb2.DATA_TYPE_BFLOAT16
QUERY_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def fill(tensor, dtype, tokens, heads, offset=None):
    size = tokens * heads * HEAD_DIM * (4 if dtype == FLOAT32 else 2)
    tensor.dtype = dtype
    tensor.shape[:] = [tokens, heads, HEAD_DIM]
    if offset is None:
        tensor.data = b"\x80\x3c" * (size // 2)
    else:
        tensor.region.offset_bytes = AREA + offset
        tensor.region.length_bytes = size


def attend(position, tokens=1, inline=False, policy=None, store=True):
    request = attention_pb2.AttendRequest(layer=0, step_id=7, return_selected=True)
    row = request.rows.add(position=position, query_count=tokens)
    row.handle.id, row.handle.generation = ID, 1
    fill(request.q, FLOAT32, tokens, QUERY_HEADS, None if inline else 0)
    if store:
        fill(request.k, BFLOAT16, tokens, KV_HEADS, None if inline else 8192)
        fill(request.v, BFLOAT16, tokens, KV_HEADS, None if inline else 12288)
    if policy is not None:
        request.policy.CopyFrom(policy)
    return request


def append(position, tokens, inline=False, sample=False):
    request = sequence_pb2.AppendRequest(layer=1, position=position)
    request.handle.id, request.handle.generation = ID, 1
    fill(request.k, BFLOAT16, tokens, KV_HEADS, None if inline else 0)
    fill(request.v, BFLOAT16, tokens, KV_HEADS, None if inline else 8192)
    if sample:
        fill(request.query_sample, FLOAT32, 1, QUERY_HEADS, None if inline else 16384)
        request.query_sample_positions.append(position)
    return request


def policies():
    certified = types_pb2.Policy(selector=types_pb2.SELECTOR_CERTIFIED, max_dropped_mass=0.05)
    scan = types_pb2.Policy(selector=types_pb2.SELECTOR_SCAN)
    scan.budget.top_k_tokens = 16
    return [types_pb2.Policy(selector=types_pb2.SELECTOR_DENSE), certified, scan,
            types_pb2.Policy(selector=types_pb2.SELECTOR_CPE),
            types_pb2.Policy(selector=types_pb2.SELECTOR_CIS)]


def transfer():
    """Streams of a source that never knows the right checksums."""
    begin = sequence_pb2.ReceiveRequest(begin=sequence_pb2.TransferBegin(lease_ms=1000))
    slices = [sequence_pb2.ReceiveRequest(slices=sequence_pb2.TransferSlices(
        layer=layer, checksums=bytes(16), rows=b"\x80\x3c" * (9 * 2 * 2 * 64)))
        for layer in (0, 1)]
    seeds = sequence_pb2.ReceiveRequest(seeds=sequence_pb2.TransferSeeds(
        layer=1, positions=[3, 7], checksum=bytes(16),
        queries=b"\x80\x3c" * (2 * QUERY_HEADS * HEAD_DIM)))
    tables = sequence_pb2.ReceiveRequest(tables=sequence_pb2.TransferTables(encoded=b"KVSKTAB"))
    end = sequence_pb2.ReceiveRequest(end=sequence_pb2.TransferEnd())
    gives_up = sequence_pb2.ReceiveRequest(end=sequence_pb2.TransferEnd(gives_up=True))
    streams = [[begin, slices[0]], [begin, slices[1], slices[0], end], [begin, seeds], [begin, end],
               [begin, tables], [begin, begin, gives_up, slices[0]], [slices[0]]]
    return [b"".join(struct.pack("<H", len(bytes_)) + bytes_
                     for bytes_ in (message.SerializeToString() for message in stream))
            for stream in streams]


def certificates():
    numbers = [(1.0, 0.9, 1.1, -2.0, -3.0), (0.0, 0.0, 0.0, float("-inf"), float("-inf")),
               (700.0, 699.0, 701.0, 710.0, -745.0), (float("nan"),) * 5,
               (float("inf"), 1e308, float("inf"), float("inf"), 5e-324)]
    parts = [struct.pack("<BBB5dfdd", 2, 1, 0, *five, 0.1, 1.0, 1e-9) for five in numbers]
    return [a + b for a in parts for b in parts[:2]]


def columns(message, count, numbers):
    for name, number in numbers.items():
        getattr(message, name).extend([number] * count)


def replies():
    """To the request of tests/client/made_reply.h."""
    heads, kv_heads, dim, generation, position = 4, 2, 2, 300, 1000
    replies = []
    for optional in (False, True):
        for region in (False, True):
            reply = attention_pb2.AttendResponse(step_id=71, call_number=9, epoch=bytes(16))
            for row, queries in enumerate([1, 2]):
                result = reply.results.add(attended_tokens=position + row + queries,
                                           selector=types_pb2.SELECTOR_SCAN,
                                           generation=generation + row)
                columns(result.certificates, queries * heads, dict(
                    level=2, action=1, met=True, dropped_mass_upper=0.5, dropped_mass_lower=0.25,
                    log_kept_lower=1, log_kept_upper=2, log_dropped_lower=0, log_dropped_upper=1,
                    dropped_mass_estimate=-1))
                columns(result.groups, kv_heads, dict(
                    action=1, scanned=True, tokens_read=300, tokens_scanned=5, similarity=-2,
                    keys_sampled=0, rows_sampled=70000))
                for _ in range(kv_heads):
                    result.selected.add(positions=[0, 7, 500])
                if not optional:
                    continue
                columns(result.certificates, queries * heads, dict(
                    failure_probability=1e-9, output_error_upper=1, output_error_relative_upper=1,
                    value_norm_lower=2, keys_sampled=128, rows_sampled=1))
                columns(result.groups, kv_heads, dict(
                    sharing_estimate=0.5, assumed_cis_excess_mass=1, assumed_psaw_dropped_mass=0,
                    assumed_etf_excess_mass=1, key_norm_max=3, query_distance=1))
                masses = result.deferred.add(position=1, query_count=1)
                columns(masses, heads, dict(dropped_mass_upper=0.5, dropped_mass_lower=0.5))
            reply.results.add(code=5, message="gone", reason="GONE", metadata={"id": "ab"})
            for tensor, shape in ((reply.lse, [4, heads]), (reply.out, [4, heads, dim])):
                size = 4 * heads * 4 * (dim if len(shape) == 3 else 1)
                tensor.dtype = FLOAT32
                tensor.shape[:] = shape
                if region:
                    tensor.region.offset_bytes, tensor.region.length_bytes = 64, size
                else:
                    tensor.data = bytes(size)
            replies.append(reply.SerializeToString())
    # Found: a row that has failed, with columns that are none.
    reply.results[2].groups.action.append(1)
    damaged = reply.SerializeToString()
    sound = reply.results[2].groups.SerializeToString()
    return replies + [damaged, damaged.replace(sound, b"\x0f\x01\x01")]


TEXTS = ["4GiB", "512MiB", "65536", "250ms", "24h", "unix:/run/kvservice.sock", "127.0.0.1:50051",
         "[::1]:0", "localhost:65535", "tenant=acme,127.0.0.1:1", "0123456789abcdef" * 2, "2m",
         "18446744073709551615"]
CONFIGS = ["", "pool-bytes=1GiB\nlisten=unix:/a\n", "[section]\nthreads=2\n", "lanes-max=0",
           'transfer-targets=["tenant=a,unix:/b", "127.0.0.1:5"]\nreceive-idle=5s\n']
ARGUMENTS = ["", "--listen\nunix:/a", "--pool-bytes=4GiB\n--print-config", "--help",
             "--audit-rate=2", "--transfer-targets=unix:/b\n--receives-max=0\n--check-config",
             "--no-keep-queries"]


def write(name, inputs):
    text = "".join(one.hex() + "\n" for one in inputs)
    (FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")


def main():
    FOLDER.mkdir(exist_ok=True)
    calls = [attend(100), attend(99, store=False), attend(40, tokens=3)]
    calls += [attend(99, policy=policy, store=False) for policy in policies()]
    lane = [b"\0" + call.SerializeToString() for call in calls]
    lane += [b"\1" + call.SerializeToString()
             for call in [append(0, 4), append(100, 2, sample=True), append(98, 5)]]
    good = attend(100).SerializeToString()
    lane += [b"\2" + struct.pack("<I", 7) + good, b"\4" + struct.pack("<Q", 1 << 40) + good,
             b"\x08" + struct.pack("<I", 1 << 31) + good]
    write("lane", lane)

    model = model_pb2.Model(name="small", layer_count=2, query_head_count=4, kv_head_count=2,
                            head_dim=64, cache_dtype=BFLOAT16, scale=0.125)
    convert = [b"\0" + call.SerializeToString()
               for call in [attend(5, inline=True), attend(5, 2, inline=True, store=False),
                            attend(100)]]
    convert += [b"\1" + call.SerializeToString()
                for call in [append(0, 2, inline=True), append(0, 1, inline=True, sample=True)]]
    convert += [b"\2" + policy.SerializeToString() for policy in policies()]
    convert += [b"\3" + model.SerializeToString()]
    audit = attention_pb2.AuditRequest()
    audit.handle.id, audit.handle.generation = ID, 1
    convert += [b"\4" + audit.SerializeToString()]
    write("convert", convert)

    write("reply", replies())
    write("transfer", transfer())
    write("certificate", certificates())
    write("text", [kind + text.encode() for text in TEXTS for kind in (b"\0", b"\1")] +
          [b"\2" + struct.pack("<d", x) for x in (0.05, 1e-300, 123456.7, 9.9996)])
    write("config", [config.encode() + b"\0" + arguments.encode()
                     for config in CONFIGS for arguments in ARGUMENTS])
    # Changes of rows; the rows themselves are made by the target.
    write("recovery", [b"\0", b"\1"] + [
        bytes([closed, row, how, 20, 0, 0x55]) for closed in (0, 1) for row in (0, 3, 9, 14, 255)
        for how in (0, 1, 2, 3)])

    write("policy", [
        b'{"name": "fast", "policy": {"selector": "SELECTOR_CPE", "budget": {"topKTokens": 64}}}',
        b'[{"name": "a", "policy": {"selector": "SELECTOR_CERTIFIED", "maxDroppedMass": 0.05}},'
        b' {"name": "b", "policy": {"name": "a"}}]',
        b'{"name": "c", "policy": {"selector": "SELECTOR_CIS", "cis": {"minCosine": 0.9}}}',
        b"[]", b"{", b'"text"',
        # Found: its name made two lines of the error.
        b'{"name": "fas\n","policy": {}}'])


if __name__ == "__main__":
    main()
