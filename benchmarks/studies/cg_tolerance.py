"""How exactly conjugate gradient has to solve: the evidence behind the default of ``cg_tolerance``.

Takes a trained policy, collects one rollout for the direction and several fresh ones of the same policy, and prints for each
damping and tolerance the number of Fisher-vector products, and the quality of the direction x, ``g . x / sqrt(x^T F x)``: the
improvement per square root of KL that the direction promises. In-sample, g and F are those that x was computed from; on fresh
data, g is the mean over the fresh rollouts and F that of the first of them.

    python -m benchmarks.studies.cg_tolerance results/trpo_ext/Humanoid-v5_29 --output benchmarks/results/cg_tolerance.json
"""

import argparse
import itertools
import json
import pathlib

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.optim import Damped, conjugate_gradient
from sb3_trpo_ext.optim.vectors import flatten
from sb3_trpo_ext.update.surrogate import Surrogate

TOLERANCES = (0.5, 0.2, 0.1, 0.05, 0.03, 0.01, 1e-4)
DAMPINGS = (0.1, 1.0, 5.0)


def surrogate_of_rollout(model: TRPO, callback: CallbackList) -> tuple[Surrogate, th.Tensor]:
    """
    Collect a rollout.

    :param model: the policy with its environment
    :param callback: passed to the rollout
    :return: surrogate of the rollout and its gradient
    """
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    surrogate = Surrogate(model.policy, model._parts.actor_params, model._full_batch())
    objective, _ = surrogate.evaluate()
    return surrogate, flatten(th.autograd.grad(objective, surrogate.params))


def main() -> None:
    """Run the measurement and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="folder of a training run in RL-Zoo's layout")
    parser.add_argument("--env", default="Humanoid-v5")
    parser.add_argument("--n-envs", type=int, default=16)
    parser.add_argument("--n-fresh", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()

    env = VecNormalize.load(str(args.run / args.env / "vecnormalize.pkl"), make_vec_env(args.env, args.n_envs, seed=1))
    model = TRPO.load(args.run / f"{args.env}.zip", env=env, seed=1)
    _, callback = model._setup_learn(1, None)
    surrogate, gradient = surrogate_of_rollout(model, callback)
    fresh = [surrogate_of_rollout(model, callback) for _ in range(args.n_fresh)]
    fresh_gradient = th.stack([grad for _, grad in fresh]).mean(dim=0)
    fisher, fresh_fisher = surrogate.fisher(), fresh[0][0].fisher()
    rows = []
    for damping in DAMPINGS:
        preconditioner = fisher.preconditioner(damping)
        for tolerance, is_preconditioned in itertools.product(TOLERANCES, (False, True)):
            result = conjugate_gradient(
                Damped(fisher, damping), gradient, 300, tolerance, preconditioner if is_preconditioned else None
            )
            x = result.x
            rows.append(
                {
                    "cg_damping": damping,
                    "preconditioner": "kfac" if is_preconditioned else "none",
                    "cg_tolerance": tolerance,
                    "products": result.n_steps,
                    "in_sample": float(gradient @ x / (x @ (fisher @ x)).sqrt()),
                    "fresh": float(fresh_gradient @ x / (x @ (fresh_fisher @ x)).sqrt()),
                }
            )
            print(
                "  ".join(f"{key} {value if isinstance(value, str) else f'{value:.4g}':<8}" for key, value in rows[-1].items())
            )
    if args.output is not None:
        meta = {"env": args.env, "samples": int(model.n_steps * model.n_envs), "timesteps": int(model.num_timesteps)}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**meta, "torch": th.__version__, "numpy": np.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
