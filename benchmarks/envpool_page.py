"""Write the tables of docs/envpool.md from the results of envpool_agreement.py and envpool_throughput.py.

python benchmarks/envpool_page.py
"""

import json
import pathlib
import textwrap
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
START = "## Whether it is the same environment"


def cell(summary: dict[str, Any]) -> str:
    """
    Format a mean with its interval.

    :param summary: figures of a quantity in one of the two
    :return: the text
    """
    low, high = summary["interval_95"]
    return f"{summary['mean']:,.1f} [{low:,.1f}, {high:,.1f}]"


def prose(text: str) -> list[str]:
    """
    Break a paragraph into lines.

    :param text: the paragraph
    :return: its lines
    """
    return textwrap.wrap(text, 127, break_long_words=False, break_on_hyphens=False)


def table(*rows: tuple[object, ...]) -> list[str]:
    """
    Format a table.

    :param rows: the first one is the header
    :return: lines of Markdown
    """
    lines = [f"| {' | '.join(str(value) for value in row)} |" for row in rows]
    return ["", lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


def differences(task: dict[str, Any]) -> str:
    """
    Format how far observations are apart.

    :param task: results of a task
    :return: the text
    """
    return " / ".join(f"{task['same_state'][n_steps - 1]['observation']:.0e}" for n_steps in (1, 5, 20))


def agreement(result: dict[str, Any], same_mujoco: dict[str, Any]) -> list[str]:
    """
    Format the comparison with Gymnasium.

    :param result: what envpool_agreement.py has written
    :param same_mujoco: the same, with EnvPool's version of MuJoCo under Gymnasium
    :return: lines of Markdown
    """
    tasks = result["tasks"]
    (n_episodes,) = {len(task["return"]["envpool"]["episodes"]) for task in tasks.values()}
    both = [(quantity, name) for quantity in ("return", "length") for name in ("envpool", "gymnasium")]
    overlap = all(task[quantity]["intervals_overlap"] for task in tasks.values() for quantity, _ in both)
    episodes = [
        (
            env_id,
            *(cell(task[quantity][name]) for quantity, name in both),
            f"{task['return']['welch_p']:.2f} / {task['return']['kolmogorov_smirnov_p']:.2f}",
        )
        for env_id, task in tasks.items()
    ]
    steps = [
        (env_id, differences(task), differences(same_mujoco["tasks"][env_id]), f"{task['same_state'][0]['reward']:.0e}")
        for env_id, task in tasks.items()
    ]
    resets = [
        (
            env_id,
            f"{task['reset']['means_apart_in_standard_errors']:.1f} (of {task['reset']['n_moving']})",
            f"{task['reset']['smallest_ratio_of_stds']:.2f} to {task['reset']['largest_ratio_of_stds']:.2f}",
        )
        for env_id, task in tasks.items()
    ]
    keys = [
        (env_id, *(", ".join(f"`{key}`" for key in task["info"][name]) for name in ("both", "envpool", "gymnasium")))
        for env_id, task in tasks.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    other = same_mujoco["versions"]["mujoco of gymnasium"]
    return [
        START,
        "",
        *prose(
            f"One fixed policy for each task acts deterministically for {n_episodes} episodes in each. Means with 95% "
            "intervals, and the p values of two tests of the return: Welch's of the mean, Kolmogorov's and Smirnov's of "
            "the distribution. The policy for Humanoid is the trained one of this repository; "
            "the others were trained in EnvPool for 50,000 steps."
        ),
        *table(("task", "return, EnvPool", "Gymnasium", "length, EnvPool", "Gymnasium", "p"), *episodes),
        f"{'All' if overlap else 'NOT all'} pairs of intervals overlap.",
        "",
        *prose(
            "From the same state and with the same random actions, the largest difference of observations, relative to 1 plus "
            "their size, after 1 / 5 / 20 steps; and that of the rewards after 1 step, which EnvPool has in float32:"
        ),
        *table(("task", "observation", f"with MuJoCo {other} under Gymnasium", "reward"), *steps),
        *prose(
            f"So the version of MuJoCo is all there is: EnvPool has {other} compiled in. Between versions, the motion of "
            "Humanoid and Ant drifts apart, as chaotic motion does; the returns do not."
        ),
        "",
        *prose(
            "First observations, 1000 of each: how far two means are apart at most, in standard errors, and the ratios of "
            "their standard deviations:"
        ),
        *table(("task", "means", "standard deviations"), *resets),
        *prose(
            "Observations have the same sizes (348 for Humanoid-v5, 105 for Ant-v5) in the same order. In "
            "`reset_infos`, EnvPool has zeros, which is not where the robot starts (up to 0.1 m from "
            "there). After a step, `info` has other keys:"
        ),
        *table(("task", "both", "EnvPool alone", "Gymnasium alone"), *keys),
        f"Versions: {versions}.",
        "",
    ]


def throughput(result: dict[str, Any]) -> list[str]:
    """
    Format the throughput.

    :param result: what envpool_throughput.py has written
    :return: lines of Markdown
    """
    n_rounds = len(result["rows"][0]["rounds"])
    rows = [
        (row["name"], f"{row['steps_per_second']:,.0f}", f"{row['ratio_to_dummy']:.2f}x ({low:.2f} to {high:.2f})")
        for row in result["rows"]
        for low, high in [row["ratio_range"]]
    ]
    return [
        "## How fast it is",
        "",
        *prose(
            f"{result['env']}, {result['n_envs']} environments, random actions, {result['n_cores']} cores, the "
            f"environments alone. Medians of {n_rounds} rounds in which all take turns; "
            "ratios are those within a round (smallest and largest in "
            "brackets)."
        ),
        *table(("", "steps/s", "of DummyVecEnv"), *rows),
        *prose(
            "Under random actions a Humanoid falls after some twenty steps. EnvPool itself counts the step in which it only "
            "resets."
        ),
        "",
        *prose(
            "The figures come from `benchmarks/envpool_agreement.py` and `benchmarks/envpool_throughput.py`; "
            "`benchmarks/envpool_page.py` writes the tables."
        ),
    ]


def main() -> None:
    """Replace everything from the first table of figures on."""
    folder = ROOT / "benchmarks" / "results"
    page = ROOT / "docs" / "envpool.md"
    names = ("agreement", "same_mujoco", "throughput")
    results = {name: json.loads((folder / f"envpool_{name}.json").read_text()) for name in names}
    lines = [*agreement(results["agreement"], results["same_mujoco"]), *throughput(results["throughput"])]
    page.write_text(page.read_text().split(START)[0] + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
