"""How large a model is that somebody else has described, found out without building it."""

from __future__ import annotations

from typing import Any

from fedpft_core.errors import UserError
from fedpft_core.proxy.size import PlanSize

_MOST_TENSORS = 20_000
_MOST_LABELS = 100_000
_SLACK = 1.5  # models of one shape differ a little between versions of transformers


class _TooLargeError(Exception):
    """The model goes on beyond what is allowed."""


def refuse_giants(plan: PlanSize, most_bytes: int) -> None:
    """Refuse a description whose model would not fit, before any memory is taken for it.

    The model is built on torch's `meta` device, where tensors have a shape and no content, and
    the building is broken off at the first tensor too many.

    Args:
        plan: the description.
        most_bytes: bytes that parameters and buffers may take, those of the FM among them: a
            sub-FM is cut from a model of the FM's shape.

    Raises:
        UserError: the model is larger than that, has more than 20000 tensors or 100000 labels, or
            is not of the size that the description states beside its shape.
    """
    import torch
    from torch.nn.modules import module as hooks

    # Transformers makes a name for each label before it makes any tensor.
    labels = plan.meta.model_config.get("num_labels", 0)
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
            model = plan.client_model().model
    except _TooLargeError:
        raise UserError(_sentence(most_bytes)) from None
    except UserError as error:
        if isinstance(error.__cause__, _TooLargeError):
            raise UserError(_sentence(most_bytes)) from None
        raise
    finally:
        for hook in registered:
            hook.remove()
    made = sum(p.numel() * p.element_size() for p in model.parameters())
    if made > _SLACK * (plan.sub_fm_bytes + plan.adapter_bytes):
        raise UserError(
            f"the plan's description makes a model of {made / 1e6:.0f} MB, and states "
            f"{plan.sub_fm_bytes / 1e6:.0f} MB."
        )


def _sentence(most_bytes: int) -> str:
    return (
        f"the plan's description makes a model of more than {most_bytes / 1e9:.1f} GB, "
        f"{_MOST_TENSORS} tensors or {_MOST_LABELS} labels."
    )
