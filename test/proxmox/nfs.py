"""NFS without a kernel that knows it.

A server is a folder /srv/nfs/SERVER (a symlink gives it a second name); what lies below
is its file system, shared by every machine that has the folder. A mount is a bind mount
of the exported folder plus an entry in a table under /run, from which `findmnt`, `mount`,
`umount`, `showmount` and `rpcinfo` of ours answer as for a real nfs4 mount.

One lock covers both steps: whoever reads the table waits, so nobody ever sees the bind
mount without its entry. Entries whose mount is gone (a reboot, a lazy umount) do not count.

Files in a server's folder steer it:
    .exports   lines `PATH CLIENTS`, as showmount prints them; only these (and what is below)
               can be mounted. Without the file every folder on the first level is exported to `*`.
    .down      the server does not answer
    .hang      questions to the server are never answered
    .v4only    no mountd, no rpcbind: showmount fails, an NFSv4 mount works
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import re
import socket
import subprocess
import time
from contextlib import contextmanager
from typing import Any, Iterator

SERVERS = "/srv/nfs"
STATE = "/run/pve-nfs"
TABLE = f"{STATE}/mounts.json"
MOUNT, UMOUNT = "/bin/mount", "/bin/umount"


class MountError(Exception):
    def __init__(self, text: str, exit_code: int = 32):
        super().__init__(text)
        self.text, self.exit_code = text, exit_code


# --- servers ------------------------------------------------------------------------

def strip_brackets(server: str) -> str:
    return server[1:-1] if server.startswith("[") and server.endswith("]") else server


def server_folder(server: str) -> str | None:
    path = os.path.join(SERVERS, strip_brackets(server))
    return path if os.path.isdir(path) and "/" not in server else None


def _switch(server: str, name: str) -> bool:
    folder = server_folder(server)
    return folder is not None and os.path.exists(os.path.join(folder, name))


def answers(server: str) -> bool:
    """Does anything answer there? A hanging server keeps the caller waiting, as rpc does."""
    while _switch(server, ".hang"):
        time.sleep(0.5)
    return server_folder(server) is not None and not _switch(server, ".down")


def resolves(server: str) -> bool:
    if server_folder(server):
        return True
    try:
        socket.getaddrinfo(strip_brackets(server), None)
        return True
    except OSError:
        return False


def has_mountd(server: str) -> bool:
    return answers(server) and not _switch(server, ".v4only")


def exports(server: str) -> list[tuple[str, str]]:
    """What showmount lists: (path, clients), sorted by path."""
    folder = server_folder(server) or ""
    try:
        with open(os.path.join(folder, ".exports"), encoding="utf-8") as handle:
            lines = [line.split(None, 1) for line in handle if line.strip() and not line.startswith("#")]
        return sorted((words[0], words[1].strip() if len(words) > 1 else "*") for words in lines)
    except FileNotFoundError:
        return sorted((f"/{name}", "*") for name in os.listdir(folder) if not name.startswith(".")
                      and os.path.isdir(os.path.join(folder, name)))


# --- the table ------------------------------------------------------------------------

@contextmanager
def table_lock(exclusive: bool) -> Iterator[None]:
    os.makedirs(STATE, exist_ok=True)
    with open(f"{STATE}/lock", "a", encoding="ascii") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


def mountinfo() -> list[list[str]]:
    """The fields of /proc/self/mountinfo, split at blanks."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as handle:
        return [line.rstrip("\n").split(" ") for line in handle]


def unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)


def escape(text: str) -> str:
    return re.sub(r"[ \t\n\\]", lambda m: "\\%03o" % ord(m[0]), text)


def entries() -> list[dict[str, Any]]:
    """Live entries of the table; call it with the lock held."""
    try:
        with open(TABLE, encoding="utf-8") as handle:
            table = json.load(handle)
    except (FileNotFoundError, ValueError):
        return []
    alive = {(fields[0], unescape(fields[4])) for fields in mountinfo()}
    return [entry for entry in table if (entry["id"], entry["target"]) in alive]


def _write(table: list[dict[str, Any]]) -> None:
    temporary = f"{TABLE}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as handle:
        json.dump(table, handle)
    os.rename(temporary, TABLE)


def mounts() -> list[dict[str, Any]]:
    """Live nfs mounts: source, target, options, id."""
    with table_lock(False):
        return entries()


# --- mount and umount ---------------------------------------------------------------------

_FLAGS = {"rw", "ro", "hard", "soft", "softerr", "softreval", "intr", "nointr", "bg", "fg", "ac", "noac", "cto",
          "nocto", "lock", "nolock", "acl", "noacl", "tcp", "udp", "sharecache", "nosharecache", "resvport",
          "noresvport", "rdirplus", "nordirplus", "fsc", "nofsc", "migration", "nomigration", "noatime", "atime",
          "relatime", "norelatime", "nodiratime", "diratime", "nosuid", "suid", "nodev", "dev", "noexec", "exec",
          "sync", "async", "defaults", "_netdev", "nofail", "auto", "noauto", "user", "nouser", "posix", "remount"}
_VALUES = {"vers", "nfsvers", "minorversion", "proto", "port", "mountport", "mountproto", "mountvers", "mounthost",
           "rsize", "wsize", "timeo", "retrans", "retry", "acregmin", "acregmax", "acdirmin", "acdirmax", "actimeo",
           "sec", "lookupcache", "local_lock", "nconnect", "max_connect", "clientaddr", "addr", "namlen", "bsize",
           "trunkdiscovery", "context", "xprtsec", "write", "x-systemd.automount"}
_VERSIONS = {"3", "4", "4.0", "4.1", "4.2"}


def _check_options(options: str, target: str) -> str:
    """The NFS version asked for; a wrong option is refused with mount.nfs's sentence."""
    version = "4.2"
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key in ("vers", "nfsvers"):
            if value not in _VERSIONS:
                raise MountError(f"mount.nfs: an incorrect mount option was specified for {target}")
            version = {"4": "4.2"}.get(value, value)
        elif not (key in _VALUES if equals else key in _FLAGS or key.startswith("x-")):
            raise MountError(f"mount.nfs: an incorrect mount option was specified for {target}")
    return version


def _exported_folder(source: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:]+):(/.*)", source)
    if not match:
        raise MountError(f"mount.nfs: remote share not in 'host:dir' format")
    server, path = match[1], match[2]
    folder = server_folder(server)
    if folder is None and not resolves(server):
        raise MountError(f"mount.nfs: Failed to resolve server {strip_brackets(server)}: Name or service not known")
    if folder is None or not answers(server):
        raise MountError(f"mount.nfs: Connection timed out for {source}")
    wanted = os.path.normpath(path)
    inside = os.path.normpath(folder + wanted)
    if not os.path.isdir(inside):
        raise MountError(f"mount.nfs: mounting {source} failed, reason given by server: No such file or directory")
    for exported, _clients in exports(server):
        exported = os.path.normpath(exported)
        if exported == "/" or wanted == exported or wanted.startswith(exported + "/"):
            return server, inside, wanted
    raise MountError(f"mount.nfs: access denied by server while mounting {source}")


def mount(source: str, target: str, options: str = "") -> None:
    """mount -t nfs SOURCE TARGET -o OPTIONS."""
    if not os.path.isdir(target):
        raise MountError(f"mount.nfs: mount point {target} does not exist")
    version = _check_options(options, target)
    server, folder, _path = _exported_folder(source)
    if version == "3" and not has_mountd(server):
        raise MountError(f"mount.nfs: Connection refused for {source}")
    target = os.path.realpath(target)
    words = [w for w in options.split(",") if w]
    with table_lock(True):
        table = entries()
        if any(e["source"] == source and e["target"] == target for e in table):
            raise MountError(f"mount.nfs: {target} is busy or already mounted or sharecache fail")
        done = subprocess.run([MOUNT, "--bind", folder, target], capture_output=True, text=True, check=False)
        if done.returncode:
            raise MountError(done.stderr.strip() or "mount failed", done.returncode)
        if "ro" in words:
            subprocess.run([MOUNT, "-o", "remount,bind,ro", target], check=False)
        on_top = [fields for fields in mountinfo() if unescape(fields[4]) == target][-1]
        table.append({"source": source, "target": target, "id": on_top[0], "folder": folder,
                      "version": version, "options": words, "server": strip_brackets(server)})
        _write(table)


def is_mounted(server: str, export: str, path: str, table: list[dict[str, Any]]) -> bool:
    """NFSPlugin's question: is exactly this source mounted exactly there?"""
    source = f"{bracketed(server)}:{export}"
    return any(e["target"] == path and e["source"] in (source, source + "/") for e in table)


def bracketed(server: str) -> str:
    try:
        return f"[{server}]" if ipaddress.ip_address(server).version == 6 else server
    except ValueError:
        return server


def umount(args: list[str]) -> int:
    """umount for our mounts: `args` as given, a source is replaced by its mount point."""
    with table_lock(True):
        table = entries()
        words = []
        for arg in args:
            matching = [e["target"] for e in table if e["source"] in (arg, arg.rstrip("/"))]
            words.append(matching[-1] if matching and not arg.startswith("-") else arg)
        code = subprocess.run([UMOUNT, *words], check=False).returncode
        _write(entries())
        return code


# --- what the real tools would show --------------------------------------------------------

def kernel_options(entry: dict[str, Any], vfs_options: str) -> tuple[str, str, str]:
    """(file system type, mount options, super options) as the kernel reports an nfs mount."""
    version, words = entry["version"], entry["options"]
    given = dict(w.split("=", 1) for w in words if "=" in w)
    address = entry["server"]
    if not re.fullmatch(r"[0-9.]+|.*:.*", address):
        try:
            address = socket.getaddrinfo(address, None, socket.AF_INET)[0][4][0]
        except OSError:
            pass
    protocol = "tcp6" if ":" in str(address) else "tcp"
    access = "ro" if "ro" in vfs_options.split(",") else "rw"
    kept = "soft" if "soft" in words else "hard"
    options = [access, f"vers={version}", f"rsize={given.get('rsize', '1048576')}",
               f"wsize={given.get('wsize', '1048576')}", "namlen=255", kept]
    if "noresvport" in words:
        options.append("noresvport")
    options += [f"proto={given.get('proto', protocol)}", f"timeo={given.get('timeo', '600')}",
                f"retrans={given.get('retrans', '2')}", f"sec={given.get('sec', 'sys')}"]
    if version == "3":
        options += [f"mountaddr={address}", "mountvers=3", "mountport=20048", "mountproto=udp"]
    else:
        options.append(f"clientaddr={given.get('clientaddr', address)}")
    options += ["local_lock=none", f"addr={address}"]
    kind = "nfs" if version == "3" else "nfs4"
    return kind, vfs_options, ",".join(options)


def patched_mountinfo() -> str:
    """/proc/self/mountinfo with our bind mounts told as nfs mounts; call it with the lock held."""
    ours = {(e["id"], e["target"]): e for e in entries()}
    lines = []
    for number, fields in enumerate(mountinfo()):
        entry = ours.get((fields[0], unescape(fields[4])))
        if entry:
            dash = fields.index("-")
            kind, vfs, superblock = kernel_options(entry, fields[5])
            fields = [fields[0], fields[1], f"0:{100 + number}", "/", fields[4], vfs, *fields[6:dash],
                      "-", kind, escape(entry["source"]), superblock]
        lines.append(" ".join(fields))
    return "\n".join(lines) + "\n"


if os.path.exists(os.path.join(os.path.dirname(os.path.realpath(__file__)), "real-nfs")):
    from nfs_real import answers, exports, has_mountd, mount, mounts, server_folder  # noqa: E402, F401, F811
