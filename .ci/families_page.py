"""Makes docs/families.md: which invariant of the method a test has shown for which family.

`python .ci/families_page.py --write` runs the tests and writes the page. Without it nothing is run:
exit status 1 says that the page has not every family of the table with every invariant shown.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
sys.path.insert(0, str(ROOT))

INVARIANTS: dict[str, tuple[str, ...]] = {
    "A plan that keeps everything gives identical logits": (
        "tests/proxy/test_build.py::test_keep_all_plan_gives_identical_logits",
    ),
    "Saliency equals a loop over neurons": (
        "tests/proxy/test_build.py::test_saliency_equals_the_oracle",
    ),
    "Pruning equals zeroing the removed neurons in the FM (float64)": (
        "tests/proxy/test_build.py::test_pruning_equals_zeroing_the_removed_neurons_in_the_fm",
    ),
    "The same for any plan and any rank of the adapter (property test)": (
        "tests/proxy/test_any_plan.py::"
        "test_any_proxy_is_the_fm_with_neurons_at_zero_and_carries_its_adapter",
    ),
    "Neurons read out and written back change nothing": (
        "tests/model/test_families.py::test_write_is_the_inverse_of_read",
    ),
    "LoRA touches attention only": (
        "tests/model/test_families.py::test_lora_touches_no_ffn_module",
    ),
    "Distillation moves compressed FFNs, alignment chosen neurons, and nothing else": (
        "tests/align/test_distill.py::test_layer_level_distillation_moves_compressed_ffns_only",
        "tests/align/test_distill.py::test_chosen_neurons_move_and_all_others_stay_to_the_bit",
    ),
    "Gradients of both losses equal finite differences": (
        "tests/align/test_distill.py::test_gradients_of_both_losses_equal_finite_differences",
    ),
    "The sub-FM has identical logits in another process": (
        "tests/proxy/test_reload.py::test_another_process_has_identical_logits",
    ),
    "The adapter tuned on the sub-FM fits the FM, name by name": (
        "tests/adapter/test_lora.py::test_load_is_the_inverse_of_read",
        "tests/adapter/test_lora.py::"
        "test_every_adapter_parameter_of_a_proxy_has_its_namesake_in_the_fm",
    ),
    "The exported adapter gives the same logits on the library's own model": (
        "tests/adapter/test_lora.py::test_export_gives_identical_logits_on_the_untouched_fm",
    ),
    "Counts of inactive neurons equal an oracle without padding": (
        "tests/train/test_tune.py::test_counts_equal_the_oracle_with_padding",
    ),
    "The same with padding on the left (decoders)": (
        "tests/train/test_tune.py::test_counts_equal_the_oracle_with_padding_on_the_left",
    ),
    "Layer-drop maps adapters by name": (
        "tests/proxy/test_build.py::test_layer_drop_maps_names_to_fm_indices",
        "tests/proxy/test_build.py::test_layer_drop_adapter_plugs_into_the_kept_blocks",
    ),
    "Projections are what the table calls them: attention by hand": (
        "tests/model/test_families.py::"
        "test_attention_by_hand_from_the_named_projections_is_what_the_output_projection_reads",
    ),
    "A whole run, inspection, plan sizes and node check": (
        "tests/whole/test_every_family.py::test_run_inspect_sizes_and_node_check",
    ),
}
_DECODERS_ONLY = "(decoders)"


class Outcomes:
    """A plugin of pytest that notes, by test and family, whether all of a test's cases passed."""

    def __init__(self) -> None:
        self.passed: dict[tuple[str, str], bool] = defaultdict(lambda: True)
        self._families: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Note which family each case is of."""
        for item in items:
            name = item.nodeid.partition("[")[0]
            self._families[item.nodeid] = (name, item.callspec.params["family"])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a case's outcome; a case that is skipped shows nothing."""
        key = self._families[report.nodeid]
        self.passed[key] = self.passed[key] and report.passed


def applies(invariant: str, row: Any) -> bool:
    """Whether an invariant is one of a family."""
    return bool(row.causal) or not invariant.endswith(_DECODERS_ONLY)


def page(shown: Any) -> str:
    """The page; `shown(invariant, family)` says whether the tests have shown it."""
    from fedpft_core.model.families import FAMILIES

    lines = [
        "# Families",
        "",
        "Every row of `FAMILIES` in `fedpft_core/model/families.py`, and what tests have shown for",
        "it on random models of a few thousand weights, made by the library from a configuration.",
        "A name behind the `model_type` is that of a variant, which a field of the config tells",
        "apart. Made by `python .ci/families_page.py --write`, which runs the tests. Diffusion",
        "pipelines, which are several models, have tests of their own ([pictures](pictures.md)).",
        "",
    ]
    lines += [f"{i}. {name}" for i, name in enumerate(INVARIANTS, 1)]
    columns = range(1, len(INVARIANTS) + 1)
    lines += ["", "| family | reads | " + " | ".join(map(str, columns)) + " |"]
    lines += ["|---|---|" + ":-:|" * len(INVARIANTS)]
    for name, row in FAMILIES.items():
        if row.kind == "captioned image":
            continue  # it has a page, and tests, of its own
        cells = [
            ("✓" if shown(invariant, name) else "✗") if applies(invariant, row) else "–"
            for invariant in INVARIANTS
        ]
        lines.append(f"| {name} | {row.kind}s | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def whole() -> str:
    """The page when every test passes."""
    return page(lambda _invariant, _family: True)


def run() -> str:
    """The page by the tests, which are run."""
    import pytest

    found = Outcomes()
    tests = [test for group in INVARIANTS.values() for test in group]
    pytest.main(["-q", "-o", "addopts=", "--import-mode=importlib", *tests], plugins=[found])

    def shown(invariant: str, family: str) -> bool:
        keys = [(test, family) for test in INVARIANTS[invariant]]
        return all(key in found.passed and found.passed[key] for key in keys)

    return page(shown)


def main() -> int:
    """Write the page, or say whether it is whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(run(), encoding="utf-8")
    if PAGE.read_text(encoding="utf-8") != whole():
        print(f"{PAGE.relative_to(ROOT)} is stale or a test fails: {Path(__file__).name} --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
