"""`fedpft inspect`."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from fedpft_console import cli
from fedpft_core import config


def test_inspect_prints_the_tables_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = types.ModuleType("fedpft_core.proxy.cost")

    def inspect(settings: config.Config) -> dict[str, Any]:
        rows = [["0", "whole", 1536, 1_774_464, 0.5], ["all", "[b]", None, 10_646_784, 3.14159]]
        columns = ["block", "kept", "neurons", "parameters", "ratio"]
        note = f"rank {settings.lora.rank} [x]"
        return {"title": "Sizes", "columns": columns, "rows": rows, "notes": [note]}

    made.inspect = inspect  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedpft_core.proxy.cost", made)
    assert cli.main(["inspect", "-c", "lora.rank=3"]) == 0
    out = capsys.readouterr().out
    for part in ("Sizes", "1,774,464", "3.14", "[b]", "rank 3 [x]"):
        assert part in out
