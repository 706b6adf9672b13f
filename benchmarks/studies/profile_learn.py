"""Which functions the time of ``learn()`` goes into, by Python's profiler.

    python -m benchmarks.studies.profile_learn humanoid-16-envpool --output benchmarks/results/profile_humanoid-16-envpool.json

The case is one of ``benchmarks/throughput.py``, after a warm-up. The share of a function is the time spent in itself and not
in what it calls; the profiler makes what consists of many small Python functions look larger than it is.
"""

import argparse
import cProfile
import json
import pathlib
import pstats
from typing import Any

import torch as th

from benchmarks.markdown import ROOT
from benchmarks.throughput import CASES, Contestant, make_models


def short_name(file: str, line: int, function: str) -> str:
    """
    What a reader can find.

    :param file: of the function, "~" for one that is built in
    :param line: where it begins
    :param function: its name
    :return: file and function, or the function alone
    """
    if file == "~":
        return function.strip("<>{}").removeprefix("built-in method ").split(" of ")[0].replace("method ", "").strip("'")
    path = pathlib.Path(file)
    is_ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
    return f"{path.relative_to(ROOT) if is_ours else pathlib.Path(*path.parts[-2:])}: {function}"


def profile(case_name: str, n_rows: int) -> list[dict[str, Any]]:
    """
    Profile one repetition of a case.

    :param case_name: which
    :param n_rows: number of functions
    :return: the functions with the largest share of the time, and what is left
    """
    models = make_models(CASES[case_name], n_critic_updates=10, batch_size=128)
    assert models["theirs"].env is not None and models["ours"].env is not None
    models["theirs"].env.close()
    contestant = Contestant(models["ours"], CASES[case_name])
    contestant.learn()
    profiler = cProfile.Profile()
    profiler.enable()
    contestant.learn()
    profiler.disable()
    models["ours"].env.close()
    entries = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    total = sum(entry[2] for entry in entries.values())
    largest = sorted(entries.items(), key=lambda item: -item[1][2])[:n_rows]
    rows = [
        {"function": short_name(*function), "calls": entry[1], "share": round(entry[2] / total, 4)}
        for function, entry in largest
    ]
    return [*rows, {"function": "all others", "calls": None, "share": round(1 - sum(row["share"] for row in rows), 4)}]


def main() -> None:
    """Run one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--rows", type=int, default=14)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    rows = profile(args.case, args.rows)
    for row in rows:
        print(f"{100 * row['share']:5.1f}%  {row['calls'] or '':>8}  {row['function']}")
    if args.output is not None:
        result = {"case": args.case, "torch": th.__version__, "threads": th.get_num_threads(), "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
