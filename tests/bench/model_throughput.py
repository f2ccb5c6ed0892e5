"""Tokens per second of whole decoders: every layer's attention in a server on this host, against
the same loop with local attention.

    PYTHONPATH=client/python:build/python PYTHON tests/bench/model_throughput.py --device=cuda

PYTHON is any with torch. Models have the shapes of LLaMA-2-7B and LLaMA-3-8B and random weights in
bf16; what goes to attention are planted rows (decode_model.py), the same in both loops.

- dense, local: torch's scaled dot product attention, by cuDNN or flash, whichever is faster; a step
  is one CUDA graph, the cache is torch's.
- the server's rows: the layers between two calls are one CUDA graph each; q, k and v go to memory
  that is shared with the server, which appends k and v and attends in one call, and outputs come
  back from there. "halves": the batch in two halves, each in a loop of its own at the same time, so
  that one computes while the other is at the server; both read all weights. "by stream": the CPU
  prepares calls ahead and the GPU's stream makes them (kvservice.prepared, kvservice.cuda_stream).

Layers 0 and 1 are dense under every policy, as by default. Prompts are stored beforehand. Where a
model's whole cache would take too long to fill (--kv-gib), fewer layers have weights and caches,
and times of a whole step are computed: the missing layers as the mean of those behind the first
two. The column `layers` says how many were measured.
"""

import argparse
import json
import os
import pathlib
import sys
import time

import torch

import decode_loops
from decode_loops import DenseLoop, Limit, Part, Plan, StreamPart
from decode_machine import machine_named
from decode_model import SHAPES, Planted, Weights
from kvservice import Client, LaneOptions, make_policy
from kvservice_demo.server import OwnServer

# Model, batch and tokens of the prompts; all 32 layers fit on a GPU of 139 GiB.
CELLS = (
    "llama2-7b:16x4096,llama3-8b:8x16384,llama3-8b:8x65536,llama3-8b:1x65536,llama3-8b:16x16384"
    ",llama2-7b:1x65536,llama2-7b:8x16384,llama3-8b:16x4096,llama2-7b:8x4096,llama3-8b:1x16384,"
    "llama2-7b:1x16384,llama3-8b:8x4096,llama3-8b:1x4096,llama2-7b:1x4096"
)
MASS_LIMIT = 0.05
POLICIES = "dense,certified,cpe"
WAYS = "whole,halves,stream,stream-halves"
COLUMNS = (
    "model      batch  tokens  layers  attention                     ms/step  tokens/s  ratio"
    "   compute    call  server   queue    read    error"
)


def make_policies(arguments):
    """Policies of the server's rows: names, messages, and the limits that they promise."""
    below = {"dense_below_tokens": arguments.dense_below}
    made = []
    for text in arguments.policies.split(","):
        kind, _, number = text.partition(":")
        if kind == "dense":
            made.append((kind, make_policy(kind), None))
        elif kind == "certified":
            limit = float(number or MASS_LIMIT)
            policy = make_policy(kind, max_dropped_mass=limit, guarantee="deterministic",
                                 failure_probability=1e-6, **below)
            made.append((f"{kind} {limit}", policy, limit))
        else:
            tokens = int(number or arguments.list_tokens)
            made.append((f"{kind} {tokens}", make_policy(kind, top_k_tokens=tokens, **below), None))
    return made


class Results:
    """Rows, printed and written as they come."""

    def __init__(self, machine, arguments):
        self._out = arguments.out and pathlib.Path(arguments.out)
        self._text = ""
        self._numbers = {
            "machine": machine.describe(),
            "placement": placement(machine),
            "plan": {"warm": arguments.warm, "steps": arguments.steps},
            "rows": [],
        }
        self.say(f"{self._numbers['machine']}\n{self._numbers['placement']}\n"
                 "Random weights, planted keys, values and queries. Ratios: to the faster local\n"
                 "attention of the same run. compute, call, server, queue: us of one layer behind\n"
                 "the first two. read: of the tokens, in the last call; error: of its outputs.\n")
        self.say(COLUMNS)

    def say(self, line):
        print(line, flush=True)
        self._text += f"{line}\n"
        if self._out:
            self._out.with_suffix(".txt").write_text(self._text, encoding="utf-8")

    def add(self, row):
        self._numbers["rows"].append(row)
        if self._out:
            numbers = json.dumps(self._numbers, indent=1)
            self._out.with_suffix(".json").write_text(f"{numbers}\n", encoding="utf-8")
        layers = f"{row['layers_measured']}/{row['layers']}"
        line = (f"{row['model']:10} {row['batch']:5} {row['prompt_tokens']:7} {layers:>7}  "
                f"{row['attention']:28} {row['step_ms']:8.2f} {row['tokens_per_s']:9.1f} "
                f"{row['ratio']:5.2f}x")
        if "call" in row:
            line += "".join(f"{row[name]:8.0f}" for name in ("compute", "call", "service", "queue"))
            line += f"  {row['read']:6.1%} {row['error']:8.1e}"
        self.say(line)


def placement(machine):
    """Where the server is."""
    if machine.device == "cpu":
        return "the server on the same CPUs"
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    has_mps = os.path.exists(f"{folder}/control")
    return f"two processes on one GPU, {'under MPS' if has_mps else 'in time slices (no MPS)'}"


class Cell:
    """A model, a batch and a length."""

    def __init__(self, text, arguments):
        model, _, size = text.partition(":")
        self.text, self.shape = text, SHAPES[model]
        batch, prompt_tokens = (int(number) for number in size.split("x"))
        cache_bytes = batch * prompt_tokens * self.shape.layer_token_bytes
        layers = int(arguments.kv_gib * (1 << 30) // cache_bytes)
        self.plan = Plan(batch, prompt_tokens, min(self.shape.layers, max(4, layers)),
                         arguments.warm, arguments.steps)

    def row(self, attention, step_seconds):
        """What is the same for all rows."""
        return {
            "model": self.shape.name, "batch": self.plan.batch,
            "prompt_tokens": self.plan.prompt_tokens, "layers": self.shape.layers,
            "layers_measured": self.plan.layers, "attention": attention,
            "step_ms": step_seconds * 1e3, "tokens_per_s": self.plan.batch / step_seconds,
        }


def run_local(machine, cell, weights, planted, steps, limit):
    """Rows of local attention, the fastest first."""
    loop = DenseLoop(machine, weights, planted, steps, cell.plan)
    ends = loop.ends_seconds()
    rows = []
    for name, seconds in loop.backend_seconds(limit).items():
        layer = (seconds - ends) / cell.plan.layers
        rows.append(cell.row(f"local dense: {name}", ends + layer * cell.shape.layers))
        rows[-1]["layer_us"] = layer * 1e6
    rows.sort(key=lambda row: row["step_ms"])
    return [row | {"ratio": rows[0]["step_ms"] / row["step_ms"]} for row in rows]


def ways_of(batch, names):
    """How the batch is decoded, by the end of a row's name: the kind of loop, and the slices of
    the batch that run at the same time."""
    middle = batch // 2
    whole, halves = [slice(0, batch)], [slice(0, middle), slice(middle, batch)]
    ways = {"whole": ("", Part, whole), "halves": (", halves", Part, halves),
            "stream": (", by stream", StreamPart, whole),
            "stream-halves": (", by stream, halves", StreamPart, halves)}
    return [ways[name] for name in names.split(",") if middle or "halves" not in name]


def run_served(machine, cell, weights, planted, steps, arguments, limit):
    """Yields rows of attention in a server of its own."""
    plan, shape = cell.plan, cell.shape
    policies = make_policies(arguments)
    ways = ways_of(plan.batch, arguments.ways)
    pool = decode_loops.pool_bytes(shape, plan, len(policies) * len(ways))
    lane = LaneOptions(calls_max=decode_loops.CALLS_MAX, call_bytes_max=decode_loops.CALL_BYTES_MAX,
                       spin_s=arguments.spin_us and arguments.spin_us * 1e-6)
    with OwnServer(f"--device={machine.device}", pool_bytes=pool) as server, Client(
        server.endpoint, transport="lane", lane=lane
    ) as client:
        model = decode_loops.register(client, plan, shape)
        began = time.perf_counter()
        handles = decode_loops.fill(server.endpoint, model, planted, plan, limit)
        stored = plan.batch * plan.layers * plan.prompt_tokens * shape.layer_token_bytes
        seconds = time.perf_counter() - began
        print(f"  {stored / 1e9:.1f} GB stored in {seconds:.1f} s", flush=True)
        for suffix, kind, slices in ways:
            parts = [kind(machine, weights, steps, client, plan, rows) for rows in slices]
            for name, policy, limit_mass in policies:
                runs = decode_loops.run_parts(parts, handles, policy, limit)
                checks = [
                    decode_loops.check_reply(planted, part, plan, reply, limit_mass=limit_mass,
                                             is_dense=name == "dense")
                    for part, (_, reply) in zip(parts, runs, strict=True)
                ]
                rate = sum(part.batch / times.step_seconds(shape.layers)
                           for part, (times, _) in zip(parts, runs, strict=True))
                detour = "" if all(part.is_direct for part in parts) else ", by a detour"
                row = cell.row(f"server: {name}{suffix}{detour}", plan.batch / rate)
                yield row | runs[0][0].medians_us() | {"read": checks[0][0],
                                                       "error": max(e for _, e in checks)}
            for part in parts:
                part.close()


def run_cell(machine, cell, weights, results, arguments, limit):
    """All rows of a cell."""
    planted = Planted(cell.shape, cell.plan.prompt_tokens, machine.device)
    steps = planted.steps(cell.plan.batch, cell.plan.prompt_tokens, cell.plan.all_steps)
    local = run_local(machine, cell, weights, planted, steps, limit)
    for row in local:
        results.add(row)
    if machine.device == "cuda":
        torch.cuda.empty_cache()
    for row in run_served(machine, cell, weights, planted, steps, arguments, limit):
        results.add(row | {"ratio": local[0]["step_ms"] / row["step_ms"]})


def parse_arguments(words):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--cells", default=CELLS, help="MODEL:BATCHxTOKENS, separated by commas")
    parser.add_argument("--policies", default=POLICIES,
                        help="dense, certified[:LIMIT], SELECTOR[:TOKENS], separated by commas")
    parser.add_argument("--ways", default=WAYS, help="of calling, separated by commas")
    parser.add_argument("--list-tokens", type=int, default=2048, help="where a policy names none")
    parser.add_argument("--dense-below", type=int, default=2048, help="dense_below_tokens")
    parser.add_argument("--warm", type=int, default=4, help="steps before those measured")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--kv-gib", type=float, default=8.0, help="caches of a cell, at most")
    parser.add_argument("--cell-seconds", type=float, default=60.0, help="at most")
    parser.add_argument("--seconds", type=float, default=300.0, help="of all cells, at most")
    parser.add_argument("--spin-us", type=float, help="of LaneOptions; default: the client's own")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--out", help="where to write OUT.txt and OUT.json")
    return parser.parse_args(words)


def main(words=None):
    """Returns the number of cells that failed or found no time."""
    arguments = parse_arguments(words)
    machine = machine_named(arguments.device, has_graphs=not arguments.eager)
    results = Results(machine, arguments)
    end, failed, weights = Limit(arguments.seconds), 0, {}
    for text in arguments.cells.split(","):
        cell, began = Cell(text, arguments), time.perf_counter()
        limit = Limit(min(arguments.cell_seconds, end.left_s))
        try:
            limit.check()
            if cell.shape not in weights:
                weights[cell.shape] = Weights(cell.shape, cell.shape.layers, machine.device)
            run_cell(machine, cell, weights[cell.shape], results, arguments, limit)
        # Whatever it is, the other cells may work.
        except Exception as error:  # noqa: BLE001
            failed += 1
            results.say(f"{text}: stopped, {type(error).__name__}: {error}")
        print(f"  {text}: {time.perf_counter() - began:.1f} s", flush=True)
    return failed


if __name__ == "__main__":
    # A half whose kernels are done does not wait for the other one's thread for milliseconds.
    sys.setswitchinterval(1e-4)
    raise SystemExit(main())
