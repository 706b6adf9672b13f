"""What an update logs, and warnings about one that went wrong."""

import warnings

import torch as th
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_trpo_ext._checks import is_known
from sb3_trpo_ext.optim import UpdateResult
from sb3_trpo_ext.update.batch import Batch
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.critic import CriticResult

#: Log-probabilities that are farther apart than this, on the mean, do not differ by rounding.
MAX_DEVIATION = 0.01


def warn_if_rejected(result: UpdateResult, critic: CriticResult) -> None:
    """Warn of an update that failed for a reason outside the algorithm."""
    for what, status in (("policy update was rejected", result.status), ("value function was not fitted", critic.status)):
        if status.advice:
            warnings.warn(f"The {what}: {status!s}. The parameters are unchanged; {status.advice}.", stacklevel=4)


@th.no_grad()
def warn_if_another(policy: ActorCriticPolicy, deviation: th.Tensor, calls: PolicyCalls, batch: Batch) -> None:
    """
    Warn of a policy whose methods do not agree, so that an update begins at another policy than the one that acted.

    :param policy: the one that acted
    :param deviation: of log-probabilities between the rollout and the update, on the mean
    :param calls: how the update asks it for values
    :param batch: the rollout
    """
    if "forward" in vars(policy) or not is_known(type(policy).forward):
        part, _ = calls.cut(batch, 256)[0]
        old = batch.old_values[part]
        if (calls.values(batch, part) - old).abs().mean() > MAX_DEVIATION * (1 + old.abs().mean()):
            warnings.warn(
                f"The states of the rollout have other values in the update, because `forward` and `predict_values` of "
                f"{type(policy).__name__} differ: override both, or the critic that acts will not be trained.",
                stacklevel=3,
            )
    if deviation > MAX_DEVIATION:
        warnings.warn(
            f"The actions of the rollout have other log-probabilities in the update. Either a callback has changed them, or "
            f"{type(policy).__name__} acts by `forward` and is trained by `get_distribution`, and the two differ: override "
            "both, and replace `pi_features_extractor` and `vf_features_extractor` along with `features_extractor`.",
            stacklevel=3,
        )


def record_update(logger: Logger, result: UpdateResult, critic: CriticResult) -> None:
    """Log an update, under sb3-contrib's names where it has one."""
    record = logger.record
    record("train/policy_objective", result.objective_after)
    record("train/policy_objective_before", result.objective_before)
    record("train/improvement", result.objective_after - result.objective_before)
    record("train/predicted_improvement", result.predicted_improvement)
    record("train/kl_divergence_loss", result.kl)
    record("train/step_size", result.step_size)
    record("train/grad_norm", result.grad_norm)
    record("train/is_line_search_success", int(result.is_accepted))
    for key, status in (("train/status", result.status), ("train/value_status", critic.status)):
        record(key, int(status))
        # A number too, for code that averages all that is logged; printed and in a CSV file it is the name
        record(f"{key}_name", status, exclude=("tensorboard", "json"))
    if result.beta is None:
        record("train/line_search_trials", result.n_trials)
        record("train/cg_steps", result.cg_steps)
        record("train/cg_residual", result.cg_residual)
        record("train/curvature", result.curvature)
    else:
        record("train/beta", result.beta)
    record("train/value_loss", critic.loss)
