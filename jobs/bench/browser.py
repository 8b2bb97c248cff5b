"""A Chromium without a window, driven through its DevTools protocol, which needs no library but a websocket."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
START_SECONDS = 60


def chromium() -> str | None:
    """Where Chromium is; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """Use as a context manager: one page, in a profile of its own."""

    def __init__(self, program: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bonsai-browser-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--remote-debugging-port=0", "--window-size=1280,900",
             f"--user-data-dir={self._folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._number = 0
        self.events: list[dict[str, Any]] = []  # what the page told since the last visit

    def __enter__(self) -> Browser:
        port_file, until = Path(self._folder.name) / "DevToolsActivePort", time.monotonic() + START_SECONDS
        while not port_file.exists() or not port_file.read_text().count("\n"):
            if time.monotonic() > until:
                self._end()
                raise RuntimeError("Chromium did not start.")
            time.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as told:
            page = next(target for target in json.load(told) if target["type"] == "page")
        self._link = connect(page["webSocketDebuggerUrl"], max_size=None)
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.close()
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its answer."""
        self._number += 1
        self._link.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._link.recv(timeout=60))
            if said.get("id") == self._number:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']['message']}")
                return dict(said["result"])
            self.events.append(said)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"The page failed: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def visit(self, address: str, until: Callable[[], Any], seconds: float = 60) -> Any:
        """Open a page and wait for what `until` answers."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        end = time.monotonic() + seconds
        while not (found := until()):
            if time.monotonic() > end:
                raise RuntimeError(f"{address} did not show what it should within {seconds:g} seconds.")
            time.sleep(0.02)
        return found

    def transferred(self, *, but: str) -> int:
        """Bytes over the wire since the last visit began, headers and all, without addresses that contain `but`."""
        addresses = {
            said["params"]["requestId"]: said["params"]["request"]["url"]
            for said in self.events
            if said["method"] == "Network.requestWillBeSent"
        }
        return sum(
            int(said["params"]["encodedDataLength"])
            for said in self.events
            if said["method"] == "Network.loadingFinished"
            and but not in addresses.get(said["params"]["requestId"], but)
        )
