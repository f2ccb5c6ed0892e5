"""What one generate() dropped, read and waited for: as text, as a dict, as a figure."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvservice.attend import AttendReply
from kvservice.results import Action, Level

# Rows of the text's table: layers are told in so many bands.
_BANDS_MAX = 8
# Upper bounds of dropped mass are counted in decades down to this one.
_DECADES = tuple(10.0**-exponent for exponent in range(6, -1, -1))


@dataclass
class _Layer:
    """Sums over the rows and heads of one layer."""

    heads: int = 0
    proven: int = 0
    unmet: int = 0
    upper_sum: float = 0.0
    upper_max: float = 0.0
    tokens_read: int = 0
    tokens_visible: int = 0
    groups: int = 0
    groups_scanned: int = 0


@dataclass
class GenerationReport:
    """Grows while tokens are generated; whole when generate() has returned.

    Masses are shares of softmax attention: upper bounds that the service proved, or 1 where it
    proved nothing. A "head" is one query head of one row of one layer's call.
    """

    model: str
    policy: str
    max_dropped_mass: float | None
    sequences: int
    layers: int
    transports: dict[str, int] = field(default_factory=dict)  # calls by the way they took
    total_s: float = 0.0
    prompt_attention_s: float = 0.0  # local
    append_s: float = 0.0
    attend_s: float = 0.0  # as the model waited, and of it in the server:
    queue_s: float = 0.0
    service_s: float = 0.0
    _layers: list[_Layer] = field(default_factory=list, repr=False)
    _levels: np.ndarray = field(default_factory=lambda: np.zeros(len(Level), np.int64), repr=False)
    _actions: np.ndarray = field(
        default_factory=lambda: np.zeros(len(Action), np.int64), repr=False
    )
    _decades: np.ndarray = field(
        default_factory=lambda: np.zeros(len(_DECADES), np.int64), repr=False
    )
    # Of each step: tokens read and visible, sum and number of upper bounds.
    _steps: list[list[float]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._layers = [_Layer() for _ in range(self.layers)]

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Measures the whole."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.total_s += time.perf_counter() - began

    def add_prefill(self, attention_s: float, append_s: float) -> None:
        """One layer of the prompts."""
        self.prompt_attention_s += attention_s
        self.append_s += append_s

    def add_step(self, layer: int, reply: AttendReply, seconds: float) -> None:
        """One layer of one step, all rows of which succeeded."""
        self.attend_s += seconds
        self.queue_s += reply.queue_s
        self.service_s += reply.service_s
        self.transports[reply.transport] = self.transports.get(reply.transport, 0) + 1
        if layer == 0:
            self._steps.append([0, 0, 0.0, 0])
        for row in reply.message.results:
            self._add_row(self._layers[layer], self._steps[-1], row)

    def _add_row(self, sums: _Layer, step: list[float], row: Any) -> None:
        stated, groups = row.certificates, row.groups
        upper = np.array(stated.dropped_mass_upper)
        level = np.array(stated.level)
        read, visible = sum(groups.tokens_read), row.attended_tokens * len(groups.tokens_read)
        sums.heads += len(upper)
        sums.proven += int(np.count_nonzero(level >= Level.CONFIDENCE))
        sums.unmet += len(stated.met) - sum(stated.met)
        sums.upper_sum += float(upper.sum())
        sums.upper_max = max(sums.upper_max, float(upper.max()))
        sums.tokens_read += read
        sums.tokens_visible += visible
        sums.groups += len(groups.scanned)
        sums.groups_scanned += sum(groups.scanned)
        self._levels += np.bincount(level, minlength=len(Level))
        self._actions += np.bincount(np.array(stated.action), minlength=len(Action))
        self._decades += np.bincount(np.searchsorted(_DECADES, upper), minlength=len(_DECADES))
        for index, value in enumerate((read, visible, float(upper.sum()), len(upper))):
            step[index] += value

    @property
    def steps(self) -> int:
        """Tokens per sequence whose attention the service did; the first one came of the prompt."""
        return len(self._steps)

    @property
    def dropped_mass_upper_mean(self) -> float:
        """Over all heads."""
        heads = sum(layer.heads for layer in self._layers)
        return sum(layer.upper_sum for layer in self._layers) / heads if heads else 0.0

    @property
    def dropped_mass_upper_max(self) -> float:
        """Over all heads."""
        return max((layer.upper_max for layer in self._layers), default=0.0)

    @property
    def tokens_read_share(self) -> float:
        """Of the tokens that dense attention would have read, per KV head."""
        visible = sum(layer.tokens_visible for layer in self._layers)
        return sum(layer.tokens_read for layer in self._layers) / visible if visible else 1.0

    @property
    def unmet(self) -> int:
        """Heads whose limit is not proven."""
        return sum(layer.unmet for layer in self._layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers and lists: for JSON."""
        return {
            "model": self.model,
            "policy": self.policy,
            "max_dropped_mass": self.max_dropped_mass,
            "sequences": self.sequences,
            "steps": self.steps,
            "dropped_mass_upper_mean": self.dropped_mass_upper_mean,
            "dropped_mass_upper_max": self.dropped_mass_upper_max,
            "heads_by_dropped_mass_upper": {
                f"{limit:g}": int(count)
                for limit, count in zip(_DECADES, self._decades, strict=True)
            },
            "heads_by_level": {
                level.name.lower(): int(self._levels[level]) for level in Level if level > 0
            },
            "heads_by_action": {
                action.name.lower(): int(self._actions[action]) for action in Action if action > 0
            },
            "heads_unmet": self.unmet,
            "tokens_read_share": self.tokens_read_share,
            "layers": [_layer_numbers(layer) for layer in self._layers],
            "steps_tokens_read": [step[0] for step in self._steps],
            "steps_tokens_visible": [step[1] for step in self._steps],
            "steps_dropped_mass_upper_mean": [step[2] / max(1, step[3]) for step in self._steps],
            "seconds": self._seconds(),
            "calls_by_transport": dict(self.transports),
        }

    def _seconds(self) -> dict[str, float]:
        waited = self.prompt_attention_s + self.append_s + self.attend_s
        return {
            "total": self.total_s,
            "prompt_attention": self.prompt_attention_s,
            "append": self.append_s,
            "attend": self.attend_s,
            "attend_in_service": self.service_s,
            "attend_in_queue": self.queue_s,
            "rest_of_the_model": max(0.0, self.total_s - waited),
        }

    def __str__(self) -> str:
        limit = "" if self.max_dropped_mass is None else f" {self.max_dropped_mass:g}"
        ways = ", ".join(f"{count} by {way}" for way, count in self.transports.items())
        lines = [
            f"{self.policy}{limit} · {_count(self.sequences, 'sequence')} · "
            f"{_count(self.steps, 'step')} · calls: {ways or 'none'}",
        ]
        if self.steps == 0:
            return lines[0]
        lines += ["", "layers   dropped mass at most    proven  not met   tokens read   scanned"]
        lines.append("               mean       max")
        size = -(-self.layers // _BANDS_MAX)
        for begin in range(0, self.layers, size):
            band = self._layers[begin : begin + size]
            lines.append(f"{_band_name(begin, len(band)):7}{_band_text(band)}")
        lines.append(f"{'all':7}{_band_text(self._layers)}")
        shares = "  ".join(
            f"≤{limit:g}: {count / max(1, self._decades.sum()):.1%}"
            for limit, count in zip(_DECADES, self._decades, strict=True)
            if count > 0
        )
        lines += ["", f"heads by dropped mass   {shares}"]
        seconds = self._seconds()
        lines.append(
            f"time {seconds['total']:.2f} s   prompt attention {seconds['prompt_attention']:.2f}  "
            f"append {seconds['append']:.2f}  attend {seconds['attend']:.2f} (in the service "
            f"{seconds['attend_in_service']:.2f}, in its queue {seconds['attend_in_queue']:.2f})  "
            f"rest of the model {seconds['rest_of_the_model']:.2f}"
        )
        return "\n".join(lines)

    def figure(self) -> Any:
        """A matplotlib figure: bounds per layer, tokens read per step, time. ImportError without
        matplotlib."""
        from matplotlib.figure import Figure

        numbers = self.to_dict()
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        bounds, reads, times = figure.subplots(1, 3, width_ratios=(3, 3, 2))
        layers = np.arange(self.layers)
        bounds.bar(layers, [layer["dropped_mass_upper_max"] for layer in numbers["layers"]],
                   color="#c6d4e8", label="max")
        bounds.bar(layers, [layer["dropped_mass_upper_mean"] for layer in numbers["layers"]],
                   color="#2f5d9b", label="mean")
        if self.max_dropped_mass is not None:
            bounds.axhline(self.max_dropped_mass, color="#b03a2e", linewidth=1, label="limit")
        bounds.set(title="Dropped mass at most", xlabel="layer", ylim=(0, None))
        bounds.legend(frameon=False, fontsize="small")
        visible = np.maximum(1, numbers["steps_tokens_visible"])
        reads.plot(np.array(numbers["steps_tokens_read"]) / visible, color="#2f5d9b")
        reads.set(title="Share of tokens read", xlabel="step", ylim=(0, 1.05))
        parts = ("rest_of_the_model", "prompt_attention", "append", "attend")
        times.barh(range(len(parts)), [numbers["seconds"][part] for part in parts],
                   color="#2f5d9b")
        times.set_yticks(range(len(parts)), [part.replace("_", " ") for part in parts])
        times.set(title="Time", xlabel="s")
        for axes in (bounds, reads, times):
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def _layer_numbers(layer: _Layer) -> dict[str, float]:
    return {
        "heads": layer.heads,
        "heads_proven": layer.proven,
        "heads_unmet": layer.unmet,
        "dropped_mass_upper_mean": layer.upper_sum / max(1, layer.heads),
        "dropped_mass_upper_max": layer.upper_max,
        "tokens_read": layer.tokens_read,
        "tokens_visible": layer.tokens_visible,
        "groups": layer.groups,
        "groups_scanned": layer.groups_scanned,
    }


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def _band_name(begin: int, count: int) -> str:
    return f"{begin}" if count == 1 else f"{begin}-{begin + count - 1}"


def _band_text(layers: list[_Layer]) -> str:
    heads = max(1, sum(layer.heads for layer in layers))
    upper = sum(layer.upper_sum for layer in layers) / heads
    highest = max(layer.upper_max for layer in layers)
    proven = sum(layer.proven for layer in layers) / heads
    unmet = sum(layer.unmet for layer in layers)
    visible = max(1, sum(layer.tokens_visible for layer in layers))
    read = sum(layer.tokens_read for layer in layers) / visible
    groups = max(1, sum(layer.groups for layer in layers))
    scanned = sum(layer.groups_scanned for layer in layers) / groups
    return (
        f"{upper:12.5f}{highest:10.5f}{proven:10.1%}{unmet:9,}{read:14.1%}{scanned:10.1%}"
    )
