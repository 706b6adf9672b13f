"""Environments for Stable-Baselines3."""

from sb3_trpo_ext.envs.envpool import EnvPoolVecEnv

__all__ = ["EnvPoolVecEnv"]
