import pytest

from axn_ray.distributed import score as stage
from axn_ray.distributed.estimate import Estimate, estimate
from tests.distributed.scoring_driver import make_config, make_corpus


def test_counts_what_is_asked_and_what_is_done_and_writes_nothing(ray_session, tmp_path):
    corpus, config = make_corpus(40, 12), make_config(choice="per_query", per_query=20, active_share=0.5, shard_pairs=40)
    before = estimate(corpus, config, tmp_path / "scores", price_per_hour=2.0)
    assert (before.n_pairs, before.n_done) == (12 * 20, 0)
    assert not (tmp_path / "scores").exists()
    assert len(before.rates) == 2 * 3 and min(before.rates) > 0
    stage.score(corpus, config, tmp_path / "scores")  # in two passes
    done = estimate(corpus, config, tmp_path / "scores")
    assert (done.n_done, done.seconds) == (12 * 20, 0)
    for path in (tmp_path / "scores/shards").glob("part-00000.*"):
        path.unlink()
    assert 0 < estimate(corpus, config, tmp_path / "scores").n_done < 12 * 20


def test_time_and_cost_follow_from_the_rates():
    given = Estimate(n_pairs=73_000, n_done=1_000, rates=(4.0, 5.0, 9.0), workers=4, on_gpu=True, price_per_hour=2.5)
    assert given.seconds == pytest.approx(3600)
    assert given.worker_hours == pytest.approx(4)
    assert "about 3,600 s on 4 workers (5 pairs/s each, 4 to 9 in the sample), 4.000 GPU-hours, 10.00 at 2.5" in str(given)
