"""API keys: shown once, hashed at rest, compared whole."""

import stat

import pytest

from dptorch.errors import ConfigurationError, DataError
from dptorch.prediction.serving.keys import add_key, client_of, read_keys


def test_a_key_is_known_by_its_hash_alone(tmp_path):
    path = tmp_path / "keys.json"
    first, second = add_key(path, "clinic"), add_key(path, "lab")
    keys = read_keys(path)
    assert client_of(keys, first) == "clinic"
    assert client_of(keys, second) == "lab"
    for wrong in ("", first[:-1], first + "x", first.swapcase(), keys["clinic"], "\ud800"):
        assert client_of(keys, wrong) is None
    assert first not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(first) > 40
    assert first != second


def test_what_cannot_be_a_client_or_a_file_is_refused(tmp_path):
    path = tmp_path / "keys.json"
    add_key(path, "clinic")
    with pytest.raises(ConfigurationError, match="cannot be shown again"):
        add_key(path, "clinic")
    with pytest.raises(ConfigurationError, match="1 to 64"):
        add_key(path, "no spaces")
    for text in ("[]", "{", '{"a": 1}', '{"a": "short"}'):
        path.write_text(text)
        with pytest.raises(DataError, match="--new-key"):
            read_keys(path)
    with pytest.raises(DataError, match="--new-key"):
        read_keys(tmp_path / "none.json")
