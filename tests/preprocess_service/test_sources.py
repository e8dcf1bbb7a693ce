"""Media sources: bytes as they are, data URLs strictly, nothing else."""

from __future__ import annotations

import pytest

from diptych.service.errors import DiptychError
from preprocess_service.media.sources import fetch
from preprocess_service.requests import Media, MediaHeader
from tests.tiny_checkpoint import data_url


def refusal(url: str, max_bytes: int = 100) -> DiptychError:
    with pytest.raises(DiptychError) as caught:
        fetch(Media("image", url), 2, max_bytes)
    assert (caught.value.stage, caught.value.item) == ("fetch", 2)
    return caught.value


def test_bytes_and_headers_pass_through() -> None:
    assert fetch(Media("image", b"abc"), 0, 3) == b"abc"
    header = MediaHeader(b"ab", 3)
    assert fetch(Media("image", header), 0, 3) is header


@pytest.mark.parametrize(
    "url",
    [
        data_url(b"\0\xffabc"),
        "data:;base64,AP9hYmM=",
        "DATA:image/png;BASE64,AP9hYmM=",
        "data:image/png;charset=x;base64,AP9hYmM=",
    ],
)
def test_data_urls(url: str) -> None:
    assert fetch(Media("image", url), 0, 100) == b"\0\xffabc"


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,AP9h YmM=",
        "data:image/png;base64,AP9hYmM",
        "data:image/png;base64,AP9h-_M=",
        "data:image/png;base64,AP9hYmM=\n",
        "data:image/png;base64,Ä",
    ],
)
def test_base64_is_strict(url: str) -> None:
    error = refusal(url)
    assert error.code.name == "INVALID_ARGUMENT"
    assert "not valid base64" in error.message


@pytest.mark.parametrize("url", ["data:image/png,abc", "data:image/png;base64", "data:", "data:base64,QQ=="])
def test_only_the_base64_form(url: str) -> None:
    assert "a data URL has the form" in refusal(url).message


@pytest.mark.parametrize("scheme", ["http", "https", "file", "ftp", "s3", "HTTP"])
def test_other_schemes_are_unimplemented_by_name(scheme: str) -> None:
    error = refusal(f"{scheme}://example.com/a.png")
    assert error.code.name == "UNIMPLEMENTED"
    assert error.metadata["scheme"] == scheme.lower()


@pytest.mark.parametrize("url", ["", "cat.jpg", "/etc/passwd", "//example.com"])
def test_what_is_no_url(url: str) -> None:
    assert "is not a URL" in refusal(url).message


@pytest.mark.parametrize("source", [b"12345", data_url(b"12345"), MediaHeader(b"1", 5)])
def test_size_limit(source: bytes | str | MediaHeader) -> None:
    with pytest.raises(DiptychError, match="item 0 has 5 bytes; at most 4") as caught:
        fetch(Media("image", source), 0, 4)
    assert (caught.value.limit, caught.value.actual) == (4, 5)
