"""The root key: streams apart from each other, and no way for the secret to slip out."""

from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest
from scipy import stats

from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.randomness import KeySource, RootKey

# Probability that a test of this file fails on a correct implementation with a fresh seed. The
# seeds are fixed, so it does not fail at random.
FALSE_ALARM = 1e-6


def test_streams_are_functions_of_key_purpose_and_counters() -> None:
    key, same, other = RootKey.from_seed(1), RootKey.from_seed(1), RootKey.from_seed(2)
    assert key.derive("noise", 3, 4) == same.derive("noise", 3, 4)
    assert key.derive("noise", 3, 4) != other.derive("noise", 3, 4)
    assert len(key.derive("noise")) == 32


def test_different_arguments_never_share_a_stream() -> None:
    key = RootKey.from_seed(0)
    # Pairs that a concatenation without lengths would confuse are among them.
    arguments: list[tuple[str, tuple[int, ...]]] = [
        ("noise", ()),
        ("noise", (0,)),
        ("noise", (0, 0)),
        ("noise\0", ()),
        ("noise" + "\0" * 8, ()),
        ("noise", (1, 2)),
        ("noise", (2, 1)),
        ("noise", (1 << 32,)),
        ("noise", (2**64 - 1,)),
        ("nois", (ord("e"),)),
        ("sampling", (0,)),
        ("noise on a device", (0,)),
    ]
    arguments += [("noise", (step,)) for step in range(2, 5000)]
    derived = {key.derive(purpose, *counters) for purpose, counters in arguments}
    assert len(derived) == len(arguments)


def test_a_concatenation_without_lengths_is_caught() -> None:
    """Negative control: the collision that the previous test looks for, in a broken twin."""

    def broken(purpose: str, *counters: int) -> bytes:
        return purpose.encode() + b"".join(c.to_bytes(8, "big") for c in counters)

    assert broken("noise", 0) == broken("noise" + "\0" * 8)


def test_derived_bytes_are_uniform() -> None:
    key = RootKey.from_seed(5)
    data = np.frombuffer(b"".join(key.derive("noise", step) for step in range(4096)), np.uint8)
    p_value = stats.chisquare(np.bincount(data, minlength=256)).pvalue
    assert FALSE_ALARM < p_value < 1 - FALSE_ALARM


def test_keys_of_the_system_differ_and_say_so() -> None:
    a, b = RootKey.from_os(), RootKey.from_os()
    assert a != b
    assert a.source is KeySource.OS
    assert RootKey.from_seed(0).source is KeySource.SEED


@pytest.mark.parametrize("seed", [0, 1, 255, 256, 2**63, 2**200])
def test_seeds_give_distinct_keys(seed: int) -> None:
    assert RootKey.from_seed(seed) == RootKey.from_seed(seed)
    assert RootKey.from_seed(seed) != RootKey.from_seed(seed + 1)
    assert RootKey.from_seed(np.int64(7)) == RootKey.from_seed(7)  # type: ignore[arg-type]


def test_the_secret_does_not_show() -> None:
    key = RootKey.from_os()
    secret = key.export()["key"]
    raw = bytes.fromhex(secret)
    for shown in (repr(key), str(key), f"{key}", f"{key!r}", repr([key]), repr({"k": key})):
        assert secret not in shown
        assert str(raw) not in shown
    assert not hasattr(key, "__dict__")
    with pytest.raises(TypeError, match="export"):
        pickle.dumps(key)
    with pytest.raises(TypeError, match="export"):
        pickle.dumps({"state": [key]})
    with pytest.raises(ConfigurationError) as caught:
        RootKey.restore({"key": secret[:-2], "provenance": KeySource.OS.value})
    assert secret[:20] not in str(caught.value)


def test_export_and_restore_keep_key_and_provenance() -> None:
    for key in (RootKey.from_os(), RootKey.from_seed(3)):
        again = RootKey.restore(key.export())
        assert again == key
        assert again.source is key.source
        assert again.derive("noise", 9) == key.derive("noise", 9)
        assert hash(again) == hash(key)


def test_copies_are_the_key_itself() -> None:
    key = RootKey.from_seed(0)
    assert copy.copy(key) is key
    assert copy.deepcopy({"key": key})["key"] is key


def test_keys_are_immutable() -> None:
    key = RootKey.from_seed(0)
    with pytest.raises(AttributeError, match="immutable"):
        key.source = KeySource.OS
    with pytest.raises(AttributeError, match="immutable"):
        del key._secret


@pytest.mark.parametrize("bad", [-1, 1.5, "1", None, True, 2**64])
def test_counters_out_of_range_are_refused(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="counter"):
        RootKey.from_seed(0).derive("noise", bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-1, 1.0, "seed", None, False])
def test_seeds_out_of_range_are_refused(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="seed"):
        RootKey.from_seed(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["", b"noise", None])
def test_purposes_must_be_named(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="purpose"):
        RootKey.from_seed(0).derive(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"key": "zz", "provenance": KeySource.OS.value},
        {"key": None, "provenance": KeySource.OS.value},
        "key",
    ],
)
def test_mangled_exports_are_refused(bad: object) -> None:
    with pytest.raises(ConfigurationError):
        RootKey.restore(bad)  # type: ignore[arg-type]


def test_unknown_provenance_is_refused() -> None:
    exported = RootKey.from_seed(0).export() | {"provenance": "trust me"}
    with pytest.raises(ConfigurationError, match="trust me"):
        RootKey.restore(exported)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_fork_cannot_use_the_key_but_may_restore_it() -> None:
    key = RootKey.from_seed(0)
    expected = key.derive("noise", 1)
    child = os.fork()
    if child == 0:
        outcome = 1
        try:
            key.derive("noise", 1)
        except PrivacyError:
            outcome = 0 if RootKey.restore(key.export()).derive("noise", 1) == expected else 2
        finally:
            os._exit(outcome)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert key.derive("noise", 1) == expected
