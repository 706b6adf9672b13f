"""MaskableTRPO beside MaskablePPO, and the time of an update with masks and with memory.

    python -m benchmarks.masks_and_memory run
    python -m benchmarks.masks_and_memory time

``run`` trains on tasks with invalid actions and puts a row per run into ``results/masks.csv``: the return of 50 deterministic
episodes. Runs that are there are left out. ``time`` measures ``train()`` of our classes and of sb3-contrib's in turns, with
the same networks, on rollouts of the same size; run nothing else then. It writes ``benchmarks/results/masks_and_memory.json``.
``python -m benchmarks.tables`` writes the tables. Returns with memory come from ``sb3-trpo compare``: see docs/memory.md.
"""

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas
import torch as th
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.markdown import ROOT, table
from benchmarks.timing import spread
from sb3_trpo_ext import MaskableTRPO, RecurrentTRPO
from sb3_trpo_ext.envs.blocks import Blocks

RESULTS = ROOT / "results" / "masks.csv"
TIMES = Path(__file__).parent / "results" / "masks_and_memory.json"
COLUMNS = ("task", "agent", "seed", "steps", "return", "return_std", "seconds")
N_EPISODES, EVALUATION_SEED = 50, 1000
N_ENVS = 16
#: Samples of a rollout in 16 environments; MaskablePPO's default is for one environment.
N_STEPS = 128
AGENTS: dict[str, Callable[..., Any]] = {"MaskableTRPO": MaskableTRPO, "MaskablePPO": MaskablePPO}


class Task(NamedTuple):
    """A task with invalid actions, and the number of environment steps that an agent has."""

    n_steps: int
    make: Callable[[], gym.Env]


TASKS = {
    "InvalidActionEnvDiscrete": Task(20_000, lambda: InvalidActionEnvDiscrete(dim=70, n_invalid_actions=55)),
    "InvalidActionEnvMultiDiscrete": Task(20_000, lambda: InvalidActionEnvMultiDiscrete(dims=[10, 10], n_invalid_actions=10)),
    "InvalidActionEnvMultiBinary": Task(20_000, lambda: InvalidActionEnvMultiBinary(dims=10, n_invalid_actions=3)),
    "Blocks": Task(300_000, Blocks),
}


def run(job: tuple[str, str, int]) -> dict[str, Any]:
    """Train an agent, and let it act: a row of the file."""
    task, agent, seed = job
    th.set_num_threads(1)
    started = time.time()
    env = make_vec_env(TASKS[task].make, N_ENVS, seed=seed)
    model = AGENTS[agent]("MlpPolicy", env, n_steps=N_STEPS, seed=seed, device="cpu").learn(TASKS[task].n_steps)
    evaluation = make_vec_env(TASKS[task].make, 1, seed=EVALUATION_SEED)
    returns, _ = evaluate_policy(model, evaluation, N_EPISODES, return_episode_rewards=True)
    row = {"task": task, "agent": agent, "seed": seed, "steps": TASKS[task].n_steps}
    summary = {"return": f"{np.mean(returns):.5g}", "return_std": f"{np.std(returns):.3g}"}
    return {**row, **summary, "seconds": round(time.time() - started)}


def run_all(seeds: list[int], n_workers: int) -> None:
    """Do all runs that the file has no row for."""
    if not RESULTS.exists():
        RESULTS.write_text(",".join(COLUMNS) + "\n")
    done = {(row["task"], row["agent"], int(row["seed"])) for row in csv.DictReader(RESULTS.read_text().splitlines())}
    os.environ["OMP_NUM_THREADS"] = "1"
    left = [job for seed in seeds for task in TASKS for agent in AGENTS if (job := (task, agent, seed)) not in done]
    with multiprocessing.get_context("spawn").Pool(n_workers, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(run, left):
            print(json.dumps(row), flush=True)
            with RESULTS.open("a") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def rollout_of(algorithm: Any, policy: str, make: Callable[[], gym.Env], **kwargs: Any) -> Any:
    """A model with a full buffer."""
    env = make_vec_env(make, N_ENVS, seed=0)
    model = algorithm(policy, env, n_steps=N_STEPS, seed=0, **kwargs)
    model.learn(N_STEPS * N_ENVS)
    return model


def compare_updates(n_pairs: int, device: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Seconds of ``train()``, ours and theirs in turns, and the ratio of each pair, by the name of a case."""
    lstm = {"policy_kwargs": {"lstm_hidden_size": 64}, "device": device}
    cases: dict[str, Callable[[], list[Any]]] = {
        "masks": lambda: [rollout_of(each, "MlpPolicy", Blocks, device=device) for each in (MaskableTRPO, MaskablePPO)],
        "memory": lambda: [
            rollout_of(each, "MlpLstmPolicy", lambda: gym.make("CartPole-v1"), **lstm)
            for each in (RecurrentTRPO, RecurrentPPO)
        ],
    }
    for name, make in cases.items():
        models, seconds = make(), []
        for _ in range(n_pairs):
            pair = []
            for model in models:
                started = time.perf_counter()
                model.train()
                if device == "cuda":
                    th.cuda.synchronize()
                pair.append(time.perf_counter() - started)
            seconds.append(pair)
        ours, theirs = zip(*seconds, strict=True)
        medians = {"ours_s": statistics.median(ours), "theirs_s": statistics.median(theirs)}
        yield name, {**medians, **spread([second / first for first, second in seconds])}


def tables() -> dict[str, str]:
    """The tables of returns and of times."""
    frame = pandas.read_csv(RESULTS)
    rows = []
    for task, settings in TASKS.items():
        cells = []
        for agent in AGENTS:
            part = frame[(frame["task"] == task) & (frame["agent"] == agent)].sort_values("seed")
            cells.append(f"{part['return'].mean():,.1f} ({', '.join(f'{value:,.1f}' for value in part['return'])})")
        rows.append([task, f"{settings.n_steps:,}", *cells])
    head = ("task", "steps", *AGENTS)
    labels = {
        "masks": "MaskableTRPO / MaskablePPO, Blocks",
        "memory": "RecurrentTRPO / RecurrentPPO, LSTM of 64 units, CartPole-v1",
    }
    speed = [
        [
            labels[name],
            device,
            f"{part['ours_s']:.2f} / {part['theirs_s']:.2f}",
            f"{part['ratio']:.1f}x ({part['ratio_min']:.1f} to {part['ratio_max']:.1f})",
        ]
        for path, device in ((TIMES, "CPU"), (TIMES.with_stem("masks_and_memory_cuda"), "H200"))
        for name, part in json.loads(path.read_text()).items()
    ]
    return {"masks": table(head, rows), "masks and memory": table(("case", "device", "`train()`, s", "ratio"), speed)}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run", help="train and evaluate")
    train.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    train.add_argument("--workers", type=int, default=2)
    timing = commands.add_parser("time", help="time updates")
    timing.add_argument("--pairs", type=int, default=7)
    timing.add_argument("--device", default="cpu")
    timing.add_argument("--output", type=Path, default=TIMES)
    args = parser.parse_args()
    if args.command == "run":
        run_all(args.seeds, args.workers)
    else:
        results = {}
        for name, result in compare_updates(args.pairs, args.device):
            results[name] = result
            print(name, json.dumps(result), flush=True)
            args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
