"""Whether an entry of ``hyperparams/trpo_ext.yml`` is ahead of the one setting, which it has to be to stay there.

    python -m benchmarks.studies.entries --tasks Acrobot-v1 Pendulum-v1 --seeds 20 21 22

Trains each task with its entry, as ``sb3-trpo train`` does, and with the defaults of the class in 16 environments, which is
what ``default`` in the same file means; both for as many steps as the entry has. ``results/entries.csv`` has a row per run,
and ``python -m benchmarks.tables`` writes the table. The rows of an entry that is gone are of a time when it was there.
"""

import argparse
from collections.abc import Iterator

import pandas
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from benchmarks import defaults
from benchmarks.defaults import OURS, Agent, Job, run_all, zoo_model
from benchmarks.markdown import ROOT, table
from benchmarks.tasks import Task
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.zoo.settings import KEY, load_hyperparams

FILE = ROOT / "results" / "entries.csv"
ENTRY = "entry"


def entry_model(task: Task, seed: int) -> OnPolicyAlgorithm:
    """The model that ``sb3-trpo train`` makes of a task with an entry."""
    from sb3_trpo_ext.zoo.manager import Manager, register

    register()
    return zoo_model(Manager, KEY, load_hyperparams()[task.name], task, seed)


NAMES = {ENTRY: "entry", OURS: "one setting"}
AGENTS = {ENTRY: Agent(TRPO, make_model=entry_model), OURS: defaults.AGENTS[OURS]}


def tables() -> dict[str, str]:
    """The table of entries and the one setting, by name."""
    frame = pandas.read_csv(FILE)

    def rows() -> Iterator[list[str]]:
        for (task, steps), part in frame.groupby(["task", "steps"], sort=False):
            for agent, name in NAMES.items():
                runs = part[part["agent"] == agent].sort_values("seed")
                yield [str(task), f"{steps:,}", name, *defaults.returns_and_area(runs)]

    return {"entries": table(("task", "steps", "settings", "return of each seed", "mean return while training"), rows())}


def main() -> None:
    """Run the command line."""
    entries = load_hyperparams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True, choices=entries, metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[20, 21, 22])
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs = [
        Job(task, int(entries[task]["n_timesteps"]), name, agent, seed)
        for task in args.tasks
        for seed in args.seeds
        for name, agent in AGENTS.items()
    ]
    run_all(jobs, FILE, args.workers)


if __name__ == "__main__":
    main()
