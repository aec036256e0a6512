"""FedPFT: federated fine-tuning of a foundation model through a compressed proxy.

`import fedpft_core as fp` offers the method in a notebook (`docs/library.md`); nothing heavy is
imported before one of its names is used. The method runs without Flower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpft_core.api import (
        attach,
        build_proxy,
        distil,
        export,
        gradient_agreement,
        make_plan,
        plug_in,
        tune,
    )
    from fedpft_core.model.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "attach",
    "build_proxy",
    "distil",
    "export",
    "gradient_agreement",
    "make_plan",
    "plug_in",
    "tune",
]


if not TYPE_CHECKING:  # a type checker shall still find a misspelt name

    def __getattr__(name: str) -> object:
        """Import the library's face on first use: torch and transformers take seconds."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fedpft_core import api

        value = globals()[name] = getattr(api, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
