"""Takes the picture of the demo for the documentation, in a headless Chromium, from a page that is served already.

fastdiff demo --port 7860 &
python scripts/screenshot.py http://127.0.0.1:7860 docs/images/demo.png
python scripts/screenshot.py http://127.0.0.1:7860 phone.png --phone
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver

DESK = {"width": 1100, "height": 900, "deviceScaleFactor": 1, "mobile": False}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("file", type=Path)
    parser.add_argument("--phone", action="store_true", help="as wide as a phone, with the settings unfolded")
    parser.add_argument("--patience", type=float, default=600, help="seconds")
    given = parser.parse_args()
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "disable-dev-shm-usage", "disable-gpu", *(["no-sandbox"] if os.getuid() == 0 else [])):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        take(chrome, given.address, given.file, given.phone, given.patience)
    finally:
        chrome.quit()


def take(chrome: webdriver.Chrome, address: str, file: Path, phone: bool, patience: float) -> None:
    screen = PHONE if phone else DESK
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chrome.get(address)
    end, begun = time.monotonic() + patience, False
    while not chrome.find_elements("css selector", "#status .captions"):
        if time.monotonic() > end:
            raise SystemExit(f"no picture after {patience:.0f} s")
        if not begun and (run := chrome.find_elements("css selector", "#run:enabled")):
            run[0].click()
            begun = True
        time.sleep(0.5)
    if phone:
        chrome.find_element("css selector", "#advanced button").click()
    time.sleep(3)
    height = chrome.execute_script("return document.documentElement.scrollHeight")
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen | {"height": height})
    time.sleep(3)
    chrome.save_screenshot(str(file))
    with Image.open(file) as image:
        image.convert("RGB").save(file, optimize=True)


if __name__ == "__main__":
    main()
