"""One map between the names a tensor goes by: in the FM, the proxy, a PEFT wrapper, on the wire.

- FM name: as in the FM's bare task model. Adapters always use it, whatever model holds them.
- Proxy name: as in the proxy's bare task model. It differs where blocks were dropped, since the
  rest are numbered anew. Packages use it: it is the wire's name of a frozen weight.
- PEFT name: as in a model with the adapter attached.
- Patch name: `{FM block}/{part}`, with the parts of `FFN.read`.
"""

from __future__ import annotations

from typing import Any

from fedpft_core.model.families import family_of
from fedpft_core.model.plan import Plan

WRAPPER = "base_model.model."
_LORA = ".lora_"


def bare(name: str) -> str:
    """PEFT name → the name in the bare model; bare names stay as they are.

    LoRA's factors have no bare model: they keep `lora_A.weight` behind the layer they change.

    Args:
        name: a parameter's name in a model with or without the adapter attached.

    Returns:
        The name without what PEFT puts around it.
    """
    name = name.removeprefix(WRAPPER).replace(".base_layer.", ".")
    return name.replace(".modules_to_save.default", "").replace(".default.", ".")


def is_lora(name: str) -> bool:
    """Whether a tensor of this name is one of LoRA's factors.

    Args:
        name: its name in the model, bare or PEFT's.

    Returns:
        True for LoRA's A and B.
    """
    return _LORA in name


def is_trained(name: str, factors: str) -> bool:
    """Whether clients train a tensor of the adapter.

    Args:
        name: its name in the model, bare or PEFT's.
        factors: which of LoRA's factors are trained: `both`, `a` or `b`.

    Returns:
        True for these factors, and for all that is no factor of LoRA's.
    """
    return factors == "both" or not is_lora(name) or f"{_LORA}{factors.upper()}." in name


def in_modules(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a bare name lies in one of the modules.

    Args:
        name: a parameter's bare name.
        modules: paths of modules in the bare model; there may be none.

    Returns:
        True if the name begins with one of these paths.
    """
    return name.startswith(tuple(f"{m}." for m in modules))


def to_fm_name(name: str, plan: Plan) -> str:
    """Proxy name → FM name.

    Args:
        name: a bare name or one of LoRA's, in a proxy of that plan.
        plan: says which block of the FM each block of the proxy is.

    Returns:
        The name with the FM's block number; names outside the blocks stay as they are.
    """
    return _renumber(name, plan, dict(enumerate(plan.present)))


def to_proxy_name(name: str, plan: Plan) -> str | None:
    """FM name → proxy name, the inverse of `to_fm_name`.

    Args:
        name: a bare name or one of LoRA's, in the FM.
        plan: says which blocks the proxy has.

    Returns:
        The name with the proxy's block number; None for parameters of dropped blocks.
    """
    return _renumber(name, plan, {fm: i for i, fm in enumerate(plan.present)}, missing=None)


def _renumber(name: str, plan: Plan, table: dict[int, int], missing: str | None = "") -> Any:
    prefix = family_of(plan.model_type).blocks + "."
    at = name.find(prefix)
    if at < 0:
        return name
    number, _, rest = name[at + len(prefix) :].partition(".")
    if int(number) not in table:
        return missing
    return f"{name[:at]}{prefix}{table[int(number)]}.{rest}"


class PatchedWeights:
    """Patch name → proxy name, for the blocks a plan prunes."""

    def __init__(self, plan: Plan) -> None:
        family = family_of(plan.model_type)
        self.path = {}
        for position, block in enumerate(plan.present):
            if block in plan.pruned:
                self.path[block] = f"{family.blocks}.{position}."
        self.module = {f"in{i}": p for i, p in enumerate(family.ffn_in)}
        self.module |= {"out": family.ffn_out, "norm": family.output_norm}

    def name(self, block: int, part: str) -> str:
        """The proxy name of one part of an FM block's FFN.

        Args:
            block: the block's position in the FM.
            part: a name that `FFN.parts` gives.

        Returns:
            The full name in the bare proxy.

        Raises:
            KeyError: when the block is not pruned, or has no such part.
        """
        module, _, leaf = part.partition(".")
        return f"{self.path[block]}{self.module[module]}.{leaf}"
