"""The page of a run over a real socket."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from runlog import event, put, whole_run

from fedpft_console.web import watch
from fedpft_core.errors import UserError


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "secret.txt").write_text("secret")
    server = watch.serve(tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    link.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        link.putheader(name, value)
    link.endheaders()
    answer = link.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_follows_the_run(tmp_path: Path, port: int) -> None:
    status, before = get(port, "/")
    assert status == 200 and "No report yet" in before
    assert get(port, "/state") == (200, "none")
    put(tmp_path, whole_run()[:-1])
    state = get(port, "/state")[1]
    assert "Run is not finished: 2 of 2 rounds so far" in get(port, "/")[1]
    assert get(port, "/state")[1] == state
    put(tmp_path, whole_run())
    assert get(port, "/state")[1] != state
    assert "Run finished after 2 of 2 rounds" in get(port, "/")[1]


def test_a_half_written_line_does_not_end_it(tmp_path: Path, port: int) -> None:
    put(tmp_path, whole_run())
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"t": 1, "ev')
    assert "Run finished" in get(port, "/")[1]
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write("\n")
    assert "is damaged" in get(port, "/")[1]


@pytest.mark.parametrize(
    "path", ["/secret.txt", "/../secret.txt", "//secret.txt", "/%2e%2e/secret.txt", "/?x",
             "/state/", "/events.jsonl", "secret.txt"]
)  # fmt: skip
def test_nothing_else_is_served(port: int, path: str) -> None:
    status, text = get(port, path)
    assert status == 404 and "secret\n" not in text


def test_other_names_and_methods_are_refused(port: int) -> None:
    """A page elsewhere could otherwise have its own name point here and read the run."""
    assert get(port, "/", Host="evil.example")[0] == 403
    assert get(port, "/", Host=f"evil.example:{port}")[0] == 403
    assert get(port, "/", Host=f"localhost:{port}")[0] == 200
    assert get(port, "/", method="POST")[0] == 501


def test_only_this_machine_is_listened_to(tmp_path: Path) -> None:
    with watch.serve(tmp_path) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot listen there"):
            watch.serve(tmp_path, port)
    with pytest.raises(UserError, match="--port 70000"):
        watch.serve(tmp_path, 70000)


def test_what_others_wrote_is_text_on_the_page(tmp_path: Path, port: int) -> None:
    bad = "<img src=x onerror=alert(1)>"
    events = whole_run()
    events.insert(-1, event(129, "warning", text=bad))
    put(tmp_path, events)
    assert bad not in get(port, "/")[1] and "&lt;img src=x" in get(port, "/")[1]
