"""How the one setting was chosen, on the choosing half of the tasks of :mod:`benchmarks.tasks`.

    python -m benchmarks.studies.one_setting "budget 1, std 0.6" "defaults, std 0.8" --tasks choosing --seeds 100 101

A candidate is described by its name. One that begins with "defaults" has the defaults of the class, with VecNormalize if it
says ``vecnormalize 1``; any other has VecNormalize, and what ``DEFAULTS`` below says. Then follow the KL of the training per
action dimension in nats (``budget``), the standard deviation at the start (``std``; with "defaults", relative to half of the
distance between the bounds), the damping of the Fisher matrix per action dimension (``damping``) or in units of its mean
diagonal (``relative``), the number of environments (``envs``), steps in each (``rollout``), the learning rate of the critic
(``lr``), ``gae_lambda`` (of the advantages, and unless ``vf_lambda`` says otherwise of the critic's targets), and the length
of the training (``steps``). With "defaults" there are also the minibatches of the critic (``batch``), the units of the two
hidden layers of each network (``actor`` and ``critic``), ``clip_advantage``, ``norm_obs``, ``clipped_likelihood``,
``stagger_episodes`` (0 unless the name says 1), and ``constant``, a budget of which every update has the same part. All train
in EnvPool where it has the task, unless they have a single environment. ``results/one_setting.csv`` has a row per run, and
``python -m benchmarks.tables`` writes the table.

Candidates of which no code is kept: "noise 1/f^0.5" and "noise AR(1) 0.5" draw the noise of actions correlated in time, and
"VecNormalize for observations" or "for rewards" leaves the other to the agent. "8 rollouts" fits the critic to the last eight
rollouts in two passes, and "new targets" computes its targets again before each pass, with the values as they are then.
"staggered" resets one environment after each of the first rollouts. "K-FAC for the critic" fits it along natural gradients.
"penalty" subtracts from the objective so many times the squared distance of the mean action from the action space, in half
distances between the bounds.
"""

import argparse
import math
from typing import Any

import pandas
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.utils import LinearSchedule

from benchmarks import defaults
from benchmarks.markdown import ROOT, table
from benchmarks.tasks import TASKS, Task
from sb3_trpo_ext import TRPO
from sb3_trpo_ext import defaults as class_defaults
from sb3_trpo_ext.update.surrogate import Surrogate

FILE = ROOT / "results" / "one_setting.csv"
DEFAULTS = {"damping": 0.2, "envs": 16, "rollout": 128, "lr": 3e-4}
#: Arguments of the class by the words for them.
ARGUMENTS = {"lr": "learning_rate", "clip_advantage": "clip_advantage", "vf_lambda": "vf_lambda"}


class RelativeDamping(TRPO):
    """Damps the Fisher matrix in units of its mean diagonal, which two products with random signs estimate."""

    def _update_policy(self, surrogate: Surrogate, target_kl: float, cg_damping: float) -> Any:
        fisher, n_params = surrogate.fisher(), sum(param.numel() for param in surrogate.params)
        generator = th.Generator().manual_seed(self._n_updates)
        signs = th.randint(0, 2, (2, n_params), generator=generator).float() * 2 - 1
        trace = sum(float(sign @ (fisher @ sign)) for sign in signs) / 2
        return super()._update_policy(surrogate, target_kl, cg_damping * trace / n_params)


def training(name: str, task: Task, seed: int) -> defaults.Job:
    """
    What a name stands for.

    :param name: such as "budget 1, std 0.6"
    :param task: one of our tasks
    :param seed: of the training
    :return: what to do
    """
    is_of_class = name.startswith("defaults")
    given = {word: float(number) for word, number in (part.split() for part in name.split(", ")[is_of_class:])}
    if is_of_class:
        return _of_class(name, task, seed, given)
    numbers = {**DEFAULTS, **given}
    n_envs, n_rollout = int(numbers["envs"]), int(numbers["rollout"])
    n_steps = int(numbers.get("steps", task.n_steps))
    space = task.make().action_space
    n_dims = get_action_dim(space)
    is_relative = "relative" in numbers
    settings = {
        "n_steps": n_rollout,
        "learning_rate": numbers["lr"],
        "gae_lambda": 0.95,
        "vf_lambda": None,
        "target_kl": _spending(numbers["budget"], n_dims, n_envs * n_rollout, n_steps),
        "cg_damping": numbers["relative"] if is_relative else numbers["damping"] * n_dims,
        "policy_kwargs": {"log_std_init": math.log(numbers["std"])} if isinstance(space, spaces.Box) else {},
    }
    agent = defaults.Agent(RelativeDamping if is_relative else TRPO, n_envs, True, settings, is_in_envpool=True)
    return defaults.Job(task.name, n_steps, name, agent, seed)


def _spending(budget: float, n_dims: int, n_samples: int, n_steps: int) -> LinearSchedule:
    """The ``target_kl`` that falls to zero and adds up to a budget per action dimension."""
    return LinearSchedule(2 * budget * n_dims * n_samples / n_steps, 0.0, 1.0)


def _of_class(name: str, task: Task, seed: int, given: dict[str, float]) -> defaults.Job:
    """The defaults of the class but for what is given."""
    space = task.make().action_space
    settings: dict[str, Any] = {}
    policy_kwargs: dict[str, Any] = {}
    if "std" in given and isinstance(space, spaces.Box):
        half_range = float(space.high.flat[0] - space.low.flat[0]) / 2
        policy_kwargs["log_std_init"] = math.log(given["std"] * half_range)
    if "gae_lambda" in given:
        settings |= {"gae_lambda": given["gae_lambda"], "vf_lambda": None}
    settings |= {ARGUMENTS[word]: number for word, number in given.items() if word in ARGUMENTS}
    if "damping" in given:
        settings["cg_damping"] = given["damping"] * get_action_dim(space)
    settings |= {word: bool(given[word]) for word in ("norm_obs", "clipped_likelihood") if word in given}
    # Most candidates are older than this argument
    settings["stagger_episodes"] = bool(given.get("stagger_episodes", 0))
    if "batch" in given:
        settings["batch_size"] = int(given["batch"])
    if given.keys() & {"actor", "critic"}:
        units = {"pi": given.get("actor", 64), "vf": given.get("critic", 64)}
        policy_kwargs["net_arch"] = {part: [int(number)] * 2 for part, number in units.items()}
    if policy_kwargs:
        settings["policy_kwargs"] = policy_kwargs
    n_steps, n_dims = int(given.get("steps", task.n_steps)), get_action_dim(space)
    if "budget" in given:
        settings["target_kl"] = _spending(given["budget"], n_dims, class_defaults.N_SAMPLES, n_steps)
    if "constant" in given:
        settings["target_kl"] = given["constant"] * n_dims * class_defaults.N_SAMPLES / n_steps
    n_envs, is_normalized = int(given.get("envs", DEFAULTS["envs"])), bool(given.get("vecnormalize", 0))
    agent = defaults.Agent(TRPO, n_envs, is_normalized, settings, is_in_envpool=n_envs > 1)
    return defaults.Job(task.name, n_steps, name, agent, seed)


def tables() -> dict[str, str]:
    """The table of what was tried, by name."""
    head = ("task", "steps", "candidate", "return of each seed", "mean return while training")
    return {"one setting": table(head, defaults.rows_of_returns(pandas.read_csv(FILE)))}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--tasks", nargs="+", default=["choosing"], metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101])
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs = [
        training(name, TASKS[task], seed)
        for name in args.names
        for seed in args.seeds
        for task in defaults.selected_tasks(args.tasks)
    ]
    defaults.run_all(jobs, FILE, args.workers)


if __name__ == "__main__":
    main()
