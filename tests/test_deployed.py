"""Exported policies against `predict`."""

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from agents import RandomEnv
from gymnasium import spaces
from helpers import BOX_ACTIONS, DICT, IMAGE, TUPLE_ACTIONS, VECTOR, BetaPolicy
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_trpo_ext import TRPO, MaskableTRPO, RecurrentTRPO, export
from sb3_trpo_ext._observations import parts_of
from sb3_trpo_ext.deployed import FORMATS, DeployedPolicy

N = 1000
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnxscript", "onnxruntime"))
with_formats = pytest.mark.parametrize(
    "format", [pytest.param("onnx", marks=pytest.mark.skipif(not HAS_ONNX, reason="needs the extra `export`")), "torchscript"]
)
WIDE = spaces.Box(np.array([-1.0, 100.0], np.float32), np.array([3.0, 1e4], np.float32))
DOUBLE = spaces.Box(-2.0, 2.0, (3,), np.float64)
MIXED = spaces.Dict({**DICT.spaces, "camera": IMAGE, "states": spaces.MultiDiscrete([3, 4])})
SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "seed": 0, "device": "cpu"}
CASES: dict[str, tuple[Any, spaces.Space, spaces.Space, dict[str, Any]]] = {
    "gaussian": ("MlpPolicy", VECTOR, BOX_ACTIONS, {}),
    "other bounds": ("MlpPolicy", DOUBLE, WIDE, {}),
    "actions in a matrix": ("MlpPolicy", VECTOR, spaces.Box(-0.1, 0.1, (2, 2)), {}),
    "squashed": ("SquashedMlpPolicy", VECTOR, WIDE, {}),
    "categorical": ("MlpPolicy", VECTOR, spaces.Discrete(3), {}),
    "multi_categorical": ("MlpPolicy", VECTOR, spaces.MultiDiscrete([3, 2]), {}),
    "bernoulli": ("MlpPolicy", VECTOR, spaces.MultiBinary(3), {}),
    "image": ("CnnPolicy", IMAGE, BOX_ACTIONS, {}),
    "dict": ("MultiInputPolicy", MIXED, BOX_ACTIONS, {}),
    "numbers of states": ("MlpPolicy", spaces.Discrete(5), spaces.Discrete(3), {}),
    "gSDE": ("MlpPolicy", VECTOR, BOX_ACTIONS, {"use_sde": True}),
    "squashed gSDE": ("MlpPolicy", VECTOR, WIDE, {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
    "a distribution of the user's own": (BetaPolicy, VECTOR, BOX_ACTIONS, {}),
}


def run(path: Path, policy: DeployedPolicy, inputs: list[Any]) -> list[np.ndarray]:
    """What a file makes of inputs."""
    if path.suffix == ".pt":
        found = th.jit.load(str(path))(*map(th.as_tensor, inputs))
        assert not any(tensor.requires_grad for tensor in found)
        return [tensor.numpy() for tensor in found]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    assert [each.name for each in session.get_inputs()] == policy.inputs
    assert [each.name for each in session.get_outputs()] == policy.outputs
    return list(session.run(None, dict(zip(policy.inputs, inputs, strict=True))))


def samples_of(space: spaces.Space, n: int = N) -> Any:
    """Observations side by side."""
    space.seed(0)
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in space}
    return np.stack(samples)


def as_inputs(observations: Any) -> list[Any]:
    """Observations as a file takes them."""
    parts = parts_of(observations).values()
    return [part.astype(np.float32) if part.dtype == np.float64 else part for part in parts]


@with_formats
@pytest.mark.parametrize("case", CASES)
def test_the_actions_are_those_of_predict(case: str, format: str, tmp_path: Path) -> None:
    policy, observation_space, action_space, settings = CASES[case]
    model = TRPO(policy, RandomEnv(observation_space, action_space), **SMALL, target_kl=0.1, **settings).learn(96)
    path = export(model, tmp_path / f"agent{FORMATS[format]}", format)
    observations = samples_of(observation_space)
    (actions,) = run(path, DeployedPolicy(model), as_inputs(observations))
    expected = model.predict(observations, deterministic=True)[0]
    assert actions.dtype == expected.dtype
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-5)
    assert len(np.unique(expected, axis=0)) > 1
    assert list(tmp_path.iterdir()) == [path]


@with_formats
def test_parts_of_mixed_actions_are_side_by_side(format: str, tmp_path: Path) -> None:
    model = TRPO("MlpPolicy", RandomEnv(VECTOR, TUPLE_ACTIONS), **SMALL, target_kl=0.1).learn(96)
    observations = samples_of(VECTOR)
    path = export(model, tmp_path / f"agent{FORMATS[format]}", format)
    (actions,) = run(path, DeployedPolicy(model), [observations])
    # Discrete, Box, MultiBinary, Box, MultiDiscrete: in this order, and counted from 0
    for row, expected in zip(actions, model.predict(observations, deterministic=True)[0], strict=True):
        flat = np.concatenate([np.ravel(part) for part in (expected[0] + 1, *expected[1:])])
        np.testing.assert_allclose(row, flat, rtol=1e-5, atol=1e-5)
    path = export(model, tmp_path / f"samples{FORMATS[format]}", format, deterministic=False)
    (samples,) = run(path, DeployedPolicy(model), [np.repeat(observations[:1], 500, axis=0)])
    assert (samples.std(axis=0) > 0).all()
    assert all(TUPLE_ACTIONS.contains(action) for action in model.policy.unscale_action(samples))


@with_formats
@pytest.mark.parametrize("space", [VECTOR, MIXED], ids=["vector", "dict"])
def test_vec_normalize_is_in_the_file(space: spaces.Space, format: str, tmp_path: Path) -> None:
    keys = ["position"] if isinstance(space, spaces.Dict) else None
    env = VecNormalize(DummyVecEnv([lambda: RandomEnv(space)]), norm_obs_keys=keys, clip_obs=1.5)
    policy = "MultiInputPolicy" if keys else "MlpPolicy"
    model = TRPO(policy, env, **SMALL, target_kl=0.1).learn(96)
    raw = samples_of(space)
    normalized = env.normalize_obs(raw)
    path = export(model, tmp_path / f"agent{FORMATS[format]}", format)
    (actions,) = run(path, DeployedPolicy(model), as_inputs(raw))
    np.testing.assert_allclose(actions, model.predict(normalized, deterministic=True)[0], rtol=1e-5, atol=1e-5)
    # A model that was loaded has no environment: then the statistics come with `env`
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", device="cpu")
    for with_env in (None, env):
        (again,) = DeployedPolicy(loaded, with_env)(*map(th.as_tensor, as_inputs(raw)))
        assert np.allclose(again.detach().numpy(), actions, atol=1e-5) == (with_env is not None)


@with_formats
@pytest.mark.parametrize("algorithm", [RecurrentTRPO, RecurrentPPO])
def test_memory_goes_in_and_comes_out(algorithm: type[BaseAlgorithm], format: str, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {
        "policy_kwargs": {"lstm_hidden_size": 8, "n_lstm_layers": 2},
        "n_steps": 32,
        "batch_size": 16,
        "seed": 0,
    }
    model = algorithm("MlpLstmPolicy", DummyVecEnv([RandomEnv] * 3), device="cpu", **kwargs).learn(96)
    path, policy = export(model, tmp_path / f"agent{FORMATS[format]}", format), DeployedPolicy(model)
    assert policy.inputs == ["observation", "hidden", "cell", "episode_start"]
    assert policy.outputs == ["action", "next_hidden", "next_cell"]
    observations = samples_of(VECTOR, 60).reshape(20, 3, -1)
    starts = np.random.default_rng(0).random((20, 3)) < 0.2
    state, memory = None, [np.zeros((2, 3, 8), np.float32)] * 2
    for observation, start in zip(observations, starts, strict=True):
        action, state = model.predict(observation, state, start, deterministic=True)
        found, *memory = run(path, policy, [observation, *memory, start.astype(np.float32)])
        np.testing.assert_allclose(found, action, rtol=1e-5, atol=1e-5)


@with_formats
@pytest.mark.parametrize("space", [spaces.Discrete(4), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(3)], ids=str)
def test_masks_go_in(space: spaces.Space, format: str, tmp_path: Path) -> None:
    class MaskedEnv(RandomEnv):
        def action_masks(self) -> np.ndarray:
            return np.ones(n_masks, bool)

    sizes = {spaces.Discrete: [4], spaces.MultiDiscrete: [3, 2], spaces.MultiBinary: [2] * 3}[type(space)]
    n_masks = sum(sizes)
    model = MaskableTRPO("MlpPolicy", MaskedEnv(VECTOR, space), **SMALL, target_kl=0.1).learn(96)
    path, policy = export(model, tmp_path / f"agent{FORMATS[format]}", format), DeployedPolicy(model)
    assert policy.inputs == ["observation", "action_masks"]
    generator, observations = np.random.default_rng(0), samples_of(VECTOR)
    masks = generator.random((N, n_masks)) < 0.5
    # In each part one action is allowed at least
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        masks[np.arange(N), start + generator.integers(0, size, N)] = True
    (actions,) = run(path, policy, [observations, masks])
    np.testing.assert_array_equal(actions, model.predict(observations, deterministic=True, action_masks=masks)[0])


@with_formats
@pytest.mark.parametrize("case", ["gaussian", "squashed", "categorical", "bernoulli"])
def test_a_stochastic_file_samples(case: str, format: str, tmp_path: Path) -> None:
    policy, observation_space, action_space, settings = CASES[case]
    model = TRPO(policy, RandomEnv(observation_space, action_space), **SMALL, target_kl=0.1, **settings).learn(96)
    path = export(model, tmp_path / f"agent{FORMATS[format]}", format, deterministic=False)
    observations = np.repeat(samples_of(observation_space, 1), 20_000, axis=0)
    (actions,) = run(path, DeployedPolicy(model), as_inputs(observations))
    expected = model.predict(observations, deterministic=False)[0]
    assert len(np.unique(actions, axis=0)) > 1
    for moment in (np.mean, np.std):
        scale = expected.std(0)
        np.testing.assert_array_less(np.abs(moment(actions, axis=0) - moment(expected, axis=0)), 0.05 * scale)


def test_other_algorithms_are_exported_too(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", RandomEnv(), n_steps=32, batch_size=16, seed=0, device="cpu").learn(64)
    path, observations = export(model, tmp_path / "agent.pt", "torchscript"), samples_of(VECTOR)
    (actions,) = run(path, DeployedPolicy(model), [observations])
    np.testing.assert_allclose(actions, model.predict(observations, deterministic=True)[0], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent.onnx"
    with pytest.raises(ValueError, match=r"`model` must have an actor-critic policy, .* got SACPolicy"):
        export(SAC("MlpPolicy", RandomEnv(), device="cpu"), path)
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL)
    with pytest.raises(ValueError, match=r"`format` must be one of \['onnx', 'torchscript'\], got 'tflite'"):
        export(model, path, "tflite")
    with pytest.raises(ValueError, match="`deterministic=False` with gSDE"):
        export(TRPO("MlpPolicy", RandomEnv(), **SMALL, use_sde=True), path, deterministic=False)
    clash = spaces.Dict({"hidden": VECTOR})
    recurrent = RecurrentTRPO("MultiInputLstmPolicy", RandomEnv(clash), **SMALL)
    with pytest.raises(ValueError, match="is the name of another input or output"):
        export(recurrent, path)
    with pytest.raises(ValueError, match="is the name of another input or output"):
        export(TRPO("MultiInputPolicy", RandomEnv(spaces.Dict({"action": VECTOR})), **SMALL), path)
    with pytest.raises(ValueError, match=r"`path` must be a file, and .* is a folder"):
        export(model, tmp_path)
    with pytest.raises(ValueError, match=r"`path` must not end in \.pt with format='onnx'"):
        export(model, tmp_path / "agent.pt")
    original = builtins.__import__

    def without_onnx(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("onnx", "onnxscript", "onnx_ir"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(ImportError, match=r"pip install 'sb3-trpo-ext\[export\]'"):
        export(model, path)
    assert not list(tmp_path.iterdir())


@with_formats
def test_names_of_an_lstms_states_are_names_of_observations_elsewhere(format: str, tmp_path: Path) -> None:
    model = TRPO("MultiInputPolicy", RandomEnv(spaces.Dict({"cell": VECTOR, "hidden": VECTOR})), **SMALL)
    path = export(model, tmp_path / "new" / "folder" / f"agent{FORMATS[format]}", format)
    inputs = [np.zeros((9, *VECTOR.shape), np.float32)] * 2
    assert run(path, DeployedPolicy(model), inputs)[0].shape == (9, *BOX_ACTIONS.shape)


def framed(width: int, **kwargs: Any) -> VecNormalize:
    """Observations of so many numbers, normalized."""
    return VecNormalize(DummyVecEnv([lambda: RandomEnv(spaces.Box(-1, 1, (width,)))]), **kwargs)


def test_a_normalization_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.onnx"
    stacked = TRPO("MlpPolicy", VecFrameStack(framed(1), 2), **SMALL)
    with pytest.raises(ValueError, match=r"`env`: its VecNormalize has statistics of shape \(1,\)"):
        export(stacked, path)
    twice = TRPO("MlpPolicy", VecNormalize(framed(3)), **SMALL)
    with pytest.raises(ValueError, match="`env` has two VecNormalize"):
        export(twice, path)
    with pytest.raises(ValueError, match=r"`env` must be a VecEnv of SB3.* got 'vecnormalize.pkl'"):
        export(twice, path, env="vecnormalize.pkl")
    below = TRPO("MlpPolicy", VecNormalize(framed(3), norm_obs=False), **SMALL)
    assert DeployedPolicy(below).normalize is not None
    TRPO("MlpPolicy", framed(3), **SMALL).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="If it was trained in a VecNormalize, pass that as `env`"):
        DeployedPolicy(TRPO.load(tmp_path / "model"))


@pytest.mark.filterwarnings("error:The model has no environment")
def test_a_model_that_normalizes_by_itself_needs_no_environment(tmp_path: Path) -> None:
    TRPO("MlpPolicy", RandomEnv(), **SMALL).save(tmp_path / "model")
    DeployedPolicy(TRPO.load(tmp_path / "model"))


@with_formats
def test_an_export_draws_no_numbers_of_the_training(format: str, tmp_path: Path) -> None:
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL)
    before = th.get_rng_state()
    export(model, tmp_path / f"agent{FORMATS[format]}", format, deterministic=False)
    assert th.equal(th.get_rng_state(), before)
