import pytest

from axn_ray.core.choice import CHOICE, GRID, Choice, choose, list_trials, read_choice
from axn_ray.core.methods import METHODS
from axn_ray.errors import ArtifactError, InputError


def make_choice(**settings):
    return Choice(settings=settings, queries=["d1", "d2"], cross_encoder="c", budgets=[100], ks=[10])


def summary_of(trials, recall_of):
    cells = [(trial, budget, k) for trial in trials for budget in (100, 500) for k in (1, 10)]
    named = [{"method": trial.method.name, "rounds": trial.method.rounds, "budget": b, "k": k} for trial, b, k in cells]
    return [{**name, "recall": recall_of(*cell)} for name, cell in zip(named, cells, strict=True)]


def test_every_combination_of_the_grid_is_tried_once():
    trials = list_trials(["rnr_de", "tour_de", "axn_blend_mf_ind"], [5, 10])
    assert len({(trial.method.name, trial.method.rounds) for trial in trials}) == len(trials) == 1 + 3 * 3 * 2 + 6 * 2
    for trial in trials:
        for name, value in trial.settings.items():
            tried = getattr(trial.method, name)
            assert tried == value and type(tried) is type(getattr(METHODS[trial.key], name))
    assert trials[0].settings == {}
    assert "TouR, DE (learning_rate=4, temperature=16)" in {trial.method.name for trial in trials}
    assert {"AXN pinv λ=0.2, MF_Ind", "AXN pinv λ=0.8, MF_Ind"} <= {trial.method.name for trial in trials}


def test_the_grid_names_methods_and_their_settings():
    for key, free in GRID.items():
        assert all(hasattr(METHODS[key], name) and len(set(values)) == len(values) for name, values in free.items())


def test_the_best_mean_over_budgets_and_k_wins():
    trials = list_trials(["rnr_de", "axn_ridge_mf_ind", "axn_pinv_mf_ind"], [5, 10])

    def recall(trial, budget, k):
        if trial.key == "axn_pinv_mf_ind":
            return 0.5  # of equals the first
        good = trial.settings.get("noise_variance") == 0.25 and trial.settings["rounds"] == 10
        return 0.6 if good else 0.9 if (budget, k) == (100, 1) else 0.1

    chosen = choose(trials, summary_of(trials, recall))
    assert chosen == {"axn_ridge_mf_ind": {"noise_variance": 0.25, "rounds": 10}, "axn_pinv_mf_ind": {"rounds": 5}}


def test_the_chosen_settings_take_the_place_of_the_methods_own():
    choice = make_choice(ladr_de={"n_neighbours": 64.0, "depth": 20.0, "rounds": 5.0}, axn_blend_mf_ind={"blend": 0.2})
    ladr, blend, *others = choice.apply(["ladr_de", "axn_blend_mf_ind", "axn_pinv_de", "rnr_de"], [5, 10])
    assert (ladr.n_neighbours, ladr.depth, ladr.rounds) == (64, 20, 5) and type(ladr.n_neighbours) is int
    assert (blend.name, blend.blend) == ("AXN pinv λ=0.2, MF_Ind", 0.2)
    assert [(method.name, method.rounds) for method in others] == [("AXN pinv, DE", 5), ("AXN pinv, DE", 10), ("RnR, DE", 1)]
    with pytest.raises(InputError, match="method 'nothing' is not known"):
        choice.apply(["nothing"], [10])


def test_a_query_that_chose_does_not_judge():
    make_choice().check_unseen(["t1", "t2"])
    with pytest.raises(InputError, match="1 of the queries to judge .such as 'd2'. chose the settings; judge on others"):
        make_choice().check_unseen(["t1", "d2"])


def test_a_choice_is_read_back_and_another_file_is_not_one(tmp_path):
    choice = make_choice(tour_de={"temperature": 4.0})
    with pytest.raises(ArtifactError, match="holds no choice.json; evaluate on dev queries with --choose first"):
        read_choice(tmp_path)
    (tmp_path / CHOICE).write_text(choice.model_dump_json())
    assert read_choice(tmp_path) == choice
    (tmp_path / CHOICE).write_text("{}")
    with pytest.raises(ArtifactError, match="cannot be read .5 bad fields.; choose again"):
        read_choice(tmp_path)
