"""Time training in environments of tensors against their NumPy side, in turn in one process.

    python -m benchmarks.tensors cartpole --output benchmarks/results/tensors_cartpole.json
    python -m benchmarks.tensors ant --n-envs 64 1024 --output benchmarks/results/tensors_ant.json
    python -m benchmarks.tensors cartpole --n-envs 4096 --device cuda --output benchmarks/results/tensors_cuda_cartpole.json
    python -m benchmarks.tensors draw

What is timed is ``learn()`` for some rollouts of 32 steps: of TRPO in a ``TensorVecEnv``, of TRPO on its NumPy side, and of
SB3's PPO there. All have networks of [64, 64], ten passes over a rollout and minibatches of the same size; all else is at the
defaults of each. What is reported are medians over repetitions in turn, and the ratios within each repetition. The share of
the environment comes from a repetition of its own. Brax's ant needs ``pip install "sb3-trpo-ext[brax]"``. ``draw`` makes
``docs/images/tensors.png`` of the results.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from benchmarks.markdown import ROOT
from benchmarks.simulators import timed
from sb3_trpo_ext import TRPO, defaults
from sb3_trpo_ext.envs import TensorCartPole, TensorVecEnv

sys.path.insert(0, str(ROOT / "tests"))
from tensor_envs import NumpySide

N_STEPS = 32
OURS, OURS_NUMPY, PPO_NUMPY = "TRPO, tensors", "TRPO, NumPy", "PPO, NumPy"


def brax_ant(n_envs: int, device: str) -> TensorVecEnv:
    """
    Brax's ant.

    :param n_envs: the number of environments
    :param device: where they are
    :return: the environments
    """
    from sb3_trpo_ext.envs.jax_envs import BraxVecEnv

    return BraxVecEnv("ant", n_envs, device=device)


TASKS: dict[str, Callable[[int, str], TensorVecEnv]] = {"cartpole": TensorCartPole, "ant": brax_ant}
TASK_NAMES = {"cartpole": "CartPole in PyTorch", "ant": "Brax's ant"}


def make_models(task: str, n_envs: int, device: str) -> dict[str, OnPolicyAlgorithm]:
    """
    Build the three models.

    :param task: which environment
    :param n_envs: the number of environments
    :param device: of the environments and the models
    :return: the models by name
    """
    settings: dict[str, Any] = {
        "n_steps": N_STEPS,
        "batch_size": defaults.batch_size(N_STEPS * n_envs),
        "seed": 0,
        "device": device,
    }
    make = functools.partial(TASKS[task], n_envs, device)
    return {
        OURS: TRPO("MlpPolicy", make(), **settings),
        OURS_NUMPY: TRPO("MlpPolicy", NumpySide(make()), **settings),
        PPO_NUMPY: PPO("MlpPolicy", NumpySide(make()), **settings),
    }


def seconds(model: OnPolicyAlgorithm, n_rollouts: int) -> float:
    """
    Train for some rollouts.

    :param model: what trains
    :param n_rollouts: for how long
    :return: how long it took
    """
    started = time.perf_counter()
    model.learn(n_rollouts * N_STEPS * model.n_envs, reset_num_timesteps=False)
    if model.device.type == "cuda":
        th.cuda.synchronize()
    return time.perf_counter() - started


def share_of_environment(model: OnPolicyAlgorithm, n_rollouts: int) -> float:
    """
    The share of ``learn()`` that is spent in the environment.

    :param model: in an environment of tensors
    :param n_rollouts: for how long
    :return: from 0 to 1
    """
    assert isinstance(model.env, TensorVecEnv)
    spent = timed(model.env)
    total = seconds(model, n_rollouts)
    return sum(spent) / total


def compare(task: str, n_envs: int, n_repetitions: int, device: str) -> dict[str, Any]:
    """
    Time the three models in turn.

    :param task: which environment
    :param n_envs: the number of environments
    :param n_repetitions: how often
    :param device: of the environments and the models
    :return: a row of the table
    """
    models = make_models(task, n_envs, device)
    # About as long for few environments as for many
    n_rollouts = max(1, 2**14 // (N_STEPS * n_envs))
    for model in models.values():
        seconds(model, 1)
    times = [{name: seconds(model, n_rollouts) for name, model in models.items()} for _ in range(n_repetitions)]
    n_samples = n_rollouts * N_STEPS * n_envs
    row: dict[str, Any] = {"task": task, "n_envs": n_envs, "batch_size": models[OURS].batch_size}  # type: ignore[attr-defined]
    row["steps_per_second"] = {name: n_samples / statistics.median(each[name] for each in times) for name in models}
    for name in (OURS_NUMPY, PPO_NUMPY):
        ratios = [each[name] / each[OURS] for each in times]
        row[f"ratio to {name}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    row["share_of_environment"] = share_of_environment(models[OURS], n_rollouts)
    return row


def draw(path: Path) -> None:
    """
    Draw the steps per second relative to PPO over the number of environments, with the range of the repetitions.

    :param path: of the picture
    """
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for task, label in TASK_NAMES.items():
        rows = json.loads((ROOT / "benchmarks" / "results" / f"tensors_{task}.json").read_text())["rows"]
        numbers = [row["n_envs"] for row in rows]
        ratios, lows, highs = zip(*(row[f"ratio to {PPO_NUMPY}"] for row in rows), strict=True)
        (line,) = axes.plot(numbers, ratios, "o-", label=label)
        axes.fill_between(numbers, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(6, 15, 2)]
    axes.set_xticks(ticks, [f"{number:,}" for number in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("environments")
    axes.set_ylabel("steps per second, relative to PPO")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=(*TASKS, "draw"))
    parser.add_argument("--n-envs", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.task == "draw":
        draw(ROOT / "docs" / "images" / "tensors.png")
        return
    machine = th.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    rows: list[dict[str, Any]] = []
    for n_envs in args.n_envs:
        rows.append(compare(args.task, n_envs, args.repetitions, args.device))
        print(json.dumps(rows[-1]), flush=True)
        if args.output is not None:
            result = {"torch": th.__version__, "threads": th.get_num_threads(), "machine": machine, "rows": rows}
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
