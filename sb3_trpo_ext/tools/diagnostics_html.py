"""The diagnostics of runs as an interactive page, by Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.colors import to_rgb
from plotly.subplots import make_subplots

from sb3_trpo_ext.tools.diagnostics import PHASE_COLORS, Line, Panel, make_panels, phases, run_colors
from sb3_trpo_ext.zoo.runs import Run

STYLES: dict[str, dict[str, Any]] = {
    "line": {"mode": "lines", "line": {"width": 2}},
    "dashed": {"mode": "lines", "line": {"width": 1.5, "dash": "dash"}},
    "faint": {"mode": "lines", "line": {"width": 1}, "opacity": 0.35},
    "points": {"mode": "markers", "marker": {"size": 4}, "opacity": 0.35},
    "dots": {"mode": "markers", "marker": {"size": 7}},
    "crosses": {"mode": "markers", "marker": {"size": 7, "symbol": "x"}},
}


def traces(line: Line, name: str) -> list[go.Scatter]:
    """
    Plotly's form of a line.

    :param line: the line
    :param name: what the legend and the pointer call it
    :return: one trace, or two that enclose a band
    """
    red, green, blue = (round(255 * part) for part in to_rgb(line.color))
    color = f"rgb({red},{green},{blue})"
    common = {"x": line.x, "name": name, "legendgroup": name, "showlegend": False}
    if line.upper is not None:
        edge = {**common, "mode": "lines", "line": {"width": 0, "color": color}, "hoverinfo": "skip"}
        fill = f"rgba({red},{green},{blue},0.2)"
        return [go.Scatter(y=line.y, **edge), go.Scatter(y=line.upper, fill="tonexty", fillcolor=fill, **edge)]
    style = {key: dict(value) if isinstance(value, dict) else value for key, value in STYLES[line.kind].items()}
    style.setdefault("line", {})["color"] = color
    style.setdefault("marker", {})["color"] = color
    hover = f"{name}<br>%{{x:,.0f}} steps: %{{y:.4g}}<extra></extra>"
    return [go.Scatter(y=line.y, hovertemplate=hover, **common, **style)]


def marks(panels: Sequence[Panel], colors: Sequence[str]) -> list[go.Scatter]:
    """
    What the marks of the panels mean, for the legend; they belong to no run, so a click hides the entry alone.

    :param panels: all panels
    :param colors: of the runs; with several of them a mark has none of these
    :return: traces without data, one for each meaning
    """
    found: dict[str, go.Scatter] = {}
    nowhere = np.full(1, np.nan)
    for line in (line for panel in panels for line in panel.lines if line.in_legend):
        if line.label in found:
            continue
        color = "#444444" if len(colors) > 1 and line.color in colors else line.color
        empty = line._replace(color=color, x=nowhere, y=nowhere, upper=None if line.upper is None else nowhere)
        mark = traces(empty, line.label)[-1]
        found[line.label] = mark.update(showlegend=True, legendgroup=f"mark {line.label}")
    return list(found.values())


def make_figure(runs: Sequence[Run]) -> go.Figure:
    """
    The page: the returns above, everything else in three columns; all share the steps when zoomed.

    :param runs: the runs
    :return: Plotly's figure
    """
    colors = run_colors(len(runs))
    panels, bars = make_panels(runs, colors), phases(runs)
    n_small = len(panels) - 1 + bool(bars.labels)
    n_rows = 1 + -(-n_small // 3)
    titles = [panel.title for panel in panels] + ([bars.title] if bars.labels else [])
    specs: list[list[dict[str, int] | None]] = [[{"colspan": 3}, None, None]]
    specs += [[{} if 3 * row + column < n_small else None for column in range(3)] for row in range(n_rows - 1)]
    if bars.labels:
        column = (n_small - 1) % 3
        specs[-1][column:] = [{"colspan": 3 - column}, *[None] * (2 - column)]
    heights = [1.6] + [1.0] * (n_rows - 1)
    figure = make_subplots(n_rows, 3, specs=specs, subplot_titles=titles, row_heights=heights, vertical_spacing=0.34 / n_rows)
    labels = dict(zip(colors, (run.label for run in runs), strict=True))
    # One entry in the legend for each run; a click on it hides the run everywhere
    for run, color in zip(runs, colors, strict=True):
        entry = {"x": [None], "y": [None], "mode": "lines", "line": {"color": color, "width": 3}}
        figure.add_trace(go.Scatter(name=run.label, legendgroup=run.label, **entry), row=1, col=1)
    for mark in marks(panels, colors):
        figure.add_trace(mark, row=1, col=1)
    for index, panel in enumerate(panels):
        row, column = (1, 1) if index == 0 else (2 + (index - 1) // 3, 1 + (index - 1) % 3)
        for line in panel.lines:
            owner = labels.get(line.color, runs[0].label if len(runs) == 1 else line.label)
            for trace in traces(line, line.label if line.in_legend else owner):
                trace.legendgroup = owner
                figure.add_trace(trace, row=row, col=column)
        if panel.is_log:
            figure.update_yaxes(type="log", row=row, col=column)
        if panel.limits is not None:
            figure.update_yaxes(range=panel.limits, row=row, col=column)
        if panel.scale in ("whole", "zero"):
            figure.update_yaxes(rangemode="tozero", row=row, col=column)
        figure.update_xaxes(matches="x", tickformat="~s", row=row, col=column)
        if index == 0 or index + 3 >= len(panels):
            figure.update_xaxes(title={"text": "environment steps", "standoff": 4}, row=row, col=column)
    if bars.labels:
        row, column = 2 + (len(panels) - 1) // 3, 1 + (len(panels) - 1) % 3
        for phase, seconds in bars.seconds.items():
            bar = go.Bar(y=bars.labels, x=seconds, orientation="h", name=phase, marker_color=PHASE_COLORS[phase])
            bar.hovertemplate = f"{phase}: %{{x:.3g}} s<extra></extra>"
            figure.add_trace(bar, row=row, col=column)
        figure.update_xaxes(title={"text": "seconds", "standoff": 4}, row=row, col=column)
        # Plotly draws the first one at the bottom
        is_named = len(bars.labels) > 1
        figure.update_yaxes(showticklabels=is_named, automargin=True, autorange="reversed", row=row, col=column)
    height = 440 + 285 * (n_rows - 1)
    # In pixels from the top: the title, and below it a legend of a few lines
    title = {"text": runs[0].label if len(runs) == 1 else f"{len(runs)} runs", "y": 1 - 12 / height, "yanchor": "top"}
    legend = {"orientation": "h", "y": 1 - 42 / height, "yanchor": "top", "x": 0.5, "xanchor": "center", "yref": "container"}
    figure.update_layout(
        template="plotly_white",
        barmode="stack",
        height=height,
        title=title,
        margin={"l": 60, "r": 30, "t": 150, "b": 50},
        legend=legend,
        hovermode="closest",
    )
    return figure


def write_page(path: str | Path, runs: Sequence[Run]) -> None:
    """
    Write the interactive page, which needs no network to be looked at.

    :param path: where to write it
    :param runs: the runs
    """
    make_figure(runs).write_html(path, include_plotlyjs=True, full_html=True)
