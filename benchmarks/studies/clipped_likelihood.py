"""Measure what the likelihood of clipped actions does to an update on Humanoid-v5: with it and without, on the same rollouts.

    python -m benchmarks.studies.clipped_likelihood --output benchmarks/results/clipped_likelihood.json

A policy is trained for some steps with our settings. Then it collects rollouts, with frozen statistics of VecNormalize.
From each of the first ones two updates are made, with ``clipped_likelihood`` and without, both filling the same trust region.
What counts is what either has gained on all the other rollouts, which it has not seen: the mean of ratio times advantage,
relative to the standard deviation of the advantages. (The ratio there is that of the clipped actions for both: its mean is the
same, and it is less noisy.) After each update the parameters are put back.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
import yaml
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks.markdown import ROOT
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import EnvPoolVecEnv
from sb3_trpo_ext.optim import KLConstraint
from sb3_trpo_ext.optim.vectors import assign_, flatten
from sb3_trpo_ext.update.batch import Batch, rollout_batch
from sb3_trpo_ext.update.clipping import action_bounds
from sb3_trpo_ext.update.settings import no_argument_checks
from sb3_trpo_ext.update.surrogate import Surrogate


def humanoid_model(seed: int, target_kl: float, names: Sequence[str] = (), **kwargs: Any) -> TRPO:
    """
    A model for Humanoid-v5 in EnvPool, with our settings.

    :param seed: of network and environments
    :param target_kl: the trust region
    :param names: of further arguments of TRPO that are to be as in our settings
    :param kwargs: further arguments of TRPO
    :return: the model
    """
    settings = yaml.safe_load((ROOT / "hyperparams" / "trpo_ext.yml").read_text())["Humanoid-v5"]
    names = ("n_steps", "batch_size", "gamma", "vf_lambda", "cg_damping", "learning_rate", "n_critic_updates", *names)
    env = VecNormalize(EnvPoolVecEnv("Humanoid-v5", settings["n_envs"], seed=seed), gamma=settings["gamma"])
    policy_kwargs = {"log_std_init": -1, "net_arch": {"pi": [256, 256], "vf": [256, 256]}}
    kwargs |= {name: settings[name] for name in names}
    return TRPO("MlpPolicy", env, target_kl=target_kl, policy_kwargs=policy_kwargs, seed=seed, device="cpu", **kwargs)


def trained(n_steps: int, seed: int) -> TRPO:
    """
    Train with our settings, in EnvPool.

    :param n_steps: how long
    :param seed: of network and environments
    :return: the model, with its statistics frozen
    """
    # As it was measured first: Humanoid's `gae_lambda` has changed since
    model = humanoid_model(seed, target_kl=0.2, gae_lambda=0.8)
    if n_steps > 0:
        model.learn(n_steps)
    env = model.get_env()
    assert isinstance(env, VecNormalize)
    env.training = False
    return model


def collected(model: TRPO, n_rollouts: int) -> tuple[list[Batch], float]:
    """
    Collect rollouts.

    :param model: is not changed
    :param n_rollouts: how many
    :return: the rollouts, and the mean return of the last 100 episodes
    """
    env = model.get_env()
    assert env is not None
    _, callback = model._setup_learn(10**9)
    callback.on_training_start({}, {})
    batches = []
    for _ in range(n_rollouts):
        model.collect_rollouts(env, callback, model.rollout_buffer, model.n_steps)
        batch = rollout_batch(model.rollout_buffer, False, normalize_advantage=True)
        batches.append(Batch(*(part.clone() for part in batch)))
    assert model.ep_info_buffer is not None
    return batches, float(np.mean([episode["r"] for episode in model.ep_info_buffer]))


def gains(model: TRPO, batches: list[Batch], n_updates: int, target_kl: float) -> dict[bool, np.ndarray]:
    """
    What updates gain on rollouts that they have not seen.

    :param model: is not changed
    :param batches: the rollouts
    :param n_updates: from how many of them to make an update
    :param target_kl: the trust region
    :return: shape ``(n_updates,)``, with and without the likelihood of clipped actions
    """
    params, bounds = model._parts.actor_params, action_bounds(model.policy)
    old = flatten(params)
    with no_argument_checks:
        unseen = Batch(*(th.cat(parts) for parts in zip(*batches[n_updates:], strict=True)))
        judge = Surrogate(model.policy, params, unseen, bounds=bounds)
        found: dict[bool, list[float]] = {True: [], False: []}
        for batch in batches[:n_updates]:
            for is_clipped, values in found.items():
                surrogate = Surrogate(model.policy, params, batch, bounds=bounds if is_clipped else None)
                update = KLConstraint(cg_damping=float(model.cg_damping), cg_max_steps=model.cg_max_steps)  # type: ignore[arg-type]
                result = update.update(surrogate, target_kl)
                assert result.is_accepted, result.status
                with th.no_grad():
                    values.append((judge.evaluate()[0] - unseen.advantages.mean()).item())
                assign_(params, old)
    return {is_clipped: np.array(values) for is_clipped, values in found.items()}


def main() -> None:
    """Measure policies of several ages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100_000, 300_000], help="ages of the policies")
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=48)
    parser.add_argument("--target-kl", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for n_steps in arguments.steps:
        model = trained(n_steps, arguments.seed)
        batches, mean_return = collected(model, arguments.rollouts)
        found = gains(model, batches, arguments.updates, arguments.target_kl)
        bounds = action_bounds(model.policy)
        assert bounds is not None
        actions = th.cat([batch.actions for batch in batches])
        difference = found[True] - found[False]
        rows.append(
            {
                "steps": n_steps,
                "mean_return": round(mean_return, 1),
                "share_of_components_clipped": round(
                    ((actions <= bounds.low) | (actions >= bounds.high)).double().mean().item(), 3
                ),
                "gain_with": float(f"{found[True].mean():.3g}"),
                "gain_without": float(f"{found[False].mean():.3g}"),
                "ratio": round(found[True].mean() / found[False].mean(), 3),
                "difference_in_standard_errors": round(difference.mean() / difference.std(ddof=1) * len(difference) ** 0.5, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {"task": "Humanoid-v5", "seed": arguments.seed, "updates": arguments.updates, "target_kl": arguments.target_kl}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({**result, "policies": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
