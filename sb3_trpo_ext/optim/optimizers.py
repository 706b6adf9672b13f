"""Which parameters an optimizer of PyTorch holds."""

from collections.abc import Collection, Sequence
from typing import Any

import torch as th


def follow_(optimizer: th.optim.Optimizer, before: Collection[th.Tensor], now: Sequence[th.Tensor]) -> None:
    """
    Let an optimizer follow parameters that have been replaced: new ones join, those that are gone leave.

    The others keep their place in the groups and their state. What an optimizer has never held, though it was there before, it
    does not get: its owner has left it out.

    :param optimizer: any optimizer of PyTorch
    :param before: the parameters of a network at the last call
    :param now: its parameters, in the order in which a new optimizer would hold them
    """
    old, new = {id(param) for param in before}, {id(param) for param in now}
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if not (old - new) & held and not (new - old) - held:
        return
    joining = new - old - held
    for index, group in enumerate(optimizer.param_groups):
        kept = {id(param) for param in group["params"] if id(param) not in old - new}
        wanted = kept | joining if index == 0 else kept
        others = [param for param in group["params"] if id(param) in kept - new]
        group["params"] = [param for param in now if id(param) in wanted] + others
    for param in [param for param in optimizer.state if id(param) in old - new]:
        del optimizer.state[param]


def expanded_state(state: dict[str, Any], params: Sequence[th.Tensor], all_params: Sequence[th.Tensor]) -> dict[str, Any]:
    """
    Make the state of an optimizer over some parameters one of an optimizer over all of them.

    :param state: state dict of an optimizer with one group, over ``params``
    :param params: in that optimizer's order
    :param all_params: with all of these in them, in the order wanted
    :return: state dict of an optimizer over ``all_params``
    """
    position = {id(param): index for index, param in enumerate(all_params)}
    (group,) = state["param_groups"]
    return {
        "state": {position[id(params[index])]: moments for index, moments in state["state"].items()},
        "param_groups": [{**group, "params": list(range(len(all_params)))}],
    }
