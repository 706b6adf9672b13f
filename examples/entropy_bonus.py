"""CartPole without and with an entropy bonus that decays to zero: it keeps the policy exploring at the start."""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule

from sb3_trpo_ext import TRPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    for ent_coef in (0.0, LinearSchedule(0.1, 0.0, 1.0)):
        model = TRPO(
            "MlpPolicy",
            make_vec_env("CartPole-v1", n_envs=8, seed=args.seed),
            n_steps=256,
            target_kl=0.02,
            learning_rate=3e-3,
            ent_coef=ent_coef,
            seed=args.seed,
        )
        model.learn(args.steps)
        entropy = model.logger.name_to_value["train/entropy"]
        mean, std = evaluate_policy(model, make_vec_env("CartPole-v1", seed=args.seed + 1000), n_eval_episodes=10)
        print(f"ent_coef: {ent_coef}; entropy at the end: {entropy:.3f} nats; mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()
