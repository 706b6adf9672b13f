"""Saving and loading: in files that are whole or not there, also of earlier versions and of sb3-contrib's TRPO."""

import io
import pathlib
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium.vector import VectorEnv
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, TensorDict

from sb3_trpo_ext import arguments
from sb3_trpo_ext._files import replacing
from sb3_trpo_ext._names import check_attributes
from sb3_trpo_ext.contrib import check_is_trpo, is_contrib_model, joint_kl_arguments, saved_attributes
from sb3_trpo_ext.optim import AdaptiveKLPenalty
from sb3_trpo_ext.parallel import launch
from sb3_trpo_ext.parallel.reductions import rank
from sb3_trpo_ext.rollout.normalization import Normalization
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.normalization import RewardScale
from sb3_trpo_ext.update.optimizers import expanded_state, n_params
from sb3_trpo_ext.update.structure import drop_graph_, unfrozen_parts

SelfSaving = TypeVar("SelfSaving", bound="SavingAlgorithm")


class SavingAlgorithm(OnPolicyAlgorithm):
    """An algorithm that saves what an update needs beside SB3's attributes. Its subclass makes these attributes."""

    #: How an update asks the policy for its distribution and values.
    calls_class: ClassVar[type[PolicyCalls]] = PolicyCalls

    policy: ActorCriticPolicy
    norm_reward: bool | str
    reward_scale: RewardScale
    kl_penalty: AdaptiveKLPenalty | None
    _normalization: Normalization

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: all but the policy as it was in the last rollout."""
        return {**self.__dict__, "_acted": None}

    def _excluded_save_params(self) -> list[str]:
        """Attributes that are not pickled."""
        own = ("_acted", "_watch", "_stagger", "kl_penalty", "reward_scale", "_normalization")
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        """What is saved as state dicts: policy, its optimizer, the scale of rewards, and the penalty's beta and optimizer."""
        state_dicts, tensors = super()._get_torch_save_params()
        state_dicts = [*state_dicts, *(["reward_scale"] if self.norm_reward else [])]
        return state_dicts + ([] if self.kl_penalty is None else ["kl_penalty"]), tensors

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model; a file is replaced in one go, so that an interruption cannot leave half of one.

        Under ``torchrun`` the first process alone writes a file: all have the same model.

        :param path: path to the file (".zip" is added if it has no suffix), or a file-like
        :param exclude: names of attributes to leave out in addition to the default ones
        :param include: names of attributes to save although they are left out by default
        """
        if not isinstance(path, (str, pathlib.Path)):
            super().save(path, exclude, include)
            return
        if rank() > 0:
            return
        target = pathlib.Path(path)
        if target.suffix == "":
            target = pathlib.Path(f"{target}.zip")
        with replacing(target) as partial:
            super().save(partial, exclude, include)

    @classmethod
    def load(
        cls: type[SelfSaving],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | VectorEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfSaving:
        """
        Load a model that this class saved, or one that sb3-contrib's TRPO saved.

        The latter's ``target_kl`` and ``cg_damping`` are converted to joint units, unless others are given, with a warning
        that says so.

        :param path: path to the file (or a file-like)
        :param env: the new environment to run the model on (can be ``None`` for prediction)
        :param device: Device on which the code should run
        :param custom_objects: objects to use instead of those in the file
        :param print_system_info: Whether to print system info from the saved model and of this system
        :param force_reset: Whether to reset the environment before training
        :param kwargs: attributes to change when loading, such as ``target_kl``
        :return: new model instance
        :raises TypeError: for an attribute that neither the constructor nor the saved model has
        :raises ValueError: for a model of another algorithm
        """
        device = launch.rank_device(device)
        saved = saved_attributes(path)
        check_is_trpo(path, saved)
        check_attributes(cls, kwargs, saved)
        for name in {"n_steps", "batch_size"}.intersection([*kwargs, *(custom_objects or {})]):
            # Not what it had come to by itself, even if it is the same number
            kwargs = {**kwargs, f"_auto_{name}": None}
        kwargs = {name: value for name, value in arguments.EARLIER.items() if name not in saved} | kwargs
        if is_contrib_model(saved):
            kwargs.update(joint_kl_arguments(path, custom_objects, given=kwargs))
        model = super().load(
            path,
            env,  # type: ignore[arg-type]
            device,
            custom_objects,
            print_system_info,
            force_reset,
            **kwargs,
        )
        # SB3 draws the noise of gSDE with a graph
        drop_graph_(model.policy.action_dist)
        return model

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """
        Return the parameters of the policy, the optimizers and the scale of rewards.

        :return: names and state dicts
        """
        self._normalization.protect_(self.policy)
        return super().get_parameters()

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a file or from what :meth:`get_parameters` returned; sb3-contrib's TRPO will do as well.

        :param load_path_or_dict: path of a saved model, or a dict from names to state dicts
        :param exact_match: whether all of the model's parameters must be there
        :param device: Device on which the code should run
        :raises RuntimeError: if the parameters do not fit the policy, or a state does not fit its optimizer
        :raises ValueError: if a name is unknown, or with ``exact_match`` one is missing
        """
        if isinstance(load_path_or_dict, dict):
            params: dict[str, Any] = dict(load_path_or_dict)
        else:
            _, loaded, _ = load_from_zip_file(load_path_or_dict, device=device, load_data=False)
            params = dict(loaded)
        # Earlier versions had optimizers of the critic's parameters alone, and of the actor's
        all_params = list(self.policy.parameters())
        penalty = params.get("kl_penalty") or {}
        states: list[Any] = [params.get("policy.optimizer"), penalty.get("optimizer")]
        if any(0 <= n_params(state) < len(all_params) for state in states):
            parts = unfrozen_parts(self.policy, self.calls_class(self.policy))
            if n_params(states[0]) == len(parts.critic_params):
                params["policy.optimizer"] = expanded_state(states[0], parts.critic_params, all_params)
            if n_params(states[1]) == len(parts.actor_params):
                params["kl_penalty"] = {**penalty, "optimizer": expanded_state(states[1], parts.actor_params, all_params)}
        # The form of the trust region can be changed when loading: a penalty is not the policy's, and starts afresh
        if self.kl_penalty is None:
            params.pop("kl_penalty", None)
        else:
            params.setdefault("kl_penalty", self.kl_penalty.state_dict())
        # As can be whether rewards are scaled
        if self.norm_reward:
            params.setdefault("reward_scale", self.reward_scale.state_dict())
        else:
            params.pop("reward_scale", None)
        if exact_match:
            arguments.check_normalization(self.policy, params.get("policy") or {})
        arguments.check_optimizer_states(params, self.policy.optimizer)
        super().set_parameters(params, exact_match, device)
        self._normalization = Normalization(self.policy, self._normalization.rewards)
