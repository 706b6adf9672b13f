"""
The search space of RL-Zoo's ``-optimize``.

RL-Zoo stores the sampled numbers and converts them again when a trial is loaded (``--trial-id``), hence the two functions.
"""

from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_onpolicy_params

#: What goes into ``policy_kwargs`` beside what RL-Zoo puts there.
_OF_POLICY = ("log_std_init", "lstm_hidden_size", "enable_critic_lstm")


def convert_trpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn the parameters of a trial into arguments of TRPO.

    :param sampled_params: the parameters as they were suggested
    :return: arguments of TRPO
    """
    params = dict(sampled_params)
    policy_kwargs = {name: params.pop(name) for name in _OF_POLICY if name in params}
    hyperparams = convert_onpolicy_params(params)
    hyperparams["policy_kwargs"] |= policy_kwargs
    return hyperparams


def sample_trpo_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    Sample arguments of TRPO.

    :param trial: the trial that suggests them
    :param n_actions: number of action dimensions, 0 if the actions are not continuous
    :param n_envs: number of parallel environments
    :param additional_args: RL-Zoo's arguments for other algorithms, not used
    :return: arguments of TRPO
    """
    # What matters is the number of samples of an update, n_envs * n_steps: 512 to 16,384, and so never less than batch_size.
    lowest, highest = 10 - n_envs.bit_length(), 14 - (n_envs - 1).bit_length()
    params: dict[str, Any] = {
        "n_steps_pow": trial.suggest_int("n_steps_pow", max(lowest, 1), max(highest, 1)),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 9),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        # Wider than RL-Zoo's: Humanoid does best with a gae_lambda of 0.5.
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.001, 0.7, log=True),
        "clip_advantage": trial.suggest_categorical("clip_advantage", [None, 0.5, 2.0]),
        # Joint KL, summed over action dimensions; the damping is in the same units and matters as much.
        "target_kl": trial.suggest_float("target_kl", 0.005, 0.5, log=True),
        "cg_damping": trial.suggest_float("cg_damping", 1e-3, 10.0, log=True),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 3e-3, log=True),
        "n_critic_updates": trial.suggest_int("n_critic_updates", 5, 30),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium"]),
        "activation_fn": trial.suggest_categorical("activation_fn", ["tanh", "relu"]),
    }
    if n_actions > 0:
        params["log_std_init"] = trial.suggest_float("log_std_init", -2.0, 0.5)

    hyperparams = convert_trpo_params(params)
    # Show the values themselves in RL-Zoo's report, next to the powers and complements above.
    for name in ("gamma", "gae_lambda", "n_steps", "batch_size"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def sample_recurrent_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    Sample arguments of RecurrentTRPO: those of TRPO, and the size of the LSTM.

    :param trial: as for :func:`sample_trpo_params`, and so are the others
    :return: arguments
    """
    hyperparams = sample_trpo_params(trial, n_actions, n_envs, additional_args)
    hyperparams["policy_kwargs"] |= {
        "lstm_hidden_size": trial.suggest_categorical("lstm_hidden_size", [32, 64, 128]),
        "enable_critic_lstm": trial.suggest_categorical("enable_critic_lstm", [False, True]),
    }
    return hyperparams
