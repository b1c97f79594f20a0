"""Making a guest: `qm create`, and restoring one from an archive (`qmrestore`, `qm create --archive`)."""

import os
import re
import uuid

import guest_config as gc
import guest_volumes as gv
import misbehave
import guests
from guest_api import BASE, GROUP, add_to_pool, assert_pool, worker
from guest_clone import make_template
from guest_disks import check_storages, create_disks, normalise_drives, try_free
from guest_restore import restore_vma
from guest_schema import DRIVES, NODE, STORAGE_ID, VMID, flag, number, options, text, whole
from pve_cli import Method
from pve_output import err, out
from pve_schema import NotCovered, PveError, param_error

CREATE = Method("POST", BASE, {
    "node": NODE, "vmid": VMID, **options(), "archive": text(maxLength=255), "storage": STORAGE_ID,
    "force": flag(requires="archive"), "unique": flag(requires="archive"), "live-restore": flag(),
    "pool": text(format="pve-poolid"), "bwlimit": whole(minimum=0), "start": flag(default=0),
    "ha-managed": flag(default=0), "import-working-storage": STORAGE_ID}, group=GROUP)

QMRESTORE = Method("POST", "", {
    "vmid": VMID, "archive": {"type": "string", "maxLength": 255}, "storage": STORAGE_ID, "force": flag(),
    "unique": flag(), "pool": text(format="pve-poolid"), "bwlimit": whole(minimum=0), "live-restore": flag(),
    "start": flag(default=0), "ha-managed": flag(default=0)}, group="PVE::CLI::qmrestore")

OWN = ("archive", "storage", "force", "unique", "live-restore", "pool", "bwlimit", "start", "ha-managed",
       "import-working-storage")


@QMRESTORE
def _(params):
    return CREATE.function(params)


@CREATE
def _(params):
    params.pop("node", None)
    vmid = params.pop("vmid")
    given = {key: params.pop(key, None) for key in OWN}
    archive, pool = given["archive"], given["pool"]
    if given["ha-managed"]:
        raise NotCovered("--ha-managed")
    assert_pool(pool)
    if archive:
        for key in sorted(params):
            if key in DRIVES:
                raise param_error({key: "option conflicts with option 'archive'"})
        if archive != "-":
            find_archive(archive)
    if params:
        check_storages(params, given["storage"])
        normalise_drives(params)
        for key in params:
            if re.fullmatch(r"net\d+", key):
                params[key] = gc.normal_net(params[key])
    what = f"unable to {'restore' if archive else 'create'} VM {vmid} -"
    try:
        gc.create_and_lock(vmid, given["force"])
    except PveError as error:
        raise PveError(f"{what} {error.text()}")
    misbehave.point("qmrestore" if archive else "qm.create", "reserved")
    if archive:
        return worker("qmrestore", vmid, lambda _upid: _restore(vmid, given, params, what))
    return worker("qmcreate", vmid, lambda _upid: _create(vmid, given, params, what))


# ---------------------------------------------------------------- a new guest

def _create(vmid, given, conf, what):
    try:
        with gc.config_lock(vmid, 1):
            _create_locked(vmid, given, conf, what)
    except PveError:
        try:
            gc.remove(vmid)
        except PveError as error:
            err(error.text())
        raise
    _autostart(vmid, given)


def _create_locked(vmid, given, conf, what):
    made = []
    try:
        conf["meta"] = gc.meta()
        made, disks = create_disks(vmid, conf, conf, given["storage"])
        conf.update(disks)
        if not conf.get("boot"):
            devices = default_boot_devices(conf)
            conf["boot"] = "order=" + ";".join(devices) if devices else ""
        if not conf.get("smbios1"):
            conf["smbios1"] = gc.new_smbios_uuid()
        if conf.get("vmgenid", "1") == "1":
            conf["vmgenid"] = str(uuid.uuid4())
        if "tags" in conf:
            conf["tags"] = gc.unique_tags(conf["tags"])
        gc.write(vmid, conf)
    except PveError as error:
        for volid in made:
            try_free(volid)
        raise PveError(f"{what} {error.text()}")
    if given["pool"]:
        add_to_pool(vmid, given["pool"])


def default_boot_devices(conf):
    """The first disk, the first CD drive, the first network card."""
    drives = list(gc.drives(conf))
    bootable = [(key, gc.is_cdrom(drive)) for key, drive in drives if key not in ("efidisk0", "tpmstate0")]
    first = [next((key for key, cd in bootable if cd == wanted), None) for wanted in (False, True)]
    first.append(next((f"net{n}" for n in range(32) if conf.get(f"net{n}")), None))
    return [key for key in first if key]


def _autostart(vmid, given):
    if given["start"]:
        out("Execute autostart\n")
        try:
            guests.start(vmid)
        except PveError as error:
            err(error.text())


# ---------------------------------------------------------------- from an archive

def find_archive(archive):
    """(volume id or None, absolute path) of an archive that exists."""
    storeid, volname = gv.split_volid(archive, True)
    if storeid:
        scfg = gv.storage(storeid)
        if scfg["type"] == "pbs":
            raise NotCovered("archives of a Proxmox Backup Server")
        volume = gv.parse_volname(scfg, volname)
        if volume.content != "backup":
            raise PveError(f"unable to use volume {archive} - content type needs to be 'backup'\n", 2)
        gv.activate(storeid)
        path = gv.path(scfg, volname)
        if not os.path.exists(path):
            raise PveError(f"volume '{archive}' does not exist\n", 2)
        return archive, path
    path = os.path.realpath(archive)
    if not os.path.isfile(path):
        raise PveError(f"can't find file '{archive}'\n", 2)
    return None, path


def _restore(vmid, given, override, what):
    done = []
    try:
        conf = gc.load(vmid)
        gc.assert_unprotected(conf, what)
        if gc.is_running(vmid):
            raise PveError(f"{what} vm is running\n")
        with gc.config_lock(vmid, 1):
            restore_vma(vmid, given, override, find_archive(given["archive"]) if given["archive"] != "-" else None)
            done.append(True)
            conf = gc.load(vmid)
            if conf.get("template"):
                err("Convert to template.\n")
                try:
                    make_template(vmid, conf)
                except PveError as error:
                    err(error.text())
        _autostart(vmid, given)
    except PveError:
        try:
            gc.remove_lock(vmid, "create")
        except PveError as error:
            err(error.text())
        if done:
            err("error after data was restored, VM disks should be OK but config may require adaptions. "
                f"VM {vmid} state is NOT cleaned up.\n")
        else:
            err("error before or during data restore, some or all disks were not completely restored. "
                f"VM {vmid} state is NOT cleaned up.\n")
        raise
