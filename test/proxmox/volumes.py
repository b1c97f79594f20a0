"""Volumes: their names, the files behind them, disk images, backups and their retention."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import time
from typing import Any, Callable, TypeVar

import misbehave
import pve_cluster as cluster
import thin
from pve_output import err, out
from pve_schema import NotCovered, PveError, parse_id, parse_property_string, print_property_string
from storage import (BACKUP_EXT, CONTENT_ORDER, Config, FORMATS, StorageConfig, activate, is_volume_id,
                     parse_volume_id, subdir)

T = TypeVar("T")
LARGEST_FILE = (16 << 40) - 4096   # of ext4, where a node keeps its images

# --- volume names -----------------------------------------------------------------------

class Volume:
    """What a volume's name says (parse_volname)."""

    def __init__(self, content: str, name: str, vmid: int | None = None, base: str | None = None,
                 base_vmid: int | None = None, is_base: bool = False, format: str = "raw"):
        self.content, self.name, self.vmid, self.format = content, name, vmid, format
        self.base, self.base_vmid, self.is_base = base, base_vmid, is_base


def _parse_disk_name(name: str) -> tuple[str, bool]:
    match = re.fullmatch(r"(?:(vm-|base-|subvol-)\d+-)?[^/\s]+\.(raw|qcow2|vmdk|subvol)", name)
    if re.fullmatch(r"snap-.*\.qcow2", name):
        raise PveError(f"'{name}' is a snapshot filename, not a volume!\n")
    if not match:
        raise PveError(f"unable to parse volume filename '{name}'\n")
    return match[2], name.startswith("base-")


def parse_volname(volname: str) -> Volume:
    match = re.fullmatch(r"(\d+)/(\S+)/(\d+)/(\S+)", volname)
    if match:
        _parse_disk_name(match[2])
        fmt, is_base = _parse_disk_name(match[4])
        return Volume("images", match[4], int(match[3]), match[2], int(match[1]), is_base, fmt)
    match = re.fullmatch(r"(\d+)/(\S+)", volname)
    if match:
        fmt, is_base = _parse_disk_name(match[2])
        return Volume("images", match[2], int(match[1]), is_base=is_base, format=fmt)
    for content, pattern in (("iso", r"[^/]+\.(?i:iso|img)"), ("vztmpl", r"[^/]+\.(?i:tar(?:\.(?:gz|xz|zst|bz2))?)"),
                             ("backup", r"[^/]+" + BACKUP_EXT), ("snippets", r"[^/]+"),
                             ("import", r"[ a-zA-Z0-9\-.+=_]+\.(?:ova|ovf|qcow2|raw|vmdk)")):
        match = re.fullmatch(rf"{content}/({pattern})", volname)
        if match:
            owner = re.match(r"vzdump-(?:openvz|lxc|qemu)-(\d+)-.+", match[1]) if content == "backup" else None
            return Volume(content, match[1], int(owner[1]) if owner else None)
    raise PveError(f"unable to parse directory volume name '{volname}'\n")


def volume_path(config: StorageConfig, volid: str) -> tuple[str, Volume]:
    """Where a volume lies; it need not exist."""
    ident, volname = parse_volume_id(volid)
    scfg = config.get(ident)
    if scfg["type"] in thin.TYPES:
        vmid, is_base = thin.parse(volname)
        return thin.path(scfg, volname), Volume("images", volname, vmid, is_base=is_base)
    if "path" not in scfg:
        raise NotCovered(f"volumes on a storage of type '{scfg['type']}'")
    volume = parse_volname(volname)
    if volume.content == "images":
        return f"{subdir(scfg, 'images')}/{volume.vmid}/{volume.name}", volume
    return f"{subdir(scfg, volume.content)}/{volume.name}", volume


def abs_filesystem_path(config: StorageConfig, volid: str) -> str:
    """The path of a volume or file that must exist; activates the volume's storage."""
    if is_volume_id(volid):
        ident, _ = parse_volume_id(volid)
        activate(config, ident)
        path, _ = volume_path(config, volid)
        if not os.path.exists(path):
            raise PveError(f"volume '{volid}' does not exist\n", 2)
    else:
        path = os.path.realpath(volid)
    if not os.path.isfile(path):
        raise PveError(f"can't find file '{volid}'\n", 2)
    return path


def archive_info(archive: str) -> dict[str, Any]:
    """What a backup's file name says: type, vmid, ctime, compression, is_std_name."""
    name = os.path.basename(archive)
    match = re.fullmatch(r"vzdump-(lxc|openvz|qemu)-.+" + BACKUP_EXT, name)
    if not match:
        raise PveError(f"ERROR: couldn't determine archive info from '{archive}'\n")
    kind, extension, compression = match.groups()
    info: dict[str, Any] = {"filename": name, "type": kind, "format": extension.split(".")[0],
                            "compression": "gz" if extension == "tgz" else compression, "is_std_name": 0}
    if extension == "tgz":
        info["format"] = "tar"
    standard = re.fullmatch(rf"(vzdump-{kind}-([1-9][0-9]{{2,8}})-(\d{{4}})_(\d\d)_(\d\d)-(\d\d)_(\d\d)_(\d\d))\."
                            + re.escape(extension), name)
    if standard:
        year, month, day, hour, minute, second = (int(x) for x in standard.groups()[2:])
        info.update(logfilename=standard[1] + ".log", notesfilename=name + ".notes", vmid=int(standard[2]),
                    ctime=int(time.mktime((year, month, day, hour, minute, second, 0, 0, -1))), is_std_name=1)
    return info


# --- disk images --------------------------------------------------------------------------

def image_info(path: str, fmt: str) -> dict[str, Any]:
    """size (virtual), used, parent, ctime, format; raw sizes are rounded up to whole sectors."""
    try:
        stat = os.stat(path)
    except OSError:
        raise PveError(f"failed to stat '{path}'\n", 2) from None
    used = stat.st_blocks * 512
    size, parent = (stat.st_size + 511) // 512 * 512, None
    if fmt == "qcow2":
        with open(path, "rb") as handle:
            header = handle.read(72)
            if header[:4] != b"QFI\xfb":
                raise PveError(f"qemu-img: Could not open '{path}': Image is not in qcow2 format\n")
            backing_offset, backing_length = struct.unpack(">QI", header[8:20])
            size = struct.unpack(">Q", header[24:32])[0]
            if backing_offset:
                handle.seek(backing_offset)
                parent = handle.read(backing_length).decode("utf-8", "replace")
    elif fmt == "vmdk":
        with open(path, "rb") as handle:
            header = handle.read(20)
        if header[:4] == b"KDMV":
            size = struct.unpack("<Q", header[12:20])[0] * 512
    return {"size": size, "used": used, "parent": parent, "ctime": int(stat.st_ctime), "format": fmt}


def list_images(ident: str, scfg: Config, vmid: int | None = None) -> list[dict[str, Any]]:
    if scfg["type"] in thin.TYPES:
        return thin.images(ident, scfg, vmid)
    found = []
    base = subdir(scfg, "images")
    formats = FORMATS.get(scfg["type"], ("raw", ""))[0].split()
    for owner in sorted(os.listdir(base)) if os.path.isdir(base) else []:
        if not re.fullmatch(r"[0-9]+", owner) or (vmid is not None and owner != str(vmid)):
            continue
        if not os.path.isdir(f"{base}/{owner}"):
            continue
        for name in sorted(os.listdir(f"{base}/{owner}")):
            extension = name.rsplit(".", 1)[-1]
            if extension not in formats or name.startswith("."):
                continue
            try:
                _parse_disk_name(name)
                info = image_info(f"{base}/{owner}/{name}", extension)
            except PveError as error:
                err(error.text())
                continue
            parent = re.fullmatch(r"\.\./(\d+)/([^/]+\.(?:raw|qcow2|vmdk))", info["parent"] or "")
            volname = f"{parent[1]}/{parent[2]}/{owner}/{name}" if parent else f"{owner}/{name}"
            found.append({"volid": f"{ident}:{volname}", "format": extension, "size": info["size"],
                          "vmid": int(owner), "used": info["used"], "parent": info["parent"],
                          "ctime": info["ctime"]})
    return found


def _list_files(ident: str, scfg: Config, content: str, vmid: int | None) -> list[dict[str, Any]]:
    found = []
    folder = subdir(scfg, content)
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        path = f"{folder}/{name}"
        if name.startswith(".") or not os.path.isfile(path):
            continue
        stat = os.stat(path)
        item: dict[str, Any] = {"volid": f"{ident}:{content}/{name}"}
        if content == "backup":
            match = re.fullmatch(r"[^/]+?" + BACKUP_EXT, name)
            if not match or (vmid is not None and not re.search(rf"\S+-{vmid}-\S+", name)):
                continue
            item["format"] = match[1]
            try:
                info = archive_info(name)
            except PveError:
                info = {}
            if "ctime" in info:
                item["ctime"] = info["ctime"]
            item["subtype"] = info.get("type", "unknown")
            owner = re.search(rf"-([1-9][0-9]{{2,8}})-[^/]+\.{re.escape(match[1])}$", name)
            if vmid is not None or owner:
                item["vmid"] = vmid if vmid is not None else int(owner[1])  # type: ignore[index]
            if os.path.isfile(path + ".notes"):
                with open(path + ".notes", encoding="utf-8", errors="replace") as handle:
                    first = handle.readline()
                if first:
                    item["notes"] = first.rstrip("\n")
            if os.path.exists(path + ".protected"):
                item["protected"] = 1
        elif content == "iso" and re.search(r"\.(iso|img)$", name, re.I):
            item["format"] = "iso"
        elif content == "vztmpl" and re.search(r"\.tar(\.(gz|xz|zst|bz2))?$", name, re.I):
            item["format"] = "t" + name.rsplit(".", 1)[1] if not name.lower().endswith(".tar") else "tar"
        elif content == "snippets":
            item["format"] = "snippet"
        elif content == "import" and re.search(r"\.(ova|ovf|qcow2|raw|vmdk)$", name, re.I):
            item["format"] = name.rsplit(".", 1)[1]
        else:
            continue
        item["size"] = stat.st_size
        item.setdefault("ctime", int(stat.st_ctime))
        found.append(item)
    return found


def list_volumes(ident: str, scfg: Config, vmid: int | None, contents: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    kinds = {v: g["type"] for v, g in cluster.guests().items()}
    for content in contents:
        if content in ("images", "rootdir"):
            for item in list_images(ident, scfg, vmid):
                item["content"] = "rootdir" if kinds.get(item["vmid"]) == "lxc" else "images"
                if item["content"] == content:
                    found.append(item)
        elif not (content in ("iso", "vztmpl") and vmid is not None):
            found += [{**item, "content": content} for item in _list_files(ident, scfg, content, vmid)]
    return found


def volume_list(config: StorageConfig, ident: str, vmid: int | None = None,
                content: str | None = None) -> list[dict[str, Any]]:
    scfg = config.get(ident)
    contents = [c for c in ([content] if content else CONTENT_ORDER) if c in scfg["content"]]
    activate(config, ident)
    return sorted(list_volumes(ident, scfg, vmid, contents), key=lambda item: item["volid"].lower())


def lock_storage(ident: str, scfg: Config, action: Callable[[], T]) -> T:
    if scfg.get("shared"):
        return cluster.locked(f"storage-{ident}", action)
    return cluster.lock_file(f"/var/lock/pve-manager/pve-storage-{ident}", 10, action)


def free_disk_name(ident: str, scfg: Config, vmid: int, fmt: str) -> str:
    taken = set()
    for item in list_images(ident, scfg, vmid):
        match = re.search(rf"(?:vm|base|subvol)-{vmid}-disk-(\d+)", item["volid"].rsplit("/", 1)[-1])
        if match:
            taken.add(int(match[1]))
    number = next(i for i in range(1000) if i not in taken)
    return f"{'subvol' if fmt == 'subvol' else 'vm'}-{vmid}-disk-{number}.{fmt}"


def create_image(path: str, fmt: str, kib: int, scfg: Config | None = None) -> None:
    """qemu-img create, with the preallocation the storage asks for; its words go to stdout."""
    mode = (scfg or {}).get("preallocation")
    if fmt == "raw":
        mode = "off" if mode in (None, "metadata") else mode
    elif fmt == "qcow2":
        mode = mode or "metadata"
    if fmt == "raw" and kib * 1024 > LARGEST_FILE:   # qemu-img says so itself, but not on every file system
        out(f"Formatting '{path}', fmt=raw size={kib * 1024} preallocation={mode}\n")
        raise PveError(f"unable to create image: qemu-img: {path}: The image size is too large for file format 'raw'\n")
    command = ["/usr/bin/qemu-img", "create"]
    if fmt in ("raw", "qcow2"):
        command += ["-o", f"preallocation={mode}"]
    done = subprocess.run([*command, "-f", fmt, path, f"{kib}K"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    out(done.stdout)
    if done.returncode:
        raise PveError("unable to create image: " + (done.stderr.strip() or "qemu-img failed") + "\n")


def vdisk_alloc(config: StorageConfig, ident: str, vmid: int | str, fmt: str | None, name: str | None,
                kib: int) -> str:
    """Allocate a disk image of `kib` KiB; returns its volume id."""
    parse_id(ident, "storage")
    scfg = config.get(ident)
    if not re.fullmatch(r"\d+", str(vmid)):
        raise PveError(f"VMID '{vmid}' contains illegal characters\n")
    number = int(vmid)
    fmt = fmt or scfg.get("format") or FORMATS.get(scfg["type"], ("raw", "raw"))[1]
    activate(config, ident)
    if scfg["type"] in thin.TYPES:
        return f"{ident}:" + lock_storage(ident, scfg, lambda: thin.alloc(ident, scfg, number, fmt, name, kib))
    if "path" not in scfg:
        raise NotCovered(f"volumes on a storage of type '{scfg['type']}'")

    def allocate() -> str:
        folder = f"{subdir(scfg, 'images')}/{number}"
        previous = os.umask(0o022)
        os.umask(previous | 0o037)
        try:
            os.makedirs(folder, exist_ok=True)
            chosen = name or free_disk_name(ident, scfg, number, fmt)
            real, _ = _parse_disk_name(chosen)
            if real != fmt:
                raise PveError(f"illegal name '{chosen}' - wrong extension for format ('{real} != '{fmt}')\n")
            path = f"{folder}/{chosen}"
            if os.path.exists(path):
                raise PveError(f"disk image '{path}' already exists\n")
            if fmt == "subvol":
                raise NotCovered("subvolumes")
            misbehave.point(f"storage.{ident}", "alloc")
            try:
                create_image(path, fmt, kib, scfg)
            except PveError:
                _unlink_quietly(path)
                _rmdir_quietly(folder)
                raise
        finally:
            os.umask(previous)
        return f"{ident}:{number}/{chosen}"
    return lock_storage(ident, scfg, allocate)


def _unlink_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _rmdir_quietly(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        pass


def is_base_in_use(config: StorageConfig, volid: str) -> bool:
    """Does any image on the storage have this base image as its parent?"""
    ident, volname = parse_volume_id(volid)
    if config.get(ident)["type"] in thin.TYPES:
        return False   # only LVM knows the clones of a thin volume: Proxmox lets their base go
    volume = parse_volname(volname)
    if not volume.is_base:
        return False
    prefix = f"{ident}:{volume.vmid}/{volume.name}/"
    return any(item["volid"].startswith(prefix) for item in list_images(ident, config.get(ident)))


def vdisk_free(config: StorageConfig, volid: str) -> None:
    """Remove a volume. A file that is not there is only a warning, as for the real one."""
    ident, volname = parse_volume_id(volid)
    scfg = config.get(ident)
    activate(config, ident)

    def free() -> None:
        path, volume = volume_path(config, volid)
        if is_base_in_use(config, volid):
            raise PveError(f"base volume '{volname}' is still in use by linked clones\n")
        if volume.content == "backup" and os.path.exists(path + ".protected"):
            raise PveError(f"cannot remove protected volume '{volname}' on '{ident}'\n")
        misbehave.point(f"storage.{ident}", "free")
        if scfg["type"] in thin.TYPES:
            return thin.free(scfg, volname)
        if volume.is_base and misbehave.is_set("no-chattr"):
            err(f"command '/usr/bin/chattr -i {path}' failed: open3: exec of /usr/bin/chattr -i {path} failed: "
                "No such file or directory at /usr/share/perl5/PVE/Cmd.pm line 174.\n")
        elif volume.is_base:
            subprocess.run(["/usr/bin/chattr", "-i", path], stderr=subprocess.DEVNULL, check=False)
        if not os.path.lexists(path) or os.path.isdir(path):
            err(f"disk image '{path}' does not exist\n")
            return
        try:
            os.unlink(path)
        except OSError as error:
            raise PveError(f"unlink '{path}' failed - {error.strerror}\n", error.errno or 255) from error
        _rmdir_quietly(os.path.dirname(path))
    lock_storage(ident, scfg, free)


def remove_auxiliaries(archive: str) -> None:
    """The log and notes that belong to a backup."""
    try:
        info = archive_info(archive)
    except PveError:
        return
    for key in ("logfilename", "notesfilename"):
        if key in info:
            _unlink_quietly(f"{os.path.dirname(archive)}/{info[key]}")


# --- retention ----------------------------------------------------------------------------------

def prune_options(text: str | None) -> dict[str, int]:
    parsed = parse_property_string("prune-backups", text) if text else {"keep-all": 1}
    return {k: int(v) for k, v in parsed.items()}


def prune_text(keep: dict[str, Any]) -> str:
    return print_property_string(keep, "prune-backups")


_PERIODS = (("keep-last", "%s"), ("keep-hourly", "%H/%d/%m/%Y"), ("keep-daily", "%d/%m/%Y"),
            ("keep-weekly", "%V/%G"), ("keep-monthly", "%m/%Y"), ("keep-yearly", "%Y"))


def mark_group(group: list[dict[str, Any]], keep: dict[str, int]) -> None:
    """Mark the backups of one guest: last, hourly, daily, weekly, monthly, yearly, in local time."""
    if keep.get("keep-all") or not any(v > 0 for k, v in keep.items() if k != "keep-all"):
        for entry in group:
            if entry.get("mark") in (None, "remove"):
                entry["mark"] = "keep"
        return
    newest_first = sorted(group, key=lambda entry: -entry["ctime"])
    for option, pattern in _PERIODS:
        count = keep.get(option, 0)
        if count <= 0:
            continue

        def period(entry: dict[str, Any]) -> str:
            return str(entry["ctime"]) if pattern == "%s" else time.strftime(pattern, time.localtime(entry["ctime"]))
        covered = {period(entry) for entry in newest_first if entry.get("mark") == "keep"}
        chosen: set[str] = set()
        for entry in newest_first:
            if entry.get("mark"):
                continue
            ident = period(entry)
            if ident in covered:
                continue
            if ident not in chosen:
                if len(chosen) >= count:
                    break
                chosen.add(ident)
                entry["mark"] = "keep"
            else:
                entry["mark"] = "remove"
    for entry in newest_first:
        entry.setdefault("mark", "remove")


def prune_backups(config: StorageConfig, ident: str, keep: dict[str, int] | None, vmid: int | None = None,
                  kind: str | None = None, dry_run: bool = False,
                  log: Callable[[str, str], None] = lambda level, text: out(text + "\n")) -> list[dict[str, Any]]:
    scfg = config.get(ident)
    if "backup" not in scfg["content"]:
        raise PveError(f"storage '{ident}' does not support backups\n")
    if keep is None:
        if not scfg.get("prune-backups"):
            raise PveError(f"no prune-backups options configured for storage '{ident}'\n")
        keep = prune_options(scfg["prune-backups"])
    activate(config, ident)
    listed: list[dict[str, Any]] = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for backup in list_volumes(ident, scfg, vmid, ["backup"]):
        try:
            info = archive_info(backup["volid"].split("/")[-1])
        except PveError:
            info = {}
        entry: dict[str, Any] = {"ctime": backup["ctime"], "type": info.get("type", "unknown"),
                                 "volid": backup["volid"]}
        if kind and kind != entry["type"]:
            continue
        owner = info.get("vmid", backup.get("vmid"))
        if owner is not None:
            entry["vmid"] = owner
        if info.get("is_std_name"):
            groups.setdefault(f"{entry['type']}/{owner}", []).append(entry)
        else:
            entry["mark"] = "renamed"
            if owner is not None and vmid is None:
                entry["vmid"] = str(owner)      # cut out of the name, and never made a number
        if backup.get("protected"):
            entry["mark"] = "protected"
        listed.append(entry)
    for group in groups.values():
        mark_group(group, keep)
    if not dry_run:
        failed = False
        for entry in listed:
            if entry["mark"] != "remove":
                continue
            log("info", f"removing backup '{entry['volid']}'")
            misbehave.point(f"storage.{ident}", "prune")
            path, _ = volume_path(config, entry["volid"])
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                log("err", f"error when removing backup '{entry['volid']}' - removing archive {path} failed: "
                           f"{error.strerror}\n")
                failed = True
                continue
            remove_auxiliaries(path)
        if failed:
            raise PveError("error pruning backups - check log\n")
    return listed


# --- a backup's configuration -----------------------------------------------------------------------

def extract_config(config: StorageConfig, volid: str) -> str:
    """The guest configuration inside a backup, read with the `vma` module of the guests' commands."""
    if is_volume_id(volid):
        config.get(parse_volume_id(volid)[0])
    path = abs_filesystem_path(config, volid)
    info = archive_info(path)
    if info["type"] != "qemu" or info["format"] != "vma":
        raise NotCovered("the configuration inside a container's backup")
    try:
        import vma
    except ImportError:
        raise NotCovered("reading vma archives") from None
    return vma.extract_config(path, info["compression"])


def notes(path: str) -> str:
    try:
        with open(path + ".notes", encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def set_notes(path: str, text: str) -> None:
    """The archive itself is not looked at: notes of a backup that is not there leave a stray file."""
    if text:
        with open(path + ".notes", "wb") as handle:
            handle.write(text.encode("utf-8", "surrogateescape"))
    else:
        _unlink_quietly(path + ".notes")


def is_protected(path: str) -> bool:
    return os.path.exists(path + ".protected")


def set_protected(path: str, wanted: bool) -> None:
    if wanted and not is_protected(path):
        with open(path + ".protected", "wb"):
            pass
    elif not wanted:
        _unlink_quietly(path + ".protected")
