"""The house: imports only go down the floors of docs/design.md, and no file or function grows past its ratchet."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("megasp/**/*.py"), ROOT / "pretrain_gpt.py"])
BESIDE = sorted(file for folder in ("tests", "benchmarks", "examples") for file in ROOT.glob(f"{folder}/**/*.py"))

FLOORS = [
    ["megasp.errors", "megasp.config", "megasp.log", "megasp"],
    ["megasp.process_group"],
    ["megasp.parameters", "megasp.parallel_state", "megasp.shard_map", "megasp.footprint", "megasp.data"],
    ["megasp.host_copies"],
    ["megasp.pipeline.schedules", "megasp.pipeline.simulate"],
    ["megasp.collectives", "megasp.local_ranks"],
    ["megasp.model.init", "megasp.model.layers", "megasp.model.loss", "megasp.sequence_parallel"],
    ["megasp.model"],
    ["megasp.data_parallel", "megasp.pipeline"],
    ["megasp.checkpoints", "megasp.huggingface"],
    ["megasp.training", "megasp.checkpoints.megatron"],
    ["megasp.verify_order", "megasp.dry_run"],
    ["megasp.verify", "megasp.generate", "megasp.doctor", "megasp.memory", "megasp.planner"],
    ["megasp.cli"],
    ["pretrain_gpt"],
]
"""Modules and packages, lowest floor first; the longest name that fits counts."""

MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60
LONGER = {
    "tests/unit/checkpoints/test_from_megatron.py": 556,
    "tests/unit/config/test_validate.py": 352,
    "tests/unit/checkpoints/megatron_ranks.py: write": 65,
    "benchmarks/trainers.py: make_megatron": 76,
}
"""Lines of the files and functions beside the package that are longer: they may shrink."""
FORBIDDEN_NAMES = {"utils", "core", "common", "helpers", "misc"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int:
    fits = [
        (len(name), level)
        for level, names in enumerate(FLOORS)
        for name in names
        if module == name or (module.startswith(name + ".") and name != "megasp")
    ]
    assert fits, f"{module} has no floor: add it to FLOORS"
    return max(fits)[1]


def imports(path: Path) -> Iterator[str]:
    """Modules of megasp that a file imports, wherever in it the import stands."""
    modules = {module_name(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "megasp")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "megasp":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules else node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = module_name(path)
    folder = here.rsplit(".", 1)[0]
    for imported in imports(path):
        same_folder = folder != "megasp" and imported.startswith(folder + ".")
        # A package's own __init__ may collect what stands in it.
        own = imported.startswith(here + ".")
        assert same_folder or own or floor(imported) < floor(here) or floor(imported) == floor(here) == 0, (
            f"{here} (floor {floor(here)}) imports {imported} (floor {floor(imported)})"
        )


def test_floor_rule_catches_a_violation() -> None:
    assert floor("megasp.training.step") > floor("megasp.model.gpt") > floor("megasp.model.layers")
    assert floor("megasp.collectives") > floor("megasp.parallel_state") > floor("megasp.config.schema")


def sizes(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, lines and limit of a file and of its functions."""
    name, text = str(path.relative_to(ROOT)), path.read_text()
    yield name, text.count("\n"), MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}: {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1, MAX_FUNCTION_LINES


@pytest.mark.parametrize("path", FILES + BESIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    assert not [(name, lines) for name, lines, limit in sizes(path) if lines > LONGER.get(name, limit)]


def test_the_longer_ones_are_still_longer() -> None:
    found = {name: (lines, limit) for path in BESIDE for name, lines, limit in sizes(path) if name in LONGER}
    assert found.keys() == LONGER.keys() and all(lines > limit for lines, limit in found.values()), found


def test_no_rooms_without_a_purpose() -> None:
    assert not [path for path in FILES if FORBIDDEN_NAMES & {part.removesuffix(".py") for part in path.parts}]


def test_every_module_says_what_it_is() -> None:
    assert not [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]
