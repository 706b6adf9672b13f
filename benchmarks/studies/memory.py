"""RecurrentTRPO beside RecurrentPPO and a policy without memory, on MuJoCo's tasks without velocities.

    python -m benchmarks.studies.memory --seeds 0 1 2
    python -m benchmarks.studies.memory --agents "RecurrentTRPO, damping 0.05" --seeds 100 --steps 250000

All have 16 environments, and LSTMs 64 units. The rest is at the defaults of the classes; RecurrentPPO's environments are in
VecNormalize, because it does not normalize by itself. "damping" is that of the Fisher matrix per action dimension, 0.2 by
default. ``results/memory.csv`` has a row per run, and ``python -m benchmarks.tables`` writes the tables.
"""

import argparse
import functools
from typing import Any

import pandas
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_action_dim

from benchmarks import defaults
from benchmarks.defaults import OURS, Agent, Job, normalized, run_all
from benchmarks.markdown import ROOT, table
from benchmarks.tasks import MEMORY, TASKS, Task
from sb3_trpo_ext import RecurrentTRPO

FILE = ROOT / "results" / "memory.csv"
N_ENVS = 16
LSTM: dict[str, Any] = {"policy_kwargs": {"lstm_hidden_size": 64}, "device": "cpu"}


def recurrent_trpo(task: Task, seed: int, damping: float | None = None) -> OnPolicyAlgorithm:
    """Ours, with memory; with the default damping, or another one per action dimension."""
    env = make_vec_env(task.make, N_ENVS, seed=seed)
    cg_damping = "auto" if damping is None else damping * get_action_dim(env.action_space)
    return RecurrentTRPO("MlpLstmPolicy", env, seed=seed, cg_damping=cg_damping, **LSTM)


def recurrent_ppo(task: Task, seed: int) -> OnPolicyAlgorithm:
    """That of sb3-contrib."""
    venv = normalized(make_vec_env(task.make, N_ENVS, seed=seed))
    return RecurrentPPO("MlpLstmPolicy", venv, seed=seed, **LSTM)


AGENTS = {
    "RecurrentTRPO": Agent(RecurrentTRPO, make_model=recurrent_trpo),
    "RecurrentPPO": Agent(RecurrentPPO, make_model=recurrent_ppo),
    "TRPO": defaults.AGENTS[OURS],
}
TRIED = {
    f"RecurrentTRPO, damping {damping}": Agent(RecurrentTRPO, make_model=functools.partial(recurrent_trpo, damping=damping))
    for damping in (0.02, 0.05)
}
#: What was tried was tried with other seeds.
FIRST_SEED_OF_CHOICE = 100


def tables() -> dict[str, str]:
    """The tables of returns without velocities, by name: those of the published seeds, and those that a choice was made on."""
    frame = pandas.read_csv(FILE).sort_values(["task", "steps", "agent", "seed"])
    head = ("task", "steps", "agent", "return of each seed", "mean return while training")
    is_choice = frame["seed"] >= FIRST_SEED_OF_CHOICE
    parts = {"no velocities": frame[~is_choice], "memory tried": frame[is_choice]}
    return {name: table(head, defaults.rows_of_returns(part)) for name, part in parts.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    agents, tasks = {**AGENTS, **TRIED}, [task.name for task in MEMORY]
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks[:2])
    parser.add_argument("--agents", nargs="+", choices=agents, default=list(AGENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="of a training (default: that of the task)")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs = [
        Job(task, args.steps or TASKS[task].n_steps, agent, agents[agent], seed)
        for seed in args.seeds
        for agent in args.agents
        for task in args.tasks
    ]
    run_all(jobs, FILE, args.workers)


if __name__ == "__main__":
    main()
