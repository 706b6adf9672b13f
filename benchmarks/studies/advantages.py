"""Measure what `gae_lambda` and `clip_advantage` do to an update on Humanoid-v5, for policies of several ages.

    python -m benchmarks.studies.advantages --output benchmarks/results/advantages.json

A policy is trained with our settings. At each age it collects rollouts, with frozen statistics of VecNormalize. From every one
of them updates are made, of the same KL, with advantages for several values of the two arguments. What counts is the change of
the parameters times the gradient on all the other rollouts: to first order, what the update gains on what it has not seen. In
that gradient the advantages are as they come with a `gae_lambda` of 0.95, which has much noise and little bias: the noise is
averaged over the rollouts. Everything is relative to a `gae_lambda` of 0.8 without clipping.
"""

import argparse
import copy
import json
import pathlib
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks.studies.clipped_likelihood import humanoid_model
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.optim import KLConstraint
from sb3_trpo_ext.optim.vectors import assign_, flatten
from sb3_trpo_ext.update.batch import Batch, rollout_batch
from sb3_trpo_ext.update.clipping import action_bounds
from sb3_trpo_ext.update.settings import no_argument_checks
from sb3_trpo_ext.update.surrogate import Surrogate

LAMBDAS = (0.2, 0.5, 0.8, 0.95)
CLIPS = (None, 1.0, 0.5)
BASELINE = (0.8, None)
REFERENCE = (0.95, None)

#: Values of `gae_lambda` and `clip_advantage`.
Key = tuple[float, float | None]
Advantages = dict[Key, th.Tensor]


def collected(model: TRPO, n_rollouts: int) -> tuple[list[tuple[Batch, Advantages]], float]:
    """
    Collect rollouts.

    :param model: is not changed
    :param n_rollouts: how many
    :return: each rollout, with its advantages for all values of the arguments; and the mean return of the last 100 episodes
    """
    env, buffer = model.get_env(), model.rollout_buffer
    assert isinstance(env, VecNormalize)
    env.training = False
    _, callback = model._setup_learn(10**9, reset_num_timesteps=False)
    callback.on_training_start({}, {})
    rollouts = []
    for _ in range(n_rollouts):
        model.collect_rollouts(env, callback, buffer, model.n_steps)
        with th.no_grad():
            values = model.policy.predict_values(obs_as_tensor(model._last_obs, model.device))  # type: ignore[arg-type]
        advantages: Advantages = {}
        for gae_lambda in LAMBDAS:
            buffer.gae_lambda = gae_lambda
            buffer.compute_returns_and_advantage(last_values=values, dones=model._last_episode_starts)  # type: ignore[arg-type]
            for clip in CLIPS:
                # Of a copy: the buffer's own arrays keep their shape
                advantages[gae_lambda, clip] = rollout_batch(copy.copy(buffer), False, True, clip).advantages.clone()
        batch = rollout_batch(copy.copy(buffer), False, normalize_advantage=True)
        rollouts.append((Batch(*(part.clone() for part in batch)), advantages))
    buffer.gae_lambda, env.training = model.gae_lambda, True
    assert model.ep_info_buffer is not None
    return rollouts, float(np.mean([episode["r"] for episode in model.ep_info_buffer]))


def gains(model: TRPO, rollouts: list[tuple[Batch, Advantages]], target_kl: float) -> dict[Key, np.ndarray]:
    """
    What updates gain on rollouts that they have not seen, to first order.

    :param model: is not changed
    :param rollouts: what it has collected
    :param target_kl: the trust region
    :return: for all values of the arguments the gains of one update from each rollout
    """
    params, bounds = model._parts.actor_params, action_bounds(model.policy)
    old = flatten(params)
    model.policy.set_training_mode(False)
    found: dict[Key, list[float]] = {key: [] for key in rollouts[0][1]}
    with no_argument_checks:
        references = th.stack(
            [
                Surrogate(
                    model.policy, params, batch._replace(advantages=advantages[REFERENCE]), bounds=bounds
                ).objective_and_gradient()[1]
                for batch, advantages in rollouts
            ]
        )
        total = references.sum(0)
        for (batch, advantages), own in zip(rollouts, references, strict=True):
            others = (total - own) / (len(rollouts) - 1)
            for key, values in found.items():
                weighted = batch._replace(advantages=advantages[key])
                surrogate = Surrogate(
                    model.policy, params, weighted, fisher_stride=model._fisher_stride(batch.n_samples), bounds=bounds
                )
                update = KLConstraint(cg_damping=float(model.cg_damping), cg_max_steps=model.cg_max_steps)  # type: ignore[arg-type]
                result = update.update(surrogate, target_kl)
                assert result.is_accepted, result.status
                values.append(((flatten(params) - old) @ others).item())
                assign_(params, old)
    return {key: np.array(values) for key, values in found.items()}


def main() -> None:
    """Measure policies of several ages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[100_000, 300_000, 600_000], help="ages of the policy")
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--target-kl", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    names = ("gae_lambda", "clip_advantage", "sub_sampling_factor")
    model = humanoid_model(arguments.seed, target_kl=0.4, names=names)
    age = 0
    rows: list[dict[str, Any]] = []
    for n_steps in arguments.steps:
        model.learn(n_steps - age, reset_num_timesteps=False)
        age = n_steps
        rollouts, mean_return = collected(model, arguments.rollouts)
        found = gains(model, rollouts, arguments.target_kl)
        base = found[BASELINE]
        baseline_advantages = th.cat([advantages[BASELINE] for _, advantages in rollouts])
        row: dict[str, Any] = {
            "steps": n_steps,
            "mean_return": round(mean_return, 1),
            "kurtosis": round((baseline_advantages**4).mean().item() / (baseline_advantages**2).mean().item() ** 2, 1),
            "gains": [],
        }
        for (gae_lambda, clip), values in found.items():
            standard_error = (values - base * values.mean() / base.mean()).std(ddof=1) / len(values) ** 0.5 / base.mean()
            row["gains"].append(
                {
                    "gae_lambda": gae_lambda,
                    "clip_advantage": clip,
                    "ratio": round(values.mean() / base.mean(), 3),
                    "standard_error": round(standard_error, 3),
                }
            )
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.output is not None:
            result = {"task": "Humanoid-v5", "seed": arguments.seed, "rollouts": arguments.rollouts}
            result |= {"target_kl": arguments.target_kl, "policies": rows}
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
