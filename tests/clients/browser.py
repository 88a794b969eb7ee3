"""The page in a headless Chromium. Run: python browser.py URL [FOLDER for screenshots]"""

import pathlib
import sys
import time

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

url = sys.argv[1]
shots = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else None

options = webdriver.ChromeOptions()
for flag in [
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--window-size=1280,900",
]:
    options.add_argument(flag)
options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
wait = WebDriverWait(driver, 30)


def shot(name):
    if shots:
        shots.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(shots / f"{name}.png"))


def by_id(name):
    return driver.find_element(By.ID, name)


def field(name, value):
    element = driver.find_element(By.NAME, name)
    element.clear()
    element.send_keys(value)


def status():
    return by_id("status").text


def texts():
    return [p.text for p in driver.find_elements(By.CSS_SELECTOR, "article p")]


def finished():
    wait.until(lambda d: "seed" in status() and not by_id("stop").is_enabled())


try:
    driver.get(url)
    assert driver.switch_to.active_element == by_id("prompt"), "typing begins at once"
    shot("empty")

    # by keyboard alone
    driver.switch_to.active_element.send_keys("two cats in the rain")
    driver.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    finished()
    first = texts()
    assert len(first) == 4 and len(set(first)) > 1, first
    assert all("cats" in t for t in first), first
    assert "tokens/s" in status()
    marked = {
        m.get_attribute("class") for m in driver.find_elements(By.CSS_SELECTOR, "article mark")
    }
    assert marked == {"kept", "added"}, marked
    shot("rewritten")

    # settings reach the server, and a seed repeats its candidates
    driver.find_element(By.CSS_SELECTOR, "#settings summary").click()
    seed = status().split("seed ")[1]
    field("seed", seed)
    by_id("go").click()
    wait.until(lambda d: "seed" in status())
    finished()
    assert texts() == first, "the same seed, the same candidates"
    field("n", "2")
    field("keep", "red umbrella")
    field("ban", "artstation, octane render")
    field("min_kept", "1")
    field("max_clip_tokens", "40")
    by_id("go").click()
    finished()
    assert len(texts()) == 2 and all("red umbrella" in t for t in texts()), texts()
    assert not any("artstation" in t.lower() for t in texts()), texts()
    shot("guarded")

    # copying
    driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    driver.find_element(By.CSS_SELECTOR, "article button").click()
    wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "article button").text == "Copied")
    copied = driver.execute_async_script(
        "const done = arguments[0]; navigator.clipboard.readText().then(done, e => done(String(e)))"
    )
    assert copied == texts()[0], copied

    # mistakes are told in words
    field("keep", "artstation")
    by_id("go").click()
    wait.until(lambda d: "banned" in status())
    assert by_id("status").get_attribute("class") == "bad"

    # history outlives the page, and brings its settings back
    driver.get(url)
    driver.find_element(By.CSS_SELECTOR, "#past summary").click()
    entries = driver.find_elements(By.CSS_SELECTOR, "#history li")
    assert len(entries) == 3, len(entries)
    entries[-1].find_element(By.TAG_NAME, "button").click()
    finished()
    assert texts() == first, "the oldest entry's settings"

    # stopping
    driver.execute_script(
        "document.getElementsByName('max_tokens')[0].value = 400;"
        "document.getElementsByName('n')[0].value = 16"
    )
    driver.execute_script(
        "document.getElementById('form').requestSubmit();"
        "setTimeout(() => document.getElementById('stop').click(), 30)"
    )
    wait.until(lambda d: status() == "Stopped." or "seed" in status())

    # on a phone nothing is cut off
    driver.set_window_size(390, 844)
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True},
    )
    driver.get(url)
    by_id("prompt").send_keys("a castle on a hill")
    by_id("go").click()
    finished()
    width = driver.execute_script(
        "return [document.documentElement.scrollWidth, window.innerWidth]"
    )
    assert width[0] <= width[1], width
    shot("phone")

    # nothing comes from elsewhere, and nothing failed
    sources = driver.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert all(s.startswith(url) for s in sources), sources
    severe = [
        e for e in driver.get_log("browser") if e["level"] == "SEVERE" and "400" not in e["message"]
    ]
    assert not severe, severe
    print("page: ok")
finally:
    driver.quit()
