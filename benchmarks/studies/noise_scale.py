"""Measure the gradient noise scale on Humanoid-v5: how large a batch still pays (McCandlish et al. 2018, section 2.2).

    python -m benchmarks.studies.noise_scale logs/trpo_ext/Humanoid-v5_1 --output benchmarks/results/noise_scale.json

The simple noise scale is ``B = tr(S) / |G|^2``, with the true gradient G and the covariance S of the gradient of one sample. A
batch much smaller than B gives a gradient that is mostly noise, and twice the batch is worth nearly twice the updates; a batch
much larger than B buys little. Steps that follow each other are not independent, so the unit here is a segment: what one
environment contributes to one rollout. From the Gram matrix of the segments' gradients, ``|G|^2`` is the mean of the entries
off the diagonal and ``|G|^2 + tr(S) / n`` the mean of those on it, both without bias; n is the length of a segment. The
interval is that of 2,000 random subsets of the segments, which makes it somewhat wide.

Two models: a fresh one, and one that was trained for three million steps. Statistics of VecNormalize are frozen meanwhile.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
import torch as th
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks.markdown import ROOT
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.update.batch import Batch, rollout_batch
from sb3_trpo_ext.update.clipping import action_bounds
from sb3_trpo_ext.update.surrogate import Surrogate


def fresh_model(settings: dict[str, Any], seed: int) -> TRPO:
    """
    A model before its first update, with statistics of a first rollout.

    :param settings: ours
    :param seed: of network and environments
    :return: the model
    """
    env = VecNormalize(make_vec_env("Humanoid-v5", settings["n_envs"], seed=seed), gamma=settings["gamma"])
    policy_kwargs = {"log_std_init": -1, "net_arch": {"pi": [256, 256], "vf": [256, 256]}}
    model = TRPO(
        "MlpPolicy",
        env,
        n_steps=settings["n_steps"],
        gamma=settings["gamma"],
        gae_lambda=0.8,  # of the trained model, too
        policy_kwargs=policy_kwargs,
        seed=seed,
        device="cpu",
    )
    _, callback = model._setup_learn(10**9)
    model.collect_rollouts(env, callback, model.rollout_buffer, model.n_steps)
    return model


def trained_model(run: pathlib.Path, settings: dict[str, Any], seed: int) -> TRPO:
    """
    The model of a run.

    :param run: its folder, in RL-Zoo's layout
    :param settings: ours
    :param seed: of the environments
    :return: the model
    """
    env = make_vec_env("Humanoid-v5", settings["n_envs"], seed=seed)
    normalized = VecNormalize.load(str(run / "Humanoid-v5" / "vecnormalize.pkl"), env)
    return TRPO.load(run / "Humanoid-v5.zip", normalized, device="cpu", seed=seed)


def segment_gradients(model: TRPO, n_rollouts: int) -> th.Tensor:
    """
    Gradients of the objective, one for each environment and rollout.

    :param model: is not changed
    :param n_rollouts: how many
    :return: shape ``(n_rollouts * n_envs, n_params)``
    """
    env = model.get_env()
    assert isinstance(env, VecNormalize)
    env.training = False
    _, callback = model._setup_learn(10**9)
    batches: list[Batch] = []
    for _ in range(n_rollouts):
        model.collect_rollouts(env, callback, model.rollout_buffer, model.n_steps)
        batch = rollout_batch(model.rollout_buffer, False, normalize_advantage=False)
        batches += [
            Batch(*(part.clone() for part in parts)) for parts in zip(*(x.split(model.n_steps) for x in batch), strict=True)
        ]
    advantages = th.cat([batch.advantages for batch in batches])
    mean, std = advantages.mean(), advantages.std()
    model.policy.set_training_mode(False)
    gradients = []
    for batch in batches:
        normalized = batch._replace(advantages=(batch.advantages - mean) / std)
        surrogate = Surrogate(model.policy, model._parts.actor_params, normalized, bounds=action_bounds(model.policy))
        gradients.append(surrogate.objective_and_gradient()[1])
    return th.stack(gradients)


def noise_scale(gram: np.ndarray, n_samples: int) -> tuple[float, float, float]:
    """
    The simple noise scale.

    :param gram: inner products of the segments' gradients
    :param n_samples: in a segment
    :return: noise scale, squared norm of the true gradient, trace of the covariance of one sample's gradient
    """
    n = len(gram)
    diagonal = np.trace(gram) / n
    squared_norm = (gram.sum() - np.trace(gram)) / (n * (n - 1))
    trace = (diagonal - squared_norm) * n_samples
    return trace / squared_norm, squared_norm, trace


def measured(model: TRPO, n_rollouts: int) -> dict[str, Any]:
    """
    Noise scale of a model with an interval.

    :param model: is not changed
    :param n_rollouts: how many
    :return: the figures
    """
    gradients = segment_gradients(model, n_rollouts).double()
    gram = (gradients @ gradients.t()).numpy()
    scale, squared_norm, trace = noise_scale(gram, model.n_steps)
    generator = np.random.default_rng(0)
    scales = []
    for _ in range(2000):
        chosen = np.unique(generator.integers(len(gram), size=len(gram)))
        # A segment that is drawn twice would put its own square off the diagonal: each at most once
        scales.append(noise_scale(gram[np.ix_(chosen, chosen)], model.n_steps)[0])
    low, high = np.quantile(scales, [0.05, 0.95])
    return {
        "n_samples": len(gram) * model.n_steps,
        "n_segments": len(gram),
        "noise_scale": round(scale),
        "interval_90": [round(float(low)), round(float(high))],
        "squared_gradient_norm": float(f"{squared_norm:.4g}"),
        "trace_of_covariance": float(f"{trace:.4g}"),
        "share_of_signal_in_4096": round(1 / (1 + scale / 4096), 3),
    }


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="folder of a training of three million steps, in RL-Zoo's layout")
    parser.add_argument("--rollouts", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    settings = yaml.safe_load((ROOT / "hyperparams" / "trpo_ext.yml").read_text())["Humanoid-v5"]
    results = {
        "task": "Humanoid-v5",
        "n_envs": settings["n_envs"],
        "n_steps": settings["n_steps"],
        "fresh": measured(fresh_model(settings, arguments.seed), arguments.rollouts),
        "trained_3M_steps": measured(trained_model(arguments.run, settings, arguments.seed), arguments.rollouts),
    }
    print(json.dumps(results, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
