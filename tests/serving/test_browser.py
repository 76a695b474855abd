"""The page in a real browser."""

import shutil
import time

import pytest
from axe_core_python.selenium import Axe
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from anysplade import Document, Index
from servers import running
from tiny import WORDS, make_backbone, make_collection

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs Chromium and its driver, of Debian's packages"
)
HOSTILE = "<script>document.title='taken'</script> kabel <img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    make_backbone("bert", place / "model")
    make_collection(place / "collection")
    with Index.build(place / "model", place / "collection", place / "index", top_k=12) as index:  # the tables stay short
        index.add({"hostile": Document("<b>bold</b>", HOSTILE), "long": Document("", "kabel" * 500 + " " + "kabel " * 200)})
    return place / "index"


@pytest.fixture(scope="module")
def address(folder):
    with running(folder, "bm25") as address:
        yield address


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1000,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, address):
    show(driver, address)
    yield driver
    assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def show(browser, url):
    browser.get("about:blank")
    browser.get(url)
    wait(browser, lambda: browser.execute_script("return document.readyState") == "complete")


def wait(browser, what):
    return WebDriverWait(browser, 20).until(lambda _: what())


def hits(browser):
    return browser.find_elements(By.CSS_SELECTOR, "ol.hits > li")


def test_hits_come_as_one_types_and_the_address_follows(browser, address):
    field = browser.find_element(By.CSS_SELECTOR, "input[type=search]")
    assert browser.switch_to.active_element == field
    field.send_keys("kabel locor")
    wait(browser, lambda: len(hits(browser)) == 10)
    wait(browser, lambda: browser.current_url.endswith("/?q=kabel+locor"))
    shown = [hit.text for hit in hits(browser)]
    show(browser, f"{address}/?q=kabel+locor")  # the permalink
    assert [hit.text for hit in hits(browser)] == shown
    field = browser.find_element(By.CSS_SELECTOR, "input[type=search]")
    field.send_keys(Keys.BACKSPACE * 20)
    wait(browser, lambda: not hits(browser))
    assert "Type a query" in browser.find_element(By.ID, "results").text


def test_the_keyboard_alone(browser, address):
    show(browser, f"{address}/?q=kabel")
    browser.find_element(By.TAG_NAME, "body").click()
    browser.switch_to.active_element.send_keys("/")
    field = browser.find_element(By.CSS_SELECTOR, "input[type=search]")
    assert browser.switch_to.active_element == field
    assert field.get_attribute("value") == "kabel"
    field.send_keys(Keys.ARROW_DOWN)
    first = browser.switch_to.active_element
    assert first.text.startswith("why:")
    first.send_keys(Keys.ENTER)
    wait(browser, lambda: hits(browser)[0].find_element(By.TAG_NAME, "table").is_displayed())
    cells = hits(browser)[0].find_elements(By.CSS_SELECTOR, "tbody tr td:nth-child(4)")
    score = float(hits(browser)[0].find_element(By.CLASS_NAME, "score").text.rpartition("score ")[2])
    assert sum(float(cell.text) for cell in cells) == pytest.approx(score, abs=0.01 * len(cells) + 0.01)
    first.send_keys(Keys.ARROW_DOWN)
    assert browser.switch_to.active_element != first
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert browser.switch_to.active_element == field


def test_a_document_that_is_a_script_is_only_text(browser, address):
    show(browser, f"{address}/?q=kabel&k=50")
    text = browser.find_element(By.ID, "results").text
    assert "<script>document.title" in text
    assert "<b>bold</b>" in text
    assert browser.title.startswith("kabel")
    assert not browser.find_elements(By.CSS_SELECTOR, "main script, main b, ol.hits img")


def test_side_by_side_with_bm25(browser, address):
    show(browser, f"{address}/compare?q=kabel")
    sides = browser.find_elements(By.CSS_SELECTOR, ".sides section")
    assert [side.find_element(By.TAG_NAME, "h2").text for side in sides] == ["index", "bm25"]
    assert all(side.find_elements(By.CSS_SELECTOR, "ol.hits > li") for side in sides)


def test_the_inspector(browser, address):
    show(browser, f"{address}/terms")
    browser.find_element(By.TAG_NAME, "textarea").send_keys("kabel locor")
    browser.find_element(By.TAG_NAME, "button").click()
    rows = wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "tbody tr"))
    weights = [float(row.find_elements(By.TAG_NAME, "td")[1].text) for row in rows]
    assert weights == sorted(weights, reverse=True)
    kinds = {row.find_elements(By.TAG_NAME, "td")[3].text for row in rows}
    assert kinds == {"added", "text"}


def test_head_and_cost(browser, address):
    show(browser, f"{address}/head")
    picture = browser.find_element(By.TAG_NAME, "img")
    assert wait(browser, lambda: browser.execute_script("return arguments[0].naturalWidth", picture)) > 0
    show(browser, f"{address}/cost")
    assert "active dims per document" in browser.find_element(By.TAG_NAME, "main").text


VIEWS = ("/", "/?q=kabel", "/compare?q=kabel", "/terms?text=kabel", "/head", "/cost")


@pytest.mark.parametrize("view", VIEWS)
def test_narrow_screens_and_accessibility(browser, address, view):
    browser.set_window_size(500, 900)  # headless Chromium has no narrower window; the frame inside is what counts
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        show(browser, address + view)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        for scheme in ("light", "dark"):
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
            violations = Axe().run(browser)["violations"]
            assert [(f["id"], f["nodes"][0]["html"]) for f in violations if f["impact"] in ("serious", "critical")] == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        browser.set_window_size(1000, 900)


def test_an_index_that_is_being_rebuilt(driver, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "index")
    with running(tmp_path / "index") as address:
        show(driver, f"{address}/?q=kabel&k=50")
        before = len(hits(driver))
        (tmp_path / "index").rename(tmp_path / "old")
        show(driver, f"{address}/?q=kabel&k=50")
        assert len(hits(driver)) == before > 1
        Index.build(folder.parent / "model", {"new": Document("", "kabel")}, tmp_path / "index").close()
        show(driver, f"{address}/?q=kabel&k=50")
        assert [hit.find_element(By.TAG_NAME, "h2").text.split()[1] for hit in hits(driver)] == ["new"]
        assert "1 documents" in driver.find_element(By.TAG_NAME, "header").text
    driver.get_log("browser")


def test_when_the_server_is_gone_the_page_says_so(driver, folder):
    with running(folder) as address:
        show(driver, address)
        assert driver.find_element(By.ID, "results").text.startswith("Type a query")
    driver.find_element(By.CSS_SELECTOR, "input[type=search]").send_keys(WORDS[0])
    errors = wait(driver, lambda: driver.find_elements(By.CLASS_NAME, "error"))
    assert "does not respond" in errors[0].text
    assert driver.find_element(By.CSS_SELECTOR, "input[type=search]").get_attribute("value") == WORDS[0]
    time.sleep(0.1)
    driver.get_log("browser")  # the refused connection
