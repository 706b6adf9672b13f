"""Action masks: a puzzle where a piece fits only in some places (`pip install "sb3-trpo-ext[contrib]"`)."""

import argparse

import numpy as np
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import MaskableTRPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # The environment has a method `action_masks`; sb3-contrib's ActionMasker adds one to an environment that has none
    env = make_vec_env("sb3_trpo_ext/Blocks-v0", n_envs=16, seed=args.seed)
    model = MaskableTRPO("MlpPolicy", env, seed=args.seed, verbose=1)
    model.learn(args.steps)

    # Acting: `predict` takes the masks of the observations
    test_env = make_vec_env("sb3_trpo_ext/Blocks-v0", n_envs=4, seed=args.seed + 1000)
    observations = test_env.reset()
    masks = get_action_masks(test_env)
    actions, _ = model.predict(observations, action_masks=masks, deterministic=True)
    assert masks[np.arange(4), actions].all()

    mean, std = evaluate_policy(model, test_env, n_eval_episodes=50)
    # Pieces put down at random get 33
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()
