"""How large a model is that somebody else has described, found out without building it."""

from __future__ import annotations

from typing import Any

from fedpft_core.errors import UserError
from fedpft_core.proxy.package import blank
from fedpft_core.wire.meta import PackageMeta

_MOST_TENSORS = 20_000
_MOST_LABELS = 100_000
_SLACK = 1.5  # models of one shape differ a little between versions of transformers


class _TooLargeError(Exception):
    """The model goes on beyond what is allowed."""


def refuse_giants(meta: PackageMeta, stated_bytes: int, most_bytes: int) -> None:
    """Refuse metadata whose model would not fit, before any memory is taken for it.

    The model is built on torch's `meta` device, where tensors have a shape and no content, and
    the building is broken off at the first tensor too many.

    Args:
        meta: a package's metadata.
        stated_bytes: bytes that the parameters of sub-FM and adapter are said to take.
        most_bytes: bytes that parameters and buffers may take, those of the FM among them: a
            sub-FM is cut from a model of the FM's shape.

    Raises:
        UserError: the model is larger than that, has more than 20000 tensors or 100000 labels, or
            is larger than stated.
        _TooLargeError: within the function alone, which turns it into a UserError.
        Exception: whatever the libraries raise for settings that make no model.
    """
    import torch
    from torch.nn.modules import module as hooks

    # Transformers makes a name for each label before it makes any tensor.
    labels = meta.model_config.get("num_labels", 0)
    tensors = taken = 0

    def count(owner: Any, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal tensors, taken
        if tensor is None:
            return
        tensors += 1
        taken += tensor.numel() * tensor.element_size()
        if taken > most_bytes or tensors > _MOST_TENSORS:
            raise _TooLargeError

    registered = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        if type(labels) is int and labels > _MOST_LABELS:
            raise _TooLargeError
        with torch.device("meta"):
            model = blank(meta).model
    except _TooLargeError:
        raise UserError(
            f"the plan's description makes a model of more than {most_bytes / 1e9:.1f} GB, "
            f"{_MOST_TENSORS} tensors or {_MOST_LABELS} labels."
        ) from None
    finally:
        for hook in registered:
            hook.remove()
    made = sum(p.numel() * p.element_size() for p in model.parameters())
    if made > _SLACK * stated_bytes:
        raise UserError(
            f"the plan's description makes a model of {made / 1e6:.0f} MB, and states "
            f"{stated_bytes / 1e6:.0f} MB."
        )
