"""How an error of a command is told in one line."""

#: Faults of a program, which the user cannot put right: they keep their traceback.
FAULTS = (ArithmeticError, MemoryError, NameError)
#: Errors whose text does not stand alone: that of a KeyError is the key.
UNNAMED = (AttributeError, EOFError, LookupError, TypeError)
#: Which extra of this package brings a module.
EXTRAS = {
    **dict.fromkeys(("huggingface_sb3", "optuna", "requests", "rl_zoo3", "sb3_contrib", "seaborn", "yaml"), "zoo"),
    **dict.fromkeys(("matplotlib", "pandas"), "plots"),
}


def one_line(error: BaseException) -> str:
    """The text of an error on one line, with the name of its class where the text needs it."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and (module := str(error.name).partition(".")[0]) in EXTRAS:
        name = "RL-Zoo" if module == "rl_zoo3" else module
        return f"{name} is missing: install it with `pip install 'sb3-trpo-ext[{EXTRAS[module]}]'`"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {text}".removesuffix(": ") if not text or isinstance(error, UNNAMED) else text
