"""API below /cluster/backup and /cluster/backup-info: backup jobs in jobs.cfg."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from typing import Any

import calendar_event
import misbehave
import pve_cluster as cluster
import storage as st  # noqa: F401 - registers the formats of storages
from pve_cli import Method
from pve_schema import (Props, PveError, PveException, param_error, parse_property_string, permission_error,
                        print_property_string, register_format, split_list)

GROUP = "PVE::API2::Backup"

register_format("backup-fleecing", {
    "enabled": {"type": "boolean", "default": 0, "optional": 1, "default_key": 1},
    "storage": {"type": "string", "format": "pve-storage-id", "optional": 1},
}, lambda value: _check_fleecing(value))
register_format("backup-performance", {
    "max-workers": {"type": "integer", "minimum": 1, "maximum": 256, "optional": 1},
    "pbs-entries-max": {"type": "integer", "minimum": 1, "optional": 1},
})


def _check_fleecing(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("enabled") and not value.get("storage"):
        raise PveError("'storage' parameter is required when 'enabled' is set\n")
    return value


PROPERTY_STRINGS = {"fleecing": "backup-fleecing", "performance": "backup-performance",
                    "prune-backups": "prune-backups"}
_S, _B, _I = ({"type": kind, "optional": 1} for kind in ("string", "boolean", "integer"))

# The options of vzdump; a job has these and schedule, enabled, comment and repeat-missed.
VZDUMP_OPTIONS: Props = {
    "vmid": {**_S, "format": "pve-vmid-list"}, "node": {**_S, "format": "pve-node"},
    "all": {**_B, "default": 0}, "stdexcludes": {**_B, "default": 1},
    "compress": {**_S, "enum": ["0", "1", "gzip", "lzo", "zstd"], "default": "0"},
    "pigz": {**_I, "default": 0}, "zstd": {**_I, "default": 1}, "quiet": {**_B, "default": 0},
    "mode": {**_S, "enum": ["snapshot", "suspend", "stop"], "default": "snapshot"},
    "exclude": {**_S, "format": "pve-vmid-list"},
    "exclude-path": {"type": "array", "items": {"type": "string"}, "optional": 1},
    "mailto": {**_S, "format": "email-or-username-list"},
    "mailnotification": {**_S, "enum": ["always", "failure"], "default": "always"},
    "notification-mode": {**_S, "enum": ["auto", "legacy-sendmail", "notification-system"], "default": "auto"},
    "tmpdir": _S, "dumpdir": _S, "script": _S, "storage": {**_S, "format": "pve-storage-id"},
    "stop": {**_B, "default": 0}, "bwlimit": {**_I, "minimum": 0, "default": 0},
    "ionice": {**_I, "minimum": 0, "maximum": 8, "default": 7},
    "performance": {**_S, "format": "backup-performance"}, "fleecing": {**_S, "format": "backup-fleecing"},
    "lockwait": {**_I, "minimum": 0, "default": 180}, "stopwait": {**_I, "minimum": 0, "default": 10},
    "prune-backups": {**_S, "format": "prune-backups", "default": "keep-all=1"},
    "remove": {**_B, "default": 1}, "pool": _S,
    "notes-template": {**_S, "requires": "storage", "maxLength": 1024}, "protected": {**_B, "requires": "storage"},
    "pbs-change-detection-mode": {**_S, "enum": ["legacy", "data", "metadata"]},
}
_JOB_ONLY: Props = {
    "schedule": {**_S, "format": "pve-calendar-event", "maxLength": 128},
    "enabled": {**_B, "default": 1}, "repeat-missed": {**_B, "default": 0}, "comment": {**_S, "maxLength": 512},
}
_OLD: Props = {
    "starttime": {**_S, "pattern": r"\d{1,2}:\d{1,2}"},
    "dow": {**_S, "format": "pve-day-of-week-list", "requires": "starttime"},
}
_JOBID = {"type": "string", "pattern": r"\S+", "maxLength": 50}
_STORED = {**VZDUMP_OPTIONS, **_JOB_ONLY}


def _decode(_kind: str, key: str, value: Any) -> Any:
    if key in PROPERTY_STRINGS and isinstance(value, str):
        return parse_property_string(PROPERTY_STRINGS[key], value, key)
    return value


def _encode(_kind: str, key: str, value: Any) -> Any:
    if key == "comment":
        return cluster.encode_text(value)
    if key in PROPERTY_STRINGS and isinstance(value, dict):
        return print_property_string(value, PROPERTY_STRINGS[key])
    return value


def _decode_file(kind: str, key: str, value: Any) -> Any:
    return cluster.decode_text(value) if key == "comment" else _decode(kind, key, value)


# The other kind of job in the same file is kept, and otherwise left alone.
_REALM_SYNC: Props = {"realm": {"type": "string"}, "scope": _S, "remove-vanished": _S, "enable-new": _B}
_TYPES = {"realm-sync": {"realm": {}, "schedule": {}, "scope": {}, "enabled": {"optional": 1}, "comment": {"optional": 1},
                         "remove-vanished": {"optional": 1}, "enable-new": {"optional": 1}},
          "vzdump": {key: ({} if key == "schedule" else {"optional": 1}) for key in _STORED}}
_FROM_FILE = cluster.SectionConfig(_TYPES, {**_STORED, **_REALM_SYNC}, _decode_file, _encode)
_FROM_CALL = cluster.SectionConfig(_TYPES, {**_STORED, **_REALM_SYNC}, _decode, _encode)


def read_jobs() -> dict[str, dict[str, Any]]:
    """Every job of the file, of whatever type."""
    jobs = _FROM_FILE.parse("jobs.cfg", cluster.read("jobs.cfg"))
    for job in jobs.values():
        job.setdefault("enabled", 1)
    return jobs


def _backup_job(ident: str) -> dict[str, Any]:
    job = read_jobs().get(ident)
    if job is None or job["type"] != "vzdump":
        raise _no_such_job(ident)
    return job


# --- what the scheduler remembers of a job ----------------------------------------------------

_STATES = "/var/lib/pve-manager/jobs"


def _state(ident: str) -> dict[str, Any]:
    try:
        with open(f"{_STATES}/vzdump-{ident}.json", encoding="utf-8") as handle:
            return json.load(handle)
    except (OSError, ValueError):
        return {"state": "created", "time": 0}


def _save_state(ident: str, state: dict[str, Any]) -> None:
    os.makedirs(_STATES, exist_ok=True)
    path = f"{_STATES}/vzdump-{ident}.json"
    with open(f"{path}.tmp.{os.getpid()}", "w", encoding="utf-8") as handle:
        json.dump(state, handle)
    os.rename(f"{path}.tmp.{os.getpid()}", path)


def _remember(ident: str, job: dict[str, Any], created: bool) -> None:
    state = _state(ident)
    if created:
        if state["state"] != "created":
            raise PveError("job state already exists\n")
        state["time"] = int(time.time())
    kept = {key: job[key] for key in ("enabled", "schedule") if job.get(key) is not None}
    if not created and state.get("config", {}) != kept:
        state["updated"] = int(time.time())
    elif not created:
        return
    state["config"] = kept
    _save_state(ident, state)


def _forget(ident: str) -> None:
    try:
        os.unlink(f"{_STATES}/vzdump-{ident}.json")
    except OSError:
        pass


def write_jobs(jobs: dict[str, dict[str, Any]]) -> None:
    cluster.write("jobs.cfg", _FROM_FILE.format(jobs))


def _shown(ident: str, job: dict[str, Any]) -> dict[str, Any]:
    return {**job, "id": ident}


# --- checks ------------------------------------------------------------------------------

def verify_notes_template(template: str) -> None:
    if "\n" in template:
        raise PveError("contains a line feed\n")
    wrong = [f"escape sequence '\\{m[1]}' at char {m.start()}" for m in re.finditer(r"\\(.)", template)
             if m[1] not in "n\\"]
    wrong += [f"variable '{m[1]}' at char {m.start(1) + 2}" for m in re.finditer(r"\{\{([^\s{}]+)\}\}", template)
              if m[1] not in ("cluster", "guestname", "node", "vmid")]
    if wrong:
        raise PveError("found unknown: " + ", ".join(wrong) + "\n")


def verify_parameters(param: dict[str, Any], check_missing: bool) -> None:
    """verify_vzdump_parameters: one selection only; `exclude` alone means all."""
    for key in ("all", "exclude", "pool"):
        if param.get(key) and param.get("vmid"):
            raise param_error({key: "option conflicts with option 'vmid'"})
    for key, fmt in PROPERTY_STRINGS.items():
        if isinstance(param.get(key), str):
            param[key] = parse_property_string(fmt, param[key], key)
    if param.get("notes-template"):
        try:
            verify_notes_template(param["notes-template"])
        except PveError as error:
            raise param_error({"notes-template": error.text()}) from None
    if param.get("exclude") is not None and not param.get("pool"):
        param["all"] = 1
    if check_missing and not any(param.get(k) for k in ("all", "stop", "pool", "vmid")):
        raise param_error({"vmid": "property is missing"})


_ALL_DAYS = "mon,tue,wed,thu,fri,sat,sun"


def _settle_schedule(param: dict[str, Any], required: bool) -> None:
    start, dow = param.pop("starttime", None), param.pop("dow", None)
    if param.get("schedule") is not None:
        if start is not None:
            raise param_error({"starttime": "'starttime' and 'schedule' cannot both be set"})
    elif start is None:
        if required:
            raise param_error({"schedule": "neither 'starttime' nor 'schedule' were set"})
    else:
        days = ",".join(split_list(dow or ""))
        param["schedule"] = start if days in ("", _ALL_DAYS) else f"{days} {start}"


def check_pool_exists(name: str) -> None:
    if name not in cluster.pools():
        raise permission_error(f"pool '{name}' does not exist")


def _plain(action: Any) -> Any:
    """`die "$@"`: an exception that leaves a lock this way is only text, so no usage follows."""
    try:
        return action()
    except PveException as error:
        raise PveError(error.text(), 255) from None


# --- jobs -----------------------------------------------------------------------------------

_JOB_RESULT: Props = {
    **{k: s for k, s in _STORED.items()}, "id": {"type": "string"}, "next-run": {"type": "integer", "optional": 1},
    **{k: {"type": "object", "optional": 1} for k in PROPERTY_STRINGS},
}


@Method("GET", "/cluster/backup", {}, {"type": "array", "items": {"type": "object", "properties": _JOB_RESULT}}, GROUP)
def jobs_index(_param: dict[str, Any]) -> list[dict]:
    result = []
    for ident, job in read_jobs().items():
        if job["type"] != "vzdump":
            continue
        shown = _shown(ident, job)
        if job.get("schedule"):
            try:
                following = calendar_event.next_event(calendar_event.parse(job["schedule"]), int(time.time()))
                if following is not None:
                    shown["next-run"] = following
            except PveError:
                pass
        result.append(shown)
    return result


@Method("POST", "/cluster/backup", {**VZDUMP_OPTIONS, **_JOB_ONLY, **_OLD,
                                    "id": {"type": "string", "format": "pve-configid", "optional": 1}},
        {"type": "null"}, GROUP)
def job_create(param: dict[str, Any]) -> None:
    param = dict(param)
    if param.get("pool"):
        check_pool_exists(param["pool"])
    _settle_schedule(param, True)
    param.setdefault("enabled", 1)
    ident = param.pop("id", None) or str(uuid.uuid4())

    def create() -> None:
        misbehave.point("pvesh.backup.create", "locked")
        jobs = read_jobs()
        if ident in jobs:
            raise PveError(f"Job '{ident}' already exists\n")
        verify_parameters(param, True)
        jobs[ident] = _FROM_CALL.check_config("vzdump", param, True, True)
        _remember(ident, jobs[ident], True)
        write_jobs(jobs)
        misbehave.point("pvesh.backup.create", "written")
    _plain(lambda: cluster.locked_file("jobs.cfg", create))


def _no_such_job(ident: str) -> PveException:
    return param_error({"id": f"No such job '{ident}'"})


@Method("GET", "/cluster/backup/{id}", {"id": _JOBID}, {"type": "object", "properties": _JOB_RESULT}, GROUP)
def job_read(param: dict[str, Any]) -> dict:
    return _shown(param["id"], _backup_job(param["id"]))


@Method("DELETE", "/cluster/backup/{id}", {"id": _JOBID}, {"type": "null"}, GROUP)
def job_delete(param: dict[str, Any]) -> None:
    ident = param["id"]

    def delete() -> None:
        misbehave.point("pvesh.backup.delete", "locked")
        jobs = read_jobs()
        if ident not in jobs:
            raise _no_such_job(ident)
        del jobs[ident]
        _forget(ident)
        write_jobs(jobs)
    _plain(lambda: cluster.locked_file("vzdump.cron", lambda: cluster.locked_file("jobs.cfg", delete)))


@Method("PUT", "/cluster/backup/{id}", {**VZDUMP_OPTIONS, **_JOB_ONLY, **_OLD, "id": _JOBID,
                                        "delete": {"type": "string", "format": "pve-configid-list", "optional": 1}},
        {"type": "null"}, GROUP)
def job_update(param: dict[str, Any]) -> None:
    param = dict(param)
    ident = param.pop("id")
    delete = split_list(param.pop("delete", "") or "")
    if param.get("pool"):
        check_pool_exists(param["pool"])
    _settle_schedule(param, False)

    def update() -> None:
        misbehave.point("pvesh.backup.set", "locked")
        jobs = read_jobs()
        if not param and not delete:
            raise PveError("no options specified\n")
        verify_parameters(param, False)
        _FROM_CALL.check_config("vzdump", param, False, True)
        job = jobs.get(ident)
        if job is None or job["type"] != "vzdump":
            raise PveError("no such vzdump job\n")
        for key in delete:
            if key not in VZDUMP_OPTIONS and key not in ("comment", "repeat-missed"):
                raise param_error({"delete": f"unknown option '{key}'"})
            job.pop(key, None)
        job.update(param)
        if job.get("exclude") is not None and job.get("pool") is None:
            job["all"] = 1
        gone: tuple[str, ...] = ()
        if param.get("vmid") is not None:
            gone = ("all", "exclude", "pool")
        elif param.get("all"):
            gone = ("vmid", "pool")
        elif job.get("pool"):
            gone = ("vmid", "all", "exclude")
        for key in gone:
            job.pop(key, None)
        verify_parameters(job, True)
        write_jobs(jobs)
        _remember(ident, job, False)
        misbehave.point("pvesh.backup.set", "written")
    _plain(lambda: cluster.locked_file("vzdump.cron", lambda: cluster.locked_file("jobs.cfg", update)))


def remove_guest_from_jobs(vmid: int) -> None:
    """What `qm destroy --purge` does: a job whose only guest this was goes too."""
    def remove() -> None:
        jobs = read_jobs()
        changed = False
        for ident in list(jobs):
            job = jobs[ident]
            if job["type"] != "vzdump":
                continue
            for key in ("vmid", "exclude"):
                if job.get(key) is None:
                    continue
                kept = [v for v in split_list(job[key]) if v != str(vmid)]
                if len(kept) == len(split_list(job[key])):
                    continue
                changed = True
                if kept:
                    job[key] = ",".join(kept)
                elif key == "vmid":
                    del jobs[ident]
                    break
                else:
                    del job[key]
        if changed:
            write_jobs(jobs)
    cluster.locked_file("jobs.cfg", remove)


# --- what a job covers -------------------------------------------------------------------------

def included_guests(job: dict[str, Any]) -> dict[str, list[int]]:
    """node -> vmids; '' for ids that no guest has."""
    known = cluster.guests()
    if job.get("pool"):
        wanted = cluster.pools().get(job["pool"], {}).get("vms", [])
    elif job.get("vmid"):
        wanted = [int(v) for v in split_list(job["vmid"])]
    elif job.get("all"):
        excluded = {int(v) for v in split_list(job.get("exclude") or "")}
        wanted = [v for v in known if v not in excluded]
    else:
        return {}
    result: dict[str, list[int]] = {}
    for vmid in sorted(wanted):
        node = known[vmid]["node"] if vmid in known else ""
        if vmid in known and job.get("node") and job["node"] != node:
            continue
        result.setdefault(node, []).append(vmid)
    return result


_DISK = re.compile(r"(?:ide[0-3]|sata[0-5]|scsi(?:[0-9]|[12][0-9]|30)|virtio(?:[0-9]|1[0-5])|efidisk0|tpmstate0)")


def backup_volumes(config: dict[str, str]) -> list[dict[str, Any]]:
    """A virtual machine's disks and whether a backup takes them."""
    found = []
    for key in sorted(k for k in config if _DISK.fullmatch(k)):
        parts = config[key].split(",")
        options = dict(p.split("=", 1) for p in parts if "=" in p)
        volume = options.get("file", parts[0])
        if options.get("media") == "cdrom" or volume in ("none", "cdrom"):
            continue
        included, reason = 1, "backup=yes"
        if options.get("backup") in ("0", "no", "off"):
            included, reason = 0, "backup=no"
        elif key == "efidisk0" and config.get("bios") != "ovmf":
            included, reason = 0, "efidisk but no OMVF BIOS"
        found.append({"key": key, "volume": volume, "included": included, "reason": reason})
    return found


@Method("GET", "/cluster/backup/{id}/included_volumes", {"id": _JOBID}, {"type": "object", "properties": {
    "children": {"type": "array"}}}, GROUP)
def included_volumes(param: dict[str, Any]) -> dict:
    job = _backup_job(param["id"])
    known = cluster.guests()
    children = []
    for vmids in included_guests(job).values():
        for vmid in vmids:
            if vmid not in known:
                children.append({"id": vmid, "type": "unknown", "leaf": 1})
                continue
            config = cluster.guest_config(vmid)
            kind = known[vmid]["type"]
            disks = [{"id": f"{vmid}:{v['key']}", "name": v["volume"], "included": v["included"],
                      "reason": v["reason"], "leaf": 1} for v in backup_volumes(config)] if kind == "qemu" else []
            children.append({"id": vmid, "type": kind, "children": disks, "leaf": 0 if disks else 1,
                             "name": config.get("name" if kind == "qemu" else "hostname")})
    return {"children": children}


@Method("GET", "/cluster/backup-info", {}, {"type": "array", "items": {"type": "object", "properties": {
    "subdir": {"type": "string"}}}}, "PVE::API2::Cluster::BackupInfo")
def backup_info(_param: dict[str, Any]) -> list[dict]:
    return [{"subdir": "not-backed-up"}]


@Method("GET", "/cluster/backup-info/not-backed-up", {}, {"type": "array", "items": {"type": "object", "properties": {
    "type": {"type": "string"}, "vmid": {"type": "integer"}, "name": {"type": "string", "optional": 1}}}},
    "PVE::API2::Cluster::BackupInfo")
def not_backed_up(_param: dict[str, Any]) -> list[dict]:
    covered = {vmid for job in read_jobs().values() if job["type"] == "vzdump" for vmids in included_guests(job).values() for vmid in vmids}
    result = []
    for vmid, guest in cluster.guests().items():
        if vmid in covered:
            continue
        config = cluster.guest_config(vmid)
        name = config.get("name" if guest["type"] == "qemu" else "hostname")
        result.append({"vmid": vmid, "type": guest["type"], **({"name": name} if name else {})})
    return result
