"""A custom distribution: Laplace instead of Gaussian noise, which has heavier tails."""

import argparse

import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch.distributions import Laplace

from sb3_trpo_ext import TRPO, Family, MlpPolicy, register_family


class LaplaceDistribution(DiagGaussianDistribution):
    def proba_distribution(self, mean_actions, log_std):
        self.distribution = Laplace(mean_actions, log_std.exp().expand_as(mean_actions))
        return self


class LaplacePolicy(MlpPolicy):
    def _build(self, lr_schedule):
        self.action_dist = LaplaceDistribution(self.action_dist.action_dim)
        super()._build(lr_schedule)


class LaplaceFamily(Family):
    """Location and log scale; KL, entropy and Fisher matrix have closed forms."""

    def statistics(self, distribution):
        return distribution.distribution.loc, distribution.distribution.scale.log()

    def kl(self, old, new):
        distance, (old_scale, new_scale) = (old[0] - new[0]).abs(), (old[1].exp(), new[1].exp())
        return (new[1] - old[1] + (old_scale * th.exp(-distance / old_scale) + distance) / new_scale - 1).sum(dim=1)

    def entropy(self, statistics, noise=None):
        return (1 + th.log(th.tensor(2.0)) + statistics[1]).sum(dim=1)

    def fisher(self, statistics, tangents):
        return tangents[0] * th.exp(-2 * statistics[1]), tangents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # Optional: without a family, TRPO uses the KL of `torch.distributions` and double backpropagation
    register_family(LaplaceDistribution, lambda distribution: LaplaceFamily())
    env = make_vec_env("Pendulum-v1", n_envs=8, seed=args.seed)
    model = TRPO(LaplacePolicy, env, n_steps=256, gamma=0.9, target_kl=0.05, cg_damping=0.05, seed=args.seed, verbose=1)
    model.learn(args.steps)
    mean, std = evaluate_policy(model, make_vec_env("Pendulum-v1", seed=args.seed + 1000), n_eval_episodes=10)
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()
