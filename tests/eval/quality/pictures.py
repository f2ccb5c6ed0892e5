"""Draws docs/images/quality_*.svg with matplotlib. The same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")

from matplotlib import pyplot, ticker  # noqa: E402

from .rows import Results  # noqa: E402
from .series import (  # noqa: E402
    Line,
    Panel,
    bounds_lines,
    heat_maps,
    sharing_panels,
    shorten,
    tokens_panels,
    worst_lines,
)

BYTES_MAX = 150_000
_COLUMNS = 3
_PANEL_INCHES = 3.6
_SETTINGS = {"svg.hashsalt": "kvservice", "svg.fonttype": "none", "font.size": 8,
             "font.family": "sans-serif", "axes.grid": True, "grid.alpha": 0.3,
             "axes.axisbelow": True, "lines.markersize": 3.5, "lines.linewidth": 1.0,
             "legend.frameon": False, "figure.dpi": 72}
_HEAD_PIXELS = 8
_MARKERS = "osD^v<>Pp*Xhd8"


def _grid(count: int) -> tuple[Any, list[Any]]:
    """A figure with `count` axes in rows."""
    columns = min(count, _COLUMNS)
    lines = -(-count // columns)
    figure, axes = pyplot.subplots(lines, columns, squeeze=False,
                                   figsize=(_PANEL_INCHES * columns, 3.1 * lines),
                                   layout="constrained")
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.remove()
    return figure, flat[:count]


def _style(name: str, order: list[str], is_single: bool) -> dict[str, Any]:
    """The same look for a name in every panel; ours and the oracle stand out."""
    place = order.index(name)
    own = name.startswith(("cpe", "oracle", "scan", "CIS"))
    return {"color": pyplot.get_cmap("tab20")(place % 20),
            "marker": _MARKERS[place % len(_MARKERS)] if own or is_single else "",
            "linewidth": 1.8 if own else 0.9, "zorder": 3 if own else 2}


def _label_log_axis(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5: a narrow range may hold no power of ten."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _draw_panels(panels: list[Panel], x_name: str, y_name: str, log_x: bool) -> Any:
    order = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    figure, axes = _grid(len(panels))
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        for line in panel.lines:
            xs, ys = zip(*line.points, strict=True)
            (handles[line.name],) = axis.plot(xs, ys, **_style(line.name, order, len(xs) == 1))
            for at, label in zip(line.points, line.labels, strict=False):
                axis.annotate(label, at, xytext=(2, 2), textcoords="offset points", fontsize=6)
        axis.set_title(panel.title)
        axis.set_yscale("log")
        _label_log_axis(axis.yaxis)
        if log_x:
            axis.set_xscale("log")
            _label_log_axis(axis.xaxis)
        axis.set_xlabel(x_name)
        axis.set_ylabel(y_name)
    figure.legend([handles[name] for name in order], order, loc="outside lower center",
                  ncols=min(5, len(order)))
    return figure


def _draw_tokens(results: Results) -> Any:
    panels = tokens_panels(results)
    return _draw_panels(panels, "tokens read", "KL (nats)", log_x=True) if panels else None


def _draw_sharing(results: Results) -> Any:
    panels = sharing_panels(results)
    if not panels:
        return None
    return _draw_panels(panels, "scans, second half", "KL / oracle's", log_x=False)


def _draw_worst(results: Results) -> Any:
    lines = worst_lines(results)
    if not lines:
        return None
    figure, axis = pyplot.subplots(figsize=(7, 0.6 + 0.24 * len(lines)), layout="constrained")
    places = range(len(lines))
    axis.hlines(places, [values["mean"] for _, values in lines],
                [values["largest"] for _, values in lines], color="0.8")
    for name, marker in (("mean", "o"), ("p99", "s"), ("largest", "^")):
        axis.plot([values[name] for _, values in lines], places, marker, label=name)
    axis.set_yticks(list(places), [name for name, _ in lines])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("KL (nats)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _draw_bounds(results: Results) -> Any:
    lines: list[Line] = bounds_lines(results)
    if not lines:
        return None
    figure, axis = pyplot.subplots(figsize=(5, 4.4), layout="constrained")
    for line in lines:
        xs, ys = zip(*line.points, strict=True)
        axis.plot(xs, ys, ".", markersize=2, alpha=0.6, label=line.name)
    low = min(x for line in lines for x, _ in line.points)
    axis.plot([low, 1], [low, 1], color="black", linewidth=0.8, label="bound = truth")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("dropped mass")
    axis.set_ylabel("bound")
    axis.legend(markerscale=3)
    return figure


def _draw_heads(results: Results) -> Any:
    maps = heat_maps(results)
    if not maps:
        return None
    figure, axes = _grid(len(maps))
    for axis, one in zip(axes, maps, strict=True):
        # As an image: a path per head would take several times the bytes. Enlarged, because some
        # viewers smooth what they scale.
        values = np.kron(one.values, np.ones((_HEAD_PIXELS, _HEAD_PIXELS)))
        mesh = axis.imshow(values, cmap="viridis", vmin=0, aspect="auto", interpolation="none",
                           extent=(-0.5, len(one.values[0]) - 0.5, len(one.values) - 0.5, -0.5))
        axis.grid(visible=False)
        axis.set_title(one.title, fontsize=7)
        axis.set_xlabel("query head")
        axis.set_ylabel("sparse layer")
        figure.colorbar(mesh, ax=axis)
    return figure


_PICTURES: dict[str, Callable[[Results], Any]] = {
    "tokens": _draw_tokens, "sharing": _draw_sharing, "worst": _draw_worst,
    "bounds": _draw_bounds, "heads": _draw_heads}


def write_pictures(results: Results, folder: Path) -> list[Path]:
    """Draws what there are rows for. Pictures without rows are removed, so that none is of another
    study. ValueError for one that is too large to be kept."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(_SETTINGS):
        for name, draw in _PICTURES.items():
            path = folder / f"quality_{name}.svg"
            path.unlink(missing_ok=True)
            figure = draw(results)
            if figure is None:
                continue
            figure.savefig(path, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
            path.write_text(shorten(path.read_text(encoding="utf-8")), encoding="utf-8")
            if path.stat().st_size > BYTES_MAX:
                raise ValueError(f"{path}: {path.stat().st_size:,} bytes, at most {BYTES_MAX:,}")
            written.append(path)
    return written
