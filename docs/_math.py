"""MkDocs hook: TeX becomes MathML while building, so that a reader's browser fetches nothing."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def _to_mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    return convert(html.unescape(match["tex"]), display=display)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what `pymdownx.arithmatex` (generic) has marked."""
    return FORMULA.sub(_to_mathml, content)
