"""Humanoid with the settings of hyperparams/trpo_ext.yml, without RL-Zoo (`pip install "sb3-trpo-ext[mujoco]"`)."""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    env = VecNormalize(make_vec_env("Humanoid-v5", n_envs=64, seed=args.seed), gamma=0.99)
    model = TRPO(
        "MlpPolicy",
        env,
        n_steps=64,
        batch_size=256,
        gamma=0.99,
        gae_lambda=0.5,
        vf_lambda=None,
        clip_advantage=0.5,
        # Summed over 17 action dimensions: a 17th of it in sb3-contrib's units. It decays, since every update fills the region
        target_kl=LinearSchedule(0.5, 0.0, 1.0),
        cg_damping=5.0,
        cg_max_steps=15,
        sub_sampling_factor=2,
        learning_rate=3e-4,
        n_critic_updates=10,
        policy_kwargs={"log_std_init": -1, "net_arch": {"pi": [256, 256], "vf": [256, 256]}},
        seed=args.seed,
        verbose=1,
    )
    model.learn(args.steps)
    model.save("trpo_humanoid")
    env.save("vecnormalize_humanoid.pkl")

    # The agent knows observations only as they were normalized in training: load the statistics, and freeze them
    eval_env = VecNormalize.load("vecnormalize_humanoid.pkl", make_vec_env("Humanoid-v5", seed=args.seed + 1000))
    eval_env.training = eval_env.norm_reward = False
    mean, std = evaluate_policy(model, eval_env, n_eval_episodes=10)
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()
