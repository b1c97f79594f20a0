"""Templates, clones, moving a disk to another storage and making it larger."""

import contextlib
import os
import re
import subprocess
import time
import uuid

import guest_config as gc
import guest_volumes as gv
import misbehave
from guest_api import add_to_pool, assert_pool, method, worker
from guest_disks import try_free
from guest_schema import DRIVES, STORAGE_ID, VMID, flag, text, whole
from pve_output import err, out
from pve_schema import NotCovered, PveError, param_error


TEMPLATE = method("POST", "/{vmid}/template", {"disk": text(enum=list(DRIVES))})


@TEMPLATE
def _(params):
    vmid, disk = params["vmid"], params.get("disk")

    def check():
        conf = gc.load(vmid)
        gc.assert_unlocked(conf)
        if conf["snapshots"]:
            raise PveError("unable to create template, because VM contains snapshots\n")
        if conf.get("template") and not disk:
            raise PveError("you can't convert a template to a template\n")
        if gc.is_running(vmid):
            raise PveError("you can't convert a VM to template if VM is running\n")
        return conf

    check()

    def work(_upid):
        with gc.config_lock(vmid):
            conf = check()
            conf["template"] = 1
            gc.write(vmid, conf)
            make_template(vmid, conf, disk)

    return worker("qmtemplate", vmid, work)


def make_template(vmid, conf, only=None):
    for key, drive in list(gc.drives(conf)):
        if gc.is_cdrom(drive) or (only and key != only):
            continue
        storeid, volname = gv.split_volid(drive["file"])
        scfg = gv.storage(storeid)
        if gv.has_feature(scfg, "template", volname):
            drive["file"] = gv.create_base(storeid, scfg, volname)
            conf[key] = gc.print_drive(key, drive)
            gc.write(vmid, conf)
            misbehave.point("qm.template", "disk")


CLONE = method("POST", "/{vmid}/clone", {
    "newid": VMID, "name": text(format="dns-name"), "description": text(), "pool": text(format="pve-poolid"),
    "snapname": text(format="pve-snapshot-name"), "storage": STORAGE_ID,
    "format": text(enum=["raw", "qcow2", "vmdk"]), "full": flag(), "target": text(format="pve-node"),
    "bwlimit": whole(minimum=0)})
# Perl's stale errno: these errors of clone leave with 2, one about a storage with 255.
CLONE_EXIT = 2


@CLONE
def _(params):
    vmid, newid = params["vmid"], params["newid"]
    if params.get("snapname"):
        raise NotCovered("clone of a snapshot")
    if params.get("target") not in (None, "localhost", gc.node_name()):
        raise NotCovered("clone to another node")
    if not os.path.exists(gc.config_file(vmid)):
        raise PveError(f"unable to find configuration file for VM {vmid} on node '{gc.node_name()}'\n", CLONE_EXIT)
    try:
        _clone_plan(params)
    except PveError as error:
        if not re.match(r"storage '", error.message):
            error.exit_code = CLONE_EXIT
        raise

    def work(_upid):
        with gc.config_lock(vmid, 1, shared=True), gc.config_lock(newid, 1):
            new, disks = _clone_plan(params)
            _clone(params, new, disks)

    return worker("qmclone", vmid, work)


def _clone_plan(params):
    """The checks; the new configuration without its disks, and {option: (drive, full)}."""
    vmid, newid, storage = params["vmid"], params["newid"], params.get("storage")
    assert_pool(params.get("pool"))
    if storage:
        if "images" not in gv.content_of(gv.enabled_storage(storage)):
            raise param_error({"storage": f"storage '{storage}' does not support vm images"})
    conf = gc.load(vmid)
    gc.assert_unlocked(conf)
    full = params.get("full")
    if full is None:
        full = not conf.get("template")
    for name in ("storage", "format"):
        if params.get(name) and not full:
            raise PveError(f"parameter '{name}' not allowed for linked clones\n")
    if os.path.exists(gc.config_file(newid)):
        raise PveError(f"unable to create VM {newid}: config file already exists\n")
    new, disks = {"lock": "clone"}, {}
    for key in sorted(conf):
        if key in (*gc.SECTIONS, "parent", "snaptime", "vmstate", "snapstate", "runningcpu", "runningmachine", "lock") \
                or key.startswith("unused"):
            continue
        if re.fullmatch(r"net\d+", key):
            new[key] = gc.normal_net(conf[key], True)
            continue
        drive = gc.parse_drive(key, conf[key]) if key in DRIVES else None
        if not drive or gc.is_cdrom(drive, True):
            new[key] = conf[key]
            continue
        storeid, volname = gv.split_volid(drive["file"])
        if not gv.has_feature(gv.storage(storeid), "copy" if full else "clone", volname):
            raise PveError(f"{'Full' if full else 'Linked'} clone feature is not supported for '{drive['file']}' ({key})\n")
        disks[key] = (drive, full)
    return new, disks


def _clone(params, new, disks):
    vmid, newid = params["vmid"], params["newid"]
    out(f"creating a clone of VM {vmid} with ID {newid}\n")
    new["smbios1"] = gc.new_smbios_uuid(new.get("smbios1", ""))
    if new.get("vmgenid"):
        new["vmgenid"] = str(uuid.uuid4())
    new.pop("template", None)
    new["name"] = params.get("name") or f"Copy-of-VM-{new.get('name', vmid)}"
    if params.get("description"):
        new["description"] = params["description"]
    gc.write_raw(newid, "# qmclone temporary file\nlock: clone\n")
    made = []
    try:
        for key in sorted(disks):
            drive, full = disks[key]
            volid = _clone_disk(key, drive, full, params, made)
            storeid, volname = gv.split_volid(volid)
            drive.pop("format", None)
            drive.update(file=volid, size=gv.size_of(gv.storage(storeid), volname))
            new[key] = gc.print_drive(key, drive)
            gc.write(newid, new)
            misbehave.point("qm.clone", "disk")
        del new["lock"]
        gc.write(newid, new)
        if params.get("pool"):
            add_to_pool(newid, params["pool"])
    except PveError as error:
        time.sleep(1)
        for volid in made:
            try_free(volid)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(gc.config_file(newid))
        raise PveError(f"clone failed: {error.text()}")


def _clone_disk(key, drive, full, params, made):
    storeid, volname = gv.split_volid(drive["file"])
    scfg = gv.storage(storeid)
    out(f"create {'full' if full else 'linked'} clone of drive {key} ({drive['file']})\n")
    if not full:
        made.append(gv.clone(storeid, scfg, volname, params["newid"]))
        return made[-1]
    source = gv.parse_volname(scfg, volname)
    target_id = params.get("storage") or storeid
    target = gv.storage(target_id)
    wanted = params.get("format")
    fmt = wanted or (source.format if target_id == storeid or gv.is_directory(target) else None)
    if fmt not in gv.supported_formats(target):
        fmt = gv.default_format(target)
        if wanted:
            err(f"format '{wanted}' is not supported by the target storage '{target_id}' - using '{fmt}' instead\n")
    size = gv.size_of(scfg, volname)
    volid = gv.alloc(target_id, target, params["newid"], fmt, None, -(-size // 1024))
    made.append(volid)
    out(f"allocated target volume '{volid}'\n")
    _copy(scfg, volname, target, gv.split_volid(volid)[1], size)
    return volid


def _copy(scfg, volname, target, new, size):
    source = gv.parse_volname(scfg, volname)
    dest = gv.parse_volname(target, new)
    total = human(size)
    out(f"transferred 0.0 B of {total} (0.00%)\n")
    argv = ["/usr/bin/qemu-img", "convert", "-n", "--target-is-zero", "-f", source.format, "-O", dest.format,
            gv.real_path(scfg, volname), gv.real_path(target, new)]
    zero = f"zeroinit:{gv.path(target, new)}"
    if misbehave.is_set("no-zeroinit"):  # a qemu-img without Proxmox's patches
        argv = ["sh", "-c", f"echo \"qemu-img: Could not open '{zero}': Unknown protocol 'zeroinit'\" >&2; exit 1"]
    done = subprocess.run(argv, capture_output=True)
    if done.returncode:
        out(done.stderr.decode(errors="replace"))
        raise PveError(f"copy failed: command '/usr/bin/qemu-img convert -p -n -f {source.format} -O {dest.format} "
                       f"{gv.path(scfg, volname)} {zero}' failed: exit code {done.returncode}\n")
    out(f"transferred {total} of {total} (100.00%)\n")


def human(size, digits=1):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    return f"{size:.{digits}f} TiB"


# ---------------------------------------------------------------- one disk

MOVE = method("POST", "/{vmid}/move_disk", {
    "disk": {"type": "string", "enum": [*DRIVES, *(f"unused{n}" for n in range(256))]}, "storage": STORAGE_ID,
    "target-vmid": {**VMID, "optional": 1}, "target-disk": text(), "format": text(enum=["raw", "qcow2", "vmdk"]),
    "delete": flag(default=0), "digest": text(maxLength=40), "target-digest": text(maxLength=40),
    "bwlimit": whole(minimum=0)})


@MOVE
def _(params):
    vmid, disk, storeid = params["vmid"], params["disk"], params.get("storage")
    if params.get("target-vmid"):
        raise NotCovered("moving a disk to another guest")
    if not storeid:
        raise param_error({"storage": "'storage' or 'target-vmid' need to be set"})

    def check():
        conf = gc.load(vmid)
        gc.assert_unlocked(conf)
        if params.get("digest") and params["digest"] != conf["digest"]:
            raise PveError("detected modified configuration - file changed by other user? Try again.\n")
        drive = _disk_of(conf, disk)
        if gc.is_cdrom(drive, True):
            raise PveError("you can't move a cdrom\n")
        old_id, old_name = gv.split_volid(drive["file"])
        wanted = params.get("format")
        if old_id == storeid and wanted in (None, gv.parse_volname(gv.storage(old_id), old_name).format):
            raise PveError("you can't move to the same storage with same format\n")
        if "images" not in gv.content_of(gv.enabled_storage(storeid)):
            raise param_error({"storage": f"storage '{storeid}' does not support vm images"})
        return conf, drive, old_id

    check()

    def work(_upid):
        with gc.config_lock(vmid):
            conf, drive, old_id = check()
            old = drive["file"]
            out(f"copying volume '{old}' from current storage '{old_id}' to target storage '{storeid}'\n")
            made = []
            try:
                volid = _clone_disk(disk, drive, True, {**params, "newid": vmid}, made)
                drive.pop("format", None)
                drive.update(file=volid, size=gv.size_of(gv.storage(storeid), gv.split_volid(volid)[1]))
                conf[disk] = gc.print_drive(disk, drive)
                if not params.get("delete"):
                    out(f"adding source volume '{old}' as '{gc.add_unused(conf, old)}' to config\n")
                if conf.get("template"):
                    make_template(vmid, conf, disk)
                gc.write(vmid, conf)
            except PveError as error:
                for volid in made:
                    try_free(volid)
                raise PveError(f"storage migration failed: {error.text()}")
            if params.get("delete"):
                out(f"removing source volume '{old}' after successful copy\n")
                try_free(old)

    return worker("qmmove", vmid, work)


def _disk_of(conf, disk):
    drive = gc.parse_drive(disk, conf[disk]) if disk in conf else None
    if not drive:
        raise PveError(f"disk '{disk}' does not exist\n")
    return drive


RESIZE = method("PUT", "/{vmid}/resize", {
    "disk": {"type": "string", "enum": list(DRIVES)}, "size": {"type": "string", "pattern": r"\+?\d+(\.\d+)?[KMGT]?"},
    "skiplock": flag(), "digest": text(maxLength=40)})


@RESIZE
def _(params):
    vmid, disk = params["vmid"], params["disk"]

    def work(_upid):
        with gc.config_lock(vmid):
            conf = gc.load(vmid)
            if params.get("digest") and params["digest"] != conf["digest"]:
                raise PveError("checksum mismatch (file change by other user?)\n")
            if not params.get("skiplock"):
                gc.assert_unlocked(conf)
            drive = _disk_of(conf, disk)
            if gc.is_cdrom(drive):
                raise PveError("you can't resize a cdrom\n")
            storeid, volname = gv.split_volid(drive["file"])
            scfg = gv.storage(storeid)
            size = gv.size_of(scfg, volname)
            if size is None:
                raise PveError(f"Could not determine current size of volume '{drive['file']}'\n")
            wanted = gc.size_in_bytes(params["size"].lstrip("+")) + (size if params["size"].startswith("+") else 0)
            if wanted < size:
                raise PveError("shrinking disks is not supported\n")
            if wanted == size:
                return
            gv.resize(scfg, volname, wanted)
            drive["size"] = wanted
            conf[disk] = gc.print_drive(disk, drive)
            gc.write(vmid, conf)

    return worker("resize", vmid, work)
