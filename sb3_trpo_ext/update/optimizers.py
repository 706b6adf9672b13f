"""The optimizer of a policy, and which parameters it holds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_trpo_ext._checks import ArgumentError


def fast_optimizer(policy: ActorCriticPolicy, learning_rate: float) -> th.optim.Optimizer:
    """
    SB3's optimizer again, with the fused implementation of Adam: one kernel per step instead of a dozen per parameter.

    :param policy: as SB3 has made it
    :param learning_rate: at the beginning of the training
    :return: the optimizer; that of the policy, if it has made one of its own or if the user chose another implementation
    :raises ValueError: for LBFGS
    """
    if isinstance(policy.optimizer, th.optim.LBFGS):
        raise ArgumentError(
            "`policy_kwargs['optimizer_class']` is LBFGS, which makes a step from a function and not from a gradient: use an "
            "optimizer such as Adam."
        )

    def make(**kwargs: Any) -> th.optim.Optimizer:
        make_optimizer: Any = policy.optimizer_class
        optimizer: th.optim.Optimizer = make_optimizer(
            policy.parameters(), lr=learning_rate, **{**kwargs, **policy.optimizer_kwargs}
        )
        return optimizer

    stock = make()
    if type(policy.optimizer) is not type(stock) or _settings(policy.optimizer) != _settings(stock):
        return policy.optimizer
    is_adam = policy.optimizer_class in (th.optim.Adam, th.optim.AdamW)
    is_chosen = not {"fused", "foreach", "capturable", "differentiable"}.isdisjoint(policy.optimizer_kwargs)
    return make(fused=True) if is_adam and not is_chosen and policy.device.type in ("cpu", "cuda") else stock


def _settings(optimizer: th.optim.Optimizer) -> list[dict[str, Any]]:
    """What the groups of an optimizer have beside their parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def follow_(optimizer: th.optim.Optimizer, before: Mapping[str, th.Tensor], now: Mapping[str, th.Tensor]) -> None:
    """
    Let an optimizer follow parameters that have been replaced: new ones join, those that are gone leave.

    A new one joins the group of the parameter that had its name, or the first group. The others keep their place and their
    state. A parameter that was there before but never in the optimizer is not added: its owner has left it out.

    :param optimizer: any optimizer of PyTorch
    :param before: the parameters of a network at the last call, by name
    :param now: its parameters, by name, in the order in which a new optimizer would hold them
    """
    known = {id(param) for param in before.values()}
    gone = known.difference(map(id, now.values()))
    group_of = {id(param): index for index, group in enumerate(optimizer.param_groups) for param in group["params"]}
    joining: dict[int, int] = {}
    for name, param in now.items():
        if id(param) not in known and id(param) not in group_of:
            joining[id(param)] = group_of.get(id(before[name]), 0) if name in before else 0
    if not joining and gone.isdisjoint(group_of):
        return
    for index, group in enumerate(optimizer.param_groups):
        kept = {id(param): param for param in group["params"] if id(param) not in gone}
        wanted = kept.keys() | {param for param, place in joining.items() if place == index}
        ordered = {id(param): param for param in now.values() if id(param) in wanted}
        group["params"] = [*ordered.values(), *(param for key, param in kept.items() if key not in ordered)]
    for param in [param for param in optimizer.state if id(param) in gone]:
        del optimizer.state[param]


def expanded_state(state: dict[str, Any], params: Sequence[th.Tensor], all_params: Sequence[th.Tensor]) -> dict[str, Any]:
    """Make the state of an optimizer over some parameters one of an optimizer over all of them."""
    position = {id(param): index for index, param in enumerate(all_params)}
    (group,) = state["param_groups"]
    return {
        "state": {position[id(params[index])]: moments for index, moments in state["state"].items()},
        "param_groups": [{**group, "params": list(range(len(all_params)))}],
    }


def n_params(state: Any) -> int:
    """How many parameters an optimizer held, by its state dict; -1 if there is not exactly one group."""
    groups: Any = state.get("param_groups", ()) if isinstance(state, dict) else ()
    return len(groups[0]["params"]) if len(groups) == 1 else -1
