"""/etc/pve: files, cluster locks, section configurations, datacenter.cfg.

The stand-in keeps the same files as pmxcfs in a plain directory. Texts are read and
written as Latin-1, one character per byte, which is what Perl does with a file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import signal
import socket
import time
from typing import Any, Callable, TypeVar
from urllib.parse import quote, unquote_to_bytes

from pve_output import err
from pve_schema import Props, PveError, check_prop, split_list

ROOT = "/etc/pve"
LOCKS = f"{ROOT}/priv/lock"
LOCK_STALE = 120        # seconds after which pmxcfs breaks a lock nobody refreshed
LOCK_WAIT = 10
LOCK_HELD_AT_MOST = 60

T = TypeVar("T")


def nodename() -> str:
    return socket.gethostname().split(".")[0]


def read(name: str) -> str:
    """A file of /etc/pve, '' when there is none (as cfs_read_file sees it)."""
    try:
        with open(f"{ROOT}/{name}", encoding="latin-1", newline="") as handle:
            return handle.read()
    except FileNotFoundError:
        return ""


def write(name: str, text: str, mode: int = 0o640) -> None:
    """Replace the whole file by one rename."""
    path = f"{ROOT}/{name}"
    temporary = f"{path}.tmp.{os.getpid()}"
    try:
        with open(temporary, "wb") as handle:
            os.fchmod(handle.fileno(), mode)
            handle.write(text.encode("latin-1"))
        os.rename(temporary, path)
    except OSError as error:
        raise PveError(f"unable to write '{path}' - {error.strerror}\n", error.errno or 255) from error


def digest(text: str) -> str:
    return hashlib.sha1(text.encode("latin-1")).hexdigest()


def assert_if_modified(current: str, wanted: str | None) -> None:
    if wanted and wanted != current:
        raise PveError("detected modified configuration - file changed by other user? Try again.\n")


def encode_text(text: str) -> str:
    """Percent-encode as PVE::Tools::encode_text: control characters, `%`, `:` stay safe in a line."""
    return quote(text.encode("utf-8"), safe=" !\"#$&'()*+,-./;<=>?@[\\]^_`{|}~")


def decode_text(text: str) -> str:
    return unquote_to_bytes(text.encode("latin-1")).decode("utf-8", "replace")


# --- cluster locks ------------------------------------------------------------------

def locked_file(name: str, action: Callable[[], T]) -> T:
    """cfs_lock_file: `storage.cfg` is the lock `file-storage_cfg`."""
    return locked("file-" + re.sub(r"[./]", "_", name), action)


def locked(lock: str, action: Callable[[], T]) -> T:
    """A directory is the lock: 10 s of waiting, at most 60 s of holding, stale after 120 s."""
    path = f"{LOCKS}/{lock}"
    os.makedirs(LOCKS, mode=0o700, exist_ok=True)
    waited = 0.0
    while True:
        try:
            os.mkdir(path, 0o700)
            break
        except FileExistsError:
            _break_stale(path)
        # The nearer the end, the shorter the pause; a word once per whole second.
        pause = max(LOCK_WAIT - int(waited), 1) * 0.1
        if waited + pause >= LOCK_WAIT:
            raise PveError(f"cfs-lock '{lock}' error: got lock request timeout\n", errno.EEXIST)
        if int(waited + pause) > int(waited):
            err(f"trying to acquire cfs lock '{lock}' ...\n")
        time.sleep(pause)
        waited += pause

    def too_long(_signal: int, _frame: Any) -> None:
        raise PveError(f"'{lock}'-locked command timed out - aborting\n")
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LOCK_HELD_AT_MOST)
    try:
        return action()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        try:
            os.rmdir(path)
        except OSError:
            pass


def _break_stale(path: str) -> None:
    # Breaking is itself under a lock, and the age is looked at inside: nobody removes a
    # lock that was taken a moment ago.
    os.makedirs("/run/lock", exist_ok=True)
    with open("/run/lock/pve-stale-locks", "w", encoding="ascii") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        try:
            if time.time() - os.stat(path).st_mtime >= LOCK_STALE:
                os.rmdir(path)
        except OSError:
            pass


def lock_file(path: str, seconds: float, action: Callable[[], T]) -> T:
    """PVE::Tools::lock_file: a flock, with the words on stderr that come when it is contended."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            err("trying to acquire lock...\n")

            def too_late(_signal: int, _frame: Any) -> None:
                raise InterruptedError
            previous = signal.signal(signal.SIGALRM, too_late)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except InterruptedError:
                raise PveError(f"can't lock file '{path}' - got timeout\n", errno.EINTR) from None
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, previous)
            err(" OK\n")
        return action()


# --- section configurations -----------------------------------------------------------

class SectionConfig:
    """Files like storage.cfg and jobs.cfg.

    `types` says per section type which properties it takes and which of them are
    `optional` or `fixed`; `props` is the schema of each property. `decode`/`encode`
    turn a property's text into what the code works with, and back.
    """

    def __init__(self, types: dict[str, dict[str, dict[str, int]]], props: Props,
                 decode: Callable[[str, str, Any], Any] = lambda t, k, v: v,
                 encode: Callable[[str, str, Any], Any] = lambda t, k, v: v,
                 check_header: Callable[[str], None] = lambda ident: None,
                 complete: Callable[[str, str, dict[str, Any]], None] = lambda kind, ident, config: None):
        self.types, self.props, self.decode, self.encode = types, props, decode, encode
        self.check_header, self.complete = check_header, complete
        self.broken: list[str] = []     # sections that were there and could not be understood

    def check_value(self, kind: str, key: str, value: Any, skip_schema: bool = False) -> Any:
        if key == "type" and value == kind:
            return value
        options = self.types.get(kind)
        if options is None:
            raise PveError(f"unknown section type '{kind}'\n")
        if key not in options:
            raise PveError(f"unexpected property '{key}'\n", 2)
        schema = self.props[key]
        if schema.get("type") == "boolean" and value is None:
            value = 1
        if value is None:
            raise PveError("got undefined value\n")
        items = value if isinstance(value, list) else [value]
        if any("\n" in str(v) or "\r" in str(v) for v in items):
            raise PveError("property contains a line feed\n")
        if not skip_schema:
            errors: dict[str, str] = {}
            check_prop(value, schema, "", errors)
            if errors:
                raise PveError((errors.get(key) or errors.get("_root") or "unknown error") + "\n")
        if schema.get("type") in ("boolean", "integer", "number") and not isinstance(value, list):
            try:
                return int(value)
            except ValueError:
                return 0
        return value

    def check_config(self, kind: str, config: dict[str, Any], create: bool, skip_schema: bool = False,
                     parsing: bool = False) -> dict[str, Any]:
        options = self.types.get(kind, {})
        result: dict[str, Any] = {"type": kind}
        for key, value in config.items():
            if key == "type":
                continue
            if not create and options.get(key, {}).get("fixed"):
                raise PveError(f"can't change value of fixed parameter '{key}'\n")
            checked = self.check_value(kind, key, value, skip_schema)
            decoded = self.decode(kind, key, checked)
            if decoded is not None or checked is None:
                result[key] = decoded
        if create:
            for key, option in options.items():
                if not option.get("optional") and key not in config:
                    raise PveError(f"missing value for required option '{key}'\n", 255 if parsing else 2)
        return result

    def parse(self, name: str, text: str) -> dict[str, dict[str, Any]]:
        """Sections in file order. What cannot be read is complained about and left out."""
        sections: dict[str, dict[str, Any]] = {}
        self.broken = []
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if not re.match(r"\s*#", line)]
        at = 0
        while at < len(lines):
            number, line = lines[at]
            at += 1
            if not line:
                continue
            where = f"file {ROOT}/{name} line {number}"
            header = re.fullmatch(r"(\S+):\s*(\S+)\s*", line)
            if not header:
                err(f"{where} - ignore config line: {line}\n")
                continue
            kind, ident = header.groups()
            skip = kind not in self.types
            if not skip:
                try:
                    self.check_header(ident)
                except PveError as error:
                    skip = True
                    err(f"{where} (skip section '{ident}'): {error.text()}")
            else:
                err(f"{where} (skip section '{ident}'): unsupported type '{kind}'\n")
            config: dict[str, Any] = {}
            while at < len(lines) and lines[at][1]:
                number, line = lines[at]
                at += 1
                if skip:
                    continue
                where = f"file {ROOT}/{name} line {number}"
                match = re.fullmatch(r"\s+(\S+)(?:\s+(.*\S))?\s*", line)
                if not match:
                    err(f"{where} (section '{ident}') - ignore config line: {line}\n")
                    continue
                key, value = match.groups()
                try:
                    if key not in self.props:
                        raise PveError("unknown property type\n")
                    if self.props[key].get("type") == "array":
                        config.setdefault(key, []).append(value)
                    elif key in config:
                        raise PveError("duplicate attribute\n")
                    else:
                        config[key] = self.check_value(kind, key, value)
                except PveError as error:
                    err(f"{where} (section '{ident}') - unable to parse value of '{key}': {error.text()}")
            if not skip:
                try:
                    self.complete(kind, ident, config)
                    sections[ident] = self.check_config(kind, config, True, True, True)
                except PveError as error:
                    err(f"{where} (skip section '{ident}'): {error.text()}")
                    self.broken.append(ident)
        return sections

    def format(self, sections: dict[str, dict[str, Any]]) -> str:
        if self.broken:     # the real one keeps an entry without a type, and then fails over it
            raise PveError("unknown section type ''\n")
        text = ""
        for ident, config in sections.items():
            kind = config["type"]
            options = self.types[kind]
            text += f"{kind}: {ident}\n"
            done = {"type", "comment", "disable"}
            if config.get("comment"):
                text += self._line("comment", self.encode(kind, "comment", config["comment"]))
            if config.get("disable"):
                text += "\tdisable\n"
            for wanted in (False, True):
                for key in sorted(options):
                    if key in done or bool(options[key].get("optional")) != wanted:
                        continue
                    if config.get(key) is None:
                        if not wanted:
                            raise PveError(f"section '{ident}' - missing value for required option '{key}'\n")
                        continue
                    done.add(key)
                    text += self._line(key, self.encode(kind, key, config[key]))
            text += "\n"
        return text

    def _line(self, key: str, value: Any) -> str:
        if isinstance(value, list):
            return "".join(f"\t{key} {v}\n" for v in value if v != "")
        if "\n" in str(value) or "\r" in str(value):
            raise PveError(f"property '{key}' contains a line feed\n")
        if self.props.get(key, {}).get("type") == "boolean":
            return f"\t{key} {1 if value and value != '0' else 0}\n"
        return f"\t{key} {value}\n" if str(value) != "" else ""


def delete_from_config(config: dict[str, Any], options: dict[str, dict[str, int]],
                       new: dict[str, Any], names: list[str]) -> None:
    for name in names:
        option = options.get(name)
        if option is None:
            raise PveError(f"no such option '{name}'\n")
        if not option.get("optional"):
            raise PveError(f"unable to delete required option '{name}'\n")
        if option.get("fixed"):
            raise PveError(f"unable to delete fixed option '{name}'\n")
        if new.get(name) is not None:
            raise PveError(f"cannot set and delete property '{name}' at the same time!\n")
        config.pop(name, None)


def shuffled(names: Any) -> list[Any]:
    """Perl's hash order: another one in each process."""
    result = list(names)
    random.SystemRandom().shuffle(result)
    return result


# --- guests and pools, as far as others than the guests' own commands look at them -------

def guests(node: str | None = None) -> dict[int, dict[str, str]]:
    """vmid -> {node, type}: every configuration file under /etc/pve/nodes."""
    found: dict[int, dict[str, str]] = {}
    base = f"{ROOT}/nodes"
    for name in sorted(os.listdir(base)) if os.path.isdir(base) else []:
        if node and name != node:
            continue
        for folder, kind in (("qemu-server", "qemu"), ("lxc", "lxc")):
            path = f"{base}/{name}/{folder}"
            for file in sorted(os.listdir(path)) if os.path.isdir(path) else []:
                match = re.fullmatch(r"([1-9]\d{2,8})\.conf", file)
                if match:
                    found[int(match[1])] = {"node": name, "type": kind, "path": f"{path}/{file}"}
    return dict(sorted(found.items()))


def guest_config(vmid: int) -> dict[str, str]:
    """The active part of a guest's configuration (above the first snapshot or pending section)."""
    entry = guests().get(vmid)
    if entry is None:
        return {}
    config: dict[str, str] = {}
    comment = ""
    with open(entry["path"], encoding="latin-1") as handle:
        for line in handle.read().split("\n"):
            if re.match(r"\[.+\]\s*$", line):
                break
            if line.startswith("#"):
                comment += decode_text(line[1:]) + "\n"
                continue
            match = re.fullmatch(r"([a-z][a-z_\-]*\d*):\s*(.*?)\s*", line)
            if match:
                config[match[1]] = match[2]
    if comment:
        config["description"] = comment
    return config


def pools() -> dict[str, dict[str, Any]]:
    """Pools of user.cfg: `pool:ID:COMMENT:VMIDS:STORAGES:`."""
    found: dict[str, dict[str, Any]] = {}
    for line in read("user.cfg").split("\n"):
        parts = line.strip().split(":")
        if parts[0] == "pool" and len(parts) >= 5:
            found[parts[1]] = {"comment": decode_text(parts[2]), "vms": [int(v) for v in split_list(parts[3])],
                               "storages": split_list(parts[4])}
    return found


def write_pools(all_pools: dict[str, dict[str, Any]]) -> None:
    kept = [line for line in read("user.cfg").split("\n") if line.strip() and not line.startswith("pool:")]
    if not any(line.startswith("user:root@pam:") for line in kept):
        kept.insert(0, "user:root@pam:1:0::::::")
    text = "\n".join(kept) + "\n\n\n"
    for name in sorted(all_pools):
        pool = all_pools[name]
        text += "pool:%s:%s:%s:%s:\n" % (name, encode_text(pool.get("comment", "")),
                                         ",".join(str(v) for v in sorted(pool["vms"])),
                                         ",".join(sorted(pool["storages"])))
    write("user.cfg", text + "\n\n")


