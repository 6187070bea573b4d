"""Downloads that survive a bad line: resumed where they broke off, checked before they count."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import h5py
from tqdm import tqdm

from common.checks import InputError

MAGIC = b"\x89HDF\r\n\x1a\n"  # what an HDF5 file begins with
BLOCK = 1 << 20  # bytes read at once, and the least that counts as getting on
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Refused(Exception):
    """What a source gives is not the file; asking again would not help."""


class OwnFault(Exception):
    """The file cannot be written here, whatever the source."""


def download(sources, path: str, timeout=30.0, attempts=4, wait=1.0) -> None:
    """Writes an HDF5 file to `path`, from the first of `sources` that gives it whole.

    Until it is complete it is `path`.<host>.part, from which a later call goes on; then its sha256
    is put beside it, for `verify`. timeout: seconds without a byte. attempts: in a row without
    getting on, before the next source. wait: seconds after the first of them, doubled every time.
    Raises InputError, naming the file, all sources and the way around them.
    """
    name = os.path.basename(path)
    reasons = []
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with _locked(f"{path}.lock"):
            if os.path.isfile(path):  # another process was faster
                return
            for source in sources:
                host = urllib.parse.urlsplit(source).netloc.replace(":", "_")
                part = f"{path}.{host}.part"
                try:
                    _fetch(source, part, name, timeout, attempts, wait)
                    _check(part)
                except Refused as error:
                    reasons.append(f"{source} ({error})")
                    _remove(part, f"{part}.version")
                    continue
                except (OSError, http.client.HTTPException) as error:
                    reasons.append(f"{source} ({_reason(error)})")  # the part stays: it is good
                    continue
                _install(part, path)
                return
    except OwnFault as error:
        raise InputError(
            f"cannot write {path} ({error}): free space, or choose another folder by setting "
            "D4RL_DATASET_DIR"
        ) from None
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}): choose another folder by setting "
            "D4RL_DATASET_DIR"
        ) from None
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))  # if it is empty, it was made here
    raise InputError(
        f"cannot download {name}: {'; '.join(reasons)}: fetch it in another way and give it with "
        f"--config.dataset_path=<file>, or put it at {path}"
    )


def verify(path: str) -> None:
    """Raises InputError when the file is not what `download` recorded; no record, no error."""
    try:
        with open(f"{path}.sha256") as file:
            recorded = file.read().split()[0]
    except (OSError, ValueError, IndexError):
        return
    if _sha256(path) != recorded:
        raise InputError(
            f"{path} has changed since it was downloaded (see {path}.sha256): delete both, and it "
            "is downloaded again"
        )


def _fetch(source, part, name, timeout, attempts, wait) -> None:
    """Brings `part` up to its full size; raises what the last of too many failures raised."""
    failures, started, reached = 0, _size(part), _size(part)
    while True:
        try:
            return _transfer(source, part, name, timeout)
        except (OSError, http.client.HTTPException) as error:
            failures = 0 if _size(part) >= reached + BLOCK else failures + 1
            reached = max(reached, _size(part))
            silent = reached == started  # it may well be out of reach
            if failures >= (min(attempts, 2) if silent else attempts):
                raise error
            time.sleep(wait * 2 ** max(failures - 1, 0))


def _transfer(source, part, name, timeout) -> None:
    """One request for what `part` lacks; returns when it is complete."""
    version = _read(f"{part}.version")
    have = _size(part) if version else 0  # else whether the rest would belong to it is unknown
    headers = {"Accept-Encoding": "identity", "User-Agent": "ssar-jax"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        response = _opener.open(urllib.request.Request(source, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing is left of it, or it has become another
            same = _version(error.headers) in (version, "")
            if same and error.headers.get("Content-Range") == f"bytes */{have}":
                return
            _remove(part, f"{part}.version")
            raise ConnectionError(f"it broke off after {have} bytes and has no more") from None
        if error.code < 500 and error.code not in (408, 425, 429):
            raise Refused(f"HTTP {error.code} {error.reason}") from None
        raise
    with response:
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise Refused("it sends a web page instead")
        span = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status == 206:
            if not span or int(span[1]) != have or _version(response.headers) != version:
                _remove(part, f"{part}.version")
                raise ConnectionError("it sends a part of another file than before")
            total = int(span[2])
        else:
            have, length = 0, response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
        bar = tqdm(
            total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=name
        )
        with bar, _writing(part, have) as write:
            if not have:  # only now that nothing of an earlier version is left
                _note_version(part, _version(response.headers))
            for block in _blocks(response):
                if not have and block[: len(MAGIC)] != MAGIC[: len(block)]:
                    raise Refused("it sends something else than an HDF5 file")
                write(block)
                have += len(block)
                bar.update(len(block))
    if total is not None and have < total:
        raise ConnectionError(f"it broke off after {have} of {total} bytes")


def _blocks(response):
    while True:
        block = response.read1(BLOCK)
        if not block:
            return
        yield block


@contextlib.contextmanager
def _writing(part, position):
    """A function that adds blocks to `part` from `position` on."""
    try:
        with open(part, "r+b" if position else "wb") as file:
            file.seek(position)

            def write(block):
                try:
                    file.write(block)
                except OSError as error:
                    raise OwnFault(error.strerror) from None

            yield write
    except PermissionError as error:
        raise OwnFault(error.strerror) from None


def _version(headers) -> str:
    """What names this version of the file, for a later request to go on with the same."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def _note_version(part, version) -> None:
    try:
        with open(f"{part}.version", "w") as file:
            file.write(version)
    except OSError as error:
        raise OwnFault(error.strerror) from None


def _check(part) -> None:
    """Raises Refused when the file is not whole, or holds no transitions."""
    try:
        with h5py.File(part, "r", locking=False) as file:
            missing = {"observations", "actions", "rewards", "terminals"} - set(file)
    except OSError as error:
        raise Refused(f"what it sent is no whole HDF5 file: {error}") from None
    if missing:
        raise Refused(f"what it sent has no {', '.join(sorted(missing))}")


def _install(part, path) -> None:
    with open(f"{part}.sha256", "w") as file:
        file.write(f"{_sha256(part)}  {os.path.basename(path)}\n")
    os.replace(f"{part}.sha256", f"{path}.sha256")
    os.replace(part, path)
    _remove(f"{part}.version")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, address):
        _check_address(address, request.full_url)
        return super().redirect_request(request, file, code, message, headers, address)


class _NoPlainHttp(urllib.request.BaseHandler):
    def http_request(self, request):
        _check_address(request.full_url, request.full_url)
        return request


def _check_address(address, origin) -> None:
    """Plain http is for a server on this machine, and not by way of another one."""
    hosts = [urllib.parse.urlsplit(x).hostname for x in (address, origin)]
    scheme = urllib.parse.urlsplit(address).scheme
    if scheme != "https" and not (scheme == "http" and set(hosts) <= set(LOOPBACK)):
        raise Refused(f"{address} is not https")


_opener = urllib.request.build_opener(_SafeRedirects, _NoPlainHttp)


@contextlib.contextmanager
def _locked(path):
    """Lets one process at a time inside, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    while True:
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process downloads {path[:-5]}: waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                try:
                    yield
                finally:
                    _remove(path)
                return
        # Whoever held it has removed it meanwhile: the file by that name is another one.


def _sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _read(path) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _remove(*paths) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def _reason(error) -> str:
    if isinstance(error, TimeoutError):
        return "it sends nothing any more"
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error) or type(error).__name__
