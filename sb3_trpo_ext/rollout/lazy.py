"""Lazy tensors and a lazy buffer, for a callback that looks at what a rollout computes only at its end."""

import functools
from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from torch.utils._pytree import tree_map_only

from sb3_trpo_ext._checks import is_known


class LazyTensor(th.Tensor):
    """A placeholder for a tensor that is computed when it is first used."""

    #: Returns the tensor, always the same one.
    source: Callable[[], th.Tensor]

    @staticmethod
    def of(source: Callable[[], th.Tensor], shape: tuple[int, ...], device: th.device) -> "LazyTensor":
        """Make a placeholder for the tensor of type float32, of this shape and on this device, that ``source`` returns."""
        tensor: LazyTensor = th.Tensor._make_wrapper_subclass(LazyTensor, shape, dtype=th.float32, device=device)
        tensor.source = source
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, method or attribute of PyTorch on the tensors themselves."""
        args, kwargs = tree_map_only(LazyTensor, lambda tensor: tensor.source(), (args, kwargs or {}))
        return func(*args, **kwargs)

    # What Python does not see of PyTorch, such as `th.tensor(values)` and compiled functions
    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]


def lazy_pair(
    evaluate: Callable[[], tuple[th.Tensor, th.Tensor]], n_envs: int, device: th.device
) -> tuple[LazyTensor, LazyTensor]:
    """Values of shape ``(n_envs, 1)`` and log-probabilities of shape ``(n_envs,)``, computed on first use."""
    # Once: what a callback has changed in place must stay
    look = functools.cache(evaluate)
    return LazyTensor.of(lambda: look()[0], (n_envs, 1), device), LazyTensor.of(lambda: look()[1], (n_envs,), device)


def may_look(callback: BaseCallback) -> bool:
    """Whether a callback may look at values and log-probabilities: those of SB3, RL-Zoo and this package do not."""
    return any(
        not is_known(type(part)) or (isinstance(part, ConvertCallback) and part.callback is not None)
        for part in callbacks_in(callback)
    )


def callbacks_in(callback: BaseCallback) -> list[BaseCallback]:
    """A callback, and those that it calls; each once, since they may know each other."""
    found = [callback]
    for part in found:
        inner = [value for name, value in vars(part).items() if name != "parent"]
        inner += [each for value in inner if isinstance(value, list) for each in value]
        for value in inner:
            if isinstance(value, BaseCallback) and value not in found:
                found.append(value)
    return found


def lazy_class(original: type[RolloutBuffer], evaluate: Callable[[], None]) -> type[RolloutBuffer]:
    """The class of a buffer that calls ``evaluate`` whenever its values, log-probabilities or rewards are read."""

    def lazy_array(name: str) -> property:
        def get(self: Any) -> Any:
            evaluate()
            return vars(self)[name]

        return property(get, lambda self, array: vars(self).update({name: array}))

    def reduce(self: Any, _: Any) -> Any:
        evaluate()
        # A copy and a pickle are of the original class
        return object.__new__, (original,), dict(vars(self))

    members: dict[str, Any] = {name: lazy_array(name) for name in ("values", "log_probs", "rewards")}
    return type(original.__name__, (original,), {**members, "__reduce_ex__": reduce, "__module__": original.__module__})
