"""The policies that the demo compares."""

from __future__ import annotations

from dataclasses import dataclass

from kvservice import make_policy
from kvservice.v1 import types_pb2

DENSE = "dense"
DEFAULT_POLICIES = (DENSE, "cpe", "certified")
DEFAULT_MAX_DROPPED_MASS = 0.05

_DESCRIPTIONS = {
    "dense": "reads every token",
    "cis": "reuses the tokens chosen for a similar earlier query",
    "psaw": "hides old tokens from deep layers",
    "etf": "lets deep layers take over the choice of shallower ones",
    "scan": "keeps the strongest tokens of every step",
    "cpe": "shares chosen tokens over time, depth and layers; promises nothing",
    "certified": "keeps tokens until the limit on what it dropped is proven",
    "auto": "dense for short sequences, certified above",
}

SELECTORS = tuple(_DESCRIPTIONS)


@dataclass(frozen=True)
class NamedPolicy:
    """A policy with the name under which the demo reports it."""

    name: str
    description: str
    message: types_pb2.Policy
    max_dropped_mass: float | None  # the limit that replies must keep; None = the policy has none


def named_policy(selector: str, max_dropped_mass: float) -> NamedPolicy:
    """The policy of a selector; those that prove a limit get `max_dropped_mass`."""
    description = _DESCRIPTIONS[selector]
    if selector not in ("certified", "auto"):
        return NamedPolicy(selector, description, make_policy(selector), None)
    message = make_policy(selector, max_dropped_mass=max_dropped_mass)
    return NamedPolicy(f"{selector} {max_dropped_mass:g}", description, message, max_dropped_mass)
