"""The documentation site builds without a warning and asks no other host for anything; what it quotes is in the code."""

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.documents import ROOT, inline_code

TROUBLES = "docs/troubleshooting.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    settings = {"cwd": ROOT, "env": {**os.environ, "NO_MKDOCS_2_WARNING": "1"}}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_document_is_a_page_and_every_picture_is_there(site):
    for path in (ROOT / "docs").rglob("*.md"):
        assert (site / path.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
    for page in site.rglob("*.html"):
        for source in re.findall(r'<img[^>]* src="([^"]+)"', page.read_text()):
            assert source.startswith("data:") or (page.parent / source).is_file(), f"{page.name}: {source}"


def test_no_page_loads_anything_from_another_host(site):
    loads = re.compile(
        r'<(?:script|img|iframe|source)[^>]* src="(?:https?:)?//|<link[^>]* href="(?:https?:)?//|@import|url\(["\']?https?:'
    )
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert loads.search(page.read_text()) is None, page.relative_to(site)


def test_the_python_reference_shows_what_it_names(site):
    page = (site / "python.html").read_text()
    for name in re.findall(r"^::: (\S+)", (ROOT / "docs/python.md").read_text(), re.MULTILINE):
        assert f'id="{name}"' in page, name
    assert 'id="axn_ray.client.AxnClient.search"' in page


def literals():
    """Every piece of text in the code, f-strings with … for what they fill in."""
    for folder in ("axn_ray", "serve_app", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_every_error_that_troubleshooting_quotes_is_one_of_the_code():
    code = "\n".join(re.sub(r"%[ds]|…+", "…", text) for text in literals())
    quoted = [text for document, text in inline_code() if document == TROUBLES and ("…" in text or "; " in text)]
    assert len(quoted) > 30
    for text in quoted:
        for piece in re.split("…|; ", text):
            assert piece.strip() in code or not piece.strip(), f"{text!r}: no error says {piece!r}"
