"""What one row of an Attend call says, as numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

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


@dataclass(frozen=True)
class Certificates:
    """Statements about the dropped share of softmax attention; every array is [queries, heads].

    The upper bound covers all tokens below `AttendResult.attended_tokens` that were not attended.
    Logs are natural; a negative estimate means that none was made.
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


@dataclass(frozen=True)
class GroupReports:
    """How each KV head was answered; every array is [KV heads]."""

    action: np.ndarray
    scanned: np.ndarray
    tokens_read: np.ndarray
    tokens_scanned: np.ndarray
    similarity: np.ndarray


@dataclass(frozen=True)
class AttendResult:
    """The answer to one row of a call."""

    out: np.ndarray  # [queries, query heads, head_dim], float32 unless asked otherwise
    lse: np.ndarray  # [queries, query heads], natural log of the attended mass
    selector: Selector  # the one in force after AUTO, layer overrides and length rules
    attended_tokens: int
    certificates: Certificates
    groups: GroupReports
    selected: list[np.ndarray] | None  # ascending positions per KV head, if asked for


def result_from_row(
    row: attention_pb2.AttendRowResult, out: np.ndarray, lse: np.ndarray
) -> AttendResult:
    """Reads a successful row; `out` and `lse` are its part of the call's tensors."""
    selected = [np.array(head.positions, np.uint32) for head in row.selected]
    return AttendResult(
        out=out,
        lse=lse,
        selector=Selector(row.selector),
        attended_tokens=row.attended_tokens,
        certificates=_certificates(row.certificates, lse.shape),
        groups=_groups(row.groups),
        selected=selected or None,
    )


def _certificates(message: types_pb2.Certificates, shape: tuple[int, ...]) -> Certificates:
    def read(values, dtype) -> np.ndarray:
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
    )


def _groups(message: types_pb2.GroupReports) -> GroupReports:
    return GroupReports(
        action=np.array(message.action, np.int8),
        scanned=np.array(message.scanned, np.bool_),
        tokens_read=np.array(message.tokens_read, np.int64),
        tokens_scanned=np.array(message.tokens_scanned, np.int64),
        similarity=np.array(message.similarity, np.float32),
    )
