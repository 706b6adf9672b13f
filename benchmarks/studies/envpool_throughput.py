"""How many steps per second the environments alone take: EnvPool, with and without our VecEnv, against SB3's VecEnvs.

All of them exist at once and take turns, a second or so each, so that a machine whose speed changes disturbs all alike.
Actions are random and made beforehand.

    python -m benchmarks.studies.envpool_throughput --output benchmarks/results/envpool_throughput.json
"""

import argparse
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Callable

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_trpo_ext.envs import EnvPoolVecEnv
from sb3_trpo_ext.envs.envpool_tasks import n_cores


def steps_per_second(step: Callable[[np.ndarray], object], actions: np.ndarray, seconds: float) -> float:
    """
    Step for a while.

    :param step: steps all environments
    :param actions: of shape ``(n_steps, n_envs, n_actions)``, used again and again
    :param seconds: how long at least
    :return: steps of single environments per second
    """
    start, n_steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step(actions[n_steps % len(actions)])
        n_steps += 1
    return n_steps * actions.shape[1] / (time.perf_counter() - start)


def main() -> None:
    """Run the measurement and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Humanoid-v5")
    parser.add_argument("--n-envs", type=int, default=16)
    parser.add_argument("--n-rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()

    envs: dict[str, VecEnv] = {
        "EnvPool itself, 2 threads": EnvPoolVecEnv(args.env, args.n_envs, seed=0, num_threads=2),
        "EnvPoolVecEnv, 2 threads": EnvPoolVecEnv(args.env, args.n_envs, seed=0, num_threads=2),
        "EnvPoolVecEnv, 1 thread": EnvPoolVecEnv(args.env, args.n_envs, seed=0, num_threads=1),
        "DummyVecEnv": make_vec_env(args.env, args.n_envs, seed=0),
        "SubprocVecEnv": make_vec_env(args.env, args.n_envs, seed=0, vec_env_cls=SubprocVecEnv),
    }
    steps: dict[str, Callable[[np.ndarray], object]] = {name: env.step for name, env in envs.items()}
    for env in envs.values():
        env.reset()
    pool = envs["EnvPool itself, 2 threads"]
    assert isinstance(pool, EnvPoolVecEnv)
    steps["EnvPool itself, 2 threads"] = pool._pool.step

    pool.action_space.seed(0)
    actions = np.stack([[pool.action_space.sample() for _ in range(args.n_envs)] for _ in range(256)])
    rounds: dict[str, list[float]] = {name: [] for name in envs}
    for index in range(args.n_rounds + 1):
        for name, step in steps.items():
            rate = steps_per_second(step, actions, args.seconds)
            # The first round warms up
            if index > 0:
                rounds[name].append(rate)
    for env in envs.values():
        env.close()

    rows = []
    for name, rates in rounds.items():
        ratios = np.divide(rates, rounds["DummyVecEnv"])
        rows.append(
            {
                "name": name,
                "steps_per_second": float(np.median(rates)),
                "ratio_to_dummy": float(np.median(ratios)),
                "ratio_range": [float(ratios.min()), float(ratios.max())],
                "rounds": rates,
            }
        )
        print(
            f"{name:<28} {np.median(rates):8.0f} steps/s   {np.median(ratios):.2f}x ({ratios.min():.2f} to {ratios.max():.2f})"
        )
    if args.output is not None:
        versions = {name: importlib.metadata.version(name) for name in ("envpool", "gymnasium", "mujoco", "stable_baselines3")}
        meta = {"env": args.env, "n_envs": args.n_envs, "n_cores": n_cores(), "versions": versions}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
