"""The pictures of docs/model.md: three parts of the page that bdh-look writes, as Chromium shows them.

python examples/page_pictures.py docs      # needs playwright, and a chromium on PATH
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

TEXT = "The dragon hatches, and the dragon flies."
PARTS = {"model-read.png": "h-read", "model-neurons.png": "h-neurons", "model-state.png": "h-state"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder = parser.parse_args().folder
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        print("no chromium is on PATH", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as made, sync_playwright() as playwright:
        page = Path(made) / "page.html"
        command = [Path(sys.executable).with_name("bdh-look"), TEXT, "-o", page, "--backend", "numpy", "--quiet"]
        subprocess.run(command, check=True)
        shown = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = shown.new_page(viewport={"width": 1100, "height": 900}, device_scale_factor=1.5)
        tab.goto(page.as_uri())
        for name, heading in PARTS.items():
            tab.locator(f"section[aria-labelledby={heading}]").screenshot(path=folder / name)
        shown.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
