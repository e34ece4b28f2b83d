"""A page in headless Chromium: what is too wide, and which pictures do not show.

Commands of the DevTools protocol go through a pipe, one JSON object each, ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
]
_LOOK = """
(async () => {
  const pictures = [...document.querySelectorAll("img, svg image")];
  const broken = [];
  for (const picture of pictures) {
    const copy = new Image();
    copy.src = picture.getAttribute("src") ?? picture.getAttribute("href") ?? picture.getAttribute("xlink:href");
    try { await copy.decode(); } catch { broken.push(copy.src.slice(0, 60)); }
  }
  const wide = [...document.querySelectorAll("body *")].filter((e) =>
    e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest(".scroll") && !e.closest("svg"));
  const drawings = [...document.querySelectorAll("svg")];
  return {
    width: innerWidth, content: document.documentElement.scrollWidth, broken, pictures: pictures.length,
    drawings: drawings.length, flat: drawings.filter((e) => e.getBoundingClientRect().height < 50).length,
    wide: wide.map((e) => e.tagName + "." + e.className), page: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("svg text") ?? document.body).fill,
  };
})()
"""


class Browser:
    """One tab."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._last, self._rest = commands, answers, 0, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; messages in between are dropped."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._answers, 1 << 16)
            assert piece, "Chromium has gone"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def look_at(self, path: Path, width: int, dark: bool = False, media: str = "screen") -> dict[str, Any]:
        """What a script sees in the page at that width of the screen."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass
        answer = self.call("Runtime.evaluate", expression=_LOOK, awaitPromise=True, returnByValue=True)
        found: dict[str, Any] = answer["result"]["value"]
        return found

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def photograph(self, path: Path) -> None:
        """The whole page as it is shown, as a PNG file."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile, gone at the end."""
    assert CHROMIUM is not None
    reads, commands = os.pipe()
    answers, writes = os.pipe()
    # The descriptors 3 and 4 are where Chromium looks for its pipes.
    line = f'exec "$0" "$@" 3<&{reads} 4>&{writes}'
    process = subprocess.Popen(
        ["bash", "-c", line, CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}"],
        pass_fds=(reads, writes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(reads)
    os.close(writes)
    try:
        yield Browser(commands, answers)
    finally:
        process.terminate()
        process.wait(30)
        os.close(commands)
        os.close(answers)
