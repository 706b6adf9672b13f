"""Scripts beside the package, for the tests that import them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def importable_benchmarks() -> Iterator[None]:
    """Within the block ``benchmarks`` can be imported; afterwards its modules are gone."""
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("a source distribution has no benchmarks")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]
