"""Replies that are too large are not fetched to their end, by Flower's own way of fetching."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Array, Message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from fedpft_core.wire import flower as wire
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import Failure
from server_app.transport import FlowerTransport

MB = 2**20


class Client:
    """What a SuperLink answers: one reply to each message, made of so many bytes."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.sent: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.fetched = 0
        self.alike = False  # whether all pieces of a reply are the same one
        self.broken = False

    def PushMessages(self, request: Any) -> Any:
        raise AssertionError

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        protos, trees = [], []
        for sent in request.message_ids:
            size = self.sizes[self.sent.index(sent)]
            data = bytes(size) if self.alike else random.Random(size).randbytes(size)
            envelope = Envelope("train-reply", "{}", {"adapter": data})
            reply = Message(wire.to_record(envelope), dst_node_id=1, message_type="train")
            reply.metadata.__dict__["_reply_to_message_id"] = sent
            reply.metadata.__dict__["_message_id"] = reply.object_id
            for key, part in get_all_nested_objects(reply).items():
                self.objects[key] = part.deflate()
                if self.broken and isinstance(part, Array):
                    self.objects[key] = self.objects[key].replace(b"arraychunk_ids", b"other")
            trees.append(get_object_tree(reply))
            protos.append(message_to_proto(reply))
        return PullAppMessagesResponse(messages_list=protos, message_object_trees=trees)

    def PullObject(self, request: Any) -> PullObjectResponse:
        content = self.objects[request.object_id]
        self.fetched += len(content)
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:
        pass


class Grid(HttpGrid):
    """Flower's own, with a SuperLink in this process."""

    def __init__(self, client: Client) -> None:
        self._client: Any = client
        self._run: Any = SimpleNamespace(run_id=1)
        self.node = Node(node_id=1)

    def push_messages(self, messages: Any) -> list[str]:
        client: Any = self._client
        client.sent.append(f"message-{len(client.sent)}")
        return [client.sent[-1]]


def exchanged(sizes: list[int], most: int, **traits: bool) -> tuple[Client, list[Any]]:
    client = Client(sizes)
    for name, value in traits.items():
        setattr(client, name, value)
    transport = FlowerTransport(Grid(client), poll_seconds=0.0)
    assert transport.guard
    asked = Envelope("train", "{}", {}, answer=most)
    got: dict[int, Any] = {}
    transport.exchange(dict.fromkeys(range(len(sizes)), asked), 1, 30.0, got.__setitem__)
    return client, [got[i] for i in range(len(sizes))]


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are made by a task, of which Flower knows in its own processes."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 2**62, raising=False)


def test_a_reply_that_is_too_large_is_given_up_and_the_others_come() -> None:
    client, (small, large) = exchanged([MB, 60 * MB], most=2 * MB)
    assert isinstance(small, Envelope) and len(small.parts["adapter"]) == MB
    assert isinstance(large, Failure) and "larger than a good one" in large.reason
    # Its first megabytes, and what Flower's threads had asked for by then.
    assert client.fetched < 60 * MB


def test_one_piece_named_many_times_counts_as_often() -> None:
    client, (reply,) = exchanged([60 * MB], most=20 * MB, alike=True)
    assert isinstance(reply, Failure) and "larger than a good one" in reply.reason
    assert client.fetched < 12 * MB
    _, (reply,) = exchanged([20 * MB], most=20 * MB, alike=True)
    assert isinstance(reply, Envelope)


def test_a_reply_that_flower_cannot_read_ends_no_run() -> None:
    _, (reply,) = exchanged([MB], most=2 * MB, broken=True)
    assert isinstance(reply, Failure) and "unreadable" in reply.reason


def test_without_a_limit_everything_comes() -> None:
    client, (reply,) = exchanged([20 * MB], most=0)
    assert isinstance(reply, Envelope) and client.fetched > 20 * MB


def test_a_reply_as_large_as_it_may_be_comes_whole() -> None:
    _, (reply,) = exchanged([12 * MB], most=12 * MB)
    assert isinstance(reply, Envelope)
