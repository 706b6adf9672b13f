"""Train the small tasks of ``hyperparams/trpo_ext.yml`` as a user would, and gather what came out.

    python benchmarks/small_tasks.py --seeds 3 --output results/small_tasks.json

Each run is ``sb3-trpo train`` followed by ``sb3-trpo report`` (20 deterministic episodes with other seeds), one at a time.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

TASKS = (
    "CartPole-v1",
    "Pendulum-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "LunarLander-v3",
    "LunarLanderContinuous-v3",
    "InvertedPendulum-v5",
)


def run(env: str, seed: int, folder: str, options: list[str]) -> float:
    """
    Train and evaluate one agent.

    :param env: the task
    :param seed: of the training
    :param folder: for the run
    :param options: further options of ``sb3-trpo train``
    :return: mean return of the evaluation
    """
    command = [sys.executable, "-m", "sb3_trpo_ext.zoo"]
    train = [*command, "train", "--env", env, "--seed", str(seed), "-f", folder, "--eval-freq", "-1", "--verbose", "0"]
    for arguments in ([*train, *options], [*command, "report", "--env", env, "-f", folder]):
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (evaluation,) = pathlib.Path(folder).glob("*/*/evaluation.json")
    return float(json.loads(evaluation.read_text())["return"]["mean"])


def main() -> None:
    """Run the tasks and write down the returns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path)
    args, options = parser.parse_known_args()
    results = {}
    for env in args.tasks:
        returns = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                returns.append(run(env, seed, folder, options))
        results[env] = {"mean": float(np.mean(returns)), "returns": returns}
        print(f"{env:28} {np.mean(returns):10.2f}   {np.round(returns, 2).tolist()}", flush=True)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
