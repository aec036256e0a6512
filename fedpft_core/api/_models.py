"""What a user's model is: its family, its task, FM or proxy, with or without the adapter."""

from __future__ import annotations

from torch import nn

from fedpft_core.errors import UserError
from fedpft_core.model.families import Family, base_model, family_of_config, supported
from fedpft_core.model.normalise import normalise
from fedpft_core.model.plan import Plan
from fedpft_core.task import Task, of_model


def known_family(model: nn.Module) -> Family:
    """The family of a task model.

    Args:
        model: FM or proxy, with or without the adapter.

    Returns:
        Its family.

    Raises:
        UserError: the model is none of a known family, or lacks its task head.
    """
    bare = base_model(model)
    config = getattr(bare, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in supported().split(", "):
        named = f"of type {model_type!r} " if model_type else ""
        raise UserError(
            f"A {type(bare).__name__} {named}is not supported; supported are the Hugging Face "
            f"model types {supported()}."
        )
    family = family_of_config(config)
    for path in (family.blocks, *_task_of(bare, family).head(family)):
        try:
            bare.get_submodule(path)
        except AttributeError:
            raise UserError(
                f"A {type(bare).__name__} has no {path}: take the model with its task head, "
                "such as AutoModelForSequenceClassification gives."
            ) from None
    return family


def task_of(model: nn.Module) -> Task:
    """The task that a model with its task head is for.

    Args:
        model: FM or proxy, with or without the adapter.

    Returns:
        The task, with the names of the head's outputs.
    """
    return _task_of(base_model(model), known_family(model))


def _task_of(bare: nn.Module, family: Family) -> Task:
    return of_model(family.kind, type(bare).__name__, bare.config)


def without_adapter(model: nn.Module, what: str) -> Family:
    """The family of a model without adapter, normalised in place.

    Args:
        model: FM or proxy.
        what: it in a message.

    Returns:
        Its family.

    Raises:
        UserError: the model carries an adapter, or is none of a known family.
    """
    family = known_family(model)
    if _has_adapter(model):
        raise UserError(f"{what} carries an adapter already; take it without one.")
    normalise(model)
    return family


def _has_adapter(model: nn.Module) -> bool:
    return any(".lora_" in name for name, _ in model.named_parameters())


def with_adapter(model: nn.Module, where: str) -> None:
    """Refuse a model without the adapter.

    Args:
        model: FM or proxy.
        where: the function it was given to, for messages.

    Raises:
        UserError: the model has no adapter, or is none of a known family.
    """
    known_family(model)
    if not _has_adapter(model):
        raise UserError(f"{where}: the model has no adapter; `attach` puts one on it.")


def shaped_as_proxy(model: nn.Module, plan: Plan) -> bool:
    """Whether a model is the plan's proxy and not its FM.

    Args:
        model: FM or proxy, with or without the adapter.
        plan: the plan that relates the two.

    Returns:
        True for the proxy, False for the FM, and for either where the plan keeps all.

    Raises:
        UserError: it is neither.
    """
    family = known_family(model)
    if family.name != plan.model_type:
        raise UserError(
            f"The plan is for a {plan.model_type} model, but this one is a {family.name}."
        )
    found = [ffn.neurons for ffn in family.ffns(model)]
    if found == [plan.neurons(i) for i in range(len(plan.blocks))]:
        return False
    if found == [len(plan.blocks[i].kept) or plan.neurons(i) for i in plan.present]:
        return True
    raise UserError(
        f"The plan is for another model: it has {len(plan.blocks)} blocks of {plan.fm_neurons} FFN "
        f"neurons and keeps {len(plan.present)} blocks, but this model's blocks have "
        f"{', '.join(map(str, found))} neurons."
    )


def expect(model: nn.Module, plan: Plan, side: str, where: str) -> None:
    """Refuse a model that is not what the plan calls its `fm` or its `proxy`.

    Args:
        model: FM or proxy, with or without the adapter.
        plan: the plan that relates the two.
        side: `fm` or `proxy`.
        where: the function it was given to, for messages.

    Raises:
        UserError: it is the other, or neither.
    """
    if shaped_as_proxy(model, plan) != (side == "proxy") and not plan.is_full:
        other = "the FM" if side == "proxy" else "the proxy"
        raise UserError(f"{where}: `{side}` is {other}; the two may be exchanged.")
