"""sb3-contrib's defaults, for comparisons of both classes and for measurements that are older than our own."""

from typing import Any

from gymnasium import spaces

from sb3_trpo_ext.contrib import joint_kl_factor

#: For one action dimension: `target_kl` and `cg_damping` are multiplied by their number. The standard deviation starts as it
#: does there with `policy_kwargs=dict(log_std_init=0)`.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "n_steps": 2048,
    "batch_size": 128,
    "gae_lambda": 0.95,
    "vf_lambda": None,
    "cg_damping": 0.1,
    "target_kl": 0.01,
    "norm_obs": False,
    "norm_reward": False,
}


def settings(space: spaces.Space) -> dict[str, Any]:
    """The defaults for an action space, in units of the joint KL."""
    return DEFAULTS | {name: DEFAULTS[name] * joint_kl_factor(space) for name in ("target_kl", "cg_damping")}
