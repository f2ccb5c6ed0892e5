"""The course of the demo: load, prefill, decode per policy, compare, report."""

from __future__ import annotations

from typing import Any

import numpy as np

import kvservice
from kvservice import Client
from kvservice.tensors import Bf16Array, Float32Array
from kvservice.v1 import model_pb2, types_pb2
from kvservice_demo import decoding
from kvservice_demo.decoding import Decoded, RemoteAttention
from kvservice_demo.gguf_model import GgufModel, LlamaConfig, find_installed_model, load_gguf
from kvservice_demo.llama import Llama
from kvservice_demo.local_attention import LocalAttention
from kvservice_demo.policies import DENSE, NamedPolicy
from kvservice_demo.report import PolicyReport, make_report, write_policy_table
from kvservice_demo.terminal import FlowingText, Progress, Terminal
from kvservice_demo.tokenizer import ChatTokenizer, TextStream

# Where the model's own first and second choice are closer than this, rounding decides between them.
TIE_LOGITS = 1e-3

# The service computes in float32; its log-sum-exp must match float64 this well.
LSE_ERROR_MAX = 1e-4


class DemoFailedError(RuntimeError):
    """The demo cannot run as asked."""


def register(client: Client, name: str, config: LlamaConfig) -> None:
    """Makes the model known to the server, with a bf16 cache."""
    client.register_model(
        model_pb2.Model(
            name=name,
            layer_count=config.layer_count,
            query_head_count=config.query_head_count,
            kv_head_count=config.kv_head_count,
            head_dim=config.head_dim,
            cache_dtype=types_pb2.DATA_TYPE_BFLOAT16,
            scale=config.scale,
            rotary_style=model_pb2.ROTARY_STYLE_HALF,
            inverse_frequencies=config.inverse_frequencies,
        )
    )


class Session:
    """One prompt on one server. The methods run in the order in which `run` calls them."""

    def __init__(
        self,
        terminal: Terminal,
        client: Client,
        prompt: str,
        token_count: int,
        *,
        seed_anchors: bool = False,
    ) -> None:
        self._terminal = terminal
        self._client = client
        self._prompt = prompt
        self._token_count = token_count
        self._seed_anchors = seed_anchors

    def run(self, policies: list[NamedPolicy]) -> dict[str, Any]:
        """Decodes with every policy, dense first; returns the results for the JSON file."""
        if policies[0].name != DENSE:
            raise ValueError("the first policy must be dense: the others are compared with it")
        gguf_model = self._load()
        # The last token of the prompt is the first that decodes: all attention that leads to a
        # token of the answer happens in the service.
        position = len(self._prompt_ids) - 1
        with self._client.sequence(gguf_model.name) as prompt_sequence:
            self._prefill(prompt_sequence, self._prompt_ids[:position])
            reports, dense_tokens = [], []
            for policy in policies:
                report, dense_tokens = self._run_policy(prompt_sequence, policy, dense_tokens)
                reports.append(report)
        differences = self._compare_dense(dense_tokens)
        passed = self._conclude(reports, differences, len(dense_tokens))
        return {
            "model": gguf_model.name,
            "prompt_tokens": len(self._prompt_ids),
            "decoded_tokens": self._token_count,
            "passed": passed,
            "dense_differences": [
                {"step": each.step, "top_2_gap": each.top_2_gap} for each in differences
            ],
            "policies": [report.to_json() for report in reports],
        }

    def _load(self) -> GgufModel:
        progress = Progress(self._terminal, "Model", 1, "layers")
        path = find_installed_model()

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        progress.update(0)
        gguf_model = load_gguf(path, show)
        progress.erase()
        config = gguf_model.config
        self._model = Llama(config, gguf_model.weights)
        self._tokenizer = ChatTokenizer(gguf_model.metadata)
        self._prompt_ids = self._tokenizer.encode_chat(self._prompt)
        tokens_max = config.context_tokens_max - self._token_count
        if len(self._prompt_ids) > tokens_max:
            raise DemoFailedError(
                f"the prompt has {len(self._prompt_ids):,} tokens; with {self._token_count} to "
                f"decode this model has room for {tokens_max:,}"
            )
        self._oracle = LocalAttention(config, len(self._prompt_ids) + self._token_count)
        register(self._client, gguf_model.name, config)
        self._terminal.field(
            "Model",
            f"{gguf_model.name} · {config.layer_count} layers · {config.query_head_count} query "
            f"heads on {config.kv_head_count} KV heads · bf16 cache",
        )
        question = self._prompt.splitlines()[-1]
        self._terminal.field("Prompt", f"{len(self._prompt_ids):,} tokens, ending in")
        self._terminal.field("", self._terminal.style(_shorten(question, 84), "bold"))
        return gguf_model

    def _prefill(self, sequence: kvservice.Sequence, token_ids: list[int]) -> None:
        progress = Progress(self._terminal, "Prefill", len(token_ids), "tokens")
        streamed_bytes = 0
        sample: Float32Array | None = None
        positions: list[int] | None = None

        def keep_sample(of_positions: list[int], queries: Float32Array) -> None:
            nonlocal positions, sample
            positions, sample = of_positions, queries

        def stream(start: int, k: Bf16Array, v: Bf16Array) -> None:
            nonlocal streamed_bytes
            sequence.append(
                start,
                k,
                v,
                query_sample=sample,
                query_sample_positions=positions if self._seed_anchors else None,
            )
            self._oracle.append_chunk(start, k, v)
            streamed_bytes += k.nbytes + v.nbytes
            progress.update(start + k.shape[1], f"{streamed_bytes / 1e6:.0f} MB streamed")

        progress.update(0)
        self._model.prefill(token_ids, stream, on_queries=keep_sample)
        progress.finish(f"{streamed_bytes / 1e6:.0f} MB streamed")
        self._terminal.line()

    def _run_policy(
        self, prompt_sequence: kvservice.Sequence, policy: NamedPolicy, dense_tokens: list[int]
    ) -> tuple[PolicyReport, list[int]]:
        """Decodes greedily and, where that leaves dense's tokens, once more along them."""
        terminal = self._terminal
        terminal.line(
            terminal.style(policy.name, "bold") + terminal.style(f"  {policy.description}", "dim")
        )
        greedy = self._decode_greedily(prompt_sequence, policy)
        terminal.line(terminal.style(
            f"{len(greedy.token_ids)} tokens · {len(greedy.token_ids) / greedy.seconds:.1f} "
            "tokens per second", "dim"
        ))
        dense_tokens = dense_tokens or greedy.token_ids
        further_runs, along = [], greedy
        if greedy.token_ids != dense_tokens:
            along = self._decode_along(prompt_sequence, policy, dense_tokens)
            further_runs.append(along)
        terminal.line()
        pairs = zip(along.token_ids, dense_tokens, strict=True)
        agreement = np.mean([chosen == dense for chosen, dense in pairs])
        report = make_report(
            policy.name,
            policy.max_dropped_mass,
            greedy,
            further_runs,
            float(agreement),
            self._tokenizer.decode(greedy.token_ids),
        )
        return report, dense_tokens

    def _decode_greedily(
        self, prompt_sequence: kvservice.Sequence, policy: NamedPolicy
    ) -> Decoded:
        text, stream = FlowingText(self._terminal), TextStream(self._tokenizer)
        position = len(self._prompt_ids) - 1
        self._oracle.truncate(position)
        with prompt_sequence.fork() as sequence:
            decoded = decoding.decode_greedily(
                self._model,
                RemoteAttention(sequence, self._oracle, policy),
                self._prompt_ids[-1],
                position,
                self._token_count,
                self._tokenizer.stop_ids,
                lambda token: text.push(stream.push(token)),
            )
        text.close()
        return decoded

    def _decode_along(
        self, prompt_sequence: kvservice.Sequence, policy: NamedPolicy, dense_tokens: list[int]
    ) -> Decoded:
        progress = _Counter(self._terminal, "Agreement", len(dense_tokens), "tokens")
        position = len(self._prompt_ids) - 1
        self._oracle.truncate(position)
        with prompt_sequence.fork() as sequence:
            decoded = decoding.decode_along(
                self._model,
                RemoteAttention(sequence, self._oracle, policy),
                self._fed_tokens(dense_tokens),
                position,
                progress.count,
            )
        progress.erase()
        return decoded

    def _compare_dense(self, dense_tokens: list[int]) -> list[decoding.Difference]:
        progress = _Counter(self._terminal, "Local", len(dense_tokens), "tokens")
        position = len(self._prompt_ids) - 1
        self._oracle.truncate(position)
        differences = decoding.compare_with_local(
            self._model,
            self._oracle,
            self._fed_tokens(dense_tokens),
            dense_tokens,
            position,
            progress.count,
        )
        progress.erase()
        return differences

    def _fed_tokens(self, chosen: list[int]) -> list[int]:
        return [self._prompt_ids[-1], *chosen[:-1]]

    def _conclude(
        self,
        reports: list[PolicyReport],
        differences: list[decoding.Difference],
        compared_count: int,
    ) -> bool:
        """Writes the table and the outcome of every check; returns whether all passed."""
        terminal = self._terminal
        write_policy_table(terminal, reports)
        terminal.line()
        checks = [self._check_bounds(reports), self._check_lse(reports)]
        checks += [_check_limit(terminal, each) for each in reports if each.max_dropped_mass]
        checks.append(self._check_dense(differences, compared_count))
        terminal.line()
        return all(checks)

    def _check_bounds(self, reports: list[PolicyReport]) -> bool:
        checked = sum(report.certificates_checked for report in reports)
        violations = sum(report.bound_violations for report in reports)
        self._terminal.mark(
            violations == 0,
            f"{checked:,} certificates compared with the exact dropped mass: {violations:,} broken",
        )
        return violations == 0

    def _check_lse(self, reports: list[PolicyReport]) -> bool:
        error = max(report.lse_error_max for report in reports)
        self._terminal.mark(
            error <= LSE_ERROR_MAX,
            f"every log-sum-exp within {LSE_ERROR_MAX:g} of float64 attention over the tokens "
            f"named: at most {error:.0e} off",
        )
        return error <= LSE_ERROR_MAX

    def _check_dense(self, differences: list[decoding.Difference], compared_count: int) -> bool:
        excused = all(each.top_2_gap < TIE_LOGITS for each in differences)
        same = compared_count - len(differences)
        self._terminal.mark(
            excused,
            f"dense: {same} of {compared_count} greedy tokens are those of local float64 attention",
        )
        for each in differences:
            kind = "a tie" if each.top_2_gap < TIE_LOGITS else "a real difference"
            self._terminal.line(
                f"  token {each.step}: local top-2 gap {each.top_2_gap:.1e} logits, {kind}"
            )
        return excused


class _Counter:
    """A progress bar that counts by itself, for callbacks that bring a token."""

    def __init__(self, terminal: Terminal, label: str, total: int, unit: str) -> None:
        self._progress = Progress(terminal, label, total, unit)
        self._done = 0

    def count(self, _token: int) -> None:
        self._done += 1
        self._progress.update(self._done)

    def erase(self) -> None:
        self._progress.erase()


def _check_limit(terminal: Terminal, report: PolicyReport) -> bool:
    holds = report.limit_violations == 0
    terminal.mark(
        holds,
        f"{report.name}: every head within its limit by proof, or dense "
        f"({100 * report.dense_head_ratio:.0f} %): {report.limit_violations:,} exceptions",
    )
    return holds


def _shorten(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: columns - 1] + "…"
