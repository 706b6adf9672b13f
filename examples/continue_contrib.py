"""Continue the training of a model that sb3-contrib's TRPO saved."""

import argparse

import sb3_contrib
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000, help="for each of the two")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    env = make_vec_env("Pendulum-v1", n_envs=8, seed=args.seed)
    eval_env = make_vec_env("Pendulum-v1", seed=args.seed + 1000)
    # Only 25 updates each, so the trust region is twice sb3-contrib's default
    settings = {"n_steps": 256, "gamma": 0.9, "target_kl": 0.02, "n_critic_updates": 15}
    theirs = sb3_contrib.TRPO("MlpPolicy", env, seed=args.seed, **settings).learn(args.steps)
    theirs.save("trpo_contrib")
    print(f"mean return by sb3-contrib's TRPO: {evaluate_policy(theirs, eval_env, n_eval_episodes=10)[0]:.1f}")

    # Networks, optimizer and settings come from the file. With several action dimensions, `target_kl` and `cg_damping` are
    # converted to units of the joint KL, with a warning
    model = TRPO.load("trpo_contrib", env=env)
    model.learn(args.steps, reset_num_timesteps=False)
    mean, std = evaluate_policy(model, eval_env, n_eval_episodes=10)
    print(f"{model.num_timesteps} steps, mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()
