"""Addresses and keys, as every client of ours takes them."""

from __future__ import annotations

import pytest
from octavo.server.client_address import checked_address, checked_key, find_key, with_version
from octavo.server.options import OptionError


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://host:1234", "http://host:1234/v1"),
        (" http://host:1234/ ", "http://host:1234/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://host/api/v3", "https://host/api/v3"),
    ],
)
def test_the_version_is_added_to_an_address_without_a_path(given: str, base: str) -> None:
    assert with_version(checked_address("--base-url", given)) == base


@pytest.mark.parametrize(
    "given", ["", "host", "ftp://host", "http://", "http://host:0", "http://host:99999", "http://host/?a=1"]
)
def test_an_address_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(OptionError, match=r"--base-url: expected an address"):
        checked_address("--base-url", given)


@pytest.mark.parametrize("given", ["http://user:secret@host", "ftp://user:secret@host", "http://user:secret@host:0"])
def test_a_password_in_an_address_is_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(OptionError, match=r"OCTAVO_BASE_URL: expected") as caught:
        checked_address("OCTAVO_BASE_URL", given)
    assert "secret" not in str(caught.value)


def test_the_key_comes_from_the_first_place_that_has_one() -> None:
    both = {"OCTAVO_API_KEY": "a, b", "OPENAI_API_KEY": "c"}
    assert find_key("given", both) == "given"
    assert find_key(None, both) == "a"
    for empty in ("", " ", " ,b"):
        assert find_key(None, {"OCTAVO_API_KEY": empty, "OPENAI_API_KEY": "c"}) == "c"
    assert find_key(None, {}) is None


@pytest.mark.parametrize("key", ["two words", "a\nb", "ä"])
def test_a_key_that_no_header_can_carry_is_refused_by_the_name_of_its_place(key: str) -> None:
    with pytest.raises(OptionError, match=r"^OPENAI_API_KEY: a key consists of visible ASCII") as caught:
        find_key(None, {"OPENAI_API_KEY": key})
    assert key not in str(caught.value)
    with pytest.raises(OptionError, match=r"^--compare-api-key: "):
        checked_key("--compare-api-key", key)
