"""The page on several processes has the figures that were measured or computed."""

import json
import runpy
from pathlib import Path

import pytest


def test_scaling_page_has_the_measured_figures() -> None:
    root = Path(__file__).resolve().parent.parent
    results = root / "benchmarks" / "results"
    if not results.exists():
        pytest.skip("a source distribution has no benchmarks")
    page = (root / "docs" / "scaling.md").read_text()
    for task in json.loads((results / "data_parallel.json").read_text())["tasks"]:
        one, two = (f"{task[name]['steps_per_second']:,.0f}" for name in ("one_process", "two_processes"))
        row = f"| {task['task']} | {task['n_envs_per_process']} | {one} | {two} | **{task['ratio']:.2f}x** "
        assert row + f"({min(task['ratios']):.2f} to {max(task['ratios']):.2f}) |" in page
    formula = runpy.run_path(str(root / "benchmarks" / "traffic.py"))
    for case in formula["cases"]():
        numbers = [f"{case['efficiency'][str(n)]:.2f}" for n in (2, 8, 32, 128, 1000)]
        limits = [str(case[f"communication_exceeds_{name}_from"] or "none") for name in ("computation", "all")]
        assert f" | {' | '.join(numbers + limits)} |" in page, case
    sent = formula["messages"](formula["humanoid"](), formula["Update"](4, 2, 160, True))
    n_bytes = sum(message.calls * message.n_bytes for message in sent)
    assert f"| together | {sum(message.calls for message in sent)} | | {n_bytes / 1e6:.2f} |" in page
    for case, counts in json.loads((results / "host_waits.json").read_text()).items():
        columns = [counts[name] for name in ("ours", "sb3_contrib", "ppo")]
        for row, key in ((f"{case}: per step of the environments", "waits_per_step"), ("... per update", "waits_per_update")):
            ours, *others = (str(column[key]) for column in columns)
            assert f"| {row} | **{ours}** | {' | '.join(others)} |" in page
    noise = json.loads((results / "noise_scale.json").read_text())
    for name in ("fresh", "trained_3M_steps"):
        low, high = noise[name]["interval_90"]
        assert f"{noise[name]['noise_scale']:,} | {low:,} to {high:,}" in page
