"""Turn the text of a uv.lock into the form that is committed, which holds no address.

    python3 tools/address_free.py < uv.lock      # git runs this as the clean filter of uv.lock

uv records where it found each file. Those addresses are one machine's (a mirror, a proxy), so the
committed lock keeps the names, versions, file names and hashes and drops the rest:

- a registry source becomes the relative path `wheels` (never read, the folder does not exist);
- `url = ".../file.whl"` becomes `path = "file.whl"`;
- `size` and `upload-time` go, since not every index tells them;
- the members' `[package.metadata]` tables go. Without them uv does not trust the lock as it is:
  it resolves again, prefers the versions recorded here, and writes its full form locally.

Standard library only, and no syntax newer than Python 3.8: git calls it with whatever `python3` is.
"""

import re
import sys

_REGISTRY = re.compile(r'registry = "[a-z][a-z0-9+.-]*://[^"]*"')
_URL = re.compile(r'\burl = "[^"]*/([^/"?#]+)(?:[?#][^"]*)?"')
_VOLATILE = re.compile(r', (?:size = [0-9]+|upload-time = (?:"[^"]*"|[0-9T:.Z+-]+))(?=,| \})')
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")


def address_free(lock: str) -> str:
    """Return the committed form of a uv.lock; applied to that form it changes nothing."""
    kept = []
    in_metadata = False
    for line in lock.replace("\r\n", "\n").split("\n"):
        if line.startswith("["):
            in_metadata = line.startswith("[package.metadata")
        if not in_metadata:
            line = _REGISTRY.sub('registry = "wheels"', line)
            line = _URL.sub(r'path = "\1"', line)
            kept.append(_VOLATILE.sub("", line))
    # A dropped table leaves its blank line behind.
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).rstrip("\n") + "\n"


def addresses(lock: str) -> "list[str]":
    """Return the lines of a lock that hold an address, each with its number."""
    lines = enumerate(lock.splitlines(), start=1)
    return [f"line {number}: {line.strip()}" for number, line in lines if _ADDRESS.search(line)]


if __name__ == "__main__":
    text = sys.stdin.buffer.read().decode("utf-8")
    sys.stdout.buffer.write(address_free(text).encode("utf-8"))
