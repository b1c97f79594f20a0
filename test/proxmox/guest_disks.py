"""Guests' disks: options into volumes, and the volumes that belong to a guest."""

import os
import re

import guest_config as gc
import guest_volumes as gv
from guest_schema import DRIVES
from pve_output import err, out
from pve_schema import NotCovered, PveError, param_error
from pve_tasks import log_warn


def owner_of(storeid, volname):
    return gv.parse_volname(gv.storage(storeid), volname).vmid


def each_owned(conf, vmid, unused=True):
    """(key, drive, storage id, volume name) of the disks that belong to this guest by their name."""
    for key, drive in gc.drives(conf, unused):
        if gc.is_cdrom(drive, True) or not drive.get("file") or drive["file"].startswith("/"):
            continue
        storeid, volname = gv.split_volid(drive["file"], True)
        if not storeid:
            continue
        try:
            if owner_of(storeid, volname) == int(vmid):
                yield key, drive, storeid, volname
        except PveError as error:
            log_warn(f"failed to get path and owner of volume '{drive['file']}': {error.text()}")


def normalise_drives(params):
    """Drive options as they are stored; unknown suboptions were already refused by the schema."""
    if "cdrom" in params:
        if "ide2" in params:
            raise param_error({"ide2": "conflicts with cdrom"})
        params["ide2"] = params.pop("cdrom") + ",media=cdrom"
    for key in sorted(k for k in params if k in DRIVES):
        drive = gc.parse_drive(key, params[key])
        if not drive:
            raise param_error({key: "unable to parse drive options"})
        if "import-from" in drive:
            raise NotCovered(f"--{key} with import-from")
        params[key] = gc.print_drive(key, drive)


def new_disk(drive, default_storage=None):
    """(storage id, GiB) when the option asks for a new volume."""
    match = re.fullmatch(r"(?:([^/:\s]+):)?(\d+(?:\.\d+)?)", drive.get("file") or "")
    if not match:
        return None
    storeid = match[1] or default_storage
    if not storeid:
        raise PveError("no storage ID specified (and no default storage)\n")
    return storeid, float(match[2])


def check_storages(params, default_storage=None):
    for key, drive in gc.drives(params):
        if gc.is_cdrom(drive) or drive.get("file") in ("none", "cdrom"):
            continue
        new = new_disk(drive, default_storage)
        if new:
            if "images" not in gv.content_of(gv.storage(new[0])):
                raise param_error({"storage": f"storage '{new[0]}' does not support vm images"})
        elif not drive["file"].startswith("/"):
            storeid, volname = gv.split_volid(drive["file"])
            if gv.parse_volname(gv.storage(storeid), volname).content not in ("images", "iso"):
                raise param_error({key: "content type needs to be 'images' or 'iso'"})


def create_disks(vmid, conf, params, default_storage=None):
    """Allocate or look up the volumes of drive options; ([new volume ids], {option: value})."""
    made, result = [], {}
    try:
        for key, drive in gc.drives(params):
            if not drive.get("file") or drive["file"] in ("none", "cdrom"):
                drive.pop("size", None)
                result[key] = gc.print_drive(key, drive)
                continue
            if gc.is_cloudinit(drive):
                raise NotCovered(f"--{key}: cloud-init drives")
            new = new_disk(drive, default_storage)
            if new:
                if key in ("efidisk0", "tpmstate0"):
                    raise NotCovered(f"--{key}: new EFI and TPM disks")
                kib = int(new[1] * 1048576)
                scfg = gv.storage(new[0])
                volid = gv.alloc(new[0], scfg, vmid, drive.pop("format", None) or gv.default_format(scfg), None, kib)
                made.append(volid)
                if conf.get("template"):
                    volid = made[-1] = gv.create_base(new[0], scfg, gv.split_volid(volid)[1])
                drive.update(file=volid, size=kib * 1024)
                result[key] = gc.print_drive(key, drive)
                out(f"{key}: successfully created disk '{result[key]}'\n")
                continue
            if not drive["file"].startswith("/"):
                storeid, volname = gv.split_volid(drive["file"])
                scfg = gv.storage(storeid)
                volume = gv.parse_volname(scfg, volname)
                if drive.get("format") and drive["format"] != volume.format:
                    raise PveError(f"drive '{key}' - volume '{drive['file']}' - 'format={drive['format']}' option "
                                   f"different from storage format '{volume.format}'\n")
                size = gv.size_of(scfg, volname)
            else:
                size = os.path.getsize(drive["file"]) if os.path.exists(drive["file"]) else 0
            if not size:
                raise PveError(f"volume {drive['file']} does not exist\n")
            drive["size"] = size
            result[key] = gc.print_drive(key, drive)
    except PveError:
        for volid in made:
            try_free(volid)
        raise
    return made, result


def try_free(volid, complain=err):
    try:
        storeid, volname = gv.split_volid(volid)
        gv.free(storeid, volname)
    except PveError as error:
        complain(error.text())
