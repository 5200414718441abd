"""Download one file over HTTP: resumed, verified, and either whole or not there."""

import hashlib
import http.client
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

MIRROR = "LONGTAIL_MIRROR"
ATTEMPTS = 5  # connections in one call; each goes on where the one before broke off
TIMEOUT = 30  # seconds without a byte
BLOCK = 1 << 18
NETWORK_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException)


def masked(text: str) -> str:
    """The text with `***` in place of names and passwords in addresses, and of what follows their question mark."""
    text = re.sub(r"(?<=://)[^/\s]*@", "***@", text)
    return re.sub(r"(://[^\s?'\"]*\?)[^\s'\"]*", r"\1***", text)


class DownloadError(ValueError):
    """The file could not be fetched, or is not the one that was asked for."""


def download(url: str, path: str | Path, md5: str, *, progress: bool = True) -> Path:
    """Make sure that the file of `url` with this MD5 lies at `path`; return the path.

    A file that is there already is verified and used, without the network. Otherwise the bytes
    gather in <path>.part, which an interrupted call leaves for the next one to go on from (HTTP
    Range), and which moves to `path` once its MD5 is right. `progress` prints every tenth of the
    way to stderr.

    Raises DownloadError when the network fails (saying what to do without one), or when the MD5 is
    wrong: what was downloaded is then removed, a file that somebody else put at `path` is not.
    ValueError for an md5 that is not 32 hexadecimal digits or a url that is not http.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", str(md5)):
        raise ValueError(f"md5: {md5!r} is not allowed; allowed are 32 digits of 0-9 a-f")
    if not str(url).startswith(("http://", "https://")):
        raise ValueError(f"url: {url!r} is not allowed; allowed are http:// and https://")
    path = Path(path)
    if path.exists():
        if (got := _md5(path)) != md5:
            raise DownloadError(
                f"{path}: has MD5 {got}, expected {md5} ({masked(url)}); remove it, or put the right one there"
            )
        return path

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _gather(url, part, path, progress)
    if (got := _md5(part)) != md5:
        part.unlink()
        raise DownloadError(f"{masked(url)}: MD5 is {got}, expected {md5}; what was downloaded is removed ({part})")
    part.replace(path)
    return path


def _gather(url: str, part: Path, path: Path, progress: bool) -> None:
    """Connect until `part` holds all there is, as long as every connection brings something."""
    for attempt in range(1, ATTEMPTS + 1):
        before = _size(part)
        try:
            if _receive(url, part, progress):
                return
            reason = f"the connection broke off after {_size(part)} bytes"
        except NETWORK_ERRORS as error:
            reason = str(error)
        if attempt == ATTEMPTS or _size(part) <= before:
            break
    raise DownloadError(
        f"{masked(url)}: {reason}. Run again to go on ({part} is kept); without a network, "
        f"set {MIRROR} to a folder that holds a mirror, or put the file at {path} by hand"
    )


def _receive(url: str, part: Path, progress: bool) -> bool:
    """Append what is missing to `part` in one connection; whether it is complete then."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after the last byte that we have: the MD5 will tell
            return True
        raise
    with response:
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise http.client.HTTPException(f"not the range asked for: {response.headers.get('Content-Range')}")
        if response.status != 206:
            have = 0  # a server without ranges sends the file from its start
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with open(part, "ab" if have else "wb") as file:
            _copy(response, file, have, total, part.stem if progress else None)
    return total is None or _size(part) == total


def _copy(response: IO[bytes], file: IO[bytes], done: int, total: int | None, name: str | None) -> None:
    """Copy block by block; a `name` says what to print on stderr at every tenth of `total`."""
    tenth = 10 * done // total if total else 0
    while block := response.read(BLOCK):
        file.write(block)
        done += len(block)
        if name and total and 10 * done // total > tenth:
            tenth = 10 * done // total
            print(f"{name}: {10 * tenth} % of {total / 1e6:.1f} MB", file=sys.stderr)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
