"""Changing and destroying guests, and their power switch, which is only a flag: nothing runs here.

The checks before a worker starts are the real ones in their order, because that decides what is left behind.
"""

import contextlib
import os
import re
import uuid

import guest_config as gc
import guest_volumes as gv
import misbehave
from api_backup import remove_guest_from_jobs
from guest_api import method, remove_access, worker
from guest_disks import check_storages, create_disks, each_owned, normalise_drives, owner_of, try_free
from guest_schema import CONFIG, DRIVES, VMID, flag, options, text, whole
from pve_cli import Method
from pve_output import err, out
from pve_schema import PveError, param_error, split_list
from pve_tasks import log_warn


# ---------------------------------------------------------------- configuration

UPDATE = {"skiplock": flag(), "delete": text(format="pve-configid-list"), "revert": text(format="pve-configid-list"),
          "force": flag(requires="delete"), "digest": text(maxLength=40)}
UPDATE_VM = method("PUT", "/{vmid}/config", {**options(), **UPDATE}, returns={"type": "null"})


@UPDATE_VM
def _(params):
    params.pop("node", None)
    vmid, digest = params.pop("vmid"), params.pop("digest", None)
    shown = " ".join(f"-{key} {'<hidden>' if key == 'cipassword' else params[key]}" for key in sorted(params))
    skiplock, force = params.pop("skiplock", None), params.pop("force", None)
    delete, revert = params.pop("delete", None), split_list(params.pop("revert", "") or "")
    if not delete and not revert and not params:
        raise PveError("no options specified\n")
    deleted = []
    for name in revert:
        if name not in CONFIG:
            raise param_error({"revert": f"unknown option '{name}'"})
    for name in split_list(delete or ""):
        name = "ide2" if name == "cdrom" else name
        if name in params:
            raise param_error({"delete": f"you can't use '-{name}' and -delete {name}' at the same time"})
        if name not in CONFIG:
            raise param_error({"delete": f"unknown option '{name}'"})
        deleted.append(name)
    normalise_drives(params)
    for key in params:
        if re.fullmatch(r"net\d+", key):
            params[key] = gc.normal_net(params[key])
    if params.get("vmgenid") == "1":
        params["vmgenid"] = str(uuid.uuid4())
    check_storages(params)
    with gc.config_lock(vmid):
        conf = gc.load(vmid)
        if digest and digest != conf["digest"]:
            raise PveError("checksum mismatch (file change by other user?)\n")
        if not skiplock:
            gc.assert_unlocked(conf)
        balloon = int(params.get("balloon", conf.get("balloon", 0)) or 0)
        if ("memory" in params or "balloon" in params) and balloon > gc.memory_of({**conf, **params}):
            raise PveError("balloon value too large (must be smaller than assigned memory)\n")
        out(f"update VM {vmid}: {shown}\n")
        for name in revert:
            conf["pending"].pop(name, None)
        for name in deleted:
            _delete_option(vmid, conf, name, force)
        _apply(vmid, conf, params)
        gc.write(vmid, conf)


UPDATE_ASYNC = method("POST", "/{vmid}/config", {**options(), **UPDATE, "background_delay": whole(minimum=1, maximum=30)})


@UPDATE_ASYNC
def _(params):
    params.pop("background_delay", None)
    return worker("qmconfig", params["vmid"], lambda _upid: UPDATE_VM.function(params))


UNLINK = method("PUT", "/{vmid}/unlink", {"idlist": {"type": "string", "format": "pve-configid-list"}, "force": flag()},
                returns={"type": "null"})


@UNLINK
def _(params):
    params["delete"] = params.pop("idlist")
    UPDATE_VM.function(params)


def _delete_option(vmid, conf, name, force):
    if name not in conf and name not in conf["pending"]:
        err(f"cannot delete '{name}' - not set in current configuration!\n")
        return
    if gc.is_running(vmid) and name not in ("description", "name", "tags", "onboot", "protection", "startup", "lock"):
        conf["pending"]["delete"] = ",".join(split_list(conf["pending"].get("delete", "")) + [name])
        return
    drive = gc.parse_drive(name, conf.get(name, "")) if name in DRIVES or name.startswith("unused") else None
    if drive:
        what = f"can't remove unused disk '{drive['file']}'" if name.startswith("unused") else f"can't remove drive '{name}'"
        gc.assert_unprotected(conf, what)
    order = re.search(r"order=([^,]*)", conf.get("boot") or "")
    if order and name in split_list(order[1]):
        rest = [device for device in split_list(order[1]) if device != name]
        conf["boot"] = "order=" + ";".join(rest) if rest else ""
    conf.pop(name, None)
    conf["pending"].pop(name, None)
    if drive and not gc.is_cdrom(drive):
        _let_go(vmid, conf, drive, force or name.startswith("unused"))


def _let_go(vmid, conf, drive, destroy):
    """A disk that is no longer attached: destroyed, or kept as an unused one, if it is ours at all."""
    storeid, volname = gv.split_volid(drive["file"], True)
    if not storeid or owner_of(storeid, volname) != int(vmid):
        return
    if destroy:
        gv.free(storeid, volname)
    else:
        gc.add_unused(conf, drive["file"])


def _apply(vmid, conf, params):
    for key, value in params.items():
        if key == "tags":
            value = gc.unique_tags(value)
        if key in DRIVES:
            _, made = create_disks(vmid, conf, {key: value})
            value = made[key]
            old = gc.parse_drive(key, conf[key]) if key in conf else None
            if old and not gc.is_cdrom(old) and old["file"] != gc.parse_drive(key, value)["file"]:
                _let_go(vmid, conf, old, False)
        hot = key in ("name", "description", "tags", "onboot", "protection", "startup", "lock", "shares", "hookscript")
        (conf if hot or not gc.is_running(vmid) else conf["pending"])[key] = value


UNLOCK = Method("PUT", "", {"vmid": VMID}, group="PVE::CLI::qm")


@UNLOCK
def _(params):
    with gc.config_lock(params["vmid"]):
        conf = gc.load(params["vmid"])
        conf.pop("lock", None)
        conf["pending"].pop("lock", None)
        gc.write(params["vmid"], conf)


RESCAN = Method("POST", "", {"vmid": {**VMID, "optional": 1}, "dryrun": flag(default=0)}, group="PVE::CLI::qm")


@RESCAN
def _(params):
    if params.get("dryrun"):
        out("NOTE: running in dry-run mode, won't write changes out!\n")
    rescan(params.get("vmid"), False, params.get("dryrun"))


def rescan(vmid=None, nolock=True, dryrun=False):
    """Bring sizes and unused disks of configurations up to date with what lies on the storages."""
    out("rescan volumes...\n")
    found = gv.list_all_images(vmid)
    for one in [vmid] if vmid else gc.local_ids():
        with contextlib.nullcontext() if nolock else gc.config_lock(one):
            conf = gc.load(one)
            gc.assert_unlocked(conf)
            own = {image["volid"]: image for image in found if str(image["vmid"]) == str(one)}
            if _update_disks(one, conf, own) and not dryrun:
                gc.write(one, conf)


def _update_disks(vmid, conf, images):
    changed, used = False, set()
    for key, drive in gc.drives(conf):
        used.add(drive["file"])
        image = images.get(drive["file"])
        if image and not gc.is_cdrom(drive) and image["size"] != drive.get("size", 0):
            out(f"VM {vmid} ({key}): size of disk '{drive['file']}' updated from "
                f"{gc.format_size(drive.get('size', 0))} to {gc.format_size(image['size'])}\n")
            drive["size"] = image["size"]
            conf[key] = gc.print_drive(key, drive)
            changed = True
    for key in [k for k in conf if k.startswith("unused")]:
        if conf[key] in used:
            out(f"VM {vmid} remove entry '{key}', its volume '{conf[key]}' is in use\n")
            del conf[key]
            changed = True
        else:
            used.add(conf[key])
    for volid in sorted(set(images) - used):
        if f"vm-{vmid}-state-" not in volid:
            key = gc.add_unused(conf, volid)
            out(f"VM {vmid} add unreferenced volume '{volid}' as '{key}' to config\n")
            changed = True
    return changed


# ---------------------------------------------------------------- destroying

DESTROY = method("DELETE", "/{vmid}", {"skiplock": flag(), "purge": flag(), "destroy-unreferenced-disks": flag(default=0)})


@DESTROY
def _(params):
    vmid = params["vmid"]

    def early():
        conf = gc.load(vmid)
        gc.assert_unprotected(conf, f"can't remove VM {vmid}")
        if gc.is_running(vmid):
            raise PveError(f"VM {vmid} is running - destroy failed\n")

    early()

    def work(_upid):
        with gc.config_lock(vmid):
            early()
            destroy(vmid, params.get("skiplock"), params.get("destroy-unreferenced-disks"))
            remove_access(vmid)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/etc/pve/firewall/{vmid}.fw")
            if params.get("purge"):
                out(f"purging VM {vmid} from related configurations..\n")
                remove_guest_from_jobs(int(vmid))
            gc.remove(vmid)

    return worker("qmdestroy", vmid, work)


def destroy(vmid, skiplock=False, unreferenced=False):
    """Remove a guest's disks; its configuration stays as a lock that says so."""
    conf = gc.load(vmid)
    if not skiplock and conf.get("lock") != "suspended":
        gc.assert_unlocked(conf)
    if conf.get("template"):
        for _, drive in gc.drives(conf, True):
            storeid, volname = gv.split_volid(drive.get("file"), True)
            if storeid and not gc.is_cdrom(drive) and gv.is_base_and_used(storeid, gv.storage(storeid), volname):
                raise PveError(f"base volume '{drive['file']}' is still in use by linked cloned\n")
    gone = set()
    for part in (conf, conf["pending"]):
        for _, drive, _, _ in each_owned(part, vmid):
            if drive["file"] not in gone:
                gone.add(drive["file"])
                volid = drive["file"]
                try_free(volid, lambda why, volid=volid: log_warn(f"Could not remove disk '{volid}', check manually: {why}"))
    misbehave.point("qm.destroy", "disks")
    if unreferenced:
        for image in gv.list_all_images(vmid):
            try_free(image["volid"], log_warn)
    gc.write(vmid, {"lock": "destroyed"})


# ---------------------------------------------------------------- power

START = method("POST", "/{vmid}/status/start", {"skiplock": flag(), "timeout": whole(minimum=0), "machine": text(),
                                              "force-cpu": text(), "migratedfrom": text(format="pve-node"),
                                              "migration_type": text(enum=["secure", "insecure"]),
                                              "migration_network": text(), "stateuri": text(), "targetstorage": text(),
                                              "with-conntrack-state": flag(), "nets-host-mtu": text()})


@START
def _(params):
    return worker("qmstart", params["vmid"], lambda _upid: start(params["vmid"], params.get("skiplock")))


def start(vmid, skiplock=False):
    with gc.config_lock(vmid):
        conf = gc.load(vmid)
        if conf.get("template"):
            raise PveError("you can't start a vm if it's a template\n")
        if not skiplock:
            gc.assert_unlocked(conf)
        if gc.is_running(vmid):
            raise PveError(f"VM {vmid} already running\n")
        if conf["pending"]:
            _apply_pending(vmid, conf)
        for key, drive, storeid, volname in each_owned(conf, vmid, False):
            file = gv.real_path(gv.storage(storeid), volname)
            if not os.path.exists(file):
                raise PveError(f"volume '{drive['file']}' does not exist\n")
        os.makedirs(os.path.dirname(gc.pid_file(vmid)), exist_ok=True)
        with open(gc.pid_file(vmid), "w") as file:
            file.write(f"{os.getpid()}\n")


def _apply_pending(vmid, conf):
    for name in gc.pending_delete(conf):
        conf["pending"].pop("delete", None)
        _delete_option(vmid, conf, name, False)
    conf["pending"].pop("delete", None)
    for key in list(conf["pending"]):
        conf[key] = conf["pending"].pop(key)
    gc.write(vmid, conf)


def stop_method(word, kind, **params):
    found = method("POST", f"/{{vmid}}/status/{word}", {"skiplock": flag(), "timeout": whole(minimum=0),
                                                       "keepActive": flag(), **params})

    @found
    def _(given):
        def work(_upid):
            with gc.config_lock(given["vmid"]):
                conf = gc.load(given["vmid"])
                if not given.get("skiplock"):
                    gc.assert_unlocked(conf)
                if not gc.is_running(given["vmid"]):
                    return
                os.unlink(gc.pid_file(given["vmid"]))
                if conf["pending"]:
                    _apply_pending(given["vmid"], conf)
        if kind == "qmshutdown":
            gc.load(given["vmid"])
        return worker(kind, given["vmid"], work)
    return found


STOP = stop_method("stop", "qmstop", **{"overrule-shutdown": flag(), "migratedfrom": text(format="pve-node")})
SHUTDOWN = stop_method("shutdown", "qmshutdown", forceStop=flag())


def kick_method(word, kind, **params):
    """Reboot and reset: of a machine that is only a flag nothing is left to do."""
    found = method("POST", f"/{{vmid}}/status/{word}", params)

    @found
    def _(given):
        gc.load(given["vmid"])
        if not gc.is_running(given["vmid"]):
            raise PveError(f"VM {given['vmid']} not running\n")
        return worker(kind, given["vmid"], lambda _upid: None)
    return found


REBOOT = kick_method("reboot", "qmreboot", timeout=whole(minimum=0))
RESET = kick_method("reset", "qmreset", skiplock=flag())
