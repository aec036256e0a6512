"""Envelopes as Flower records: nothing lost, nothing but the expected accepted."""

from __future__ import annotations

from typing import Any

import fabricate
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedpft_core.errors import ReplyError
from fedpft_core.wire import flower as wire
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.messages import Hello


def test_an_envelope_survives_its_record() -> None:
    for message in (Hello(), fabricate.reply(fabricate.expected())):
        sealed = seal(message)
        assert wire.from_record(wire.to_record(sealed)) == sealed


def test_parts_are_plain_byte_arrays() -> None:
    sealed = seal(fabricate.reply(fabricate.expected()))
    record = wire.to_record(sealed)
    (arrays,) = record.array_records.values()
    assert {k: a.numpy().nbytes for k, a in arrays.items()} == {
        k: len(v) for k, v in sealed.parts.items()
    }
    assert all(a.dtype == "uint8" for a in arrays.values())


def good() -> dict[str, Any]:
    record = wire.to_record(seal(fabricate.reply(fabricate.expected())))
    return dict(record)


def config(**keys: Any) -> dict[str, Any]:
    return {"fedpft": ConfigRecord({"kind": "hello", "head": "{}", "check": ""} | keys)}


def parts(array: Array) -> dict[str, Any]:
    return {"fedpft.parts": ArrayRecord({"adapter": array})}


@pytest.mark.parametrize(
    "change",
    [
        {"fedpft": None},
        {"fedpft": ConfigRecord({"kind": "hello"})},
        {"fedpft": MetricRecord({"kind": 1})},
        config(kind=1),
        config(head=b"{}"),
        config(check=1.5),
        parts(Array(np.zeros(3, dtype=np.float32))),
        parts(Array(np.zeros((2, 2), dtype=np.uint8))),
        parts(Array("uint8", (3,), "numpy.ndarray", b"\x80\x04\x95not an array")),
        parts(Array("uint8", (3,), "numpy.ndarray", b"")),
        parts(Array("uint8", (3,), "other", b"abc")),
    ],
)
def test_records_that_are_something_else_are_refused(change: dict[str, Any]) -> None:
    records = {k: v for k, v in (good() | change).items() if v is not None}
    with pytest.raises(ReplyError):
        open_envelope(wire.from_record(RecordDict(records)))


def test_a_pickled_array_is_not_unpickled() -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    array = Array("object", (1,), "numpy.ndarray", buffer.getvalue())
    with pytest.raises(ReplyError, match="malformed"):
        wire.from_record(RecordDict(good() | parts(array)))
