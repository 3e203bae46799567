import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axn_ray.core.adaptive import run_search
from axn_ray.core.graph_search import gar, ladr, neighbour_graph
from axn_ray.core.metrics import exact_top_k
from axn_ray.errors import InputError, ModelError

WALKS = {
    "gar": gar,
    "ladr": lambda *parts, **numbers: ladr(*parts, depth=3, **numbers),
}


class World:
    """Random scores in coarse steps, so that ties are common, a random ranking and a random graph."""

    def __init__(self, n_items, seed, n_neighbours=3):
        rng = np.random.default_rng(seed)
        self.exact = np.round(rng.standard_normal(n_items), 1).astype(np.float32)
        self.ranking = rng.permutation(n_items).astype(np.int32)
        self.graph = neighbour_graph(rng.standard_normal((n_items, 4)).astype(np.float32), min(n_neighbours, n_items - 1))
        self.asked = []

    def score(self, chosen):
        assert chosen.dtype == np.int32 and len(chosen)
        self.asked.append(chosen.tolist())
        return self.exact[chosen]

    def search(self, walk, budget, rounds):
        return run_search(WALKS[walk](self.ranking, self.graph, budget=budget, rounds=rounds), self.score)


@st.composite
def settings_of_a_walk(draw):
    n_items = draw(st.integers(2, 60))
    budget = draw(st.integers(1, n_items))
    return draw(st.sampled_from(sorted(WALKS))), n_items, budget, draw(st.integers(1, budget)), draw(st.integers(0, 99))


@settings(deadline=None)
@given(settings_of_a_walk())
def test_the_budget_is_exact_and_no_pair_comes_twice(case):
    walk, n_items, budget, rounds, seed = case
    world = World(n_items, seed)
    result = world.search(walk, budget, rounds)
    asked = sum(world.asked, [])
    assert len(asked) == budget == result.n_ce_calls == len(set(asked))
    assert max(map(len, world.asked)) <= -(-budget // rounds)
    assert [(-s, i) for s, i in zip(result.score, result.item_index, strict=True)] == sorted((-world.exact[i], i) for i in asked)
    for item, found_in in zip(result.item_index, result.round, strict=True):
        assert item in world.asked[found_in - 1]


@settings(deadline=None)
@given(settings_of_a_walk())
def test_with_the_whole_budget_it_equals_exact_search(case):
    walk, n_items, _, rounds, seed = case
    world = World(n_items, seed)
    result = world.search(walk, n_items, rounds)
    np.testing.assert_array_equal(result.item_index, exact_top_k(world.exact, n_items))


@settings(deadline=None)
@given(settings_of_a_walk())
def test_the_same_input_gives_the_same_result(case):
    walk, n_items, budget, rounds, seed = case
    worlds = [World(n_items, seed) for _ in range(2)]
    for world in worlds:
        world.search(walk, budget, rounds)
    assert worlds[0].asked == worlds[1].asked


@settings(deadline=None)
@given(settings_of_a_walk())
def test_one_round_is_retrieve_and_rerank(case):
    walk, n_items, budget, _, seed = case
    world = World(n_items, seed)
    world.search(walk, budget, 1)
    assert world.asked == [world.ranking[:budget].tolist()]


# 14 items with 3 neighbours each: the frontier of GAR holds fewer items than a batch, LADR runs out of neighbours.
GRAPH = {
    "gar": "9 10 8, 7 2 11, 13 10 7, 0 2 10, 10 12 8, 3 9 12, 12 13 7, 2 1 12, 9 11 10, 10 12 7, 7 3 8, 0 3 10, 8 0 11, 8 2 0",
    "ladr": "11 3 8, 11 10 6, 7 6 5, 6 9 10, 12 0 10, 11 0 7, 12 13 5, 4 6 9, 13 5 11, 6 7 5, 9 7 6, 10 0 1, 10 9 8, 8 6 2",
}


def fixed_world(walk, exact, ranking):
    world = World(14, 0)
    world.exact, world.ranking = np.array(exact, np.float32), np.array(ranking, np.int32)
    world.graph = np.array([row.split() for row in GRAPH[walk].split(",")], np.int32)
    return world


@pytest.mark.parametrize(
    ("ranking", "budget", "rounds", "batches", "final"),
    [
        (
            [10, 3, 13, 2, 9, 6, 5, 8, 7, 1, 0, 11, 12, 4],
            11,
            3,
            [[10, 3, 13, 2], [7, 8, 0], [9, 6, 5, 1]],
            [10, 9, 13, 6, 7, 5, 8, 2, 1, 0, 3],
        ),
        (
            [3, 2, 0, 5, 4, 7, 13, 10, 11, 6, 9, 12, 8, 1],
            9,
            5,
            [[3, 2], [13, 10], [0, 5], [7, 8], [4]],  # the frontier holds more than a batch: the nearest go first
            [4, 10, 13, 7, 5, 8, 2, 0, 3],
        ),
    ],
)
def test_gar_scores_what_the_authors_gar_scores(ranking, budget, rounds, batches, final):
    """Batches and final order were made by `pyterrier_adaptive.GAR` 0.2.1: num_results=11, batch_size=4, and 9 and 2."""
    world = fixed_world("gar", [2, 3, 4, 0, 13, 6, 8, 7, 5, 10, 12, 1, 11, 9], ranking)
    result = world.search("gar", budget, rounds)
    assert world.asked == batches
    assert result.item_index.tolist() == final


def test_ladr_scores_what_the_authors_ladr_scores_until_it_converges():
    """The hops were made by `pyterrier_dr.flex.ladr.LadrAdaptive` 0.8.1: depth=1 over 4 seeds, without a budget.

    It scores a hop in the order of item indices; then it ends, and here the rest of the ranking follows.
    """
    world = fixed_world("ladr", [7, 0, 1, 4, 2, 6, 12, 5, 9, 3, 10, 13, 8, 11], [13, 8, 0, 10, 1, 4, 12, 11, 5, 2, 3, 6, 9, 7])
    run_search(ladr(world.ranking, world.graph, budget=14, rounds=4, depth=1), world.score)
    assert [sorted(hop) for hop in world.asked[:3]] == [[0, 8, 10, 13], [2, 6], [5, 12]]
    assert sum(world.asked[3:], []) == [1, 4, 11, 3, 9, 7]


def test_ladr_takes_the_nearest_neighbours_of_the_best_item_first():
    world = World(8, 0)
    world.exact, world.ranking = np.array([1, 2, 0, 0, 0, 0, 0, 0], np.float32), np.arange(8, dtype=np.int32)
    world.graph = np.array([[5, 4, 3], [7, 3, 6], *[[0, 1, 2]] * 6], np.int32)
    world.search("ladr", budget=6, rounds=3)
    assert world.asked == [[0, 1], [7, 3], [6, 5]]  # 1 is better than 0


@pytest.mark.parametrize("walk", sorted(WALKS))
def test_a_chain_leads_to_an_item_far_below_the_ranking(walk):
    n_items, best = 40, 34
    graph = np.minimum(np.arange(n_items, dtype=np.int32)[:, None] + 1, n_items - 1)  # i -> i + 1
    exact = np.zeros(n_items, np.float32)
    exact[30:35] = np.arange(1, 6)  # the chain climbs from item 30 to the best
    ranking = np.array([0, 30, *range(1, 30), *range(31, 40)], np.int32)
    assert best not in ranking[:22]
    result = run_search(WALKS[walk](ranking, graph, budget=22, rounds=11), lambda chosen: exact[chosen])
    assert result.item_index[0] == best


@pytest.mark.parametrize(
    ("walk", "expected"),
    [
        ("gar", [[0, 1], [10, 11], [2, 3], [12, 13]]),
        ("ladr", [[0, 1], [10, 11], [12], [2, 3], [13]]),  # goes on down the ranking where no neighbour is left
    ],
)
def test_gar_alternates_and_ladr_follows_the_best_items(walk, expected):
    world = World(20, 0)
    world.exact, world.ranking = -np.arange(20, dtype=np.float32), np.arange(20, dtype=np.int32)
    world.graph = np.stack([np.roll(world.ranking, -10), np.roll(world.ranking, -11)], axis=1)  # i -> i + 10, i + 11
    world.search(walk, budget=8, rounds=4)
    assert world.asked == expected


def test_the_graph_is_the_exact_nearest_others():
    rng = np.random.default_rng(0)
    items = rng.standard_normal((60, 8)).astype(np.float32)
    similarity = items @ items.T
    np.fill_diagonal(similarity, -np.inf)
    graph = neighbour_graph(items, 7)
    assert graph.dtype == np.int32
    np.testing.assert_array_equal(graph, np.argsort(-similarity, axis=1)[:, :7])


def test_no_item_is_its_own_neighbour_even_among_equal_ones():
    items = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    items[0] *= 0.1  # not even nearest to itself
    graph = neighbour_graph(items, 5)
    assert graph.shape == (60, 5)
    for item, neighbours in enumerate(graph.tolist()):
        assert item not in neighbours and len(set(neighbours)) == 5
        assert {n // 20 for n in neighbours} == {item // 20}


@pytest.mark.parametrize("n_neighbours", [0, 5])
def test_a_graph_needs_other_items(n_neighbours):
    with pytest.raises(InputError, match=rf"n_neighbours={n_neighbours} must lie in 1..4, the other items"):
        neighbour_graph(np.eye(5, dtype=np.float32), n_neighbours)


@pytest.mark.parametrize("walk", sorted(WALKS))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 31}, "budget=31 exceeds the 30 items in the index"),
        ({"rounds": 11}, "rounds=11 exceeds budget=10"),
        ({"ranking": np.arange(9, dtype=np.int32)}, "ranks 9 items and scores 10"),
        ({"ranking": np.zeros(30, np.int32)}, "names 9 items twice"),
        ({"graph": np.full((30, 2), 30, np.int32)}, r"a graph \(30, 2\) must be"),
    ],
)
def test_a_walk_that_cannot_be_is_refused_before_the_first_round(walk, change, message):
    world = World(30, 0)
    given = {"ranking": world.ranking, "graph": world.graph, "budget": 10, "rounds": 2, **change}
    with pytest.raises(InputError, match=message):
        WALKS[walk](given.pop("ranking"), given.pop("graph"), **given)


def test_a_depth_below_one_is_refused():
    world = World(30, 0)
    with pytest.raises(InputError, match="depth=0 must be at least 1"):
        ladr(world.ranking, world.graph, budget=10, rounds=2, depth=0)


def test_a_score_that_is_no_number_is_refused():
    world = World(30, 0)
    running = gar(world.ranking, world.graph, budget=10, rounds=5)
    next(running)
    with pytest.raises(ModelError, match="the score nan"):
        running.send(np.full(2, np.nan, np.float32))
