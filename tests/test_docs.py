"""The documentation agrees with the package: links, names, logged keys, arguments, and code that runs."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from agents import RandomEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

import sb3_trpo_ext.envs
from sb3_trpo_ext import TRPO, optim
from sb3_trpo_ext.arguments import TRUST_REGION_OPTIONS
from sb3_trpo_ext.optim import Status, UpdateStatus
from sb3_trpo_ext.update.critic import CriticStatus

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text()


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors_of(text: str) -> set[str]:
    """The anchors that headings get, on GitHub and in the site alike."""
    headings = re.findall(r"^#+ (.+)$", without_code_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def rows_of(text: str, first_cell: str) -> list[list[str]]:
    """The rows of all tables whose head begins with a given cell, without the head."""
    rows = []
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        # Not at `\|`, which is part of a cell
        head, _, *lines = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines())
        if head[0] == first_cell:
            rows += lines
    return rows


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(
    ("folder", "text"),
    [pytest.param("docs", text, id=name) for name, text in PAGES.items()] + [pytest.param(".", README, id="README")],
)
def test_links_lead_somewhere(folder: str, text: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code_blocks(text)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / folder / path).resolve() if path else None
        assert file is None or file.exists(), target
        if anchor:
            assert anchor in anchors_of(text if file is None else file.read_text()), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = set(re.findall(r": (\w+)\.md$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    # The home page is made of the README
    assert navigation == {"index", *PAGES}


def test_readme_can_be_read_aloud() -> None:
    """Short, with one picture, one table of results and the two commands of the Makefile."""
    assert len(README.splitlines()) < 150
    assert len(re.findall(r"!\[", README)) == 1
    results = [cell for row in rows_of(README, "1M steps") for cell in row[1:] if cell]
    assert len(results) >= 6
    for cell in results:
        assert re.search(rf"(?<![\d,]){re.escape(cell.split(' (')[0])}(?![\d,])", PAGES["results"]), cell
    for target in ("train", "test"):
        assert f"\nmake {target} " in README
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_python_of_the_first_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page build on each other, as for somebody who types them."""
    learn = TRPO.learn
    monkeypatch.setattr(TRPO, "learn", lambda model, total_timesteps, **kwargs: learn(model, model.n_envs, **kwargs))
    monkeypatch.chdir(tmp_path)
    for text in (README, PAGES["getting_started"]):
        blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        assert blocks
        exec("\n".join(blocks), {"__name__": "__main__"})
    assert (tmp_path / "my_run" / "progress.csv").is_file()


def resolve(name: str) -> Any:
    """What a dotted name stands for."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    names = re.findall(r"(?:`|^::: )(sb3_trpo_ext(?:\.\w+)+)(?![\w/*])", PAGES[page], flags=re.MULTILINE)
    if page.startswith(("algorithm", "api")):
        assert len(names) >= 9
    for name in names:
        resolve(name)


def listed_on(page: str) -> list[str]:
    """The names that a page of the reference documents."""
    return re.findall(r"^::: (\S+)$", PAGES[page], flags=re.MULTILINE)


#: Public names that are not in ``sb3_trpo_ext`` itself.
OTHER_PUBLIC_NAMES = {
    "callbacks.TimedEvalCallback",
    *(f"envs.{name}" for name in sb3_trpo_ext.envs.__all__),
    "envs.blocks.Blocks",
    "envs.point_mass.PointMass1D",
    # `from sb3_trpo_ext import` knows these too, and loads sb3-contrib for them
    "deployed.DeployedPolicy",
    "deployed.export",
    "maskable.MaskableTRPO",
    "recurrent.RecurrentTRPO",
}


def test_api_page_lists_the_public_names() -> None:
    listed = listed_on("api")
    assert sorted(listed) == sorted(f"sb3_trpo_ext.{name}" for name in {*sb3_trpo_ext.__all__, *OTHER_PUBLIC_NAMES})
    for name in listed:
        resolve(name)


def test_page_of_the_mathematics_lists_the_public_names() -> None:
    listed = listed_on("api_mathematics")
    assert sorted(name.rpartition(".")[2] for name in listed) == sorted(optim.__all__)
    for name in listed:
        assert resolve(name) is getattr(optim, name.rpartition(".")[2])


def test_algorithm_names_a_function_for_every_equation() -> None:
    """Every section with an equation names what computes it; the functions that make up an update are all there."""
    sections = re.split(r"^## ", PAGES["algorithm"], flags=re.MULTILINE)[1:]
    with_equation = [section for section in sections if "$$" in section]
    assert len(with_equation) >= 10
    for section in with_equation:
        assert re.search(r"`sb3_trpo_ext\.[\w.]+`", section), section.splitlines()[0]
    for name in (
        "update.surrogate.Surrogate.evaluate",
        "update.surrogate.Surrogate.objective_and_gradient",
        "optim.operators.GaussNewtonFisher",
        "optim.mlp.MlpJacobian",
        "optim.kfac.KroneckerPreconditioner",
        "optim.conjugate_gradient.conjugate_gradient",
        "optim.line_search.line_search",
        "optim.updates.KLConstraint.update",
        "optim.updates.AdaptiveKLPenalty",
        "update.critic.fit_critic",
    ):
        assert f"`sb3_trpo_ext.{name}`" in PAGES["algorithm"], name


def logged_keys(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> set[str]:
    """The names of all that SB3 and a model log during two updates."""
    keys: set[str] = set()
    record = Logger.record

    def spy(self: Logger, key: str, *args: Any, **options: Any) -> None:
        keys.add(key)
        record(self, key, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Logger, "record", spy)
        env = gym.wrappers.RecordEpisodeStatistics(RandomEnv())
        TRPO("MlpPolicy", env, n_steps=32, batch_size=16, n_critic_updates=1, device="cpu", **kwargs).learn(64)
    return keys


def documented_keys() -> set[str]:
    return {key for row in rows_of(PAGES["logging"], "key") for key in code_in(row[0])}


def test_logging_page_has_every_key_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = logged_keys(monkeypatch) | logged_keys(monkeypatch, trust_region="penalty")
    # For environments that report `is_success`
    assert '"rollout/success_rate"' in inspect.getsource(OnPolicyAlgorithm)
    assert documented_keys() == logged | {"rollout/success_rate"}


def test_logging_page_tells_which_form_logs_what(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint, penalty = logged_keys(monkeypatch), logged_keys(monkeypatch, trust_region="penalty")
    only = [section.split("\n\n")[1] for section in re.split(r"^Only with ", PAGES["logging"], flags=re.MULTILINE)[1:]]
    keys = [{key for row in rows_of(table + "\n", "key") for key in code_in(row[0])} for table in only]
    assert keys == [constraint - penalty, penalty - constraint]


@pytest.mark.parametrize(("key", "statuses"), [("status", UpdateStatus), ("value_status", CriticStatus)])
def test_logging_page_has_every_status_with_its_code(key: str, statuses: type[Status]) -> None:
    documented = [(row[0], int(row[1])) for row in rows_of(PAGES["logging"], f"`train/{key}_name`")]
    assert documented == [(f"`{status}`", status.value) for status in statuses]
    assert [status.value for status in statuses] == list(range(len(statuses)))


ARGUMENTS = inspect.signature(TRPO).parameters


@pytest.mark.parametrize("library", ["sb3-contrib", "Stable-Baselines 2", "baselines", "Spinning Up", "Tianshou"])
def test_migration_page_names_arguments_that_are_there(library: str) -> None:
    rows = rows_of(PAGES["migration"], library)
    assert len(rows) >= 3
    column = 1 if library == "sb3-contrib" else 2
    names = [name for row in rows for name in code_in(row[column])]
    assert "policy_kwargs" in names or "target_kl" in names
    assert set(names) <= set(ARGUMENTS)
    for option in re.findall(r"trust_region_kwargs=dict\(([^)]*)\)", PAGES["migration"]):
        assert {pair.split("=")[0].strip() for pair in option.split(",")} <= set(TRUST_REGION_OPTIONS["constraint"])


def test_hyperparameters_page_has_arguments_with_their_defaults() -> None:
    documented: dict[str, str] = {}
    for name_cell, default_cell, _ in rows_of(PAGES["hyperparameters"], "argument"):
        names, defaults = code_in(name_cell), [part.strip(" `\"'") for part in default_cell.split(",")]
        documented.update(zip(names, defaults, strict=True))
    # What is inside of `policy_kwargs` is the policy's
    documented.pop("policy_kwargs=dict(log_std_init=...)")
    for name, default in documented.items():
        assert str(ARGUMENTS[name].default) == default, name
    ours = {"ent_coef", "cg_tolerance", "trust_region"}
    assert ours | {"target_kl", "cg_damping", "cg_max_steps", "sub_sampling_factor", "gae_lambda"} <= set(documented)


def test_hyperparameters_page_has_the_options_of_both_forms() -> None:
    options = [row[0].strip("`") for row in rows_of(PAGES["hyperparameters"], "option")]
    assert options == [*TRUST_REGION_OPTIONS["constraint"], *TRUST_REGION_OPTIONS["penalty"]]


def test_examples_page_lists_every_example() -> None:
    listed = {row[0].partition("]")[0].strip("[").removesuffix(".py") for row in rows_of(PAGES["getting_started"], "script")}
    assert listed == {path.stem for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.slow
def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("latex2mathml")
    build = pytest.importorskip("mkdocs.commands.build")
    config = pytest.importorskip("mkdocs.config")
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    assert 'href="getting_started.html"' in (tmp_path / "index.html").read_text()
    page = (tmp_path / "algorithm.html").read_text()
    assert page.count("<math") > 50
    assert "arithmatex" not in page
    assert 'href="api_mathematics.html#sb3_trpo_ext.optim.line_search.line_search"' in page
    assert (tmp_path / "repository" / "results" / "humanoid.png").is_file()
    # All that it loads is its own; a canonical address is not loaded
    for file in tmp_path.glob("*.html"):
        assert not re.findall(r'(?:src|<link rel="(?!canonical)[^>]+href)="(?:https?:)?//', file.read_text())
