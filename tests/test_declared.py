"""All that leaves a client, listed: whatever else a handler would send fails here."""

import copy
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import federation
import pytest
from grid import Message

from fedhubert_lib import distillation, federated, hubert, kmeans, params, pretraining
from fedhubert_lib.federated import flower, handlers, hooks, wire
from fedhubert_lib.kmeans import targets

TRAINED = {
    *("audio_seconds", "seconds", "waiting_seconds", "steps", "learning_rate", "gradient_norm"),
    *("objective_count", "peak_memory_bytes", "update_norm"),
}
PRETRAINED = {
    *("objective", "loss_sum", "unmasked_loss_sum", "penalty_sum"),
    *("masked_frames", "unmasked_frames", "correct_masked", "correct_unmasked"),
}
WEIGHTS = {"(weights)"}

LEAVES: dict[str, tuple[set[str], set[str]]] = {
    "identify": (set(), set()),
    "pretrain.update": (WEIGHTS, TRAINED | PRETRAINED),
    "pretrain.validate": (set(), PRETRAINED),
    "pretrain.keys": ({"public"}, set()),
    "pretrain.forget": (set(), set()),
    "kmeans.local_centroids": ({"centroids", "counts"}, set()),
    "kmeans.lloyd": ({"sums", "counts", "inertias"}, set()),
    "kmeans.label": ({"counts", "runs"}, {"frames", "seconds"}),
    "kmeans.fit": (set(), {"frames", "inertia", "seconds"}),
    "kmeans.lend": ({"centroids"}, set()),
    "kmeans.features": (set(), set()),
    "kmeans.forget": (set(), set()),
    "kmeans.probe": ({"labels"}, set()),  # of public frames
    "distill.update": (WEIGHTS, TRAINED | PRETRAINED | {"cosine_sum", "frames"}),
    "distill.validate": (set(), PRETRAINED | {"cosine_sum", "frames"}),
    "distill.keys": ({"public"}, set()),
    "distill.forget": (set(), set()),
    "distill.receive": (set(), {"held"}),
    "targets.label": (set(), set()),
    "targets.features": (set(), set()),
    "targets.local_centroids": ({"centroids", "counts"}, set()),
    "targets.lloyd": ({"sums", "counts", "inertias"}, set()),
    "targets.forget": (set(), set()),
}
"""Tensors and metrics of each answer. Weights are those that the server sent, as a difference to them, and with
``local_state: cohort`` AdamW's moments."""

SHORT = {"rounds": 1, "cohort": 3, "device": "cpu", "precision": "float32"}


@pytest.fixture
def answers(monkeypatch) -> list[tuple[str, set[str], set[str]]]:
    """(action, tensors, metrics) of every answer from here on."""
    seen, answer = [], handlers.answer

    def listen(home, action, sent, config):
        reply = answer(home, action, sent, config)
        arrays = set(reply.arrays)
        if arrays and arrays <= set(sent):
            arrays = WEIGHTS
        seen.append((action, arrays, set(reply.metrics)))
        return reply

    monkeypatch.setattr(handlers, "answer", listen)
    return seen


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[Path, list[tuple]]:
    """Small runs that send every message there is, but for kmeans.probe, for which public speech is needed.

    Their folder, and home, action, arrays and configuration of each message with its answer.
    """
    folder, seen, answer = tmp_path_factory.mktemp("everything"), [], handlers.answer

    def listen(home, action, arrays, config):
        message = home, action, dict(arrays), copy.deepcopy(config)
        seen.append((*message, reply := answer(home, action, arrays, config)))
        return reply

    run = federation.make(folder / "plain")
    student = {"layers": 1, "hidden_size": 96, "local_steps": 1, "batch_seconds": 4.0, "crop_seconds": 1.5}
    hidden = {"secure_aggregation": True, "weighting": "clients"}
    kinds = ["federated", "client", "aligned", "one-shot", "random-projection"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handlers, "answer", listen)
        patch.setitem(hubert.PRESETS, "tiny", {**hubert.PRESETS["tiny"], **federation.NARROW})
        pretraining.run(run, federation.pretrain(**SHORT))
        distillation.run(run, params.Distill(**SHORT, **student, **hidden, send_teacher=True))
        with federated.connect(run) as clients:
            targets.run(run, params.Distill(**SHORT, **student, objectives=["hubert"]), clients)
        pretraining.run(federation.make(folder / "secure"), federation.pretrain(**SHORT, **hidden))
        p = params.Kmeans(codebooks=kinds, clusters=8, lloyd_rounds=2)
        with federated.connect(run) as clients:
            list(clients.ask("identify"))
            kmeans.run(run, p, clients)
    assert {action for _, action, *_ in seen} >= set(LEAVES) - {"kmeans.probe"}
    return folder, seen


def test_nothing_but_what_is_listed_leaves_a_client(everything):
    for _, action, sent, _, reply in everything[1]:
        arrays = set(reply.arrays)
        if arrays and arrays <= set(sent):
            arrays = WEIGHTS
        assert arrays <= LEAVES[action][0], action
        assert set(reply.metrics) <= LEAVES[action][1], action


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_a_server_that_is_not_trusted_hears_of_updates_alone(tmp_path, answers, quantile):
    private = {"privacy": "client", "privacy_quantile": quantile, "weighting": "clients"}
    pretraining.run(federation.make(tmp_path), federation.pretrain(**SHORT, **private))
    told = {"learning_rate", "within_bound"} if quantile else {"learning_rate"}
    heard = [answer for answer in answers if answer[0] not in ("identify", "pretrain.forget")]
    assert heard == [("pretrain.update", WEIGHTS, told)] * 3


def texts(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every text in a message, as the mapping that holds it and its key; parameters are checked as those of a study."""
    for key, value in config.items():
        if isinstance(value, dict) and key != "params":
            yield from texts(value)
        elif isinstance(value, str):
            yield config, key


def test_no_text_of_a_server_leads_out_of_a_clients_folders(everything, monkeypatch):
    """Over Flower, as it comes from a server that is not this machine's."""
    folder, seen = everything
    monkeypatch.setattr(flower, "Message", Message)
    messages, refused = {message[1]: message for message in reversed(seen)}, set()

    def others(client: str) -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and client not in p.parts}

    for home, action, arrays, config, _ in messages.values():
        before, node = others(home.client), {"client": home.client, "run": str(home.data.parents[2])}
        for number in range(len(list(texts(config)))):
            hostile = copy.deepcopy(config)
            place, key = list(texts(hostile))[number]
            place[key] = f"../../../client-001/{place[key]}"
            request = {"action": action, "config": json.dumps(hostile)}
            content = {"arrays": flower.ArrayRecord(arrays), "request": request}
            reply = flower.answer(Message(content), SimpleNamespace(node_config=node))
            if "failure" in reply.content["client"]:
                refused.add(key)
            assert others(home.client) == before, (action, key)
    assert refused >= wire.NAMES == {"session", "kind", "digest"} and {"round", "durable"} == wire.NUMBERS


@pytest.mark.parametrize("key", sorted(wire.NAMES))
@pytest.mark.parametrize("value", ["..", ".hidden", "a/b", "/etc", "a\\b", "a\n", "a\0", "", "\u00e9", 1, None, ["a"]])
def test_what_is_no_name_is_refused_wherever_it_stands(key, value):
    for config in ({key: value}, {"teacher": {key: value}}):
        with pytest.raises(ValueError, match=f"^{key}: .* is no name"):
            wire.check(config)
    wire.check({"teacher": {key: "0af-layer-middle_1.0"}})


@pytest.mark.parametrize("key", sorted(wire.NUMBERS))
@pytest.mark.parametrize("value", [-1, 1.0, True, "1", None, "../1"])
def test_what_is_no_round_is_refused(key, value):
    with pytest.raises(ValueError, match=f"^{key}: .* a whole number"):
        wire.check({key: value})
    wire.check({key: 0})


def test_every_handler_is_listed():
    for module in handlers.MODULES.values():
        importlib.import_module(f"fedhubert_lib.{module}")
    assert set(handlers.HANDLERS) == set(LEAVES)


def test_every_hook_is_a_function_of_updates_or_a_class_of_the_server():
    """They are named in a table, and imported by a study that chooses them alone."""
    everything = {"local_state": "keep", "proximal": 0.1, "secure_aggregation": True, "privacy": "server"}
    everything |= {"compression": "int8"}
    for server in ("scaffold", "median"):
        p = params.Pretrain(**everything, server=server)
        for hook in hooks.chosen(hooks.AT_CLIENTS, p):
            assert inspect.isgeneratorfunction(hook) and list(inspect.signature(hook).parameters) == ["update"]
        assert all(issubclass(hook, hooks.Hook) for hook in hooks.chosen(hooks.AT_SERVER, p))
    p = params.Pretrain(local_state="cohort")
    assert [hook.__name__ for hook in hooks.chosen(hooks.AT_SERVER, p)] == ["Sharing"]
    assert [hook.__name__ for hook in hooks.chosen(hooks.AT_CLIENTS, p)] == ["personal", "carried"]
    plain = params.Pretrain(local_state="reset")
    assert [hook.__name__ for hook in hooks.chosen(hooks.AT_CLIENTS, plain)] == ["personal"]
    assert not list(hooks.chosen(hooks.AT_SERVER, plain))


@pytest.mark.parametrize("simulated", [True, False])
def test_a_failure_over_a_network_names_no_file(tmp_path, monkeypatch, simulated):
    """In simulation the reason helps; to another's server it would tell paths and utterances."""

    def fail(home, arrays, config):
        raise FileNotFoundError("secret.flac")

    monkeypatch.setitem(handlers.HANDLERS, "identify", fail)
    home = handlers.home(tmp_path, "client-0", "identify", "cpu", simulated)
    reason = handlers.answer(home, "identify", {}, {}).reason
    assert "FileNotFoundError" in reason
    assert ("secret.flac" in reason) == simulated
