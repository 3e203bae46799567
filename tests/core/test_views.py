import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from axn_ray import sample
from axn_ray.core.artifact import Manifest, new_artifact
from axn_ray.core.corpus import Items
from axn_ray.core.dual_encoder import DualEncoder
from axn_ray.core.models import MINILM
from axn_ray.core.views import DEFAULT_VIEWS, KIND, LayerEncoder, View, choose_views, load_view, save_view
from axn_ray.errors import ArtifactError, InputError

TEXTS = ["run: move fast", "x", "bank: a long definition of a bank, with more words than the others", "close: shut"]
ITEMS = Items(tuple("abcd"), ("run", "", "bank", "close"), ("move fast", "x", "a long definition", "shut"))
NO_TITLES = Items(("a",), ("",), ("move fast",))


def test_names_say_encoder_layer_and_text():
    assert View.of("de") == View("de", "de", "", False)
    assert View.of("ce3") == View("ce3", "ce", "3", False)
    assert View.of("de12_title") == View("de12_title", "de", "12", True)
    assert View.of("ce_half_title") == View("ce_half_title", "ce", "_half", True)
    for wrong in ("", "title", "ce_3", "bert", "de3_text"):
        with pytest.raises(InputError, match="is not known; name de or ce"):
            View.of(wrong)


def test_an_item_without_a_title_is_seen_by_its_text():
    assert View.of("de_title").texts(ITEMS) == ["run", "x", "bank", "close"]
    assert View.of("ce").texts(ITEMS) == ["run: move fast", "x", "bank: a long definition", "close: shut"]


def test_layers_are_means_over_the_tokens_of_one_text(tiny_cross_encoder):
    """The slow twin: transformers on one text at a time, in float32."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_cross_encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_cross_encoder)
    with torch.inference_mode():
        outputs = [model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states for text in TEXTS]
    expected = np.array([[hidden[layer][0].mean(dim=0).numpy() for layer in (0, 1, 2)] for hidden in outputs])
    encoder = LayerEncoder("ce", str(tiny_cross_encoder))
    views = encoder.embed(TEXTS, [0, 1, 2])
    assert (views.shape, views.dtype, encoder.dim) == ((4, 3, 32), np.float32, 32)
    np.testing.assert_allclose(views, expected, atol=0.03 * np.abs(expected).max())  # the encoder may run in bfloat16
    assert [encoder.read_layer(View.of(name)) for name in ("ce", "ce2", "ce_half", "ce0_title")] == [2, 2, 1, 0]
    with pytest.raises(InputError, match="view 'ce3' names layer 3, .* has 2; name a lower one"):
        encoder.read_layer(View.of("ce3"))


def test_the_last_layer_of_minilm_is_its_embedding():
    encoder = LayerEncoder("de", MINILM)
    last = encoder.embed(TEXTS, [encoder.n_layers])[:, 0]
    cosines = np.sum(DualEncoder(MINILM).embed_items(TEXTS) * last, axis=1) / np.linalg.norm(last, axis=1)
    assert cosines.min() > 0.999


def test_an_adapter_s_layers_are_not_its_base_s():
    tuned, base = LayerEncoder("ce", sample.CROSS_ENCODER), LayerEncoder("de", MINILM)
    assert tuned.fingerprint != base.fingerprint
    last = [encoder.embed(TEXTS[:1], [6])[0, 0] for encoder in (tuned, base)]
    assert np.linalg.norm(last[0] - last[1]) > 0.1 * np.linalg.norm(last[1])


def test_a_stored_view_is_centred_and_of_unit_length(tmp_path):
    raw = np.random.default_rng(0).normal(3.0, 1.0, (50, 8)).astype(np.float32)
    raw[7] = raw.mean(axis=0)
    manifest = Manifest(kind=KIND, config={}, counts={"items": 50, "dim": 8}, made_from={})
    with new_artifact(tmp_path / "view", manifest) as folder:
        save_view(folder, raw)
    view = load_view(tmp_path / "view")
    centred = raw - raw.mean(axis=0)
    np.testing.assert_allclose(view, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=2e-3)
    assert view.dtype == np.float16


def test_a_view_of_another_shape_is_refused(tmp_path):
    manifest = Manifest(kind=KIND, config={}, counts={"items": 4, "dim": 8}, made_from={})
    with new_artifact(tmp_path / "view", manifest) as folder:
        save_view(folder, np.ones((3, 8), dtype=np.float32))
    with pytest.raises(ArtifactError, match=r"holds a view \(3, 8\), its manifest says \(4, 8\)"):
        load_view(tmp_path / "view")


def names_of(views):
    return [view.name for view in views]


def test_the_default_takes_what_there_is(caplog):
    with caplog.at_level("INFO", logger="axn_ray.core.views"):
        assert names_of(choose_views(None, ITEMS, "some/model")) == [*DEFAULT_VIEWS]
        assert not caplog.messages
        assert names_of(choose_views(None, NO_TITLES, "some/model")) == ["de_half", "ce", "ce_half"]
        assert names_of(choose_views(None, ITEMS, "python:module:factory")) == ["de_half", "de_title", "de_half_title"]
        assert names_of(choose_views(None, NO_TITLES, None)) == ["de_half"]
    assert "the fit goes without the view de_title: there are no titles" in caplog.messages
    assert "the fit goes without the view ce: there are no weights of the cross-encoder" in caplog.messages


def test_what_was_named_and_is_not_possible_is_refused():
    assert names_of(choose_views(["ce3", "de", "ce3"], ITEMS, "some/model")) == ["ce3", "de"]
    assert choose_views([], ITEMS, "some/model") == []
    with pytest.raises(InputError, match="view 'de3_title' needs titles and there are none; leave it out"):
        choose_views(["de3_title"], NO_TITLES, "some/model")
    with pytest.raises(InputError, match="view 'ce3' needs weights of the cross-encoder and there are none"):
        choose_views(["de", "ce3"], ITEMS, None)
