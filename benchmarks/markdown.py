"""Tables of the documentation: how they are formatted, and where they go.

A page has ``<!-- table: NAME -->`` above a table that a script writes, and ``<!-- end -->`` below it. People write the rest.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> Any:
    """The result of a benchmark or of a study."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def names_on(page: Path) -> list[str]:
    """The names of the tables that a page has markers for."""
    return [match[2] for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def filled(page: Path, tables: Mapping[str, str]) -> str:
    """
    The text of a page with its tables.

    :raises KeyError: for a table that no script writes
    """
    return _BLOCK.sub(lambda match: match[1] + tables[match[2]] + match[3], page.read_text(encoding="utf-8"))
