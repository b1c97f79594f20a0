"""API below /cluster, without the backup jobs: options, next id, resources, schedules."""

from __future__ import annotations

import socket
import time
from typing import Any

import api_backup  # noqa: F401 - its methods belong to /cluster too
import calendar_event
import datacenter
import misbehave
import pve_cluster as cluster
import storage as st
from pve_cli import Method
from pve_schema import Props, PveError, param_error, split_list

GROUP = "PVE::API2::Cluster"
_S = {"type": "string", "optional": 1}

# What `pvesh ls /cluster` shows: a child's name and what can be done with it.
CHILDREN = {
    "acme": "Dr---", "backup": "Dr-c-", "backup-info": "Dr---", "bulk-action": "Dr---", "ceph": "Dr---",
    "config": "Dr-c-", "firewall": "Dr---", "ha": "Dr---", "jobs": "Dr---", "log": "-r---", "mapping": "Dr---",
    "metrics": "Dr---", "nextid": "-r---", "notifications": "Dr---", "options": "-rw--", "qemu": "Dr---",
    "replication": "Dr-c-", "resources": "-r---", "sdn": "Drw--", "status": "-r---", "tasks": "-r---"}


@Method("GET", "/cluster", {}, {"type": "array", "items": {"type": "object", "properties": {}}}, GROUP)
def cluster_index(_param: dict[str, Any]) -> list[dict]:
    return [{"name": name} for name in CHILDREN]


@Method("GET", "/cluster/nextid", {
    "vmid": {"type": "integer", "format": "pve-vmid", "minimum": 100, "maximum": 999999999, "optional": 1,
             "description": "The (unique) ID of the VM."},
}, {"type": "integer"}, GROUP,
    "Get next free VMID. Pass a VMID to assert that its free (at time of check).")
def nextid(param: dict[str, Any]) -> str:
    taken = cluster.guests()
    if param.get("vmid"):
        if int(param["vmid"]) in taken:
            raise param_error({"vmid": f"VM {param['vmid']} already exists"})
        return str(param["vmid"])
    lower, upper = datacenter.next_id_bounds()
    for number in range(int(lower), int(upper)):
        if number not in taken:
            return str(number)
    raise PveError(f"unable to get any free VMID in range [{lower}, {upper}]\n")


# --- options -------------------------------------------------------------------------------

@Method("GET", "/cluster/options", {}, {"type": "object", "properties": {}}, GROUP)
def options_read(_param: dict[str, Any]) -> dict[str, Any]:
    config = datacenter.read()
    config["allowed-tags"] = sorted(config.get("registered-tags") or [])
    return config


@Method("PUT", "/cluster/options", {**datacenter.OPTIONS, "delete": {**_S, "format": "pve-configid-list"}}, {"type": "null"}, GROUP)
def options_set(param: dict[str, Any]) -> None:
    param = dict(param)
    delete = split_list(param.pop("delete", "") or "")

    def update() -> None:
        misbehave.point("pvesh.options.set", "locked")
        config = datacenter.read()
        config.update(param)
        for key in delete:
            config.pop(key, None)
        datacenter.write(config)
        misbehave.point("pvesh.options.set", "written")
    cluster.locked_file("datacenter.cfg", update)


# --- schedules -------------------------------------------------------------------------------

@Method("GET", "/cluster/jobs", {}, {"type": "array", "items": {"type": "object", "properties": {
    "subdir": {"type": "string"}}}}, "PVE::API2::Cluster::Jobs")
def cluster_jobs(_param: dict[str, Any]) -> list[dict]:
    return [{"subdir": "schedule-analyze"}, {"subdir": "realm-sync"}]


@Method("GET", "/cluster/jobs/schedule-analyze", {
    "schedule": {"type": "string", "format": "pve-calendar-event", "maxLength": 128},
    "starttime": {"type": "integer", "optional": 1},
    "iterations": {"type": "integer", "minimum": 1, "maximum": 100, "optional": 1, "default": 10},
}, {"type": "array", "items": {"type": "object", "properties": {
    "timestamp": {"type": "integer"}, "utc": {"type": "string"}}}}, "PVE::API2::Cluster::Jobs")
def schedule_analyze(param: dict[str, Any]) -> list[dict]:
    event = calendar_event.parse(param["schedule"])
    moment = int(param.get("starttime", int(time.time())))
    result = []
    for _ in range(int(param.get("iterations", 10))):
        following = calendar_event.next_event(event, moment)
        if following is None:
            # As recorded: no further event is told as the epoch, and counting goes on from there.
            cluster.err('Argument "none\\n" isn\'t numeric in int at '
                        "/usr/share/perl5/Proxmox/RS/CalendarEvent.pm line 25.\n")
            following = 0
        result.append({"timestamp": following,
                       "utc": time.strftime("%a %b %e %H:%M:%S %Y", time.gmtime(following))})
        moment = following
    return result


# --- resources and status ------------------------------------------------------------------------

def _pool_of() -> dict[int, str]:
    return {vmid: name for name, pool in cluster.pools().items() for vmid in pool["vms"]}


def vm_entry(vmid: int, guest: dict[str, str]) -> dict[str, Any]:
    # Without pvestatd nothing but the name of the file is known about a guest.
    return {"id": f"{guest['type']}/{vmid}", "vmid": vmid, "node": guest["node"], "type": guest["type"],
            "status": "unknown"}


def storage_entry(ident: str, scfg: dict[str, Any], node: str) -> dict[str, Any]:
    return {"id": f"storage/{node}/{ident}", "storage": ident, "node": node, "type": "storage",
            "plugintype": scfg["type"], "status": "unknown", "shared": 1 if scfg.get("shared") else 0,
            "content": ",".join(cluster.shuffled(scfg["content"])) or "none"}


def nodes() -> list[str]:
    import os
    base = f"{cluster.ROOT}/nodes"
    return sorted(os.listdir(base)) if os.path.isdir(base) else [cluster.nodename()]


_RESOURCE: Props = {
    "id": {"type": "string"}, "type": {"type": "string"},
    **{k: _S for k in ("content", "hastate", "host-arch", "level", "lock", "name", "network", "network-type", "node",
                       "plugintype", "pool", "protocol", "sdn", "status", "storage", "tags", "zone-type")},
    **{k: {"type": "integer", "optional": 1, "renderer": "bytes"} for k in (
        "disk", "diskread", "diskwrite", "maxdisk", "maxmem", "mem", "memhost", "netin", "netout")},
    **{k: {"type": "boolean", "optional": 1} for k in ("shared", "template")},
    "cgroup-mode": {"type": "integer", "optional": 1}, "vmid": {"type": "integer", "optional": 1},
    "cpu": {"type": "number", "optional": 1, "renderer": "fraction_as_percentage"},
    "maxcpu": {"type": "number", "optional": 1}, "uptime": {"type": "integer", "optional": 1, "renderer": "duration"},
}


@Method("GET", "/cluster/resources", {
    "type": {**_S, "enum": ["vm", "storage", "node", "sdn"]},
}, {"type": "array", "items": {"type": "object", "properties": _RESOURCE}}, GROUP)
def resources(param: dict[str, Any]) -> list[dict]:
    wanted = param.get("type")
    result: list[dict] = []
    if wanted in (None, "pool"):
        result += [{"id": f"/pool/{name}", "pool": name, "type": "pool"} for name in sorted(cluster.pools())]
    if wanted in (None, "vm"):
        pool_of = _pool_of()
        known = cluster.guests()
        for vmid in sorted(known, key=str):
            entry = vm_entry(vmid, known[vmid])
            if vmid in pool_of:
                entry["pool"] = pool_of[vmid]
            config = cluster.guest_config(vmid)
            entry.update({key: config[key] for key in ("lock", "tags") if key in config})
            result.append(entry)
    if wanted in (None, "node"):
        result += [{"id": f"node/{n}", "node": n, "type": "node", "status": "unknown"} for n in nodes()]
    if wanted in (None, "storage"):
        config = st.StorageConfig()
        for ident in cluster.shuffled(config.ids):
            result += [storage_entry(ident, config.ids[ident], n) for n in nodes() if config.is_enabled(ident, n)]
    if wanted in (None, "network"):
        result += [{"id": f"network/{n}/zone/localnetwork", "type": "network", "network-type": "zone",
                    "network": "localnetwork", "node": n, "status": "ok"} for n in nodes()]
    return result


def own_address() -> str:
    try:
        return socket.getaddrinfo(cluster.nodename(), None, socket.AF_INET)[0][4][0]
    except OSError:
        return "127.0.0.1"


@Method("GET", "/cluster/status", {}, {"type": "array", "items": {"type": "object", "properties": {
    "id": {"type": "string"}, "name": {"type": "string"}, "type": {"type": "string"}, "ip": _S, "level": _S,
    "local": {"type": "boolean", "optional": 1}, "nodeid": {"type": "integer", "optional": 1},
    "nodes": {"type": "integer", "optional": 1}, "online": {"type": "boolean", "optional": 1},
    "quorate": {"type": "boolean", "optional": 1}, "version": {"type": "integer", "optional": 1}}}}, GROUP)
def status(_param: dict[str, Any]) -> list[dict]:
    node = cluster.nodename()
    if cluster.read("corosync.conf"):
        names = nodes()
        return [{"type": "cluster", "id": "cluster", "name": "cluster", "nodes": len(names), "quorate": 1,
                 "version": 1}] + [
            {"type": "node", "id": f"node/{n}", "name": n, "nodeid": i, "local": 1 if n == node else 0,
             "online": 1 if n == node else 0, "level": ""} for i, n in enumerate(names, 1)]
    return [{"type": "node", "id": f"node/{node}", "name": node, "ip": own_address(), "local": 1, "nodeid": 0,
             "online": 1, "level": ""}]
