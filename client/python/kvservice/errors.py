"""The one exception that calls raise, with what the server says beside the status code."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from kvservice.v1 import attention_pb2, error_details_pb2

_DETAILS_TRAILER = "grpc-status-details-bin"
_TYPE_URL_PREFIX = "type.googleapis.com/google.rpc."

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class KvServiceError(Exception):
    """A call, or one row of a call, that the server refused or could not be reached for."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field: str = "",
        retry_delay_s: float | None = None,
    ) -> None:
        """`reason` is stable and for programs (POSITION_GAP, ...), empty if the server sent none.

        `metadata` holds the variable parts of the message, `field` the path of the request field
        to blame, `retry_delay_s` the least wait after which repeating the call can help.
        """
        label = f"{code.name} / {reason}" if reason else code.name
        super().__init__(f"{label}: {message}" + (f" (field {field})" if field else ""))
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.field = field
        self.retry_delay_s = retry_delay_s


def error_from_call(error: grpc.RpcError) -> KvServiceError:
    """Reads the error of a failed call, with the details in its trailer if there are any."""
    status = error_details_pb2.Status()
    for name, value in error.trailing_metadata() or ():
        if name == _DETAILS_TRAILER:
            status = _parse(error_details_pb2.Status, value)
    return _with_details(error.code(), error.details() or "", status)


def error_from_status(code: int, status: error_details_pb2.Status) -> KvServiceError:
    """The error of a call that did not travel by gRPC; `code` is a canonical gRPC code."""
    known = _CODES.get(code, grpc.StatusCode.UNKNOWN)
    return _with_details(known, status.message, status)


def _with_details(
    code: grpc.StatusCode, message: str, status: error_details_pb2.Status
) -> KvServiceError:
    reason, metadata, field, retry_delay_s = "", {}, "", None
    for detail in status.details:
        kind = detail.type_url.removeprefix(_TYPE_URL_PREFIX)
        if kind == "ErrorInfo":
            info = _parse(error_details_pb2.ErrorInfo, detail.value)
            reason, metadata = info.reason, info.metadata
        elif kind == "RetryInfo":
            delay = _parse(error_details_pb2.RetryInfo, detail.value).retry_delay
            retry_delay_s = delay.seconds + delay.nanos * 1e-9
        elif kind == "BadRequest":
            violations = _parse(error_details_pb2.BadRequest, detail.value).field_violations
            field = violations[0].field if violations else ""
    return KvServiceError(
        code, message, reason=reason, metadata=metadata, field=field, retry_delay_s=retry_delay_s
    )


def error_from_row(result: attention_pb2.AttendRowResult) -> KvServiceError:
    """The error of one row of a call that as a whole succeeded."""
    return KvServiceError(
        _CODES.get(result.code, grpc.StatusCode.UNKNOWN),
        result.message,
        reason=result.reason,
        metadata=result.metadata,
        field=result.field,
    )


def _parse(message_type, payload: bytes):
    message = message_type()
    message.ParseFromString(payload)
    return message
