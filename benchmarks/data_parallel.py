"""Time the whole training in one process and in two, each with the same number of environments.

    python -m benchmarks.data_parallel --output benchmarks/results/data_parallel.json

The processes are started as ``torchrun`` starts them, with one thread each, and train with our settings for the task. Runs of
one and of two processes alternate; what is reported are medians, and the ratios of neighboring runs. The clock runs from the
end of the first update to the end of the last, which leaves out what happens once.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import torch as th
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch.distributed import TCPStore

from benchmarks.markdown import ROOT
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.zoo.settings import linear_schedule

TASKS = ("Humanoid-v5", "CartPole-v1")
#: Settings that are RL-Zoo's and not the model's.
NOT_OF_MODEL = ("callback", "normalize", "n_envs", "n_timesteps", "policy", "policy_kwargs")


class Clock(BaseCallback):
    """Notes when each rollout starts, which is when the update before it has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[tuple[float, int]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.starts.append((time.perf_counter(), self.model.num_timesteps))

    def _on_training_end(self) -> None:
        self._on_rollout_start()


def train(task: str, n_updates: int) -> None:
    """
    Train for some updates in this process, alone or with others, and print what the first process measured.

    :param task: id
    :param n_updates: after the first one
    """
    th.set_num_threads(1)
    settings = yaml.safe_load((ROOT / "hyperparams" / "trpo_ext.yml").read_text())[task]
    env: VecEnv = make_vec_env(task, settings["n_envs"], seed=0)
    if settings.get("normalize"):
        env = VecNormalize(env, gamma=settings["gamma"])
    policy_kwargs: dict[str, Any] = {}
    if task == "Humanoid-v5":
        policy_kwargs = {"log_std_init": -1, "net_arch": {"pi": [256, 256], "vf": [256, 256]}}
    arguments = {key: value for key, value in settings.items() if key not in NOT_OF_MODEL}
    if isinstance(arguments.get("target_kl"), str):
        arguments["target_kl"] = linear_schedule("target_kl", arguments["target_kl"])
    model = TRPO("MlpPolicy", env, policy_kwargs=policy_kwargs, seed=0, device="cpu", **arguments)
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    clock = Clock()
    model.learn((n_updates + 1) * model.n_steps * model.n_envs * n_processes, clock)
    if int(os.environ.get("RANK", 0)) == 0:
        (first, first_steps), *_, (last, last_steps) = clock.starts[1:]
        logged = model.logger.name_to_value
        result = {
            "steps_per_second": (last_steps - first_steps) / (last - first),
            "n_envs": model.n_envs,
            "steps": last_steps - first_steps,
            "policy_update": logged["time/policy_update"],
            "critic_update": logged["time/critic_update"],
        }
        print(json.dumps(result))


def run(task: str, n_processes: int, n_updates: int) -> dict[str, float]:
    """
    Start one training.

    :param task: id
    :param n_processes: how many
    :param n_updates: after the first one
    :return: what the first process measured
    """
    # As with `torchrun`, the store that the processes find each other by is in the process that starts them
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "benchmarks.data_parallel", "--train", task, "--updates", str(n_updates)]
    processes = []
    for rank in range(n_processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if n_processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    if any(codes):
        raise RuntimeError(f"a training has failed: exit codes {codes}")
    measured: dict[str, float] = json.loads(outputs[0].splitlines()[-1])
    return measured


def compare(task: str, n_repetitions: int, n_updates: int) -> dict[str, Any]:
    """
    Alternate one and two processes.

    :param task: id
    :param n_repetitions: pairs of runs
    :param n_updates: after the first one, in each run
    :return: medians and ratios
    """
    pairs = [(run(task, 1, n_updates), run(task, 2, n_updates)) for _ in range(n_repetitions)]
    ratios = [two["steps_per_second"] / one["steps_per_second"] for one, two in pairs]
    result: dict[str, Any] = {"task": task, "n_envs_per_process": pairs[0][0]["n_envs"], "n_updates": n_updates}
    for name, runs in zip(("one_process", "two_processes"), zip(*pairs, strict=True), strict=True):
        result[name] = {
            key: round(statistics.median(each[key] for each in runs), 4)
            for key in ("steps_per_second", "policy_update", "critic_update")
        }
    result["ratio"] = round(statistics.median(ratios), 3)
    result["ratios"] = [round(ratio, 3) for ratio in ratios]
    return result


def main() -> None:
    """Measure both tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.updates)
        return
    results = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {th.__version__}",
        "torch_threads": 1,
        "tasks": [compare(task, arguments.repetitions, arguments.updates) for task in TASKS],
    }
    print(json.dumps(results, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
