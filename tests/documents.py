"""The documents and their examples, read by a Markdown parser."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
DOCUMENTS = [path for folder in ("", "cluster", "docs", "docs/benchmarks") for path in sorted((ROOT / folder).glob("*.md"))]


class Example(NamedTuple):
    """One fenced block, and where it stands."""

    document: str
    line: int
    content: str


def examples(language):
    """Every fenced block of this language, in the documents' order."""
    found = []
    for path in DOCUMENTS:
        tokens = MarkdownIt().parse(path.read_text())
        fences = [token for token in tokens if token.type == "fence" and token.info == language]
        found += [Example(str(path.relative_to(ROOT)), token.map[0] + 1, token.content) for token in fences]
    return found


def shell_commands(example):
    """The words of each command of a block; a quotation may go on on the next line."""
    commands, waiting = [], ""
    for line in example.content.replace("\\\n", " ").splitlines():
        waiting += line + "\n"
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:
            continue
        waiting = ""
        if words:
            commands.append(words)
    assert not waiting, f"{example.document}:{example.line} has a quotation without an end"
    return commands


def inline_code():
    """(document, code) of everything between backticks in the running text of all documents."""
    found = []
    for path in DOCUMENTS:
        inline = (token for token in MarkdownIt().enable("table").parse(path.read_text()) if token.type == "inline")
        codes = (child.content for token in inline for child in token.children if child.type == "code_inline")
        found += [(str(path.relative_to(ROOT)), re.sub(r"\s+", " ", code)) for code in codes]
    return found
