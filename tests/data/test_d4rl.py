"""D4RL's files, downloaded from a mirror on this machine that breaks off or has none."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.data.d4rl import PINNED

ROOT = Path(__file__).parents[2]
FETCH = "from common.data.d4rl import *; print('got', fetch(TASKS['hopper-medium-v2']))"
FILE = "hopper_medium-v2.hdf5"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content as Hugging Face does, and notes what it was asked for."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, whole = self.server, self.server.content
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if not self.path.startswith("/datasets/") or server.mood == "has none":
            return self.send_error(404)
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("Content-Length", str(len(whole) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        if self.command == "GET":
            server.asked.append((self.path, start))
            breaks_off = server.mood == "breaks off" and not start
            self.wfile.write(whole[start : len(whole) - 1 if breaks_off else None])


@pytest.fixture
def server(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.mood, server.asked = os.urandom(2**24), "well", []
    server.folder = tmp_path / "d4rl"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server):
    """What a user's process says that fetches the task, and its exit status."""
    mirror, folder = f"http://127.0.0.1:{server.server_port}", str(server.folder)
    own = {"HF_ENDPOINT": mirror, "HF_HUB_OFFLINE": "0", "HF_HOME": f"{folder}-home"}
    own |= {"HOME": folder, "D4RL_DATASET_DIR": folder}
    command, env = [sys.executable, "-c", FETCH], os.environ | own
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


def test_a_file_is_downloaded_once_and_resumes_where_it_broke_off(server):
    server.mood = "breaks off"
    out, err, status = fetch(server)
    assert status == 0, err
    assert out.startswith(f"downloading {FILE} into {server.folder}, once")
    (path, first), (_, second) = server.asked
    assert path == f"/datasets/imone/D4RL/resolve/{PINNED}/{FILE}"
    assert first == 0 < second < len(server.content)
    assert fetch(server) == (f"got {server.folder / FILE}\n", "", 0)
    assert (server.folder / FILE).read_bytes() == server.content and len(server.asked) == 2


def test_one_sentence_says_what_to_do_without_the_mirror(server):
    server.mood = "has none"
    _, err, status = fetch(server)
    (said,) = [line for line in err.splitlines() if "InputError:" in line]
    assert "Retrying" not in err
    assert status and f"cannot download {FILE} from huggingface.co/datasets/imone/D4RL" in said
    assert "404" in said and said.endswith("give a file with --config.dataset_path=<file>")
    assert not (server.folder / FILE).exists()
