"""What Brax's own PPO learns on inverted_pendulum, with the settings of Brax's training notebook.

    JAX_PLATFORMS=cpu python -m benchmarks.studies.brax_ppo --output results/brax_ppo.csv

Adds a row for each evaluation, which is the mean return of 128 episodes. Takes half an hour on two cores; ``--steps`` ends it
earlier.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import pandas

#: Of https://github.com/google/brax/blob/main/notebooks/training.ipynb; the evaluations are as many as there in 2M steps.
SETTINGS: dict[str, Any] = {
    "reward_scaling": 10,
    "episode_length": 1000,
    "normalize_observations": True,
    "action_repeat": 1,
    "unroll_length": 5,
    "num_minibatches": 32,
    "num_updates_per_batch": 4,
    "discounting": 0.97,
    "learning_rate": 3e-4,
    "entropy_cost": 1e-2,
    "num_envs": 2048,
    "batch_size": 1024,
    "seed": 1,
}


def replicated(tree: Any, devices: list[Any]) -> Any:
    """``jax.device_put_replicated``, which Brax's trainer needs and JAX no longer has."""
    return jax.tree_util.tree_map(lambda leaf: jax.numpy.stack([leaf] * len(devices)), tree)


def note(rows: list[dict[str, Any]], path: Path | None, n_steps: int, metrics: dict[str, Any]) -> None:
    """Keep an evaluation, and write all of them."""
    rows.append({"env": "brax/inverted_pendulum", "steps": n_steps, "return": float(metrics["eval/episode_reward"])})
    print(rows[-1], flush=True)
    if path is not None:
        pandas.DataFrame(rows).to_csv(path, index=False)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_000_000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    jax.device_put_replicated = replicated
    from brax import envs
    from brax.training.agents.ppo import train as ppo

    n_evaluations = max(round(args.steps / 2_000_000 * 20), 2)
    ppo.train(
        environment=envs.get_environment("inverted_pendulum", backend="generalized"),
        num_timesteps=args.steps,
        num_evals=n_evaluations,
        progress_fn=functools.partial(note, [], args.output),
        **SETTINGS,
    )


if __name__ == "__main__":
    main()
