"""`fedpft publish`: what goes, what does not, and that the library says it to a Hub over HTTP."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from terminal import refused

from fedpft_console import cli
from fedpft_core.errors import UserError

CARD = "---\nlicense: unknown\ntags: [fedpft]\n---\n# Adapter\n\ntext\n"


@pytest.fixture
def done(elsewhere: Path) -> Path:
    """The folder of a run that has ended, with what does not belong to an adapter beside it."""
    folder = elsewhere / "r" / "adapter"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 8, "base_model_name_or_path": "/home/me/secret-models/fm"})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"\1" * 1000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("patients of ward 4")
    return folder.parent


def test_without_push_it_is_only_shown(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert cli.main(["publish", "r", "--repo", "me/adapter"]) == 0
    out = capsys.readouterr().out
    assert "adapter_model.safetensors" in out and "1,000 bytes" in out and "notes.txt" not in out
    assert "would go to the Hub repository me/adapter (private if it is new)" in out
    assert "names no licence" in out and "--base NAME" in out


def test_into_a_folder_without_a_path_of_this_machine(
    done: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["publish", "r", "--folder", "out"]) == 0
    assert not (elsewhere / "out").exists()
    argv = ["publish", "r", "--folder", "out", "--base", "google/bert", "--license", "mit"]
    assert cli.main([*argv, "--push"]) == 0
    files = {p.name: p.read_bytes() for p in (elsewhere / "out").iterdir()}
    assert files.keys() == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert b"secret" not in b"".join(files.values())
    settings = json.loads(files["adapter_config.json"])
    assert settings == {"r": 8, "base_model_name_or_path": "google/bert"}
    _, head, body = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "mit", "tags": ["fedpft"], "base_model": "google/bert",
    }  # fmt: skip
    assert body == CARD.split("---\n", 2)[2]
    assert "is not empty" in refused(capsys, *argv, "--push")


def test_bad_names_and_runs_are_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected OWNER/NAME" in refused(capsys, "publish", "r", "--repo", "https://x/y")
    (done / "adapter" / "README.md").write_text("no head")
    assert "cannot be read" in refused(capsys, "publish", "r", "--repo", "a/b")
    (done / "adapter" / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors there" in refused(capsys, "publish", "r", "--repo", "a/b")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as one commit needs."""

    calls: list[tuple[str, Any, str]] = []  # noqa: RUF012
    refuse = False

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        lines = [json.loads(line) for line in data.splitlines()]
        type(self).calls.append((self.path, lines, self.headers.get("Authorization", "")))
        here = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.path.endswith("/preupload/main"):
            names = [f["path"] for f in lines[0]["files"]]
            files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.say(200, {"files": files})
        elif "/commit/" in self.path:
            self.say(200, {"commitUrl": f"{here}/me/adapter/commit/1", "commitOid": "1" * 40})
        elif self.path == "/api/repos/create" and not self.refuse:
            self.say(200, {"url": f"{here}/me/adapter", "name": "me/adapter"})
        elif self.refuse:
            self.say(401, {"error": "Invalid username or password."})
        else:
            self.say(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.say(200, {"id": "me/adapter", "sha": "0" * 40, "siblings": []})

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def say(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.calls, Hub.refuse = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield Hub
    server.shutdown()
    server.server_close()


def test_the_library_takes_it_to_a_hub(
    done: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["publish", "r", "--repo", "me/adapter", "--base", "google/bert", "--push"]
    assert cli.main(argv) == 0
    assert "published: http://127.0.0.1" in capsys.readouterr().out
    made = next(body[0] for path, body, _ in hub.calls if path == "/api/repos/create")
    assert (made["name"], made["visibility"]) == ("adapter", "private")
    assert {token for _, _, token in hub.calls} <= {"Bearer hf_of_a_test"}
    (commit,) = [body for path, body, _ in hub.calls if "/commit/main" in path]
    sent = {
        part["value"]["path"]: base64.b64decode(part["value"]["content"])
        for part in commit
        if part["key"] == "file"
    }
    assert sent["adapter_model.safetensors"] == b"\1" * 1000 and "notes.txt" not in sent
    assert b"secret" not in b"".join(sent.values())


def test_a_hub_that_refuses_or_is_not_there_is_one_sentence(
    done: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse = True
    argv = ["publish", "r", "--repo", "me/adapter", "--push"]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert "the Hub could not be written" in err and "Traceback" not in err
    assert "hf_of_a_test" not in err
    assert not [path for path, _, _ in hub.calls if "commit" in path]


def test_a_folder_that_cannot_be_written(done: Path) -> None:
    from fedpft_console.commands.publish import _copy, gather

    (done / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        _copy(gather(done / "adapter"), done / "file" / "out")
