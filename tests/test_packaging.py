"""What is installed, and what an import costs."""

import email
import re
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from interpreters import Interpreter

import sb3_trpo_ext
from sb3_trpo_ext.envs import EnvPoolVecEnv
from sb3_trpo_ext.zoo.command import main
from sb3_trpo_ext.zoo.init import TEMPLATE
from sb3_trpo_ext.zoo.settings import KEYS, hyperparams_path

ROOT = Path(__file__).resolve().parent.parent
CORE = {"gymnasium", "numpy", "stable-baselines3", "torch"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (path,) = builder.build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return Path(path)


def test_import_loads_nothing_that_it_does_not_need(sb3_interpreter: Interpreter, tmp_path: Path) -> None:
    # Old versions of SB3 import matplotlib and pandas themselves
    code = "import sys; sb3 = {*sys.modules}; import sb3_trpo_ext.envs; print(*{*sys.modules} - sb3)"
    modules = sb3_interpreter.run(code, tmp_path).stdout.split()
    assert "sb3_trpo_ext" in modules
    assert {"envpool", "matplotlib", "optuna", "pandas", "rl_zoo3", "sb3_contrib", "yaml"}.isdisjoint(modules)


def test_missing_envpool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"pip install sb3-trpo-ext\[envpool\]"):
        EnvPoolVecEnv("Humanoid-v5")


@pytest.mark.parametrize(("name", "module"), [("MaskableTRPO", "maskable"), ("RecurrentTRPO", "recurrent")])
def test_classes_that_need_sb3_contrib_say_so(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in dir(sb3_trpo_ext)
    for imported in ["sb3_contrib", *(each for each in sys.modules if each.startswith("sb3_contrib."))]:
        monkeypatch.setitem(sys.modules, imported, None)
    monkeypatch.delitem(sys.modules, f"sb3_trpo_ext.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"{name} needs sb3-contrib: pip install 'sb3-trpo-ext\[contrib\]'"):
        getattr(sb3_trpo_ext, name)
    with pytest.raises(AttributeError, match="no attribute 'Maskable'"):
        sb3_trpo_ext.Maskable  # noqa: B018


def test_console_script_is_installed() -> None:
    (script,) = (entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "sb3-trpo")
    assert script.load() is main


def test_settings_are_found() -> None:
    assert all(hyperparams_path(key).is_file() for key in KEYS)


def test_wheel_ships_settings_template_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        settings = {key: archive.read(f"sb3_trpo_ext/hyperparams/{key}.yml") for key in KEYS}
    assert settings == {key: (ROOT / "hyperparams" / f"{key}.yml").read_bytes() for key in KEYS}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sb3_trpo_ext").rglob("*.py")}
    template = {path.relative_to(ROOT).as_posix() for path in TEMPLATE.iterdir() if path.is_file()}
    assert sources | template | {"sb3_trpo_ext/py.typed", "sb3_trpo_ext/zoo/template/Makefile"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "hyperparams/")) for name in names)


def test_wheel_has_the_version_of_the_package_and_requires_four_others(wheel: Path) -> None:
    (entry,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    description = email.message_from_bytes(zipfile.ZipFile(wheel).read(entry))
    assert description["Version"] == sb3_trpo_ext.__version__
    required = [line for line in description.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[<>=\[ ]", line)[0] for line in required} == CORE


def test_source_distribution_can_be_tested(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.sdist").SdistBuilder(str(ROOT))
    (path,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = "README.md CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE Makefile constraints.txt mkdocs.yml pyproject.toml"
    assert set(files.split()) <= names
    assert {"hyperparams/trpo_ext.yml", "tests/conftest.py", "examples/cartpole.py", ".ci/run"} <= names
    assert not any(name.startswith(("results/", "benchmarks/", ".github/")) for name in names)


def test_every_file_tells_the_same_version_and_date() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    date = re.search(r"^date-released: (\S+)$", citation, re.MULTILINE)
    assert date
    assert f"\nversion: {sb3_trpo_ext.__version__}\n" in citation
    assert f"\n## {sb3_trpo_ext.__version__} ({date[1]})\n" in (ROOT / "CHANGELOG.md").read_text()
