"""The documents' examples in Python and with curl, against the running app: its 60 items are searched with 20 calls, not 100."""

import itertools
import json

import httpx
import pytest

from tests.documents import ROOT, examples, shell_commands

IN_PLACE = {"budget=100": "budget=20", '"budget": 100': '"budget": 20', '"ce_calls": 100': '"ce_calls": 20'}


def in_place(text, url):
    for what, instead in IN_PLACE.items():
        text = text.replace(what, instead)
    return text.replace("http://127.0.0.1:8000", url).replace("localhost:8000", url)


def by_document():
    return [(name, list(group)) for name, group in itertools.groupby(examples("python"), key=lambda example: example.document)]


@pytest.mark.parametrize(("document", "blocks"), [pytest.param(*pair, id=pair[0]) for pair in by_document()])
def test_python_examples(document, blocks, url, index_folder, tmp_path, monkeypatch, capsys):
    """A document's blocks run one after the other and share their names; what is on disk is the app's own index."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(index_folder)
    names = {"__name__": "example"}
    for example in blocks:
        program = "\n" * example.line + in_place(example.content, url)  # so that a traceback names the document's line
        exec(compile(program, document, "exec"), names)
    assert capsys.readouterr().out


def test_curl_examples(url):
    asked = 0
    for example in examples("bash"):
        for command in shell_commands(example):
            if command[0] == "curl":
                words = [in_place(word, url) for word in command if word not in ("-s", "-N", "-sN")]
                flags = {flag: words[words.index(flag) + 1] for flag in ("-H", "-d") if flag in words}
                (address,) = [word for word in words[1:] if word not in (*flags, *flags.values())]
                headers = dict([flags["-H"].split(": ", 1)]) if "-H" in flags else {}
                answer = httpx.request(
                    "POST" if "-d" in flags else "GET", address, headers=headers, content=flags.get("-d"), timeout=30
                )
                assert answer.status_code == 200, f"{example.document}:{example.line} {answer.text}"
                if "-d" in flags and not json.loads(flags["-d"]).get("stream"):
                    assert answer.json()
                asked += 1
    assert asked


def test_the_site_shows_the_schema_of_the_app(url):
    """To bring it up to date: `curl -s localhost:8000/openapi.json | python -m json.tool --indent 1 > docs/openapi.json`."""
    assert json.loads((ROOT / "docs/openapi.json").read_text()) == httpx.get(f"{url}/openapi.json").json()
