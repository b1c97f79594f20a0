"""Worker tasks: PVE::RESTEnvironment::fork_worker on the command line, and the task log.

The worker is a child in its own session; whatever it prints, on stdout or stderr,
comes out on the command's stdout and goes into the log of the task. Its last word
(`TASK OK`, `TASK ERROR: ...`) goes only into the log; an error also to stderr.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import time
from typing import Any, Callable

from pve_cluster import nodename
from process_title import set_title
from pve_output import err
from pve_schema import NotCovered, PveError

LOGS = "/var/log/pve/tasks"
MAX_FINISHED = 25   # finished tasks kept in the `active` list


class Interrupted(PveError):
    pass


_warnings = 0


def log_warn(message: str) -> None:
    """A warning that makes a task end with `WARNINGS: n` instead of OK; the command still exits 0."""
    global _warnings
    err("WARN: " + message.rstrip("\n") + "\n")
    _warnings += 1


def encode_upid(pid: int, pstart: int, started: int, kind: str, ident: str, user: str = "root@pam") -> str:
    return f"UPID:{nodename()}:{pid:08X}:{pstart:08X}:{started:08X}:{kind}:{ident}:{user}:"


def decode_upid(upid: str) -> dict[str, Any]:
    match = re.fullmatch(r"UPID:([a-zA-Z0-9](?:[a-zA-Z0-9\-]*[a-zA-Z0-9])?):([0-9A-Fa-f]{8}):([0-9A-Fa-f]{8,9}):"
                         r"([0-9A-Fa-f]{8}):([^:\s]+):([^:\s]*):([^:\s]+):", upid)
    if not match:
        raise PveError(f"unable to parse worker upid '{upid}'\n")
    return {"upid": upid, "node": match[1], "pid": int(match[2], 16), "pstart": int(match[3], 16),
            "starttime": int(match[4], 16), "type": match[5], "id": match[6], "user": match[7]}


def log_path(upid: str) -> str:
    return f"{LOGS}/{format(decode_upid(upid)['starttime'], '08X')[-1]}/{upid}"


def process_start(pid: int) -> int:
    """Start time of a process in ticks, 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
            fields = handle.read().rsplit(")", 1)[1].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def is_running(task: dict[str, Any]) -> bool:
    return process_start(task["pid"]) == task["pstart"] != 0


def fork_worker(kind: str, ident: str, work: Callable[[str], Any], user: str = "root@pam") -> tuple[str, int]:
    """Run `work(upid)` as a task and wait; returns the UPID and the worker's exit code (0 or 255)."""
    os.makedirs(LOGS, exist_ok=True)
    output_r, output_w = os.pipe()
    verdict_r, verdict_w = os.pipe()
    go_r, go_w = os.pipe()
    previous = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)}
    pid = os.fork()
    if pid == 0:
        _be_worker(work, output_r, output_w, verdict_r, verdict_w, go_r, go_w)
    os.close(output_w)
    os.close(verdict_w)
    os.close(go_r)
    started = int(time.time())
    upid = encode_upid(pid, process_start(pid), started, kind, ident, user)
    path = log_path(upid)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb", buffering=0) as log:
        os.write(go_w, upid.encode())
        os.close(go_w)
        update_active(upid, True)
        _tee(pid, output_r, verdict_r, log)
        try:
            os.killpg(pid, signal.SIGTERM)
        except OSError:
            pass
    _, status = os.waitpid(pid, 0)
    for number, handler in previous.items():
        signal.signal(number, handler)
    update_active()
    return upid, os.waitstatus_to_exitcode(status) & 255


def _be_worker(work: Callable[[str], Any], output_r: int, output_w: int, verdict_r: int, verdict_w: int,
               go_r: int, go_w: int) -> None:
    code, verdict = 0, "TASK OK\n"
    try:
        os.setsid()
        for fd in (output_r, verdict_r, go_w):
            os.close(fd)
        os.dup2(output_w, 1)
        os.dup2(output_w, 2)
        os.close(output_w)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

        def interrupt(_signal: int, _frame: Any) -> None:
            raise Interrupted("received interrupt\n")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, interrupt)
        upid = os.read(go_r, 4096).decode()
        if not upid:
            raise PveError("parent setup error\n")
        set_title([f"task {upid}"])
        work(upid)
        if _warnings:
            verdict = f"TASK WARNINGS: {_warnings}\n"
    except PveError as error:
        verdict, code = "TASK ERROR: " + error.text().rstrip("\n").replace("\n", " ") + "\n", 255
    except NotCovered as gap:
        verdict, code = f"TASK ERROR: not covered by the stand-in: {gap}\n", 70
    except OSError as error:
        verdict, code = f"TASK ERROR: {error.strerror or error}\n", 255
    except BaseException as error:  # noqa: BLE001 - a bug must not leave a second copy of the command running
        verdict, code = f"TASK ERROR: stand-in broke: {error!r}\n", 70
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    try:
        os.write(verdict_w, verdict.encode("utf-8", "replace"))
    finally:
        os._exit(code)


def _tee(pid: int, output: int, verdict: int, log: Any) -> None:
    interrupts = 0

    def pass_on(_signal: int, _frame: Any) -> None:
        nonlocal interrupts
        interrupts += 1
        try:
            os.killpg(pid, signal.SIGTERM if interrupts <= 3 else signal.SIGKILL)
        except OSError:
            pass
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, pass_on)
    while True:
        ready, _, _ = select.select([output], [], [], 1)
        if not ready:
            # Some commands stay in the background without closing stdout.
            if process_start(pid) == 0:
                break
            continue
        data = os.read(output, 65536)
        if not data:
            break
        try:
            os.write(1, data)
        except BrokenPipeError:
            os._exit(141)   # the reader is gone: the worker dies of its next line, as the real one
        log.write(data)
    word = os.read(verdict, 65536).decode("utf-8", "replace")
    os.close(output)
    os.close(verdict)
    if word.startswith("TASK ERROR: "):
        err(word[len("TASK ERROR: "):])
        log.write(b"\n" + word.encode())
    elif word.startswith("TASK WARNINGS: "):
        err(f"Task finished with {word.split()[-1]} warning(s)!\n")
        log.write(b"\n" + word.encode())
    elif word.startswith("TASK OK"):
        log.write(word.encode())
    else:
        err(f"got unexpected control message: {word}\n")
        log.write(f"TASK ERROR: got unexpected control message: {word}\n".encode())


# --- the lists ------------------------------------------------------------------------------

def read_status(upid: str) -> str:
    """A task's last word, from the end of its log."""
    try:
        with open(log_path(upid), "rb") as handle:
            lines = handle.read()[-4096:].decode("utf-8", "replace").rstrip("\n").split("\n")
    except OSError:
        return "unable to open file - No such file or directory"
    last = lines[-1]
    for pattern, answer in ((r"TASK OK", "OK"), (r"TASK ERROR: (.+)", None), (r"TASK (WARNINGS: \d+)", None)):
        match = re.match(pattern, last)
        if match:
            return answer or match[1]
    return "unexpected status"


def update_active(new: str | None = None, running: bool = False) -> list[dict[str, Any]]:
    """Bring the list of active tasks up to date; finished ones go into the index, newest first."""
    os.makedirs(LOGS, exist_ok=True)
    with open(f"{LOGS}/.active.lock", "w", encoding="ascii") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        current, finished, seen = [], [], set()
        entries = _read_list(f"{LOGS}/active")
        if new:
            entries.append(decode_upid(new))
        for task in entries:
            if task["upid"] in seen:
                continue
            seen.add(task["upid"])
            if "status" not in task and ((running and task["upid"] == new) or is_running(task)):
                current.append(task)
                continue
            finished.append(task)
        finished.sort(key=lambda t: -t["starttime"])
        archive = ""
        for task in finished:
            if "status" not in task:
                task["endtime"], task["status"] = int(time.time()), read_status(task["upid"])
                archive += f"{task['upid']} {task['endtime']:08X} {task['status']}\n"
        if archive:
            with open(f"{LOGS}/index", "a", encoding="utf-8") as handle:
                handle.write(archive)
        tasks = current + finished[: max(0, MAX_FINISHED - len(current))]
        temporary = f"{LOGS}/active.tmp.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as handle:
            for task in tasks:
                handle.write(task["upid"] + (f" 1 {task['endtime']:08X} {task['status']}" if "status" in task else " 0")
                             + "\n")
        os.rename(temporary, f"{LOGS}/active")
        return tasks


def _read_list(path: str) -> list[dict[str, Any]]:
    tasks = []
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            lines = handle.read().splitlines()
    except OSError:
        return []
    for line in lines:
        match = re.fullmatch(r"(\S+)(?: [01])?(?: ([0-9A-Fa-f]{8}) (.*))?", line)
        if not match:
            continue
        try:
            task = decode_upid(match[1])
        except PveError:
            continue
        if match[2]:
            task["endtime"], task["status"] = int(match[2], 16), match[3]
        tasks.append(task)
    return tasks


def finished_tasks() -> list[dict[str, Any]]:
    """The index, newest first."""
    update_active()
    return list(reversed(_read_list(f"{LOGS}/index")))


def running_tasks() -> list[dict[str, Any]]:
    return [t for t in update_active() if "status" not in t]


def task_status(upid: str) -> dict[str, Any]:
    task = decode_upid(upid)
    if not os.path.exists(log_path(upid)):
        raise PveError("no such task\n")
    result = {k: task[k] for k in ("upid", "node", "pid", "pstart", "starttime", "type", "id", "user")}
    if is_running(task):
        result["status"] = "running"
    else:
        result["status"], result["exitstatus"] = "stopped", read_status(upid)
    return result


def upid_exit_code(upid: str) -> int:
    """What qm's `upid_exit` makes of a finished worker: 0 for OK or warnings, else 255."""
    status = read_status(upid)
    return 0 if status == "OK" or status.startswith("WARNINGS") else 255
