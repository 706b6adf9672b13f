"""Breakout from pixels (`pip install "sb3-trpo-ext[atari]"`). A good agent takes ten million steps or more."""

import argparse

import ale_py
import gymnasium as gym
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from sb3_trpo_ext import TRPO

gym.register_envs(ale_py)


def make_env(game: str, n_envs: int, seed: int) -> VecEnv:
    return VecFrameStack(make_atari_env(game, n_envs=n_envs, seed=seed), n_stack=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--game", default="BreakoutNoFrameskip-v4")
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = TRPO(
        "CnnPolicy",
        make_env(args.game, n_envs=8, seed=args.seed),
        n_steps=128,
        batch_size=256,
        # Fisher-vector products of a convolutional network are expensive: compute them on every fourth sample
        sub_sampling_factor=4,
        n_critic_updates=4,
        learning_rate=2.5e-4,
        ent_coef=0.01,
        seed=args.seed,
        verbose=1,
    )
    model.learn(args.steps)

    mean, std = evaluate_policy(model, make_env(args.game, n_envs=1, seed=args.seed + 1000), n_eval_episodes=5)
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()
