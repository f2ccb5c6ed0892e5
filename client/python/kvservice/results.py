"""What one row of an Attend call says, as numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from kvservice.v1 import attention_pb2, types_pb2


class Level(IntEnum):
    """Strength of a statement, weakest first; NONE says nothing and its bound is 1."""

    UNSPECIFIED = types_pb2.LEVEL_UNSPECIFIED
    NONE = types_pb2.LEVEL_NONE
    CONFIDENCE = types_pb2.LEVEL_CONFIDENCE
    DETERMINISTIC = types_pb2.LEVEL_DETERMINISTIC
    EXACT = types_pb2.LEVEL_EXACT


class Action(IntEnum):
    """How a head was answered."""

    UNSPECIFIED = types_pb2.ACTION_UNSPECIFIED
    SELECTED = types_pb2.ACTION_SELECTED
    REUSED = types_pb2.ACTION_REUSED
    GROWN = types_pb2.ACTION_GROWN
    DENSE = types_pb2.ACTION_DENSE
    COMPENSATED = types_pb2.ACTION_COMPENSATED


class Selector(IntEnum):
    """Which method chose the tokens."""

    UNSPECIFIED = types_pb2.SELECTOR_UNSPECIFIED
    AUTO = types_pb2.SELECTOR_AUTO
    DENSE = types_pb2.SELECTOR_DENSE
    GIVEN = types_pb2.SELECTOR_GIVEN
    CIS = types_pb2.SELECTOR_CIS
    PSAW = types_pb2.SELECTOR_PSAW
    ETF = types_pb2.SELECTOR_ETF
    CPE = types_pb2.SELECTOR_CPE
    CERTIFIED = types_pb2.SELECTOR_CERTIFIED
    SCAN = types_pb2.SELECTOR_SCAN


@dataclass(frozen=True)
class Certificates:
    """Statements about the dropped share of softmax attention; every array is [queries, heads].

    The upper bound covers all tokens below `AttendResult.attended_tokens` that were not attended.
    Logs are natural; a negative estimate means that none was made. The statement is wrong with at
    most the failure probability. Output errors bound the distance to dense attention's output, in
    units of the values and relative to the largest value norm; infinite where nothing is known.
    """

    level: np.ndarray
    action: np.ndarray
    met: np.ndarray
    dropped_mass_upper: np.ndarray
    dropped_mass_lower: np.ndarray
    log_kept_lower: np.ndarray
    log_kept_upper: np.ndarray
    log_dropped_lower: np.ndarray
    log_dropped_upper: np.ndarray
    dropped_mass_estimate: np.ndarray
    failure_probability: np.ndarray
    output_error_upper: np.ndarray
    output_error_relative_upper: np.ndarray
    value_norm_lower: np.ndarray
    keys_sampled: np.ndarray
    rows_sampled: np.ndarray


@dataclass(frozen=True)
class GroupReports:
    """How each KV head was answered; every array is [KV heads]."""

    action: np.ndarray
    scanned: np.ndarray
    tokens_read: np.ndarray
    tokens_scanned: np.ndarray
    similarity: np.ndarray
    keys_sampled: np.ndarray
    rows_sampled: np.ndarray
    sharing_estimate: np.ndarray  # -1 = not estimated
    # What theory says under assumptions that nothing checks, no bound; negative = no statement.
    assumed_cis_excess_mass: np.ndarray
    assumed_psaw_dropped_mass: np.ndarray
    assumed_etf_excess_mass: np.ndarray
    key_norm_max: np.ndarray  # upper bound of the keys' norms; negative = not known
    query_distance: np.ndarray  # to the query whose list was reused; negative = none was


@dataclass(frozen=True)
class DeferredMasses:
    """What an earlier row has dropped, with every key scored since; arrays [queries, heads]."""

    position: int
    dropped_mass_upper: np.ndarray
    dropped_mass_lower: np.ndarray


@dataclass(frozen=True)
class AttendResult:
    """The answer to one row of a call; out and lse are torch tensors if q was one."""

    out: Any  # [queries, query heads, head_dim], float32 unless asked otherwise
    lse: Any  # [queries, query heads], natural log of the attended mass
    selector: Selector  # the one in force after AUTO, layer overrides and length rules
    attended_tokens: int
    certificates: Certificates
    groups: GroupReports
    selected: list[np.ndarray] | None  # ascending positions per KV head, if asked for
    # Names the row's random numbers: what `kvctl audit --replay` takes.
    replay_name: str = ""
    # Of earlier rows, oldest first, this one last; empty but for the call with which
    # `deferred_exact_steps` query tokens have come together.
    deferred: tuple[DeferredMasses, ...] = ()


class _RowResult(AttendResult):
    """A row whose parts are made when they are asked for: most callers want few of them."""

    _row: attention_pb2.AttendRowResult

    def __init__(
        self, row: attention_pb2.AttendRowResult, out: Any, lse: Any, replay_name: str
    ) -> None:
        parts = self.__dict__
        parts["out"], parts["lse"] = out, lse
        parts["replay_name"], parts["_row"] = replay_name, row

    @cached_property
    def selector(self) -> Selector:
        return Selector(self._row.selector)

    @cached_property
    def attended_tokens(self) -> int:
        return self._row.attended_tokens

    @cached_property
    def certificates(self) -> Certificates:
        return _certificates(self._row.certificates, tuple(self.lse.shape))

    @cached_property
    def groups(self) -> GroupReports:
        return _groups(self._row.groups)

    @cached_property
    def selected(self) -> list[np.ndarray] | None:
        return [np.array(head.positions, np.uint32) for head in self._row.selected] or None

    @cached_property
    def deferred(self) -> tuple[DeferredMasses, ...]:
        return tuple(_deferred(masses) for masses in self._row.deferred)


def result_from_row(
    row: attention_pb2.AttendRowResult, out: Any, lse: Any, replay_name: str = ""
) -> AttendResult:
    """Reads a successful row; `out` and `lse` are its part of the call's tensors."""
    return _RowResult(row, out, lse, replay_name)


def _deferred(message: attention_pb2.DeferredMasses) -> DeferredMasses:
    return DeferredMasses(
        position=message.position,
        dropped_mass_upper=np.array(message.dropped_mass_upper, np.float32).reshape(
            message.query_count, -1
        ),
        dropped_mass_lower=np.array(message.dropped_mass_lower, np.float32).reshape(
            message.query_count, -1
        ),
    )


def _certificates(message: types_pb2.Certificates, shape: tuple[int, ...]) -> Certificates:
    def read(values, dtype, absent=None) -> np.ndarray:
        if absent is not None and len(values) == 0:
            return np.full(shape, absent, dtype)
        return np.array(values, dtype).reshape(shape)

    return Certificates(
        level=read(message.level, np.int8),
        action=read(message.action, np.int8),
        met=read(message.met, np.bool_),
        dropped_mass_upper=read(message.dropped_mass_upper, np.float32),
        dropped_mass_lower=read(message.dropped_mass_lower, np.float32),
        log_kept_lower=read(message.log_kept_lower, np.float64),
        log_kept_upper=read(message.log_kept_upper, np.float64),
        log_dropped_lower=read(message.log_dropped_lower, np.float64),
        log_dropped_upper=read(message.log_dropped_upper, np.float64),
        dropped_mass_estimate=read(message.dropped_mass_estimate, np.float32),
        failure_probability=read(message.failure_probability, np.float64, 0.0),
        output_error_upper=read(message.output_error_upper, np.float32, np.inf),
        output_error_relative_upper=read(message.output_error_relative_upper, np.float32, np.inf),
        value_norm_lower=read(message.value_norm_lower, np.float32, 0.0),
        keys_sampled=read(message.keys_sampled, np.uint32, 0),
        rows_sampled=read(message.rows_sampled, np.uint32, 0),
    )


def _groups(message: types_pb2.GroupReports) -> GroupReports:
    def column(values) -> np.ndarray:
        return np.array(values or [-1.0] * len(message.action), np.float32)

    return GroupReports(
        action=np.array(message.action, np.int8),
        scanned=np.array(message.scanned, np.bool_),
        tokens_read=np.array(message.tokens_read, np.int64),
        tokens_scanned=np.array(message.tokens_scanned, np.int64),
        similarity=np.array(message.similarity, np.float32),
        keys_sampled=np.array(message.keys_sampled, np.uint32),
        rows_sampled=np.array(message.rows_sampled, np.uint32),
        sharing_estimate=column(message.sharing_estimate),
        assumed_cis_excess_mass=column(message.assumed_cis_excess_mass),
        assumed_psaw_dropped_mass=column(message.assumed_psaw_dropped_mass),
        assumed_etf_excess_mass=column(message.assumed_etf_excess_mass),
        key_norm_max=column(message.key_norm_max),
        query_distance=column(message.query_distance),
    )
