"""Who never imports whom, and how long a file may be, read off the source."""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def module_name(path: Path) -> str:
    """The name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted((ROOT / "sb3_trpo_ext").rglob("*.py"))}
#: What only RL-Zoo, the tools and EnvPool need: `import sb3_trpo_ext` must not load it.
EXTRAS = (
    "brax",
    "envpool",
    "huggingface_sb3",
    "jax",
    "matplotlib",
    "mujoco",
    "mujoco_playground",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "optuna",
    "pandas",
    "rich",
    "rl_zoo3",
    "rliable",
    "sb3_contrib",
    "seaborn",
    "tensorboard",
    "tqdm",
    "yaml",
)
PACKAGE = "sb3_trpo_ext"
#: The layers from the bottom. A folder or a module imports of the package only itself and what is in the lines above.
LAYERS = (
    ("_checks", "_files", "_observations"),
    ("_names",),
    ("envs",),
    ("parallel",),
    ("optim",),
    ("update",),
    ("rollout",),
    ("policies", "arguments", "contrib"),
    ("defaults", "saving"),
    ("trpo",),
    ("maskable", "recurrent"),
    ("callbacks", "deployed"),
    ("",),  # the package itself: what users import
    ("zoo",),
    ("tools",),
)
#: They load when one of their classes is first used, and only each other import them: the rest needs no sb3-contrib.
MASKS_AND_MEMORY = ("maskable", "recurrent", "update.masks", "update.sequences", "rollout.masks")
#: SB3 asks for one class with a constructor of thirty arguments, which alone are a hundred lines.
MAX_CODE_LINES = {"sb3_trpo_ext.trpo": 400}


def imports_of(module: str, only_on_import: bool = False) -> set[str]:
    """
    The modules that a file imports, in full.

    :param module: the file
    :param only_on_import: leave out what is imported when a function is called
    """
    tree = ast.parse(FILES[module].read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    within_functions = {node for function in functions for node in ast.walk(function)}
    return {
        name
        for node in ast.walk(tree)
        if not (only_on_import and node in within_functions)
        for name in _imports_of_statement(node)
    }


def _imports_of_statement(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        assert node.module is not None
        for alias in node.names:
            # `from package import module` imports `package.module`, if there is such a module
            full_name = f"{node.module}.{alias.name}"
            yield full_name if full_name in FILES else node.module


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def count_code_lines(source: str) -> int:
    """Lines with code on them: no blank lines, comments or docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in no_code:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_reader_sees_what_is_there() -> None:
    """All rules hold where nothing is found."""
    assert {"sb3_trpo_ext", "sb3_trpo_ext.trpo", "sb3_trpo_ext.optim", "sb3_trpo_ext.optim.mlp"} <= set(FILES)
    seen = imports_of("sb3_trpo_ext.update.surrogate")
    assert {"torch", "sb3_trpo_ext.optim", "stable_baselines3.common.policies"} <= seen
    assert "rl_zoo3" in imports_of("sb3_trpo_ext.zoo.settings")
    assert "rl_zoo3" not in imports_of("sb3_trpo_ext.zoo.settings", only_on_import=True)
    source = (
        '"""Doc."""\n\nimport a  # comment\n# comment\n\ndef f():\n    """Doc.\n\n    More."""\n    return (\n        1)\n'
    )
    assert count_code_lines(source) == 4


def layer_of(module: str) -> str:
    """The first name below the package: a folder, a module, or nothing for the package itself."""
    return module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]


def test_every_file_is_in_a_layer() -> None:
    assert {layer_of(module) for module in FILES} == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("module", FILES)
def test_layer_imports_only_layers_below(module: str) -> None:
    layer = layer_of(module)
    allowed = {layer}
    for names in LAYERS:
        if layer in names:
            break
        allowed.update(names)
    # A command names the tools that it starts by text, so that this holds without exceptions
    assert {layer_of(name) for name in imports_of(module) if is_within(name, (PACKAGE,))} <= allowed


@pytest.mark.parametrize("module", [module for module in FILES if is_within(module, ("sb3_trpo_ext.optim",))])
def test_mathematics_imports_torch_and_the_standard_library_alone(module: str) -> None:
    for name in imports_of(module):
        assert is_within(name, ("torch", "sb3_trpo_ext.optim", "sb3_trpo_ext.parallel", *sys.stdlib_module_names)), name


@pytest.mark.parametrize("module", ["sb3_trpo_ext.parallel.reductions", "sb3_trpo_ext.parallel.moments"])
def test_reductions_import_torch_and_the_standard_library_alone(module: str) -> None:
    for name in imports_of(module):
        assert is_within(name, ("torch", "sb3_trpo_ext.parallel", *sys.stdlib_module_names)), name


@pytest.mark.parametrize("module", FILES)
def test_only_rl_zoo_and_the_tools_import_the_extras(module: str) -> None:
    forbidden = () if layer_of(module) in ("zoo", "tools") else EXTRAS
    allowed = {"envs": ("envpool",)}.get(layer_of(module), ())
    if module.removeprefix(f"{PACKAGE}.") in MASKS_AND_MEMORY:
        allowed = ("sb3_contrib",)
    assert not [name for name in imports_of(module) if is_within(name, forbidden) and not is_within(name, allowed)]


@pytest.mark.parametrize("module", FILES)
def test_only_masks_memory_and_rl_zoo_import_masks_and_memory(module: str) -> None:
    users = {f"{PACKAGE}.{name}" for name in MASKS_AND_MEMORY}
    if module not in users and layer_of(module) not in ("zoo", "tools"):
        assert not users & imports_of(module)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    # Imports within functions count too
    needs = {module: imports_of(module) & set(FILES) for module in FILES}
    done: set[str] = set()
    while len(done) < len(FILES):
        ready = {module for module in FILES if module not in done and needs[module] <= done}
        assert ready, {module: needs[module] - done for module in FILES if module not in done}
        done |= ready


@pytest.mark.parametrize("module", FILES)
def test_file_is_short(module: str) -> None:
    assert count_code_lines(FILES[module].read_text()) <= MAX_CODE_LINES.get(module, 300)
