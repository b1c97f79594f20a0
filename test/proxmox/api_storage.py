"""API below /storage and /nodes/NODE/storage: configuring storages, and what is on them."""

from __future__ import annotations

import re
from typing import Any

import misbehave
import nfs
import pve_cluster as cluster
import storage as st
import volumes as vol
from pve_cli import Method
from pve_output import err, out
from pve_schema import NotCovered, Props, PveError, param_error, split_list
from pve_tasks import fork_worker, read_status

CONFIG, CONTENT, STATUS = "PVE::API2::Storage::Config", "PVE::API2::Storage::Content", "PVE::API2::Storage::Status"
SCAN = "PVE::API2::Storage::Scan"
NODE = {"type": "string", "format": "pve-node"}
STORAGE = {"type": "string", "format": "pve-storage-id"}
VMID = {"type": "integer", "format": "pve-vmid", "minimum": 100, "maximum": 999999999, "optional": 1}
VOLUME = {"type": "string"}

# --- /storage ---------------------------------------------------------------------------

_CREATE: Props = {**st.PROPERTIES, "type": {"type": "string", "enum": st.TYPE_NAMES}}
_FIXED_EVERYWHERE = {key for key in st.PROPERTIES
                     if all(o[key].get("fixed") for o in st.TYPES.values() if key in o)} - {"storage"}
_UPDATE: Props = {k: s for k, s in st.PROPERTIES.items() if k not in _FIXED_EVERYWHERE}
_UPDATE["digest"] = {"type": "string", "maxLength": 64, "optional": 1}
_UPDATE["delete"] = {"type": "string", "format": "pve-configid-list", "maxLength": 4096, "optional": 1}
_RESULT = {"type": "object"}
_SENSITIVE = {"cifs": ("password",), "pbs": ("encryption-key", "master-pubkey", "password"),
              "cephfs": ("keyring",), "rbd": ("keyring",), "esxi": ("password",)}


@Method("GET", "/storage", {"type": {"type": "string", "enum": st.TYPE_NAMES, "optional": 1}},
        {"type": "array", "items": {"type": "object", "properties": {"storage": {"type": "string"}}}}, CONFIG)
def storage_index(param: dict[str, Any]) -> list[dict]:
    config = st.StorageConfig()
    st.assert_whole(config)
    return [st.api_config(config, ident) for ident in cluster.shuffled(config.ids)
            if param.get("type") in (None, config.ids[ident]["type"])]


@Method("GET", "/storage/{storage}", {"storage": STORAGE}, _RESULT, CONFIG)
def storage_read(param: dict[str, Any]) -> dict:
    return st.api_config(st.StorageConfig(), param["storage"])


def _secrets(kind: str, param: dict[str, Any]) -> None:
    """Secrets go to files below /etc/pve/priv/storage, not into storage.cfg."""
    for key in _SENSITIVE.get(kind, ()):
        if param.pop(key, None) is not None:
            raise NotCovered(f"the secret '{key}' of a storage of type '{kind}'")


_MKDIR_NOTE = ("NOTE: The 'mkdir' option set for '{}' is deprecated and will be removed in Proxmox VE 9. "
               "Use 'create-base-path' or 'create-subdirs' instead.\n")


@Method("POST", "/storage", _CREATE, _RESULT, CONFIG)
def storage_create(param: dict[str, Any]) -> dict:
    param = dict(param)
    kind, ident = param.pop("type"), param.pop("storage")
    if not param.get("nodes"):
        param.pop("nodes", None)
    _secrets(kind, param)
    options = st.check_config(kind, ident, param, True)

    def create() -> None:
        misbehave.point("pvesm.add", "locked")
        config = st.StorageConfig()
        if ident in config.ids:
            raise PveError(f"storage ID '{ident}' already defined\n")
        config.ids[ident] = options
        if "mkdir" in options:
            err(_MKDIR_NOTE.format(ident))
        if config.is_enabled(ident):
            st.activate(config, ident)
        misbehave.point("pvesm.add", "activated")
        config.write()
        misbehave.point("pvesm.add", "written")
    st.lock_config(create, "create storage failed")
    return {"storage": ident, "type": kind}


@Method("PUT", "/storage/{storage}", _UPDATE, _RESULT, CONFIG)
def storage_update(param: dict[str, Any]) -> dict:
    param = dict(param)
    ident, digest = param.pop("storage"), param.pop("digest", None)
    delete = split_list(param.pop("delete", "") or "")
    kind = ""

    def update() -> None:
        nonlocal kind
        misbehave.point("pvesm.set", "locked")
        config = st.StorageConfig()
        cluster.assert_if_modified(config.digest, digest)
        scfg = config.get(ident)
        kind = scfg["type"]
        _secrets(kind, param)
        options = st.check_config(kind, ident, param, False)
        cluster.delete_from_config(scfg, st.TYPES[kind], options, delete)
        scfg.update({k: v for k, v in options.items() if k != "type"})
        if "mkdir" in scfg:
            err(_MKDIR_NOTE.format(ident))
        config.write()
        misbehave.point("pvesm.set", "written")
    st.lock_config(update, "update storage failed")
    return {"storage": ident, "type": kind}


@Method("DELETE", "/storage/{storage}", {"storage": STORAGE}, {"type": "null"}, CONFIG)
def storage_delete(param: dict[str, Any]) -> None:
    ident = param["storage"]

    def delete() -> None:
        misbehave.point("pvesm.remove", "locked")
        config = st.StorageConfig()
        config.get(ident)
        if any((s.get("base") or "").startswith(f"{ident}:") for s in config.ids.values()):
            raise PveError("can't remove storage - storage is used as base of another storage\n")
        del config.ids[ident]
        config.write()
        misbehave.point("pvesm.remove", "written")
    st.lock_config(delete, "delete storage failed")


# --- /nodes/{node}/storage -----------------------------------------------------------------

_BYTES = {"type": "integer", "optional": 1, "renderer": "bytes"}
_FLAG = {"type": "boolean", "optional": 1}
_STATUS_PROPS: Props = {
    "type": {"type": "string"}, "content": {"type": "string"}, "enabled": _FLAG, "active": _FLAG, "shared": _FLAG,
    "total": _BYTES, "used": _BYTES, "avail": _BYTES}
_CONTENT_LIST = {"type": "string", "format": "pve-storage-content-list", "optional": 1}


def _no_such_storage() -> Exception:
    # Status looks at the disk before it says so, and leaves with errno 0: 255.
    return param_error({"storage": "No such storage."}, 255)


@Method("GET", "/nodes/{node}/storage", {
    "node": NODE, "storage": {**STORAGE, "optional": 1}, "content": _CONTENT_LIST,
    "enabled": {"type": "boolean", "optional": 1}, "target": {**NODE, "optional": 1},
    "format": {"type": "boolean", "optional": 1},
}, {"type": "array", "items": {"type": "object", "properties": {
    **_STATUS_PROPS, "storage": STORAGE, "select_existing": _FLAG, "formats": {"type": "object", "optional": 1},
    "used_fraction": {"type": "number", "optional": 1, "renderer": "fraction_as_percentage"}}}}, STATUS)
def status_index(param: dict[str, Any]) -> list[dict]:
    target = param.get("target")
    if target in (cluster.nodename(), "localhost"):
        target = None
    config = st.StorageConfig()
    info = st.storage_info(config, param.get("content"), bool(param.get("format")))
    if param.get("storage") and param["storage"] not in info:
        raise _no_such_storage()
    result = []
    for ident in cluster.shuffled(info):
        data, scfg = info[ident], config.ids[ident]
        if param.get("storage") not in (None, ident) or (param.get("enabled") and scfg.get("disable")):
            continue
        if target and not (scfg.get("shared") and config.is_on_node(ident) and config.is_on_node(ident, target)):
            continue
        if data["total"]:
            data["used_fraction"] = data["used"] / data["total"]
        result.append({"storage": ident, **data})
    return result


@Method("GET", "/nodes/{node}/storage/{storage}", {"node": NODE, "storage": STORAGE},
        {"type": "array", "items": {"type": "object", "properties": {"subdir": {"type": "string"}}}}, STATUS)
def status_directory(_param: dict[str, Any]) -> list[dict]:
    return [{"subdir": name} for name in (
        "content", "download-url", "file-restore", "import-metadata", "identity", "oci-registry-pull",
        "prunebackups", "rrd", "rrddata", "status", "upload")]


@Method("GET", "/nodes/{node}/storage/{storage}/status", {"node": NODE, "storage": STORAGE},
        {"type": "object", "properties": _STATUS_PROPS}, STATUS)
def status_read(param: dict[str, Any]) -> dict:
    info = st.storage_info(st.StorageConfig())
    if param["storage"] not in info:
        raise _no_such_storage()
    return info[param["storage"]]


# --- content ------------------------------------------------------------------------------------

@Method("GET", "/nodes/{node}/storage/{storage}/content", {
    "node": NODE, "storage": STORAGE, "content": {"type": "string", "format": "pve-storage-content", "optional": 1},
    "vmid": VMID,
}, {"type": "array", "items": {"type": "object", "properties": {
    "volid": {"type": "string"}, "vmid": {"type": "integer", "optional": 1},
    "parent": {"type": "string", "optional": 1}, "format": {"type": "string"}, "size": _BYTES, "approximate-size": _BYTES,
    "used": _BYTES, "ctime": {"type": "integer", "optional": 1},
    "notes": {"type": "string", "optional": 1}, "encrypted": {"type": "string", "optional": 1},
    "verification": {"type": "object", "optional": 1}, "protected": {"type": "boolean", "optional": 1}}}}, CONTENT)
def content_index(param: dict[str, Any]) -> list[dict]:
    vmid = int(param["vmid"]) if param.get("vmid") else None
    return vol.volume_list(st.StorageConfig(), param["storage"], vmid, param.get("content"))


@Method("POST", "/nodes/{node}/storage/{storage}/content", {
    "node": NODE, "storage": STORAGE, "filename": {"type": "string"},
    "vmid": {**VMID, "optional": 0}, "size": {"type": "string", "pattern": r"\d+[MG]?"},
    "format": {"type": "string", "enum": ["raw", "qcow2", "subvol", "vmdk"], "requires": "size", "optional": 1},
}, {"type": "string"}, CONTENT)
def content_create(param: dict[str, Any]) -> str:
    size = re.fullmatch(r"(\d+)([MG]?)", param["size"])
    kib = int(size[1]) * {"": 1, "M": 1024, "G": 1024 * 1024}[size[2]]  # type: ignore[index]
    fmt = param.get("format")
    named = re.search(r"\.(raw|qcow2|vmdk)$", param["filename"])
    if named:
        if fmt and fmt != named[1]:
            raise param_error({"format": f"different storage formats ({fmt} != {named[1]})"})
        fmt = named[1]
    return vol.vdisk_alloc(st.StorageConfig(), param["storage"], param["vmid"], fmt, param["filename"], kib)


def _volume_id(ident: str | None, volume: str) -> tuple[str, str]:
    if ":" in volume:
        try:
            named, _ = st.parse_volume_id(volume)
            if ident and named != ident:
                raise PveError(f"storage ID mismatch ({named} != {ident})\n")
        except PveError as error:
            raise param_error({"volume": error.text()}) from None
        return volume, named
    if not ident:
        raise param_error({"volume": "no storage specified - incomplete volume ID"})
    return f"{ident}:{volume}", ident


_VOLUME_PARAMS: Props = {"node": NODE, "storage": {**STORAGE, "optional": 1}, "volume": VOLUME}
_VOLUME_PATH = "/nodes/{node}/storage/{storage}/content/{*volume}"


@Method("GET", _VOLUME_PATH, _VOLUME_PARAMS, {"type": "object", "properties": {
    "path": {"type": "string"}, "size": {"type": "integer", "renderer": "bytes"},
    "used": {"type": "integer", "renderer": "bytes"},
    "format": {"type": "string"}, "notes": {"type": "string", "optional": 1},
    "protected": {"type": "boolean", "optional": 1}}}, CONTENT)
def content_info(param: dict[str, Any]) -> dict:
    volid, _ = _volume_id(param.get("storage"), param["volume"])
    path, volume = vol.volume_path(st.StorageConfig(), volid)
    try:
        info = vol.image_info(path, volume.format)
    except PveError as error:
        err(error.text())
        raise PveError(f"volume_size_info on '{volid}' failed - no format\n", 2) from None
    if not info["size"]:
        raise PveError(f"volume '{volid}' has size zero\n")
    entry = {"path": path, "size": info["size"], "used": info["used"], "format": volume.format}
    if volume.content == "backup":
        entry["notes"] = vol.notes(path)
        entry["protected"] = 1 if vol.is_protected(path) else 0
    return entry


@Method("PUT", _VOLUME_PATH, {**_VOLUME_PARAMS, "notes": {"type": "string", "optional": 1},
                              "protected": {"type": "boolean", "optional": 1}}, {"type": "null"}, CONTENT)
def content_update(param: dict[str, Any]) -> None:
    volid, _ = _volume_id(param.get("storage"), param["volume"])
    path, volume = vol.volume_path(st.StorageConfig(), volid)
    if param.get("notes") is not None:
        if volume.content != "backup":
            raise PveError("only backups can have notes\n")
        vol.set_notes(path, param["notes"])
    if param.get("protected") is not None:
        if volume.content != "backup":
            raise PveError("only backups support attribute 'protected'\n")
        vol.set_protected(path, bool(int(param["protected"])))


@Method("DELETE", _VOLUME_PATH, {**_VOLUME_PARAMS, "delay": {"type": "integer", "minimum": 1, "maximum": 30,
                                                             "optional": 1}},
        {"type": "string", "optional": 1}, CONTENT)
def content_delete(param: dict[str, Any]) -> str | None:
    config = st.StorageConfig()
    volid, ident = _volume_id(param.get("storage"), param["volume"])
    path, volume = vol.volume_path(config, volid)

    def work(_upid: str) -> None:
        vol.vdisk_free(config, volid)
        out(f"Removed volume '{volid}'\n")
        if volume.content == "backup" and re.match(
                r".*/vzdump-\w+-\d+-\d{4}_\d{2}_\d{2}-\d{2}_\d{2}_\d{2}[^/]+$", path):
            vol.remove_auxiliaries(path)
    owner = f"{volume.vmid}@" if volume.vmid is not None else ""
    upid, _ = fork_worker("imgdel", owner + ident, work)
    if param.get("delay"):
        status = read_status(upid)
        if status != "OK" and not status.startswith("WARNINGS"):
            raise PveError(status + "\n")
        return None
    return upid


# --- retention --------------------------------------------------------------------------------------

_PRUNE: Props = {"node": NODE, "storage": STORAGE,
                 "prune-backups": {"type": "string", "format": "prune-backups", "optional": 1},
                 "type": {"type": "string", "enum": ["qemu", "lxc"], "optional": 1}, "vmid": VMID}
_PRUNE_LIST = {"type": "array", "items": {"type": "object", "properties": {
    "volid": {"type": "string"}, "ctime": {"type": "integer"}, "mark": {"type": "string"},
    "type": {"type": "string"}, "vmid": {"type": "integer", "optional": 1}}}}


def _prune(param: dict[str, Any], dry_run: bool) -> list[dict]:
    keep = vol.prune_options(param["prune-backups"]) if param.get("prune-backups") else None
    vmid = int(param["vmid"]) if param.get("vmid") else None
    return vol.prune_backups(st.StorageConfig(), param["storage"], keep, vmid, param.get("type"), dry_run)


@Method("GET", "/nodes/{node}/storage/{storage}/prunebackups", _PRUNE, _PRUNE_LIST, "PVE::API2::Storage::PruneBackups")
def prune_preview(param: dict[str, Any]) -> list[dict]:
    return _prune(param, True)


@Method("DELETE", "/nodes/{node}/storage/{storage}/prunebackups", _PRUNE, {"type": "string"},
        "PVE::API2::Storage::PruneBackups")
def prune_delete(param: dict[str, Any]) -> str:
    owner = f"{param['vmid']}@" if param.get("vmid") else ""
    upid, _ = fork_worker("prunebackups", owner + param["storage"], lambda _upid: _prune(param, False))
    return upid


# --- scan ---------------------------------------------------------------------------------------------

@Method("GET", "/nodes/{node}/scan", {"node": NODE},
        {"type": "array", "items": {"type": "object", "properties": {"method": {"type": "string"}}}}, SCAN)
def scan_index(_param: dict[str, Any]) -> list[dict]:
    return [{"method": name} for name in ("cifs", "iscsi", "lvm", "nfs", "pbs", "zfs")]


@Method("GET", "/nodes/{node}/scan/nfs", {"node": NODE, "server": {"type": "string", "format": "pve-storage-server"}},
        {"type": "array", "items": {"type": "object", "properties": {
            "path": {"type": "string"}, "options": {"type": "string"}}}}, SCAN)
def scan_nfs(param: dict[str, Any]) -> list[dict]:
    server = param["server"]
    if not nfs.resolves(server):
        raise PveError(f"unable to resolve address for server '{server}'\n", 2)
    if not nfs.has_mountd(server):
        err("clnt_create: RPC: Unable to receive\n" if nfs.server_folder(server) else
            "clnt_create: RPC: Port mapper failure - Timed out\n")
        raise PveError(f"command '/sbin/showmount --no-headers --exports {server}' failed: exit code 1\n", 1)
    return [{"path": path, "options": clients} for path, clients in nfs.exports(server)]


def uncovered(verb: str, path: str, params: Props, group: str) -> Method:
    """A call the real tool has and the stand-in has not: it is parsed, then exits 70."""
    return Method(verb, path, params, {"type": "null"}, group)


uncovered("POST", _VOLUME_PATH, {**_VOLUME_PARAMS, "target": {"type": "string"},
                                 "target_node": {**NODE, "optional": 1}}, CONTENT)
SCAN_CIFS = uncovered("GET", "/nodes/{node}/scan/cifs", {
    "node": NODE, "server": {"type": "string", "format": "pve-storage-server"},
    "username": {"type": "string", "optional": 1}, "password": {"type": "string", "optional": 1},
    "domain": {"type": "string", "optional": 1}}, SCAN)
SCAN_ISCSI = uncovered("GET", "/nodes/{node}/scan/iscsi", {
    "node": NODE, "portal": {"type": "string", "format": "pve-storage-portal-dns"}}, SCAN)
SCAN_LVM = uncovered("GET", "/nodes/{node}/scan/lvm", {"node": NODE}, SCAN)
SCAN_LVMTHIN = uncovered("GET", "/nodes/{node}/scan/lvmthin", {"node": NODE, "vg": {"type": "string"}}, SCAN)
SCAN_PBS = uncovered("GET", "/nodes/{node}/scan/pbs", {
    "node": NODE, "server": {"type": "string", "format": "pve-storage-server"}, "username": {"type": "string"},
    "password": {"type": "string"}, "fingerprint": {"type": "string", "optional": 1},
    "port": {"type": "integer", "optional": 1}}, SCAN)
SCAN_ZFS = uncovered("GET", "/nodes/{node}/scan/zfs", {"node": NODE}, SCAN)
