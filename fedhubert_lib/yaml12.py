"""Study files, read as a person reads them.

PyYAML follows YAML 1.1, where ``1e-3`` is text, ``no`` is false, ``0777`` is 511, ``12:30`` is 750, and the second of
two equal keys wins in silence. Here a number is a decimal number, only ``true`` and ``false`` are booleans, a repeated
key is an error, and every value knows its line. A study file is two levels deep, so nothing else is read.
"""

import re
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str, ...]
"""``("seed",)`` at the top level, ``("kmeans", "clusters")`` in a section."""

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


def scalar(text: str) -> str | int | float | bool | None:
    """What a plain (unquoted) word of YAML stands for. A number with a leading zero, once octal, is left as text."""
    if _INTEGER.fullmatch(text) and len(text) < 400:  # Python refuses to read integers of thousands of digits
        return int(text)
    if _DECIMAL.fullmatch(text) and not _LEADING_ZERO.fullmatch(text):
        return float(text)
    return {"true": True, "false": False, "null": None, "~": None, "": None}.get(text, text)


def value(text: str) -> Any:
    """One value as it may stand behind a key: a word, quoted text, or a flat list. Raises ValueError."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"cannot be read as YAML ({_problem(error)})") from None
    return None if node is None else _convert(node)


def read(path: Path) -> tuple[dict[str, Any], dict[Key, int], list[str]]:
    """Read a file of top-level values and one level of sections.

    Returns the values, the line of each key (from 1), and what is wrong with the file, every item with its place.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        return {}, {}, [f"{path}: cannot be read ({error})"]
    except (yaml.YAMLError, RecursionError) as error:
        return {}, {}, [f"{path}: cannot be read as YAML ({_problem(error)})"]
    if not isinstance(node, yaml.MappingNode):
        return {}, {}, [f"{path}: empty, or not a study: 'key: value' lines and sections are expected"]
    lines: dict[Key, int] = {}
    errors: list[str] = []
    return _mapping(node, (), lines, errors, path), lines, errors


def _mapping(
    node: yaml.MappingNode, above: Key, lines: dict[Key, int], errors: list[str], path: Path
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, content in node.value:
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode):
            errors.append(f"{path}:{line}: a key must be a word")
            continue
        key = (*above, name.value)
        if key in lines:
            errors.append(f"{path}:{line}: {'.'.join(key)}: stands twice, here and on line {lines[key]}; keep one")
            continue
        lines[key] = line
        try:
            if isinstance(content, yaml.MappingNode) and not above:
                result[name.value] = _mapping(content, key, lines, errors, path)
            else:
                result[name.value] = _convert(content)
        except ValueError as error:
            errors.append(f"{path}:{line}: {'.'.join(key)}: {error}")
    return result


def _convert(node: yaml.Node) -> Any:
    if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq"):
        raise ValueError("a word, text in quotes, or a flat list is expected here")
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
        raise ValueError("a list may hold words only, no lists or mappings")
    return [_convert(item) for item in node.value]


def _problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
