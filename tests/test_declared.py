"""All that leaves a client, listed: whatever else a handler would send fails here."""

import federation
import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from fedhubert_lib import distillation, federated, kmeans, params, pretraining
from fedhubert_lib.federated import client_app, inprocess, messages

TRAINED = {
    *("audio_seconds", "seconds", "waiting_seconds", "steps", "learning_rate", "gradient_norm"),
    *("objective_sum", "objective_count", "peak_memory_bytes"),
}
PRETRAINED = {
    *("loss_sum", "unmasked_loss_sum", "penalty_sum"),
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
    "kmeans.own": (set(), set()),
    "kmeans.lend": ({"centroids"}, set()),
    "kmeans.align": (set(), set()),
    "kmeans.moments": ({"sum", "squares", "count"}, set()),
    "kmeans.cache": (set(), set()),
    "kmeans.probe": ({"labels"}, set()),  # of public frames
    "distill.update": (WEIGHTS, TRAINED | PRETRAINED | {"objective", "soft_loss_sum"}),
    "distill.validate": (set(), PRETRAINED | {"objective", "soft_loss_sum"}),
    "distill.keys": ({"public"}, set()),
    "distill.receive": (set(), {"held"}),
    "distill.label": ({"counts", "runs"}, {"frames", "seconds"}),
}
"""Tensors and metrics of each answer. Weights are those that the server sent, as a difference to them."""

SHORT = {"rounds": 1, "cohort": 3, "device": "cpu", "precision": "float32"}


@pytest.fixture
def answers(monkeypatch) -> list[tuple[str, set[str], set[str], set[str]]]:
    """(action, records, tensors, metrics) of every answer from here on."""
    seen, answer = [], client_app.answer

    def listen(message, context, pack):
        action, sent, _ = messages.read_request(message.content)
        reply = answer(message, context, pack)
        arrays = set(reply.content["arrays"])
        if arrays and arrays <= set(sent):
            arrays = WEIGHTS
        seen.append((action, set(reply.content), arrays, set(reply.content["metrics"])))
        return reply

    monkeypatch.setattr(client_app, "answer", listen)
    return seen


def test_nothing_but_what_is_listed_leaves_a_client(tmp_path, answers):
    run = federation.make(tmp_path / "plain")
    pretraining.run(run, federation.pretrain(**SHORT))
    student = {"layers": 1, "hidden_size": 96, "local_steps": 1, "batch_seconds": 4.0, "crop_seconds": 1.5}
    hidden = {"secure_aggregation": True, "weighting": "clients"}
    distillation.run(run, params.Distill(**SHORT, **student, **hidden, send_teacher=True))
    pretraining.run(federation.make(tmp_path / "secure"), federation.pretrain(**SHORT, **hidden))
    kinds = ["federated", "client", "aligned", "one-shot", "random-projection"]
    p = params.Kmeans(codebooks=kinds, clusters=8, lloyd_rounds=2, normalisation="global", cache_features=True)
    with federated.connect(run) as clients:
        list(clients.ask("identify"))
        kmeans.run(run, p, clients)
    assert {action for action, *_ in answers} >= set(LEAVES) - {"kmeans.cache", "kmeans.probe", "distill.label"}
    for action, records, arrays, metrics in answers:
        assert records == {"arrays", "metrics", "client"}
        assert arrays <= LEAVES[action][0], action
        assert metrics <= LEAVES[action][1], action


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_a_server_that_is_not_trusted_hears_of_updates_alone(tmp_path, answers, quantile):
    private = {"privacy": "client", "privacy_quantile": quantile, "weighting": "clients"}
    pretraining.run(federation.make(tmp_path), federation.pretrain(**SHORT, **private))
    told = {"learning_rate", "within_bound"} if quantile else {"learning_rate"}
    assert [answer for answer in answers if answer[0] != "identify"] == [
        ("pretrain.update", {"arrays", "metrics", "client"}, WEIGHTS, told)
    ] * 3


def test_every_handler_is_listed():
    assert set(client_app.HANDLERS) == set(LEAVES)


@pytest.mark.parametrize("pack", [messages.SharedArray, messages.Array], ids=["simulation", "network"])
def test_a_failure_over_a_network_names_no_file(tmp_path, monkeypatch, pack):
    """In simulation the reason helps; to another's server it would tell paths and utterances."""

    def fail(home, arrays, config):
        raise FileNotFoundError("secret.flac")

    monkeypatch.setitem(client_app.HANDLERS, "identify", fail)
    grid = inprocess.InProcessGrid(tmp_path, ["client-0"], "cpu")
    content = messages.request("identify", messages.packed({}, pack), {})
    message = Message(content, grid.nodes["client-0"], MessageType.TRAIN)
    context = Context(1, 2, {"client": "client-0", "run": str(tmp_path)}, RecordDict(), {})
    reason = client_app.answer(message, context, pack).content["client"]["failure"]
    assert "FileNotFoundError" in reason
    assert ("secret.flac" in reason) == (pack is messages.SharedArray)
