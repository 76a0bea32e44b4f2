"""Which requests of a browser are answered: those of this machine with the token, and nothing that changes a thing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.dashboard.access import PageRequest, RefusedError, read_request

TOKEN = "the-token"
HERE = ["127.0.0.1:8000"]


def status_of(method: str, target: str, hosts: list[str]) -> int:
    with pytest.raises(RefusedError) as refused:
        read_request(method, target, hosts, TOKEN)
    return refused.value.status


def test_a_request_with_the_token_is_read() -> None:
    assert read_request("GET", f"/{TOKEN}/", HERE, TOKEN) == PageRequest("", {})
    found = read_request("GET", f"/{TOKEN}/updates?run=a&run=b%2Fc&empty=", ["localhost"], TOKEN)
    assert (found.path, found.all("run"), found.one("empty")) == ("updates", ["a", "b/c"], "")


@pytest.mark.parametrize(
    "target",
    ["/", "", f"/{TOKEN}x/", "/the-toke/", f"{TOKEN}/", f"http://127.0.0.1/{TOKEN}/", f"//{TOKEN}/", "/tökeñ/"],
)
def test_an_address_without_the_token_is_refused(target: str) -> None:
    assert status_of("GET", target, HERE) == 403


@pytest.mark.parametrize(
    "hosts",
    [
        *([], ["evil.example"], ["evil.example:8000"], ["127.0.0.1.evil.example"], ["127.0.0.1:80@evil"]),
        *(["0.0.0.0:8000"], ["localhost", "localhost"], ["localhost:"], ["[::1]:8000"], ["127.0.0.2"]),
    ],
    ids=str,
)
def test_another_host_is_refused_even_with_the_token(hosts: list[str]) -> None:
    """A page whose own name has been made to lead here cannot read what is answered."""
    assert status_of("GET", f"/{TOKEN}/", hosts) == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "get"])
def test_only_get_is_answered(method: str) -> None:
    assert status_of(method, f"/{TOKEN}/", HERE) == 405


def test_a_field_that_is_missing_or_twice_is_named() -> None:
    request = read_request("GET", f"/{TOKEN}/samples?run=a&run=b", HERE, TOKEN)
    for name in ("run", "kind"):
        with pytest.raises(RefusedError, match=f"{name}=") as refused:
            request.one(name)
        assert refused.value.status == 400
    assert status_of("GET", f"/{TOKEN}/x?" + "&".join(["a=1"] * 100), HERE) == 400


@pytest.mark.slow
@given(st.text(), st.text(), st.lists(st.text(), max_size=2))
def test_any_words_are_answered_or_refused(method: str, target: str, hosts: list[str]) -> None:
    with pytest.raises(RefusedError):
        read_request(method, target, hosts, TOKEN)


@given(st.text())
def test_any_path_after_the_token_is_read_or_is_a_bad_request(rest: str) -> None:
    try:
        assert isinstance(read_request("GET", f"/{TOKEN}/{rest}", HERE, TOKEN), PageRequest)
    except RefusedError as refused:
        status = refused.status
    else:
        status = 400
    assert status == 400
