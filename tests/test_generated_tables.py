"""The tables of README and documentation are those that the scripts make from the committed results."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from scripts import importable_benchmarks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scripts() -> Any:
    """What fills pages with tables, and the tables."""
    with importable_benchmarks():
        yield importlib.import_module("benchmarks.markdown"), importlib.import_module("benchmarks.tables").all_tables()


def test_pages_have_the_tables_of_the_results(scripts: Any) -> None:
    markdown, tables = scripts
    for page in markdown.pages():
        assert markdown.filled(page, tables) == page.read_text(), f"{page.name}: run python -m benchmarks.tables"


def test_every_table_is_on_one_page(scripts: Any) -> None:
    markdown, tables = scripts
    shown = [name for page in markdown.pages() for name in markdown.names_on(page)]
    assert sorted(shown) == sorted(tables)


def test_results_are_small() -> None:
    files = [path for path in (ROOT / "results").rglob("*") if path.is_file()]
    if not files:
        pytest.skip("a source distribution has no results")
    assert sum(path.stat().st_size for path in files) < 5e6


def test_commands_of_the_pages_are_there() -> None:
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("a source distribution has no benchmarks")
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        scripts_named = re.findall(r"benchmarks/[\w/]+\.\w+", text)
        modules = [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (benchmarks[\w.]*\w)", text)]
        for path in scripts_named + modules:
            assert (ROOT / path).exists(), f"{page.name}: {path}"
