"""Steps of Adam without what PyTorch's optimiser does again in each of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch.optim import optimizer as torch_optimizer


def adam_step(optimizer: th.optim.Optimizer) -> Callable[[], None]:
    """
    Make steps of an optimizer, from the gradients in its parameters; the same ones have a gradient each time.

    For PyTorch's fused Adam and AdamW the numbers are those of ``optimizer.step()`` to the last bit, and so is its state,
    which is worked on in place. What is saved is the time between two kernels, collecting, sorting and checking the same
    lists of tensors each time: 0.04 to 0.07 ms of a step that takes 0.2 to 1 ms with the minibatch's gradient. Every other
    optimiser, and one with hooks, makes its own steps.

    :param optimizer: whose settings, such as the learning rate, stay as they are while the steps are made
    :return: makes one step
    """
    step: Callable[[], None] | None = None

    def make_step() -> None:
        nonlocal step
        if step is None:
            # The first step of all makes the moments
            optimizer.step()
            step = _fused_step(optimizer) if _is_plain(optimizer) else None
            step = optimizer.step if step is None else step
        else:
            step()

    return make_step


def _is_plain(optimizer: th.optim.Optimizer) -> bool:
    """
    Whether a step is the fused kernel and nothing else.

    :param optimizer: any
    :return: false where there is anything unusual about it
    """
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or len(optimizer.param_groups) != 1:
        return False
    hooks: Sequence[Any] = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    # A learning-rate scheduler or a gradient scaler puts something of its own into the instance
    is_changed = any(hooks) or not {"step", "grad_scale", "found_inf"}.isdisjoint(vars(optimizer))
    group = optimizer.param_groups[0]
    return bool(group["fused"]) and isinstance(group["lr"], float) and not is_changed


def _fused_step(optimizer: th.optim.Optimizer) -> Callable[[], None] | None:
    """
    The step of an optimiser whose moments are there.

    :param optimizer: a plain one
    :return: makes one step; ``None`` if not all parameters with a gradient have taken part so far
    """
    group = optimizer.param_groups[0]
    params: list[th.Tensor] = [param for param in group["params"] if param.grad is not None]
    if not params:
        return None
    states = [optimizer.state.get(param, {}) for param in params]
    first = params[0]
    is_alike = all(param.dtype == first.dtype and param.device == first.device for param in params)
    if not all(states) or not is_alike or any(th.is_tensor(beta) for beta in group["betas"]):
        return None
    means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    # The counts of steps side by side in one tensor: counting is one call then, and not one per parameter
    all_steps = th.stack([state["step"] for state in states])
    steps = list(all_steps.unbind())
    for state, count in zip(states, steps, strict=True):
        state["step"] = count
    maxima = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
    kernel = th._fused_adamw_ if group["decoupled_weight_decay"] else th._fused_adam_
    options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
    options |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))

    @th.no_grad()
    def step() -> None:
        gradients = [param.grad for param in params if param.grad is not None]
        all_steps.add_(1)
        kernel(params, gradients, means, squares, maxima, steps, **options)

    return step
