"""All that leaves a client, listed: whatever else a handler would send fails here."""

import importlib
import inspect

import federation
import pytest

from fedhubert_lib import distillation, federated, kmeans, params, pretraining
from fedhubert_lib.federated import handlers, hooks
from fedhubert_lib.kmeans import targets

TRAINED = {
    *("audio_seconds", "seconds", "waiting_seconds", "steps", "learning_rate", "gradient_norm"),
    *("objective_sum", "objective_count", "peak_memory_bytes"),
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
    "kmeans.local_centroids": ({"centroids", "counts"}, set()),
    "kmeans.lloyd": ({"sums", "counts", "inertias"}, set()),
    "kmeans.label": ({"counts", "runs"}, {"frames", "seconds"}),
    "kmeans.fit": (set(), {"frames", "inertia", "seconds"}),
    "kmeans.lend": ({"centroids"}, set()),
    "kmeans.moments": ({"sum", "squares", "count"}, set()),
    "kmeans.features": (set(), set()),
    "kmeans.forget": (set(), set()),
    "kmeans.probe": ({"labels"}, set()),  # of public frames
    "distill.update": (WEIGHTS, TRAINED | PRETRAINED | {"soft_loss_sum"}),
    "distill.validate": (set(), PRETRAINED | {"soft_loss_sum"}),
    "distill.keys": ({"public"}, set()),
    "distill.receive": (set(), {"held"}),
    "targets.label": (set(), set()),
    "targets.features": (set(), set()),
    "targets.local_centroids": ({"centroids", "counts"}, set()),
    "targets.lloyd": ({"sums", "counts", "inertias"}, set()),
    "targets.forget": (set(), set()),
}
"""Tensors and metrics of each answer. Weights are those that the server sent, as a difference to them."""

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


def test_nothing_but_what_is_listed_leaves_a_client(tmp_path, answers):
    run = federation.make(tmp_path / "plain")
    pretraining.run(run, federation.pretrain(**SHORT))
    student = {"layers": 1, "hidden_size": 96, "local_steps": 1, "batch_seconds": 4.0, "crop_seconds": 1.5}
    hidden = {"secure_aggregation": True, "weighting": "clients"}
    distillation.run(run, params.Distill(**SHORT, **student, **hidden, send_teacher=True))
    with federated.connect(run) as clients:
        targets.run(run, params.Distill(**SHORT, **student, objectives=["hubert"]), clients)
    pretraining.run(federation.make(tmp_path / "secure"), federation.pretrain(**SHORT, **hidden))
    kinds = ["federated", "client", "aligned", "one-shot", "random-projection"]
    p = params.Kmeans(codebooks=kinds, clusters=8, lloyd_rounds=2, normalisation="global")
    with federated.connect(run) as clients:
        list(clients.ask("identify"))
        kmeans.run(run, p, clients)
    assert {action for action, *_ in answers} >= set(LEAVES) - {"kmeans.probe"}  # for which public speech is needed
    for action, arrays, metrics in answers:
        assert arrays <= LEAVES[action][0], action
        assert metrics <= LEAVES[action][1], action


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_a_server_that_is_not_trusted_hears_of_updates_alone(tmp_path, answers, quantile):
    private = {"privacy": "client", "privacy_quantile": quantile, "weighting": "clients"}
    pretraining.run(federation.make(tmp_path), federation.pretrain(**SHORT, **private))
    told = {"learning_rate", "within_bound"} if quantile else {"learning_rate"}
    assert [answer for answer in answers if answer[0] != "identify"] == [("pretrain.update", WEIGHTS, told)] * 3


def test_every_handler_is_listed():
    for module in handlers.MODULES.values():
        importlib.import_module(f"fedhubert_lib.{module}")
    assert set(handlers.HANDLERS) == set(LEAVES)


def test_every_hook_is_a_function_of_updates_or_a_class_of_the_server():
    """They are named in tables, and imported by a study that chooses them alone."""
    everything = {"local_state": "keep", "proximal": 0.1, "secure_aggregation": True, "privacy": "server"}
    everything |= {"compression": "int8"}
    for server in ("scaffold", "median"):
        p = params.Pretrain(**everything, server=server)
        for hook in hooks.chosen(hooks.AT_CLIENTS, p):
            assert inspect.isgeneratorfunction(hook) and list(inspect.signature(hook).parameters) == ["update"]
        assert all(issubclass(hook, hooks.Hook) for hook in hooks.chosen(hooks.AT_SERVER, p))
    plain = params.Pretrain(local_state="reset")
    assert len(list(hooks.chosen(hooks.AT_CLIENTS, plain))) == 1 and not list(hooks.chosen(hooks.AT_SERVER, plain))


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
