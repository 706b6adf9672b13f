"""What ``cg_tolerance`` does to whole updates and to learning on small tasks: more evidence behind its default.

    python -m benchmarks.studies.cg_tolerance_steps --output benchmarks/results/cg_tolerance_steps.json

Steps: at each update of a training at the defaults, the direction is computed anew for each tolerance as an update would do
it, scaled to where the mean KL is ``target_kl``, and the surrogate's improvement is taken there, on the rollout itself and on
a fresh one of the same policy. What is reported is the mean improvement relative to that at the smallest tolerance, with the
standard error of the paired difference; products per update; and the median time of the solution alone.

Learning: trainings from several seeds, each with the same seeds for all tolerances; the mean return over the steps of the
training.
"""

import argparse
import json
import pathlib
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from benchmarks import contrib
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.optim import KLConstraint
from sb3_trpo_ext.optim.vectors import assign_, flatten
from sb3_trpo_ext.update.surrogate import Surrogate

TOLERANCES = (0.3, 0.1, 0.03, 0.01, 1e-4)


class Case(NamedTuple):
    """A task and how it is learnt."""

    env: str
    n_envs: int
    n_steps: int
    timesteps: int
    options: dict[str, Any]


CASES = {
    "CartPole-v1": Case("CartPole-v1", 8, 128, 20_480, {}),
    "CartPole-v1, damping 0.001": Case("CartPole-v1", 8, 128, 20_480, {"cg_damping": 1e-3}),
    "Pendulum-v1": Case("Pendulum-v1", 4, 512, 61_440, {"gamma": 0.9}),
}


def make_model(case: Case, seed: int, **options: Any) -> TRPO:
    """
    A model in its environments.

    :param case: which
    :param seed: of both
    :param options: beyond those of the case
    :return: the model
    """
    env = make_vec_env(case.env, case.n_envs, seed=seed)
    settings = {**contrib.DEFAULTS, "n_steps": case.n_steps, **case.options, **options}
    return TRPO("MlpPolicy", env, seed=seed, device="cpu", **settings)


def surrogate_of(model: TRPO) -> Surrogate:
    """
    The surrogate of the rollout in the buffer.

    :param model: with a full buffer
    :return: the surrogate
    """
    return Surrogate(model.policy, model._parts.actor_params, model._full_batch())


@th.no_grad()
def objective_and_kl(surrogate: Surrogate, direction: th.Tensor, scale: float) -> tuple[float, float]:
    """
    Objective and KL at the end of a step; the parameters stay where they are.

    :param surrogate: with the parameters
    :param direction: of the step
    :param scale: of the direction
    :return: objective and mean KL
    """
    params = surrogate.params
    old = flatten(params)
    assign_(params, old + scale * direction)
    objective, kl = surrogate.evaluate()
    assign_(params, old)
    return float(objective), float(kl)


def scale_to(surrogate: Surrogate, direction: th.Tensor, target_kl: float) -> float:
    """
    How long a direction has to be.

    :param surrogate: measures the KL
    :param direction: of the step
    :param target_kl: where it has to end
    :return: the factor
    """
    low, high = 0.0, 1e-3
    while objective_and_kl(surrogate, direction, high)[1] < target_kl:
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if objective_and_kl(surrogate, direction, middle)[1] < target_kl else (low, middle)
    return low


def steps(case: Case, n_updates: int) -> list[dict[str, float]]:
    """
    Compare the steps of all tolerances at each update of a training.

    :param case: which
    :param n_updates: of the training
    :return: a row for each tolerance
    """
    model = make_model(case, seed=0)
    _, callback = model._setup_learn(10**9, None)
    assert model.env is not None
    measured: dict[float, list[tuple[float, ...]]] = defaultdict(list)
    for _ in range(n_updates):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        # Of the same policy as the next rollout, which the update is made on
        fresh = surrogate_of(model)
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        for tolerance in TOLERANCES:
            surrogate = surrogate_of(model)
            _, gradient = surrogate.objective_and_gradient()
            update = KLConstraint(int(model.cg_max_steps), tolerance, float(model.cg_damping))  # type: ignore[arg-type]
            started = time.perf_counter()
            solution = update._solve(surrogate, gradient)
            seconds = time.perf_counter() - started
            scale = scale_to(surrogate, solution.x, float(model.target_kl))  # type: ignore[arg-type]
            gains = [
                objective_and_kl(each, solution.x, scale)[0] - float(each.objective_and_gradient()[0])
                for each in (surrogate, fresh)
            ]
            measured[tolerance].append((*gains, solution.n_steps, seconds))
        model.train()
    rows = []
    exact = np.array(measured[TOLERANCES[-1]])
    for tolerance in TOLERANCES:
        data = np.array(measured[tolerance])
        row = {"cg_tolerance": tolerance, "products": data[:, 2].mean(), "solution_ms": 1000 * np.median(data[:, 3])}
        for index, name in enumerate(("in_sample", "fresh")):
            scale = exact[:, index].mean()
            row[name] = data[:, index].mean() / scale
            row[f"{name}_standard_error"] = (data - exact)[:, index].std(ddof=1) / np.sqrt(n_updates) / abs(scale)
        rows.append({key: float(f"{value:.5g}") for key, value in row.items()})
    return rows


def mean_return(case: Case, tolerance: float, seed: int) -> float:
    """
    Train, and average the episodes' returns over the steps of the training.

    :param case: which
    :param tolerance: of conjugate gradient
    :param seed: of the training
    :return: the mean return
    """
    model = make_model(case, seed, cg_tolerance=tolerance).learn(case.timesteps)
    assert model.env is not None
    returns = np.concatenate(model.env.env_method("get_episode_rewards"))
    lengths = np.concatenate(model.env.env_method("get_episode_lengths"))
    return float(np.average(returns, weights=lengths))


def learning(case: Case, tolerances: Sequence[float], n_seeds: int) -> dict[str, Any]:
    """
    Compare trainings, paired by their seeds.

    :param case: which
    :param tolerances: two of them
    :param n_seeds: number of trainings with each
    :return: returns, and their difference
    """
    returns = np.array([[mean_return(case, tolerance, seed) for tolerance in tolerances] for seed in range(n_seeds)])
    difference = returns[:, 1] - returns[:, 0]
    return {
        "cg_tolerances": list(tolerances),
        "returns": returns.T.round(2).tolist(),
        "means": returns.mean(axis=0).round(2).tolist(),
        "difference": round(float(difference.mean()), 3),
        "difference_standard_error": round(float(difference.std(ddof=1) / np.sqrt(n_seeds)), 3),
    }


def main() -> None:
    """Run the measurement and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"torch": th.__version__, "updates": args.updates}
    for name, case in CASES.items():
        result[name] = {"steps": steps(case, args.updates)}
        if args.seeds > 1:
            result[name]["learning"] = learning(case, (0.1, 0.03), args.seeds)
        print(name, json.dumps(result[name], indent=1), flush=True)
        if args.output is not None:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
