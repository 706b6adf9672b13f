"""The diagnostics of runs as an interactive page, by Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.colors import to_rgb
from plotly.subplots import make_subplots

from sb3_trpo_ext.tools.panels import PHASE_COLORS, Bars, Line, Panel, make_panels, phases
from sb3_trpo_ext.tools.plots import run_colors
from sb3_trpo_ext.zoo.runs import Run

N_COLUMNS = 3
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
    :param name: its name in the legend and at the pointer
    :return: one trace, or two that enclose a band
    """
    red, green, blue = (round(255 * part) for part in to_rgb(line.color))
    color = f"rgb({red},{green},{blue})"
    common = {"x": line.x, "name": name, "legendgroup": name, "showlegend": False}
    if line.upper is not None:
        common |= {"mode": "lines", "line": {"width": 0, "color": color}, "hoverinfo": "skip"}
        fill = f"rgba({red},{green},{blue},0.2)"
        return [go.Scatter(y=line.y, **common), go.Scatter(y=line.upper, fill="tonexty", fillcolor=fill, **common)]
    colored = {key: {**STYLES[line.kind].get(key, {}), "color": color} for key in ("line", "marker")}
    hover = f"{name}<br>%{{x:,.0f}} steps: %{{y:.4g}}<extra></extra>"
    return [go.Scatter(y=line.y, hovertemplate=hover, **common, **{**STYLES[line.kind], **colored})]


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
        if line.label not in found:
            color = "#444444" if len(colors) > 1 and line.color in colors else line.color
            empty = line._replace(color=color, x=nowhere, y=nowhere, upper=None if line.upper is None else nowhere)
            mark = traces(empty, line.label)[-1]
            found[line.label] = mark.update(showlegend=True, legendgroup=f"mark {line.label}")
    return list(found.values())


def add_panel(figure: go.Figure, panel: Panel, runs: Sequence[Run], colors: Sequence[str], cell: dict[str, int]) -> None:
    """Draw a panel; a click on a run in the legend hides its lines."""
    labels = dict(zip(colors, (run.label for run in runs), strict=True))
    for line in panel.lines:
        owner = labels.get(line.color, runs[0].label if len(runs) == 1 else line.label)
        for trace in traces(line, line.label if line.in_legend else owner):
            figure.add_trace(trace.update(legendgroup=owner), **cell)
    if panel.is_log:
        figure.update_yaxes(type="log", **cell)
    if panel.limits is not None:
        figure.update_yaxes(range=panel.limits, **cell)
    if panel.scale in ("whole", "zero"):
        figure.update_yaxes(rangemode="tozero", **cell)
    figure.update_xaxes(matches="x", tickformat="~s", **cell)


def add_bars(figure: go.Figure, bars: Bars, cell: dict[str, int]) -> None:
    """Draw the time per phase."""
    for phase, seconds in bars.seconds.items():
        bar = go.Bar(y=bars.labels, x=seconds, orientation="h", name=phase, marker_color=PHASE_COLORS[phase])
        figure.add_trace(bar.update(hovertemplate=f"{phase}: %{{x:.3g}} s<extra></extra>"), **cell)
    figure.update_xaxes(title={"text": "seconds", "standoff": 4}, **cell)
    # Plotly draws the first one at the bottom
    figure.update_yaxes(showticklabels=len(bars.labels) > 1, automargin=True, autorange="reversed", **cell)


def make_grid(titles: Sequence[str], last_is_wide: bool) -> go.Figure:
    """
    Empty diagrams: the first one above, the others in three columns.

    :param titles: of the diagrams
    :param last_is_wide: whether the last one takes what is left of its row
    :return: Plotly's figure
    """
    n_small = len(titles) - 1
    n_rows = 1 + -(-n_small // N_COLUMNS)
    specs: list[list[dict[str, int] | None]] = [[{"colspan": N_COLUMNS}, *[None] * (N_COLUMNS - 1)]]
    for row in range(n_rows - 1):
        specs.append([{} if N_COLUMNS * row + column < n_small else None for column in range(N_COLUMNS)])
    if last_is_wide:
        specs[-1][(n_small - 1) % N_COLUMNS] = {"colspan": N_COLUMNS - (n_small - 1) % N_COLUMNS}
    heights = [1.6] + [1.0] * (n_rows - 1)
    figure = make_subplots(
        n_rows, N_COLUMNS, specs=specs, subplot_titles=titles, row_heights=heights, vertical_spacing=0.34 / n_rows
    )
    return figure.update_layout(height=440 + 285 * (n_rows - 1))


def make_figure(runs: Sequence[Run]) -> go.Figure:
    """
    The page: the returns above, everything else in three columns; all share the steps when zoomed.

    :param runs: the runs
    :return: Plotly's figure
    """
    colors = run_colors(len(runs))
    panels, bars = make_panels(runs, colors), phases(runs)
    figure = make_grid([panel.title for panel in panels] + [bars.title] * bool(bars.labels), bool(bars.labels))
    cells = [{"row": 1, "col": 1}]
    cells += [{"row": 2 + index // N_COLUMNS, "col": 1 + index % N_COLUMNS} for index in range(len(panels))]
    for run, color in zip(runs, colors, strict=True):
        entry = {"x": [None], "y": [None], "mode": "lines", "line": {"color": color, "width": 3}}
        figure.add_trace(go.Scatter(name=run.label, legendgroup=run.label, **entry), **cells[0])
    for mark in marks(panels, colors):
        figure.add_trace(mark, **cells[0])
    for index, panel in enumerate(panels):
        add_panel(figure, panel, runs, colors, cells[index])
        if index == 0 or index + N_COLUMNS >= len(panels):
            figure.update_xaxes(title={"text": "environment steps", "standoff": 4}, **cells[index])
    if bars.labels:
        add_bars(figure, bars, cells[len(panels)])
    # In pixels from the top: the title, and below it a legend of a few lines
    height = figure.layout.height
    title = {"text": runs[0].label if len(runs) == 1 else f"{len(runs)} runs", "y": 1 - 12 / height, "yanchor": "top"}
    legend = {"orientation": "h", "y": 1 - 42 / height, "yanchor": "top", "x": 0.5, "xanchor": "center", "yref": "container"}
    margin = {"l": 60, "r": 30, "t": 150, "b": 50}
    layout = {"template": "plotly_white", "barmode": "stack", "hovermode": "closest"}
    return figure.update_layout(title=title, margin=margin, legend=legend, **layout)


def write_page(path: str | Path, runs: Sequence[Run]) -> None:
    """Write the interactive page, which loads nothing from elsewhere."""
    make_figure(runs).write_html(path, include_plotlyjs=True, full_html=True)
