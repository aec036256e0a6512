"""The name of the method that a configuration amounts to."""

from __future__ import annotations

from fedpft_core.config.keys import Config


def method_name(config: Config) -> str:
    """The method these settings amount to, by the names of docs/methods.md.

    The number of rounds is no part of it: a run that is cut short or continued keeps its name.

    Args:
        config: a whole run.

    Returns:
        One of the names there, such as `fedpft-b`; with `one-shot` or `async` before it by
        federation.schedule.
    """
    f = config.federation
    before = config.distill.method != "none" and config.distill.steps > 0
    during = config.align.interval > 0
    if f.aggregate == "none":
        return "local-only"
    if config.plan.proxy == "full":
        name = "centralised" if f.clients == 1 else "fedpetuning"
    elif config.plan.proxy == "layer-drop":
        name = "fedot" if before else "fedot-n"
    else:
        names = {(True, True): "fedpft", (True, False): "fedpft-b", (False, True): "fedpft-d"}
        name = names.get((before, during), "fedpft-n")
    return name if f.schedule == "multi-round" else f"{f.schedule} {name}"
