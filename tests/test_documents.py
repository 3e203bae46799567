"""The documents' examples: each `axn` command is one that the command line takes, and the road that they show is walked."""

import itertools
import json
import re
import shlex

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from axn_ray import sample
from axn_ray.cli import app
from axn_ray.core.corpus import read_items
from tests.documents import DOCUMENTS, ROOT, examples, inline_code, shell_commands

GROUP = typer.main.get_command(app)
OPTIONS = {
    name: {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
    for name, command in GROUP.commands.items()
}
ANY_OPTION = set().union(*OPTIONS.values(), {"--version"})
BASH = examples("bash")

N_ITEMS, SPLITS = 600, {"train": 12, "dev": 3, "test": 4}
# These are only parsed: they never end, take minutes, or need what is not here.
PARSED_ONLY = {"demo", "serve", "train-cross-encoder"}
# What no test has: a model from a hub, thousands of queries.
# Where a command names no number: each worker takes seconds to start, and other tests have several.
ONE_WORKER = {name: {"workers": 1} for name in ("embed", "score", "distill", "factorize", "search", "evaluate")}
IN_PLACE = {"BAAI/bge-reranker-base": "{cross_encoder}", "--train-queries 2000": "--train-queries 12"}


def axn_commands():
    """(where, words after `axn`) of every block's commands, those that another program starts included."""
    for example in BASH:
        for words in shell_commands(example):
            if "axn" in words[:1] or ("axn" in words and words[words.index("axn") - 1] == "--"):
                yield f"{example.document}:{example.line}", words[words.index("axn") + 1 :]


@pytest.mark.parametrize(("where", "words"), [pytest.param(w, c, id=f"{w} axn {' '.join(c)}"[:90]) for w, c in axn_commands()])
def test_the_command_line_takes_every_command_of_a_block(where, words):
    name, *rest = words
    assert name in GROUP.commands, f"{where}: there is no `axn {name}`"
    with GROUP.context_class(GROUP, info_name="axn") as context:
        GROUP.commands[name].make_context(name, rest, parent=context)  # raises for an unknown flag, value or missing path


def test_commands_and_flags_named_in_running_text_exist():
    named = 0
    for document, code in inline_code():
        words = code.split()
        flags = {re.split(r"[=.]", word)[0] for word in words if word.startswith("--")}
        if words[0] == "axn" and len(words) > 1 and words[1].islower() and not words[1].startswith("-"):
            assert words[1] in GROUP.commands, f"{document}: `{code}`"
            assert flags <= OPTIONS[words[1]], f"{document}: `{code}`"
        elif words[0].startswith("--"):
            assert flags <= ANY_OPTION, f"{document}: `{code}`"
        named += len(flags)
    assert named > 30


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    blocks = [words[1] for example in BASH for words in shell_commands(example) if words[0] == "make"]
    running = [words[1] for _, code in inline_code() if (words := code.split())[0] == "make" and len(words) > 1]
    assert {*blocks, *running} <= targets
    assert {"demo", "test"} <= set(blocks)


def test_every_link_between_documents_leads_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


@pytest.fixture
def workplace(tmp_path, tiny_cross_encoder):
    """The files that the documents' commands read: a piece of the sample, a run of another system; and what stands for what."""
    queries = pq.read_table(sample.QUERIES)
    queries = queries.filter(pc.starts_with(queries["world"], "verb"))
    queries = pa.concat_tables([queries.filter(pc.equal(queries["split"], split))[:n] for split, n in SPLITS.items()])
    items = pq.read_table(sample.ITEMS)
    items = items.filter(pc.starts_with(items["world"], "verb"))
    labelled = pc.is_in(items["item_id"], queries["item_id"].combine_chunks())
    items = pa.concat_tables([items.filter(labelled), items.filter(pc.invert(labelled))])[:N_ITEMS]
    pq.write_table(items, tmp_path / "items.parquet")
    pq.write_table(queries, tmp_path / "queries.parquet")
    ids = read_items(tmp_path / "items.parquet").ids
    train = queries.filter(pc.equal(queries["split"], "train"))["query_id"].to_pylist()
    pairs = itertools.product(train[:3], enumerate(ids[:20], 1))
    (tmp_path / "my.run").write_text("".join(f"{q} Q0 {i} {rank} {-rank} mine\n" for q, (rank, i) in pairs))
    products = [{"sku": name, "name": f"a {name}", "about": "made of brass"} for name in ("lamp", "bell")]
    (tmp_path / "products.jsonl").write_text("".join(json.dumps(product) + "\n" for product in products))
    (tmp_path / "searches.tsv").write_text("id\twords\n1\tlamp for a desk\n2\tbell for a door\n")
    places = {name: value.format(cross_encoder=tiny_cross_encoder) for name, value in IN_PLACE.items()}
    return tmp_path, places


def test_the_commands_of_the_documents_run_one_after_the_other(ray_session, workplace, monkeypatch):
    """In a folder that is not the workers', in the documents' order, each once. The hub's model is tiny, 2000 queries are 12."""
    folder, places = workplace
    monkeypatch.chdir(folder)
    walked = (words for _, words in axn_commands() if words[0] not in PARSED_ONLY)
    runs = dict.fromkeys(command for words in walked if "runs/demo" not in (command := shlex.join(words)))  # `make demo` made it
    done = set()
    for command in runs:
        text = command
        for what, instead in places.items():
            text = text.replace(what, instead)
        words = shlex.split(text)
        result = CliRunner().invoke(app, words, default_map=ONE_WORKER)
        assert result.exit_code == 0, f"axn {command}\n{result.output}"
        done.add(words[0])
    assert {"embed", "score", "factorize", "search", "evaluate", "advise", "import-scores", "export-scores"} <= done
    assert (folder / "run/test/report.html").stat().st_size > 10_000
    assert len((folder / "run/scores.run").read_text().splitlines()) == 12 * 100
