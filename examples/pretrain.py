"""Pretrain the actor by behavior cloning with the policy's own optimizer, then continue with TRPO."""

import argparse

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO


def expert(observations: np.ndarray) -> np.ndarray:
    """Push the cart to the side to which the pole falls."""
    return (observations[:, 2] + 0.5 * observations[:, 3] > 0).astype(int)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    env, eval_env = (make_vec_env("CartPole-v1", n_envs=8, seed=args.seed + offset) for offset in (0, 1000))
    # Not the whole budget of KL: most of the way is the clone's
    model = TRPO("MlpPolicy", env, n_steps=128, gamma=0.98, target_kl=0.02, seed=args.seed)

    observations = []
    obs = env.reset()
    for _ in range(64):
        observations.append(obs)
        obs = env.step(expert(obs))[0]
    states = th.as_tensor(np.concatenate(observations))
    actions = th.as_tensor(expert(states.numpy()))
    # What normalizes the observations, before anything is learned from them
    model.observe(states)
    for _ in range(100):
        _, log_prob, _ = model.policy.evaluate_actions(states, actions)
        model.policy.optimizer.zero_grad()
        (-log_prob.mean()).backward()
        model.policy.optimizer.step()
    print(f"mean return of the clone: {evaluate_policy(model, eval_env, n_eval_episodes=10)[0]:.1f}")

    # The critic is untrained: fit it to the clone before its advantages move the actor
    actor = [*model.policy.mlp_extractor.policy_net.parameters(), *model.policy.action_net.parameters()]
    for param in actor:
        param.requires_grad_(False)
    model.learn(8 * 128 * 4)
    for param in actor:
        param.requires_grad_(True)
    model.learn(args.steps, reset_num_timesteps=False)
    print(f"mean return after TRPO: {evaluate_policy(model, eval_env, n_eval_episodes=10)[0]:.1f}")


if __name__ == "__main__":
    main()
