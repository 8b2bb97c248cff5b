"""A server that keeps the part of MLflow's REST contract that forwarding relies on, on a real port.

As the real one with a database (mlflow/store/tracking/sqlalchemy_store.py): a metric is known by key, step, moment and value and stored once; more than
1000 metrics or 100 parameters in one call, a NaN that is no string, and a changed parameter are refused; errors are JSON with an error_code.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = re.compile(r"[\w\-. :/]{1,250}", re.ASCII)


class Contract(Exception):
    """What the server refuses, with a status and a code."""

    def __init__(self, status: int, code: str, words: str) -> None:
        super().__init__(words)
        self.status, self.code = status, code


def refuse_unless(holds: bool, words: str) -> None:
    if not holds:
        raise Contract(400, "INVALID_PARAMETER_VALUE", words)


class Store:
    """What the server remembers; it outlives the server."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.headers: dict[str, str] = {}
        self.num_repeated = 0
        self.lose_answers = 0  # so many calls are carried out and then the connection is cut
        self.status = 0  # answered instead of doing anything

    def experiments_get_by_name(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["experiment_name"]
        if name not in self.experiments:
            raise Contract(404, "RESOURCE_DOES_NOT_EXIST", f"Could not find experiment with name '{name}'")
        return {"experiment": {"experiment_id": self.experiments[name], "lifecycle_stage": "active"}}

    def experiments_create(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["name"] in self.experiments:
            raise Contract(400, "RESOURCE_ALREADY_EXISTS", "It exists.")
        self.experiments[body["name"]] = str(len(self.experiments) + 1)
        return {"experiment_id": self.experiments[body["name"]]}

    def runs_create(self, body: dict[str, Any]) -> dict[str, Any]:
        run = {"metrics": {}, "params": {}, "tags": {tag["key"]: tag["value"] for tag in body["tags"]}}
        run |= {"name": body["run_name"], "experiment": body["experiment_id"], "status": "RUNNING"}
        refuse_unless(body["experiment_id"] in self.experiments.values(), "There is no such experiment.")
        run |= {"start_time": int(body["start_time"])}
        self.runs[name := uuid.uuid4().hex] = run
        return {"run": {"info": {"run_id": name}}}

    def runs_search(self, body: dict[str, Any]) -> dict[str, Any]:
        wanted = re.fullmatch(r"tags\.`(.+)` = '(.+)'", body["filter"])
        refuse_unless(wanted is not None, "The filter cannot be read.")
        assert wanted is not None
        found = [
            {"info": {"run_id": name}}
            for name, run in self.runs.items()
            if run["experiment"] in body["experiment_ids"] and run["tags"].get(wanted[1]) == wanted[2]
        ]
        return {"runs": found} if found else {}

    def runs_log_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        run = self._run(body)
        metrics, params, tags = (body.get(name, []) for name in ("metrics", "params", "tags"))
        refuse_unless(len(metrics) <= 1000, "A batch may have 1000 metrics.")
        refuse_unless(len(params) <= 100 and len(tags) <= 100, "A batch may have 100 parameters and 100 tags.")
        for item in (*metrics, *params, *tags):
            refuse_unless(KEY.fullmatch(item["key"]) is not None, f"Invalid name '{item['key']}'")
        for item in params:
            refuse_unless(isinstance(item["value"], str) and len(item["value"]) <= 500, "A value is too long.")
            refuse_unless(run["params"].get(item["key"], item["value"]) == item["value"], "Changing param values.")
            run["params"][item["key"]] = item["value"]
        for item in metrics:
            value = item["value"] if isinstance(item["value"], float | int) else float(item["value"])
            known = (item["key"], int(item["step"]), int(item["timestamp"]), repr(float(value)))
            self.num_repeated += known in run["metrics"]
            run["metrics"][known] = value
        run["tags"] |= {tag["key"]: tag["value"] for tag in tags}
        return {}

    def runs_update(self, body: dict[str, Any]) -> dict[str, Any]:
        run = self._run(body)
        refuse_unless(body["status"] in ("RUNNING", "FINISHED", "FAILED", "KILLED"), "No such status.")
        run |= {"status": body["status"], "end_time": int(body["end_time"])}
        return {"run_info": {}}

    def _run(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["run_id"] not in self.runs:
            raise Contract(404, "RESOURCE_DOES_NOT_EXIST", f"Run '{body['run_id']}' not found")
        return self.runs[body["run_id"]]

    def only_run(self) -> dict[str, Any]:
        (run,) = self.runs.values()
        return run

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Every stored number of one name, by step."""
        return sorted((step, float(value)) for name, step, _, value in self.only_run()["metrics"] if name == key)


class Server:
    """The store behind a port, until it is closed; opened again on the same port it goes on."""

    def __init__(self, store: Store, port: int = 0) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer({name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()})

            def do_POST(self) -> None:
                # A bare NaN is no JSON: its name as a text stands here, which no answer below accepts as a number by itself.
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(json.loads(raw, parse_constant=lambda name: {"no JSON": name}))

            def _answer(self, body: dict[str, Any]) -> None:
                path = urlsplit(self.path).path.removeprefix("/api/2.0/mlflow/")
                store.calls.append((path, body))
                store.headers = dict(self.headers)
                try:
                    if store.status:
                        raise Contract(store.status, "", "not now")
                    said, status = getattr(store, re.sub(r"\W", "_", path))(body), 200
                except Contract as error:
                    said, status = {"error_code": error.code, "message": str(error)} if error.code else {}, error.status
                if store.lose_answers > 0:
                    store.lose_answers -= 1
                    self.close_connection = True
                    return
                raw = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
