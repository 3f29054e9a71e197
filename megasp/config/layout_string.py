"""The string of --pipeline-model-parallel-layout, in Megatron-LM's grammar.

E embedding   t layer   L head and loss   | next stage   x*3 repeats x   (x|)*3 repeats a group   , is ignored

"Et*3|(tt|)*2t|L"    five stages of 3, 2, 2, 1 and 0 layers; the first has the embedding, the last only the head
"""

from collections.abc import Iterator

from megasp.errors import ConfigError


def count_stages(layout: str) -> int:
    """Stages of a layout string."""
    return 1 + sum(symbol == "|" for symbol, _ in _expand(layout))


def parse(layout: str, num_layers: int) -> list[int]:
    """Layers of each stage of a layout string.

    Raises:
        ConfigError: it does not follow the grammar or the model; it says at which character.
    """
    symbols = list(_expand(layout))
    last = len(symbols) - 1
    counts, empty = [0], True
    for place, (symbol, at) in enumerate(symbols):
        if (symbol == "E") != (place == 0):
            raise _error(layout, at, "E, the embedding, is first and stands there once", "begin with E")
        if (symbol == "L") != (place == last):
            raise _error(layout, at, "L, the head, is last and stands there once", "end with L")
        if symbol == "|":
            if empty:
                raise _error(layout, at, "a stage holds something", "leave this | out")
            counts.append(0)
        counts[-1] += symbol == "t"
        empty = symbol == "|"
        if sum(counts) > num_layers:
            raise _error(layout, at, f"this is layer {sum(counts)} of a model of {num_layers}", "leave some t out")
    if sum(counts) < num_layers:
        raise _error(
            layout, len(layout) - 1, f"{sum(counts)} layers of {num_layers} have a stage by the end", "add some t"
        )
    return counts


def _expand(layout: str) -> Iterator[tuple[str, int]]:
    """Symbols with repeats written out, each with its place in the text."""
    symbols, end = _group(layout, 0)
    if end < len(layout):
        raise _error(layout, end, "no ( was opened before", "leave it out")
    if not symbols:
        raise ConfigError("--pipeline-model-parallel-layout is empty", "it names every layer", 'write "Ett|ttL"')
    return iter(symbols)


def _group(layout: str, at: int) -> tuple[list[tuple[str, int]], int]:
    """Symbols from `at` to the end of the text or of this group, and where that is."""
    symbols: list[tuple[str, int]] = []
    while at < len(layout) and layout[at] != ")":
        unit, begin = [(layout[at], at)], at
        if layout[at] == "(":
            unit, at = _group(layout, at + 1)
            if at == len(layout):
                raise _error(layout, begin, "this ( is never closed", "add )")
        elif layout[at] == "m":
            raise _error(layout, at, "multi-token prediction is not built", "leave m out")
        elif layout[at] not in "EtL|, ":
            raise _error(layout, at, "it is none of E t L | , * ( )", "see --help")
        at += 1
        if layout[at : at + 1] == "*":
            digits = at + 1
            while layout[digits : digits + 1].isdigit():
                digits += 1
            if digits == at + 1:
                raise _error(layout, at, "a number follows *", "write for example t*3")
            unit, at = unit * int(layout[at + 1 : digits]), digits
        symbols += [(symbol, place) for symbol, place in unit if symbol not in ", "]
    return symbols, at


def _error(layout: str, at: int, rule: str, fix: str) -> ConfigError:
    marked = f"{layout[:at]}>{layout[at]}<{layout[at + 1 :]}"
    return ConfigError(f"--pipeline-model-parallel-layout {marked}, character {at + 1}", rule, fix)
