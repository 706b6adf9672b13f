"""Models that sb3-contrib's TRPO saved: telling them apart, and what their numbers are in our units."""

import io
import json
import pathlib
import warnings
import zipfile
from collections.abc import Collection
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.save_util import load_from_zip_file, open_path

from sb3_trpo_ext._checks import ArgumentError


def saved_attributes(path: str | pathlib.Path | io.BufferedIOBase) -> dict[str, Any]:
    """The attributes in the JSON of a saved model; empty if there is none in the file."""
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            return json.loads(archive.read("data"))
    except (zipfile.BadZipFile, KeyError):
        return {}
    finally:
        if file is not path:
            file.close()


def is_contrib_model(attributes: Collection[str]) -> bool:
    """Whether a saved model is sb3-contrib's TRPO rather than ours."""
    return "cg_max_steps" in attributes and "trust_region" not in attributes


def check_is_trpo(path: Any, attributes: Collection[str]) -> None:
    """
    Check that a saved model is one of TRPO.

    :param path: of the file
    :param attributes: what is known of those in it
    :raises ValueError: if another algorithm saved it
    """
    if attributes and "cg_max_steps" not in attributes:
        raise ArgumentError(
            f"`path`: the model in {path} is of another algorithm, such as PPO. To go on with its policy, make a model with "
            "`norm_obs=False` and `norm_reward=False`, for images also with "
            "`policy_kwargs={'share_features_extractor': True}`, and call its `set_parameters` with this file."
        )


def joint_kl_factor(action_space: spaces.Space) -> int:
    """
    What sb3-contrib's ``target_kl`` and ``cg_damping`` have to be multiplied by to mean the same here.

    It averages the KL over action dimensions for Box and MultiBinary; we sum, as the definition of the KL of a joint
    distribution has it. For Discrete and MultiDiscrete it sums too.

    :param action_space: of the environment
    :return: the factor
    """
    return get_action_dim(action_space) if isinstance(action_space, (spaces.Box, spaces.MultiBinary)) else 1


def joint_kl_arguments(
    path: str | pathlib.Path | io.BufferedIOBase, custom_objects: dict[str, Any] | None, given: Collection[str]
) -> dict[str, Any]:
    """The ``target_kl`` and ``cg_damping`` of a model that sb3-contrib saved, in joint units, with a warning that says so."""
    data, _, _ = load_from_zip_file(path, device="cpu", custom_objects=custom_objects)
    assert data is not None, "`saved_attributes` has read it already"
    factor = joint_kl_factor(data["action_space"])
    names = [name for name in ("target_kl", "cg_damping") if name not in given and name not in (custom_objects or {})]
    converted = {name: data[name] * factor for name in names}
    if factor != 1 and converted:
        changes = ", ".join(f"{name} from {data[name]:g} to {value:g}" for name, value in converted.items())
        warnings.warn(
            f"This model was saved by sb3-contrib's TRPO, whose KL is averaged over the {factor} action dimensions; ours is "
            f"summed. The values in the file were converted: {changes}.",
            stacklevel=3,
        )
    return converted
