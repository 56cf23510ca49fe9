"""Every download here goes over a real connection to a small server on this machine."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request

import pytest
from file_server import Site

import finestsam
from finestsam.errors import UserError
from finestsam.runtime import download as download_module
from finestsam.runtime.download import download, download_all, hash_file

CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download_module, "PAUSES_SECONDS", (0.01, 0.01))
    with Site(CONTENT) as site:
        yield site


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "weights.pth"


def part_of(target):
    return target.with_name(".weights.pth.part")


def fetch_half(site, target):
    """Leave half of the file behind, as an interrupted run does."""
    site.cuts = [HALF] + [0] * len(download_module.PAUSES_SECONDS)
    with pytest.raises(UserError, match="the connection ended after 512,000 of 1,024,000 bytes, try again to continue"):
        download(site.url, target, SHA256, len(CONTENT))
    assert part_of(target).stat().st_size == HALF and not target.exists()
    site.requests.clear()


def start_process(site, target):
    code = "import sys; from pathlib import Path; from finestsam.runtime.download import download\n"
    code += "download(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))"
    command = [sys.executable, "-c", code, site.url, str(target), SHA256, str(len(CONTENT))]
    environment = os.environ | {"PYTHONPATH": str(Path(finestsam.__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(is_true):
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_download_arrives_whole_and_leaves_no_part_behind(site, target, capfd):
    assert download(site.url, target, SHA256, len(CONTENT)) == target

    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.glob(".*part*")] == []
    assert capfd.readouterr().err == ""  # not a terminal: no progress bar


def test_a_file_that_is_there_is_not_fetched(site, target):
    target.parent.mkdir()
    target.write_bytes(b"mine")

    assert download(site.url, target, SHA256, len(CONTENT)).read_bytes() == b"mine"
    assert site.requests == []


@pytest.mark.parametrize("sha256, size_bytes", [(SHA256, len(CONTENT)), (None, None)])
def test_a_dropped_connection_is_continued_where_it_stopped(site, target, sha256, size_bytes):
    site.cuts = [HALF]

    download(site.url, target, sha256, size_bytes)

    assert target.read_bytes() == CONTENT
    assert [request.get("Range") for request in site.requests] == [None, f"bytes={HALF}-"]
    assert site.requests[1]["If-Range"] == '"first"'


def test_an_interrupted_run_is_continued_by_the_next(site, target):
    fetch_half(site, target)

    download(site.url, target, SHA256, len(CONTENT))

    assert target.read_bytes() == CONTENT
    assert [request["Range"] for request in site.requests] == [f"bytes={HALF}-"]


def test_a_silent_connection_is_given_up_and_continued(site, target, monkeypatch):
    monkeypatch.setattr(download_module, "TIMEOUT_SECONDS", 0.3)
    site.cuts, site.hangs = [HALF], True

    download(site.url, target, SHA256, len(CONTENT))

    assert target.read_bytes() == CONTENT
    assert [request.get("Range") for request in site.requests] == [None, f"bytes={HALF}-"]


def test_a_slow_connection_is_waited_for(site, target):
    site.pause_seconds = 0.3

    assert download(site.url, target, SHA256, len(CONTENT)).read_bytes() == CONTENT
    assert len(site.requests) == 1


def test_a_server_without_ranges_is_requested_the_whole_again(site, target):
    site.cuts, site.has_ranges = [HALF], False

    assert download(site.url, target, SHA256, len(CONTENT)).read_bytes() == CONTENT
    assert len(site.requests) == 2


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_a_file_that_cannot_be_distinguished_from_its_next_version_is_not_continued(site, target, headers):
    site.cuts, site.headers = [HALF], headers

    assert download(site.url, target, SHA256, len(CONTENT)).read_bytes() == CONTENT
    assert "Range" not in site.requests[1]


def test_a_date_serves_where_there_is_no_tag(site, target):
    site.cuts, site.headers = [HALF], {"Last-Modified": "Wed, 05 Apr 2023 10:00:00 GMT"}

    assert download(site.url, target, SHA256, len(CONTENT)).read_bytes() == CONTENT
    assert site.requests[1]["If-Range"] == "Wed, 05 Apr 2023 10:00:00 GMT"


def test_a_file_that_changed_between_two_tries_is_not_mixed(site, target):
    fetch_half(site, target)
    site.content, site.headers = CONTENT[::-1], {"ETag": '"second"'}

    assert download(site.url, target, None, None).read_bytes() == CONTENT[::-1]


def test_a_whole_part_is_used_without_asking_again(site, target):
    fetch_half(site, target)
    part_of(target).write_bytes(CONTENT)

    assert download(site.url, target, SHA256, len(CONTENT)).read_bytes() == CONTENT
    assert site.requests == []


def test_a_part_that_is_too_long_is_thrown_away(site, target):
    fetch_half(site, target)
    part_of(target).write_bytes(CONTENT + b"more")

    assert download(site.url, target, SHA256, len(CONTENT)).read_bytes() == CONTENT


def test_a_wrong_hash_is_reported_with_both_hashes_and_the_file_removed(site, target):
    site.content = CONTENT[::-1]
    wrong = hashlib.sha256(site.content).hexdigest()

    with pytest.raises(
        UserError, match=f"its sha256 is {wrong}, expected {SHA256}; the download was removed, try again"
    ):
        download(site.url, target, SHA256, len(CONTENT))
    assert not target.exists() and not part_of(target).exists()

    site.content = CONTENT
    assert download(site.url, target, SHA256, len(CONTENT)).read_bytes() == CONTENT


def test_a_wrong_size_is_reported_before_anything_is_fetched(site, target):
    with pytest.raises(UserError, match="the server offers 1,024,000 bytes, expected 99"):
        download(site.url, target, SHA256, 99)
    assert not target.exists() and not part_of(target).exists()


def test_a_wrong_size_is_reported_even_if_the_server_never_says_it(site, target):
    site.headers = {"Content-Length": ""}

    with pytest.raises(UserError, match=r"[\d,]+ bytes, expected 99; the download was removed"):
        download(site.url, target, None, 99)
    assert not target.exists()


def test_an_empty_file_is_no_file(site, target):
    site.content = b""

    with pytest.raises(UserError, match="received an empty file; the download was removed, try again"):
        download(site.url, target, None, None)
    assert not target.exists() and not part_of(target).exists()


def test_a_server_that_is_busy_for_a_moment_is_requested_again(site, target):
    site.failures = [503, 429]

    assert download(site.url, target, SHA256, len(CONTENT)).read_bytes() == CONTENT


def test_a_file_that_the_server_lacks_is_reported_at_once(site, target):
    site.failures = [404, 404]

    with pytest.raises(UserError, match="cannot download http://127.0.0.1:.*: HTTP Error 404"):
        download(site.url, target, SHA256, len(CONTENT))
    assert len(site.requests) == 1


def test_offline_shows_how_to_fetch_the_file_by_hand_in_one_line(target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/weights.pth"
        with pytest.raises(UserError) as caught:
            download(url, target, SHA256, len(CONTENT))

    assert f"cannot download {url}: " in str(caught.value)
    assert f"to fetch it by hand, save it as {target} (sha256 {SHA256})" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_reported(site, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match=r"cannot download .*file"):
        download(site.url, tmp_path / "file" / "weights.pth", SHA256, len(CONTENT))


@pytest.mark.parametrize("url", ["http://example.org/w.pth", "ftp://127.0.0.1/w.pth", "file:///etc/hosts", "w.pth"])
def test_only_https_is_downloaded(url, target):
    with pytest.raises(UserError, match="only https addresses are downloaded"):
        download(url, target, None, None)


@pytest.mark.parametrize(
    "elsewhere, message",
    [
        ("http://example.org/w.pth", "redirected to http://example.org/w.pth, which is not https, refused"),
        ("ftp://127.0.0.1/w.pth", "redirected to ftp://127.0.0.1/w.pth, which is not https, refused"),
        ("file:///etc/hosts", "Redirection to url 'file:///etc/hosts' is not allowed"),
    ],
)
def test_a_redirect_that_leaves_https_is_refused(site, target, elsewhere, message):
    site.redirect_to = elsewhere

    with pytest.raises(UserError, match=message):
        download(site.url, target, None, None)


def test_a_redirect_from_https_to_http_is_refused_even_on_this_machine():
    request = Request("https://127.0.0.1/w.pth")

    with pytest.raises(UserError, match="redirected to http://127.0.0.1/w.pth, which is not https, refused"):
        download_module._Redirects().redirect_request(request, None, 302, "Found", {}, "http://127.0.0.1/w.pth")


def test_a_redirect_on_this_machine_is_followed(site, target):
    with Site(CONTENT) as other:
        other.redirect_to = site.url

        assert download(other.url, target, SHA256, len(CONTENT)).read_bytes() == CONTENT


def test_two_processes_download_once(site, target):
    site.pause_seconds = 1.5  # the second process starts meanwhile, and says after a second that it waits
    processes = [start_process(site, target) for _ in range(2)]

    errors = [process.communicate(timeout=300)[1] for process in processes]

    assert [process.returncode for process in processes] == [0, 0]
    assert len(site.requests) == 1
    assert target.read_bytes() == CONTENT
    assert "".join(errors) in ("", f"waiting for another process that downloads {target}\n")


def test_the_lock_and_the_part_of_a_killed_process_are_taken_over(site, target):
    site.cuts, site.hangs = [HALF], True
    process = start_process(site, target)
    wait_for(lambda: part_of(target).exists() and part_of(target).stat().st_size == HALF)
    process.kill()
    process.communicate()

    assert download(site.url, target, SHA256, len(CONTENT)).read_bytes() == CONTENT
    assert site.requests[-1]["Range"] == f"bytes={HALF}-"


def list_small_files(site, folder, count=30):
    site.files = {f"/{number}.jpg": bytes([number]) * (number + 1) for number in range(count)}
    return {folder / path[1:]: f"{site.address}{path}" for path in site.files}


def test_many_small_files_arrive_each_in_its_place(site, tmp_path):
    urls = list_small_files(site, tmp_path)
    site.cuts, site.failures = [0], [503]

    download_all(urls, "images")

    assert {f"/{path.name}": path.read_bytes() for path in tmp_path.iterdir()} == site.files


def test_one_of_many_files_that_the_server_lacks_is_reported_and_the_others_not_requested(site, tmp_path):
    urls = list_small_files(site, tmp_path, count=200)
    del site.files["/3.jpg"]
    site.pause_seconds = 0.02

    with pytest.raises(UserError, match="cannot download http.*/3.jpg: HTTP Error 404: Not Found; to fetch it by hand"):
        download_all(urls, "images")
    assert len(site.requests) < 100


def test_many_files_offline_are_reported_once(tmp_path):
    with Site(CONTENT) as site:
        urls = list_small_files(site, tmp_path)

    with pytest.raises(UserError, match="cannot download http://127.0.0.1:.*/0.jpg: "):
        download_all(urls, "images")
    assert list(tmp_path.iterdir()) == []


def test_the_hash_of_a_file_is_sha256(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert hash_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("shift", [-1000, 1, 1000])
def test_other_bytes_than_those_requested_leave_no_hole(site, target, shift, monkeypatch):
    site.cuts = [HALF]
    find_start = Site._find_start
    monkeypatch.setattr(Site, "_find_start", lambda *given: (found := find_start(*given)) and found + shift)

    download(site.url, target, None, len(CONTENT))

    assert target.read_bytes() == CONTENT
    assert [request.get("Range") for request in site.requests] == [None, f"bytes={HALF}-", None]


def test_the_rest_of_another_version_is_not_added(site, target, monkeypatch):
    site.cuts = [HALF]
    respond = Site.respond

    def change(site, handler):
        if "Range" in handler.headers:
            site.content, site.headers = CONTENT[::-1], {"ETag": '"second"'}
            handler.headers.replace_header("If-Range", '"second"')
        respond(site, handler)

    monkeypatch.setattr(Site, "respond", change)

    download(site.url, target, None, len(CONTENT))

    assert target.read_bytes() == CONTENT[::-1]


def test_a_server_that_always_sends_other_bytes_is_an_error(site, target, monkeypatch):
    site.cuts = [HALF]
    monkeypatch.setattr(Site, "_find_start", lambda *_: 7)

    with pytest.raises(UserError, match=r"the server sent other bytes than requested \(from byte 0 on\)"):
        download(site.url, target, SHA256, len(CONTENT))

    assert not target.exists()


@pytest.mark.parametrize("length", ["²", "-5", "1e6", "0x10", " ", "", "9" * 5000])
def test_a_length_that_is_no_number_is_one_that_is_not_reported(site, target, length):
    site.headers = {"ETag": '"first"', "Content-Length": length}

    download(site.url, target, SHA256, len(CONTENT))

    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("length", [None, str(10**15)])
def test_a_file_without_end_is_given_up(site, tmp_path, monkeypatch, length):
    monkeypatch.setattr(download_module, "MAX_BYTES", 500_000)
    site.headers = {"Content-Length": length or "?"}

    with pytest.raises(UserError, match="more than 500,000 bytes, too large for this file; not downloaded"):
        download_all({tmp_path / "a.jpg": site.url}, "images")

    assert not (tmp_path / "a.jpg").exists()
