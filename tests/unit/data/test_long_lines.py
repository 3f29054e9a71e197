"""A long line of JSON in pieces gives what json.loads gives of the whole."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasp.data import long_lines
from megasp.data.text_files import Document, texts_of
from megasp.errors import DataError

TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from('aa"\\\n\U0001f642\u00e4')), max_size=60)
VALUE = st.recursive(
    st.one_of(st.none(), st.integers(), TEXT),
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=5,
)
LINES = st.builds(
    lambda entry, extra, ascii: json.dumps(extra | entry | {"z": 1}, ensure_ascii=ascii),
    st.fixed_dictionaries({}, optional={"text": st.one_of(TEXT, VALUE)}),
    st.dictionaries(TEXT | st.just("text"), VALUE | st.just({"text": "no" * 20}), max_size=4),
    st.booleans(),
)


def whole(line: bytes) -> str | None:
    """The text of a line, None for a bad one."""
    try:
        return texts_of(Document("a", 1, line), ["text"])[0]
    except DataError:
        return None


def in_pieces(line: bytes, size: int) -> str | None:
    pieces = []
    try:
        pieces += long_lines.text_under("text", (line[i : i + size] for i in range(0, len(line), size)))
    except UnicodeDecodeError:
        return None
    except long_lines.RestOfLine as rest:
        assert not pieces or whole(rest.raw) is None
        return whole(rest.raw)
    return "".join(pieces)


@given(LINES, st.integers(1, 40), st.integers(5, 30))
def test_pieces_are_those_of_the_whole(line, size, long):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_lines, "LONG", long)
        found, expected = in_pieces(line.encode(), size), whole(line.encode())
    assert found == expected or (expected == "" and not (found or "").strip())  # blank text is no text


@given(LINES, st.integers(1, 40), st.data())
def test_a_damaged_line_is_bad_in_pieces_too(line, size, data):
    raw = bytearray(line.encode())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place : place + 1] = data.draw(st.sampled_from([b"", b'"', b"\\", b"\n", b"\xff", b"}", b"\\ud800"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_lines, "LONG", 5)
        found, expected = in_pieces(bytes(raw), size), whole(bytes(raw))
    assert found == expected or (expected == "" and not (found or "").strip())


def test_half_a_surrogate_at_the_end_of_a_long_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows it is not dropped in silence."""
    monkeypatch.setattr(long_lines, "LONG", 10)
    line = b'{"text": "' + b"a" * 50 + b'\\ud800ab"}\n'
    with pytest.raises(long_lines.RestOfLine):
        list(long_lines.text_under("text", iter([line])))
