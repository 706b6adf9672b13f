"""The command ``sb3-trpo init``: a folder with an environment, its settings and its test, to start a task of your own."""

import argparse
import importlib.util
import keyword
import re
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym

#: Files in which these two names are replaced.
TEMPLATE = Path(__file__).with_name("template")
MODULE, CLASS = "my_env", "MyEnv"


def main(argv: Sequence[str] | None = None) -> None:
    """
    Make the folder.

    :param argv: the arguments, those of the process if None
    :raises ValueError: if the name cannot be that of a new module, or if there is such a folder or environment
    """
    parser = argparse.ArgumentParser(description="Make a folder with an environment of your own, ready to train in.")
    parser.add_argument("name", metavar="NAME", help="of the folder and of the module with the environment, such as my_robot")
    make_project(parser.parse_args(argv).name)


def make_project(name: str) -> None:
    """
    Make the folder in the working folder.

    :param name: of the folder and of the module
    :raises ValueError: as :func:`main` does
    """
    folder, class_name = Path(name), name.title().replace("_", "")
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or keyword.iskeyword(class_name):
        raise ValueError(f"`NAME` must be the name of a Python module in small letters, such as my_robot, got {name!r}")
    if folder.exists():
        raise ValueError(f"`NAME`: there is a {name} in this folder already: choose another name")
    # SB3 imports the old Gym wherever there is one
    if name == "gym" or importlib.util.find_spec(name) is not None:
        raise ValueError(f"`NAME`: there is a Python module {name} already: choose another name")
    if f"{class_name}-v0" in gym.registry:
        raise ValueError(f"`NAME`: Gymnasium has an environment {class_name}-v0 already: choose another name than {name}")
    folder.mkdir()
    for file in TEMPLATE.iterdir():
        # Not the byte code that pip compiles
        if file.is_file():
            text = file.read_text(encoding="utf-8").replace(MODULE, name).replace(CLASS, class_name)
            (folder / file.name.replace(MODULE, name)).write_text(text, encoding="utf-8")
    print(f"{name} has the environment {class_name}-v0. To train in it: cd {name} && make train")
