"""Settings from YAML and flags; secrets from a file or a named variable, and from nowhere else."""

import pytest

from axn_ray.command import read_config
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.errors import InputError


def test_a_secret_is_read_from_where_it_stands(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.setenv("SCORER_KEY", "from-env")
    (tmp_path / "settings.yaml").write_text("api_key: env:SCORER_KEY\n")

    def read(path, flags):
        secret = read_config(CrossEncoderConfig, path, flags).api_key
        return None if secret is None else secret.get_secret_value()

    assert read(None, {"api_key": f"file:{tmp_path / 'key'}"}) == "from-file"
    assert read(tmp_path / "settings.yaml", {"api_key": None}) == "from-env"
    assert read(None, {}) is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3cret", "must be file:PATH or env:NAME, where the secret stands, and never the secret itself"),
        ("env:NOT_SET_ANYWHERE", "nothing stands in env:NOT_SET_ANYWHERE"),
        ("file:/no/such/file", "nothing stands in file:/no/such/file"),
    ],
)
def test_a_secret_in_the_open_or_missing_is_refused_and_not_repeated(place, message):
    with pytest.raises(InputError, match=message) as caught:
        read_config(CrossEncoderConfig, None, {"api_key": place})
    assert "s3cret" not in str(caught.value)
