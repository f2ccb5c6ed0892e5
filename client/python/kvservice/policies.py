"""What a caller asks for, in a few words."""

from __future__ import annotations

from collections.abc import Sequence

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
    max_dropped_mass_estimate: float | None = None,
    min_cosine: float | None = None,
    seed: bool | None = None,
    max_sharing_estimate: float | None = None,
    layers: Sequence[types_pb2.LayerOverride] | None = None,
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
    asked for. `layers` (see layer_override) replaces the default, layers 0 and 1 dense; an empty
    one leaves no layer out. max_sharing_estimate is CisPolicy.max_dropped_mass_estimate: a list is
    not reused when it is estimated to drop more. ValueError for a name that does not exist.
    """
    overrides = None if layers is None else types_pb2.LayerOverrides(overrides=layers)
    return types_pb2.Policy(
        selector=_selector(selector),
        budget=_budget(sink_tokens, local_tokens, top_k_tokens, max_dropped_mass_estimate),
        cis=_cis(min_cosine, max_sharing_estimate, seed),
        layers=overrides,
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


def layer_override(
    layer_begin: int,
    layer_end: int,
    selector: str | None = None,
    *,
    sink_tokens: int | None = None,
    local_tokens: int | None = None,
    top_k_tokens: int | None = None,
    max_dropped_mass_estimate: float | None = None,
    min_cosine: float | None = None,
    kv_head_min_cosines: Sequence[float] = (),
    hidden_share: float | None = None,
    frozen_share: float | None = None,
    psaw_decay_scale: float | None = None,
    psaw_decay_rate: float | None = None,
    etf_logit_drift: float | None = None,
) -> types_pb2.LayerOverride:
    """What is different in layers [layer_begin, layer_end); what is left out stays the policy's.

    Of several overrides that cover a layer the last one counts, whole. A budget that is given in
    part has the server's defaults in its other parts.
    """
    return types_pb2.LayerOverride(
        layer_begin=layer_begin,
        layer_end=layer_end,
        selector=_selector(selector or "unspecified"),
        budget=_budget(sink_tokens, local_tokens, top_k_tokens, max_dropped_mass_estimate),
        min_cosine=min_cosine,
        kv_head_min_cosines=kv_head_min_cosines,
        hidden_share=hidden_share,
        frozen_share=frozen_share,
        psaw_decay_scale=psaw_decay_scale,
        psaw_decay_rate=psaw_decay_rate,
        etf_logit_drift=etf_logit_drift,
    )


def _selector(name: str) -> int:
    return types_pb2.Selector.Value(f"SELECTOR_{name.upper()}")


def _cis(
    min_cosine: float | None, max_sharing_estimate: float | None, seed: bool | None
) -> types_pb2.CisPolicy | None:
    if (min_cosine, max_sharing_estimate, seed) == (None, None, None):
        return None
    limit = max_sharing_estimate
    return types_pb2.CisPolicy(
        min_cosine=min_cosine,
        max_dropped_mass_estimate=None if limit is None else round_limit(limit),
        seed=seed,
    )


def _budget(
    sink_tokens: int | None,
    local_tokens: int | None,
    top_k_tokens: int | None,
    max_dropped_mass_estimate: float | None,
) -> types_pb2.Budget | None:
    mass = max_dropped_mass_estimate
    if (sink_tokens, local_tokens, top_k_tokens, mass) == (None, None, None, None):
        return None
    return types_pb2.Budget(
        sink_tokens=sink_tokens,
        local_tokens=local_tokens,
        top_k_tokens=top_k_tokens,
        max_dropped_mass_estimate=None if mass is None else round_limit(mass),
    )


def round_limit(limit: float) -> float:
    """The largest float32 that is at most `limit`."""
    nearest = np.float32(limit)
    if float(nearest) > limit:
        nearest = np.nextafter(nearest, np.float32(-np.inf))
    return float(nearest)
