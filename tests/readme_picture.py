"""Draw the picture at the top of the README: a sweep of the bundled model.

python -m tests.readme_picture        (needs a Chromium or Chrome on the PATH)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from superscopes_tl import heatmap, load_model, sweep

PICTURE = Path(__file__).parent.parent / "notebooks" / "images" / "heatmap.png"
PROMPT = "Red Hot Chili Peppers"


def main() -> None:
    """Sweep, draw, take the screenshot."""
    browsers = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((found for name in browsers if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"browser: expected one of {browsers} on the PATH, got none. Fix: install one.")
    figure = heatmap(sweep(load_model("mini", backend="bridge", device="cpu"), PROMPT))
    width, height = int(figure.layout.width), int(figure.layout.height)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "heatmap.html"
        figure.write_html(page, config={"displayModeBar": False})
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--disable-background-networking",
                f"--user-data-dir={folder}/profile",
                f"--window-size={width + 20},{height + 20}",
                "--virtual-time-budget=10000",
                f"--screenshot={PICTURE}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )
    print(PICTURE)


if __name__ == "__main__":
    main()
