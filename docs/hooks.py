"""What the site needs beyond Markdown: equations without JavaScript, links to the code, and files from outside ``docs``."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Where a file of the repository that a page links to lies in the site.
FOLDER = "repository"

_LINK_OUT = re.compile(r"\]\(\.\./([^)#\s]+)\)")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_NAME = re.compile(r"(?<!-)<code>(sb3_trpo_ext(?:\.\w+)+)</code>")
#: A reference in the style of Sphinx, as in the docstrings: the role is left standing before the code.
_ROLE = re.compile(r":(?:class|func|meth|data|mod):<code>(~?)([\w.]+)</code>|:(?:class|func|meth|data|mod):`(~?)([\w.]+)`")


def on_files(files: Files, config: Any) -> Files:
    """
    Add the files of the repository that pages link to, such as examples and figures.

    :param files: all files of ``docs``
    :param config: of the site
    :return: with those added
    """
    for page in list(files.documentation_pages()):
        for name in _LINK_OUT.findall(page.content_string):
            uri = f"{FOLDER}/{name}"
            if (ROOT / name).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """
    Let links out of ``docs`` lead to where :func:`on_files` has put the files.

    :param markdown: of a page
    :return: with those links changed
    """
    return _LINK_OUT.sub(rf"]({FOLDER}/\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """
    Turn equations into MathML, which browsers draw by themselves, and names of the package into links to the reference.

    :param content: HTML of a page
    :return: the HTML with both
    """
    content = _MATH.sub(_math, content)
    content = _ROLE.sub(lambda match: _reference(match[2] or match[4], is_short=bool(match[1] or match[3])), content)
    return _NAME.sub(lambda match: _reference(match[1], is_short=False), content)


def _math(match: re.Match[str]) -> str:
    """
    One equation.

    :param match: of what the Markdown extension has marked
    :return: MathML
    """
    is_block = match[2] == "["
    mathml = convert(html.unescape(match[3]).strip(), display="block" if is_block else "inline")
    return f'<div class="equation">{mathml}</div>' if is_block else mathml


def _reference(name: str, is_short: bool) -> str:
    """
    A link to the reference, where the name is there; else the name alone.

    :param name: a dotted name
    :param is_short: show its last part only
    :return: HTML
    """
    text = name.rsplit(".", 1)[-1] if is_short else name
    return f'<autoref identifier="{name}" optional><code>{text}</code></autoref>'
