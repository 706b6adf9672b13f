"""How much of its budget of KL a training with default settings spends.

    python -m benchmarks.studies.budget --output benchmarks/results/budget.json

Trains with 16 environments on four tasks, for as many steps as in the comparison of defaults, and adds up the KL of all
updates as it is logged. Also counts the updates that were rejected.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.preprocessing import get_action_dim

from benchmarks.tasks import TASKS
from sb3_trpo_ext import TRPO

NAMES = ("CartPole-v1", "Pendulum-v1", "LunarLander-v3", "HalfCheetah-v5")


class SpentKL(BaseCallback):
    """Adds up the KL of all updates."""

    spent = 0.0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        # What the update before has logged, which is none at the first rollout
        self.spent += self.logger.name_to_value.get("train/kl_divergence_loss", 0.0)

    def _on_training_end(self) -> None:
        self._on_rollout_start()


def spent(name: str) -> dict[str, Any]:
    """
    Train on a task.

    :param name: the task
    :return: a row of the table
    """
    task = TASKS[name]
    env = make_vec_env(task.make, n_envs=16, seed=0)
    callback = SpentKL()
    model = TRPO("MlpPolicy", env, seed=0, device="cpu").learn(task.n_steps, callback)
    return {
        "task": name,
        "steps": task.n_steps,
        "budget": get_action_dim(env.action_space),
        "spent": callback.spent,
        "updates": model._n_updates,
        "rejected": model._n_updates - model._n_accepted,
    }


def main() -> None:
    """Train on all of them, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    th.set_num_threads(1)
    rows = []
    for name in NAMES:
        rows.append(spent(name))
        print(json.dumps(rows[-1]), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
