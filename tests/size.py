"""Size and structure of the library against its limits: lines, import circles, upward imports, import closures.

``python tests/size.py`` prints the figures and exits with 1 if one is above its ceiling. Limits are what the library
aims at; ceilings are what it has reached: a change that makes the library smaller lowers them (``--lower``).
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "fedhubert_lib"

LIMITS = {
    "library, lines": 9_000,
    "largest module, lines": 450,
    "largest function, lines": 60,
    "largest class, lines": 200,
    "closure of kmeans, lines": 2_500,
    "closure of pretraining, lines": 4_000,
    "closure of distillation, lines": 4_500,
    "closure of evaluation, lines": 3_000,
    "import circles": 0,
    "upward imports": 0,
}

CEILINGS = {
    "library, lines": 16_765,
    "largest module, lines": 450,
    "largest function, lines": 60,
    "largest class, lines": 200,
    "closure of kmeans, lines": 2_500,
    "closure of pretraining, lines": 4_000,
    "closure of distillation, lines": 4_500,
    "closure of evaluation, lines": 3_000,
    "import circles": 0,
    "upward imports": 0,
}

LAYERS = (
    "audio files folders seeds units threads params events studies records identity resources meter plots",
    "corpora labels features kernels hubert pretrained masking batching objectives teaching training partition skew",
    "weights checkpoints",
    "recipes federated",
    "kmeans pooled pretraining distillation",
    "evaluation",
    "diagnosis reference",
    "export",
    "runs sharing index notebook planning preflight progress runner compare",
    "cli",
)
"""From the bottom to the top: a module imports from its layer and those below it. A package stands for its modules."""


ENTRIES = {
    "kmeans": "kmeans.stage",
    "pretraining": "pretraining",
    "distillation": "distillation",
    "evaluation": "evaluation.report",
}
"""The modules that run the stages: where a reader begins."""


def modules() -> dict[str, Path]:
    """Paths of the library's modules by their dotted names within it; the library itself is the empty name."""
    names = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(LIBRARY).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def imports(path: Path, names: dict[str, Path]) -> set[str]:
    """Modules of the library that ``path`` imports, in functions too, but not those for type checkers alone."""
    tree, dependencies = ast.parse(path.read_text(encoding="utf-8")), set()
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            assert not isinstance(node, ast.ImportFrom), f"{path}: a relative import, which is not followed here"
            continue
        for target in targets:
            package, _, name = target.partition(".")
            if package == LIBRARY.name:
                dependencies.add(name if name in names else name.rpartition(".")[0])
    return dependencies


def closure(start: str, graph: dict[str, set[str]]) -> set[str]:
    """All that the modules of ``start`` import directly and indirectly; packages are imported with their modules."""
    reached, waiting = set(), {start}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= (graph[name] | {name.rpartition(".")[0]}) - reached
    return reached


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules, each of which imports all others of its set directly or indirectly."""

    def reachable(start: str) -> set[str]:
        reached, waiting = set(), set(graph[start])
        while waiting:
            name = waiting.pop()
            reached.add(name)
            waiting |= graph[name] - reached
        return reached

    reached = {name: reachable(name) for name in graph}
    sets = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(members) for members in sets if members)


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a module in a higher layer, and modules without a layer."""
    layers = {name: number for number, layer in enumerate(LAYERS) for name in layer.split()}
    numbers = {name: layers.get(name, layers.get(name.partition(".")[0], -1)) for name in graph if name}
    result = [f"{name}: in no layer of LAYERS" for name, number in numbers.items() if number < 0]
    for name, number in numbers.items():
        above = [target for target in graph[name] if target and numbers[target] > number >= 0]
        result += [f"{name} imports {target}" for target in above]
    return sorted(result)


def definitions(name: str, path: Path, kinds: tuple[type, ...]) -> Iterator[tuple[int, str]]:
    """Lines and name of every function or class of the module ``name``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and isinstance(node, kinds):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{name}.{node.name}"


def measure() -> tuple[dict[str, int], dict[str, list[str]]]:
    """The figures of LIMITS, and for each what it consists of, largest first."""
    names = modules()
    graph = {name: imports(path, names) - {name} for name, path in names.items()}
    size = {name: lines(path) for name, path in names.items()}
    largest = {
        "largest module, lines": [(count, name) for name, count in size.items()],
        "largest function, lines": [
            row for item in names.items() for row in definitions(*item, (ast.FunctionDef, ast.AsyncFunctionDef))
        ],
        "largest class, lines": [row for item in names.items() for row in definitions(*item, (ast.ClassDef,))],
    }
    figures, details = {"library, lines": sum(size.values())}, {}
    for title, rows in largest.items():
        rows.sort(reverse=True)
        figures[title] = rows[0][0]
        details[title] = [f"{count:,} {name}" for count, name in rows if count > LIMITS[title]]
    for stage, entry in ENTRIES.items():
        reached = closure(entry, graph)
        title = f"closure of {stage}, lines"
        figures[title] = sum(size[name] for name in reached)
        details[title] = [" ".join(sorted(filter(None, reached)))]
    details["import circles"] = [" ".join(members) for members in circles(graph)]
    details["upward imports"] = upward(graph)
    figures |= {title: len(details[title]) for title in ("import circles", "upward imports")}
    return {title: figures[title] for title in LIMITS}, details


def lower(figures: dict[str, int]) -> None:
    """Write the figures into this file as ceilings, where they are lower than those that stand here."""
    text = Path(__file__).read_text(encoding="utf-8")
    head, start, rest = text.partition("CEILINGS = {")
    for title, figure in figures.items():
        ceiling = max(LIMITS[title], min(CEILINGS[title], figure))
        rest = re.sub(rf'"{title}": [\d_]+', f'"{title}": {ceiling:_}', rest, count=1)
    Path(__file__).write_text(head + start + rest, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lower", action="store_true", help="write the figures into this file as ceilings")
    chosen = parser.parse_args()
    figures, details = measure()
    print(f"{'':32}{'now':>8}{'limit':>8}{'ceiling':>8}")
    for title, figure in figures.items():
        bounds = {"above its ceiling": CEILINGS[title], "above its limit": LIMITS[title], "": figure}
        verdict = next(verdict for verdict, bound in bounds.items() if figure > bound or not verdict)
        print(f"{title:32}{figure:8,}{LIMITS[title]:8,}{CEILINGS[title]:8,}  {verdict}".rstrip())
    for title, rows in details.items():
        if rows:
            print(f"\n{title}:", *rows, sep="\n  ")
    if chosen.lower:
        lower(figures)
    return int(any(figure > CEILINGS[title] for title, figure in figures.items()))


if __name__ == "__main__":
    sys.exit(main())
