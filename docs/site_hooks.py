# SPDX-License-Identifier: Apache-2.0
"""Hooks of the site (`mkdocs.yml`): formulas without a script, and links of the repository."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Links to files outside of docs/, which the site does not have, become links to the repository, or text."""
    docs = Path(config.docs_dir).resolve()

    def outside(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = (docs / page.file.src_uri).parent.joinpath(target.partition("#")[0]).resolve()
        if "://" in target or path.is_relative_to(docs):
            return match[0]
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which is not there.")
        return f"[{text}]({config.repo_url}/blob/main/{path.relative_to(docs.parent)})" if config.repo_url else text

    return re.sub(r"\[([^\]]+)\]\(([^)#][^)]*)\)", outside, markdown)


def on_page_content(content: str, **kwargs: Any) -> str:
    """TeX becomes MathML, which browsers draw by themselves; docstrings' backticks and brackets become names."""

    def formula(match: re.Match[str]) -> str:
        return convert(html.unescape(match[3]).strip(), display="block" if match[1] == "div" else "inline")

    def kind(match: re.Match[str]) -> str:
        text = re.sub(r", defaults to .*$|\[`|`\]|[`*]", "", match[1])
        return f"<code>{re.sub(r'~?(?:[a-z_]+[.])+(?=[A-Z])', '', text)}</code>"

    content = re.sub(r'<(div|span) class="arithmatex">\\(\[|\()(.*?)\\[\])]</\1>', formula, content, flags=re.DOTALL)
    content = re.sub(r"<code>([^<`]*`[^<]*)</code>", kind, content)
    return re.sub(r"\[<code>~?(?:\w+\.)*(\w+)</code>\](?!\()", r"<code>\1</code>", content)
