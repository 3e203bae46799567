"""The adapters inside the real frameworks, over the running app."""

import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from haystack import Document as HaystackDocument
from haystack import Pipeline
from haystack.utils import Secret
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from llama_index.core import QueryBundle
from llama_index.core.schema import NodeWithScore, TextNode
from pyterrier_adaptive import GAR

from axn_ray.client import AxnClient, InvalidRequestError
from axn_ray.core.adaptive import run_search
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.graph_search import gar, neighbour_graph
from axn_ray.errors import InputError
from axn_ray.integrations import haystack, langchain, llama_index, pyterrier
from tests.serve_app.scorers import known_score

QUERY = "somebody who sang on a stage"
TEXTS = ["run home", "a poison item", "walk uphill", "sing twice"]
RANKED = sorted((n for n in (0, 2, 3)), key=lambda n: -known_score("they run", TEXTS[n]))


@pytest.fixture
def backend(url):
    with AxnClient(url) as opened:
        yield opened


@pytest.fixture
def expected(backend):
    return [(hit.id, hit.text, hit.score) for hit in backend.search(QUERY, top_k=4, budget=20, rounds=4).results]


OPTIONS = {"budget": 20, "rounds": 4}


def test_langchain_retriever_in_a_chain(backend, expected):
    retriever = langchain.AxnRetriever(backend=backend, top_k=4, options=OPTIONS)
    chain = retriever | RunnableLambda(
        lambda documents: [(d.id, d.page_content, d.metadata["relevance_score"]) for d in documents]
    )
    assert chain.invoke(QUERY) == expected
    assert chain.batch([QUERY, QUERY]) == [expected, expected]


def test_langchain_compressor(backend):
    documents = [Document(page_content=text, metadata={"n": n}) for n, text in enumerate(TEXTS)]
    compressor = langchain.AxnCompressor(backend=backend, top_n=2)
    best = compressor.compress_documents(documents, "they run")
    assert [d.metadata["n"] for d in best] == RANKED[:2]
    assert [d.metadata["relevance_score"] for d in best] == pytest.approx([known_score("they run", TEXTS[n]) for n in RANKED[:2]])
    assert "relevance_score" not in documents[0].metadata
    assert compressor.compress_documents([], "they run") == []


def test_llama_index_retriever_and_postprocessor(backend, expected):
    retriever = llama_index.AxnRetriever(backend, top_k=4, options=OPTIONS)
    assert [(n.node.node_id, n.node.get_content(), n.score) for n in retriever.retrieve(QUERY)] == expected
    nodes = [NodeWithScore(node=TextNode(text=text, metadata={"n": n})) for n, text in enumerate(TEXTS)]
    postprocessor = llama_index.AxnPostprocessor(backend=backend)
    best = postprocessor.postprocess_nodes(nodes, QueryBundle("they run"))
    assert [one.node.metadata["n"] for one in best] == RANKED
    assert [one.score for one in best] == pytest.approx([known_score("they run", TEXTS[n]) for n in RANKED])
    assert postprocessor.postprocess_nodes([], query_str="they run") == []
    with pytest.raises(ValueError, match="needs a query"):
        postprocessor.postprocess_nodes(nodes)


def test_haystack_pipeline_and_what_it_writes_of_itself(url, backend, monkeypatch):
    monkeypatch.setenv("AXN_KEY", "s3cret")
    pipeline = Pipeline()
    pipeline.add_component("retriever", haystack.AxnRetriever(url, Secret.from_env_var("AXN_KEY"), top_k=4, options=OPTIONS))
    pipeline.add_component("ranker", haystack.AxnRanker(url, top_k=2))
    pipeline.connect("retriever.documents", "ranker.documents")
    written = pipeline.dumps()
    assert "s3cret" not in written
    for own in (pipeline, Pipeline.loads(written, allowed_modules=[haystack.__name__])):
        done = own.run({"retriever": {"query": QUERY}, "ranker": {"query": QUERY}}, include_outputs_from={"retriever"})
        found = done["retriever"]["documents"]
        assert [(d.id, d.content, d.score) for d in found] == [
            (h.id, h.text, h.score) for h in backend.search(QUERY, top_k=4, **OPTIONS).results
        ]
        scored = sorted((known_score(QUERY, d.content) for d in found), reverse=True)
        assert [d.score for d in done["ranker"]["documents"]] == pytest.approx(scored[:2])


def test_haystack_retriever_filters_and_counts(url, backend):
    retriever = haystack.AxnRetriever(url, top_k=9, options={**OPTIONS, "filter": {"verb": "sing"}})
    for filters, verbs in ((None, {"sing"}), ({}, {"sing"}), ({"verb": ["run", "walk"]}, {"run", "walk"})):
        found = retriever.run(QUERY, filters=filters)["documents"]
        assert {d.meta["title"] for d in found} == verbs
        wanted = backend.search(QUERY, top_k=9, **OPTIONS, filter={"verb": sorted(verbs)})
        assert [d.id for d in found] == [h.id for h in wanted.results]
    assert len(retriever.run(QUERY, top_k=4)["documents"]) == 4
    with pytest.raises(InvalidRequestError, match="top_k"):
        retriever.run(QUERY, top_k=0)
    comparison = {"field": "meta.verb", "operator": "==", "value": "run"}
    for theirs in (comparison, {"operator": "AND", "conditions": [comparison]}):
        with pytest.raises(InputError, match="no operators"):
            retriever.run(QUERY, filters=theirs)


def test_haystack_key_of_a_token_works_and_is_not_written():
    for kind in (haystack.AxnRetriever, haystack.AxnRanker):
        component = kind("http://127.0.0.1:9", Secret.from_token("s3cret"))
        with pytest.raises(ValueError, match="Cannot serialize") as caught:
            component.to_dict()
        assert "s3cret" not in str(caught.value)


def test_haystack_ranker_alone(url):
    documents = [HaystackDocument(content=text, meta={"n": n}) for n, text in enumerate(TEXTS)]
    ranker = haystack.AxnRanker(url)
    assert [d.meta["n"] for d in ranker.run("they run", documents)["documents"]] == RANKED
    assert ranker.run("they run", [])["documents"] == []
    assert [d.meta["n"] for d in ranker.run("they run", documents, top_k=1)["documents"]] == RANKED[:1]
    for top_k in (0, -1):
        with pytest.raises(InputError, match=f"top_k={top_k}"):
            ranker.run("they run", documents, top_k=top_k)


def test_pyterrier_experiment(backend, expected):
    queries = pd.DataFrame([{"qid": "1", "query": QUERY}, {"qid": "2", "query": "they burn"}])
    search = pyterrier.AxnRetriever(backend, num_results=4, options=OPTIONS)
    found = search(queries)
    assert list(found.columns) == ["qid", "query", "docno", "score", "rank", "iteration", "text"]
    first = found[found["qid"] == "1"]
    assert list(zip(first["docno"], first["text"], first["score"], strict=True)) == expected
    assert first["rank"].tolist() == [0, 1, 2, 3]
    assert set(first["iteration"]) <= {1, 2, 3, 4}
    again = (search >> pyterrier.AxnReranker(backend))(queries)
    for qid, asked in (("1", QUERY), ("2", "they burn")):
        own = again[again["qid"] == qid]
        assert sorted(own["docno"]) == sorted(found[found["qid"] == qid]["docno"])
        assert own["score"].tolist() == pytest.approx(sorted((known_score(asked, text) for text in own["text"]), reverse=True))
    qrels = pd.DataFrame([{"qid": "1", "docno": expected[1][0], "label": 1}, {"qid": "2", "docno": "none", "label": 1}])
    first_only = pyterrier.AxnRetriever(backend, num_results=1, options=OPTIONS)
    table = pt.Experiment([search, first_only], queries, qrels, [ir_measures.RR, ir_measures.R @ 4], names=["four", "one"])
    assert table.set_index("name").to_dict("index") == {"four": {"RR": 0.25, "R@4": 0.5}, "one": {"RR": 0.0, "R@4": 0.0}}


def test_pyterrier_without_queries_and_with_what_cannot_be_scored(backend):
    search, rerank = pyterrier.AxnRetriever(backend), pyterrier.AxnReranker(backend)
    assert pt.inspect.transformer_outputs(search >> rerank, ["qid", "query"]) == [
        "qid",
        "query",
        "docno",
        "score",
        "rank",
        "iteration",
        "text",
    ]
    documents = pd.DataFrame([{"qid": "1", "query": "they run", "docno": str(n), "text": text} for n, text in enumerate(TEXTS)])
    assert rerank(documents)["docno"].tolist() == [str(n) for n in RANKED]


def test_pyterrier_experiment_beside_the_authors_gar(backend, index_folder):
    """The same cross-encoder, through the app, under the same budget: theirs, their batches walked by our own, and the search."""
    corpus, measure = load_embedded_corpus(index_folder / "embeddings"), ir_measures.R @ 10
    texts, ids = corpus.items.full_texts, np.array(corpus.items.ids)
    queries = pd.DataFrame([{"qid": str(n), "query": text} for n, text in enumerate(corpus.queries.texts)])
    exact = np.array([[known_score(asked, text) for text in texts] for asked in queries["query"]])
    best = np.argsort(-exact, axis=1)[:, :10]
    qrels = pd.DataFrame([{"qid": str(n), "docno": ids[i], "label": 1} for n, row in enumerate(best) for i in row])
    near = corpus.query_embeddings @ corpus.item_embeddings.T
    rankings, graph = np.argsort(-near, axis=1, kind="stable").astype(np.int32), neighbour_graph(corpus.item_embeddings, 4)

    class Neighbours:
        def neighbours(self, docno):
            return ids[graph[corpus.items.index_of[docno]]].tolist()

    firsts = [{"qid": str(n), "docno": ids[i], "score": near[n, i]} for n, row in enumerate(rankings) for i in row[:20]]
    first_stage = pt.apply.generic(lambda asked: asked.merge(pd.DataFrame(firsts)))
    add_text = pt.apply.text(lambda one: texts[corpus.items.index_of[one["docno"]]])
    walk = GAR(add_text >> pyterrier.AxnReranker(backend), Neighbours(), num_results=20, batch_size=5)
    search = pyterrier.AxnRetriever(backend, num_results=20, options=OPTIONS)
    systems = {"gar": first_stage >> walk, "axn": search}
    ignored = {"validate": "ignore"}  # GAR does not say which columns it gives
    table = pt.Experiment([*systems.values()], queries, qrels, [measure], names=[*systems], perquery=True, **ignored)
    for query, asked in enumerate(queries["query"]):
        walked = gar(rankings[query, :20], graph, budget=20, rounds=4)
        ours = run_search(walked, lambda items, q=query: exact[q, items].astype(np.float32))
        hits = {hit.id for hit in backend.search(asked, top_k=20, **OPTIONS).results}
        shares = {"gar": np.isin(best[query], ours.item_index).mean(), "axn": np.isin(ids[best[query]], [*hits]).mean()}
        found = table[table["qid"] == str(query)].set_index("name")["value"].to_dict()
        assert found == pytest.approx(shares)
