"""Snapshots: their tree, and, for stopped guests on qcow2, making, removing and going back."""

import time

import guest_config as gc
import guest_volumes as gv
from guest_api import method, worker
from guest_schema import flag, text
from pve_output import out
from pve_schema import NotCovered, PveError


SNAPSHOTS = method("GET", "/{vmid}/snapshot")


@SNAPSHOTS
def _(params):
    conf = gc.load(params["vmid"])
    rows = []
    for name, snap in conf["snapshots"].items():
        row = {"name": name, "snaptime": int(snap.get("snaptime") or 0), "vmstate": 1 if snap.get("vmstate") else 0,
               "description": snap.get("description", "")}
        rows.append({**row, **{k: snap[k] for k in ("parent", "snapstate") if snap.get(k)}})
    current = {"name": "current", "digest": conf["digest"], "running": int(gc.is_running(params["vmid"])),
               "description": "You are here!"}
    return rows + [{**current, **({"parent": conf["parent"]} if conf.get("parent") else {})}]


def print_snapshots(rows):
    by_name = {row["name"]: row for row in rows}
    children = {}
    for row in rows:
        children.setdefault(row.get("parent") if row.get("parent") in by_name else None, []).append(row["name"])

    def show(prefix, name):
        row = by_name[name]
        when = time.strftime("%F %H:%M:%S", time.localtime(row["snaptime"])) if "snaptime" in row else ""
        about = (row.get("description") or "no-description").split("\n")[0]
        out(f"{prefix} {name:<{max(0, 30 - len(prefix))}} {when:<23} {about}\n")
        for child in sorted(children.get(name, []), key=lambda n: by_name[n].get("snaptime", 1 << 62)):
            show(" " + prefix, child)

    for root in sorted(children.get(None, []), key=lambda n: by_name[n].get("snaptime", 1 << 62)):
        show("`->", root)


SNAPSHOT = method("POST", "/{vmid}/snapshot", {"snapname": {"type": "string", "format": "pve-snapshot-name"},
                                             "vmstate": flag(), "description": text()})
DELSNAPSHOT = method("DELETE", "/{vmid}/snapshot/{snapname}", {
    "snapname": {"type": "string", "format": "pve-snapshot-name"}, "force": flag()})
ROLLBACK = method("POST", "/{vmid}/snapshot/{snapname}/rollback", {
    "snapname": {"type": "string", "format": "pve-snapshot-name"}, "start": flag(default=0)})


@SNAPSHOT
def _(params):
    vmid, name = params["vmid"], params["snapname"]
    if name == "current":
        raise PveError("unable to use snapshot name 'current' (reserved name)\n")

    def work(_upid):
        with gc.config_lock(vmid):
            conf = gc.load(vmid)
            if conf.get("template"):
                raise PveError("you can't take a snapshot if it's a template\n")
            gc.assert_unlocked(conf)
            if name in conf["snapshots"]:
                raise PveError(f"snapshot name '{name}' already used\n")
            disks = [d for _, d in gc.drives(conf) if not gc.is_cdrom(d)]
            if not all(_can_snapshot(drive) for drive in disks):
                raise PveError("snapshot feature is not available\n")
            for drive in disks:
                _qemu_img_snapshot("-c", name, drive)
            saved = {k: v for k, v in conf.items() if k not in (*gc.SECTIONS, "lock") and not k.startswith("unused")}
            saved["snaptime"] = int(time.time())
            if params.get("description"):
                saved["description"] = params["description"]
            conf["snapshots"][name] = saved
            conf["parent"] = name
            gc.write(vmid, conf)

    return worker("qmsnapshot", vmid, work)


def _can_snapshot(drive):
    storeid, volname = gv.split_volid(drive["file"], True)
    if not storeid or not gv.has_feature(gv.storage(storeid), "snapshot", volname):
        return False
    if gv.storage(storeid)["type"] == "lvmthin":
        raise NotCovered("snapshots on LVM-thin")
    return True


def _qemu_img_snapshot(option, name, drive):
    storeid, volname = gv.split_volid(drive["file"])
    gv.run(["/usr/bin/qemu-img", "snapshot", option, name, gv.real_path(gv.storage(storeid), volname)])


@DELSNAPSHOT
def _(params):
    vmid, name = params["vmid"], params["snapname"]

    def work(_upid):
        with gc.config_lock(vmid):
            conf = gc.load(vmid)
            gc.assert_unlocked(conf)
            snap = _snapshot_of(conf, name)
            for _, drive in gc.drives(snap):
                if not gc.is_cdrom(drive):
                    _qemu_img_snapshot("-d", name, drive)
            for other in (conf, *conf["snapshots"].values()):
                if other.get("parent") == name:
                    other.pop("parent")
                    if snap.get("parent"):
                        other["parent"] = snap["parent"]
            del conf["snapshots"][name]
            gc.write(vmid, conf)

    return worker("qmdelsnapshot", vmid, work)


def _snapshot_of(conf, name):
    if name not in conf["snapshots"]:
        raise PveError(f"snapshot '{name}' does not exist\n")
    return conf["snapshots"][name]


@ROLLBACK
def _(params):
    vmid, name = params["vmid"], params["snapname"]

    def work(_upid):
        with gc.config_lock(vmid):
            conf = gc.load(vmid)
            gc.assert_unlocked(conf)
            snap = _snapshot_of(conf, name)
            for _, drive in gc.drives(snap):
                if not gc.is_cdrom(drive):
                    _qemu_img_snapshot("-a", name, drive)
            kept = {k: v for k, v in conf.items() if k.startswith("unused")}
            new = {k: v for k, v in snap.items() if k not in ("snaptime", "snapstate")}
            gc.write(vmid, {**kept, **new, "parent": name, "snapshots": conf["snapshots"], "pending": {}})

    return worker("qmrollback", vmid, work)
