"""A client's class statistics under the masks of a session of secure aggregation."""

from __future__ import annotations

import numpy as np
import torch

from client_app.secure import Secure
from fedpft_core.errors import ReplyError
from fedpft_core.head.fixed import Fixed
from fedpft_core.head.form import Form, Sums
from fedpft_core.tensors import Tensors
from fedpft_core.wire.messages import SecureStatisticsRequest


def masked(
    found: Sums, form: Form, rows: int, most: int, secure: Secure,
    request: SecureStatisticsRequest,
) -> Tensors:  # fmt: skip
    """Put the session's masks on a client's sums, once these pass what the server cannot check.

    Args:
        found: the sums over the client's rows.
        form: what is summed.
        rows: that the client trains on.
        most: the most answers that a row can have.
        secure: the client's sessions.
        request: says how large the sums of a client can be.

    Returns:
        The one tensor `masked`, uint8.

    Raises:
        ReplyError: the sums are not such, or the session does not allow it. No figure of theirs is
            in the text.
    """
    if rows > request.rows or request.clients < 1:
        raise ReplyError("the request cannot be used (it has no room for this client's rows)")
    fixed = Fixed(
        form, found.width, request.modulus_bits, request.clients, request.rows, most,
        request.longest, request.label,
    )  # fmt: skip
    try:
        form.check(found, rows, request.longest, most)
    except ReplyError as error:
        raise ReplyError("this client's class statistics are not such as are asked for") from error
    try:
        values = fixed.quantise(found.tensors())
    except ValueError as error:
        raise ReplyError(f"the class statistics cannot be masked ({error})") from error
    sent = np.frombuffer(secure.mask(request, values), np.uint8)
    return {"masked": torch.from_numpy(sent.copy())}
