"""What is wrong with a set of parameters, in words: its place, its name, what was given, and what may stand there."""

import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from fedhubert_lib.yaml12 import Key


def explain(
    wrong: Sequence[Mapping[str, Any]],
    schema: type[BaseModel],
    place: Callable[[Key], str],
    above: Key = (),
) -> list[str]:
    """One line for each of pydantic's errors ``wrong`` about ``schema``, a section or a study of sections.

    ``place`` says where a key was given; ``above`` is the section that ``schema`` is.
    """
    lines = []
    for item in wrong:
        loc = tuple(part for part in item["loc"] if isinstance(part, str))  # without the position in a list
        *section, name = loc
        owner: Any = schema.model_fields[section[0]].annotation if section else schema
        described = owner.model_json_schema()["properties"].get(name, {})
        given = "nothing" if item["input"] is None else reprlib.repr(item["input"])
        if item["type"] == "extra_forbidden":
            kind = "section" if isinstance(item["input"], dict) else "parameter"
            text = f"no such {kind}{nearest(name, owner.model_fields)}"
        elif item["type"] == "value_error":
            text = f"{given} given; {item['ctx']['error']}"
        elif "$ref" in described:
            text = f"{given} given; a section with 'parameter: value' lines is expected"
        else:
            choices = described.get("enum") or described.get("items", {}).get("enum", [])
            near = nearest(item["input"], choices) if choices and isinstance(item["input"], str) else ""
            text = f"{given} given; {allowed(described)} is expected{near}"
        lines.append(f"{place(loc)}: {'.'.join(above + loc)}: {text}")
    return lines


def allowed(described: Mapping[str, Any]) -> str:
    """In words, what a parameter with this JSON schema may be."""
    if "anyOf" in described:
        return " or ".join(allowed(option) for option in described["anyOf"])
    if "enum" in described:
        return "one of " + ", ".join(described["enum"])
    if "pattern" in described:
        return f"text that matches {described['pattern']}"
    if described["type"] == "array":
        return f"a list, each item {allowed(described['items'])}"
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {described[limit]:g}" for limit, sign in signs.items() if limit in described]
    return " ".join([words.get(described["type"], "nothing"), " and ".join(limits)]).strip()


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that is nearest to ``name``, or all of them if none is near, to end an error with."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f" (there are {', '.join(valid)})"
