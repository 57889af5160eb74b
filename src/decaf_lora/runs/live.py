"""How does one watch a run in the browser? The report's page, served on this machine alone while the run goes on.

The page asks twice a second which round it is, and takes the new report when there is one. Nothing else is served:
there are two addresses, no files, and no way to change the run. The server answers only requests that name this
machine, so that another site's page in the same browser cannot read it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from decaf_lora.errors import UserError
from decaf_lora.records import Record
from decaf_lora.runs.events import Subscriber, Watch

HOST = "127.0.0.1"

SCRIPT = """
let shown = document.documentElement.dataset.revision;
const state = document.createElement("p");
state.setAttribute("role", "status");
state.id = "live";
state.style = "position:fixed;right:12px;bottom:12px;margin:0;padding:6px 12px;border-radius:6px;"
  + "background:var(--ink);color:var(--page)";
const say = text => { state.textContent = text; document.body.append(state); };
async function look() {
  try {
    const revision = await (await fetch("/revision")).text();
    if (revision !== shown) {
      const text = await (await fetch("/")).text();
      const fresh = new DOMParser().parseFromString(text, "text/html");
      const open = [...document.querySelectorAll("details")].map(e => e.open);
      document.title = fresh.title;
      for (const part of ["header", "main"]) document.querySelector(part).replaceWith(fresh.querySelector(part));
      document.querySelectorAll("details").forEach((e, k) => { e.open = open[k] || false; });
      shown = fresh.documentElement.dataset.revision;
    }
    say("live: updated every round");
    setTimeout(look, 500);
  } catch (error) {
    say("The run has ended, or was stopped. Its report is in the run's folder.");
  }
}
look();
"""
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    f"form-action 'none'; frame-ancestors 'none'; script-src 'sha256-{_HASH}'"
)


class Live:
    """The runs that are watched, and the page that shows them."""

    def __init__(self) -> None:
        self._lock, self._drawing = threading.Lock(), threading.Lock()
        self._runs: dict[str, tuple[dict[str, Any], list[Record]]] = {}
        self.revision = 0
        """Rises with every record and every new run."""
        self._page = (-1, "")

    def watch(self, name: str) -> Subscriber:
        """A subscriber whose run the page shows under its name."""
        return _Watched(self, name)

    def begin(self, name: str, facts: Mapping[str, Any]) -> None:
        with self._lock:
            self._runs[name] = (dict(facts), [])
            self.revision += 1

    def add(self, name: str, record: Record) -> None:
        with self._lock:
            self._runs[name][1].append(record)
            self.revision += 1

    def page(self) -> str:
        """The report of what is known now, drawn only if something is new."""
        from decaf_lora.report.page import page_of
        from decaf_lora.report.reading import RunRecords

        with self._drawing:
            with self._lock:
                revision = self.revision
                runs = [RunRecords(name, facts, list(of), "", {}) for name, (facts, of) in self._runs.items()]
            if self._page[0] != revision:
                text = page_of(runs) if runs else _WAITING
                text = text.replace("<html", f'<html data-revision="{revision}"', 1)
                self._page = (revision, text.replace("</body>", f"<script>{SCRIPT}</script>\n</body>"))
            return self._page[1]


_WAITING = (
    '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>decaf-lora</title></head>\n'
    "<body><header><h1>The run is being prepared.</h1></header><main></main></body>\n</html>\n"
)


class _Watched(Subscriber):
    def __init__(self, live: Live, name: str) -> None:
        self._live, self._name = live, name

    def start(self, facts: Mapping[str, Any]) -> None:
        self._live.begin(self._name, facts)

    def record(self, record: Record) -> None:
        self._live.add(self._name, record)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = False

    def __init__(self, live: Live, port: int) -> None:
        self.live = live
        super().__init__((HOST, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: a browser that closes a page is no fault of the run."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "decaf", ""
    timeout = 30

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._answer(403, "text/plain", "This page is for this machine alone.\n")
        elif self.path == "/":
            self._answer(200, "text/html", self.server.live.page())
        elif self.path == "/revision":
            self._answer(200, "text/plain", str(self.server.live.revision))
        else:
            self._answer(404, "text/plain", "There is only / here.\n")

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal is for the run."""


@contextlib.contextmanager
def serving(port: int = 0) -> Iterator[tuple[Watch, str]]:
    """A context in which the page is served; gives the `Watch` of its runs, and its address.

    Args:
        port: to listen on; 0: a free one.

    Raises:
        UserError: the port is taken, or may not be used.
    """
    live = Live()
    try:
        server = _Server(live, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"port: cannot listen on {port} ({reason}); leave it out, or give another --port.") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield live.watch, f"http://{HOST}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
