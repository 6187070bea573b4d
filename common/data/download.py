"""D4RL's files: downloaded on first use, resumed where a transfer broke off, and checked."""

import os
import time
import urllib.request
from pathlib import Path

import h5py
from tqdm import tqdm

from common.data.cache import locked
from common.data.d4rl import Task
from common.envs.make import brief
from common.run.errors import InputError
from common.run.stopping import stop_if_told
from common.run.workdir import absolute

# On Hugging Face: without the long outages of D4RL's server.
MIRROR, REVISION = "imone/D4RL", "9ed58d8a76c12f4c1cb5db51fa71389e703d2ec5"
SECURE = ("https://",)  # how an address begins
WAITS = (0, 1, 2, 4, 8)  # seconds, before each request to D4RL's server


def fetch(task: Task) -> str:
    """Path of the task's file in D4RL's own folder, downloaded unless it is there.

    The folder is D4RL_DATASET_DIR or ~/.d4rl/datasets.
    """
    name = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    folder = Path(absolute(name, "D4RL_DATASET_DIR"))
    path, reasons = folder / task.file, []
    for download, wait in ((_from_mirror, 0), *((_from_server, wait) for wait in WAITS)):
        if path.is_file():
            break
        if not reasons:
            print(f"downloading {task.file} into {folder}, once", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(f"{path}.lock", f"downloads {task.file}"):
                if not path.is_file():
                    time.sleep(wait)
                    download(task, path)
        except Exception as error:  # the mirror's client raises many kinds
            reasons.append(brief(error.__cause__ or error))
    if not path.is_file():
        raise InputError(
            f"cannot download {task.file} into {folder} (mirror: {reasons[0]}; {task.url}: "
            f"{reasons[-1]}): choose another folder with the environment variable D4RL_DATASET_DIR,"
            " or download the file yourself and give --config.dataset_path=<file>"
        )
    return str(path)


def _from_mirror(task, path):
    from huggingface_hub import hf_hub_download

    place = {"repo_type": "dataset", "revision": REVISION, "local_dir": path.parent}
    hf_hub_download(MIRROR, task.file, **place)  # resumes, and compares checksums


def _from_server(task, path):
    """Downloads task.url to `path`; resumes `path`.part, even that of an earlier process."""
    part = Path(f"{path}.part")
    # The last byte is requested again, because of a complete part there would be none to send.
    have = max(part.stat().st_size - 1, 0) if part.is_file() else 0
    request = urllib.request.Request(task.url, headers={"Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=30) as response:
        if not response.url.startswith(SECURE):
            raise ValueError(f"{response.url} is not https")
        have = have if response.status == 206 else 0  # else it sends the whole file
        total = have + int(response.headers.get("Content-Length", 0))
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name)
        with bar, open(part, "ab") as file:
            file.truncate(have)
            while block := response.read1(1 << 20):
                stop_if_told()
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size < total:
        raise ConnectionError(f"it broke off after {part.stat().st_size} of {total} bytes")
    if not h5py.is_hdf5(part):
        part.unlink()
        raise ValueError("it sent something other than an HDF5 file")
    part.replace(path)
