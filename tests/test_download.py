"""Downloads from a server on this machine that breaks off, stalls, lies and changes its mind."""

import hashlib
import http.server
import os
import socket
import threading
import time
from functools import partial

import h5py
import numpy as np
import pytest
from toys import toy_columns, write_hdf5

from common import d4rl
from common.checks import InputError
from common.download import BLOCK, download, verify
from common.loading import load_dataset

quick = partial(download, timeout=0.3, attempts=3, wait=0.01)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A data set of some megabytes: more than a server gives before it breaks off."""
    path = tmp_path_factory.mktemp("content") / "whole.hdf5"
    write_hdf5(path, **toy_columns(300), padding=np.zeros(5 * BLOCK, np.uint8))
    return path.read_bytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content as server.mood says, and notes what it was asked for."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, mood = self.server, self.server.mood
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.asked.append((start, self.headers.get("If-Range")))
        if mood == "moved":
            self.send_response(302)
            self.send_header("Location", server.elsewhere)
            return self.end_headers()
        if mood in ("missing", "overloaded"):
            return self.send_error(404 if mood == "missing" else 503)
        if mood == "page":
            return self.give(200, b"<html>sorry</html>", {"Content-Type": "text/html"})
        if mood == "junk":
            return self.give(200, b"junk" * 1000)
        if mood == "deaf":
            time.sleep(1)
            return None
        if mood == "wrong part":
            span = f"bytes {start + 7}-{len(server.content) - 1}/{len(server.content)}"
            headers = {"Content-Range": span, "ETag": server.version}
            return self.give(206, server.content[start + 7 :], headers)
        if mood == "forgets":  # which version the part is of that it is to go on with
            span = f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            headers = {"Content-Range": span, "ETag": server.version}
            return self.give(206 if start else 200, server.content[start:], headers)
        if mood == "chunked":
            return self.give_chunks(server.content[start:], start)
        headers = {"ETag": server.version} if server.version else {}
        if start and self.headers.get("If-Range") in (None, server.version):
            if start >= len(server.content):
                size = len(server.content) + 1000 * (mood == "says more")
                return self.give(416, b"", {"Content-Range": f"bytes */{size}"})
            last = len(server.content) - 1
            headers["Content-Range"] = f"bytes {start}-{last}/{last + 1}"
            return self.give(206, server.content[start:], headers)
        return self.give(200, server.content, headers)

    def give_chunks(self, body, start):
        """Two chunks of unknown number, then nothing more."""
        self.protocol_version = "HTTP/1.1"
        self.send_response(206 if start else 200)
        self.send_header("ETag", self.server.version)
        self.send_header("Transfer-Encoding", "chunked")
        if start:
            size = start + len(body)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        for chunk in (body[:BLOCK], body[BLOCK : 2 * BLOCK]):
            if chunk:
                self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        if len(body) <= 2 * BLOCK:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def give(self, status, body, headers=()):
        mood, length = self.server.mood, len(body)
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if mood == "says more":
            length += 1000
        elif mood == "says less":
            length -= 1000
        if mood != "says nothing":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if mood in ("breaks off", "stalls") and len(body) > 2 * BLOCK:
            self.wfile.write(body[: 2 * BLOCK])
            self.wfile.flush()
            if mood == "stalls":
                time.sleep(1)
        elif mood == "says less":
            self.wfile.write(body[:length])
        else:
            self.wfile.write(body)


class Server:
    """A server in a thread. mood: how it behaves. asked: (first byte, If-Range) of all requests."""

    def __init__(self, content):
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.content, self.http.mood, self.http.version = content, "well", '"one"'
        self.http.asked = []
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/whole.hdf5"


@pytest.fixture
def servers(content):
    pair = Server(content), Server(content)
    yield pair
    for server in pair:
        server.http.shutdown()
        server.http.server_close()


def test_a_whole_file_arrives_and_is_recorded(servers, content, tmp_path, capfd):
    path = tmp_path / "folder" / "whole.hdf5"
    quick([servers[0].url], str(path))
    assert path.read_bytes() == content
    digest = hashlib.sha256(content).hexdigest()
    assert (tmp_path / "folder" / "whole.hdf5.sha256").read_text() == f"{digest}  whole.hdf5\n"
    assert sorted(os.listdir(path.parent)) == ["whole.hdf5", "whole.hdf5.sha256"]
    assert "whole.hdf5: 100%" in capfd.readouterr().err  # the progress bar
    verify(str(path))
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(InputError, match=r"whole.hdf5 has changed since .*: delete both"):
        verify(str(path))


@pytest.mark.parametrize("mood", ["breaks off", "stalls", "chunked"])
def test_a_transfer_goes_on_where_it_broke_off(servers, content, tmp_path, mood):
    servers[0].http.mood = mood
    quick([servers[0].url], str(tmp_path / "whole.hdf5"))
    assert (tmp_path / "whole.hdf5").read_bytes() == content
    starts = [start for start, _ in servers[0].http.asked]
    assert starts == [0, 2 * BLOCK, 4 * BLOCK]
    assert [version for _, version in servers[0].http.asked] == [None, '"one"', '"one"']


def test_a_later_call_goes_on_too(servers, content, tmp_path):
    """After a process that was killed: a part of the file, and which version it is of."""
    host = servers[0].url.split("/")[2].replace(":", "_")
    part = tmp_path / f"whole.hdf5.{host}.part"
    for size, version, start in ((BLOCK, '"one"', BLOCK), (BLOCK, "", 0), (len(content), "x", 0)):
        servers[0].http.asked.clear()
        part.write_bytes(content[:size])
        (tmp_path / f"{part.name}.version").write_text(version)
        quick([servers[0].url], str(tmp_path / "whole.hdf5"))
        assert (tmp_path / "whole.hdf5").read_bytes() == content
        assert servers[0].http.asked[0][0] == (start or (0 if not version else size))
        os.remove(tmp_path / "whole.hdf5")
    part.write_bytes(content)  # nothing is left to fetch
    (tmp_path / f"{part.name}.version").write_text('"one"')
    quick([servers[0].url], str(tmp_path / "whole.hdf5"))
    assert (tmp_path / "whole.hdf5").read_bytes() == content


@pytest.mark.parametrize("mood", ["well", "forgets", "wrong part"])
def test_a_file_that_changed_meanwhile_is_begun_anew(servers, content, tmp_path, mood):
    """Also where the server sends the rest of the new version to a part of the old."""
    servers[0].http.mood = mood
    for old in (b"\x89HDF of another version", content + b"which was longer"):
        servers[0].http.asked.clear()
        host = servers[0].url.split("/")[2].replace(":", "_")
        part = tmp_path / f"whole.hdf5.{host}.part"
        part.write_bytes(old)
        (tmp_path / f"{part.name}.version").write_text('"zero"')
        sources = [servers[0].url, servers[1].url][: 1 + (mood == "wrong part")]
        quick(sources, str(tmp_path / "whole.hdf5"))
        assert (tmp_path / "whole.hdf5").read_bytes() == content
        assert servers[0].http.asked[0] == (len(old), '"zero"')
        os.remove(tmp_path / "whole.hdf5")


def test_a_server_that_tells_no_size_is_believed_if_the_file_is_whole(servers, content, tmp_path):
    servers[0].http.mood = "says nothing"
    quick([servers[0].url], str(tmp_path / "whole.hdf5"))
    assert (tmp_path / "whole.hdf5").read_bytes() == content


BAD = {
    "missing": "HTTP 404 Not Found",
    "overloaded": "HTTP 503 Service Unavailable",
    "page": "it sends a web page instead",
    "junk": "it sends something else than an HDF5 file",
    "deaf": "it sends nothing any more",
    "says more": "it broke off after",
    "says less": "what it sent is no whole HDF5 file",
    "wrong part": "it sends a part of another file",
    "moved": "is not https",
}


@pytest.mark.parametrize("mood", BAD)
def test_the_next_source_helps_out(servers, content, tmp_path, mood):
    servers[0].http.mood = mood
    servers[0].http.elsewhere = "http://example.org/whole.hdf5"
    quick([servers[0].url, servers[1].url], str(tmp_path / "whole.hdf5"))
    assert (tmp_path / "whole.hdf5").read_bytes() == content


@pytest.mark.parametrize("mood", BAD)
def test_without_a_good_source_one_sentence_tells_all(servers, tmp_path, mood):
    servers[0].http.mood = mood
    servers[0].http.elsewhere = "http://example.org/whole.hdf5"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/whole.hdf5"
    path = str(tmp_path / "whole.hdf5")
    with pytest.raises(InputError) as error:
        quick([servers[0].url, closed], path)
    message = str(error.value)
    for words in (
        "cannot download whole.hdf5: ",
        servers[0].url,
        BAD[mood],
        f"{closed} (",
        "refused",
        "--config.dataset_path=<file>",
        f"or put it at {path}",
    ):
        assert words in message
    assert "\n" not in message
    assert not os.path.exists(path)


def test_a_folder_is_not_left_behind_empty(servers, tmp_path):
    servers[0].http.mood = "missing"
    with pytest.raises(InputError, match="HTTP 404"):
        quick([servers[0].url], str(tmp_path / "folder" / "whole.hdf5"))
    assert os.listdir(tmp_path) == []


def test_a_data_set_without_its_keys_is_not_kept(servers, tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["observations"] = np.zeros((3, 2))
    servers[0].http.content = (tmp_path / "other.hdf5").read_bytes()
    with pytest.raises(InputError, match="has no actions, rewards, terminals"):
        quick([servers[0].url], str(tmp_path / "whole.hdf5"))
    assert os.listdir(tmp_path) == ["other.hdf5"]


def test_plain_http_is_for_this_machine_alone(tmp_path):
    with pytest.raises(InputError, match="http://example.org/x.hdf5 is not https"):
        quick(["http://example.org/x.hdf5"], str(tmp_path / "x.hdf5"))


def test_two_processes_download_once(servers, content, tmp_path, capfd):
    servers[0].http.mood = "breaks off"
    path = str(tmp_path / "whole.hdf5")
    threads = [threading.Thread(target=quick, args=([servers[0].url], path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "another process downloads" in capfd.readouterr().err
    assert (tmp_path / "whole.hdf5").read_bytes() == content
    assert len(servers[0].http.asked) == 3  # one download, in three parts
    assert sorted(os.listdir(tmp_path)) == ["whole.hdf5", "whole.hdf5.sha256"]


def test_a_folder_that_cannot_be_written_is_named(servers, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file/whole.hdf5 .*D4RL_DATASET_DIR"):
        quick([servers[0].url], str(tmp_path / "file" / "whole.hdf5"))


def test_a_task_is_found_in_the_cache_or_downloaded_into_it(servers, tmp_path, monkeypatch):
    """By its name alone; a file that D4RL left there is used as it is."""
    hopper = toy_columns(300)
    for key in ("observations", "next_observations"):
        hopper[key] = np.tile(hopper[key], 3)[:, :11]
    hopper["actions"] = np.tile(hopper["actions"], 2)[:, :3]
    task = d4rl.TASKS["hopper-medium-v2"]
    write_hdf5(tmp_path / task.file, **hopper)
    servers[1].http.content = (tmp_path / task.file).read_bytes()
    os.remove(tmp_path / task.file)
    servers[0].http.mood = "missing"
    local = task._replace(sources=(servers[0].url, servers[1].url))
    monkeypatch.setitem(d4rl.TASKS, task.name, local)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    for downloads in (1, 1):
        dataset = load_dataset(task.name)
        np.testing.assert_array_equal(dataset.observations, hopper["observations"])
        assert (dataset.env.id, dataset.physics) == ("Hopper-v4", "d4rl")
        assert dataset.score(3234.3) == pytest.approx(100)
        assert len(servers[1].http.asked) == downloads
    os.remove(tmp_path / f"{task.file}.sha256")
    load_dataset(task.name)


def test_a_damaged_file_in_the_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    file = tmp_path / d4rl.TASKS["antmaze-umaze-v2"].file
    file.write_bytes(b"\x89HDF")
    with pytest.raises(InputError, match="not a readable HDF5 file"):
        load_dataset("antmaze-umaze-v2")
    (tmp_path / f"{file.name}.sha256").write_text(f"{'0' * 64}  {file.name}\n")
    with pytest.raises(InputError, match="has changed since it was downloaded"):
        load_dataset("antmaze-umaze-v2")
