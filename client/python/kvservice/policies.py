"""What a caller asks for, in a few words."""

from __future__ import annotations

import numpy as np

from kvservice.v1 import types_pb2


def make_policy(
    selector: str,
    *,
    max_dropped_mass: float | None = None,
    max_output_error: float | None = None,
    sink_tokens: int | None = None,
    local_tokens: int | None = None,
    top_k_tokens: int | None = None,
    guarantee: str | None = None,
    failure_probability: float | None = None,
    draws_max: int | None = None,
    on_violation: str | None = None,
    shadow: bool = False,
    dense_below_tokens: int | None = None,
    deferred_exact_steps: int | None = None,
) -> types_pb2.Policy:
    """A policy; what is left out is the server's default. Enums go by their names in lower case.

    Limits travel as float32 and are rounded down to it, so the server never allows more than was
    asked for. ValueError for a name that does not exist.
    """
    budget = None
    if (sink_tokens, local_tokens, top_k_tokens) != (None, None, None):
        budget = types_pb2.Budget(
            sink_tokens=sink_tokens, local_tokens=local_tokens, top_k_tokens=top_k_tokens
        )
    return types_pb2.Policy(
        selector=types_pb2.Selector.Value(f"SELECTOR_{selector.upper()}"),
        budget=budget,
        max_dropped_mass=None if max_dropped_mass is None else round_limit(max_dropped_mass),
        max_output_error=None if max_output_error is None else round_limit(max_output_error),
        failure_probability=failure_probability,
        draws_max=draws_max,
        guarantee=types_pb2.Guarantee.Value(f"GUARANTEE_{(guarantee or 'unspecified').upper()}"),
        on_violation=types_pb2.OnViolation.Value(
            f"ON_VIOLATION_{(on_violation or 'unspecified').upper()}"
        ),
        mode=types_pb2.MODE_SHADOW if shadow else types_pb2.MODE_UNSPECIFIED,
        dense_below_tokens=dense_below_tokens,
        deferred_exact_steps=deferred_exact_steps,
    )


def round_limit(limit: float) -> float:
    """The largest float32 that is at most `limit`."""
    nearest = np.float32(limit)
    if float(nearest) > limit:
        nearest = np.nextafter(nearest, np.float32(-np.inf))
    return float(nearest)
