"""Decoding through the service, every reply checked against exact local attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

import kvservice
from kvservice import Action, AttendResult
from kvservice.tensors import Bf16Array, Float32Array
from kvservice_demo.llama import Llama
from kvservice_demo.local_attention import ExactAttention, LocalAttention
from kvservice_demo.policies import NamedPolicy

OnToken = Callable[[int], None]


@dataclass
class ReplyLog:
    """What the replies of one run said, and what was true; one entry per layer and step.

    The arrays in the lists are [query heads], those of tokens and scans one number per entry.
    """

    is_dense: list[np.ndarray] = field(default_factory=list)
    certified: list[np.ndarray] = field(default_factory=list)  # upper bound of the dropped mass
    true: list[np.ndarray] = field(default_factory=list)  # exact dropped mass
    tokens_read: list[float] = field(default_factory=list)  # mean over the KV heads
    tokens_visible: list[int] = field(default_factory=list)
    scanned: list[bool] = field(default_factory=list)
    bound_violations: int = 0
    limit_violations: int = 0
    lse_error_max: float = 0.0

    @property
    def certificate_count(self) -> int:
        """Certificates checked: layers times steps times query heads."""
        return sum(map(len, self.certified))


@dataclass
class Decoded:
    """One run of decoding."""

    token_ids: list[int]  # the model's choice after each step
    seconds: float  # without the time spent on checking
    log: ReplyLog


class RemoteAttention:
    """The `attend` of a decoder that appends and attends in one call per layer, and checks it."""

    def __init__(
        self, sequence: kvservice.Sequence, oracle: LocalAttention, policy: NamedPolicy
    ) -> None:
        """The oracle must hold what the sequence holds; both grow together."""
        self.log = ReplyLog()
        self.checking_s = 0.0
        self._sequence = sequence
        self._oracle = oracle
        self._policy = policy

    def attend(self, layer: int, q: Float32Array, k: Bf16Array, v: Bf16Array) -> Float32Array:
        """See `llama.Attend`."""
        position = self._oracle.length(layer)
        result = self._sequence.attend(
            layer, q, k, v, position=position, policy=self._policy.message, return_selected=True
        )
        started_s = time.perf_counter()
        self._check(result, self._oracle.attend(layer, q, k, v), position + 1)
        self.checking_s += time.perf_counter() - started_s
        return result.out[0]

    def _check(self, result: AttendResult, exact: ExactAttention, length: int) -> None:
        if result.attended_tokens != length or result.selected is None:
            raise RuntimeError(
                f"a reply speaks about {result.attended_tokens} tokens instead of {length}"
            )
        log, certificates = self.log, result.certificates
        dropped = exact.dropped_mass(result.selected)
        kept = exact.kept_mass(result.selected)
        is_dense = certificates.action[0] == Action.DENSE
        upper = certificates.dropped_mass_upper[0]
        log.is_dense.append(is_dense)
        log.certified.append(upper.astype(np.float64))
        log.true.append(dropped)
        log.tokens_read.append(float(result.groups.tokens_read.mean()))
        log.tokens_visible.append(length)
        log.scanned.append(bool(result.groups.scanned.any()))
        log.bound_violations += count_bound_violations(result, exact.lse, kept, dropped)
        if self._policy.max_dropped_mass is not None:
            above = upper.astype(np.float64) > self._policy.max_dropped_mass
            log.limit_violations += int(np.count_nonzero(above & ~is_dense))
        error = np.abs(result.lse[0] - (exact.lse + np.log(kept))).max()
        log.lse_error_max = max(log.lse_error_max, float(error))


def count_bound_violations(
    result: AttendResult, lse: np.ndarray, kept: np.ndarray, dropped: np.ndarray
) -> int:
    """Heads of a one-query reply of which any bound is wrong, compared with no tolerance.

    lse, kept and dropped mass are exact, [query heads] each.
    """
    stated = result.certificates
    with np.errstate(divide="ignore"):
        log_kept, log_dropped = lse + np.log(kept), lse + np.log(dropped)
    holds = (
        (dropped <= stated.dropped_mass_upper[0])
        & (dropped >= stated.dropped_mass_lower[0])
        & (log_kept <= stated.log_kept_upper[0])
        & (log_kept >= stated.log_kept_lower[0])
        & (log_dropped <= stated.log_dropped_upper[0])
        & (log_dropped >= stated.log_dropped_lower[0])
    )
    return int(np.count_nonzero(~holds))


def decode_greedily(
    model: Llama,
    attention: RemoteAttention,
    first_token: int,
    position: int,
    token_count: int,
    stop_tokens: Collection[int],
    on_token: OnToken,
) -> Decoded:
    """Feeds `first_token` at `position`, then the model's own choices up to a stop token."""
    return _decode(model, attention, [first_token], position, token_count, stop_tokens, on_token)


def decode_along(
    model: Llama,
    attention: RemoteAttention,
    fed_tokens: Sequence[int],
    position: int,
    on_token: OnToken,
) -> Decoded:
    """Feeds the given tokens whatever the model chooses, and records its choices."""
    return _decode(model, attention, fed_tokens, position, len(fed_tokens), (), on_token)


def _decode(
    model: Llama,
    attention: RemoteAttention,
    fed_tokens: Sequence[int],
    position: int,
    token_count: int,
    stop_tokens: Collection[int],
    on_token: OnToken,
) -> Decoded:
    chosen: list[int] = []
    started_s, checking_before_s = time.perf_counter(), attention.checking_s
    for step in range(token_count):
        fed = fed_tokens[step] if step < len(fed_tokens) else chosen[-1]
        logits = model.decode(fed, position + step, attention.attend)
        chosen.append(int(logits.argmax()))
        on_token(chosen[-1])
        if chosen[-1] in stop_tokens:
            break
    seconds = time.perf_counter() - started_s - (attention.checking_s - checking_before_s)
    return Decoded(chosen, seconds, attention.log)


@dataclass(frozen=True)
class Difference:
    """A step at which local attention prefers another token."""

    step: int
    remote_token: int
    local_token: int
    top_2_gap: float  # logit of the local choice minus that of the second


def compare_with_local(
    model: Llama,
    oracle: LocalAttention,
    fed_tokens: Sequence[int],
    remote_tokens: Sequence[int],
    position: int,
    on_token: OnToken,
) -> list[Difference]:
    """Steps where the same model with exact local attention chooses other tokens than the service.

    Local decoding is fed the remote run's tokens, so that every step can be compared; as long as
    nothing differs this is greedy decoding of its own.
    """
    differences = []
    for step, (fed, remote) in enumerate(zip(fed_tokens, remote_tokens, strict=True)):
        logits = model.decode(fed, position + step, oracle.attend_output)
        second, first = np.argsort(logits)[-2:]
        if first != remote:
            gap = float(logits[first] - logits[second])
            differences.append(Difference(step, remote, int(first), gap))
        on_token(int(first))
    return differences
