"""A headless Chromium, driven through a pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = "/usr/bin/chromium"

PATIENCE = 30
"""Seconds in which Chromium answers a request, or reports something."""

KEYS = {"ArrowRight": 39, "ArrowDown": 40, "End": 35, "Enter": 13, "Tab": 9}
"""Name of a key -> its code. Source: UI Events."""


class Browser:
    """A page in Chromium, controlled by the Chrome DevTools Protocol. An error of that fails the test."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        """What the page has reported since it was opened, such as exceptions, requests and violations of its policy."""

    def open(self, page: Path) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], PATIENCE)
            assert ready, "Chromium does not answer"
            part = os.read(self._answers, 2**20)
            assert part, "Chromium has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, of which JSON must be possible."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        text = "\r" if key == "Enter" else ""  # a button is pressed by the character
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], text=text
            )

    def click(self, selector: str) -> None:
        """Click on the middle of the first element that a CSS selector matches."""
        box = self.evaluate(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser inside `with`. `profile` is a directory for its files, which must not exist."""
    from_us, to_us = os.pipe(), os.pipe()

    def streams() -> None:  # Chromium reads commands from descriptor 3, and writes answers to 4
        commands, answers = os.dup(from_us[0]), os.dup(to_us[1])
        os.dup2(commands, 3)
        os.dup2(answers, 4)

    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
        "--no-first-run",
        "--disable-background-networking",
        "--window-size=1500,950",
    )
    process = subprocess.Popen(
        [CHROMIUM, *options, f"--user-data-dir={profile}"],
        preexec_fn=streams,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(from_us[0])
    os.close(to_us[1])
    try:
        browser = Browser(from_us[1], to_us[0])
        yield browser
        browser._session = None
        browser.call("Browser.close")
        process.wait(PATIENCE)  # it writes to its directory until its end
    finally:
        process.kill() if process.poll() is None else None
        process.wait()
        os.close(from_us[1])
        os.close(to_us[0])
