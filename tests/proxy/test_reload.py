"""A package read in another process gives the sub-FM that the server has, to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from fedpft_core.adapter import lora as adapters
from fedpft_core.proxy.build import build
from fedpft_core.proxy.package import make_package
from fedpft_core.task.classify import logits

Answers = dict[str, tuple[torch.Tensor, torch.Tensor]]
ROOT = Path(__file__).parents[2]
READ = """
import sys
from pathlib import Path
import torch
from fedpft_core.adapter import lora as adapters
from fedpft_core.proxy.package import rebuild
from fedpft_core.task.classify import logits
from fedpft_core.wire.package import Package
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    made = rebuild(Package.from_bytes((folder / "package").read_bytes()))
    batch, adapter = torch.load(folder / "inputs.pt", weights_only=True)
    adapters.load(made.model, adapter, made.plan)
    with torch.no_grad():
        torch.save(logits(made.model, batch), folder / "logits.pt")
"""


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """Logits here and there by family; one process reads the packages of all, which saves time."""
    root, here = tmp_path_factory.mktemp("packages"), {}
    for family in tiny.FAMILIES:
        fm = tiny.model(family)
        plan = tiny.plan_for(fm)
        small, spec = build(fm, plan), tiny.pair(family, plan)[3]
        kind = "text" if family in tiny.TEXT_FAMILIES else "image"
        folder = root / family
        folder.mkdir()
        package = make_package(small, plan, spec, tiny.processor(family), kind, tiny.LABELS, 16)
        (folder / "package").write_bytes(package.to_bytes())
        wrapped = adapters.attach(small, spec, plan)
        tensors, batch = tiny.random_adapter(wrapped, plan), tiny.batch_of(family)
        adapters.load(wrapped, tensors, plan)
        torch.save((batch, tensors), folder / "inputs.pt")
        with torch.no_grad():
            here[family] = logits(wrapped, batch)
    subprocess.run([sys.executable, "-c", READ, str(root)], cwd=ROOT, check=True, timeout=300)
    return {f: (mine, torch.load(root / f / "logits.pt")) for f, mine in here.items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_another_process_has_identical_logits(family: str, answers: Answers) -> None:
    mine, theirs = answers[family]
    assert torch.equal(mine, theirs)
