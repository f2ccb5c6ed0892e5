"""Errors: what the trailer of a failed call and the fields of a failed row become."""

import grpc
import pytest

from kvservice.errors import error_from_call, error_from_row
from kvservice.v1 import attention_pb2, error_details_pb2

PREFIX = "type.googleapis.com/google.rpc."


class FailedCall(grpc.RpcError):
    def __init__(self, code, details, trailer):
        self._answer = code, details, trailer

    def code(self):
        return self._answer[0]

    def details(self):
        return self._answer[1]

    def trailing_metadata(self):
        return self._answer[2]


def status_with(*details):
    status = error_details_pb2.Status(code=8, message="queue full")
    for name, message in details:
        status.details.add(type_url=PREFIX + name, value=message.SerializeToString())
    return (("other", "x"), ("grpc-status-details-bin", status.SerializeToString()))


def test_all_details_are_read():
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.nanos = 250_000_000
    violation = error_details_pb2.BadRequest.FieldViolation(field="rows[2].position")
    trailer = status_with(
        ("ErrorInfo", error_details_pb2.ErrorInfo(reason="OVERLOADED", metadata={"queued": "9"})),
        ("RetryInfo", retry),
        ("BadRequest", error_details_pb2.BadRequest(field_violations=[violation])),
        ("Unknown", error_details_pb2.ErrorInfo(reason="IGNORED")),
    )
    error = error_from_call(
        FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", trailer)
    )
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.reason == "OVERLOADED"
    assert error.metadata == {"queued": "9"}
    assert error.retry_delay_s == 0.25
    assert error.field == "rows[2].position"
    assert str(error) == (
        "RESOURCE_EXHAUSTED / OVERLOADED: queue full (field rows[2].position)"
    )


@pytest.mark.parametrize("trailer", [None, (), (("other", "x"),)])
def test_a_call_without_details(trailer):
    error = error_from_call(FailedCall(grpc.StatusCode.UNAVAILABLE, None, trailer))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert (error.reason, error.metadata, error.retry_delay_s) == ("", {}, None)
    assert str(error) == "UNAVAILABLE: "


def test_a_row():
    error = error_from_row(attention_pb2.AttendRowResult(
        code=11, message="gap", reason="POSITION_GAP", metadata={"current_length": "5"},
        field="rows[0].position",
    ))
    assert error.code is grpc.StatusCode.OUT_OF_RANGE
    assert error.metadata == {"current_length": "5"}
    assert error.field == "rows[0].position"
