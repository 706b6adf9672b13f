"""Dict observations: an image and a vector of a small maze, each with its own network."""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    env = make_vec_env(SimpleMultiObsEnv, n_envs=8, seed=args.seed, env_kwargs={"random_start": False})
    print(env.observation_space)
    model = TRPO(
        "MultiInputPolicy",
        env,
        n_steps=64,
        n_critic_updates=4,
        policy_kwargs={"net_arch": [32], "features_extractor_kwargs": {"cnn_output_dim": 32}},
        seed=args.seed,
        verbose=1,
    )
    model.learn(args.steps)

    # The shortest way through the maze gets about 0, a lost agent -10 or less. Actions are sampled: a deterministic agent that
    # runs into a wall would stay there
    mean, std = evaluate_policy(model, env, n_eval_episodes=10, deterministic=False)
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()
