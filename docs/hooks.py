"""What the site needs beyond Markdown: the README as its home, equations without scripts, and links to files and the API."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Where the site has the files of the repository that pages link to.
FOLDER = "repository"

_LINK_OUT = re.compile(r"\]\(\.\./([^)#\s]+)\)")
_README_LINK = re.compile(r"\]\((?!https?:|#)(docs/)?([^)\s]+)\)")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_NAME = re.compile(r"(?<!-)<code>(sb3_trpo_ext(?:\.\w+)+)</code>")
#: A reference in the style of Sphinx, as in the docstrings.
_ROLE = re.compile(r":(?:class|func|meth|data|mod):<code>(~?)([\w.]+)</code>|:(?:class|func|meth|data|mod):`(~?)([\w.]+)`")


def home() -> str:
    """The README, with its links as seen from ``docs``."""
    text = (ROOT / "README.md").read_text()
    return _README_LINK.sub(lambda match: f"]({match[2]})" if match[1] else f"](../{match[2]})", text)


def on_files(files: Files, config: Any) -> Files:
    """Add the home page, and the files outside ``docs`` that pages link to, such as examples and figures."""
    files.append(File.generated(config, "index.md", content=home()))
    for page in list(files.documentation_pages()):
        for name in _LINK_OUT.findall(page.content_string):
            uri = f"{FOLDER}/{name}"
            if (ROOT / name).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links out of ``docs`` at the files that :func:`on_files` added."""
    return _LINK_OUT.sub(rf"]({FOLDER}/\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn equations into MathML, which browsers render without scripts, and names of the package into links to the API."""
    content = _MATH.sub(_math, content)
    content = _ROLE.sub(lambda match: _reference(match[2] or match[4], is_short=bool(match[1] or match[3])), content)
    return _NAME.sub(lambda match: _reference(match[1], is_short=False), content)


def _math(match: re.Match[str]) -> str:
    """MathML for an equation that the Markdown extension has marked."""
    is_block = match[2] == "["
    mathml = convert(html.unescape(match[3]).strip(), display="block" if is_block else "inline")
    return f'<div class="equation">{mathml}</div>' if is_block else mathml


def _reference(name: str, is_short: bool) -> str:
    """A link to a name in the API, or plain code if it is not there; ``is_short`` shows only its last part."""
    text = name.rsplit(".", 1)[-1] if is_short else name
    return f'<autoref identifier="{name}" optional><code>{text}</code></autoref>'
