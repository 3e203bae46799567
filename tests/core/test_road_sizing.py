import hypothesis
import hypothesis.strategies as st
import pytest

from axn_ray.core.road_sizing import TERMS, Cost, RoadConfig, RoadCosts, RunSize, fit_cost, road_table, size_road
from axn_ray.errors import InputError
from tests.core.test_sizing import RUN

SIZES = [
    RunSize(10_000, 100_000, 200),
    RunSize(100_000, 10**6, 2000),
    RunSize(10**6, 10**7, 20_000),
    RunSize(100_000, 10**7, 20_000),
]
CONFIG = RoadConfig(**RUN.model_dump(), n_queries=2000, texts_per_second=100)
COSTS = RoadCosts(
    embed=Cost(constant=36, item=3.6),
    choose=Cost(cell=0.0144),
    score=Cost(pair=0.001),
    factorize=Cost(pair=0.0005, item=3.6),
    driver_bytes=Cost(constant=10**9, pair=100),
    worker_bytes=Cost(item=10**6),
)


@hypothesis.given(st.tuples(*[st.floats(1e-9, 1e3)] * len(TERMS)))
def test_a_fit_finds_the_costs_that_made_the_values(made):
    cost = Cost(**dict(zip(TERMS, made, strict=True)))
    fitted = fit_cost([(size, cost.at(size)) for size in SIZES], TERMS)
    for size in SIZES:
        assert fitted.at(size) == pytest.approx(cost.at(size), rel=1e-6)


def test_a_fit_knows_which_term_grows():
    quadratic = fit_cost([(size, 2e-9 * size.items * size.queries) for size in SIZES], TERMS)
    assert quadratic.cell == pytest.approx(2e-9)
    assert quadratic.at(SIZES[2]) == pytest.approx(100 * quadratic.at(SIZES[1]), rel=1e-6)


def test_a_fit_is_never_negative_and_small_runs_weigh_as_much_as_large_ones():
    fitted = fit_cost([(SIZES[0], 10.0), (SIZES[1], 9.0), (SIZES[2], 9.5)], ["constant", "item"])
    assert fitted.item == 0
    assert 9 < fitted.constant < 10


def test_refuses_what_cannot_be_fitted():
    with pytest.raises(InputError, match="1 runs cannot fit 2 terms"):
        fit_cost([(SIZES[0], 1.0)], ["item", "pair"])
    with pytest.raises(InputError, match="above 0"):
        fit_cost([(SIZES[0], 0.0)], ["item"])


def test_hours_by_hand():
    # 7,200,000 pairs, 1000 items, 2000 queries; four workers score 500 pairs a second each and embed 100 texts
    sized = size_road(CONFIG, COSTS)
    assert sized["embed"] * 3600 == pytest.approx(3000 / 400 + 36 + 3600)
    assert sized["choose"] == pytest.approx(2.0)
    assert sized["cross_encoder"] == pytest.approx(1.0)
    assert sized["score"] == pytest.approx(2.0)
    assert sized["factorize"] == pytest.approx(2.0)
    assert sized["whole"] == pytest.approx(7 + sized["embed"])
    assert (sized["driver"], sized["worker"]) == (10**9 + 7.2 * 10**8, 10**9)


def test_more_workers_shorten_only_what_they_share():
    one, two = (size_road(CONFIG.model_copy(update={"workers": n}), COSTS) for n in (4, 8))
    assert two["choose"] == pytest.approx(one["choose"] / 2)
    assert (two["score"], two["factorize"]) == (one["score"], one["factorize"])


def test_table_has_a_row_per_run():
    lines = road_table({"a": CONFIG}, COSTS).splitlines()
    assert [line.count("|") for line in lines] == [14] * 3
    assert lines[2].endswith("| 1.01 | 2.00 | 1.00 | 2.00 | 2.00 | 8.01 | 1.7 GB | 1.0 GB |")
