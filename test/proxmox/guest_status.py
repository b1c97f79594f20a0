"""Looking at guests: lists, state, configuration."""

import os
import re
import time

import guest_config as gc
from guest_api import BASE, GROUP, method
from guest_schema import DRIVES, NODE, flag, text
from pve_cli import Method
from pve_output import out
from pve_schema import PveError, param_error, split_list


def status_of(vmid, conf):
    size = next((d["size"] for k, d in ((k, gc.parse_drive(k, conf[k])) for k in boot_disks(conf) if k in conf)
                 if d and not gc.is_cdrom(d) and d.get("size") is not None), 0)
    cpus = int(conf.get("sockets") or 1) * int(conf.get("cores") or 1)
    result = {"vmid": int(vmid), "status": "stopped", "disk": 0, "maxdisk": size,
              "cpus": int(conf["vcpus"]) if conf.get("vcpus") else min(cpus, os.cpu_count() or 1),
              "name": conf.get("name") or f"VM {vmid}", "maxmem": gc.memory_of(conf) * 1048576, "uptime": 0, "cpu": 0,
              "mem": 0, "memhost": 0, "netin": 0, "netout": 0}
    if gc.is_running(vmid):
        with open(gc.pid_file(vmid)) as file:
            result.update(status="running", pid=int(file.read()), uptime=int(time.time() - os.stat(file.name).st_mtime))
    if conf.get("balloon"):
        result.update(balloon_min=int(conf["balloon"]) * 1048576, shares=int(conf.get("shares", 1000)))
    if conf.get("template"):
        result["template"] = 1
    if any(re.fullmatch(r"serial\d+", key) for key in conf):
        result["serial"] = 1
    for key in ("lock", "tags"):
        if conf.get(key):
            result[key] = conf[key]
    return result


def boot_disks(conf):
    boot = conf.get("boot")
    if not boot or re.match(r"(legacy=)?[acdn]{1,4}\b", boot):
        return [conf["bootdisk"]] if conf.get("bootdisk") else []
    order = re.search(r"order=([^,]*)", boot)
    return [part for part in split_list(order[1]) if part in DRIVES] if order else []


VMLIST = Method("GET", BASE, {"node": NODE, "full": flag()}, group=GROUP)


@VMLIST
def _(_params):
    return [status_of(vmid, gc.load(vmid)) for vmid in gc.local_ids()]


STATUS = method("GET", "/{vmid}/status/current")


@STATUS
def _(params):
    conf = gc.load(params["vmid"])
    result = {**status_of(params["vmid"], conf), "ha": {"managed": 0}}
    result["qmpstatus"] = result["status"]
    if re.match(r"(enabled=)?1\b", str(conf.get("agent", ""))):
        result["agent"] = 1
    return result


VM_CONFIG = method("GET", "/{vmid}/config", {"current": flag(default=0),
                                            "snapshot": text(format="pve-snapshot-name")})


@VM_CONFIG
def _(params):
    if params.get("snapshot"):
        if params.get("current"):
            raise param_error({"snapshot": "cannot use 'snapshot' parameter with 'current'",
                               "current": "cannot use 'snapshot' parameter with 'current'"})
        conf = gc.load(params["vmid"])
        if params["snapshot"] not in conf["snapshots"]:
            raise PveError(f"snapshot '{params['snapshot']}' does not exist\n")
        return {**conf["snapshots"][params["snapshot"]], "digest": conf["digest"]}
    conf = gc.load_current(params["vmid"], params.get("current"))
    if conf.get("cipassword"):
        conf["cipassword"] = "**********"
    return conf


def print_config(conf):
    for key in sorted(conf):
        if key != "digest":
            out(f"{key}: {gc.encode_text(conf[key]) if key == 'description' else conf[key]}\n")


PENDING = method("GET", "/{vmid}/pending")


@PENDING
def _(params):
    conf = gc.load(params["vmid"])
    deleted, pending = gc.pending_delete(conf), dict(conf["pending"])
    rows = []
    for key, value in conf.items():
        if key in ("snapshots", "pending"):
            continue
        row = {"key": key, "value": value}
        if key in pending:
            row["pending"] = pending.pop(key)
        if key in deleted:
            row["delete"] = 2 if deleted.pop(key) else 1
        rows.append(row)
    rows += [{"key": key, "pending": value} for key, value in pending.items() if key != "delete"]
    return rows + [{"key": key, "delete": 2 if forced else 1} for key, forced in deleted.items()]


def print_pending(rows):
    for row in sorted(rows, key=lambda r: r["key"]):
        shown = {k: gc.encode_text(row[k]) if row["key"] == "description" else row[k]
                 for k in ("value", "pending") if k in row}
        if row["key"] == "digest":
            continue
        if "value" in shown and row.get("delete"):
            out(f"del {row['key']}: {shown['value']}\n")
        else:
            out("".join(f"{word} {row['key']}: {shown[k]}\n" for word, k in (("cur", "value"), ("new", "pending"))
                        if k in shown))
