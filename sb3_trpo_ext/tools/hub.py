"""``sb3-trpo push`` and ``sb3-trpo pull``: agents on the Hugging Face Hub, in the layout that RL-Zoo has there."""

import argparse
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import EntryNotFoundError
from huggingface_sb3 import EnvironmentName, ModelName, ModelRepoId, load_from_hub
from rl_zoo3.utils import get_latest_run_id

from sb3_trpo_ext.callbacks import EPISODES_NAME, FILE_NAME
from sb3_trpo_ext.contrib import saved_attributes
from sb3_trpo_ext.tools.report import model_of_run, run_parser
from sb3_trpo_ext.zoo import launches
from sb3_trpo_ext.zoo.runs import read_settings

#: What a run has beside its agent; RL-Zoo unpacks this archive in the folder of the run.
ARCHIVE = "train_eval_metrics.zip"
RECORDS = ("*.monitor.csv", "evaluations.npz", "evaluation.json", FILE_NAME, EPISODES_NAME, launches.FILE_NAME)
#: Files of the folder within a run, and their names on the Hub. RL-Zoo needs the first three.
SETTINGS = {
    "args.yml": "args.yml",
    "config.yml": "config.yml",
    "env_kwargs.yml": "env_kwargs.yml",
    "vecnormalize.pkl": "vec_normalize.pkl",
}


def model_card(env_id: str, algo: str, repo_id: str, model_path: Path) -> str:
    """
    Describe an agent: how it was evaluated, how it was trained, and how to use it.

    :param env_id: the environment
    :param algo: key of the algorithm
    :param repo_id: where it will be
    :param model_path: of the agent, in the folder of its run
    :return: Markdown with the metadata by which the Hub lists the agent
    :raises ValueError: if it has not been evaluated, or trained further since
    """
    evaluation = _evaluation(model_path)
    returns = evaluation["return"]
    data = huggingface_hub.ModelCardData(
        library_name="stable-baselines3",
        tags=[env_id, "deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3", "sb3-trpo-ext"],
        model_name=algo,
        eval_results=[
            huggingface_hub.EvalResult(
                task_type="reinforcement-learning",
                task_name="reinforcement-learning",
                dataset_type=env_id,
                dataset_name=env_id,
                metric_type="mean_reward",
                metric_value=f"{returns['mean']:.2f} +/- {returns['std']:.2f}",
            )
        ],
    )
    kind = "deterministic" if evaluation["deterministic"] else "stochastic"
    n_episodes, n_steps = len(returns["episodes"]), evaluation["n_timesteps"]
    lines = [f"---\n{data.to_yaml()}\n---", f"# `{algo}` on {env_id}", *_training(model_path.parent)]
    lines += [
        f"After {n_steps:,} steps, {n_episodes} {kind} episodes had a return of "
        f"{returns['mean']:,.2f} ± {returns['std']:,.2f} (mean and standard deviation)."
    ]
    owner, name = repo_id.split("/")
    commands = [
        'pip install "sb3-trpo-ext[zoo]"',
        f"TRUST_REMOTE_CODE=True sb3-trpo pull --env {env_id} --algo {algo} -orga {owner} -name {name} -f logs",
        f"sb3-trpo enjoy --env {env_id} --algo {algo} -f logs",
    ]
    lines += ["## Use", "```bash\n" + "\n".join(commands) + "\n```"]
    return "\n\n".join(lines) + "\n"


def _evaluation(model_path: Path) -> dict[str, Any]:
    """What ``sb3-trpo report`` has written about an agent; raises a ``ValueError`` if missing or outdated."""
    folder = model_path.parent
    path = folder / "evaluation.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}: run `sb3-trpo report` first, the Hub lists agents by their return")
    evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    n_evaluated, n_steps = evaluation["n_timesteps"], saved_attributes(model_path).get("num_timesteps")
    if n_evaluated != n_steps:
        raise ValueError(
            f"The evaluation in {folder} is of {n_evaluated} steps of training, and {model_path.name} has {n_steps}: run "
            "`sb3-trpo report` again"
        )
    return evaluation


def _training(folder: Path) -> Iterator[str]:
    """What ``run.json`` tells of a training; nothing if there is none."""
    path = folder / launches.FILE_NAME
    if not path.is_file():
        return
    entries = launches.launches_in(path)
    yield "Trained by:"
    yield "```bash\n" + "\n".join(entry["command"] for entry in entries) + "\n```"
    versions = ", ".join(f"{name} {version}" for name, version in entries[-1]["versions"].items())
    yield f"Versions: {versions}. Python {entries[-1]['python']}, {entries[-1]['platform']}, {entries[-1]['device']}."


def stage(env_id: str, algo: str, repo_id: str, model_path: Path, target: Path) -> None:
    """
    Lay out an agent as RL-Zoo does on the Hub.

    :param env_id: the environment
    :param algo: key of the algorithm
    :param repo_id: where it will be
    :param model_path: of the agent, in the folder of its run
    :param target: an empty folder
    :raises ValueError: if it has not been evaluated, or trained further since
    """
    folder, name = model_path.parent, EnvironmentName(env_id)
    (target / "README.md").write_text(model_card(env_id, algo, repo_id, model_path), encoding="utf-8")
    shutil.copy(model_path, target / ModelName(algo, name).filename)
    settings = folder / name
    env_kwargs = read_settings(settings / "args.yml").get("env_kwargs") or {}
    (target / "env_kwargs.yml").write_text(yaml.safe_dump(env_kwargs), encoding="utf-8")
    for own, theirs in SETTINGS.items():
        if (settings / own).is_file():
            shutil.copy(settings / own, target / theirs)
    with zipfile.ZipFile(target / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        for pattern in RECORDS:
            for file in sorted(folder.glob(pattern)):
                archive.write(file, file.name)
    picture = folder / "learning_curve.png"
    if picture.is_file():
        shutil.copy(picture, target)


def _hub_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with RL-Zoo's options for a repository."""
    parser = run_parser(name, description)
    parser.add_argument("-orga", "--organization", required=True, help="user or organization on the Hub")
    parser.add_argument("-name", "--repo-name", help="name of the repository (default: ALGO-ENV)")
    return parser


def _repository(args: Any) -> ModelRepoId:
    """The repository that the options name."""
    return ModelRepoId(args.organization, args.repo_name or ModelName(args.algo, EnvironmentName(args.env)))


def push(argv: Sequence[str] | None = None) -> None:
    """
    Upload the agent of a run, with a card that says how it was trained and evaluated.

    :param argv: the arguments, those of the process if None
    :raises ValueError: if there is no such run, or if it has not been evaluated
    """
    parser = _hub_parser("sb3-trpo push", "Upload a trained agent to the Hugging Face Hub (log in with `hf auth login`).")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args(argv)
    model_path, repo_id = model_of_run(args.env, args.folder, args.algo, args.exp_id), _repository(args)
    with tempfile.TemporaryDirectory() as folder:
        stage(args.env, args.algo, repo_id, model_path, Path(folder))
        api = huggingface_hub.HfApi()
        url = api.create_repo(repo_id, private=args.private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"{args.algo} on {args.env}")
    print(f"{model_path} is now at {url}")


def pull(argv: Sequence[str] | None = None) -> None:
    """
    Download an agent into a run of its own.

    :param argv: the arguments, those of the process if None
    :raises ValueError: for an ``--exp-id`` that is negative or taken, or if ``TRUST_REMOTE_CODE`` is not set: whoever made the
        files can run code on this machine
    """
    args = _hub_parser("sb3-trpo pull", "Download an agent from the Hugging Face Hub.").parse_args(argv)
    if args.exp_id < 0:
        raise ValueError(f"`--exp-id` must be the number of a new run, got {args.exp_id}: leave it out")
    repo_id, name = _repository(args), EnvironmentName(args.env)
    files = {f"{name}.zip": load_from_hub(repo_id, ModelName(args.algo, name).filename)}
    for own, theirs in SETTINGS.items():
        try:
            files[f"{name}/{own}"] = load_from_hub(repo_id, theirs)
        except EntryNotFoundError:
            # The agent normalizes by itself
            if own != "vecnormalize.pkl":
                raise
    archive = load_from_hub(repo_id, ARCHIVE)
    number = args.exp_id or get_latest_run_id(str(Path(args.folder, args.algo)), name) + 1
    folder = Path(args.folder, args.algo, f"{name}_{number}")
    if folder.exists():
        raise ValueError(f"--exp-id {number}: there is a run in {folder} already: leave it out")
    (folder / name).mkdir(parents=True)
    for own, file in files.items():
        shutil.copy(file, folder / own)
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    print(f"{repo_id} is now in {folder}")
