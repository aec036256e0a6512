"""docs/two_nodes.md, as written: a SuperLink, two SuperNodes; texts, images, chats of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import flower
import psutil
import pytest
import tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM

PAGE = Path(__file__).parents[2] / "docs" / "two_nodes.md"


def script() -> str:
    """The page's commands; only the ports are others, for these may be taken."""
    text = "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S))
    assert text.count("fedpft run") == 3
    text = text.replace("--port 800$i", '--port "${PORTS[$i]}"')
    text = text.replace("8000", str(flower.free_port()))
    return f"PORTS=(0 {flower.free_port()} {flower.free_port()})\n{text}"


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    models = {
        "TEXT_MODEL": tiny.folder("bert", tmp_path / "text", max_position_embeddings=80),
        "IMAGE_MODEL": tiny.folder("vit", tmp_path / "image"),
        "CHAT_MODEL": tiny.writer_folder("llama", tmp_path / "chat", max_position_embeddings=160),
    }
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", "set +u\n" + script()], cwd=tmp_path, text=True,
        env=flower.environment(tmp_path / "home", **{k: str(v) for k, v in models.items()}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    folder = tmp_path / "two-nodes"
    try:
        out, _ = process.communicate(timeout=1500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        # The page's own FLWR_HOME; where a command fails, nothing after it ends the nodes.
        for left in flower.processes_of(folder / "flwr"):
            with contextlib.suppress(psutil.Error):
                left.kill()
    logs = "".join(f.read_text("utf-8", "replace")[-2000:] for f in folder.glob("*.log"))
    for run in ("texts", "images", "chats"):
        log = folder / run / "events.jsonl"
        assert log.exists() and '"run_finished"' in log.read_text("utf-8"), out[-3000:] + logs
        assert list((folder / run / "adapter").glob("adapter_model.safetensors"))
    asked = (folder / "cache-1" / "audit.jsonl").read_text("utf-8")
    assert asked.count('"asked": "TrainRequest"') >= 6, "two rounds of each of three runs"
    chat = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "chat"), folder / "chats" / "adapter"
    )
    assert any("lora_B" in k and bool(p.abs().sum() > 0) for k, p in chat.named_parameters())
    assert process.returncode in (0, 143, -signal.SIGTERM), out[-2000:]
