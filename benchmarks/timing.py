"""What scripts that time two things in turn have in common."""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path


def timing_parser(description: str | None, repetitions: int) -> argparse.ArgumentParser:
    """
    A parser for the options of such a script.

    :param description: of the script, with its line breaks
    :param repetitions: how often each is timed by default
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=repetitions)
    parser.add_argument("--output", type=Path)
    return parser


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """The median of paired ratios, with the smallest and the largest, as the tables want them."""
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
