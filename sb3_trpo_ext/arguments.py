"""Checks of TRPO's arguments, so that a mistake is named before anything runs."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_trpo_ext._checks import (
    ArgumentError,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    check_seed,
    is_known,
    is_number,
)
from sb3_trpo_ext.envs.tensor import TensorVecEnv
from sb3_trpo_ext.update.critic import VALUE_LOSSES
from sb3_trpo_ext.update.mixed import parts_of_actions
from sb3_trpo_ext.update.optimizers import n_params

ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
#: Which class is for which policies of sb3-contrib.
CONTRIB_POLICIES = {"MaskableActorCriticPolicy": "MaskableTRPO", "RecurrentActorCriticPolicy": "RecurrentTRPO"}
#: What stands for an argument that is left to the class.
AUTO = "auto"
#: How models without these arguments behave: those of earlier versions, and of sb3-contrib.
EARLIER: dict[str, Any] = {
    "norm_obs": False,
    "norm_reward": False,
    "stagger_episodes": False,
    "vf_lambda": None,
    "_own_extractors": False,
}
#: The two forms of the trust region, with the options that `trust_region_kwargs` may hold.
TRUST_REGION_OPTIONS: dict[str, tuple[str, ...]] = {
    "constraint": ("fill", "damped_scale", "precondition"),
    "penalty": ("learning_rate", "n_epochs", "batch_size", "beta"),
}


def scheduled(name: str, value: float | Schedule, progress_remaining: float, minimum: float = -math.inf) -> float:
    """Value of a hyperparameter that may be a schedule."""
    number = value(progress_remaining) if callable(value) else value
    if not is_number(number) or float(number) < minimum:
        source = f"its schedule returned {number!r} at progress_remaining={progress_remaining:g}"
        bound = "" if minimum == -math.inf else f" of at least {minimum:g}"
        bound += f" or {AUTO!r}" if name in ("target_kl", "cg_damping") else ""
        raise ArgumentError(f"`{name}` must be a finite number{bound}, got {source if callable(value) else repr(value)}.")
    return float(number)


def check_trust_region(trust_region: Any, options: Any) -> None:
    """Check the form of the trust region and its options."""
    check_choice("trust_region", trust_region, tuple(TRUST_REGION_OPTIONS))
    if not isinstance(options, dict):
        raise ArgumentError(f"`trust_region_kwargs` must be a dict, got {options!r}.")
    known = TRUST_REGION_OPTIONS[trust_region]
    for name, value in options.items():
        if name not in known:
            raise ArgumentError(f"`trust_region_kwargs` of {trust_region!r} has no option {name!r}; there are {list(known)}.")
        full_name = f"trust_region_kwargs[{name!r}]"
        if trust_region == "constraint":
            check_bool(full_name, value)
        elif name in ("n_epochs", "batch_size"):
            check_integer(full_name, value, 1)
        else:
            check_number(full_name, value, "positive", lambda x: x > 0)


def check_policy(policy: type, base: str | None) -> None:
    """Check that a policy is of the kind that a class is for: ``base`` is a key of `CONTRIB_POLICIES`, or ``None``."""
    found = next((kind.__name__ for kind in policy.__mro__ if kind.__name__ in CONTRIB_POLICIES and is_known(kind)), None)
    if found == base:
        return
    use = "TRPO" if found is None else CONTRIB_POLICIES[found]
    needed = "no policy of sb3-contrib" if base is None else f"a subclass of sb3-contrib's {base}"
    raise ArgumentError(f"`policy` must be {needed}, got {policy.__name__}: use {use}.")


def check_buffer(kind: Any, kinds: tuple[type, ...], purpose: str, fault: str) -> None:
    """
    Check a class of rollout buffers that is read in the order of time.

    :param kind: the class
    :param kinds: those of sb3-contrib that it may be, or inherit from
    :param purpose: what these are for
    :param fault: what a ``get`` of its own may do
    """
    if not issubclass(kind, kinds):
        raise ArgumentError(f"`rollout_buffer_class` must be one of sb3-contrib's {purpose}, got {kind.__name__}.")
    if not is_known(kind.get):
        raise ArgumentError(f"`rollout_buffer_class`: {kind.get.__qualname__} may {fault}.")


def check_device(env: Any, device: th.device) -> None:
    """Check that the tensors of an environment are where the policy is."""
    device = th.empty(0, device=device).device
    if env.device != device:
        raise ArgumentError(
            f"`env` has its tensors on {env.device}, and the policy is on {device}: make one of them where the other is."
        )


def check_optimizer_states(params: dict[str, Any], optimizer: th.optim.Optimizer) -> None:
    """
    Check the states of optimizers before any of them, or the policy, is loaded.

    :param params: that are to be loaded
    :param optimizer: of the policy that they are for
    :raises RuntimeError: if a state is not that of an optimizer, or is that of another one
    """
    penalty = params.get("kl_penalty") or {}
    for name, state in (("policy.optimizer", params.get("policy.optimizer")), ("kl_penalty", penalty.get("optimizer"))):
        missing = {"state", "param_groups"}.difference(state) if state is not None else ()
        if missing:
            raise RuntimeError(
                f"`{name}` has not the state of an optimizer: {' and '.join(sorted(missing))} missing. `get_parameters` and "
                "`state_dict` of an optimizer return both."
            )
    if not (given := params.get("policy.optimizer")):
        return
    only = "To load the policy without its optimizer: `set_parameters({'policy': parameters['policy']}, exact_match=False)`."
    own = optimizer.state_dict()
    n_own, n_given = n_params(own), n_params(given)
    if n_own != n_given:
        raise RuntimeError(
            f"The optimizer of these parameters has {n_given} tensors, and this model's has {n_own}. Where the numbers differ "
            "for images, the other model's actor and critic share a features extractor: make this one with "
            f"policy_kwargs={{'share_features_extractor': True}}. {only}"
        )
    # Flags are new in some versions of PyTorch; numbers are what the kind of an optimizer needs
    numbers = {name for name, value in own["param_groups"][0].items() if not isinstance(value, bool | None)}
    if missing := numbers.difference(given["param_groups"][0]):
        raise RuntimeError(
            f"These parameters are of another optimizer than {type(optimizer).__name__}: its {', '.join(sorted(missing))} "
            f"missing. {only}"
        )


def check_normalization(policy: nn.Module, given: Iterable[str]) -> None:
    """Check, before parameters are loaded, that both or neither of the policies normalize their observations."""
    ours, theirs = (any(".normalizations." in name for name in names) for names in (policy.state_dict(), given))
    if given and ours != theirs:
        raise RuntimeError(
            f"The policy of these parameters {'does not normalize' if ours else 'normalizes'} its observations, and this one "
            f"{'does' if ours else 'does not'}: make the model with norm_obs={not ours}."
        )


def check_action_space(space: spaces.Space) -> None:
    """Check that there is a distribution for an action space, and that actions arrive as they were sampled."""
    problem = _problem_of_actions(space)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1 and problem is None:
        flat = space.nvec.flatten().tolist()
        problem = f"it must have one dimension; use MultiDiscrete({flat}), and reshape the action in the environment's `step`"
    if problem is not None:
        raise ArgumentError(f"The action space {space} is not supported: {problem}.")
    if isinstance(space, spaces.MultiBinary) and not isinstance(space.n, int):
        # The first words are SB3's
        hint = f"use MultiBinary({math.prod(space.shape)}), and reshape the action in the environment's `step`"
        raise ArgumentError(f"Multi-dimensional {space} action space is not supported: {hint}.")
    _check_start("action", space, "TransformAction")


def check_mixed_actions(model: Any) -> None:
    """Check the parts of a Tuple or a Dict of actions, and whether an algorithm and an environment can have them."""
    space = model.action_space
    problem = None if parts_of_actions(space) else "it has no part"
    for part in parts_of_actions(space):
        if isinstance(part, (spaces.Tuple, spaces.Dict)):
            problem = f"it has {part} in it; put the parts of that beside the others"
        elif problem_of_part := _problem_of_actions(part):
            problem = f"in {part}, {problem_of_part}"
    if model.policy_base is not None:
        problem = f"{type(model).__name__} has no policy for it; use TRPO"
    elif isinstance(model.env, TensorVecEnv):
        problem = "an environment of tensors takes one tensor; make it a Box, and take it apart in `advance`"
    if problem is not None:
        raise ArgumentError(f"The action space {space} is not supported: {problem}.")


def _problem_of_actions(space: spaces.Space) -> str | None:
    """Why there is no distribution for a space, alone or as a part of a Tuple or a Dict."""
    if not isinstance(space, ACTION_SPACES):
        return f"TRPO supports {', '.join(kind.__name__ for kind in ACTION_SPACES)}, and a Tuple or a Dict of these"
    if math.prod(space.shape or ()) == 0:
        return "it has no number in it"
    if isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating):
        return "it needs a float dtype such as np.float32, or the buffer would truncate it; round in the environment's `step`"
    return None


def check_observation_space(space: spaces.Space) -> None:
    """Check that a policy sees an observation as the environment means it."""
    if isinstance(space, spaces.Dict):
        for part in space.spaces.values():
            check_observation_space(part)
        return
    if space.shape is not None and math.prod(space.shape) == 0:
        raise ArgumentError(f"The observation space {space} has no number in it: give the environment a constant to observe.")
    _check_start("observation", space, "TransformObservation")


def _check_start(what: str, space: spaces.Space, wrapper: str) -> None:
    """Check that the integers of a space begin with 0: SB3 counts them from there, whatever the space says."""
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(space.start != 0):
        hint = f"count from 0, and shift the {what} in the environment or with gymnasium.wrappers.{wrapper}"
        raise ArgumentError(f"The {what} space {space} has a `start` that is not 0, which SB3 does not support: {hint}.")


def check_env(env: Any) -> None:
    """Check that ``env`` is an environment that SB3 can use."""
    if env is None or isinstance(env, VecEnv):
        return
    name = type(env).__name__
    # EnvPool first: its classes claim to be environments and vector environments of Gymnasium, too
    if any(base.__module__.partition(".")[0] == "envpool" for base in type(env).__mro__):
        raise ArgumentError(f"`env` is EnvPool's own {name}: use sb3_trpo_ext.envs.EnvPoolVecEnv(env_id, n_envs=16).")
    if isinstance(env, type) or not hasattr(env, "step"):
        # A new model takes an id, of which SB3 has made an environment by now; `load` and `set_env` take none
        hint = f"pass gymnasium.make({env!r})" if isinstance(env, str) else "pass an environment, or its id to a new model"
        hint = f"call it: {env.__name__}()" if isinstance(env, type) else hint
        raise ArgumentError(f"`env` must be an environment of Gymnasium or a VecEnv of SB3, got {env!r}: {hint}.")


def check_settings(model: Any) -> None:
    """Check the arguments that an update reads directly, and convert NumPy integers to Python's."""
    for name in ("n_steps", "batch_size", "cg_max_steps", "line_search_max_iter", "sub_sampling_factor"):
        value = getattr(model, name)
        if value is not None or name in ("cg_max_steps", "line_search_max_iter"):
            setattr(model, name, check_integer(name, value, 1))
    for name in ("norm_obs", "norm_reward", "stagger_episodes"):
        if getattr(model, name) != AUTO:
            check_bool(name, getattr(model, name))
    model.n_critic_updates = check_integer("n_critic_updates", model.n_critic_updates, 0)
    for name in ("gamma", "gae_lambda"):
        check_number(name, getattr(model, name), "between 0 and 1", lambda x: 0 <= x <= 1)
    if model.vf_lambda is not None:
        check_number("vf_lambda", model.vf_lambda, "between 0 and 1 or `None`", lambda x: 0 <= x <= 1)
    check_number("cg_tolerance", model.cg_tolerance, "at least 0 and less than 1", lambda x: 0 <= x < 1)
    check_number("line_search_shrinking_factor", model.line_search_shrinking_factor, "between 0 and 1", lambda x: 0 < x < 1)
    check_trust_region(model.trust_region, model.trust_region_kwargs)
    check_bool("clipped_likelihood", model.clipped_likelihood)
    check_choice("vf_loss", model.vf_loss, tuple(VALUE_LOSSES))
    if model.clip_advantage is not None:
        check_number("clip_advantage", model.clip_advantage, "positive or `None`", lambda x: x > 0)
        if not model.normalize_advantage:
            given = f"clip_advantage={model.clip_advantage} with normalize_advantage=False"
            raise ArgumentError(f"`clip_advantage` needs normalized advantages, got {given}: leave out one of them.")
    if model.max_grad_norm is not None:
        check_number("max_grad_norm", model.max_grad_norm, "at least 0 or `None`", lambda x: x >= 0)


def check_arguments(model: Any) -> None:
    """Check all that can be checked before anything runs."""
    check_settings(model)
    model.seed = check_seed(model.seed)
    model._stats_window_size = check_integer("stats_window_size", model._stats_window_size, 1)
    model.sde_sample_freq = check_integer("sde_sample_freq", model.sde_sample_freq, -1)
    if model.target_kl != AUTO:
        check_number("target_kl", scheduled("target_kl", model.target_kl, 1.0), "positive", lambda x: x > 0)
    if model.cg_damping != AUTO:
        scheduled("cg_damping", model.cg_damping, 1.0, minimum=0.0)
    scheduled("ent_coef", model.ent_coef, 1.0)
    if model.clip_range_vf is not None:
        clip_range_vf = scheduled("clip_range_vf", model.clip_range_vf, 1.0)
        check_number("clip_range_vf", clip_range_vf, "positive or `None`", lambda x: x > 0)
    if model.action_space is not None:
        check_action_space(model.action_space)
        check_observation_space(model.observation_space)
    n_samples = model.n_steps * model.n_envs
    if model.normalize_advantage and n_samples < 2:
        given = f"n_steps={model.n_steps} and n_envs={model.n_envs}"
        raise ArgumentError(f"`n_steps * n_envs` must be greater than 1 to normalize the advantage, got {given}.")
    if n_samples % model.batch_size > 0:
        warnings.warn(
            f"`batch_size` is {model.batch_size}, and a rollout has {n_samples} samples: in each pass over it "
            f"there will be a truncated mini-batch of size {n_samples % model.batch_size}. Choose a divisor of {n_samples}.",
            stacklevel=5,
        )
