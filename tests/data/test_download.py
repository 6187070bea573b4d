"""Downloads from a server on this machine that breaks off or sends something else."""

import http.server
import threading

import huggingface_hub
import numpy as np
import pytest
from toys import tiny_config, toy_columns, write_hdf5

from common.data import download, load_dataset
from common.data.d4rl import TASKS
from common.run.errors import InputError

BLOCK = 1 << 20
TASK = TASKS["hopper-medium-v2"]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A data set of some megabytes."""
    path, columns = tmp_path_factory.mktemp("content") / "whole.hdf5", toy_columns(300)
    write_hdf5(path, **columns, padding=np.zeros(5 * BLOCK, np.uint8))
    return path.read_bytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content as server.mood says, and notes what it was asked for."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, start = self.server, int(self.headers["Range"][6:-1])
        server.asked.append(start)
        body, size = server.content, len(server.content)
        if isinstance(server.mood, int):
            return self.send_error(server.mood)
        if server.mood == "junk":
            body = b"<html>sorry</html>"
        if server.mood != "sends all":
            self.send_response(206 if start < size else 416)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            body = body[start:]
        else:
            self.send_response(200)
        if server.mood != "says no size":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: 2 * BLOCK] if server.mood == "breaks off" else body)


@pytest.fixture
def server(content, tmp_path, monkeypatch):
    """D4RL's server on this machine, and a mirror that cannot be reached."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.mood, server.asked = content, "well", []
    server.handle_error = lambda *_: None  # a client that does not read on is no error
    server.task = TASK._replace(url=f"http://127.0.0.1:{server.server_port}/whole.hdf5")
    server.path = tmp_path / "d4rl" / TASK.file
    monkeypatch.setitem(TASKS, TASK.name, server.task)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setattr(download, "SECURE", ("https://", "http://127.0.0.1"))
    monkeypatch.setattr(download, "WAITS", (0, 0, 0))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def check_complete(path, content):
    """The file is there, and nothing unfinished."""
    assert path.read_bytes() == content
    assert [file for file in path.parent.glob("[!.]*") if file.suffix != ".lock"] == [path]


def test_a_file_is_downloaded_once(server, content, capfd):
    for _ in range(2):
        data = load_dataset(tiny_config(dataset=TASK.name))
    assert len(server.asked) == 1 and len(data.rewards) >= 300
    check_complete(server.path, content)
    said = capfd.readouterr()
    assert said.out.count("downloading hopper_medium-v2.hdf5 into ") == 1
    assert "hopper_medium-v2.hdf5.part: 100%" in said.err  # the progress bar


def test_the_mirror_comes_first(server, content, monkeypatch):
    def hub(repo, filename, repo_type, revision, local_dir):
        assert (repo, repo_type, len(revision)) == ("imone/D4RL", "dataset", 40)
        (local_dir / filename).write_bytes(content)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    download.fetch(server.task)
    assert not server.asked
    check_complete(server.path, content)


def test_a_transfer_resumes_where_it_broke_off(server, content):
    server.mood = "breaks off"
    download.fetch(server.task)
    assert server.asked == [0, 2 * BLOCK - 1, 4 * BLOCK - 2]
    check_complete(server.path, content)


@pytest.mark.parametrize(
    ("size", "mood", "start"),
    [
        (BLOCK, "well", BLOCK - 1),
        (BLOCK, "sends all", BLOCK - 1),
        (None, "well", -1),  # everything is here
        (0, "says no size", 0),
    ],
)
def test_a_later_process_resumes_too(server, content, size, mood, start):
    server.path.parent.mkdir()
    part = server.path.with_name(f"{server.path.name}.part")
    part.write_bytes(content[:size])
    server.mood = mood
    download.fetch(server.task)
    assert server.asked == [start % len(content)]
    check_complete(server.path, content)


@pytest.mark.parametrize(
    ("mood", "words"),
    [
        (503, "HTTP Error 503"),
        ("junk", "it sent something other than an HDF5 file"),
        ("well", "whole.hdf5 is not https"),
    ],
)
def test_one_sentence_names_all_sources(server, monkeypatch, mood, words):
    server.mood = mood
    if mood == "well":
        monkeypatch.setattr(download, "SECURE", ("https://",))
    with pytest.raises(InputError) as error:
        download.fetch(server.task)
    message = str(error.value)
    assert message.startswith(
        f"cannot download {server.path.name} into {server.path.parent} (mirror: "
    )
    assert server.task.url in message and words in message and "\n" not in message
    assert message.endswith("give --config.dataset_path=<file>")
    assert len(server.asked) == 3 and not server.path.exists()
