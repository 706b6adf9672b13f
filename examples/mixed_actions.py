"""Mixed actions: a hand that moves and grips, with a Dict of a Box and a Discrete."""

import argparse

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO


class Hand(gym.Env):
    """Twenty objects, one after the other: each pays for a move that ends near it, if it is held with the right grip."""

    def __init__(self):
        self.observation_space = spaces.Box(-1.0, 1.0, (3,))
        self.action_space = spaces.Dict({"move": spaces.Box(-1.0, 1.0, (2,)), "grip": spaces.Discrete(2)})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_left = 20
        return self.next_object(), {}

    def next_object(self):
        self.place, self.grip = self.np_random.uniform(-0.8, 0.8, 2), self.np_random.integers(2)
        return np.array([*self.place, 2 * self.grip - 1], np.float32)

    def step(self, action):
        distance = np.linalg.norm(action["move"] - self.place)
        reward = max(1.0 - distance, 0.0) if action["grip"] == self.grip else 0.0
        self.n_left -= 1
        return self.next_object(), float(reward), self.n_left == 0, False, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = TRPO("MlpPolicy", make_vec_env(Hand, n_envs=8, seed=args.seed), seed=args.seed, verbose=1)
    model.learn(args.steps)

    env = Hand()
    observation, _ = env.reset(seed=args.seed + 1000)
    action, _ = model.predict(observation, deterministic=True)
    print(f"for the object at {env.place} with grip {env.grip}: {action}")
    mean, std = evaluate_policy(model, make_vec_env(Hand, seed=args.seed + 1000), n_eval_episodes=20)
    # 20 is the most; with a grip by chance it is 10
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()
