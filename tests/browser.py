"""A headless Chromium, driven through its DevTools protocol: open a page, size the window, ask in JavaScript.

`websocket` is websocket-client, which JupyterLab's server brings along.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import websocket

SECONDS = 120  # for one answer: machines that run tests are busy
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


class Browser:
    """Chromium with one page; a context manager that ends it.  `profile` is an empty folder of its own."""

    def __init__(self, profile: Path):
        command = [PROGRAM, *OPTIONS, "--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank"]
        command.insert(1, f"--user-data-dir={profile}")
        with open(profile / "stderr", "w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for line in self.process.stderr:
                log.write(line)
                if address := re.search(r"DevTools listening on ws://([\w.:]+)/", line):
                    break
            else:
                raise RuntimeError(f"{PROGRAM} did not start: {(profile / 'stderr').read_text()}")
        with urllib.request.urlopen(f"http://{address[1]}/json", timeout=SECONDS) as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=SECONDS)
        self.asked = 0
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.communicate()

    def send(self, method: str, until: str | None = None, **parameters: Any) -> dict:
        """The browser's answer to a command; with `until`, after the event of that name as well."""
        self.asked += 1
        self.socket.send(json.dumps({"id": self.asked, "method": method, "params": parameters}))
        answer = None
        while answer is None or until:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.asked:
                answer = message
            elif "method" in message:
                self._listen(message)
                until = None if message["method"] == until else until
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _listen(self, event: dict) -> None:
        """Keep what the console says of errors and warnings, and what no script has caught."""
        kind, about = event["method"], event["params"]
        if kind == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(about["exceptionDetails"]))
        if kind == "Runtime.consoleAPICalled" and about["type"] in {"error", "warning", "assert"}:
            self.complaints.append(json.dumps(about["args"]))
        if kind == "Log.entryAdded" and about["entry"]["level"] in {"error", "warning"}:
            self.complaints.append(about["entry"]["text"])

    def open(self, page: Path) -> None:
        self.complaints.clear()
        self.send("Page.navigate", until="Page.loadEventFired", url=page.as_uri())

    def resize(self, width: int, density: float) -> None:
        """A window of `width` CSS pixels on a screen with `density` device pixels to each."""
        size = {"width": width, "height": 900, "deviceScaleFactor": density, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it resolves to."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")
