"""A node that holds the frozen base in 8 bits (node config `base`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from client_app.client import Client
from client_app.node import client_for
from client_app.process import ProcessCache
from fedpft_core.proxy.int8 import Int8Linear
from fedpft_core.wire.coded import rounded
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.messages import Hello, HelloReply, NeedReply, TrainReply, TrainRequest
from fedpft_core.wire.package import Package


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., Client]:
    """Makes a node with rows of its own and keys as given."""
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))

    def make(**keys: Any) -> Client:
        flat = {"name": "n", "data-path": str(tmp_path / "rows.csv")}
        return client_for(flat | {"cache-dir": str(tmp_path / "cache")} | keys, {})

    return make


def test_a_node_says_so_and_trains_the_same_on_what_8_bits_hold(
    node: Callable[..., Client],
    sub_fm: tuple[Package, dict[str, Any]],
    request_for: Callable[..., TrainRequest],
) -> None:
    """Both in one process, as in a simulation, whose models are kept apart."""
    whole = sub_fm[0]
    package = replace(whole, weights={k: rounded(t, "int8") for k, t in whole.weights.items()})
    cache, adapters = ProcessCache(), []
    for keys in ({}, {"base": "int8"}, {}, {"base": "int8"}):
        made = node(**keys)
        made.cache = cache
        said = open_envelope(made.handle(seal(Hello())))
        assert isinstance(said, HelloReply) and said.means == keys
        answer = open_envelope(made.handle(seal(request_for(package))))
        assert isinstance(answer, TrainReply)
        adapters.append(answer.adapter)
    assert all(tiny.same_bits(adapters[0], other) for other in adapters[1:])
    assert len(cache.models) == 2
    held = [any(isinstance(m, Int8Linear) for m in h.model.model.modules())
            for h in cache.models.values()]  # fmt: skip
    assert sorted(held) == [False, True]
    # A wiped store must be served again.
    made.store.remove(package.digest())
    again = open_envelope(made.handle(seal(replace(request_for(package), package=b""))))
    assert isinstance(again, NeedReply)
