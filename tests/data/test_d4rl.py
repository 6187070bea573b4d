"""D4RL's files, downloaded from a mirror on this machine that breaks off once."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

from files import refused

from common.data.d4rl import PINNED

ROOT = Path(__file__).parents[2]
FETCH = "from common.data.d4rl import *; print('got', fetch(TASKS['hopper-medium-v2']))"
FILE = "hopper_medium-v2.hdf5"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content as Hugging Face does, breaks off, and notes what it was asked for."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        whole = self.server.content
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("Content-Length", str(len(whole) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        return start

    def do_GET(self):
        if not self.path.startswith("/datasets/"):
            return self.send_error(404)
        start = self.do_HEAD()
        self.server.asked.append((self.path, start))
        self.wfile.write(self.server.content[start : None if start else -1])


def test_a_file_is_downloaded_once_and_resumes_where_it_broke_off(tmp_path):
    server, folder = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler), tmp_path / "d4rl"
    server.content, server.asked = os.urandom(2**24), []
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HOME": f"{tmp_path}/hf", "D4RL_DATASET_DIR": str(folder)}
    command = [sys.executable, "-c", FETCH]
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        outputs = [
            subprocess.check_output(command, cwd=ROOT, env=env, text=True, timeout=100)
            for _ in range(2)
        ]
        server.shutdown()
    assert outputs[0].startswith(f"downloading {FILE} into {folder}, once")
    assert outputs[1] == f"got {folder / FILE}\n"
    (path, first), (_, second) = server.asked
    assert path == f"/datasets/imone/D4RL/resolve/{PINNED}/{FILE}"
    assert first == 0 < second < len(server.content)
    assert (folder / FILE).read_bytes() == server.content


def test_one_sentence_says_what_to_do_without_the_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    message = refused(dataset="hopper-medium-v2")
    assert message.startswith(f"cannot download {FILE} from huggingface.co/datasets/imone/D4RL")
    assert message.endswith("try again, or give a file with --config.dataset_path=<file>")
