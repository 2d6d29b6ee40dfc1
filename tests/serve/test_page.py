"""The page in a real browser: chat, a file that is read, memory without context, fork, reset; by mouse and keyboard."""

import argparse
import os
import shutil
from pathlib import Path

import pytest
from serve.running import Running

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, which drives a browser")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver"
)
PICTURES = os.environ.get("INPLACE_TTT_PICTURES")
"""Directory for screenshots, to be looked at."""


def browse(*options: str):
    settings = webdriver.ChromeOptions()
    settings.binary_location = BROWSER
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", *options):
        settings.add_argument(option)
    settings.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=settings, service=webdriver.ChromeService(DRIVER))


class Page:
    """The page in a browser."""

    def __init__(self, browser, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def one(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.one(selector).get_attribute("textContent")

    def until(self, what, seconds: float = 30):
        return WebDriverWait(self.browser, seconds).until(lambda _: what(), f"page: {self.text('#error')}")

    def idle(self) -> None:
        self.until(lambda: self.one("#send").is_displayed() and self.one("#new").is_enabled())

    def facts(self) -> dict[str, str]:
        script = (
            "return [...document.querySelectorAll('#facts dt')].map(x => [x.textContent, x.nextSibling.textContent])"
        )
        return dict(self.browser.execute_script(script))

    def act(self, name: str) -> None:
        self.one(f"[data-act={name}]").click()
        self.idle()

    def picture(self, name: str) -> None:
        if PICTURES:
            self.browser.save_screenshot(str(Path(PICTURES) / f"{name}.png"))

    def complaints(self) -> list[str]:
        """What the browser logged as errors."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def browser():
    found = browse("--window-size=1200,800")
    yield found
    found.quit()


def test_the_page(browser, tmp_path):
    text = tmp_path / "argparse.txt"
    text.write_text(Path(argparse.__file__).read_text()[:8_000])
    with Running(tmp_path / "state", shipped_model=True, probe_every=512) as server:
        page = Page(browser, server.url)
        page.idle()
        first = page.browser.current_url.split("#")[1]
        assert page.one("#words") == browser.switch_to.active_element
        page.one("#words").send_keys("import numpy", Keys.SHIFT, Keys.ENTER, Keys.NULL, "def read(<b>", Keys.ENTER)
        page.until(lambda: len(page.text("#said .model")) > 3)
        page.idle()
        assert page.text("#said .user") == "import numpy\ndef read(<b>"  # shown as text, not as HTML
        assert "tokens/s" in page.facts()["Speed"]
        assert int(page.facts()["Tokens"]) > 10
        page.one("#file").send_keys(str(text))
        page.one("#give button").click()
        page.until(lambda: float(page.one("#progress").get_attribute("value")) > 0.3)
        page.picture("reading")
        page.idle()
        assert "Read argparse.txt" in page.text("#said")
        assert len(browser.find_elements(By.CSS_SELECTOR, "#chart polyline")) == 2
        assert "updates on" in page.text("#legend")
        tokens = int(page.facts()["Tokens"].replace(",", ""))
        assert tokens > 1500
        page.act("save")
        page.one("#question").send_keys("class ArgumentParser", Keys.ENTER)
        page.until(lambda: page.text("#remembered"))
        page.idle()
        assert page.facts()["Tokens"] == f"{tokens:,}"  # asking leaves no trace
        page.picture("wide-light")
        page.act("fork")
        fork = page.browser.current_url.split("#")[1]
        assert fork != first
        assert page.facts()["Tokens"] == f"{tokens:,}"
        page.act("reset")
        assert page.facts()["Tokens"] == "0"
        Select(page.one("#sessions")).select_by_value(first)
        page.idle()
        assert page.facts()["Tokens"] == f"{tokens:,}"  # the other one forgot, this one did not
        page.act("freeze")
        assert "frozen" in page.facts()["Version"]
        assert page.one("[data-act=freeze]").text == "Thaw"
        page.one("#file").send_keys(str(text))
        page.one("#give button").click()
        page.until(lambda: "frozen" in page.text("#error"))
        page.idle()
        page.act("freeze")
        page.act("rollback")
        assert page.text("#error") == ""
        page.one("#words").send_keys("x", Keys.ENTER)
        page.until(lambda: page.one("#stop").is_displayed())
        page.one("#words").send_keys(Keys.ESCAPE)
        page.idle()
        page.one("[data-act=delete]").click()
        browser.switch_to.alert.accept()
        page.until(lambda: page.browser.current_url.split("#")[1] != first)
        page.idle()
        assert not [c for c in page.complaints() if "409" not in c]


def test_keyboard_alone_reaches_everything(browser, server):
    page = Page(browser, server.url)
    page.idle()
    reached = []
    for _ in range(30):
        webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
        element = browser.switch_to.active_element
        name = element.get_attribute("id") or element.get_attribute("data-act") or element.text
        if name in reached:
            break
        reached.append(name)
        if element.tag_name == "button":
            outline = element.value_of_css_property("outline-style")
            assert outline != "none", name
    assert {"send", "file", "Read", "question", "Ask", "fork", "save", "rollback", "freeze", "reset", "delete"} <= set(
        reached
    )
    for element in browser.find_elements(By.CSS_SELECTOR, "input, select, textarea, button"):
        assert element.accessible_name or not element.is_displayed(), element.get_attribute("outerHTML")


@pytest.mark.parametrize("look", ["light", "dark"])
def test_small_screens_and_dark_mode(browser, server, look):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": look}]}
    )
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page = Page(browser, server.url)
        page.idle()
        page.one("#words").send_keys("a" * 300, Keys.ENTER)
        page.idle()
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width <= 360
        for button in browser.find_elements(By.CSS_SELECTOR, "button"):
            if button.is_displayed():
                assert 0 <= button.rect["x"] <= button.rect["x"] + button.rect["width"] <= 360
        page.picture(f"phone-{look}")
        pairs = [("body", "body"), (".user", ".user"), ("button.main", "button.main"), ("dt", "section")]
        for front, back in pairs:
            contrast = _contrast(page.one(front).value_of_css_property("color"), _behind(page, back))
            assert contrast >= 4.5, (look, front, contrast)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_with_a_key(browser, tmp_path):
    with Running(tmp_path, keys={"ada-key-1": "ada"}) as server:
        page = Page(browser, server.url)
        page.until(lambda: page.one("#unlock").is_displayed())
        assert "API key" in page.text("#error")
        page.one("#key").send_keys("ada-key-1", Keys.ENTER)
        page.until(lambda: page.facts().get("Tokens") == "0")
        assert not page.one("#unlock").is_displayed()


def _behind(page: Page, selector: str) -> str:
    return page.one(selector).value_of_css_property("background-color")


def _contrast(one: str, other: str) -> float:
    """WCAG's contrast of two CSS colours."""

    def light(colour: str) -> float:
        parts = [float(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)
