"""The bundled corpus: the parser on a hand-made WordNet, the shipped files, and that the first makes the second."""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from axn_ray.errors import InputError
from axn_ray.sample import ITEMS, QUERIES
from axn_ray.sample import build_corpus as corpus

SYSTEM_WORDNET = Path("/usr/share/wordnet")
LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
DATA = {
    "verb": [
        '00000001 38 v 02 abandon 0 give_up 1 000 00 | leave behind; "they abandoned the ship"; "she gave up the house"; '
        '"nothing of it here"',
        "00000002 38 v 01 rest 0 000 00 | be still",
    ],
    "noun": [
        '00000003 06 n 02 court_of_law 0 tribunal 0 000 | a room for "the law" (of any kind); a seat; '
        '"two courts of law stood there"- Shakespeare; "a Tribunal"'
    ],
    "adj": ['00000004 00 s 02 handy 0 ready_to_hand(p) 0 000 | easy to reach; "a handier spot"; "it was ready to hand"'],
    "adv": ['00000005 02 r 01 well 0 000 | in a good way, "he sings well"'],
}
EXCEPTIONS = {"verb": "gave give\n", "noun": "men man\n", "adj": "handier handy\n", "adv": "best well\n"}
SMALL_QUERIES = {
    "wn30-a-00000004-0": "a [handier] spot",
    "wn30-a-00000004-1": "it was [ready to hand]",
    "wn30-n-00000003-0": "two [courts of law] stood there",
    "wn30-n-00000003-1": "a [Tribunal]",
    "wn30-r-00000005-0": "he sings [well]",
    "wn30-v-00000001-0": "they [abandoned] the ship",
    "wn30-v-00000001-1": "she [gave up] the house",
}


@pytest.fixture
def small_wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for part, lines in DATA.items():
        (folder / f"data.{part}").write_text(LICENCE + "".join(f"{line}  \n" for line in lines), encoding="latin-1")
        (folder / f"{part}.exc").write_text(EXCEPTIONS[part], encoding="latin-1")
    return folder


@pytest.fixture(scope="module")
def items():
    return {row["item_id"]: row for row in pq.read_table(ITEMS).to_pylist()}


@pytest.fixture(scope="module")
def queries():
    return pq.read_table(QUERIES).to_pylist()


def run_script(wordnet, out, seed="0"):
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "axn_ray.sample.build_corpus", "--wordnet", str(wordnet), "--out", str(out)]
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def group_of(world):
    return "verb" if world.startswith("verb.") else world


# A small WordNet with known answers.


def test_small_wordnet_gives_the_known_items(small_wordnet):
    items, _ = corpus.build(small_wordnet)
    assert items.column_names == ["item_id", "title", "text", "world"]
    assert [tuple(row.values()) for row in items.to_pylist()] == [
        ("wn30-a-00000004", "handy, ready to hand", "easy to reach", "adj.all"),
        ("wn30-r-00000005", "well", "in a good way", "adv.all"),
        ("wn30-n-00000003", "court of law, tribunal", 'a room for "the law" (of any kind); a seat', "noun.artifact"),
        ("wn30-v-00000001", "abandon, give up", "leave behind", "verb.motion"),
        ("wn30-v-00000002", "rest", "be still", "verb.motion"),
    ]


def test_small_wordnet_marks_inflected_and_multi_word_mentions_and_drops_the_rest(small_wordnet):
    _, queries = corpus.build(small_wordnet)
    assert queries.column_names == ["query_id", "text", "item_id", "world", "split"]
    assert dict(zip(queries["query_id"].to_pylist(), queries["text"].to_pylist(), strict=True)) == SMALL_QUERIES


@pytest.mark.parametrize(
    ("gloss", "definition", "examples"),
    [
        ('leave; "a b"; "c d"', "leave", ("a b", "c d")),
        ("be still; or quiet;", "be still; or quiet", ()),
        ('old ("straw" is archaic); "he strewed"', 'old ("straw" is archaic)', ("he strewed",)),
        ('be; "to be or not to be"- Shakespeare', "be", ("to be or not to be",)),
        ('drop; "a hint"; "open end', "drop", ("a hint", "open end")),
    ],
)
def test_split_gloss(gloss, definition, examples):
    assert corpus.split_gloss(gloss) == (definition, examples)


@pytest.mark.parametrize(
    ("sentence", "lemmas", "marked"),
    [
        ("he huffed and puffed", ("puff", "huff"), "he [huffed] and puffed"),
        ("they oohed and aahed", ("ooh", "aah"), "they [oohed] and aahed"),
        ("give it, then give up", ("give", "give up"), "give it, then [give up]"),
        ("ABANDONED!", ("abandon",), "[ABANDONED]!"),
        ("unabandoned ships", ("abandon",), None),
    ],
)
def test_the_longest_then_leftmost_lemma_is_marked(sentence, lemmas, marked):
    exceptions = {pos: {} for pos in "nvar"}
    assert corpus.mark_mention(sentence, lemmas, "v", exceptions) == marked
    assert corpus.mark_mention(sentence, lemmas[::-1], "v", exceptions) == marked


def test_split_sizes_and_ce_train_worlds():
    ids = [f"q{n}" for n in range(400)]
    assert Counter(corpus.split_of(ids, "verb.motion").values()) == {"test": 100, "dev": 50, "train": 250}
    assert Counter(corpus.split_of(ids[:299], "noun.food").values()) == {"test": 99, "dev": 49, "train": 151}
    assert set(corpus.split_of(ids, "adj.all").values()) == {"train"}
    assert corpus.split_of(ids[::-1], "verb.motion") == corpus.split_of(ids, "verb.motion")


def test_a_missing_wordnet_names_the_cure_in_one_sentence(tmp_path):
    with pytest.raises(InputError, match="apt-get install wordnet-base"):
        corpus.build(tmp_path / "nowhere")
    result = run_script(tmp_path / "nowhere", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_the_same_bytes_whatever_the_hash_seed_and_nothing_left_behind(small_wordnet, tmp_path):
    tie = '00000006 29 v 04 huff 0 puff 0 wave 0 roll 0 000 00 | blow; "huffed, puffed"; "waves roll"; "puff or huff"  \n'
    with (small_wordnet / "data.verb").open("a", encoding="latin-1") as file:
        file.write(tie)
    built = set()
    for seed in "0123":
        result = run_script(small_wordnet, tmp_path / seed, seed)
        assert result.returncode == 0, result.stderr
        assert sorted(path.name for path in (tmp_path / seed).iterdir()) == ["items.parquet", "queries.parquet"]
        built.add(tuple((tmp_path / seed / name).read_bytes() for name in ("items.parquet", "queries.parquet")))
    assert len(built) == 1


# The shipped files.


def test_shipped_items(items):
    assert len(items) == pq.read_metadata(ITEMS).num_rows == 117_659
    assert sum(row["world"].startswith("verb.") for row in items.values()) == 13_767
    assert all(row["title"].strip() and row["text"].strip() for row in items.values())
    order = [(row["world"], row["item_id"]) for row in items.values()]
    assert order == sorted(order)
    assert {row["world"] for row in items.values()} <= set(corpus.LEXNAMES)


def test_shipped_queries_point_at_items(items, queries):
    assert len({row["query_id"] for row in queries}) == len(queries) == 47_180
    assert all(items[row["item_id"]]["world"] == row["world"] for row in queries)
    assert all(re.fullmatch(r"[^\[\]]*\[[^\[\]]+\][^\[\]]*", row["text"]) for row in queries)
    order = [(row["world"], row["item_id"], int(row["query_id"].rsplit("-", 1)[1])) for row in queries]
    assert order == sorted(order)
    assert all(row["query_id"].startswith(row["item_id"] + "-") for row in queries)


def test_shipped_splits(queries):
    sizes = Counter((group_of(row["world"]), row["split"]) for row in queries)
    assert (sizes["verb", "test"], sizes["verb", "dev"], sizes["verb", "train"]) == (100, 50, 12_029)
    assert {row["split"] for row in queries if row["world"] in corpus.CE_TRAIN_WORLDS} == {"train"}
    groups = {}
    for row in queries:
        groups.setdefault(group_of(row["world"]), {})[row["query_id"]] = row["split"]
    assert all(corpus.split_of(list(splits), world) == splits for world, splits in groups.items())


def test_shipped_mentions_share_their_morphology_with_a_lemma(items, queries):
    # An irregular form (went, men) needs the exception lists, which are not shipped: it may fail on its own words.
    none = {pos: {} for pos in "nvar"}
    sample = random.Random(0).sample(queries, 2000)
    irregular = 0
    for row in sample:
        mention = re.search(r"\[(.+)\]", row["text"]).group(1)
        lemmas = items[row["item_id"]]["title"].split(", ")
        irregular += corpus.mark_mention(mention, lemmas, row["item_id"][5], none) != f"[{mention}]"
    assert irregular / len(sample) < 0.05


def test_shipped_files_are_small_and_hold_no_path_of_a_machine():
    assert ITEMS.stat().st_size + QUERIES.stat().st_size < 10_000_000
    assert pq.read_schema(ITEMS).metadata is None
    assert pq.read_schema(QUERIES).metadata is None


def test_rebuilding_gives_the_shipped_bytes(tmp_path):
    if not (SYSTEM_WORDNET / "data.noun").is_file():
        pytest.skip(f"{SYSTEM_WORDNET} is missing; apt-get install wordnet-base")
    result = run_script(SYSTEM_WORDNET, tmp_path)
    assert result.returncode == 0, result.stderr
    for shipped in (ITEMS, QUERIES):
        rebuilt = tmp_path / shipped.name
        assert pq.read_table(rebuilt).equals(pq.read_table(shipped)), f"{shipped.name} differs from a rebuild"
        if pq.read_metadata(rebuilt).created_by == pq.read_metadata(shipped).created_by:  # the same writer, the same bytes
            assert rebuilt.read_bytes() == shipped.read_bytes(), f"{shipped.name} has other bytes than a rebuild"
