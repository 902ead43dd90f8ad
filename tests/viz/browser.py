"""A headless Chromium driven over the W3C WebDriver protocol, with the standard library alone."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """One page: open it, run scripts in it, press keys, read its console."""

    def __init__(self, address, session):
        self._root = f"{address}/session/{session}"

    def open(self, path):
        _ask(f"{self._root}/url", {"url": path.resolve().as_uri()})

    def run(self, script, *arguments):
        return _ask(f"{self._root}/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script):
        """What the script hands to the function that is its only argument."""
        return _ask(f"{self._root}/execute/async", {"script": script, "args": []})

    def press(self, key):
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        _ask(f"{self._root}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def settle(self):
        """Waits until the page is there and every picture of it is decoded and drawn."""
        self.wait("""const decoded = typeof images === "undefined" ? [] : images.map(image => image.decode());
            Promise.all(decoded).then(() => requestAnimationFrame(() => setTimeout(arguments[0], 0)))""")

    def click(self, selector):
        self.run("document.querySelector(arguments[0]).click()", selector)

    def errors(self):
        entries = _ask(f"{self._root}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self):
        return _ask(f"{self._root}/screenshot")


@contextlib.contextmanager
def browser(profile, width=1200, height=900, dark=False):
    """Starts chromedriver and a Chromium with the empty profile folder `profile`; ends both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address, session = f"http://127.0.0.1:{port}", None
    try:
        _wait(address)
        flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
        options = {"binary": CHROMIUM, "args": flags}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = _ask(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        yield Browser(address, session)
    finally:
        if session is not None:
            _ask(f"{address}/session/{session}", method="DELETE")
        driver.terminate()
        driver.wait(10)


def _wait(address):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if _ask(f"{address}/status")["ready"]:
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("chromedriver did not become ready in 20 s")


def _ask(url, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return json.load(answer)["value"]
