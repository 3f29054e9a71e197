"""A line of JSON that is too long to hold: the text under one key is read in pieces.

Long strings are left out of the line, and what remains of it is short:

    {"id": 7, "text": "It was the best of times ...", "url": "x"}     the line
    {"id": 7, "text": "", "url": "x"}                                 the rest

A long string is the text where what stands before it, closed by `null}`, is an object whose last key is the one
wanted. When the line is over, the rest tells whether all of it was JSON.
"""

import codecs
import json
import re
from collections.abc import Iterator

LONG = 1 << 16  # characters of a string that is left out
WHOLE = re.compile(  # of a string, what can be read without what follows: no half escape, no half surrogate pair
    r'(?:[^"\\]+|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+"
)
ESCAPE = 12  # characters of the longest escape, a surrogate pair


class RestOfLine(Exception):
    """There was no long text under the key, or the line is not JSON: `raw` is to be read, or refused, in its place."""

    def __init__(self, rest: str) -> None:
        self.raw = rest.encode()


def text_under(key: str, blocks: Iterator[bytes]) -> Iterator[str]:
    """The text under `key` of the JSON object in one line, in pieces.

    Raises:
        RestOfLine: after some pieces or none.
        UnicodeDecodeError: it is not UTF-8.
    """
    rest: list[str] = []
    found, inside, long, wanted = False, False, False, False  # inside a string, a long one, the text
    buffer, at, decoder = "", 0, codecs.getincrementaldecoder("utf-8-sig")()
    for block in blocks:
        buffer, at = buffer[at:] + decoder.decode(block), 0
        while at < len(buffer):
            if not inside:
                quote = buffer.find('"', at) + 1
                rest.append(buffer[at : quote or None])
                at, inside, long, wanted = quote or len(buffer), quote > 0, False, False
                continue
            end = WHOLE.match(buffer, at).end()  # type: ignore[union-attr]  # it matches "", too
            closed = buffer[end : end + 1] == '"'
            if not closed and len(buffer) - end >= ESCAPE:
                raise RestOfLine("".join(rest) + buffer[end : end + ESCAPE])  # no escape of JSON
            if not closed and not long:
                if end - at < LONG:
                    break  # until more of it is there
                long, wanted = True, not found and _is_value("".join(rest)[:-1], key)
                found |= wanted
            if not long:
                rest.append(buffer[at:end])
            elif wanted and end > at:
                try:
                    yield json.loads(f'"{buffer[at:end]}"')
                except ValueError:
                    raise RestOfLine("".join(rest) + "\0") from None  # a control character
            at = end + closed
            if not closed:
                break
            rest.append('"')
            inside = False
    line = "".join(rest) + buffer[at:] + decoder.decode(b"", True)
    if not (found and _is_json(line)) or (inside and wanted):  # half a surrogate at the end, which is no text
        raise RestOfLine(line)


def _is_value(before: str, key: str) -> bool:
    """Whether a value that comes after `before` is that of `key` in the outermost object."""
    try:
        pairs = json.loads(before + "null}", object_pairs_hook=list)
    except (ValueError, RecursionError):
        return False
    return bool(pairs and pairs[-1] == (key, None))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
