"""How the time of an update grows with samples and with parameters.

    python -m benchmarks.studies.growth --output benchmarks/results/growth.json --figure docs/images/growth.png

Times our ``train()`` with one epoch of the critic on random observations of Humanoid-v5's shapes (348 numbers, 17 actions),
for 1,024 to 131,072 samples with hidden layers of 256, and for hidden layers of 64 to 1,024 with 8,192 samples. Conjugate
gradient makes 10 Fisher-vector products each time (``cg_tolerance=0``), so that sizes are compared and not convergence. Fits
the exponent p of ``time ~ size^p`` over the larger half of the sizes, and draws a picture with ``--figure FILE``.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from matplotlib.figure import Figure
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_trpo_ext import TRPO

SAMPLES = [2**power for power in range(10, 18)]
WIDTHS = [64, 128, 256, 512, 1024]


class Shapes(gym.Env[np.ndarray, np.ndarray]):
    """An environment that is never stepped: its shapes are all that matters."""

    observation_space = spaces.Box(-np.inf, np.inf, (348,), np.float32)
    action_space = spaces.Box(-0.4, 0.4, (17,), np.float32)


def make_model(n_samples: int, width: int) -> TRPO:
    """
    A model whose rollout buffer is full of random numbers.

    :param n_samples: size of the rollout
    :param width: of the two hidden layers
    :return: the model
    """
    model = TRPO(
        "MlpPolicy",
        DummyVecEnv([Shapes]),
        n_steps=n_samples,
        target_kl=0.1,
        cg_max_steps=10,
        cg_tolerance=0.0,
        n_critic_updates=1,
        policy_kwargs={"net_arch": [width, width]},
        trust_region_kwargs={"precondition": False},
        seed=0,
        device="cpu",
    )
    model.set_logger(configure(None, []))
    buffer, generator = model.rollout_buffer, np.random.default_rng(0)
    buffer.observations[:] = generator.standard_normal(buffer.observations.shape, dtype=np.float32)
    with th.no_grad():
        observations = th.as_tensor(buffer.observations).flatten(end_dim=1)
        for chunk in np.array_split(np.arange(n_samples), -(-n_samples // 4096)):
            actions, values, log_probs = model.policy(observations[chunk])
            buffer.actions[chunk, 0], buffer.log_probs[chunk, 0] = actions.numpy(), log_probs.numpy()
            buffer.values[chunk] = values.numpy()
    buffer.advantages[:] = generator.standard_normal(buffer.advantages.shape, dtype=np.float32)
    buffer.returns[:] = buffer.values + buffer.advantages
    buffer.full = True
    return model


def median_seconds(n_samples: int, width: int, n_repetitions: int) -> dict[str, Any]:
    """
    Time ``train()``, after one warm-up.

    :param n_samples: size of the rollout
    :param width: of the two hidden layers
    :param n_repetitions: how often
    :return: sizes and medians in seconds
    """
    model = make_model(n_samples, width)
    rows = []
    for _ in range(n_repetitions + 1):
        started = time.perf_counter()
        model.train()
        log = model.logger.name_to_value
        rows.append((time.perf_counter() - started, log["time/policy_update"], log["time/critic_update"]))
    total, actor, critic = np.median(rows[1:], axis=0)
    n_params = sum(param.numel() for param in model._parts.actor_params)
    return {
        "samples": n_samples,
        "width": width,
        "actor_parameters": n_params,
        "train_s": total,
        "actor_s": actor,
        "critic_s": critic,
    }


def exponent(rows: list[dict[str, Any]], size: str, value: str) -> float:
    """
    The p of ``value ~ size^p``, by least squares on the logarithms of the larger half of the sizes.

    :param rows: measurements
    :param size: key of the size
    :param value: key of the time
    :return: p
    """
    larger = rows[len(rows) // 2 :]
    return float(np.polyfit(np.log([row[size] for row in larger]), np.log([row[value] for row in larger]), 1)[0])


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """
    Draw times over sizes.

    :param result: what :func:`main` measured
    :param path: of the picture
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, rows, size, label in (
        (axes[0], result["by_samples"], "samples", "Samples per update, [256, 256]"),
        (axes[1], result["by_parameters"], "actor_parameters", "Parameters of the actor, 8,192 samples"),
    ):
        for part, name in (("actor_s", "policy update"), ("critic_s", "one epoch of the critic")):
            power = exponent(rows, size, part)
            ax.loglog([row[size] for row in rows], [row[part] for row in rows], "o-", label=f"{name} (power {power:.2f})")
        ax.set_xlabel(label)
        ax.set_ylabel("seconds")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--figure", type=pathlib.Path)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "torch": th.__version__,
        "threads": th.get_num_threads(),
        "by_samples": [median_seconds(n_samples, 256, args.repetitions) for n_samples in SAMPLES],
        "by_parameters": [median_seconds(8192, width, args.repetitions) for width in WIDTHS],
    }
    for rows, size in (("by_samples", "samples"), ("by_parameters", "actor_parameters")):
        for part in ("actor_s", "critic_s"):
            result[f"power_{rows}_{part}"] = exponent(result[rows], size, part)
    print(json.dumps(result, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.figure is not None:
        draw(result, args.figure)


if __name__ == "__main__":
    main()
