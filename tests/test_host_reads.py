"""How often the host looks at numbers of the device, each of which makes an accelerator wait."""

import collections
import importlib
import traceback
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import make_batch, make_policy
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_trpo_ext.distributions import no_argument_checks
from sb3_trpo_ext.optim.updates import KLConstraint, UpdateResult
from sb3_trpo_ext.policies import CnnPolicy, SquashedMlpPolicy, split_policy
from sb3_trpo_ext.surrogate import Surrogate

POLICIES: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "squashed": {"policy_class": SquashedMlpPolicy},
    "gsde": {"use_sde": True},
    "categorical": {"action_space": spaces.Discrete(3)},
    "multi_categorical": {"action_space": spaces.MultiDiscrete([2, 3])},
    "bernoulli": {"action_space": spaces.MultiBinary(2)},
    "cnn": {"observation_space": spaces.Box(0, 255, (1, 36, 36), np.uint8), "policy_class": CnnPolicy},
}


class HostReads(TorchDispatchMode):
    """Counts by the function of the package what makes the host wait: ``item``, ``bool``, ``nonzero`` and ``tolist``."""

    #: Operators whose result, or the shape of it, the host has to know.
    WAITING = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select")

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.by_function: collections.Counter[str] = collections.Counter()
        to_list = th.Tensor.tolist

        def counted(tensor: th.Tensor) -> Any:
            # On the CPU this reads the memory and calls no operator
            self.count()
            return to_list(tensor)

        monkeypatch.setattr(th.Tensor, "tolist", counted)

    def count(self) -> None:
        """Add one to the innermost function of the package that is running."""
        ours = [frame for frame in traceback.extract_stack() if "sb3_trpo_ext/" in frame.filename]
        self.by_function[ours[-1].name if ours else "outside"] += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operator, and count it if it makes the host wait."""
        if function._schema.name in self.WAITING:
            self.count()
        return function(*args, **(kwargs or {}))


def count_reads(
    name: str, cg_max_steps: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[UpdateResult, collections.Counter[str]]:
    """One update as on an accelerator, and the host's looks at numbers meanwhile."""
    # The name of the module is also that of the function that the package exports
    monkeypatch.setattr(importlib.import_module("sb3_trpo_ext.optim.conjugate_gradient"), "_is_free_to_read", lambda _: False)
    policy = make_policy(**POLICIES[name])
    batch = make_batch(policy, 64)
    actor_params = split_policy(policy).actor_params
    with HostReads(monkeypatch) as reads, no_argument_checks():
        update = KLConstraint(cg_max_steps, cg_tolerance=1e-6, cg_damping=1e-3, precondition=False)
        result = update.update(Surrogate(policy, actor_params, batch).problem(), 0.01)
    return result, reads.by_function


@pytest.mark.parametrize("name", POLICIES)
def test_the_host_waits_once_per_solution_and_once_per_trial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cg_max_steps in (2, 7):
        result, reads = count_reads(name, cg_max_steps, monkeypatch)
        assert result.is_accepted
        assert result.cg_steps == cg_max_steps
        assert reads.pop("conjugate_gradient") == 1
        assert reads.pop("evaluate") == result.n_trials
        # Objective and norm of the gradient before, length of the direction and predicted improvement after
        assert reads.pop("_objective_and_gradient") == 1
        assert reads.pop("update") == 3
        assert not reads


def test_a_look_at_a_number_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with HostReads(monkeypatch) as reads:
        number = th.ones(3).sum()
        assert not reads.by_function
        float(number), bool(number > 2), number.tolist(), th.ones(2).nonzero()
    assert reads.by_function == {"outside": 4}
