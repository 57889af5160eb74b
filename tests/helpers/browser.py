"""A page as a browser lays it out: Chromium without a window, if this machine has one."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def program() -> str:
    """The browser; skips the test, with the reason, where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here ({', '.join(NAMES)}); apt-get install chromium")
    return found


def dom(url: str, profile: Path, budget: int = 10_000) -> str:
    """The document at `url` as HTML after its scripts have run for `budget` milliseconds of the page's own clock."""
    command = [program(), "--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", f"--virtual-time-budget={budget}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def measured(page: Path, script: str, widths: Sequence[int], scratch: Path) -> list[Any]:
    """What the body of a JavaScript function returns for the page as its `document`, laid out at each of the widths."""
    source = html.escape(page.read_text())
    frames = "".join(f'<iframe style="width:{w}px;height:900px;border:0" srcdoc="{source}"></iframe>' for w in widths)
    wrapper = scratch / "wrapper.html"
    wrapper.write_text(
        f"{frames}<pre id=result></pre><script>onload = () => {{ const read = function(document) {{ {script} }};"
        "const answers = [...document.querySelectorAll('iframe')].map(frame => read(frame.contentDocument));"
        "document.getElementById('result').textContent = JSON.stringify(answers); }</script>"
    )
    shown = dom(wrapper.as_uri(), scratch / "profile")
    return json.loads(html.unescape(re.findall(r'<pre id="result">(.*?)</pre>', shown, re.DOTALL)[-1]))
