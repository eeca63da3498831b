"""Downloads from a local server: complete, resumed, interrupted, changed, refused. No network is used."""

import hashlib
import importlib
import io
import stat
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from gflowtrl.data import PUBLIC_DATA, download, download_file, extract_zip, prepare


downloads = importlib.import_module("gflowtrl.data.formats.downloads")
CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site:
    """Settings of the server: `files`, support of ranges, and interrupted answers."""

    def __init__(self):
        self.files = {"/x.bin": CONTENT}
        self.ranges = True
        self.break_after = None  # number of bytes after which the connection is closed
        self.breaks = 0  # number of answers that break off
        self.status = 200
        self.etag = '"1"'
        self.requests = []  # the Range header of each request


@pytest.fixture
def site(monkeypatch):
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            site.requests.append(wanted)
            content = site.files.get(self.path)
            if content is None or site.status != 200:
                return self.send_error(404 if content is None else site.status)
            start, status = 0, 200
            if wanted and site.ranges and self.headers.get("If-Range", site.etag) == site.etag:
                start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", site.etag)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            stop = len(content)
            if site.breaks:
                site.breaks -= 1
                stop = start + site.break_after
            self.wfile.write(content[start:stop])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.0)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_downloaded_once_and_checked_every_time(site, tmp_path):
    path = download_file(f"{site.url}/x.bin", tmp_path / "new", sha256=SHA256.upper())
    assert path.read_bytes() == CONTENT and names(path.parent) == ["x.bin", "x.bin.sha256"]
    assert (tmp_path / "new" / "x.bin.sha256").read_text() == f"{SHA256}  x.bin\n"
    assert download_file(f"{site.url}/x.bin", path.parent) == path and len(site.requests) == 1
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"x\.bin has the sha256 .* but .* was expected .*Delete it"):
        download_file(f"{site.url}/x.bin", path.parent)
    assert len(site.requests) == 1


def test_a_file_with_a_wrong_checksum_is_not_kept(site, tmp_path):
    with pytest.raises(ValueError, match=r"x\.bin\.part has the md5 .* but 00 was expected for http.*It was removed"):
        download_file(f"{site.url}/x.bin", tmp_path, md5="00")
    assert not {"x.bin", "x.bin.part", "x.bin.sha256"} & set(names(tmp_path))
    assert download_file(f"{site.url}/x.bin", tmp_path, md5=hashlib.md5(CONTENT).hexdigest())


def test_a_broken_connection_is_resumed(site, tmp_path):
    site.break_after, site.breaks = 300_000, 2
    path = download_file(f"{site.url}/x.bin", tmp_path, sha256=SHA256)
    assert path.read_bytes() == CONTENT and site.requests == [None, "bytes=300000-", "bytes=600000-"]


def test_a_later_call_resumes(site, tmp_path):
    site.break_after, site.breaks = 0, 100
    (tmp_path / "x.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(ConnectionError, match="broke off, 5 times in a row, at byte 1,000. Call again"):
        download_file(f"{site.url}/x.bin", tmp_path)
    assert (tmp_path / "x.bin.part").read_bytes() == CONTENT[:1000]
    site.breaks = 0
    assert download_file(f"{site.url}/x.bin", tmp_path).read_bytes() == CONTENT
    assert site.requests == ["bytes=1000-"] * 6


def test_a_server_without_ranges_sends_everything_again(site, tmp_path):
    site.ranges, site.break_after, site.breaks = False, 300_000, 1
    assert download_file(f"{site.url}/x.bin", tmp_path).read_bytes() == CONTENT
    assert site.requests == [None, "bytes=300000-"]


def test_a_file_that_changes_between_two_parts_is_downloaded_again(site, tmp_path):
    site.break_after, site.breaks = 300_000, 100
    site.files["/x.bin"] = bytes(300_000 * 2)
    part = tmp_path / "x.bin.part"
    assert not downloads._fetch_once(f"{site.url}/x.bin", part) and part.stat().st_size == 300_000
    site.files["/x.bin"], site.etag, site.breaks = CONTENT, '"2"', 0
    assert download_file(f"{site.url}/x.bin", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("extra", [0, 5])
def test_a_part_that_is_complete_or_too_long(site, tmp_path, extra):
    (tmp_path / "x.bin.part").write_bytes(CONTENT + bytes(extra))
    assert download_file(f"{site.url}/x.bin", tmp_path).read_bytes() == CONTENT


def test_errors_name_the_refusal(site, tmp_path):
    with pytest.raises(ConnectionError, match=r"nothing\.bin: the server answers 404 Not Found"):
        download_file(f"{site.url}/nothing.bin", tmp_path)
    site.status, site.requests = 503, []
    with pytest.raises(ConnectionError, match="503 Service Unavailable, 5 times in a row"):
        download_file(f"{site.url}/x.bin", tmp_path)
    assert len(site.requests) == 5 and names(tmp_path) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://host/", "http://host/..", "x.bin", "https:///x.bin"])
def test_urls_are_checked(tmp_path, url):
    with pytest.raises(ValueError, match="is not an http or https URL"):
        download_file(url, tmp_path)


def zipped(members) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def test_public_data_is_downloaded_extracted_and_read(site, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no public data set 'netflix'. Choose one of amazon-2014-beauty"):
        download("netflix", tmp_path)
    ratings = "userId,movieId,rating,timestamp\n1,7,4.5,3\n1,8,4.5,2\n"
    movies = 'movieId,title,genres\n7,"Matrix, The",Action|Sci-Fi\n8,Up,(no genres listed)\n'
    files = {"ml-latest-small/ratings.csv": ratings, "ml-latest-small/movies.csv": movies}
    site.files = {"/movielens/ml-latest-small.zip": zipped(files)}
    monkeypatch.setattr(downloads, "_MOVIELENS", f"{site.url}/movielens")
    known = downloads._movielens("ml-latest-small", "ratings.csv", "movies.csv", None)
    monkeypatch.setitem(downloads._PUBLIC, "ml-latest-small", known)
    for _ in range(2):
        data, _ = prepare(*download("ml-latest-small", tmp_path), k_core=None)
        assert data.sequences == [[8, 7]] and data.item_features[7]["title"] == "Matrix, The"
    assert len(site.requests) == 1

    site.files = {"/reviews_Beauty_5.json.gz": b"reviews", "/meta_Beauty.json.gz": b"meta"}
    monkeypatch.setattr(downloads, "_AMAZON_2014", site.url)
    monkeypatch.setitem(downloads._PUBLIC, "amazon-2014-beauty", downloads._amazon("Beauty"))
    raw = download("amazon-2014-beauty", tmp_path)
    assert (raw.format, raw.interactions.read_bytes(), raw.items.read_bytes()) == ("amazon-2014", b"reviews", b"meta")


def test_urls_are_those_of_the_publishers():
    assert set(PUBLIC_DATA) == set(downloads._PUBLIC)
    hosts = ("https://snap.stanford.edu/", "https://files.grouplens.org/")
    assert all(data.base.startswith(hosts) for data in downloads._PUBLIC.values())


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:/evil"])
def test_no_member_leaves_the_folder(tmp_path, name):
    archive = tmp_path / "a.zip"
    archive.write_bytes(zipped({"good": "x", name: "evil"}))
    with pytest.raises(ValueError, match=r"a\.zip contains .*evil.* would leave the folder"):
        extract_zip(archive, tmp_path / "out")
    assert names(tmp_path) == ["a.zip"]


def test_links_and_broken_archives_are_refused(tmp_path):
    archive, link = tmp_path / "a.zip", zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.write_bytes(zipped({link: "/etc/passwd"}))
    with pytest.raises(ValueError, match="'link', which would leave"):
        extract_zip(archive, tmp_path)
    archive.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"a\.zip is not a readable zip file .* download it again"):
        extract_zip(archive, tmp_path)
