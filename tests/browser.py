"""Headless Chromium for tests of pages, and what a page must satisfy for people who see little or use no mouse.

::

    with chromium(tmp_path) as browser:      skips, with the reason, where Chromium or its driver is absent
        browser.get(url)
        assert not contrast_faults(browser)  every visible text against what is painted behind it, from computed styles
        assert not nameless(browser)         every interactive element of Chromium's own accessibility tree
        errors(browser)                      what the page's console complained of
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

INTERACTIVE = {
    "button",
    "link",
    "textbox",
    "searchbox",
    "checkbox",
    "radio",
    "combobox",
    "listbox",
    "option",
    "menuitem",
}
INTERACTIVE |= {
    "slider",
    "spinbutton",
    "switch",
    "tab",
    "grid",
    "gridcell",
    "treeitem",
    "dialog",
    "region",
    "img",
    "image",
}


@contextlib.contextmanager
def chromium(folder: Path, *, scheme: str = "dark", width: int = 1280, height: int = 800) -> Iterator[Any]:
    """A Selenium driver of a fresh Chromium whose profile is in `folder`; `scheme` is what the person prefers, dark or light."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium and chromedriver are not on this machine")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-gpu",
        "--force-color-profile=srgb",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'chromium'}",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(executable_path=driver))
    try:
        browser.set_page_load_timeout(60)
        browser.set_script_timeout(60)
        prefer(browser, scheme)
        # the window has a frame even without a head: the page itself gets what was asked for
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield browser
    finally:
        browser.quit()


def prefer(browser: Any, scheme: str, *, motion: bool = True) -> None:
    """What the person's system prefers from now on: `scheme` dark or light, and whether things may move."""
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "no-preference" if motion else "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def errors(browser: Any) -> list[str]:
    """What the console complained of since the last call: scripts that failed, refused resources, failed requests."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def nameless(browser: Any) -> list[str]:
    """Interactive elements that a screen reader could not name, with role and description of the element."""
    faults = []
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {node.get("role", {}).get("value") for node in nodes}
    assert roles & INTERACTIVE, f"nothing to look at: the page has only {sorted(str(role) for role in roles)}"
    for node in nodes:
        role = node.get("role", {}).get("value")
        if node.get("ignored") or role not in INTERACTIVE or node.get("name", {}).get("value", "").strip():
            continue
        about = browser.execute_cdp_cmd("DOM.describeNode", {"backendNodeId": node["backendDOMNodeId"]})["node"]
        faults.append(f"{role}: <{about['nodeName'].lower()} {' '.join(about.get('attributes', []))}>")
    return faults


def contrast_faults(browser: Any, least: float = 4.5) -> list[str]:
    """Visible texts whose contrast (WCAG 2.2, relative luminance) to what is painted behind them is below `least`."""
    texts: list[dict[str, Any]] = browser.execute_script(_CONTRAST)
    assert texts, "the page shows no text"
    return [f"{one['ratio']:.2f}: {one['where']} {one['text']!r}" for one in texts if one["ratio"] < least]


def contrasts(browser: Any) -> list[float]:
    """The contrast of every visible text."""
    return [one["ratio"] for one in browser.execute_script(_CONTRAST)]


_CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
canvas.canvas.width = canvas.canvas.height = 1;
function rgba(text) {                       // any colour that CSS can name, as numbers
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
}
const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3])).concat(1);
function luminance(colour) {
  const [r, g, b] = colour.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {                  // the colours from the root down to the element, painted over each other
  const chain = []; for (let at = element; at; at = at.parentElement) chain.unshift(at);
  return chain.reduce((below, at) => over(rgba(getComputedStyle(at).backgroundColor), below), [255, 255, 255, 1]);
}
function opacity(element) {
  let all = 1; for (let at = element; at; at = at.parentElement) all *= +getComputedStyle(at).opacity; return all;
}
function seen(element) {
  return element.checkVisibility({visibilityProperty: true, opacityProperty: true}) && element.getClientRects().length > 0;
}
function rate(element, style, text) {
  const below = behind(element), colour = rgba(style.color); colour[3] *= opacity(element);
  const [a, b] = [luminance(over(colour, below)), luminance(below)];
  const where = `${element.tagName.toLowerCase()}#${element.id}.${element.className}`;
  return {ratio: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), where, text: text.trim().slice(0, 60)};
}
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; (node = walk.nextNode());) {
  const element = node.parentElement;
  if (!node.data.trim() || ['SCRIPT', 'STYLE', 'NOSCRIPT', 'TITLE'].includes(element.tagName) || !seen(element)) continue;
  found.push(rate(element, getComputedStyle(element), node.data));
}
for (const element of document.body.querySelectorAll('*')) {
  if (!seen(element)) continue;
  for (const part of ['::before', '::after']) {
    const style = getComputedStyle(element, part), text = style.content.replace(/^"|"$/g, '');
    if (!['none', 'normal', ''].includes(text) && style.display !== 'none') found.push(rate(element, style, part + text));
  }
  if (element.placeholder && !element.value)
    found.push(rate(element, getComputedStyle(element, '::placeholder'), element.placeholder));
  else if (['INPUT', 'TEXTAREA', 'SELECT'].includes(element.tagName) && element.value && element.type !== 'hidden')
    found.push(rate(element, getComputedStyle(element), element.value));
}
return found;
"""
