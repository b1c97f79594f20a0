"""NFS where the kernel knows it: what nfs.py stands in for, done with the machine's own mount, showmount and mount table.

`install --real-nfs` chooses it, on hosts with a kernel of their own (user-mode-linux).
"""

from __future__ import annotations

import socket
import subprocess
from typing import Any


def strip_brackets(server: str) -> str:
    return server[1:-1] if server.startswith("[") and server.endswith("]") else server


def answers(server: str) -> bool:
    try:
        socket.create_connection((strip_brackets(server), 2049), 2).close()
        return True
    except OSError:
        return False


def server_folder(server: str) -> str | None:
    return "/" if answers(server) else None


def _showmount(server: str) -> list[str] | None:
    """The lines of its list; None when it has none to give."""
    try:
        done = subprocess.run(["/sbin/showmount", "--no-headers", "--exports", strip_brackets(server)],
                              capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def has_mountd(server: str) -> bool:
    return _showmount(server) is not None


def exports(server: str) -> list[tuple[str, str]]:
    lines = [line.split(None, 1) for line in _showmount(server) or []]
    return sorted((words[0], words[1].strip() if len(words) > 1 else "*") for words in lines)


def mounts() -> list[dict[str, Any]]:
    import nfs
    with open("/proc/mounts", encoding="utf-8", errors="surrogateescape") as handle:
        rows = [line.split(" ") for line in handle]
    return [{"source": nfs.unescape(row[0]), "target": nfs.unescape(row[1]), "options": row[3].split(",")}
            for row in rows if row[2] in ("nfs", "nfs4")]


def mount(source: str, target: str, options: str = "") -> None:
    import nfs
    words = ["/bin/mount", "-t", "nfs", source, target, *(["-o", options] if options else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise nfs.MountError(done.stderr.strip(), done.returncode)
