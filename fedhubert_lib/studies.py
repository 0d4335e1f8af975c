"""Values of the parameters, from a study file, ``--set`` or a notebook; every error names its place.

One YAML file is one study. Its top level holds ``study``, ``seed`` and, where it builds on another file, ``base``; six
sections, one per notebook, hold what differs from the defaults.
"""

import difflib
import inspect
import json
import os
import re
import reprlib
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode

from fedhubert_lib import params
from fedhubert_lib.params import FOLDERS, SECTIONS, SUITED, Count, Federation, Name, Section

Key = tuple[str, ...]
"""``("seed",)`` at the top level, ``("kmeans", "clusters")`` in a section."""

_ODD = (ValueError, LookupError, TypeError)
"""What reading YAML raises beside YAMLError: no UTF-8, a number without end, a tag that does not fit its value."""
_SHAPE = {"layers", "hidden_size", "attention_heads", "feed_forward_size", "conv_width"}
"""Parameters that a student does not inherit from its teacher's pretraining."""
_INHERITED = (Federation.model_fields.keys() | {"codebook"}) - Section.model_fields.keys() - _SHAPE


class Study(BaseModel):
    """One YAML file: a name, a seed, and the parameters of the six notebooks."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    study: Name = Field(description="name of the study")
    run: Name = Field(description="folder under outputs/ that holds the run")
    seed: Count = Field(description="seed of every section that sets none itself")
    corpus: params.Corpus
    partition: params.Partition
    kmeans: params.Kmeans
    pretrain: params.Pretrain
    distill: params.Distill
    evaluate: params.Evaluate

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Values that cannot go together: (section, parameter, what is wrong and what to do)."""
        for stage in SECTIONS:
            yield from ((stage, key, text) for key, text in getattr(self, stage).conflicts())
        heldout, speakers = self.partition.heldout_speakers, self.corpus.speakers
        if self.corpus.kind == "synthetic" and heldout >= speakers:
            yield "partition", "heldout_speakers", f"{heldout} of corpus.speakers: {speakers}; leave some to train on"
        clients, codebooks = self.partition.clients, self.kmeans.codebooks
        for stage, section in ("pretrain", self.pretrain), ("distill", self.distill):
            if section.cohort > clients:
                yield stage, "cohort", f"{section.cohort}, but partition.clients is {clients}; give that or fewer"
            if section.codebook not in codebooks:
                text = f"{section.codebook}, but kmeans.codebooks has {', '.join(codebooks)}; add it there"
                yield stage, "codebook", text
        if self.evaluate.task == "superb" and self.corpus.keywords == "synthetic":
            yield "evaluate", "task", "superb needs background noise, which the synthetic keywords lack; give words"
        alone = self.corpus.kind == "folder" or self.corpus.kind == "librispeech" and not self.corpus.test_subsets
        if self.kmeans.features != "mfcc" and self.kmeans.layer == "auto" and alone and not heldout:
            text = "auto measures layers on speech that no client has; give layer or partition.heldout_speakers"
            yield "kmeans", "layer", text
        pretrain, distill = self.pretrain, self.distill
        if distill.teacher or "soft-targets" not in distill.objectives:
            return
        if pretrain.head == "personal" and distill.codebook == "client" and distill.label_weight > 0:
            yield "distill", "codebook", "client suits no head that is shared, as a student's is; give federated"
        if pretrain.head == "personal" and distill.soft_weight > 0:
            yield "distill", "soft_weight", "needs the teacher's head, but pretrain.head: personal keeps it; give 0"
        if distill.soft_weight > 0 and distill.label_weight > 0 and distill.codebook != pretrain.codebook:
            text = f"{distill.codebook}, but the teacher's soft targets are over pretrain.codebook: {pretrain.codebook}"
            yield "distill", "codebook", f"{text}; give the same, or one of the weights as 0"


class ParameterError(ValueError):
    """Wrong parameters: every one of them, each with its place and what may stand there."""

    def _render_traceback_(self) -> list[str]:  # IPython's name: in a notebook the message alone
        return [str(self)]


def load(path: str | Path, overrides: Sequence[str] = (), run: str | None = None) -> Study:
    """Read the study file ``path`` and put ``overrides`` (``section.key=value``, ``seed=1``) on top.

    What neither the file nor its ``base`` sets has its default; what ``distill`` does not set and ``pretrain`` does is
    pretraining's, but for the model's shape. ``run`` names the folder under outputs/; default: the file's ``run``, else
    its ``study``, else the file's name. The top level's ``seed`` holds in every section that sets none. Raises
    ParameterError with all errors at once.

    >>> study = load(params.ROOT / "params" / "toy.yaml", ["pretrain.rounds=8"], "mine")
    >>> study.pretrain.rounds, study.distill.run
    (8, 'mine')
    """
    path = Path(path)
    raw, places = _read(path)
    errors: list[str] = []
    for override in overrides:
        try:
            places[_override(raw, override)] = f"--set {override}"
        except ValueError as error:
            errors.append(f"--set {override}: {error}")
    raw = {"study": path.stem, "seed": 0, **raw}
    raw["run"] = run or raw.get("run", raw["study"])
    places |= {("run",): f"--run {run}"} if run else {}
    pretrain = raw.get("pretrain")
    for stage in SECTIONS:
        section = {} if raw.get(stage) is None else raw[stage]
        if isinstance(section, dict):
            if "run" in section:
                errors.append(f"{places[stage, 'run']}: {stage}.run: one folder is one run; set run at the top level")
            if stage == "distill" and isinstance(pretrain, dict):
                deciding = {n: pretrain.get(n, Federation.model_fields[n].default) for n in ("server", "local_state")}
                same = all(section.get(name, value) == value for name, value in deciding.items())
                inherited = _INHERITED if same else _INHERITED - set(SUITED)
                section = {name: pretrain[name] for name in pretrain.keys() & inherited} | section
            raw[stage] = {"seed": raw["seed"], **section, "run": raw["run"]}

    def place(key: Key) -> str:
        return places.get(key) or places.get(key[:1]) or str(path)

    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        copied = {(stage, name) for stage in SECTIONS for name in ("run", "seed")} - places.keys()
        copied |= {("distill", name) for name in _INHERITED} - places.keys()
        errors += _explained(error, place, copied)
    else:
        errors += [f"{place((stage, key))}: {stage}.{key}: {text}" for stage, key, text in study.conflicts()]
    if errors:
        raise ParameterError("\n".join(dict.fromkeys(errors)))
    return study


def check(stage: str, namespace: Mapping[str, Any]) -> Section:
    """The parameters of ``stage`` from ``namespace``, the variables that its notebook has set: its ``globals()``.

    A variable with a plain value whose name is no parameter is an error, since papermill injects a misspelt parameter
    without a word; names that begin with an underscore are the notebook's own. What is not set has its default: the
    parameters cell shows only what its reader may want to change.
    """
    schema, where = SECTIONS[stage], f"parameters of {FOLDERS[stage]}"
    plain = {
        # papermill reads YAML 1.1, to which 1e-3 is text
        name: _value(schema, name, value) if isinstance(value, str) and name in schema.model_fields else value
        for name, value in namespace.items()
        if (
            isinstance(value, bool | int | float | str | list | tuple | set | dict | None)
            or (name in schema.model_fields and not isinstance(value, types.ModuleType))  # such as NumPy's: refused
        )
        and not name.startswith("_")
        and name not in ("In", "Out")  # IPython's
    }
    try:
        section = schema.model_validate(plain)
    except ValidationError as error:
        raise ParameterError("\n".join(_explained(error, lambda key: where, above=(stage,)))) from None
    if errors := [f"{where}: {stage}.{key}: {text}" for key, text in section.conflicts()]:
        raise ParameterError("\n".join(errors))
    return section


def described(stage: str) -> str:
    """All parameters of ``stage`` as text, in their groups: name, default, meaning and range."""
    schema = SECTIONS[stage]
    properties = schema.model_json_schema()["properties"]
    lines = [f"{stage}:  # {schema.__doc__}"]
    for group in reversed(schema.__mro__):
        if issubclass(schema, Federation) and group in (*Federation.__bases__, schema):
            lines.append("  # This stage." if group is schema else f"  # {group.__doc__}")
        for name in [name for name in inspect.get_annotations(group) if name in properties]:
            content = properties.pop(name)
            default = content["default"]
            default = default if isinstance(default, str) and default else json.dumps(default)
            lines.append(f"  {name}: {default}  # {content['description']} ({_range(content)})")
    return "\n".join(lines)


def _range(schema: Mapping[str, Any]) -> str:
    """In words, what a parameter with this JSON schema may be."""
    if "anyOf" in schema:
        return " or ".join(map(_range, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_range(schema['items'])}"
    words = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
    word = ", ".join(schema.get("enum", ())) or schema.get("const") or words.get(schema["type"], "null")
    null = " or null" if schema.get("default", 0) is None else ""
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return f"{word} {' and '.join(f'{signs[key]} {schema[key]:g}' for key in signs if key in schema)}".strip() + null


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that is nearest to ``name``, or all of them if none is near, to end an error with."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f" (there are {', '.join(valid)})"


def _explained(
    error: ValidationError, place: Callable[[Key], str], copied: Collection[Key] = (), above: Key = ()
) -> list[str]:
    """One line for each mistake: its place, its parameter, pydantic's message and the nearest valid name.

    ``copied`` are the values that another place has set, where the mistake is shown; ``above`` is the section that was
    validated, if it was one alone.
    """
    lines: dict[Key, str] = {}
    for item in error.errors(include_url=False):
        key = tuple(part for part in (*above, *item["loc"]) if isinstance(part, str))[:2]
        if key in lines and item["type"] == "literal_error" and not isinstance(item["loc"][-1], int):
            lines[key] += f"; or {item['ctx']['expected']}"
        if key in copied or key in lines:  # a union has a message for each of its types, a list for each element
            continue
        fields = SECTIONS[key[0]].model_fields if len(key) == 2 else Study.model_fields
        if item["type"] == "extra_forbidden":
            text = "no such parameter or section" + nearest(key[-1], fields)
        else:
            choices = re.findall(r"'([^']+)'", item["ctx"]["expected"]) if item["type"] == "literal_error" else []
            hint = difflib.get_close_matches(str(item["input"]), choices, n=1)
            text = f"{item['msg']}, not {reprlib.repr(item['input'])}" + "".join(f"; did you mean {h}?" for h in hint)
        lines[key] = f"{place(key)}: {'.'.join(key)}: {text}"
    return list(lines.values())


def _read(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[Key, str]]:
    """The values of a study file over those of its ``base``, and the place of each key."""
    yaml = YAML(typ="safe", pure=True)  # YAML 1.2: ``no`` is a word, 1e-3 a number; of two equal keys it refuses one
    try:
        with path.open("rb") as file:  # ten lines of aliases can stand for a thousand million values
            if alias := next((event for event in yaml.parse(file) if isinstance(event, AliasEvent)), None):
                raise YAMLError(f"*{alias.anchor} in line {alias.start_mark.line + 1}: write the value itself")
        raw, root = yaml.load(path), yaml.compose(path)
    except (OSError, RecursionError, *_ODD, YAMLError) as error:
        raise ParameterError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(raw, dict) or not isinstance(root, MappingNode):
        raise ParameterError(f"{path}: empty, or not a study: 'key: value' lines and sections are expected")
    places: dict[Key, str] = {}
    for name, content in root.value:
        inside = content.value if isinstance(content, MappingNode) else ()
        for key in [(name,), *((name, inner) for inner, _ in inside)]:
            place = f"{path}:{key[-1].start_mark.line + 1}"
            if not key[-1].tag.endswith(":str"):
                raise ParameterError(f"{place}: a name is expected before the colon, of a parameter or section")
            places[tuple(node.value for node in key)] = place
    if (base := raw.pop("base", None)) is None:
        return raw, places
    if "\0" in str(base):
        raise ParameterError(f"{places['base',]}: base: {base!r} is no name of a file")
    under = path.parent / os.path.expanduser(str(base))
    if under.resolve() in (path.resolve(), *above):
        raise ParameterError(f"{places['base',]}: base: {base} builds on this file; name another")
    values, base_places = _read(under, (*above, path.resolve()))
    values = {key: value for key, value in values.items() if key not in ("study", "run")}
    for key, value in raw.items():
        old = values.get(key)  # an empty section changes nothing
        values[key] = old | (value or {}) if isinstance(old, dict) and isinstance(value, dict | None) else value
    return values, base_places | places


def _override(raw: dict[str, Any], override: str) -> Key:
    """Put ``section.key=value`` into ``raw`` and return its key."""
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key) or len(key) > 2 or key[0] in SECTIONS and len(key) == 1:
        raise ValueError("section.parameter=value is expected, or study, run or seed=value")
    if len(key) == 1:
        raw[key[0]] = _value(Study, key[0], text)
    elif key[0] not in SECTIONS:
        raise ValueError(f"no section {key[0]!r}{nearest(key[0], SECTIONS)}")
    else:
        section = raw[key[0]] = {} if raw.get(key[0]) is None else raw[key[0]]
        if not isinstance(section, dict):
            raise ValueError(f"section {key[0]} of the file is not a mapping")
        section[key[1]] = _value(SECTIONS[key[0]], key[1], text)
    return key


def _value(schema: type[BaseModel], name: str, text: str) -> Any:
    """The value of a parameter: of text, such as a path, as it stands, else read as YAML; what is none stays text."""
    if schema.model_json_schema()["properties"].get(name, {}).get("type") == "string":
        return text
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, RecursionError, *_ODD):  # the schema says what it wants
        return text
