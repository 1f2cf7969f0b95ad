"""The report page in a browser: what is red, what opens, what is asked of the network."""

# SPDX-License-Identifier: Apache-2.0
import base64
import json
import re
import shutil

import faulty_report
import page_cases
import pytest

from nvfp4_moe.differential.results import FAILED, Cell, Failure, Section
from nvfp4_moe.report import html

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed (pip install selenium)"
)
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

pytestmark = pytest.mark.browser

WIDE, NARROW = 1280, 400
CONTRAST = """
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
function ground(element) {
  const color = numbers(getComputedStyle(element).backgroundColor);
  return color[3] === 0 ? ground(element.parentElement) : color;
}
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement;
  if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
  const ink = element.closest("svg") ? "fill" : "color";
  const [a, b] = [numbers(getComputedStyle(element)[ink]), ground(element)].map(light);
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML]);
}
return found;
"""
"""WCAG 2's ratio of each shown text to what is behind it."""


@pytest.fixture(scope="module")
def chromium():
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in paths.items() if path is None]:
        pytest.skip(f"no {' and no '.join(missing)} (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=paths["chromedriver"])
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(html.render(page_cases.faulty().as_dict()), encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def browser(chromium, address):
    """At the page, wide and light; whatever a test does there, nothing is logged or requested."""
    chromium.get_log("browser"), chromium.get_log("performance")
    show(chromium, "light", WIDE)
    chromium.get(address)
    yield chromium
    assert chromium.get_log("browser") == []
    assert {url.split("#")[0] for url in requested(chromium)} == {address}


def show(browser, scheme: str, width: int) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def requested(browser) -> list[str]:
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def ground(element) -> tuple[int, ...]:
    color = re.findall(r"[\d.]+", element.value_of_css_property("background-color"))
    return tuple(int(c) for c in color[:3])


def wait(browser, condition) -> None:
    """Until what follows an event in its own task is done."""
    WebDriverWait(browser, 10, poll_frequency=0.02).until(condition)


def open_all(browser) -> None:
    for details in browser.find_elements(By.TAG_NAME, "details"):
        browser.execute_script("arguments[0].open = true", details)


def details_of(browser, cell):
    inside = browser.find_element(By.ID, cell.get_attribute("aria-controls"))
    return inside.find_element(By.XPATH, "..")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_failing_cells_are_red_and_others_are_not(browser, scheme):
    show(browser, scheme, WIDE)
    open_all(browser)  # the folded rows, too
    cells = browser.find_elements(By.CSS_SELECTOR, "td[class]:not(.absent)")
    legend = {c.text: ground(c) for c in browser.find_elements(By.CSS_SELECTOR, ".legend .chip")}
    failing = []
    for cell in cells:
        status = cell.find_element(By.TAG_NAME, "b").text
        red, green, blue = ground(cell)
        assert (red > 1.5 * max(green, blue)) == (status in FAILED), (status, ground(cell))
        assert ground(cell) == legend[status]
        if status in FAILED:
            row = cell.find_element(By.XPATH, "..").find_element(By.TAG_NAME, "th").text
            failing.append((row, status))
    assert len(cells) == 50
    assert failing == [
        ("layer0.ffn_in, per-token", "different"),
        ("layer0.ffn_mid, per-token", "different"),
        ("Swiglu, bf16", "outside"),
        ("Relu2, per token", "crashed"),
    ]


@pytest.mark.parametrize("fault", [page_cases.CODE, page_cases.SCALE, page_cases.MOE])
@pytest.mark.parametrize("how", ["click", "ENTER", "SPACE"])
def test_a_cell_opens_and_closes_its_details(browser, fault, how):
    told = browser.find_element(By.XPATH, f"//article[p[contains(., '{fault}')]]")
    key = told.find_element(By.XPATH, "..").get_attribute("id")
    cell = browser.find_element(By.CSS_SELECTOR, f"[aria-controls={key}]")
    for expanded in ("true", "false"):
        assert told.is_displayed() == (expanded == "false")
        cell.click() if how == "click" else cell.send_keys(getattr(Keys, how))
        wait(browser, lambda _: cell.get_attribute("aria-expanded") == expanded)  # noqa: B023
        assert told.is_displayed() == (expanded == "true")
        row = told.find_element(By.XPATH, "ancestor::tr")
        assert row.is_displayed() == (expanded == "true")


def test_the_whole_cell_is_the_button(browser):
    cell = browser.find_element(By.CSS_SELECTOR, "td.different")
    corner = (cell.size["width"] // 2 - 3, cell.size["height"] // 2 - 3)
    ActionChains(browser).move_to_element_with_offset(cell, *corner).click().perform()
    assert browser.find_element(By.TAG_NAME, "article").is_displayed()


def test_only_the_tabulator_leads_to_cells_and_out_of_their_details(browser):
    keys = ActionChains(browser)
    for _ in range(20):
        keys.send_keys(Keys.TAB).perform()
        if browser.switch_to.active_element.get_attribute("aria-controls"):
            break
    cell = browser.switch_to.active_element
    assert cell.text.startswith("different")
    cell.send_keys(Keys.ENTER)
    summary = details_of(browser, cell).find_element(By.TAG_NAME, "summary")
    for _ in range(5):
        if browser.switch_to.active_element == summary:
            break
        keys.send_keys(Keys.TAB).perform()
    summary.send_keys(Keys.ENTER)  # closes what has the focus
    wait(browser, lambda _: browser.switch_to.active_element == cell)
    assert not summary.is_displayed()


@pytest.mark.parametrize("native", [True, False])
def test_a_link_in_the_head_opens_the_details(browser, native):
    links = browser.find_elements(By.CSS_SELECTOR, ".failing a")
    told = browser.find_elements(By.TAG_NAME, "article")
    if not native:  # as in a browser that opens nothing for a fragment
        prevent = "addEventListener('click', (event) => event.preventDefault())"
        browser.execute_script(prevent)
    for link, article in zip(links, told, strict=False):  # a crash has no article
        assert not article.is_displayed()
        link.click()
        assert article.is_displayed()
        top = browser.execute_script("return arguments[0].getBoundingClientRect().top", article)
        assert 0 <= top < 900 or not native


def test_pictures_are_drawn(browser):
    open_all(browser)
    bars = browser.find_elements(By.CSS_SELECTOR, ".outside .bars path")
    assert len(bars) == 10 and bars[0].size["height"] == max(b.size["height"] for b in bars) > 90
    tiles, within = browser.find_elements(By.CSS_SELECTOR, ".map")
    assert len(tiles.find_elements(By.CSS_SELECTOR, "g[fill-opacity] path")) == 20
    assert len(within.find_elements(By.CSS_SELECTOR, "g[fill-opacity] path")) == 8 * 16 + 24
    square = tiles.find_elements(By.CSS_SELECTOR, "g[fill-opacity] path")[0]
    left = tiles.find_element(By.CSS_SELECTOR, ".none").rect
    assert square.rect["x"] == pytest.approx(left["x"] + 4 * square.rect["width"], abs=2)
    assert square.rect["y"] == pytest.approx(left["y"] + square.rect["height"], abs=2)


def test_copy(browser, address):
    origin = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", origin)
    button = browser.find_element(By.CSS_SELECTOR, ".facts .copy")
    button.click()
    read = "navigator.clipboard.readText().then(arguments[0])"
    assert browser.execute_async_script(read) == "nvfp4-moe diff --report 'a folder'"
    wait(browser, lambda _: button.text == "Copied")
    browser.execute_script("navigator.clipboard.writeText = () => Promise.reject()")
    open_all(browser)
    button = browser.find_element(By.CSS_SELECTOR, "article details .copy")
    button.click()
    wait(browser, lambda _: button.text == "Copied")
    text = browser.execute_async_script(read)
    assert text == page_cases.quantization().cells[36].failures[0].upstream


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(browser, scheme):
    show(browser, scheme, WIDE)
    open_all(browser)
    found = browser.execute_script(CONTRAST)
    assert len(found) > 200
    assert min(found)[0] >= 4.5, min(found)


def test_light_and_dark_show_different_pages(browser):
    pictures = {}
    for scheme in ("light", "dark"):
        show(browser, scheme, WIDE)
        pictures[scheme] = base64.b64decode(browser.get_screenshot_as_base64())
        body = ground(browser.find_element(By.TAG_NAME, "body"))
        assert min(body) > 200 if scheme == "light" else max(body) < 60
    browser.execute_script("document.body.replaceChildren()")
    blank = base64.b64decode(browser.get_screenshot_as_base64())
    assert pictures["light"] != pictures["dark"]
    assert min(map(len, pictures.values())) > 5 * len(blank)  # a PNG of one colour is small


@pytest.mark.parametrize("width", [WIDE, NARROW, 320])
def test_only_tables_scroll_sideways(browser, width):
    show(browser, "light", width)
    open_all(browser)
    size = "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
    scrolled, shown = browser.execute_script(size)
    assert scrolled <= shown
    for article in browser.find_elements(By.TAG_NAME, "article"):
        assert article.rect["x"] >= 0 and article.rect["x"] + article.rect["width"] <= shown


def test_without_scripts_everything_can_be_opened(browser, address):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(address)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "js" not in browser.find_element(By.TAG_NAME, "html").get_attribute("class")
    assert not any(b.is_displayed() for b in browser.find_elements(By.CLASS_NAME, "copy"))
    for article in browser.find_elements(By.TAG_NAME, "article"):
        assert not article.is_displayed()
        article.find_element(By.XPATH, "../..").find_element(By.TAG_NAME, "summary").click()
        assert article.is_displayed()


@pytest.fixture(scope="module")
def run_with_faults(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    faulty_report.write(folder)
    return folder


def test_the_report_of_a_run_with_three_planted_faults(browser, address, run_with_faults):
    browser.get((run_with_faults / "report.html").as_uri())
    red = {
        cell.find_element(By.XPATH, "..").find_element(By.TAG_NAME, "th").text
        for cell in browser.find_elements(By.CSS_SELECTOR, "td[class]:not(.absent)")
        if cell.find_element(By.TAG_NAME, "b").text in FAILED
    }
    assert red == set(faulty_report.ROWS)
    for link in browser.find_elements(By.CSS_SELECTOR, ".failing a"):
        link.click()
        key = link.get_attribute("href").split("#")[1]
        told = browser.find_element(By.ID, key).text
        assert "nvfp4-moe replay failure-0" in told and "first at " in told
    pictures = browser.find_elements(By.TAG_NAME, "svg")
    assert any(p.is_displayed() for p in pictures)
    assert {p.name for p in run_with_faults.iterdir()} == {
        "report.html",
        "report.json",
        *(f"failure-0{i}.safetensors" for i in (1, 2, 3)),
    }
    assert browser.get_log("browser") == []
    browser.get_log("performance")
    browser.get(address)  # which the fixture expects


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_detail_uses_the_width_of_the_page(browser, width):
    """However narrow its table is; and no text in it is cut off."""
    show(browser, "light", width)
    section = Section("narrow", ["reference = triton"])
    long = " ".join(["codes 4b547d2aaeaa5c49 block scale 0x7b"] * 6)
    failure = Failure("a case", "3 codes", [long, "x" * 300])
    section.put("normal", "reference = triton", Cell("different", 9, 3, failures=[failure]))
    body = html.render(page_cases.report(section).as_dict()).split("<body>")[1]
    browser.execute_script("document.body.innerHTML = arguments[0]", body.split("</body>")[0])
    browser.find_element(By.CSS_SELECTOR, "td > button").click()
    details = browser.find_element(By.CSS_SELECTOR, ".more details[open]")
    room = browser.find_element(By.CSS_SELECTOR, "main > section").rect["width"]
    assert room - 40 < details.rect["width"] <= room
    table = browser.find_element(By.CSS_SELECTOR, "table").rect["width"]
    assert table < room * (0.5 if width == WIDE else 1.01)
    for text in details.find_elements(By.CSS_SELECTOR, "pre"):
        sizes = "return [arguments[0].scrollWidth, arguments[0].clientWidth]"
        needed, shown = browser.execute_script(sizes, text)
        assert needed <= shown
    whole = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    needed, shown = browser.execute_script(whole)
    assert needed <= shown
