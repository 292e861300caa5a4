"""A local stand-in for the W&B backend, for tests: the unmodified client talks to it.

    with WandbServer() as server:
        subprocess.run([...], env={**os.environ, **server.env()})
        assert server.run("my-id").summary["best/val_accuracy"] > 0.9

It answers what wandb 0.31 asks in an online run, `wandb sync`, `wandb sweep`, `wandb agent` and
`wandb.Api()`. What arrives is plain Python (wandb_state.py); the GraphQL operations are in
wandb_schema.py. `server.faults` makes it fail. A question that it does not know is answered with
an error and noted in `server.unknown`; an exception in the stand-in itself is raised at the end
of the `with` block.

As a process of its own, which can be killed and started again with its state:

    python tests/wandb_server.py --port 0 --state DIR

It prints its address, and ends when its stdin closes. `ServerProcess` does that for a test. The
classes in a state are pickled by module name, so `tests` has to be on the path of who reads it.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import gzip
import hashlib
import json
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from graphql_reader import GraphQLError, UnknownFieldError, execute, parse
from wandb_schema import Schema
from wandb_state import Artifact, Collection, Json, Run, State, Sweep

API_KEY = "fake" * 10
"""The only key that is let in; no real one has this form."""
POLL_SECONDS = 0.05
STATE_FILE = "state.pickle"


def client_environment(url: str, api_key: str) -> dict[str, str]:
    """The environment of a client: the server, a key that it takes, quick uploads."""
    return {
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": api_key,
        "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
        "WANDB_ERROR_REPORTING": "false",
    }


@dataclass
class Faults:
    """What goes wrong, until it is cleared; may be changed at any time, best with `set`.

    Attributes:
        status: answer with this HTTP status (429, 500, 403, …) and do nothing.
        delay_seconds: wait before the answer.
        hang: do not answer before the fault is cleared; then cut the connection.
        refuse: close each connection at once. (`WandbServer.close` is the harder form: nobody
            listens.)
        cut_uploads: close the connection in the middle of an upload's bytes.
        only: kinds of requests that this is for: graphql, file_stream, upload, download, or the
            name of a GraphQL operation; empty: all. (Not for `refuse`: no request is read yet.)
        requests: for so many more requests; None: no end.
        until: time.monotonic() at which all is well again; None: no end.
    """

    status: int | None = None
    delay_seconds: float = 0.0
    hang: bool = False
    refuse: bool = False
    cut_uploads: bool = False
    only: tuple[str, ...] = ()
    requests: int | None = None
    until: float | None = None

    def set(self, *, seconds: float | None = None, **changes: Any) -> None:
        """Replace all faults by these, for a time if `seconds` is given."""
        for name, value in dataclasses.asdict(Faults(**changes)).items():
            setattr(self, name, tuple(value) if name == "only" else value)
        if seconds is not None:
            self.until = time.monotonic() + seconds

    def clear(self) -> None:
        """All is well again."""
        self.set()

    def take(self, kinds: set[str] | None) -> Faults:
        """The faults that a request of these kinds (None: not known yet) meets; counts it."""
        is_over = self.requests == 0 or (self.until is not None and time.monotonic() >= self.until)
        if is_over or (kinds is not None and self.only and not kinds & set(self.only)):
            return Faults()
        found = dataclasses.replace(self)
        if self.requests is not None and found != Faults(requests=self.requests):
            self.requests -= 1
        return found


class _Listener(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, owner: WandbServer) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", port), _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return not (self.owner.faults.refuse and self.owner.faults.take(None).refuse)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client may go at any time
            self.owner.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    timeout = 60  # seconds that a client may keep the connection silent
    server: _Listener

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr; see `server.requests`."""

    def handle_any(self) -> None:
        """Read the request, meet the faults, answer."""
        owner = self.server.owner
        path = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        kind = {"graphql": "graphql", "_control": "control", "storage": "download"}.get(
            path[0], "?"
        )
        if path[-1] == "file_stream":
            kind = "file_stream"
        if kind == "download" and self.command == "PUT":
            kind = "upload"
        length = int(self.headers.get("Content-Length") or 0)
        faults = Faults()
        if kind == "upload":
            faults = owner.meet_faults({kind})
            if faults.cut_uploads:
                self.rfile.read(length // 2)
                self.cut()
                return
        body = self.rfile.read(length)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        question = json.loads(body) if kind in ("graphql", "control") and body else {}
        document = parse(question["query"]) if kind == "graphql" else None
        names = {kind, document.name} if document else {kind}
        if kind not in ("control", "upload"):
            faults = owner.meet_faults(names)
        owner.requests[document.name if document else kind] += 1
        if faults.hang:
            self.cut()
        elif faults.status:
            self.reply(faults.status, {"error": f"planned fault: {faults.status}"})
        else:
            self.reply(*owner.answer(self, kind, path, body, document, question))

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815

    def cut(self) -> None:
        """End the connection with a reset, in the middle of whatever it is."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def reply(self, status: int, content: Any) -> None:
        """Send JSON, or bytes as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def has_key(self, key: str) -> bool:
        """Whether the request carries the key."""
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        expected = base64.b64encode(f"api:{key}".encode()).decode()
        return (scheme, value) in (("Basic", expected), ("Bearer", key))


class WandbServer:
    """The server in a thread of this process; a context manager that stops it.

    Args:
        port: to listen on, 127.0.0.1 only; 0: a free one.
        state_dir: keep the state in this folder, and begin with what is there; None: in memory.
    """

    def __init__(self, port: int = 0, state_dir: Path | None = None) -> None:
        self.api_key = API_KEY
        self.faults = Faults()
        self.requests: Counter[str] = Counter()
        """How many requests came: by GraphQL operation, or file_stream, upload, download."""
        self.unknown: list[str] = []
        self.errors: list[str] = []
        self.state_file = state_dir / STATE_FILE if state_dir else None
        kept = self.state_file is not None and self.state_file.exists()
        self.state: State = pickle.loads(self.state_file.read_bytes()) if kept else State()
        self.port = port
        self._lock = threading.RLock()
        self.schema = Schema(self.state)
        self._listener: _Listener | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close()
        if self.errors and kind is None:
            raise AssertionError("the stand-in server failed:\n" + "\n".join(self.errors))

    def open(self) -> None:
        """Listen (again, on the same port)."""
        self.save()
        self._listener = _Listener(self.port, self)
        self.port = self._listener.server_address[1]
        self.schema.url = self.url
        poll = {"poll_interval": POLL_SECONDS}
        threading.Thread(target=self._listener.serve_forever, kwargs=poll, daemon=True).start()

    def close(self) -> None:
        """Stop listening: connections are refused from now on; the state stays."""
        if self._listener is not None:
            listener, self._listener = self._listener, None
            listener.shutdown()
            listener.server_close()

    @property
    def url(self) -> str:
        """For WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self.port}"

    def env(self) -> dict[str, str]:
        """The environment of a client."""
        return client_environment(self.url, self.api_key)

    # ── what has arrived ─────────────────────────────────────────────────────────────────────

    @property
    def runs(self) -> dict[tuple[str, str, str], Run]:
        """All runs by entity, project and id."""
        return self.state.runs

    @property
    def artifacts(self) -> dict[tuple[str, str, str], Collection]:
        """All artifacts by entity, project and name."""
        return self.state.artifacts

    @property
    def sweeps(self) -> dict[tuple[str, str, str], Sweep]:
        """All sweeps by entity, project and id."""
        return self.state.sweeps

    def run(self, run_id: str) -> Run:
        """The run with an id, in whatever project."""
        return self.state.run(run_id)

    def sweep(self, sweep_id: str) -> Sweep:
        """The sweep with an id, in whatever project."""
        return self.state.sweep(sweep_id)

    def artifact(self, name: str) -> Artifact:
        """The version `name:alias`, in whatever project."""
        return self.state.artifact(name)

    # ── what a person does in the app ────────────────────────────────────────────────────────

    def stop_run(self, run_id: str, client: bool = True, agent: bool = True) -> None:
        """The stop button (hyperband does the same): through the client, through the agent."""
        with self._lock:
            self.run(run_id).ask_to_stop(client, agent)
            self.save()

    def set_sweep_state(self, sweep_id: str, state: str) -> None:
        """RUNNING, PAUSED, FINISHED (no new runs) or CANCELED (running ones stop, too)."""
        with self._lock:
            self.sweep(sweep_id).state = state
            self.save()

    def preempt(self, run_id: str) -> None:
        """The machine of a sweep's run is gone without a word: the run waits for another agent."""
        with self._lock:
            self.run(run_id).state = "preempted"
            self.schema.requeue(self.run(run_id))
            self.save()

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def meet_faults(self, kinds: set[str]) -> Faults:
        """The faults for a request, after their waiting time."""
        with self._lock:
            faults = self.faults.take(kinds)
        time.sleep(faults.delay_seconds)
        while faults.hang and self.faults.hang and self._listener is not None:
            if faults.until is not None and time.monotonic() >= faults.until:
                break
            time.sleep(POLL_SECONDS)
        return faults

    def answer(
        self,
        request: _Handler,
        kind: str,
        path: list[str],
        body: bytes,
        document: Any,
        question: Json,
    ) -> tuple[int, Any]:
        """Status and content of the answer to a request."""
        if kind in ("graphql", "file_stream") and not request.has_key(self.api_key):
            return 401, {"errors": [{"message": "user is not logged in"}]}
        with self._lock:
            if kind == "graphql":
                answer = self._graphql(document, question.get("variables") or {})
            elif kind == "file_stream":
                answer = self._file_stream(path, json.loads(body))
            elif kind == "upload":
                answer = self._upload(path[1:], body)
            elif kind == "download":
                answer = self._download(path[1:])
            elif kind == "control":
                answer = self._control(question)
            else:
                self.unknown.append(f"{request.command} {request.path}")
                answer = 404, {"error": "not found"}
            if request.command != "GET":
                self.save()
        return answer

    def _graphql(self, document: Any, variables: Json) -> tuple[int, Json]:
        self.schema.note_silent_runs()
        root = self.schema.mutation if document.kind == "mutation" else self.schema.query
        try:
            return 200, {"data": execute(document, variables, root)}
        except GraphQLError as error:
            if isinstance(error, UnknownFieldError):
                self.unknown.append(f"{document.name}: {error}")
            return error.status, {"errors": [{"message": str(error), "path": []}], "data": None}
        except Exception:
            self.errors.append(f"{document.name} {variables}\n{traceback.format_exc(limit=-4)}")
            return 400, {"errors": [{"message": "the stand-in failed"}]}  # not 500: no retries

    def _file_stream(self, path: list[str], post: Json) -> tuple[int, Json]:
        _files, entity, project, run_id, _ = path
        run = self.runs.get((entity, project, run_id))
        if run is None:
            return 404, {"error": f"run {run_id} not found"}
        run.receive(post)
        run.heartbeat = time.time()
        self.schema.requeue(run)
        return 200, {"exitcode": None, "limits": {}, "stopped": run.stop_client}

    def _upload(self, path: list[str], body: bytes) -> tuple[int, Json]:
        match path:
            case ["run", entity, project, run_id, *name]:
                self.runs[entity, project, run_id].files["/".join(name)] = body
            case ["blob", _entity, digest]:
                if hashlib.md5(body).hexdigest() != digest:
                    return 400, {"error": "the contents do not have the digest that was announced"}
                self.state.blobs[digest] = body
            case ["manifest", artifact_id]:
                self.state.blobs[artifact_id] = body
        return 200, {}

    def _download(self, path: list[str]) -> tuple[int, Any]:
        match path:
            case ["run", entity, project, run_id, *name]:
                found = self.runs[entity, project, run_id].files.get("/".join(name))
            case _:
                found = self.state.blobs.get(path[-1])
        return (404, {"error": "not found"}) if found is None else (200, found)

    def _control(self, wanted: Json) -> tuple[int, Json]:
        """Switches for another process: `faults`, `stop_run`, `sweep_state`, `preempt`."""
        if "faults" in wanted:
            self.faults.set(**wanted["faults"])
        if "stop_run" in wanted:
            self.stop_run(wanted["stop_run"])
        if "sweep_state" in wanted:
            self.set_sweep_state(*wanted["sweep_state"])
        if "preempt" in wanted:
            self.preempt(wanted["preempt"])
        return 200, {"requests": self.requests, "unknown": self.unknown, "errors": self.errors}

    def save(self) -> None:
        """Write the state, if it is kept; before the answer, so that a kill loses nothing."""
        if self.state_file is not None:
            new = self.state_file.with_suffix(".new")
            new.write_bytes(pickle.dumps(self.state))
            new.replace(self.state_file)


class ServerProcess:
    """The server as a process of its own, which can be killed and started again.

    Args:
        state_dir: a folder where its state is kept.
    """

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, on the port that it had before."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--port", str(self.port), "--state", str(self.state_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().rpartition(":")[2])

    def kill(self) -> None:
        """End it without a word (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    @property
    def url(self) -> str:
        """For WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self.port}"

    def env(self) -> dict[str, str]:
        """The environment of a client."""
        return client_environment(self.url, API_KEY)

    def control(self, **wanted: Any) -> Json:
        """Change something: `faults={"status": 500}`, `stop_run="id"`, …; returns its counters."""
        body = json.dumps(wanted).encode()
        with urllib.request.urlopen(f"{self.url}/_control", body, timeout=10) as answer:
            found: Json = json.load(answer)
        return found

    @property
    def state(self) -> State:
        """A copy of what it has received so far."""
        found: State = pickle.loads((self.state_dir / STATE_FILE).read_bytes())
        return found


def main() -> None:
    """Serve until stdin closes (or for a time)."""
    parser = argparse.ArgumentParser(description="A local stand-in for the W&B backend, for tests.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--state", type=Path, help="folder to keep the state in")
    parser.add_argument("--seconds", type=float, help="end after this time, not with stdin")
    options = parser.parse_args()
    with WandbServer(options.port, options.state) as server:
        print(server.url, flush=True)
        if options.seconds is None:
            sys.stdin.read()
        else:
            time.sleep(options.seconds)


if __name__ == "__main__":
    main()
