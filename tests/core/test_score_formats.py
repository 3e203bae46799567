"""Scores in and out: the bundled exact scores as a TREC run and back, bad rows in quarantine, sets that the losses accept."""

import gzip
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axn_ray import sample
from axn_ray.core import score_formats
from axn_ray.core.artifact import check_files, hash_json, locate_folder, read_manifest
from axn_ray.core.corpus import Items, Queries, read_items, read_queries
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.known_scores import KnownScores
from axn_ray.core.score_export import ExportScoresConfig, export_scores
from axn_ray.core.score_formats import read_scored_ids
from axn_ray.core.score_import import ImportScoresConfig, import_scores
from axn_ray.core.score_store import load_scores
from axn_ray.errors import ArtifactError, InputError


def embedded(items, queries):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(len(side), 4)).astype(np.float32) for side in (items, queries)]
    return EmbeddedCorpus(items, queries, ("train",) * len(queries), arrays[0], arrays[1], "some/encoder")


def small_corpus(labels=None):
    items = Items(("a", "b", "c", "d", "e"), ("", "", "see", "", ""), ("run", "walk", "look", "stand", "run"))
    return embedded(items, Queries(("1", "2", "3"), ("he ran", "she walked", "they saw"), labels))


@pytest.fixture(scope="module")
def verbs():
    return embedded(read_items(sample.ITEMS, ["verb"]), read_queries(sample.QUERIES, ["verb"]))


def imported(tmp_path, source, corpus=None, **settings):
    corpus, config = corpus or small_corpus(), ImportScoresConfig(**{"model": "theirs", **settings})
    return import_scores(corpus, source, config, tmp_path / "imported"), tmp_path / "imported"


def exported(tmp_path, scores, corpus=None, name="out.parquet", **settings):
    n = export_scores(scores, ExportScoresConfig(**settings), tmp_path / name, corpus)
    return n, tmp_path / name


def write_run(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def quarantined(folder):
    return [tuple(json.loads(line).values()) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


# --- the round trip -------------------------------------------------------------------------------------------------


def test_the_bundled_scores_as_a_run_and_back_are_the_same_to_the_last_bit(tmp_path, verbs):
    stored = load_scores(sample.EXACT_SCORES)
    n, run = exported(tmp_path, stored, name="exact.run")
    assert n == stored.matrix.n_observed == 1_376_700
    manifest, folder = imported(tmp_path, run, verbs)
    back = load_scores(folder)
    assert manifest.counts == {"pairs": n, "n_queries": 100, "n_items": 13767, "truncated": 0, "quarantined": 0}
    row_of = {query_id: row for row, query_id in enumerate(stored.query_ids)}
    np.testing.assert_array_equal(back.dense(), stored.dense()[[row_of[i] for i in back.query_ids]])
    assert back.item_ids == stored.item_ids and back.item_digests == stored.item_digests
    assert dict(zip(back.query_ids, back.query_digests, strict=True)) == dict(
        zip(stored.query_ids, stored.query_digests, strict=True)
    )
    texts = [verbs.queries.texts[verbs.queries.index_of[i]] for i in stored.query_ids[:2]]
    known = KnownScores.of([back], hash_json({"imported": "theirs"}), texts, verbs.items.full_texts)
    rows = np.repeat(np.arange(2, dtype=np.int32), 13767), np.tile(np.arange(13767, dtype=np.int32), 2)
    np.testing.assert_array_equal(known.lookup(*rows)[1].reshape(2, -1), stored.dense()[:2])


def test_float32_survives_a_run_whatever_its_size(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([bits[np.isfinite(bits)], np.float32([0.0, -0.0, 1e-45, 3.4028235e38, -3.4028235e38, 1 / 3])])
    text = score_formats.format_trec_lines("q", [str(n) for n in range(len(values))], values, "t")
    (tmp_path / "x.run").write_bytes(text)
    read = np.concatenate([piece.score for piece in read_scored_ids(tmp_path / "x.run", "trec", ())])
    np.testing.assert_array_equal(read.view(np.uint32), values.view(np.uint32))


def test_a_run_is_ranked_ties_by_item_index_and_cut_at_top(tmp_path):
    run = write_run(tmp_path / "in.run", "2 Q0 c 1 1.5 x", "2 Q0 a 2 1.5 x", "2 Q0 b 3 2 x", "1 Q0 d 1 -0.25 x")
    scores = load_scores(imported(tmp_path, run, model="their model")[1])
    n, path = exported(tmp_path, scores, name="out.run", top=2)
    assert (n, path.read_text()) == (
        3,
        "1 Q0 d 1 -0.25 their_model\n2 Q0 b 1 2 their_model\n2 Q0 a 2 1.5 their_model\n",
    )
    n, path = exported(tmp_path, scores, name="out.run.gz", tag="mine")
    assert gzip.decompress(path.read_bytes()).decode().splitlines()[3] == "2 Q0 c 3 1.5 mine"
    imported(tmp_path, path)


def test_the_run_is_what_trec_tools_read(tmp_path):
    import ir_measures

    scores = load_scores(imported(tmp_path, write_run(tmp_path / "in.run", "2 Q0 c 1 1e-7 x", "2 Q0 a 2 -3 x"))[1])
    _, path = exported(tmp_path, scores, name="out.run")
    read = [tuple(row) for row in ir_measures.read_trec_run(str(path))]
    assert read == [("2", "c", 1e-7), ("2", "a", -3.0)]


# --- import ---------------------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_quarantined_with_the_reason(tmp_path):
    lines = [
        "1 Q0 a 1 2.5 x",
        "1 Q0 a",
        "",
        "1 Q0 zz 1 1 x",
        "9 Q0 a 1 1 x",
        "1 Q0 b 1 high x",
        "1 Q0 c 1 NaN x",
        "3\tQ0\ta  1 -inf x",
    ]
    manifest, folder = imported(tmp_path, write_run(tmp_path / "in.run", *lines, "  3 Q0 b 1 +1.5e1 x\r"))
    scores = load_scores(folder)
    assert [a.tolist() for a in (scores.matrix.query_index, scores.matrix.item_index, scores.matrix.scores)] == [
        [0, 1],
        [0, 1],
        [2.5, 15.0],
    ]
    assert scores.query_ids == ("1", "3")
    assert sorted(quarantined(folder), key=lambda failure: failure[2]) == [
        ("", "", "row 2: 3 fields, a line of a TREC run has 6"),
        ("1", "zz", "row 4: item 'zz' is not in the corpus"),
        ("9", "a", "row 5: query '9' is not in the corpus"),
        ("", "", "row 6: the score 'high' is no number"),
        ("1", "c", "row 7: the score is nan"),
        ("3", "a", "row 8: the score is -inf"),
    ]
    assert manifest.counts["quarantined"] == 6
    check_files(folder, read_manifest(folder, "scores"))


def test_the_artifact_says_where_it_comes_from(tmp_path):
    corpus = small_corpus()
    _, folder = imported(tmp_path, write_run(tmp_path / "in.run", "2 Q0 a 1 1 x", "1 Q0 b 1 2 x"), corpus)
    scores = load_scores(folder)
    assert scores.config["fingerprint"] == {"imported": "theirs"} and scores.config["imported_from"] == "in.run"
    assert str(tmp_path) not in (folder / "manifest.json").read_text()
    assert scores.made_from == {
        "items": corpus.items.fingerprint,
        "queries": corpus.queries.take([0, 1]).fingerprint,
        "cross_encoder": hash_json({"imported": "theirs"}),
    }
    assert not (folder / "quarantine.jsonl").exists()


@pytest.mark.parametrize(
    "columns",
    [
        {"query_id": [2, 1], "item_id": ["a", "b"], "score": [1, 2]},
        {"query_id": pa.array(["2", "1"]).dictionary_encode(), "item_id": ["a", "b"], "score": [Decimal("1.0"), Decimal("2.0")]},
        {"query_id": pa.array(["2", "1"], pa.large_string()), "item_id": ["a", "b"], "score": pa.array([1, 2], pa.float16())},
    ],
)
def test_parquet_of_any_kind_of_ids_and_numbers(tmp_path, columns):
    pq.write_table(pa.table({**columns, "other": ["x", "y"]}), tmp_path / "in.parquet")
    scores = load_scores(imported(tmp_path, tmp_path / "in.parquet")[1])
    assert (scores.query_ids, scores.matrix.item_index.tolist(), scores.matrix.scores.tolist()) == (("1", "2"), [1, 0], [2, 1])


def test_parquet_with_other_names_nulls_and_numbers_beyond_float32(tmp_path):
    table = pa.table({"q": ["1", None, "1", "1"], "d": ["a", "a", None, "b"], "s": [0.1, 1, 1, 1e300], "score": ["x"] * 4})
    pq.write_table(table, tmp_path / "in.parquet")
    names = {"query_column": "q", "item_column": "d", "score_column": "s"}
    _, folder = imported(tmp_path, tmp_path / "in.parquet", **names)
    assert load_scores(folder).matrix.scores.tolist() == [np.float32(0.1)]
    assert [f[2] for f in quarantined(folder)] == [
        "row 2: query '' is not in the corpus",
        "row 3: item '' is not in the corpus",
        "row 4: the score is inf",
    ]
    with pytest.raises(InputError, match="column 'score' holds string values"):
        imported(tmp_path, tmp_path / "in.parquet", **{**names, "score_column": "score"})
    with pytest.raises(InputError, match=r"has no column 'query_id' \(it has q, d, s, score\)"):
        imported(tmp_path, tmp_path / "in.parquet")


def test_shards_hold_whole_queries_and_pieces_of_a_file_change_nothing(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    items = Items(tuple(f"i{n}" for n in range(30)), ("",) * 30, tuple(f"item {n}" for n in range(30)))
    corpus = embedded(items, Queries(tuple(f"q{n}" for n in range(20)), tuple(f"query {n}" for n in range(20))))
    expected = np.full((20, 30), np.nan, dtype=np.float32)
    expected.ravel()[rng.permutation(600)[:250]] = rng.normal(size=250)
    expected[7] = np.nan
    lines = [f"q{q} Q0 i{i} 1 {expected[q, i]} x" for q, i in rng.permutation(np.argwhere(~np.isnan(expected)))]
    run = write_run(tmp_path / "in.run", *lines)
    fields = [line.split() for line in lines]
    columns = {"query_id": [f[0] for f in fields], "item_id": [f[2] for f in fields], "score": [float(f[4]) for f in fields]}
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=40)
    monkeypatch.setattr(score_formats, "BATCH_BYTES", 64)
    monkeypatch.setattr(score_formats, "BATCH_ROWS", 7)
    for source in (run, tmp_path / "in.parquet"):
        manifest, folder = imported(tmp_path, source, corpus, shard_pairs=40)
        shards = [pq.read_table(path) for path in sorted((folder / "shards").glob("*.parquet"))]
        assert len(shards) in (5, 6, 7)
        queries = [set(shard["query_index"].to_pylist()) for shard in shards]
        assert sum(len(some) for some in queries) == len(set.union(*queries)) == manifest.counts["n_queries"] == 19
        scores = load_scores(folder)
        found = np.full((20, 30), np.nan, dtype=np.float32)
        rows = np.array([int(i[1:]) for i in scores.query_ids])[scores.matrix.query_index]
        found[rows, scores.matrix.item_index] = scores.matrix.scores
        np.testing.assert_array_equal(found, expected)


def test_rows_are_counted_through_all_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(score_formats, "BATCH_BYTES", 30)
    run = write_run(tmp_path / "in.run", "1 Q0 a 1 1 x", "1 Q0 b 1 1 x", "", "1 Q0 c 1 1 x", "nonsense", "2 Q0 y 1 1 x")
    _, folder = imported(tmp_path, run)
    assert [reason for _, _, reason in quarantined(folder)] == [
        "row 5: 1 fields, a line of a TREC run has 6",
        "row 6: item 'y' is not in the corpus",
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1 Q0 a 1 1 x", "2 Q0 a 1 1 x", "1 Q0 a 1 3 x"], r"has 1 pairs more than once \(first: query '1', item 'a'\)"),
        (["8 Q0 a 1 1 x"], r"no score that can be used \(first: row 1: query '8' is not in the corpus\)"),
        ([], "no score that can be used; check"),
    ],
)
def test_files_that_are_refused_leave_nothing(tmp_path, lines, message):
    run = write_run(tmp_path / "in.run", *lines)
    with pytest.raises(InputError, match=message):
        imported(tmp_path, run)
    assert [path.name for path in tmp_path.iterdir()] == ["in.run"]


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(InputError, match="none.run does not exist"):
        imported(tmp_path, tmp_path / "none.run")
    pq.write_table(pa.table({"query_id": ["1"], "item_id": ["a"], "score": [1.0]}), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    for name, damaged in [
        ("cut.parquet", content[:-20]),
        ("parquet.run", content + b"\xff\xfe"),
        ("cut.run.gz", gzip.compress(b"1 Q0 a 1 1 x\n" * 99)[:-20]),
        ("no.run.gz", b"1 Q0 a 1 1 x\n"),
    ]:
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name} cannot be read as"):
            imported(tmp_path, tmp_path / name)
    assert not (tmp_path / "imported").exists()


def test_it_gives_up_when_too_much_is_bad_and_never_replaces_what_is_not_ours(tmp_path):
    run = write_run(tmp_path / "in.run", "1 Q0 a 1 1 x", "1 Q0 y 1 1 x", "1 Q0 z 1 1 x")
    with pytest.raises(InputError, match=r"more than 1 rows of .*in.run cannot be used \(first: row 2: item 'y'"):
        imported(tmp_path, run, max_quarantined=1)
    imported(tmp_path, run, max_quarantined=2)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="is not an axn-ray artifact"):
        import_scores(small_corpus(), run, ImportScoresConfig(model="m"), tmp_path / "home")


def test_an_object_store_holds_it_as_well(tmp_path):
    run = write_run(tmp_path / "in.run", "1 Q0 a 1 0.5 x", "1 Q0 zz 1 1 x")
    out = locate_folder("memory://store/scores")
    import_scores(small_corpus(), run, ImportScoresConfig(model="m"), out)
    assert load_scores(out).matrix.scores.tolist() == [0.5]
    with pytest.raises(ArtifactError, match="is not empty"):
        import_scores(small_corpus(), run, ImportScoresConfig(model="m"), out)
    export_scores(load_scores(out), ExportScoresConfig(), locate_folder("memory://store/out.run"))
    assert locate_folder("memory://store/out.run").read_text() == "1 Q0 a 1 0.5 m\n"


# --- training sets --------------------------------------------------------------------------------------------------

LINES = [
    *("1 Q0 a 1 1 x", "1 Q0 b 1 4 x", "1 Q0 c 1 3 x", "1 Q0 d 1 0 x", "1 Q0 e 1 1 x"),
    *("2 Q0 b 1 2 x", "2 Q0 c 1 1 x", "2 Q0 d 1 0 x"),
    *("3 Q0 c 1 2 x", "3 Q0 d 1 1 x"),
]


@pytest.fixture
def scores(tmp_path):
    return load_scores(imported(tmp_path, write_run(tmp_path / "in.run", *LINES))[1])


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_hard_negatives_of_labels_are_the_highest_scored_others_but_not_the_same_text(tmp_path, scores, caplog):
    corpus = small_corpus(("a", "a", "c"))
    n, path = exported(tmp_path, scores, corpus, format="hard_negatives", negatives=3)
    expected = {"query": "he ran", "positive": "run", "negative_1": "walk", "negative_2": "see: look", "negative_3": "stand"}
    assert (n, rows_of(path)) == (1, [{**expected, "label": [1, 4, 3, 0]}])  # item e reads "run", like the positive
    assert "2 of 3 queries are left out: 1 because their labelled item has no score, 1 because they have fewer" in caplog.text
    described = json.loads(pq.read_schema(path).metadata[b"axn_ray"])
    assert described == {"positives": "label", "label": "scores", "cross_encoder": {"imported": "theirs"}}
    _, path = exported(tmp_path, scores, corpus, format="hard_negatives", negatives=1, label="margins", min_margin=0.5)
    assert [(row["positive"], row["negative_1"], row["label"]) for row in rows_of(path)] == [
        ("run", "stand", [1.0]),
        ("see: look", "stand", [1.0]),
    ]


def test_without_labels_the_best_item_is_the_positive_and_the_file_says_so(tmp_path, scores):
    for corpus, settings in [(small_corpus(), {}), (small_corpus(("a", "a", "c")), {"positives": "best"})]:
        n, path = exported(tmp_path, scores, corpus, format="hard_negatives", negatives=2, **settings)
        assert [(r["positive"], r["negative_1"], r["negative_2"], r["label"]) for r in rows_of(path)] == [
            ("walk", "see: look", "run", [4, 3, 1]),
            ("walk", "see: look", "stand", [2, 1, 0]),
        ]
        assert json.loads(pq.read_schema(path).metadata[b"axn_ray"])["positives"] == "best"


def test_pairs_are_all_scored_pairs_or_the_top(tmp_path, scores, monkeypatch):
    monkeypatch.setattr("axn_ray.core.score_export.BLOCK_ROWS", 3)
    n, path = exported(tmp_path, scores, small_corpus(), format="pairs")
    assert n == len(rows_of(path)) == 10
    n, path = exported(tmp_path, scores, small_corpus(), format="pairs", top=1)
    assert [tuple(row.values()) for row in rows_of(path)] == [
        ("he ran", "walk", 4.0),
        ("she walked", "walk", 2.0),
        ("they saw", "see: look", 2.0),
    ]


def test_training_sets_that_are_refused_leave_nothing(tmp_path, scores):
    changed = embedded(Items(small_corpus().items.ids, ("",) * 5, tuple("abcde")), small_corpus().queries)
    fewer = embedded(small_corpus().items, small_corpus().queries.take([0]))
    for corpus, name, settings, message in [
        (None, "o.parquet", {"format": "pairs"}, "give the embeddings artifact"),
        (small_corpus(), "o.csv", {"format": "pairs"}, r"name it so \(.parquet\)"),
        (small_corpus(), "o.parquet", {"format": "hard_negatives", "positives": "label"}, "the corpus has no labels"),
        (small_corpus(), "o.parquet", {"format": "hard_negatives", "negatives": 9}, "no query has a positive and 9 negatives"),
        (changed, "o.parquet", {"format": "pairs"}, "text of item 'a' has changed"),
        (fewer, "o.parquet", {"format": "pairs"}, "the scores hold query '2', the embeddings do not"),
        (None, "o.run", {"tag": "two words"}, "the tag 'two words' is empty or has a blank"),
    ]:
        with pytest.raises((InputError, ArtifactError), match=message):
            exported(tmp_path, scores, corpus, name=name, **settings)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        exported(tmp_path, scores, name="folder")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        exported(tmp_path, scores, name="file/out.run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "imported", "in.run"]


def batch_of(path, collator):
    """What the library's trainer would hand to a loss: the rows in the file's column order, collated."""
    return collator(rows_of(path))


@pytest.mark.parametrize("negatives", [1, 2])
@pytest.mark.parametrize("label", ["scores", "margins"])
def test_sentence_transformers_trains_cross_encoders_on_it(tmp_path, scores, tiny_cross_encoder, label, negatives):
    from sentence_transformers.cross_encoder import CrossEncoder, losses
    from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator

    model = CrossEncoder(str(tiny_cross_encoder), device="cpu")
    collator = CrossEncoderDataCollator(preprocess_fn=model.preprocess)
    settings = {"format": "hard_negatives", "negatives": negatives, "label": label}
    batch = batch_of(exported(tmp_path, scores, small_corpus(), **settings)[1], collator)
    labels, columns = batch.pop("label"), list(batch.values())
    loss = losses.MarginMSELoss(model)(columns, labels)
    logits = [model.predict(list(zip(columns[0], texts, strict=True)), activation_fn=lambda x: x) for texts in columns[1:]]
    margins = np.array([[4, 3, 1], [2, 1, 0], [2, 1, np.nan]])[: len(columns[0])]
    margins = (margins[:, :1] - margins[:, 1:])[:, :negatives]
    np.testing.assert_allclose(
        loss.item(), np.mean((np.stack([logits[0] - n for n in logits[1:]], axis=1) - margins) ** 2), rtol=1e-4
    )
    loss.backward()
    pairs = batch_of(exported(tmp_path, scores, small_corpus(), format="pairs")[1], collator)
    labels, columns = pairs.pop("label"), list(pairs.values())
    assert list(pairs) == ["query", "item"]
    loss = losses.MSELoss(model)(columns, labels)
    predicted = model.predict(list(zip(*columns, strict=True)), activation_fn=lambda x: x)
    np.testing.assert_allclose(loss.item(), np.mean((predicted - labels.numpy()) ** 2), rtol=1e-4)


@pytest.mark.parametrize("negatives", [1, 2])
def test_sentence_transformers_trains_dual_encoders_on_it(tmp_path, scores, tiny_cross_encoder, negatives):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.data_collator import BaseDataCollator
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_cross_encoder).backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    collator = BaseDataCollator(preprocess_fn=model.preprocess)
    for label, takers in [
        ("scores", [losses.MarginMSELoss(model), losses.DistillKLDivLoss(model)]),
        ("margins", [losses.MarginMSELoss(model)]),
    ]:
        settings = {"format": "hard_negatives", "negatives": negatives, "label": label}
        path = exported(tmp_path, scores, small_corpus(), **settings)[1]
        for loss in takers:
            batch = batch_of(path, collator)
            labels = batch.pop("label")
            names = ["query", "positive", *(f"negative_{n + 1}" for n in range(negatives))]
            features = [
                {key.removeprefix(f"{name}_"): value for key, value in batch.items() if key.startswith(f"{name}_")}
                for name in names
            ]
            value = loss(features, labels)
            assert np.isfinite(value.item())
            value.backward()


def test_a_file_that_was_cut_off_while_written_leaves_the_old_one(tmp_path, scores, monkeypatch):
    n, path = exported(tmp_path, scores, name="out.run")
    before = path.read_bytes()
    lines = score_formats.format_trec_lines

    def fail_at_the_third(query_id, *rest):
        if query_id == "3":
            raise OSError(28, "No space left on device")
        return lines(query_id, *rest)

    monkeypatch.setattr("axn_ray.core.score_export.format_trec_lines", fail_at_the_third)
    with pytest.raises(InputError, match="out.run cannot be written .No space left on device."):
        exported(tmp_path, scores, name="out.run", top=1)
    assert path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported", "in.run", "out.run"]
