"""What memory the server takes to load a large FM and to make its sub-FM, in a process of its own.

`VmHWM` is what a process had in memory at most, pages of files that it has mapped included.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
]

HIDDEN, FFN, BLOCKS = 1024, 3584, 20
LIBRARIES = 150 * 10**6
"""Libraries that are imported meanwhile, rows, tokenizer, and what the allocator keeps."""

SERVER = """
import json, sys
from fedpft_core import config
from server_app import app  # noqa: F401
from server_app.phases import load as phase
from server_app.run.events import EventLog

marks = {}
def mark(name):
    lines = open("/proc/self/status").read().splitlines()
    marks[name] = next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))

build = phase.build
def noted(fm, plan):
    mark("plan")
    open("/proc/self/clear_refs", "w").write("5")  # the checkpoint's files are closed by now
    made = build(fm, plan)
    mark("build")
    return made
phase.build = noted

mark("libraries")
bench = phase.load(config.from_flat(json.load(sys.stdin)), EventLog(None))
mark("load")
state = bench.fresh_state()
mark("state")
fm = sum(p.nbytes for p in bench.models.fm.parameters())
proxy = sum(p.nbytes for p in bench.models.proxy.parameters())
block = sum(p.nbytes for p in bench.models.fm.get_base_model().model.layers[0].parameters())
print(json.dumps(marks | {"fm": fm, "proxy": proxy, "block_bytes": block}))
"""


def write_shards(folder: Path, dtype: torch.dtype) -> tuple[int, int]:
    """A random Llama, a file for every seven blocks; how many files, and their bytes."""
    import transformers

    config = tiny.hf_config(
        "llama", hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=BLOCKS,
        num_attention_heads=16,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = transformers.AutoModelForSequenceClassification.from_config(config).state_dict()
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tiny.tokenizer("llama").save_pretrained(folder)
    stream = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, like in shapes.items():
        number = name.split(".")[2] if ".layers." in name else "0"
        t = torch.empty(like.shape, dtype=dtype)
        if t.dim() > 1:
            t.copy_(torch.empty(t.shape).uniform_(-0.03, 0.03, generator=stream))
        else:
            t.fill_(1)
        files.setdefault(f"model-{int(number) // 7}.safetensors", {})[name] = t
    total = 0
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
        total += sum(t.nbytes for t in tensors.values())
    where = {k: name for name, tensors in files.items() for k in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(files), total


def server_memory(flat: dict[str, object]) -> dict[str, int]:
    """Marks of a process that loads the FM and makes what clients are served first."""
    done = subprocess.run(
        [sys.executable, "-c", SERVER], input=json.dumps(flat), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, object], int]]:
    """Keys of a run with the checkpoint, and its bytes; it goes, as pytest would keep it."""
    path = tmp_path_factory.mktemp("large")
    flat = tiny.write_task("llama", path) | {
        "model.name": str(path / "large"), "plan.keep-share": 0.25, "plan.retained-layers": "0",
        "run.device": "cpu",
    }  # fmt: skip
    count, total = write_shards(path / "large", torch.float32)
    assert count >= 3
    assert 1e9 < total < 2e9
    yield flat, total
    for file in (path / "large").glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_sub_fm_is_made_beside_the_fm_and_one_block(
    large: tuple[dict[str, object], int], dtype: str
) -> None:
    keys, total = large
    m = server_memory(keys | {"model.dtype": dtype})
    # Of another type than the checkpoint the FM is a copy of what is in the mapped files, whose
    # pages the system takes back when it needs them; of the same type it is these pages.
    checkpoint = 0 if dtype == "fp32" else total
    assert m["fm"] == pytest.approx(total if dtype == "fp32" else total / 2, rel=0.01)
    assert m["proxy"] < 0.6 * m["fm"]
    room = m["libraries"] + LIBRARIES + m["fm"] + m["block_bytes"]
    taken = {name: f"{m[name] / 1e6:.0f} MB" for name in ("plan", "build", "load", "state")}
    assert m["plan"] <= room + checkpoint, taken
    assert m["build"] <= room + m["proxy"], taken
    assert m["load"] <= room + m["proxy"], taken
    # What clients are served is a copy: the sub-FM goes on moving.
    assert m["state"] <= room + 2 * m["proxy"], taken
    assert m["state"] >= m["libraries"] + m["fm"] + 2 * m["proxy"] - m["block_bytes"], taken
