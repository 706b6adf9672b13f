"""Train in environments of Brax or MuJoCo Playground, and see how long it takes and what comes out.

    python -m benchmarks.simulators brax inverted_pendulum --n-envs 64 --steps 200000
    python -m benchmarks.simulators brax humanoid --n-envs 2048 --minutes 4 --device cuda

All arguments of TRPO are at their defaults, unless ``--n-steps`` says how many steps a rollout has. The line that is printed
at the end has the steps per second without the first rollout, in which JAX compiles; the share of the environment in them; and
the mean return of as many deterministic episodes as there are environments for them. Other processes of the machine count.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pandas
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import TensorVecEnv
from sb3_trpo_ext.envs.jax_envs import LIBRARIES

N_EVALUATION_ENVS = 32


class Clock(BaseCallback):
    """
    Ends a training after some time, and counts from the end of the first rollout on.

    :param minutes: how long it may take
    """

    def __init__(self, minutes: float):
        super().__init__()
        self.minutes = minutes
        self.first_steps = 0
        self.started = self.first_done = time.perf_counter()

    def _on_rollout_end(self) -> None:
        if not self.first_steps:
            self.first_steps, self.first_done = self.num_timesteps, time.perf_counter()

    def _on_step(self) -> bool:
        return time.perf_counter() - self.started < 60 * self.minutes


def timed(env: TensorVecEnv) -> list[float]:
    """
    Let an environment note how long its steps take.

    :param env: what trains
    :return: the seconds of each step so far, kept up to date
    """
    step_tensors, spent = env.step_tensors, []

    def step(actions: th.Tensor) -> Any:
        started = time.perf_counter()
        result = step_tensors(actions)
        if env.device.type == "cuda":
            th.cuda.synchronize()
        spent.append(time.perf_counter() - started)
        return result

    env.step_tensors = step  # type: ignore[method-assign]
    return spent


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("env")
    parser.add_argument("--n-envs", type=int, default=64)
    parser.add_argument("--n-steps", type=int)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="a CSV file, to add a row to")
    args = parser.parse_args()

    make = LIBRARIES[args.library]
    env = make(args.env, args.n_envs, device=args.device)
    model = TRPO("MlpPolicy", env, n_steps=args.n_steps, seed=args.seed)
    spent, clock = timed(env), Clock(args.minutes)
    model.learn(args.steps, clock)
    seconds = time.perf_counter() - clock.first_done
    n_first = clock.first_steps // args.n_envs
    mean, std = evaluate_policy(model, make(args.env, N_EVALUATION_ENVS, device=args.device), N_EVALUATION_ENVS)
    result = {
        "env": f"{args.library}/{args.env}",
        "device": args.device,
        "n_envs": args.n_envs,
        "n_steps": model.n_steps,
        "seed": args.seed,
        "steps": model.num_timesteps,
        "seconds": round(time.perf_counter() - clock.started),
        "steps_per_second": round((model.num_timesteps - clock.first_steps) / seconds),
        "share_of_environment": round(sum(spent[n_first:]) / seconds, 3),
        "return": round(float(mean), 2),
        "return_std": round(float(std), 2),
    }
    print(json.dumps(result))
    if args.output is not None:
        pandas.DataFrame([result]).to_csv(args.output, mode="a", header=not args.output.exists(), index=False)


if __name__ == "__main__":
    main()
