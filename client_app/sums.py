"""A client's class statistics, and the same under the masks of a session of secure aggregation."""

from __future__ import annotations

from typing import Any

from client_app.chain import put
from client_app.policy import Policy
from client_app.process import Held, Portions, ProcessCache
from client_app.secure import Secure
from fedpft_core.data.encoded import Encoded
from fedpft_core.errors import ReplyError
from fedpft_core.head.closed import form_of
from fedpft_core.head.fixed import Fixed
from fedpft_core.head.form import Summing, Sums
from fedpft_core.head.refit import last_linear, seen
from fedpft_core.head.refit import summed as sums_of
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec
from fedpft_core.wire.identity import tensor_digest
from fedpft_core.wire.messages import SecureStatisticsRequest, StatisticsRequest


def summed(
    request: StatisticsRequest, held: Held, rows: Encoded, policy: Policy, cache: ProcessCache,
    key: Any,
) -> tuple[Sums, Summing, int, int]:  # fmt: skip
    """The sums over a client's rows.

    Args:
        request: what is asked for; its adapter is put on the model.
        held: the sub-FM asked for.
        rows: that the client trains on.
        policy: what the node's owner lets a server ask for.
        cache: keeps features while slopes are asked for, which come many times at one adapter.
        key: tells these rows from all others.

    Returns:
        The sums, what they are of, how many rows there are, and the most answers of one.

    Raises:
        ReplyError: the task's head has no closed form or no slopes, or adapter or head do not fit.
        UserError: the policy does not allow it.
    """
    policy.check_rows(request, len(rows))
    model, task = held.model.model, held.model.task
    form = form_of(task)
    if form is None:
        raise ReplyError("the request cannot be used (this task's head has no closed form)")
    assert rows.labels is not None
    policy.check_classes(form.group_rows(rows.labels))

    def see() -> Portions:
        put(held.model, codec.decode(request.adapter, request.fmt))
        return seen(model, rows, task, request.batch_size, request.width, request.seed)

    if not request.head:
        return sums_of(form, see()), form, len(rows), held.model.max_length
    width = min(last_linear(model).in_features, request.width)
    slopes = form.slopes(request.head, width)
    if slopes is None:
        raise ReplyError("the request cannot be used (this task's head has no slopes)")
    adapter = tuple((k, tensor_digest(t)) for k, t in sorted(request.adapter.items()))
    here = (key, request.digest, request.fmt, adapter, request.width, request.seed)
    portions = cache.seen(here, see)
    return sums_of(slopes, portions), slopes, len(rows), held.model.max_length


def masked(
    found: Sums, form: Summing, rows: int, most: int, secure: Secure,
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
    return secure.mask(request, values)
