"""Nodes made by hand that take part in secure aggregation, with the client's own rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fabricate import MAX_LENGTH, Node

from client_app.secure import Secure
from client_app.sums import masked
from fedpft_core.errors import ReplyError
from fedpft_core.secure import digits, ring
from fedpft_core.seeds import numpy_stream
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import (
    Failure,
    KeysRequest,
    NeedReply,
    RefusalReply,
    RevealRequest,
    SecureStatisticsReply,
    SecureStatisticsRequest,
    SecureTrainReply,
    SecureTrainRequest,
    SharesRequest,
    TrainReply,
)
from fedpft_core.wire.package import Package
from fedpft_core.wire.parcel import Parcel


@dataclass
class SecureNode(Node):
    """A node made by hand that masks; `lost` is the kind of message that it does not answer."""

    root: Path = Path()
    lost: str = ""
    bend: Callable[[Any], Any] | None = None  # turns an answer into another
    noted: bool = True
    plain: dict[int, np.ndarray] = field(default_factory=dict)  # what it has masked, by round
    sums: Any = None  # over its rows
    form: Any = None  # what is summed

    def answer(self, envelope: Envelope) -> Envelope | Failure:
        if envelope.kind == self.lost:
            return Failure("the node is gone")
        message, secure = open_envelope(envelope), Secure(self.root, self.name)
        made: Any
        try:
            match message:
                case KeysRequest():
                    made = secure.show_keys(message)
                case SharesRequest():
                    made = secure.share(message)
                case RevealRequest():
                    made = secure.reveal(message)
                case SecureTrainRequest():
                    made = self._masked(message, secure)
                case SecureStatisticsRequest():
                    made = self._summed(message, secure)
                case _:
                    return super().answer(envelope)
        except ReplyError as error:
            made = RefusalReply(self.name, str(error))
        made = self.bend(made) if self.bend else made
        return made if isinstance(made, Envelope) else seal(made)

    def _masked(self, request: SecureTrainRequest, secure: Secure) -> Any:
        made = self._train(request)
        if isinstance(made, NeedReply):
            return made
        assert isinstance(made, TrainReply)
        base = codec.decode(request.adapter, request.fmt)
        new = codec.decode(made.adapter, made.fmt)
        values = np.concatenate([
            ring.quantise({k: new[k].double() - base[k].double() for k in base}, request.bits,
                          request.reach, numpy_stream(0, self.name)),
            ring.quantise({"loss": torch.tensor([made.loss])}, request.bits, ring.LOSS_REACH,
                          np.random.default_rng(0)),
            *(digits.split(made.counts[k].numpy(), request.digits, request.bits)
              for k in sorted(made.counts)),
        ])  # fmt: skip
        if self.noted:
            self.plain[request.round] = values
        data = secure.mask(request, values)
        return SecureTrainReply(
            self.name, request.session, request.round, request.digest, 2, 0.5, data
        )

    def _summed(self, request: SecureStatisticsRequest, secure: Secure) -> Any:
        if request.package:
            parcel = Parcel.from_bytes(request.package)
            self.packages[request.digest] = Package.made(
                parcel.manifest, parcel.tensors(), parcel.files
            )
        if request.digest not in self.packages:
            return NeedReply(self.name, request.digest, ())
        found = masked(self.sums, self.form, self.examples, MAX_LENGTH, secure, request)
        return SecureStatisticsReply(
            self.name, request.session, request.round, request.digest, 0.5, found
        )
