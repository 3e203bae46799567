import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axn_ray.core.corpus import Items, read_items, read_queries
from axn_ray.core.embedded_corpus import read_splits
from axn_ray.errors import InputError


@pytest.fixture
def items_file(tmp_path):
    path = tmp_path / "items.parquet"
    columns = {"item_id": ["a", "b", "c"], "title": ["A", "", None], "text": ["x", "y", "z"]}
    pq.write_table(pa.table({**columns, "world": ["verb.motion", "verb", "verbose"]}), path)
    return path


def test_reads_parquet_with_titles_and_worlds(items_file):
    items = read_items(items_file)
    assert items.full_texts == ["A: x", "y", "z"]
    assert read_items(items_file, ["verb"]).ids == ("a", "b")
    assert read_items(items_file, ["verbose", "verb.motion"]).ids == ("a", "c")


def test_items_match_what_is_wanted_of_their_columns(tmp_path):
    columns = {"world": ["verb", "noun", None, "verb"], "year": [1, 2, 1, 1], "tags": [["a"], [], [], []]}
    pq.write_table(pa.table({"item_id": list("abcd"), "text": list("wxyz"), **columns}), tmp_path / "items.parquet")
    items = read_items(tmp_path / "items.parquet")
    assert items.match({}).tolist() == [True] * 4
    assert items.match({"world": ["verb", "adverb"]}).tolist() == [True, False, False, True]
    assert items.match({"world": ["verb", "noun"], "year": ["2"]}).tolist() == [False, True, False, False]
    with pytest.raises(InputError, match="no column 'tags' to filter by; their columns: world, year"):
        items.match({"tags": ["a"]})


def test_reads_jsonl_and_tsv_like_parquet(items_file, tmp_path):
    rows = [{"item_id": "a", "title": "A", "text": "x"}, {"item_id": "b", "text": 'say "y'}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "items.tsv").write_text('item_id\ttitle\ttext\na\tA\tx\nb\t\tsay "y\n')
    jsonl, tsv = read_items(tmp_path / "items.jsonl"), read_items(tmp_path / "items.tsv")
    assert jsonl.full_texts == tsv.full_texts == ["A: x", 'say "y']
    assert jsonl.fingerprint == tsv.fingerprint != read_items(items_file).fingerprint


def test_numeric_ids_become_strings(tmp_path):
    pq.write_table(pa.table({"query_id": [7], "text": ["seven"], "split": ["train"]}), tmp_path / "q.parquet")
    (tmp_path / "q.jsonl").write_text('{"query_id": 7, "text": "seven", "split": "train"}\n')
    for path in (tmp_path / "q.parquet", tmp_path / "q.jsonl"):
        assert (queries := read_queries(path)).ids == ("7",)
        assert read_splits(path, queries) == ("train",)


def test_text_stays_as_it_was_written_whatever_it_looks_like(tmp_path):
    rows = [("007", "1984", "1.50", "1"), ("1e5", "2001", "2020-01-02", "2"), ("12345678901234567891", "0", "true", "2")]
    names = ("item_id", "title", "text", "world")
    (tmp_path / "items.tsv").write_text("".join("\t".join(row) + "\n" for row in (names, *rows)))
    (tmp_path / "dates.jsonl").write_text('{"item_id": "2020-01-02", "text": "2020-01-02T10:00:00Z"}\n')
    items = read_items(tmp_path / "items.tsv")
    assert list(zip(items.ids, items.titles, items.texts, items.columns["world"].to_pylist(), strict=True)) == rows
    assert read_items(tmp_path / "items.tsv", ["2"]).ids == ("1e5", "12345678901234567891")
    dates = read_items(tmp_path / "dates.jsonl")
    assert (dates.ids, dates.texts) == (("2020-01-02",), ("2020-01-02T10:00:00Z",))


def test_numbers_with_fractions_are_no_ids(tmp_path):
    pq.write_table(pa.table({"item_id": [1.0, 2.0], "text": ["x", "y"]}), tmp_path / "items.parquet")
    with pytest.raises(InputError, match="'item_id' holds double values; write them as text"):
        read_items(tmp_path / "items.parquet")


def test_only_what_is_read_has_to_be_text(tmp_path):
    nothing = pa.array([float("nan"), None], pa.float64())  # as pandas writes a column without a value
    others = {"title": nothing, "world": [["a"], ["b"]], "split": [0.5, 0.5], "query_id": [{"a": 1}, {"a": 2}]}
    pq.write_table(pa.table({"item_id": ["a", "b"], "text": ["x", "y"], **others}), tmp_path / "items.parquet")
    assert read_items(tmp_path / "items.parquet").full_texts == ["x", "y"]
    with pytest.raises(InputError, match="column 'world' holds list.* values; write them as text"):
        read_items(tmp_path / "items.parquet", ["a"])
    pq.write_table(pa.table({"item_id": [b"\xff"], "text": ["x"]}), tmp_path / "binary.parquet")
    with pytest.raises(InputError, match="'item_id' holds binary values that are no text; write them in UTF-8"):
        read_items(tmp_path / "binary.parquet")


def test_a_long_line_of_jsonl_is_read(tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "a", "text": "word " * 500_000}) + "\n")
    assert len(read_items(tmp_path / "items.jsonl").texts[0]) == 2_500_000


def test_queries_by_split_and_labels(tmp_path):
    path = tmp_path / "q.parquet"
    pq.write_table(
        pa.table({"query_id": ["1", "2"], "text": ["p", "q"], "item_id": ["a", "b"], "split": ["train", "test"]}), path
    )
    queries = read_queries(path, split="test")
    assert (queries.ids, queries.labels) == (("2",), ("b",))
    with pytest.raises(InputError, match="no queries in the split 'dev'"):
        read_queries(path, split="dev")


def test_duplicate_ids_are_named():
    with pytest.raises(InputError, match="id 'a' stands in rows 0 and 2"):
        Items(("a", "b", "a"), ("", "", ""), ("x", "y", "z"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("item_id\ttext\n", "holds no items"),
        ("item_id\ttext\na\t\n", "text of row 0 is empty"),
        ("id\ttext\na\tx\n", "has no column 'item_id'"),
        ("item_id\ttext\na\tx\ty\n", "cannot be read as tsv"),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "items.tsv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_items(path)


def test_truncated_parquet_missing_file_and_foreign_ending(items_file, tmp_path):
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(items_file.read_bytes()[:-20])
    with pytest.raises(InputError, match="may be truncated"):
        read_items(cut)
    with pytest.raises(InputError, match="does not exist"):
        read_items(tmp_path / "none.parquet")
    (tmp_path / "items.csv").write_text("x")
    with pytest.raises(InputError, match="ends in '.csv'"):
        read_items(tmp_path / "items.csv")


def test_unknown_world_names_the_known_ones(items_file):
    with pytest.raises(InputError, match="no rows in the worlds noun; it has verb"):
        read_items(items_file, ["noun"])


def test_an_item_without_a_world_is_in_none(tmp_path):
    pq.write_table(pa.table({"item_id": ["a", "b"], "text": ["x", "y"], "world": [None, "verb"]}), tmp_path / "items.parquet")
    assert read_items(tmp_path / "items.parquet", ["verb"]).ids == ("b",)
    with pytest.raises(InputError, match="no rows in the worlds noun; it has verb"):
        read_items(tmp_path / "items.parquet", ["noun"])
