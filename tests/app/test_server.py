"""The running app by HTTP: jobs, errors, and what it refuses to serve."""

import json
import re
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

from support import PROJECT

pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.slow


def get(address, **headers):
    """Return status and body."""
    try:
        with urlopen(Request(address, headers=headers)) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


@pytest.fixture(scope="module")
def client(app, tmp_path_factory):
    client = gradio_client.Client(app.url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))
    yield client
    client.close()


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_drawing(client):
    gallery, picture, *_, status = client.predict("class 1", "3-4", 2, 1.0, 8, 1.0, api_name="/draw")
    assert "2 images in" in status
    assert "3 + 5 network evaluations each" in status
    assert [image["caption"] for image in gallery] == ["seed 3 · class 1", "seed 4 · class 1"]
    assert pixels(gallery[0]["image"]).shape == (16, 16, 3)
    assert pixels(picture).shape == (258, 258, 3)


def test_enlarging_an_upload(client, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 20, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "small.png")
    (before, after), status = client.predict(
        gradio_client.handle_file(tmp_path / "small.png"), "tiny", 0, api_name="/enlarge"
    )
    assert "40x18 in" in status
    assert pixels(before).shape == pixels(after).shape == (18, 40, 3)


def test_comparing(client):
    first, second, status = client.predict("all in turn", "0", 3, 3, 1.0, 1.0, api_name="/compare")
    assert len(first) == len(second) == 1
    assert "3 + 3 network evaluations each. Multistep: " in status


@pytest.mark.parametrize("seeds", ["<b>x</b>", "5-1", "0-99"])
def test_errors_are_one_line_without_markup(client, seeds):
    *_, status = client.predict("all in turn", seeds, 2, 1.0, 8, 1.0, api_name="/draw")
    assert re.fullmatch(r'<p role="alert">seeds[=:] ?[^\n]+</p>', status)
    assert "<b>" not in status


def test_a_damaged_and_a_large_upload(client, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    Image.new("RGB", (600, 500)).save(tmp_path / "large.png")
    for name, message in (("broken.png", "image is not a PNG, WebP or JPEG image"), ("large.png", "at most 1;")):
        *_, status = client.predict(gradio_client.handle_file(tmp_path / name), "tiny", 0, api_name="/enlarge")
        assert 'role="alert"' in status
        assert message in status


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "//etc/passwd", "../../../etc/passwd", "README.md", PROJECT / "README.md", Path.home(),
     "https://example.com/x.png", "http://127.0.0.1:1/x.png", "file:///etc/passwd", "%2Fetc%2Fpasswd"],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["gradio_api/file=", "file="])
def test_files_elsewhere_are_refused(app, prefix, path):
    status, body = get(f"{app.url}{prefix}{path}")
    assert status in (403, 404)
    assert b"root:" not in body
    assert b"relay-diffusion" not in body


def test_jobs_cannot_name_files_elsewhere(app, tmp_path):
    """The enlarging job refuses files that were not uploaded, and reads none of them."""
    Image.new("RGB", (8, 8)).save(tmp_path / "own.png")
    given = {"path": str(tmp_path / "own.png"), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [given, "tiny", 0]}).encode()
    request = Request(f"{app.url}gradio_api/call/enlarge", body, {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    _, events = get(f"{app.url}gradio_api/call/enlarge/{event}")
    assert b"event: error" in events
    assert b"16x16" not in events


def test_results_are_served_from_the_temporary_folder(app, client):
    client.predict("all in turn", "0", 2, 1.0, 8, 1.0, api_name="/draw")
    files = [path for path in app.folder.rglob("*") if path.is_file()]
    assert files
    assert get(f"{app.url}gradio_api/file={files[0]}")[0] == 200


def test_the_page_needs_no_other_host(app):
    status, page = get(app.url)
    assert status == 200
    loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)="([^"]*)"', page.decode())
    assert loaded
    assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []
    config = json.loads(get(f"{app.url}config")[1])
    assert config["analytics_enabled"] is False
    assert not config.get("run_history")
    theme = get(f"{app.url}theme.css")[1].decode()
    assert "system-ui" in theme
    assert re.findall(r"url\(['\"]?(https?:[^)]*)\)|@import", theme) == []


def test_other_sites_cannot_use_the_app(app):
    _, _ = get(f"{app.url}config", Origin="https://example.com")
    request = Request(f"{app.url}config", headers={"Origin": "https://example.com", "Host": "localhost"})
    with urlopen(request) as answer:
        assert answer.headers.get("Access-Control-Allow-Origin") != "https://example.com"


def test_only_loopback_listens(app):
    port = int(app.url.rstrip("/").rpartition(":")[2])
    listening = Path("/proc/net/tcp")
    if not listening.exists():
        pytest.skip("needs /proc/net/tcp")
    rows = [line.split() for line in listening.read_text().splitlines()[1:]]
    addresses = {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    assert addresses == {"0100007F"}
