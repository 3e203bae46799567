"""The MTEB search model in the real MTEB, where it is installed (extra `mteb`, 250 MB: not among those of `make test`)."""

import pytest

mteb = pytest.importorskip("mteb")

from datasets import Dataset  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models.models_protocols import SearchProtocol  # noqa: E402

from axn_ray.client import AxnClient  # noqa: E402
from axn_ray.errors import InputError  # noqa: E402
from axn_ray.integrations.mteb import AxnSearchModel  # noqa: E402
from tests.serve_app.conftest import N_ITEMS, PLACES, VERBS  # noqa: E402
from tests.serve_app.scorers import known_score  # noqa: E402

TEXTS = {f"i{n}": text for n, text in enumerate(f"{verb} {place}" for verb in VERBS for place in PLACES)}
QUERIES = {"q0": "they run", "q1": "who sang on a stage"}
OPTIONS = {"budget": 20, "rounds": 4}


def make_task(documents, top_ranked=None):
    """A retrieval task in memory; of each query the second-best of what the search finds is relevant."""

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="TinyVerbs" if top_ranked is None else "TinyVerbsReranking",
            description="Sixty short texts.",
            dataset={"path": "none/none", "revision": "1"},
            type="Retrieval" if top_ranked is None else "Reranking",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )
        relevant: dict = {}

        def load_data(self, num_proc=None, **_):
            split = {
                "corpus": Dataset.from_list([{"id": name, "title": "", "text": text} for name, text in documents.items()]),
                "queries": Dataset.from_list([{"id": name, "text": text} for name, text in QUERIES.items()]),
                "relevant_docs": self.relevant,
                "top_ranked": top_ranked,
            }
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Tiny()


def evaluate(model, task):
    (result,) = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
    return result.scores["test"][0]


@pytest.fixture
def model(url):
    with AxnClient(url) as backend:
        yield AxnSearchModel(backend, "tests/known-bayes-20", options=OPTIONS)


def test_mteb_judges_what_the_search_finds(model):
    assert isinstance(model, SearchProtocol)
    task = make_task(TEXTS)
    replies = {name: model.backend.search(text, top_k=20, **OPTIONS).results for name, text in QUERIES.items()}
    task.relevant = {name: {hits[1].id: 1} for name, hits in replies.items()}
    scores = evaluate(model, task)
    assert scores["mrr_at_10"] == 0.5
    assert (scores["recall_at_1"], scores["recall_at_3"]) == (0.0, 1.0)
    assert model.mteb_model_meta.experiment_kwargs == OPTIONS


def test_mteb_reranks_what_a_task_names(model):
    listed = {name: [f"i{n}" for n in range(start, start + 12)] for name, start in zip(QUERIES, (0, 20), strict=True)}
    task = make_task(TEXTS, listed)
    best = {name: max(listed[name], key=lambda item: known_score(QUERIES[name], TEXTS[item])) for name in QUERIES}
    task.relevant = {name: {item: 1} for name, item in best.items()}
    assert evaluate(model, task)["mrr_at_10"] == 1.0


def test_an_index_of_another_corpus_is_refused(model):
    model.index([{"id": "x", "text": "y"}])
    with pytest.raises(InputError, match="the task's corpus does not"):
        model.search([{"id": "q0", "text": "they run"}], top_k=N_ITEMS)
    with pytest.raises(InputError, match="is a list, not a text"):
        model.search([{"id": "q0", "text": ["a turn", "another"]}], top_k=3)
