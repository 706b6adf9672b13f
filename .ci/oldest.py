"""Print the lower bounds of `pyproject.toml` as constraints for pip: the oldest versions that it admits."""

import itertools
import re
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
for requirement in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
    if bound := re.match(r"([\w-]+)(?:\[[\w,-]+\])?>=([\w.]+)", requirement):
        print("==".join(bound.groups()))
