"""The page of a run while it goes on, for a browser on this machine and nobody else.

The server listens on the loopback address alone. It knows two addresses, the page and whether the
page has changed, and reads no file that a request names. Requests that another site has a browser
make, under another name for this machine, are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from fedpft_console import report
from fedpft_core.errors import UserError

HOST = "127.0.0.1"
# Comes again by itself; what the reader looks at and where they have scrolled to stays.
_HEAD = """<noscript><meta http-equiv="refresh" content="10"></noscript>
<script>
(function () {
  var known = null;
  function again() { setTimeout(look, 2000); }
  function look() {
    fetch("/state").then(function (r) { return r.text(); }).then(function (now) {
      if (known === null) { known = now; }
      if (now === known) { return; }
      return fetch("/").then(function (r) { return r.text(); }).then(function (text) {
        var page = new DOMParser().parseFromString(text, "text/html");
        if (!document.querySelector("main").contains(document.activeElement)) {
          document.querySelector("main").replaceWith(page.querySelector("main"));
          known = now;
        }
      });
    }).catch(function () {}).then(again);
  }
  again();
})();
</script>
"""
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


class Page:
    """The page of a run folder, made again when the run's events have changed.

    Args:
        folder: the run folder, which need not have events yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: tuple[str, bytes] | None = None

    def state(self) -> str:
        """What differs as soon as the events have changed.

        Returns:
            A short text; `none` before there are any.
        """
        try:
            stat = (self.folder / report.EVENTS).stat()
        except OSError:
            return "none"
        return f"{stat.st_size}-{stat.st_mtime_ns}"

    def html(self) -> bytes:
        """The page as it is now.

        Returns:
            The whole page; one that says what is wrong where there are no events, or damaged ones.
        """
        state = self.state()
        if self._made is None or self._made[0] != state:
            self._made = (state, self._html().encode())
        return self._made[1]

    def _html(self) -> str:
        from fedpft_console.web.document import document, prose

        try:
            return report.html(report.read(self.folder), _HEAD)
        except UserError as error:
            body = ["<h1>No report yet</h1>", f"<p>{prose(str(error))}</p>"]
            return document("No report yet", body, _HEAD)


def serve(folder: Path, port: int = 0) -> HTTPServer:
    """A server of a run's page, bound but not serving yet.

    Args:
        folder: the run folder.
        port: where to listen; 0 for any that is free.

    Returns:
        The server, whose `serve_forever` answers requests one after another.

    Raises:
        UserError: the port is taken or not allowed.
    """
    page = Page(folder)
    answers: dict[str, tuple[str, Callable[[], bytes]]] = {
        "/": ("text/html; charset=utf-8", page.html),
        "/state": ("text/plain; charset=utf-8", lambda: page.state().encode()),
    }

    class Handler(BaseHTTPRequestHandler):
        """Answers what is in `answers`."""

        timeout = 10  # seconds: a connection that sends nothing must not hold the only one

        def do_GET(self) -> None:
            """Answer a request for the page or its state."""
            here = made.server_port
            if self.headers.get("Host") not in (f"{HOST}:{here}", f"localhost:{here}"):
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            if self.path not in answers:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            kind, make = answers[self.path]
            body = make()
            self.send_response(HTTPStatus.OK)
            for name, value in (
                ("Content-Type", kind), ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"), ("Content-Security-Policy", _POLICY),
                ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the terminal shows where the page is, and requests come every 2 s."""

    try:
        made = HTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: cannot listen there ({error}).") from error
    return made
