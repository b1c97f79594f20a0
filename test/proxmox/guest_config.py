"""Guests' configuration files and their locks.

A configuration is a dict: options as strings (booleans and integers as int, as Proxmox's parser has them), plus
`digest`, `snapshots` {name: dict} and `pending` {option: value, "delete": "a,!b"}. Files are those of the real thing:
/etc/pve/nodes/<node>/qemu-server/<vmid>.conf (and /etc/pve/qemu-server as a link), /var/lock/qemu-server/lock-<vmid>.conf.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import random
import re
import signal
import tempfile
import time
import uuid
from urllib.parse import unquote

import misbehave
from guest_schema import CONFIG, DRIVE_FORMATS, DRIVES, NET, SMBIOS1
from pve_cluster import nodename as node_name
from pve_output import err
from pve_schema import PveError, check_format, parse_boolean, parse_property_string, print_property_string, split_list

LOCK_DIR = "/var/lock/qemu-server"
SECTIONS = ("digest", "snapshots", "pending")


def directory(node=None):
    return f"/etc/pve/nodes/{node or node_name()}/qemu-server"


def config_file(vmid, node=None):
    return f"{directory(node)}/{vmid}.conf"


# ---------------------------------------------------------------- locks

@contextlib.contextmanager
def file_lock(filename, timeout, shared=False):
    """A flock as lock_file_full takes it: it says when it waits, and gives up after `timeout` seconds."""
    os.makedirs(os.path.dirname(filename), exist_ok=True)
    handle = open(filename, "a")
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            err("trying to acquire lock...\n")
            wait_for(handle, mode, filename, timeout)
            err(" OK\n")
        yield
    finally:
        handle.close()


class _TimedOut(BaseException):
    pass


def wait_for(handle, mode, filename, timeout):
    def alarm(_signal, _frame):
        raise _TimedOut()

    left = signal.alarm(0)  # an outer alarm (reading a header) goes on afterwards
    old = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        fcntl.flock(handle, mode)
    except _TimedOut:
        raise PveError(f"can't lock file '{filename}' - got timeout\n", 4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        if left:
            signal.alarm(left)


def config_lock(vmid, timeout=10, shared=False):
    return file_lock(f"{LOCK_DIR}/lock-{vmid}.conf", timeout, shared)


# ---------------------------------------------------------------- reading and writing

def encode_text(text):
    return "".join(chr(b) if 0x20 <= b <= 0x7E and b not in (0x25, 0x3A) else f"%{b:02X}" for b in text.encode())


def decode_text(text):
    return unquote(text, errors="replace")


def _typed(key, value):
    schema = CONFIG.get(key)
    if schema is None:
        raise PveError(f"unknown setting '{key}'\n")
    if re.search(r"[\n\r]", str(value)):
        raise PveError("property contains a line feed\n")
    kind = schema["type"]
    if kind == "boolean":
        parsed = parse_boolean(value)
        if parsed is None:
            raise PveError(f"type check ('boolean') failed - got '{value}'\n")
        return parsed
    if kind == "integer":
        if not re.fullmatch(r"\d+", str(value)):
            raise PveError(f"type check ('integer') failed - got '{value}'\n")
        return int(value)
    if kind == "number":
        if not re.fullmatch(r"\d+(\.\d+)?", str(value)):
            raise PveError(f"type check ('number') failed - got '{value}'\n")
        return value
    if schema.get("format"):
        check_format(schema["format"], value, "")
        return value
    return re.sub(r'^"(.*)"$', r"\1", value)


def parse(vmid, raw, warn=None):
    warn = warn or (lambda line: err(line + "\n"))
    top = {"digest": hashlib.sha1(raw.encode("utf-8", "surrogateescape")).hexdigest(), "snapshots": {}, "pending": {}}
    section, description, name = top, [], ""

    def finish():
        if description:
            section["description"] = "".join(description).rstrip()
            description.clear()

    for line in raw.split("\n"):
        if not line.strip():
            continue
        header = re.fullmatch(r"\[([^\]]*)\]\s*", line)
        if header:
            finish()
            name = header[1]
            if name.upper() == "PENDING":
                section = top["pending"]
            elif re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_\-]+", name):
                section = top["snapshots"][name] = {}
            else:
                if not name.startswith("special:"):
                    warn(f"vm {vmid} - skipping unknown section: '{name}'")
                section = {}
            continue
        if line.startswith("#"):
            description.append(decode_text(line[1:]) + "\n")
            continue
        match = re.fullmatch(r"([a-z][a-z_\-]*\d*):\s*(.+?)\s*", line)
        if not match:
            warn(f"vm {vmid} - unable to parse config: {line}")
            continue
        key, value = match.groups()
        if key == "description":
            description.append(decode_text(value))
        elif key in ("snapstate", "args") or (key == "delete" and section is top["pending"]):
            section[key] = value
        else:
            try:
                section["ide2" if key == "cdrom" else key] = _typed(key, value)
            except PveError as error:
                warn(f"vm {vmid} - unable to parse value of '{key}' - {error.text().rstrip()}")
    finish()
    return top


def render(conf):
    used = {parse_drive(k, v)["file"] for k, v in conf.items() if k in DRIVES and parse_drive(k, v)}
    for key in [k for k, v in conf.items() if k.startswith("unused") and v in used]:
        del conf[key]  # a disk that is attached again is no longer unused

    def body(part, pending=False):
        lines = []
        if part.get("description"):
            lines += ["#" + encode_text(line) for line in part["description"].rstrip("\n").split("\n")]
        elif "description" in part and pending:
            lines.append("#")
        for key in sorted(k for k in part if k not in SECTIONS and k != "description"):
            if key not in ("delete", "snapstate"):
                try:
                    part[key] = _typed(key, part[key])
                except PveError as error:
                    raise PveError(f"unable to parse value of '{key}' - {error.text()}")
            lines.append(f"{key}: {part[key]}")
        return "".join(line + "\n" for line in lines)

    raw = body(conf)
    if conf.get("pending"):
        raw += "\n[PENDING]\n" + body(conf["pending"], True)
    for name in sorted(conf.get("snapshots") or {}):
        raw += f"\n[{name}]\n" + body(conf["snapshots"][name])
    return raw


def write_raw(vmid, raw):
    """One rename, as in pmxcfs: nobody sees half a file."""
    file = config_file(vmid)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=f".{vmid}.conf.", dir=os.path.dirname(file))
    with open(fd, "w", encoding="utf-8", errors="surrogateescape") as handle:
        handle.write(raw)
    os.chmod(temporary, 0o640)
    os.rename(temporary, file)


def write(vmid, conf):
    write_raw(vmid, render(conf))


def read_raw(vmid, node=None):
    with open(config_file(vmid, node), encoding="utf-8", errors="surrogateescape") as handle:
        return handle.read()


def load(vmid, node=None):
    try:
        return parse(vmid, read_raw(vmid, node))
    except FileNotFoundError:
        raise PveError(f"Configuration file 'nodes/{node or node_name()}/qemu-server/{vmid}.conf' does not exist\n", 2)


def load_current(vmid, current=False):
    """The configuration with pending changes merged in, unless `current`."""
    conf = load(vmid)
    if not current:
        for key, value in conf["pending"].items():
            if key != "delete":
                conf[key] = value
        for key in pending_delete(conf):
            conf.pop(key, None)
    del conf["snapshots"], conf["pending"]
    return conf


def pending_delete(conf):
    """{option: forced}"""
    return {word.lstrip("!"): word.startswith("!") for word in split_list(conf["pending"].get("delete", ""))}


def remove(vmid):
    try:
        os.unlink(config_file(vmid))
    except OSError as error:
        raise PveError(f"failed to remove config file: {error.strerror}\n")


def all_ids():
    """{vmid: node} of the virtual machines of all nodes."""
    found = {}
    for file in glob.glob("/etc/pve/nodes/*/qemu-server/*.conf"):
        name = os.path.basename(file)[:-5]
        if re.fullmatch(r"[1-9]\d{2,8}", name):
            found[int(name)] = file.split("/")[4]
    return found


def local_ids():
    return sorted(vmid for vmid, node in all_ids().items() if node == node_name())


def assert_unused(vmid, allow_existing=False):
    """check_vmid_unused: virtual machines and containers of all nodes count."""
    node = all_ids().get(int(vmid))
    if node:
        if allow_existing and node == node_name():
            return
        raise PveError(f"VM {vmid} already exists on node '{node}'\n")
    for file in glob.glob(f"/etc/pve/nodes/*/lxc/{vmid}.conf"):
        raise PveError(f"CT {vmid} already exists on node '{file.split('/')[4]}'\n")


def assert_unlocked(conf):
    if conf.get("lock"):
        raise PveError(f"VM is locked ({conf['lock']})\n")


def assert_unprotected(conf, what):
    if conf.get("protection"):
        raise PveError(f"{what} - protection mode enabled\n")


def create_and_lock(vmid, allow_existing, lock="create"):
    """Reserve an id: a configuration with only a lock line in it. Waits for the flock for 5 s, no longer."""
    with config_lock(vmid, misbehave.setting("reserve-seconds", 5)):
        assert_unused(vmid, allow_existing)
        conf = load(vmid) if os.path.exists(config_file(vmid)) else {}
        assert_unlocked(conf)
        conf["lock"] = lock
        write(vmid, conf)


def remove_lock(vmid, lock):
    with config_lock(vmid):
        conf = load(vmid)
        wanted = f"'{lock}' " if lock else "any"
        if not conf.get("lock"):
            raise PveError(f"no lock found trying to remove {wanted} lock\n")
        if lock and conf["lock"] != lock:
            raise PveError(f"found lock '{conf['lock']}' trying to remove '{lock}' lock\n")
        del conf["lock"]
        write(vmid, conf)


# ---------------------------------------------------------------- parts of a configuration

def drive_format(key):
    return DRIVE_FORMATS[re.sub(r"\d+$", "", key)]


def parse_drive(key, value):
    try:
        drive = parse_property_string(drive_format(key), value)
    except PveError:
        return None
    if drive.get("size") is not None:
        drive["size"] = size_in_bytes(drive["size"])
    return drive


def print_drive(key, drive):
    shown = dict(drive)
    if isinstance(shown.get("size"), int):
        shown["size"] = format_size(shown["size"])
    return print_property_string(shown, drive_format(key))


def size_in_bytes(text):
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])?", str(text))
    if not match:
        return None
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def format_size(size):
    for unit in ("", "K", "M", "G"):
        if size % 1024 or not size:
            return f"{size}{unit}"
        size //= 1024
    return f"{size}T"


def is_cdrom(drive, exclude_cloudinit=False):
    if exclude_cloudinit and is_cloudinit(drive):
        return False
    return drive.get("media") == "cdrom"


def is_cloudinit(drive):
    return bool(re.search(r"[:/](?:vm-\d+-)?cloudinit(?:\.\w+)?$", drive.get("file", "")))


def drives(conf, unused=False):
    """(key, drive) of all drives in Proxmox's order."""
    keys = list(DRIVES) + ([f"unused{n}" for n in range(256)] if unused else [])
    for key in keys:
        if key in conf:
            drive = parse_drive(key, conf[key])
            if drive:
                yield key, drive


def add_unused(conf, volid):
    for key, value in conf.items():
        if key.startswith("unused") and value == volid:
            return key
    free = next((f"unused{n}" for n in range(256) if f"unused{n}" not in conf), None)
    if not free:
        raise PveError("Too many unused volumes - please delete them first.\n")
    conf[free] = volid
    return free


def random_mac():
    prefix = "BC:24:11"
    with contextlib.suppress(OSError), open("/etc/pve/datacenter.cfg") as handle:
        match = re.search(r"^mac_prefix:\s*(\S+)", handle.read(), re.M)
        prefix = match[1] if match else prefix
    given = prefix.split(":")
    return ":".join(given + [f"{random.randrange(256):02X}" for _ in range(6 - len(given))]).upper()


def normal_net(value, new_mac=False):
    """A net option as it is stored: with a MAC address, in the form model=MAC."""
    net = parse_property_string(NET, value)
    if new_mac or not net.get("macaddr"):
        net["macaddr"] = random_mac()
    mac = net.pop("macaddr")
    model = net.pop("model")
    rest = print_property_string({**net}, {k: v for k, v in NET.items() if k != "model"})
    return f"{model}={mac}" + (f",{rest}" if rest else "")


def new_smbios_uuid(value=""):
    smbios = parse_property_string(SMBIOS1, value or "")
    smbios["uuid"] = str(uuid.uuid4())
    return print_property_string(smbios, SMBIOS1)


def unique_tags(text):
    return ";".join(sorted({tag.lower() for tag in split_list(text)}))


def memory_of(conf):
    return int(re.sub(r"^current=", "", str(conf.get("memory") or "512")))


def meta():
    return f"creation-qemu=10.0.13,ctime={int(time.time())}"


def shell_quote(word):
    return word if re.fullmatch(r"[\w!%+,\-./:@^]+", word, re.A) else "'" + word.replace("'", "'\\''") + "'"


# ---------------------------------------------------------------- running: a flag, as no machine runs here

def pid_file(vmid):
    return f"/run/qemu-server/{vmid}.pid"


def is_running(vmid):
    return os.path.exists(pid_file(vmid))
