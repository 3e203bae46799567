import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from axn_ray.cli import app
from axn_ray.core.corpus import read_items, read_queries
from axn_ray.core.corpus_export import export_corpus
from axn_ray.core.corpus_import import ImportCorpusConfig, import_corpus
from axn_ray.core.embedded_corpus import read_splits
from axn_ray.errors import ArtifactError, InputError

CORPUS = [
    {"_id": "d1", "title": "Run", "text": "move fast"},
    {"_id": "d2", "title": "", "text": "shut – closed"},
    {"_id": "d3", "title": "Bank", "text": "by a\triver", "metadata": {"url": "x"}},
]
QUERIES = [{"_id": "q1", "text": "he ran"}, {"_id": "q2", "text": "it is shut"}, {"_id": "q3", "text": "a river"}]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def imported(source, out, **settings):
    manifest = import_corpus(source, ImportCorpusConfig(**settings), out)
    items, queries = read_items(out / "items.parquet"), read_queries(out / "queries.parquet")
    assert manifest.counts["items"] == len(items)
    assert manifest.counts["queries"] == len(queries)
    bad = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert manifest.counts["quarantined"] == len(bad)
    qrels = [tuple(row.values()) for row in pq.read_table(out / "qrels.parquet").to_pylist()]
    assert manifest.counts["qrels"] == len(qrels)
    return items, queries, qrels, {row["place"]: row["reason"] for row in bad}


@pytest.fixture
def beir_folder(tmp_path):
    folder = tmp_path / "scifact"
    write_lines(folder / "corpus.jsonl", CORPUS)
    write_lines(folder / "queries.jsonl", QUERIES)
    header = "query-id\tcorpus-id\tscore"
    write_lines(folder / "qrels" / "test.tsv", [header, "q1\td1\t1", "q3\td2\t1", "q3\td3\t2"])
    write_lines(folder / "qrels" / "dev.tsv", [header, "q2\td2\t1"])
    return folder


EXPECTED_QRELS = [("q2", "d2", 1, "dev"), ("q1", "d1", 1, "test"), ("q3", "d2", 1, "test"), ("q3", "d3", 2, "test")]


def test_beir_folder(beir_folder, tmp_path):
    items, queries, qrels, bad = imported(beir_folder, tmp_path / "out")
    assert items.full_texts == ["Run: move fast", "shut – closed", "Bank: by a\triver"]
    assert queries.labels == ("d1", "d2", "d3")
    assert qrels == EXPECTED_QRELS
    assert bad == {}
    assert read_splits(tmp_path / "out" / "queries.parquet", queries) is None  # no train queries: splits are drawn later


def test_splits_stand_where_both_train_and_test_have_queries(beir_folder, tmp_path):
    write_lines(beir_folder / "queries.jsonl", [*QUERIES, {"_id": "q4", "text": "unjudged"}])
    _, queries, _, _ = imported(beir_folder, tmp_path / "out")
    assert read_splits(tmp_path / "out" / "queries.parquet", queries) == ("test", "dev", "test", "train")
    assert queries.labels is None  # one has none


def write_hub(folder, qrels):
    """The same in Parquet as the hub has it; `qrels` (query, item, relevance, split)."""
    for name, rows in (("corpus", [{k: row[k] for k in ("_id", "title", "text")} for row in CORPUS]), ("queries", QUERIES)):
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows[:2]), folder / name / f"{name}-00000-of-00002.parquet")
        pq.write_table(pa.Table.from_pylist(rows[2:]), folder / name / f"{name}-00001-of-00002.parquet")
    (folder / "default").mkdir()
    for split in ("dev", "test"):
        rows = [{"query-id": q, "corpus-id": d, "score": float(r)} for q, d, r, s in qrels if s == split]
        pq.write_table(pa.Table.from_pylist(rows), folder / "default" / f"{split}-00000-of-00001.parquet")
    return folder


def test_the_same_in_parquet(beir_folder, tmp_path):
    from_hub = imported(write_hub(tmp_path / "hub", EXPECTED_QRELS), tmp_path / "a")
    from_folder = imported(beir_folder, tmp_path / "b")
    assert from_hub[0].fingerprint == from_folder[0].fingerprint
    assert from_hub[1].fingerprint == from_folder[1].fingerprint
    assert from_hub[2] == from_folder[2]


def test_bad_lines_are_counted_and_named_and_the_others_are_kept(beir_folder, tmp_path):
    with (beir_folder / "corpus.jsonl").open("ab") as stream:
        stream.write(
            b'{"_id": "d1", "text": "again"}\n\n{"_id": "d9", "text": " "}\n{"text": "no id"}\n{"_id": "cut\n[1]\n\xff\n'
        )
    write_lines(beir_folder / "qrels" / "train.tsv", ["query-id\tcorpus-id\tscore", "q1\td1", "q7\td1\t1", "q1\td7\t1"])
    items, _, qrels, bad = imported(beir_folder, tmp_path / "out")
    assert items.ids == ("d1", "d2", "d3")
    assert qrels == EXPECTED_QRELS
    assert bad["corpus.jsonl:4"] == "item_id 'd1' stood before"
    assert bad["corpus.jsonl:6"] == "no text"
    assert bad["corpus.jsonl:7"] == "no item_id"
    assert bad["corpus.jsonl:8"].startswith("no JSON (")
    assert bad["corpus.jsonl:9"] == "the line holds no JSON object"
    assert bad["corpus.jsonl:10"] == "the line is not UTF-8"
    assert bad["train.tsv:2"].startswith("no judgement")
    assert bad["train.tsv:3"] == "judges query 'q7', which is not there"
    assert bad["train.tsv:4"] == "judges item 'd7', which is not there"
    assert len(bad) == 9


def test_a_refused_import_leaves_nothing_and_spares_what_was_there(beir_folder, tmp_path):
    out = tmp_path / "out"
    imported(beir_folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write_lines(beir_folder / "corpus.jsonl", [*CORPUS, "no", "no", "no"])
    with pytest.raises(InputError, match=r"more than 2 lines cannot be used \(first: corpus.jsonl:4: no JSON"):
        import_corpus(beir_folder, ImportCorpusConfig(max_quarantined=2), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scifact"]
    write_lines(beir_folder / "corpus.jsonl", [])
    with pytest.raises(InputError, match="has no items that can be used"):
        import_corpus(beir_folder, ImportCorpusConfig(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_ms_marco(tmp_path):
    folder = tmp_path / "marco"
    write_lines(folder / "collection.tsv.gz", ["0\tThe river bank.", '1\tHe said "run" \\ twice', "2\ttoo\tmany", "3"])
    write_lines(folder / "queries.train.tsv", ["10\twho ran"])
    write_lines(folder / "queries.dev.small.tsv", ["11\twhat is a bank"])
    write_lines(folder / "qrels.train.tsv", ["10 0 1 1"])
    write_lines(folder / "qrels.dev.small.tsv", ["11\t0\t0\t1"])
    items, queries, qrels, bad = imported(folder, tmp_path / "out")
    assert items.texts == ("The river bank.", 'He said "run" \\ twice')
    assert sorted(queries.ids) == ["10", "11"]
    assert sorted(qrels) == [("10", "1", 1, "train"), ("11", "0", 1, "dev")]
    assert bad == {
        "collection.tsv.gz:3": "3 fields, 2 are due (item_id, text)",
        "collection.tsv.gz:4": "1 fields, 2 are due (item_id, text)",
    }


def test_zeshel(tmp_path):
    folder = tmp_path / "zeshel"
    documents = [
        {"document_id": "D1", "title": "Dragon", "text": "A dragon card of the first set ."},
        {"document_id": "D2", "title": "Set", "text": "one two three four five six seven"},
    ]
    write_lines(folder / "documents" / "yugioh.json", documents)
    mention = {"mention_id": "M1", "corpus": "yugioh", "context_document_id": "D2", "label_document_id": "D1"}
    mentions = [mention | {"start_index": 2, "end_index": 3}, mention | {"mention_id": "M2", "start_index": 6, "end_index": 7}]
    write_lines(folder / "mentions" / "test.json", [*mentions, mention | {"mention_id": "M3", "context_document_id": "D9"}])
    items, queries, _, bad = imported(folder, tmp_path / "out", context_words=2)
    assert items.full_texts[0] == "Dragon: A dragon card of the first set ."
    assert queries.texts == ("one two [START] three four [END] five six",)
    assert queries.labels == ("D1",)
    assert read_items(tmp_path / "out" / "items.parquet", ["yugioh"]).ids == items.ids
    assert bad == {
        "test.json:2": "words 6 to 7 are not in its context document of 7 words",
        "test.json:3": "its context document is not there",
    }


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "tsv"])
def test_any_table_with_named_columns_and_a_template(tmp_path, ending):
    items = [{"sku": n, "name": name, "about": about} for n, (name, about) in enumerate([("pen", "blue"), ("cup", "red")])]
    queries = [{"query_id": "a", "text": "something blue"}]
    for name, rows in (("items", items), ("queries", queries)):
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        else:
            header = ["\t".join(rows[0])] if ending == "tsv" else []
            lines = ["\t".join(map(str, row.values())) for row in rows] if ending == "tsv" else rows
            write_lines(tmp_path / f"{name}.{ending}", header + lines)
    write_lines(tmp_path / "judged.qrels", ["a 0 1 0", "a  0  0  3"])
    settings = {"item_id": "sku", "item_text": "a {name}, {about}", "qrels": tmp_path / "judged.qrels"}
    read, asked, qrels, bad = imported(
        tmp_path / f"items.{ending}", tmp_path / "out", queries=tmp_path / f"queries.{ending}", **settings
    )
    assert (read.ids, read.texts) == (("0", "1"), ("a pen, blue", "a cup, red"))
    assert asked.labels == ("0",)
    assert [row[:3] for row in qrels] == [("a", "1", 0), ("a", "0", 3)]
    assert bad == {}
    with pytest.raises(InputError, match="has no items that can be used .*needs 'colour', the row has sku, name, about"):
        imported(
            tmp_path / f"items.{ending}",
            tmp_path / "no",
            queries=tmp_path / f"queries.{ending}",
            item_id="sku",
            item_text="{colour}",
        )


def test_beir_there_and_back(beir_folder, tmp_path):
    first = imported(beir_folder, tmp_path / "a")
    export_corpus(tmp_path / "a", tmp_path / "beir")
    again = imported(tmp_path / "beir", tmp_path / "b")
    assert again[0].fingerprint == first[0].fingerprint
    assert again[1] == first[1]
    assert again[2] == first[2]
    with pytest.raises(InputError, match="is not empty"):
        export_corpus(tmp_path / "a", tmp_path / "beir")
    with pytest.raises(ArtifactError, match="is not a finished corpus artifact"):
        export_corpus(tmp_path / "beir", tmp_path / "c")


def test_judgements_without_a_split_join_those_of_test_when_they_leave(beir_folder, tmp_path):
    write_lines(beir_folder / "qrels" / "trial.tsv", ["query-id\tcorpus-id\tscore", "q2\td2\t1"])
    first = imported(beir_folder, tmp_path / "a")
    export_corpus(tmp_path / "a", tmp_path / "beir")
    assert sorted(path.name for path in (tmp_path / "beir/qrels").iterdir()) == ["dev.tsv", "test.tsv"]
    again = imported(tmp_path / "beir", tmp_path / "b")[2]
    assert {row[:3] for row in again} == {row[:3] for row in first[2]} and len(again) == 5


def test_labels_leave_as_judgements_where_there_are_no_others(tmp_path):
    write_lines(tmp_path / "items.jsonl", [{"item_id": "d1", "text": "x"}, {"item_id": "d2", "text": "y"}])
    queries = [{"query_id": "q1", "text": "a", "item_id": "d2"}, {"query_id": "q2", "text": "b", "item_id": "d1"}]
    write_lines(tmp_path / "queries.jsonl", queries)
    imported(tmp_path / "items.jsonl", tmp_path / "a", queries=tmp_path / "queries.jsonl")
    export_corpus(tmp_path / "a", tmp_path / "beir")
    assert imported(tmp_path / "beir", tmp_path / "b")[2] == [("q1", "d2", 1, "test"), ("q2", "d1", 1, "test")]


def test_half_an_emoji_is_quarantined(beir_folder, tmp_path):
    write_lines(beir_folder / "corpus.jsonl", [*CORPUS, '{"_id": "d4", "text": "cut \\ud83d"}'])
    items, _, _, bad = imported(beir_folder, tmp_path / "out")
    assert items.ids == ("d1", "d2", "d3")
    assert bad["corpus.jsonl:4"] == "text holds half a character, which is no Unicode"


def test_a_grade_that_is_no_whole_number_is_quarantined(tmp_path):
    qrels = [("q2", "d2", 1, "dev"), ("q1", "d1", 0.7, "test"), ("q1", "d2", float("nan"), "test")]
    _, _, kept, bad = imported(write_hub(tmp_path / "hub", qrels), tmp_path / "out")
    assert kept == qrels[:1]
    assert list(bad.values()) == ["the relevance 0.7 is no whole number", "the relevance nan is no whole number"]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """64 MB of items; 4096 of them at a time are 16 MB of text."""
    text = "x" * 4000
    write_lines(tmp_path / "items.jsonl", ({"item_id": str(n), "text": f"{n} {text}"} for n in range(16_000)))
    write_lines(tmp_path / "queries.jsonl", [{"query_id": "a", "text": "b"}])
    tracemalloc.start()
    try:
        manifest = import_corpus(
            tmp_path / "items.jsonl", ImportCorpusConfig(queries=tmp_path / "queries.jsonl"), tmp_path / "out"
        )
        assert tracemalloc.get_traced_memory()[1] < 45e6
    finally:
        tracemalloc.stop()
    assert manifest.counts["items"] == 16_000


def test_the_command_line(beir_folder, tmp_path):
    done = CliRunner().invoke(app, ["import", str(beir_folder), "--out", str(tmp_path / "corpus")])
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "corpus"))
    done = CliRunner().invoke(app, ["export", str(tmp_path / "corpus"), "--out", str(tmp_path / "beir")])
    assert done.exit_code == 0
    done = CliRunner().invoke(app, ["import", str(tmp_path / "beir" / "qrels"), "--out", str(tmp_path / "x")])
    assert done.exit_code == 1
    assert "name its format, or give a file of items" in done.output
