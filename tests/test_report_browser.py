"""The report in a browser: nothing overflows a phone, nothing is too small or too faint, nothing is asked for.

Screenshots are kept in build/screenshots. Needs Chromium (`apt-get install chromium`), which is spoken to over pipes.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsekit.comparison import comparison_html, contests
from sparsekit.report import LayerTime, Report
from tests.test_report import bare_report, latency_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = Path(__file__).parents[1] / "build" / "screenshots"
WIDTHS = {"phone": 390, "tablet": 768, "desktop": 1200}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

# Chromium reads commands from its file 3 and writes answers to its file 4.
LAUNCHER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)

# What a reader would stumble over, as text; a page without faults gives an empty list.
FAULTS = """
(() => {
  const faults = [];
  const luminance = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(part => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const width = document.documentElement.clientWidth;
  const page = getComputedStyle(document.body).backgroundColor;
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim());
    const box = element.getBoundingClientRect();
    if (!own || !box.width) continue;
    const what = `<${element.tagName}> ${element.textContent.trim().slice(0, 40)}`;
    const style = getComputedStyle(element);
    const drawn = element instanceof SVGElement;
    const scale = drawn ? element.getScreenCTM().a : 1;
    if (box.left < -0.5 || box.right > width + 0.5) faults.push(`${what}: from ${box.left} to ${box.right}`);
    if (parseFloat(style.fontSize) * scale < 10) faults.push(`${what}: ${parseFloat(style.fontSize) * scale} px`);
    const filled = drawn && element.matches('.on-dense, .on-compact') ? element.parentNode.querySelector("rect") : null;
    const behind = filled ? getComputedStyle(filled).fill : page;
    const ratio = contrast(drawn ? style.fill : style.color, behind);
    if (ratio < 4.5) faults.push(`${what}: contrast ${ratio.toFixed(2)}`);
  }
  return faults;
})()
"""


class Tab:
    """One page of a browser, and the events that it has sent."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._unread = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """The browser's answer to a command of the DevTools protocol."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def wait(self, event: str) -> None:
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"]["value"]

    def open(self, path: Path, *, width: int, dark: bool) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            piece = os.read(self._answers, 1 << 20)
            assert piece, "the browser is gone"
            self._unread += piece
        answer, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(answer))


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A headless Chromium, which is gone at the end, and after two minutes at the latest."""
    assert CHROMIUM
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
    (their_read, commands), (answers, their_write) = os.pipe(), os.pipe()
    # Above 4, or one would be overwritten before it is copied.
    theirs = [fcntl.fcntl(file, fcntl.F_DUPFD, 10) for file in (their_read, their_write)]
    arguments = [sys.executable, "-c", LAUNCHER, *map(str, theirs), CHROMIUM, *flags, f"--user-data-dir={profile}"]
    with subprocess.Popen(arguments, pass_fds=theirs, stderr=subprocess.DEVNULL) as process:
        for file in (their_read, their_write, *theirs):
            os.close(file)
        timer = threading.Timer(120, process.kill)
        timer.start()
        try:
            yield Tab(commands, answers)
        finally:
            timer.cancel()
            process.kill()
            os.close(commands)
            os.close(answers)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def resnet_report() -> Report:
    """As many layers, and names as long, as in a network of the size that people compress."""
    names = [f"backbone.layer{i}.{b}.conv{c}" for i in range(1, 5) for b in range(6) for c in (1, 2, 3)]
    layers = tuple(LayerTime(name, 0.2 + 0.01 * (i % 7), 0.1, 10**8, 5 * 10**7) for i, name in enumerate(names))
    return replace(latency_report(), layers=layers)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    reports = {"report": resnet_report(), "bare": bare_report()}
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(report.html(), encoding="utf-8")
    runs = {folder / f"runs/a-run-with-a-long-name-{i}": latency_report() for i in range(5)}
    page = folder / "pareto.html"
    page.write_text(comparison_html(contests(runs), page), encoding="utf-8")
    return folder


SCREENS = [
    *(("report", screen, scheme) for screen in ("phone", "desktop") for scheme in ("light", "dark")),
    *(("pareto", "phone", "dark"), ("pareto", "tablet", "light"), ("pareto", "desktop", "light")),
    *(("report", "tablet", "light"), ("bare", "phone", "light")),
]


@pytest.mark.parametrize(("name", "screen", "scheme"), SCREENS)
def test_the_page_is_readable_and_complete_in_itself(
    name: str, screen: str, scheme: str, pages: Path, tab: Tab
) -> None:
    width = WIDTHS[screen]
    tab.open(pages / f"{name}.html", width=width, dark=scheme == "dark")
    tab.screenshot(SCREENSHOTS / f"{name}-{screen}-{scheme}.png")
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(FAULTS) == []
    requests = [
        seen["params"]["request"]["url"] for seen in tab.events if seen["method"] == "Network.requestWillBeSent"
    ]
    assert requests == [(pages / f"{name}.html").as_uri()]
    complaints = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [seen for seen in tab.events if seen["method"] in complaints] == []


def test_the_browser_sees_what_is_wrong_with_a_page(tmp_path: Path, tab: Tab) -> None:
    page = tmp_path / "faulty.html"
    page.write_text(
        "<meta name=viewport content=width=device-width><body style='background: #fff'>"
        "<p style='width: 600px'>wide</p><p style='font-size: 8px'>small</p><p style='color: #bbb'>faint</p>"
        "<svg viewBox='0 0 640 40' width=320><text x=-90 y=20 font-size=12>drawn</text></svg>"
        "<script>console.error('loud')</script><img src=missing.png>",
        encoding="utf-8",
    )
    tab.open(page, width=390, dark=False)
    assert tab.evaluate("document.documentElement.scrollWidth") > 390
    faults = [fault.split(": ")[0] for fault in tab.evaluate(FAULTS)]
    assert faults == ["<P> wide", "<P> small", "<P> faint", "<text> drawn", "<text> drawn"]
    methods = {seen["method"] for seen in tab.events}
    assert {"Runtime.consoleAPICalled", "Log.entryAdded"} <= methods
    assert sum(seen["method"] == "Network.requestWillBeSent" for seen in tab.events) == 2


def test_dark_screens_get_a_dark_page(pages: Path, tab: Tab) -> None:
    colours = []
    for dark in (False, True):
        tab.open(pages / "report.html", width=390, dark=dark)
        colours.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark_one = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert light > 3 * 240
    assert dark_one < 3 * 40


def test_a_wider_screen_names_more_layers(pages: Path, tab: Tab) -> None:
    shown = []
    for width in WIDTHS.values():
        tab.open(pages / "report.html", width=width, dark=False)
        names = "[...document.querySelectorAll('.flame .name')].filter(name => name.getBoundingClientRect().width)"
        shown.append(tab.evaluate(f"{names}.length"))
        overlong = "name.getBoundingClientRect().width > name.previousElementSibling.getBoundingClientRect().width"
        assert tab.evaluate(f"{names}.filter(name => {overlong}).map(name => name.textContent)") == []
    assert 0 < shown[0] < shown[1] < shown[2]
