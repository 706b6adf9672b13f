"""Names of arguments that do not exist, and what to do about them."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from sb3_trpo_ext._checks import closest

Init = TypeVar("Init", bound=Callable[..., None])

#: Arguments of PPO that TRPO does not have, and what to do about them.
OF_PPO = {
    "n_epochs": "`n_critic_updates` is the number of passes of the critic, and the policy makes one step per rollout",
    "clip_range": "leave it out: `target_kl` bounds the policy's step",
    "vf_coef": "leave it out: the critic is fitted after the policy's step, with a loss of its own",
}
#: Parameters of constructors that nobody can have meant by another name.
_OTHERS = {"self", "policy", "env", "args", "kwargs", "_init_setup_model"}


def suggestion(name: str, names: Iterable[str]) -> str:
    """What to do about an argument that does not exist, given the names of those that do."""
    return OF_PPO.get(name) or closest(name, names)


def _unexpected(function: str, name: str, names: Iterable[str]) -> TypeError:
    """What Python raises for an unknown keyword argument, with a suggestion."""
    hint = suggestion(name, set(names) - _OTHERS)
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}: {hint}")


def explaining_names(init: Init) -> Init:
    """A constructor that says what to do about an unknown keyword argument."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def explained(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise _unexpected(type(self).__name__, name, known)
        init(self, *args, **kwargs)

    return cast(Init, explained)


def check_attributes(algorithm: type, given: Iterable[str], saved: Iterable[str]) -> None:
    """Check the names of attributes that are to be changed when a model is loaded."""
    parameters = {name for each in algorithm.__mro__ for name in inspect.signature(each.__init__).parameters}  # type: ignore[misc]
    known = (parameters | set(saved)) - {"self", "args", "kwargs"}
    for name in given:
        if name not in known:
            raise _unexpected(f"{algorithm.__name__}.load", name, inspect.signature(algorithm).parameters)
