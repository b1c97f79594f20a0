"""API below /nodes (tasks, version), /version, /pools and /."""

from __future__ import annotations

import os
import signal
from typing import Any

import datacenter
import pve_cluster as cluster
import pve_tasks as tasks
import storage as st
from api_cluster import nodes, storage_entry, vm_entry
from pve_cli import Method
from pve_output import err
from pve_schema import PveError, param_error, split_list

NODE = {"type": "string", "format": "pve-node"}
_S = {"type": "string", "optional": 1}
_I = {"type": "integer", "optional": 1}
VERSION = {"release": "9.2", "repoid": "0000000000000000", "version": "9.2.11"}
_NODE_CHILDREN = ("aplinfo apt capabilities ceph certificates config disks dns firewall hardware hosts journal lxc "
                  "migrateall netstat network qemu query-oci-repo-tags query-url-metadata replication report rrd "
                  "rrddata scan sdn services spiceshell startall status stopall storage subscription suspendall "
                  "syslog tasks termproxy time version vncshell vzdump wakeonlan").split()


def _list(**props: dict) -> dict:
    return {"type": "array", "items": {"type": "object", "properties": props}}


@Method("GET", "/", {}, _list(subdir={"type": "string"}), "PVE::API2")
def root(_param: dict[str, Any]) -> list[dict]:
    return [{"subdir": name} for name in ("version", "cluster", "nodes", "storage", "access", "pools")]


@Method("GET", "/version", {}, {"type": "object", "properties": {
    "console": _S, "release": {"type": "string"}, "repoid": {"type": "string"}, "version": {"type": "string"}}},
    "PVE::API2")
def version(_param: dict[str, Any]) -> dict[str, Any]:
    console = datacenter.read().get("console")
    return {**VERSION, **({"console": console} if console else {})}


@Method("GET", "/nodes/{node}/version", {"node": NODE}, {"type": "object", "properties": {
    "release": {"type": "string"}, "repoid": {"type": "string"}, "version": {"type": "string"}}}, "PVE::API2::Nodes")
def node_version(_param: dict[str, Any]) -> dict[str, Any]:
    return dict(VERSION)


@Method("GET", "/nodes", {}, _list(
    node={"type": "string"}, status={"type": "string"}, cpu={"type": "number", "optional": 1}, maxcpu=_I, mem=_I,
    maxmem=_I, level=_S, uptime=_I, ssl_fingerprint=_S), "PVE::API2::Nodes")
def nodes_index(_param: dict[str, Any]) -> list[dict]:
    result = []
    for name in nodes():
        certificate = f"/etc/pve/nodes/{name}/pve-ssl.pem"
        fingerprint = None
        if not os.path.exists(certificate):
            err(f"'{certificate}' does not exist!\n")
        else:
            import base64
            import hashlib
            with open(certificate, encoding="ascii", errors="ignore") as handle:
                body = "".join(line.strip() for line in handle if not line.startswith("-----"))
            text = hashlib.sha256(base64.b64decode(body)).hexdigest().upper()
            fingerprint = ":".join(text[i:i + 2] for i in range(0, 64, 2))
        result.append({"id": f"node/{name}", "node": name, "type": "node", "status": "unknown",
                       "ssl_fingerprint": fingerprint})
    return result


@Method("GET", "/nodes/{node}", {"node": NODE}, _list(), "PVE::API2::Nodes")
def node_index(_param: dict[str, Any]) -> list[dict]:
    return [{"name": name} for name in _NODE_CHILDREN]


# --- tasks ---------------------------------------------------------------------------------

_TASK_FILTERS = {
    "node": NODE, "start": {**_I, "minimum": 0}, "limit": {**_I, "minimum": 0}, "userfilter": _S, "typefilter": _S,
    "vmid": {**_I, "format": "pve-vmid"}, "errors": {"type": "boolean", "optional": 1},
    "source": {**_S, "enum": ["archive", "active", "all"]}, "since": _I, "until": _I,
    "statusfilter": {**_S, "format": "string-list"}}


def _status_type(status: str | None) -> str:
    if not status:
        return "unknown"
    if status == "OK":
        return "ok"
    return "warning" if status.startswith("WARNINGS") else "unknown" if status == "unexpected status" else "error"


@Method("GET", "/nodes/{node}/tasks", _TASK_FILTERS, _list(
    upid={"type": "string", "title": "UPID"}, node={"type": "string", "title": "Node"},
    pid={"type": "integer", "title": "PID"}, pstart={"type": "integer"},
    starttime={"type": "integer", "title": "Starttime", "renderer": "timestamp"}, type={"type": "string", "title": "Type"},
    id={"type": "string", "title": "ID"}, user={"type": "string", "title": "User"},
    endtime={**_I, "title": "Endtime", "renderer": "timestamp"}, status={**_S, "title": "Status"}), "PVE::API2::Tasks")
def task_list(param: dict[str, Any]) -> list[dict]:
    source = param.get("source", "archive")
    found: list[dict[str, Any]] = []
    if source in ("active", "all"):
        found += [{**task, "status": "RUNNING"} for task in tasks.running_tasks()]
    if source != "active":
        found += tasks.finished_tasks()
    wanted = {"ok", "warning", "error", "unknown"}
    if param.get("errors"):
        wanted.discard("ok")
    elif param.get("statusfilter"):
        wanted = {word.lower() for word in split_list(param["statusfilter"])}
    skip, limit = int(param.get("start", 0)), int(param.get("limit", 50))
    result = []
    for task in found:
        if (param.get("userfilter", "").lower() not in task["user"].lower()
                or param.get("typefilter") not in (None, task["type"])
                or (param.get("vmid") and task["id"] != str(param["vmid"]))
                or task["starttime"] < int(param.get("since", 0))
                or (param.get("until") and task["starttime"] > int(param["until"]))
                or _status_type(task.get("status")) not in wanted):
            continue
        if skip > 0:
            skip -= 1
            continue
        if len(result) >= limit:
            break
        result.append(task)
    return result


_UPID = {"node": NODE, "upid": {"type": "string"}}


def _known_task(upid: str) -> dict[str, Any]:
    try:
        task = tasks.decode_upid(upid)
    except PveError:
        raise param_error({"upid": "unable to parse worker upid"}) from None
    if not os.path.exists(tasks.log_path(upid)):
        raise param_error({"upid": "no such task"})
    return task


@Method("GET", "/nodes/{node}/tasks/{upid}", _UPID, _list(), "PVE::API2::Tasks")
def task_index(_param: dict[str, Any]) -> list[dict]:
    return [{"name": "log"}, {"name": "status"}]


@Method("DELETE", "/nodes/{node}/tasks/{upid}", _UPID, {"type": "null"}, "PVE::API2::Tasks")
def task_stop(param: dict[str, Any]) -> None:
    task = _known_task(param["upid"])
    if tasks.is_running(task):
        try:
            os.killpg(task["pid"], signal.SIGTERM)
        except OSError:
            os.kill(task["pid"], signal.SIGTERM)


@Method("GET", "/nodes/{node}/tasks/{upid}/log", {**_UPID, "start": {**_I, "minimum": 0}, "limit": {**_I, "minimum": 0},
                                                  "download": {"type": "boolean", "optional": 1}},
        _list(n={"type": "integer"}, t={"type": "string"}), "PVE::API2::Tasks")
def task_log(param: dict[str, Any]) -> Any:
    try:
        path = tasks.log_path(param["upid"])
    except PveError:
        raise param_error({"upid": "unable to parse worker upid"}) from None
    if not os.path.exists(path):
        return [{"n": 1, "t": "unable to open file - No such file or directory"}]
    with open(path, encoding="utf-8", errors="replace") as handle:
        text = handle.read()
    if param.get("download"):
        return text
    lines = text.split("\n")[:-1] if text.endswith("\n") else text.split("\n")
    start, limit = int(param.get("start", 0)), int(param.get("limit", 50))
    shown = [{"n": n, "t": line} for n, line in enumerate(lines, 1)][start:start + limit if limit else None]
    return shown or [{"n": start + 1, "t": "no content"}]


@Method("GET", "/nodes/{node}/tasks/{upid}/status", _UPID, {"type": "object", "properties": {
    "pid": {"type": "integer"}, "status": {"type": "string"}, "type": {"type": "string"}, "id": {"type": "string"},
    "user": {"type": "string"}, "exitstatus": _S, "pstart": {"type": "integer"}, "starttime": {"type": "number"},
    "upid": {"type": "string"}, "node": {"type": "string"}}}, "PVE::API2::Tasks")
def task_status(param: dict[str, Any]) -> dict[str, Any]:
    _known_task(param["upid"])
    return tasks.task_status(param["upid"])


# --- pools ------------------------------------------------------------------------------------

_POOLS = "PVE::API2::Pool"
_POOLID = {"type": "string", "format": "pve-poolid"}


def _pool_info(name: str, kind: str | None) -> dict[str, Any]:
    all_pools = cluster.pools()
    if name not in all_pools:
        raise PveError(f"pool '{name}' does not exist\n")
    pool, known, config = all_pools[name], cluster.guests(), st.StorageConfig()
    members = [vm_entry(v, known[v]) for v in sorted(pool["vms"], key=str)
               if v in known and kind in (None, known[v]["type"])]
    if kind in (None, "storage"):
        members += [storage_entry(s, config.ids[s], cluster.nodename()) for s in sorted(pool["storages"])
                    if s in config.ids]
    return {"members": members, "poolid": name, **({"comment": pool["comment"]} if pool["comment"] else {})}


@Method("GET", "/pools", {"poolid": {**_POOLID, "optional": 1},
                          "type": {**_S, "enum": ["qemu", "lxc", "storage"], "requires": "poolid"}},
        _list(poolid={"type": "string"}, comment=_S, members={"type": "array", "optional": 1}), _POOLS)
def pools_index(param: dict[str, Any]) -> list[dict]:
    if param.get("poolid"):
        return [_pool_info(param["poolid"], param.get("type"))]
    return [{"poolid": name, **({"comment": pool["comment"]} if pool["comment"] else {})}
            for name, pool in sorted(cluster.pools().items())]


@Method("GET", "/pools/{poolid}", {"poolid": _POOLID, "type": {**_S, "enum": ["qemu", "lxc", "storage"]}},
        {"type": "object", "properties": {"comment": _S, "members": {"type": "array"}}}, _POOLS)
def pool_read(param: dict[str, Any]) -> dict[str, Any]:
    return _pool_info(param["poolid"], param.get("type"))


def _change_pools(failure: str, change: Any) -> None:
    def run() -> None:
        all_pools = cluster.pools()
        change(all_pools)
        cluster.write_pools(all_pools)
    try:
        cluster.locked_file("user.cfg", run)
    except PveError as error:
        raise PveError(f"{failure}: {error.text()}", error.exit_code) from None


@Method("POST", "/pools", {"poolid": _POOLID, "comment": _S}, {"type": "null"}, _POOLS)
def pool_create(param: dict[str, Any]) -> None:
    def create(all_pools: dict) -> None:
        name = param["poolid"]
        parent, _, leaf = name.rpartition("/")
        if name in all_pools:
            raise PveError(f"pool '{name}' already exists\n")
        if parent and parent not in all_pools:
            raise PveError(f"parent '{parent}' of pool '{name}' does not exist\n")
        if not leaf[:1].isalpha():
            raise PveError("pool name must start with a letter\n")
        all_pools[name] = {"comment": param.get("comment", ""), "vms": [], "storages": []}
    _change_pools("create pool failed", create)


_POOL_CHANGES = {"poolid": _POOLID, "comment": _S, "vms": {**_S, "format": "pve-vmid-list"},
                 "storage": {**_S, "format": "pve-storage-id-list"},
                 "allow-move": {"type": "boolean", "optional": 1}, "delete": {"type": "boolean", "optional": 1}}


def _update_pool(param: dict[str, Any]) -> None:
    def update(all_pools: dict) -> None:
        name = param["poolid"]
        if name not in all_pools:
            raise PveError(f"pool '{name}' does not exist\n")
        pool = all_pools[name]
        if param.get("comment") is not None:
            pool["comment"] = param["comment"]
        for key, text, label in (("vms", param.get("vms"), "VM {}"), ("storages", param.get("storage"), "Storage '{}'")):
            for word in split_list(text or ""):
                member: Any = int(word) if key == "vms" else word
                if param.get("delete"):
                    if member not in pool[key]:
                        raise PveError(label.format(member) + " is not a pool member\n")
                    pool[key].remove(member)
                    continue
                if member in pool[key]:
                    raise PveError(label.format(member) + " is already a pool member\n")
                owner = next((n for n, p in all_pools.items() if key == "vms" and member in p["vms"]), None)
                if owner:
                    if not param.get("allow-move"):
                        raise PveError(f"VM {member} belongs already to pool '{owner}' and 'allow-move' is not set\n")
                    all_pools[owner]["vms"].remove(member)
                pool[key].append(member)
    _change_pools("update pools failed", update)


@Method("PUT", "/pools/{poolid}", _POOL_CHANGES, {"type": "null"}, _POOLS)
def pool_update(param: dict[str, Any]) -> None:
    _update_pool(param)


@Method("PUT", "/pools", _POOL_CHANGES, {"type": "null"}, _POOLS)
def pools_update(param: dict[str, Any]) -> None:
    _update_pool(param)


def _delete_pool(param: dict[str, Any]) -> None:
    def delete(all_pools: dict) -> None:
        name = param["poolid"]
        if name not in all_pools:
            raise PveError(f"pool '{name}' does not exist\n")
        below = sorted(n for n in all_pools if n.startswith(name + "/"))
        if below:
            raise PveError(f"pool '{name}' is not empty (contains pool '{below[0]}')\n")
        known, config = cluster.guests(), st.StorageConfig()
        for vmid in sorted(all_pools[name]["vms"], key=str):
            if vmid in known:
                raise PveError(f"pool '{name}' is not empty (contains VM {vmid})\n")
        for ident in sorted(all_pools[name]["storages"]):
            if ident in config.ids:
                raise PveError(f"pool '{name}' is not empty (contains storage '{ident}')\n")
        del all_pools[name]
    _change_pools("delete pool failed", delete)


@Method("DELETE", "/pools/{poolid}", {"poolid": _POOLID}, {"type": "null"}, _POOLS)
def pool_delete(param: dict[str, Any]) -> None:
    _delete_pool(param)


@Method("DELETE", "/pools", {"poolid": _POOLID}, {"type": "null"}, _POOLS)
def pools_delete(param: dict[str, Any]) -> None:
    _delete_pool(param)
