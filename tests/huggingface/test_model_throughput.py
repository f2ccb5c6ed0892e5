"""tests/bench/model_throughput.py at its smallest: that its loops compute what they say."""

import json
import pathlib
import sys
import types

import numpy as np
import pytest
import torch

BENCH = pathlib.Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import decode_loops  # noqa: E402
import decode_machine  # noqa: E402
import model_throughput  # noqa: E402
from decode_loops import CheckFailedError, Plan, Times  # noqa: E402
from decode_model import SHAPES, Planted, exact_attention, part_of_steps  # noqa: E402

TINY = SHAPES["tiny"]
SIZES = ["--device=cpu", "--warm=1", "--steps=2", "--list-tokens=64", "--dense-below=64",
         "--kv-gib=0"]


def test_every_row_of_a_cell(tmp_path):
    out = tmp_path / "out"
    assert model_throughput.main([*SIZES, "--cells=tiny:2x256", f"--out={out}"]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["attention"] for row in rows if "local" not in row["attention"]] == [
        f"server: {policy}{way}" for way in ("", ", halves", ", by stream", ", by stream, halves")
        for policy in ("dense", "certified 0.05", "cpe 64")]
    assert rows[0]["ratio"] == 1.0
    assert all(row["layers_measured"] == 4 and row["layers"] == 6 for row in rows)
    shares = {row["attention"]: row["read"] for row in rows if "read" in row}
    assert shares["server: dense"] == 1.0
    assert shares["server: certified 0.05"] < 0.6
    text = out.with_suffix(".txt").read_text()
    assert text.count("\n") > len(rows)


def test_memory_that_cannot_be_registered_is_reached_by_a_detour(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_machine.CpuMachine, "pin", lambda machine, array: False)
    out = tmp_path / "out"
    cells = ["--cells=tiny:2x256", "--policies=dense", "--ways=whole,halves", f"--out={out}"]
    assert model_throughput.main([*SIZES, *cells]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert rows[-1]["attention"] == "server: dense, halves, by a detour"


def test_a_cell_that_fails_leaves_the_others(tmp_path):
    out = tmp_path / "out"
    cells = "--cells=tiny:1x9223372036854775807,tiny:1x128"
    assert model_throughput.main([*SIZES, cells, "--policies=dense", f"--out={out}"]) == 1
    assert len(json.loads(out.with_suffix(".json").read_text())["rows"]) == 4
    assert "9223372036854775807: stopped" in out.with_suffix(".txt").read_text()


def test_a_run_out_of_time_says_so(tmp_path):
    out = tmp_path / "out"
    assert model_throughput.main([*SIZES, "--seconds=0", "--cells=tiny:1x128", f"--out={out}"]) == 1
    assert "tiny:1x128: stopped, TimeoutError" in out.with_suffix(".txt").read_text()


def test_policies_are_named_with_their_numbers():
    arguments = model_throughput.parse_arguments(["--policies=certified:0.1,cpe:512,scan,dense"])
    made = {name: rest for name, *rest in model_throughput.make_policies(arguments)}
    assert list(made) == ["certified 0.1", "cpe 512", "scan 2048", "dense"]
    assert made["certified 0.1"][1] == 0.1
    assert made["cpe 512"][0].budget.top_k_tokens == 512


def test_planted_queries_find_most_of_their_mass_on_two_tokens_of_a_hundred():
    planted = Planted(TINY, 2000, "cpu")
    logits = planted.queries(1)[0, 0].float() @ planted.keys[:, 0].float().T * TINY.scale
    mass = logits.softmax(-1).sort(descending=True).values
    assert 0.9 < mass[: len(mass) // 50].sum() < 0.995


def test_halves_get_their_own_rows():
    steps = Planted(TINY, 128, "cpu").steps(4, 128, 3)
    half = part_of_steps(steps, TINY, 4, slice(2, 4))
    queries = 4 * TINY.query_heads * TINY.head_dim
    keys = 4 * TINY.kv_heads * TINY.head_dim
    assert torch.equal(half[:, : queries // 2], steps[:, queries // 2 : queries])
    assert torch.equal(half[:, -keys // 2 :], steps[:, -keys // 2 :])


def test_missing_layers_take_as_long_as_those_behind_the_first_two():
    times = Times(Plan(batch=1, prompt_tokens=1, layers=4, warm=1, steps=2))
    seconds = np.array([[9, 9, 9, 9], [5, 3, 1, 2], [7, 3, 2, 3], [9, 9, 9, 9]], float)
    times.done = seconds.cumsum().reshape(4, 4)
    assert times.step_seconds(4) == pytest.approx(13.0)
    assert times.step_seconds(32) == pytest.approx(6.0 + 3.0 + 2.0 * 30)


class Reply:
    """Exact attention's answer to the only row of a tiny batch, with a bound of its own."""

    def __init__(self, planted, steps, tokens, upper):
        q = steps[-1][: TINY.query_heads * TINY.head_dim].view(TINY.query_heads, -1)
        places = planted.places(0, 0, tokens)
        out, lse = exact_attention(q, planted.keys[places], planted.values[places], TINY.scale)
        self.out, self.lse = out[None].float().numpy(), lse[None].numpy()
        row = types.SimpleNamespace(
            certificates=types.SimpleNamespace(dropped_mass_upper=np.full((1, len(q)), upper)),
            groups=types.SimpleNamespace(tokens_read=np.full(TINY.kv_heads, tokens)))
        self.rows = [row]


def check(missing_tokens, upper, **what):
    plan = Plan(batch=1, prompt_tokens=128, layers=4, warm=1, steps=1)
    planted = Planted(TINY, 128, "cpu")
    steps = planted.steps(1, 128, plan.all_steps)
    reply = Reply(planted, steps, 128 + plan.all_steps - missing_tokens, upper)
    part = types.SimpleNamespace(batch=1, rows=slice(0, 1), steps=steps)
    return decode_loops.check_reply(planted, part, plan, reply, **what)


def test_answers_are_checked():
    read, error = check(0, 0.0, is_dense=True, limit_mass=0.05)
    assert read == 1.0
    assert error < 1e-12
    with pytest.raises(CheckFailedError, match="dense attention is off"):
        check(64, 0.0, is_dense=True, limit_mass=None)
    with pytest.raises(CheckFailedError, match="a bound is violated"):
        check(64, 0.01, is_dense=False, limit_mass=0.05)
    with pytest.raises(CheckFailedError, match="above the limit"):
        check(0, 0.06, is_dense=False, limit_mass=0.05)
