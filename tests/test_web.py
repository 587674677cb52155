"""The page through the real command, in headless Chromium, and the HTTP endpoint beside it."""

import base64
import csv
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
import selenium.webdriver
import uvicorn
from fastapi import FastAPI, Request, UploadFile
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from dataset import load_manifest, select
from Modules import web
from Modules.data.images import encode_jpeg
from Modules.web import BYTES
from tests.commands import ROOT, run
from tests.Modules.data.malformed import png

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 120  # seconds for one answer, on a busy machine


@pytest.fixture(scope="module")
def uploads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def server(trained, uploads) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a running page, and its process."""
    command = [sys.executable, ROOT / "predict.py", "--serve", "--port", "0", "--checkpoint"]
    with subprocess.Popen(
        [*map(str, command), str(trained / "best_epoch.keras")],
        env=os.environ | {"TMPDIR": str(uploads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        line = process.stdout.readline()
        assert "is ready" in line, process.stderr.read()
        yield line.split()[0], psutil.Process(process.pid)
        process.terminate()
        assert process.stderr.read() == ""  # nothing is logged
    assert not list(uploads.iterdir())


@pytest.fixture(scope="module")
def lesions(trained, balanced, tmp_path_factory) -> dict[Path, dict]:
    """Pictures of the test split that the model knows such as, and what predict.py says about each."""
    folder = tmp_path_factory.mktemp("predicted")
    files = list(select(load_manifest(balanced), "test", full=True)["file"])
    run("predict.py", *files, "--checkpoint", trained / "best_epoch.keras", "--output", "rows.jsonl", cwd=folder)
    rows = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    known = {Path(row["path"]): row for row in rows if row["in_distribution"]}
    assert len(known) >= 8
    return known


# --- The endpoint -----------------------------------------------------------------------------------------------------


def ask(address: str, name: str, data: bytes) -> httpx.Response:
    return httpx.post(f"{address}/predict", files={"file": (name, data)}, timeout=PATIENCE)


def assert_alike(ours: dict, theirs: dict) -> None:
    """Equal but for the rounding of float32, which differs with the size of a batch and may swap neighbours."""
    for name in ("probability", "probability_at_prevalence"):
        assert ours[name] == pytest.approx(theirs[name], abs=2e-5)
    for name in ("prediction", "threshold", "in_distribution", "error"):
        assert ours[name] == theirs[name]
    similar = [[one["similarity"] for one in row["neighbours"]] for row in (ours, theirs)]
    assert similar[0] == pytest.approx(similar[1], abs=1e-4)


def test_the_endpoint_is_alive_and_says_what_predict_says_of_one_picture(server, lesions, trained, tmp_path):
    assert httpx.get(f"{server[0]}/healthz").json() == {"status": "ok"}
    path = next(iter(lesions))
    run("predict.py", path, "--checkpoint", trained / "best_epoch.keras", "--output", "row.jsonl", cwd=tmp_path)
    row = json.loads((tmp_path / "row.jsonl").read_text())
    answer = ask(server[0], path.name, path.read_bytes())
    assert answer.status_code == 200
    assert answer.json() == row | {"path": path.name}


def test_wrong_uploads_get_a_clear_message(server):
    for data, status, named in (
        (b"not a picture", 422, "not a picture of a known format"),
        (b"", 422, "empty file"),
        (png(20_000, 20_000, b""), 422, "20000x20000 pixels"),
        (bytes(BYTES + 1), 422, "over 20 MB"),
        (bytes(BYTES + 2**20), 413, "over 20 MB"),
    ):
        answer = ask(server[0], "upload.jpg", data)
        assert answer.status_code == status
        assert named in answer.json()["error"]
    assert httpx.post(f"{server[0]}/predict").status_code == 422


def test_an_endless_form_is_cut_off(server):
    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
        for _ in range(2 * BYTES // 2**16):
            yield bytes(2**16)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    try:
        answer = httpx.post(f"{server[0]}/predict", content=endless(), headers=headers, timeout=PATIENCE)
        assert answer.status_code >= 400
    except httpx.TransportError:
        pass  # cut off while still sending
    assert httpx.get(f"{server[0]}/healthz").status_code == 200


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A listening socket, served as the page is, without a model."""
    app = FastAPI()
    app.add_middleware(web.guarded)

    @app.post("/predict")
    def predict(file: UploadFile) -> dict:
        return {"bytes": len(file.file.read())}

    @app.post("/gradio_api/queue/join")
    async def join(request: Request) -> dict:
        return {"bytes": len(await request.body())}

    server = uvicorn.Server(web.settings(app))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener
        server.should_exit = True
        thread.join()


@pytest.fixture
def impatient(listening, monkeypatch) -> socket.socket:
    """The same, with next to no time for a client."""
    monkeypatch.setattr(web, "HEADERS_WITHIN", 0.2)
    monkeypatch.setattr(web, "BODY_WITHIN", 0.2)
    return listening


HEAD = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
FORM = b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n\r\n--x\r\n"


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + FORM, b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n" + HEAD], ids=str)
def test_a_client_that_never_ends_what_it_sends_is_hung_up_on(impatient, sent):
    with socket.create_connection(impatient.getsockname(), timeout=PATIENCE) as client:
        client.sendall(sent)
        answer = b"".join(iter(lambda: client.recv(2**16), b""))  # to the end, or this waits for PATIENCE and fails
    assert b" 200 " not in answer


def test_a_client_that_sends_a_byte_at_a_time_is_hung_up_on(impatient):
    answer = None
    with socket.create_connection(impatient.getsockname(), timeout=0.01) as client:
        for _ in range(10**3):
            try:
                client.sendall(b"a")
                answer = client.recv(1)
                break
            except TimeoutError:
                pass
            except ConnectionError:
                answer = b""
                break
    assert answer == b""


def test_only_uploads_may_be_large(listening):
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    for size, status in ((web.REST, 200), (web.REST + 1, 413)):
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        for headers in ({}, form):
            answer = httpx.post(f"{address}/gradio_api/queue/join", content=bytes(size), headers=headers)
            assert answer.status_code == status
    assert ask(address, "a", bytes(web.REST + 1)).json() == {"bytes": web.REST + 1}


def test_clients_beyond_the_limit_are_told_so(listening):
    clients = []
    try:
        for _ in range(web.CONNECTIONS):
            clients.append(socket.create_connection(listening.getsockname(), timeout=PATIENCE))
            clients[-1].sendall(HEAD + FORM)
        with socket.create_connection(listening.getsockname(), timeout=PATIENCE) as client:
            client.sendall(b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b" 503 " in client.recv(2**16)
    finally:
        for client in clients:
            client.close()


def test_what_lies_in_the_folder_too_long_is_deleted(tmp_path):
    (tmp_path / "hash").mkdir()
    (tmp_path / "hash" / "lesion.jpg").touch()
    (tmp_path / "empty").touch()
    web.sweep(tmp_path, 1000)
    assert len(list(tmp_path.rglob("*"))) == 3
    web.sweep(tmp_path, -1)
    assert [path.name for path in tmp_path.rglob("*")] == []


def test_an_upload_that_is_broken_off_leaves_nothing(server, uploads):
    address = urlsplit(server[0])
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n"
    kind = b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n' + bytes(10**5)
    end = time.monotonic() + PATIENCE

    def there() -> bool:
        assert time.monotonic() < end
        with suppress(FileNotFoundError):  # it may go while we look
            return any(path.stat().st_size == 10**5 for path in uploads.rglob("tmp*") if path.is_file())
        return False

    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(head + kind + part)
        while not there():
            pass
    while there():
        pass


def test_a_foreign_host_name_is_refused_and_every_answer_has_the_policy(server):
    assert httpx.get(f"{server[0]}/", headers={"Host": "evil.example"}).status_code == 400
    for path in ("/", "/healthz", "/gradio_api/info", "/nothing"):
        headers = httpx.get(f"{server[0]}{path}").headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "http" not in headers["content-security-policy"]


def test_200_requests_of_8_clients_are_all_answered_as_predict_does_and_memory_does_not_grow(server, lesions):
    address, process = server
    asked = (list(lesions) * 200)[:240]

    def get(path: Path) -> dict:
        answer = ask(address, path.name, path.read_bytes())
        assert answer.status_code == 200
        return answer.json()

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(get, asked[:40]))
        before = process.memory_info().rss
        answers = list(clients.map(get, asked[40:]))
        after = process.memory_info().rss
    for path, answer in zip(asked[40:], answers, strict=True):
        assert_alike(answer, lesions[path])
    assert after - before < 20 * 2**20


# --- The page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[selenium.webdriver.Chrome]:
    if not (BROWSER and DRIVER):
        pytest.skip("no chromium with its chromedriver: apt-get install chromium chromium-driver")
    home = tmp_path_factory.mktemp("browser")
    options = selenium.webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={home / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(home)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = selenium.webdriver.Chrome(options, selenium.webdriver.ChromeService(DRIVER))
    driver.home = home
    yield driver
    driver.quit()


def wait(browser, condition):
    return WebDriverWait(browser, PATIENCE).until(lambda _: condition())


def opened(browser, server, width: int = 1280):
    browser.set_window_size(width, 900)
    browser.get(server[0])
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#pictures input[type=file]"))


def cards(browser) -> list:
    return browser.find_elements(By.CSS_SELECTOR, "#result .card")


def upload(browser, *files: Path) -> list:
    """Drop files on the page; the cards of their answers."""
    field = browser.find_element(By.CSS_SELECTOR, "#pictures input[type=file]")
    field.send_keys("\n".join(map(str, files)))
    names = [file.name for file in files]
    wait(browser, lambda: [card.get_attribute("data-name") for card in cards(browser)] == names)
    return cards(browser)


def test_a_picture_dropped_on_the_page_is_answered_as_predict_does(server, browser, lesions, uploads):
    opened(browser, server)
    chosen = list(lesions)[:2]
    for card, path in zip(upload(browser, *chosen), chosen, strict=True):
        row = ask(server[0], path.name, path.read_bytes()).json()
        assert_alike(row, lesions[path])
        assert card.find_element(By.CSS_SELECTOR, ".probability").text == f"{100 * row['probability']:.1f} %"
        assert card.find_element(By.CSS_SELECTOR, ".prediction").text == row["prediction"]
        shown = card.find_elements(By.CSS_SELECTOR, ".neighbours li")
        assert [one.get_attribute("class") for one in shown] == [one["label"] for one in row["neighbours"]]
        for image in card.find_elements(By.CSS_SELECTOR, ".pair img, .neighbours > li > img"):
            assert int(image.get_attribute("naturalWidth")) > 0
        shown[0].find_element(By.TAG_NAME, "summary").click()
        assert shown[0].find_element(By.CSS_SELECTOR, "details img").is_displayed()
    assert "no medical device" in browser.find_element(By.ID, "notice").text
    assert not [file for file in uploads.rglob("*") if file.suffix == ".jpg"]  # deleted once answered

    link = browser.find_element(By.CSS_SELECTOR, "#result a.download")
    link.click()
    file = browser.home / "predictions.csv"
    wait(browser, file.exists)
    table = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [row["path"] for row in table] == [path.name for path in chosen]
    for row, path in zip(table, chosen, strict=True):
        assert float(row["probability"]) == pytest.approx(lesions[path]["probability"], abs=2e-5)
    assert base64.b64decode(link.get_attribute("href").split(",")[1]).decode() == file.read_text()


def test_files_that_cannot_be_used_get_a_clear_message(server, browser, lesions, tmp_path):
    opened(browser, server)
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "huge.png").write_bytes(png(20_000, 20_000, b""))
    text, huge, good = upload(browser, tmp_path / "text.jpg", tmp_path / "huge.png", next(iter(lesions)))
    assert "not a picture of a known format" in text.text
    assert "20000x20000 pixels" in huge.text
    assert good.find_elements(By.CSS_SELECTOR, ".probability")
    (tmp_path / "large.png").write_bytes(bytes(BYTES + 1))
    browser.find_element(By.CSS_SELECTOR, "#pictures input[type=file]").send_keys(str(tmp_path / "large.png"))
    wait(browser, lambda: "size" in browser.find_element(By.CSS_SELECTOR, ".toast-wrap").text.lower())


def test_a_picture_that_is_no_lesion_gets_no_probability(server, browser, tmp_path):
    opened(browser, server)
    squares = np.repeat(((np.indices((64, 64)) // 8).sum(axis=0) % 2 * 255)[..., None], 3, axis=2)
    (tmp_path / "squares.jpg").write_bytes(encode_jpeg(squares.astype(np.uint8)))
    (card,) = upload(browser, tmp_path / "squares.jpg")
    assert not card.find_elements(By.CSS_SELECTOR, ".probability, .neighbours")
    assert "Unlike known lesions" in card.text


def test_it_works_by_keyboard_and_at_the_width_of_a_phone(server, browser, tmp_path):
    opened(browser, server, width=500)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        for _ in range(12):
            browser.switch_to.active_element.send_keys(Keys.TAB)
            if "malignant" in browser.switch_to.active_element.text:
                break
        browser.switch_to.active_element.send_keys(Keys.ENTER)
        wait(browser, lambda: len(cards(browser)) == 1)
        assert "Drawn example" in cards(browser)[0].text
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        browser.save_screenshot(str(tmp_path / "phone.png"))
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_request_leaves_for_another_host(server, browser, lesions):
    opened(browser, server)
    upload(browser, next(iter(lesions)))
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    hosts = {urlsplit(url).netloc for url in asked if url.startswith(("http", "ws"))}
    assert hosts == {urlsplit(server[0]).netloc}
    refused = [entry["message"] for entry in browser.get_log("browser") if "Content Security" in entry["message"]]
    assert refused == []  # it does not even try
