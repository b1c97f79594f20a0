"""Storages and the volumes on them: what PVE::Storage and its directory plugins do.

Directory-like storages (dir, nfs) work fully; the other types can be configured and
listed, but using one fails as on a machine without it, or is refused as not covered.
"""

from __future__ import annotations

import os
import re
from typing import Any, Callable, TypeVar

import misbehave
import nfs
import pve_cluster as cluster
import thin
from pve_output import err
from pve_schema import (NotCovered, Props, PveError, PveException, parse_id, register_format, split_list)

T = TypeVar("T")
Config = dict[str, Any]          # one storage: decoded properties plus `type`

CONTENT_ORDER = ("rootdir", "images", "vztmpl", "iso", "backup", "snippets", "import")
SUBDIRS = {"images": "images", "rootdir": "private", "iso": "template/iso", "vztmpl": "template/cache",
           "backup": "dump", "snippets": "snippets", "import": "import"}
BACKUP_EXT = r"\.(tgz|(?:tar|vma)(?:\.(gz|lzo|zst|bz2))?)"

# --- formats -------------------------------------------------------------------------

_KEEP = {"type": "integer", "minimum": 0, "optional": 1, "typetext": "<N>"}
PRUNE_BACKUPS: Props = {"keep-all": {"type": "boolean", "optional": 1}}
PRUNE_BACKUPS.update({f"keep-{k}": dict(_KEEP) for k in ("last", "hourly", "daily", "weekly", "monthly", "yearly")})
BWLIMIT: Props = {k: {"type": "number", "minimum": 0, "optional": 1}
                  for k in ("default", "restore", "migration", "clone", "move")}


def _validate_prune(keep: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in keep.items() if k != "keep-all"}
    if not any(int(v) > 0 for v in rest.values()):
        return {"keep-all": 1}
    if keep.get("keep-all"):
        raise PveError("keep-all cannot be set together with other options.\n")
    return rest


def _check_content(value: str) -> str:
    if value not in ("none", *CONTENT_ORDER):
        raise PveError(f"invalid content type '{value}'\n")
    return value


def _check_dir_override(value: str) -> str:
    match = re.fullmatch(r"([a-z]+)=([^.]*(?:\.?[^.]+)+)", value)
    if match and _check_content(match[1]) and len(match[2]) < 1023 and all(len(p) < 255 for p in match[2].split("/")):
        return value
    raise PveError(f"invalid override '{value}'\n")


def parse_volume_id(volid: str) -> tuple[str, str]:
    match = re.fullmatch(r"([a-zA-Z][a-zA-Z0-9\-_.]*[a-zA-Z0-9]):(.+)", volid, re.S)
    if not match:
        raise PveError(f"unable to parse volume ID '{volid}'\n")
    return match[1], match[2]


def is_volume_id(text: str) -> bool:
    return re.fullmatch(r"[a-zA-Z][a-zA-Z0-9\-_.]*[a-zA-Z0-9]:.+", text, re.S) is not None


def _regex(pattern: str, complaint: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise PveError(complaint.replace("%s", value) + "\n")
        return value
    return check


register_format("prune-backups", PRUNE_BACKUPS, _validate_prune)
register_format("bwlimit", BWLIMIT)
register_format("pve-storage-content", _check_content)
register_format("pve-dir-override", _check_dir_override)
register_format("pve-storage-options", _regex(r"\S+", "invalid options '%s'"))
register_format("pve-storage-vgname", _regex(r"[a-zA-Z0-9][a-zA-Z0-9\-_.]*[a-zA-Z0-9]",
                                             "lvm name '%s' contains illegal characters"))
register_format("pve-storage-portal-dns", _regex(r"(?:[\w.\-]+|\[[0-9a-fA-F:]+\])(?::\d+)?",
                                                 "value does not look like a valid portal address"))
register_format("pve-storage-format", _regex(r"raw|qcow2|vmdk|subvol", "invalid format '%s'"))
register_format("pve-storage-zfs-blocksize", _regex(r"[1-9]\d*[kKmM]?", "invalid block size '%s'"))
register_format("pve-volume-id", parse_volume_id)

# --- the schema of storage.cfg ---------------------------------------------------------

_S = {"type": "string", "optional": 1}
_B = {"type": "boolean", "optional": 1}
PROPERTIES: Props = {
    "type": {"type": "string"},
    "storage": {"type": "string", "format": "pve-storage-id"},
    "nodes": {**_S, "format": "pve-node-list"},
    "content": {**_S, "format": "pve-storage-content-list"},
    "disable": _B, "shared": _B, "mkdir": _B, "create-base-path": _B, "create-subdirs": _B, "nocow": _B,
    "sparse": _B, "krbd": _B, "fuse": _B, "saferemove": _B, "tagged_only": _B, "nowritecache": _B,
    "skip-cert-verification": _B, "snapshot-as-volume-chain": _B,
    "prune-backups": {**_S, "format": "prune-backups"},
    "max-protected-backups": {"type": "integer", "minimum": -1, "optional": 1},
    "subdir": {**_S, "format": "pve-storage-path"}, "path": {**_S, "format": "pve-storage-path"},
    "export": {**_S, "format": "pve-storage-path"}, "mountpoint": {**_S, "format": "pve-storage-path"},
    "zfs-base-path": {**_S, "format": "pve-storage-path"},
    "server": {**_S, "format": "pve-storage-server"},
    "format": {**_S, "enum": ["raw", "qcow2", "subvol", "vmdk"]},
    "preallocation": {**_S, "enum": ["off", "metadata", "falloc", "full"]},
    "content-dirs": {**_S, "format": "pve-dir-override-list"},
    "options": {**_S, "format": "pve-storage-options"},
    "port": {"type": "integer", "minimum": 1, "maximum": 65535, "optional": 1},
    "is_mountpoint": _S, "bwlimit": {**_S, "format": "bwlimit"},
    "password": {**_S, "maxLength": 256}, "domain": {**_S, "maxLength": 256}, "share": _S,
    "smbversion": {**_S, "enum": ["default", "2.0", "2.1", "3", "3.0", "3.11"]},
    "fs-name": {**_S, "format": "pve-configid"},
    "target": _S, "portal": {**_S, "format": "pve-storage-portal-dns"},
    "vgname": {**_S, "format": "pve-storage-vgname"}, "thinpool": {**_S, "format": "pve-storage-vgname"},
    "base": {**_S, "format": "pve-volume-id"}, "saferemove_throughput": _S,
    "saferemove-stepsize": {"type": "integer", "enum": ["1", "2", "4", "8", "16", "32"], "optional": 1},
    "datastore": _S, "fingerprint": {**_S, "pattern": r"([A-Fa-f0-9]{2}:){31}[A-Fa-f0-9]{2}"},
    "encryption-key": _S, "master-pubkey": _S, "monhost": {**_S, "format": "pve-storage-portal-dns-list"},
    "pool": _S, "data-pool": _S, "namespace": _S, "username": _S, "authsupported": _S, "keyring": _S,
    "iscsiprovider": _S, "comstar_tg": _S, "comstar_hg": _S, "lio_tpg": _S,
    "blocksize": {**_S, "format": "pve-storage-zfs-blocksize"},
}


def _options(required: str, optional: str, fixed_optional: str = "") -> dict[str, dict[str, int]]:
    """Required options are fixed as well, in every type."""
    table = {k: {"fixed": 1} for k in required.split()}
    table.update({k: {"optional": 1} for k in optional.split()})
    table.update({k: {"optional": 1, "fixed": 1} for k in fixed_optional.split()})
    return table


_FILES = ("content content-dirs nodes disable prune-backups max-protected-backups format mkdir create-base-path "
          "create-subdirs ")
TYPES = {
    "dir": _options("path", _FILES + "shared is_mountpoint bwlimit preallocation", "snapshot-as-volume-chain"),
    "nfs": _options("path server export", _FILES + "options bwlimit preallocation", "snapshot-as-volume-chain"),
    "cifs": _options("path server share", _FILES + "subdir username password domain smbversion bwlimit "
                     "preallocation options", "snapshot-as-volume-chain"),
    "btrfs": _options("path", "nodes shared disable prune-backups max-protected-backups content format is_mountpoint "
                      "nocow mkdir create-base-path create-subdirs preallocation"),
    "cephfs": _options("path", _FILES + "monhost subdir options username fuse bwlimit keyring fs-name"),
    "pbs": _options("server datastore", "namespace port nodes disable content username password encryption-key "
                    "master-pubkey prune-backups max-protected-backups fingerprint"),
    "lvm": _options("vgname", "nodes shared disable saferemove saferemove-stepsize saferemove_throughput content "
                    "tagged_only bwlimit snapshot-as-volume-chain", "base"),
    "lvmthin": _options("thinpool vgname", "nodes disable content bwlimit"),
    "zfspool": _options("pool", "blocksize sparse nodes disable content bwlimit mountpoint"),
    "zfs": _options("portal target pool blocksize iscsiprovider", "nodes disable nowritecache sparse comstar_hg "
                    "comstar_tg lio_tpg content bwlimit zfs-base-path"),
    "iscsi": _options("portal target", "nodes disable content bwlimit"),
    "iscsidirect": _options("portal target", "nodes disable content bwlimit"),
    "rbd": _options("", "nodes disable monhost pool data-pool namespace username content krbd keyring bwlimit"),
    "esxi": {**_options("", "nodes shared disable content password skip-cert-verification port"),
             "server": {}, "username": {}},
}
TYPE_NAMES = sorted(TYPES)
_ALL = "images rootdir vztmpl iso backup snippets import"
CONTENT = {   # type -> (allowed, default)
    "dir": (_ALL + " none", "images rootdir"), "btrfs": (_ALL + " none", "images rootdir"),
    "nfs": (_ALL, "images"), "cifs": (_ALL, "images"),
    "cephfs": ("vztmpl iso backup snippets import", "backup"), "pbs": ("backup none", "backup"),
    "lvm": ("images rootdir", "images"), "lvmthin": ("images rootdir", "images rootdir"),
    "zfspool": ("images rootdir", "images rootdir"), "zfs": ("images", "images"), "rbd": ("images rootdir", "images"),
    "iscsi": ("images none", "images"), "iscsidirect": ("images none", "images"), "esxi": ("import", "import"),
}
FORMATS = {"dir": ("raw qcow2 vmdk subvol", "raw"), "nfs": ("raw qcow2 vmdk", "raw"),
           "cifs": ("raw qcow2 vmdk", "raw"), "btrfs": ("raw subvol", "raw"), "lvm": ("raw qcow2", "raw"),
           "zfspool": ("raw subvol", "raw"), "esxi": ("raw qcow2 vmdk", "raw")}
SHARED = {"iscsi", "nfs", "cifs", "rbd", "cephfs", "iscsidirect", "zfs", "pbs", "esxi"}


def _decode(kind: str, key: str, value: Any) -> Any:
    allowed = CONTENT[kind][0].split()
    if key == "content":
        chosen = []
        for word in split_list(value) if isinstance(value, str) else value:
            if word not in allowed:
                err(f"storage does not support content type '{word}'\n")
            elif word not in chosen:
                chosen.append(word)
        if "none" in chosen and len(chosen) > 1:
            raise PveError("unable to combine 'none' with other content types\n")
        if not chosen and "none" not in allowed:
            raise PveError("storage does not support content type 'none'\n")
        return chosen
    if key == "nodes":
        return list(dict.fromkeys(split_list(value))) if isinstance(value, str) else value
    if key == "content-dirs":
        found = {}
        for word in split_list(value) if isinstance(value, str) else []:
            content, path = word.split("=", 1)
            if content in allowed:
                found[content] = path
            else:
                err(f"storage does not support content type '{content}'\n")
        return found if isinstance(value, str) else value
    if key == "format" and value not in FORMATS.get(kind, (value, ""))[0].split():
        err(f"storage does not support format '{value}'\n")
    return value


def _encode(kind: str, key: str, value: Any) -> Any:
    if key == "content":
        return ",".join(cluster.shuffled(value)) or "none"
    if key == "nodes":
        return ",".join(cluster.shuffled(value))
    if key == "content-dirs":
        return ",".join(f"{k}={v}" for k, v in sorted(value.items()))
    return value


def _default_path(kind: str, ident: str, config: Config) -> None:
    if kind in ("nfs", "cifs", "cephfs") and not config.get("path"):
        config["path"] = f"/mnt/pve/{ident}"


SECTIONS = cluster.SectionConfig(TYPES, PROPERTIES, _decode, _encode, lambda ident: parse_id(ident, "storage") and None,
                                 _default_path)


def check_config(kind: str, ident: str, config: Config, create: bool) -> Config:
    """What a plugin's check_config adds to the common one."""
    config = dict(config)
    if create:
        _default_path(kind, ident, config)
    result = SECTIONS.check_config(kind, config, create, True)
    if create and kind in ("dir", "btrfs"):
        if not re.fullmatch(r"/[-/a-zA-Z0-9_.@]+", result["path"]):
            raise PveError(f"illegal path for directory storage: {result['path']}\n")
        result["path"] = re.sub(r"/(?:\./)*(?:\.$)?", "/", re.sub(r"/+", "/", result["path"])).rstrip("/")
    return result


class StorageConfig:
    """storage.cfg as read: `ids` in file order (an implicit `local` last), and the digest."""

    def __init__(self) -> None:
        text = cluster.read("storage.cfg")
        self.digest = cluster.digest(text)
        self.ids: dict[str, Config] = SECTIONS.parse("storage.cfg", text)
        self.broken = list(SECTIONS.broken)
        local = self.ids.get("local")
        if not local or local["type"] != "dir" or local.get("path", "/var/lib/vz") != "/var/lib/vz":
            self.ids.pop("local", None)
            self.ids["local"] = {"type": "dir", "path": "/var/lib/vz", "prune-backups": "keep-all=1",
                                 "content": ["backup", "images", "iso", "rootdir", "snippets", "vztmpl"]}
        self.ids["local"].pop("nodes", None)
        for scfg in self.ids.values():
            scfg.setdefault("content", CONTENT[scfg["type"]][1].split())
            if scfg["type"] in SHARED:
                scfg["shared"] = 1

    def write(self) -> None:
        cluster.write("storage.cfg", SECTIONS.format(self.ids))

    def get(self, ident: str) -> Config:
        if ident not in self.ids:
            raise PveError(f"storage '{ident}' does not exist\n")
        return self.ids[ident]

    def check_node(self, ident: str, node: str | None = None) -> Config:
        scfg = self.get(ident)
        node = cluster.nodename() if not node or node == "localhost" else node
        if scfg.get("nodes") and node not in scfg["nodes"]:
            raise PveError(f"storage '{ident}' is not available on node '{node}'\n")
        return scfg

    def check_enabled(self, ident: str, node: str | None = None) -> Config:
        if self.get(ident).get("disable"):
            raise PveError(f"storage '{ident}' is disabled\n")
        return self.check_node(ident, node)

    def is_enabled(self, ident: str, node: str | None = None) -> bool:
        try:
            self.check_enabled(ident, node)
            return True
        except PveError:
            return False

    def is_on_node(self, ident: str, node: str | None = None) -> bool:
        try:
            self.check_node(ident, node)
            return True
        except PveError:
            return False


def assert_whole(config: StorageConfig) -> None:
    """Whatever goes through all storages stumbles over a section that could not be read."""
    if config.broken:
        raise PveError(f"storage '{config.broken[0]}' does not exist\n")


def api_config(config: StorageConfig, ident: str) -> dict[str, Any]:
    """A storage as the API shows it: sets as text in random order, the file's digest."""
    shown = {k: v for k, v in config.get(ident).items() if k != "password"}
    for key in ("content", "nodes", "content-dirs"):
        if key in shown:
            shown[key] = _encode(shown["type"], key, shown[key])
    return {**shown, "storage": ident, "digest": config.digest}


def lock_config(action: Callable[[], T], failure: str) -> T:
    """Under the lock of storage.cfg; errors get their prefix."""
    try:
        return cluster.locked_file("storage.cfg", action)
    except PveException as error:
        raise PveError(f"{failure}: {error.text()}", error.exit_code) from error
    except PveError as error:
        raise PveError(f"{failure}: {error.message}", error.exit_code) from error


# --- activation -------------------------------------------------------------------------

class Cache:
    """One process's memory: the mount table is read once and then believed."""

    def __init__(self) -> None:
        self.activated: set[str] = set()
        self.mounts: list[dict[str, Any]] | None = None

    def mount_table(self) -> list[dict[str, Any]]:
        if self.mounts is None:
            self.mounts = nfs.mounts()
        return self.mounts


def _check_connection(ident: str, scfg: Config) -> bool:
    if scfg["type"] == "nfs":
        if "vers=4" in (scfg.get("options") or ""):
            return nfs.answers(scfg["server"])
        return nfs.has_mountd(scfg["server"])
    return True


def activate(config: StorageConfig, ident: str, cache: Cache | None = None) -> None:
    cache = cache or Cache()
    scfg = config.check_enabled(ident)
    if ident in cache.activated:
        return
    misbehave.point(f"storage.{ident}", "activate")
    if not _check_connection(ident, scfg):
        raise PveError(f"storage '{ident}' is not online\n", 1)
    kind = scfg["type"]
    if kind == "nfs":
        path = scfg["path"]
        if not nfs.is_mounted(scfg["server"], scfg["export"], path, cache.mount_table()):
            _make_base(scfg)
            if not os.path.isdir(path):
                raise PveError(f"unable to activate storage '{ident}' - directory '{path}' does not exist\n")
            try:
                nfs.mount(f"{nfs.bracketed(scfg['server'])}:{scfg['export']}", path, scfg.get("options") or "")
            except nfs.MountError as error:
                raise PveError(f"mount error: {error.text}\n", error.exit_code) from error
            misbehave.point(f"storage.{ident}", "mounted")
        _activate_directory(ident, scfg)
    elif kind == "dir":
        mountpoint = _is_mountpoint(scfg)
        if mountpoint and not os.path.ismount(mountpoint):
            raise PveError(f"unable to activate storage '{ident}' - directory is expected to be a mount point "
                           f"but is not mounted: '{mountpoint}'\n")
        _make_base(scfg)
        _activate_directory(ident, scfg)
    elif kind == "lvmthin" and thin.group_exists(scfg):
        pass
    elif kind == "lvm":
        pass    # volumes are activated one by one; a group that is not there shows only in the status
    elif kind == "lvmthin":
        raise PveError(f"no such volume group '{scfg['vgname']}'\n")
    elif kind == "zfspool":
        raise PveError(f"could not activate storage '{ident}', zfs error: cannot import '{scfg['pool']}': "
                       "no such pool available\n")
    else:
        raise NotCovered(f"activating a storage of type '{kind}'")
    cache.activated.add(ident)


def _is_mountpoint(scfg: Config) -> str | None:
    value = scfg.get("is_mountpoint")
    if value in (None, "", "0", "no", "off", "false"):
        return None
    return scfg["path"] if value in ("1", "yes", "on", "true") else value


def _make_base(scfg: Config) -> None:
    wanted = scfg.get("create-base-path", scfg.get("mkdir", 1))
    if wanted:
        try:
            os.makedirs(scfg["path"], exist_ok=True)
        except OSError as error:
            raise PveError(f"mkdir {scfg['path']}: {error.strerror}\n", error.errno or 255) from error


def subdir(scfg: Config, content: str) -> str:
    if "path" not in scfg:
        raise PveError("storage definition has no path\n")
    return f"{scfg['path']}/{scfg.get('content-dirs', {}).get(content, SUBDIRS[content])}"


def _activate_directory(ident: str, scfg: Config) -> None:
    if not os.path.isdir(scfg["path"]):
        raise PveError(f"unable to activate storage '{ident}' - directory '{scfg['path']}' does not exist "
                       "or is unreachable\n")
    content = scfg.get("content")
    if content is None:     # just being added without --content: the default comes with the next reading
        return
    if scfg.get("create-subdirs", 1) and scfg.get("mkdir", 1):
        for kind in sorted(SUBDIRS):
            if kind in content or (kind == "backup" and "rootdir" in content):
                try:
                    os.makedirs(subdir(scfg, kind), exist_ok=True)
                except OSError as error:
                    raise PveError(_subdir_failure(subdir(scfg, kind), kind, error)) from error
    seen: set[str] = set()
    for kind in sorted(c for c in content if c in SUBDIRS):
        path = os.path.realpath(subdir(scfg, kind))
        if not os.path.exists(path):
            continue
        if path in seen:
            raise PveError(f"storage '{ident}' uses directory {path} for multiple content types\n")
        seen.add(path)


def _subdir_failure(path: str, kind: str, error: OSError) -> str:
    text = f"failed to create content directory '{path}' for content '{kind}' - mkdir {path}: {error.strerror}"
    if error.errno in (13, 30):
        text += " - ensure that you have read and write access to your storage!"
    return text + "\n"


def _status(scfg: Config, cache: Cache) -> tuple[int, int, int] | None:
    """(total, available, used) in bytes; None while the (cached!) mount table does not show the storage."""
    if scfg["type"] == "nfs" and not nfs.is_mounted(scfg["server"], scfg["export"], scfg["path"],
                                                    cache.mount_table()):
        return None
    if scfg["type"] in thin.TYPES:
        return thin.status(scfg) if thin.group_exists(scfg) else None
    mountpoint = _is_mountpoint(scfg)
    if mountpoint and not os.path.ismount(mountpoint):
        return None
    try:
        stat = os.statvfs(scfg["path"])
    except OSError:
        return None
    if not stat.f_blocks:
        return None
    return (stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize,
            (stat.f_blocks - stat.f_bfree) * stat.f_frsize)


def storage_info(config: StorageConfig, content: str | None = None, formats: bool = False) -> dict[str, dict]:
    """Every storage's state; activates the enabled ones, and says inactive right after having mounted."""
    assert_whole(config)
    wanted = split_list(content) if content is not None else None
    info: dict[str, dict] = {}
    cache = Cache()
    for ident in cluster.shuffled(config.ids):
        scfg = config.ids[ident]
        enabled = config.is_enabled(ident)
        if wanted is not None and (not enabled or not any(c in scfg["content"] for c in wanted)):
            continue
        info[ident] = {"type": scfg["type"], "total": 0, "avail": 0, "used": 0, "active": 0,
                       "shared": 1 if scfg.get("shared") else 0, "enabled": 1 if enabled else 0,
                       "content": _encode(scfg["type"], "content", scfg["content"])}
        if formats:
            names, default = FORMATS.get(scfg["type"], ("raw", "raw"))
            info[ident]["formats"] = {"supported": sorted(names.split()), "default": scfg.get("format", default)}
            info[ident]["format"] = [{n: 1 for n in names.split()}, scfg.get("format", default)]
        if not enabled:
            continue
        try:
            activate(config, ident, cache)
        except PveError as error:
            err(error.text())
            continue
        state = _status(scfg, cache)
        if state:
            info[ident].update(total=state[0], avail=state[1], used=state[2], active=1)
    return info
