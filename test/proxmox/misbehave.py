"""Faults on order: a test writes a file, the stand-ins do the harm at the named step.

A file in /run/pve-misbehave or /etc/pve-misbehave is named COMMAND.STEP, for example
`pvesm.add.locked`, `pvesh.create.start`, `qmrestore.end`; `*` in a name matches anything.
Its lines are done in order:

    count N        do the rest N times, then the file removes itself (`once` is `count 1`)
    after N        let the first N calls pass unharmed
    slow SECONDS   wait, then go on
    hang           never go on
    die [SIGNAL]   end at once by that signal (default KILL), cleaning up nothing
    disconnect     kill the ssh connection this command came through, then go on
    run COMMAND    run a shell command, then go on (`run umount -l /mnt/pve/x`)
    fail TEXT      fail with that sentence
    exit N         end with that code, silently

Files with fixed names are switches: `pmxcfs-down` stops /etc/pve.
"""

from __future__ import annotations

import fcntl
import fnmatch
import os
import signal
import subprocess
import sys
import time

FOLDERS = ("/run/pve-misbehave", "/etc/pve-misbehave")


def is_set(name: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for folder in FOLDERS)


def setting(name: str, default: float) -> float:
    for folder in FOLDERS:
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                return float(file.read())
        except (OSError, ValueError):
            continue
    return default


def point(command: str, step: str) -> None:
    """Do what is ordered for this step; usually nothing, and then it costs two failed listdir."""
    name = f"{command}.{step}"
    for folder in FOLDERS:
        try:
            files = sorted(os.listdir(folder))
        except OSError:
            continue
        for file in files:
            if fnmatch.fnmatchcase(name, file):
                _obey(os.path.join(folder, file), name)


def _take_turn(path: str) -> list[list[str]] | None:
    """Read the order and count this call, under a lock: parallel commands count right."""
    try:
        handle = open(path, "r+", encoding="utf-8")
    except OSError:
        return None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        lines = [line.split(None, 1) for line in handle.read().splitlines() if line.strip()]
        kept, actions, skip = [], [], False
        for words in lines:
            verb, value = words[0], words[1] if len(words) > 1 else ""
            if verb == "once":
                verb, value = "count", "1"
            if verb == "after":
                left = int(value)
                if left > 0:
                    skip, value = True, str(left - 1)
                kept.append(f"after {value}")
            elif verb == "count":
                left = int(value)
                if left <= 0:
                    return None
                kept.append(f"count {left if skip else left - 1}")
            else:
                kept.append(f"{verb} {value}".rstrip())
                actions.append([verb, value])
        handle.seek(0)
        handle.truncate()
        handle.write("\n".join(kept) + "\n")
        if "count 0" in kept:
            try:
                os.unlink(path)
            except OSError:
                pass
    return None if skip else actions


def _obey(path: str, name: str) -> None:
    from pve_schema import PveError
    for verb, value in _take_turn(path) or []:
        if verb == "slow":
            time.sleep(float(value))
        elif verb == "hang":
            while True:
                time.sleep(3600)
        elif verb == "die":
            os.kill(os.getpid(), getattr(signal, "SIG" + (value or "KILL").removeprefix("SIG")))
        elif verb == "disconnect":
            _kill_connection()
        elif verb == "run":
            subprocess.run(value, shell=True, stdin=subprocess.DEVNULL, check=False)
        elif verb == "fail":
            raise PveError(value)
        elif verb == "exit":
            os._exit(int(value))
        else:
            sys.exit(f"misbehave: unknown order '{verb}' for {name} in {path}")


def _kill_connection() -> None:
    """SIGKILL the nearest sshd among the ancestors: what a lost network looks like here."""
    pid = os.getppid()
    while pid > 1:
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
                text = stat.read()
        except OSError:
            return
        if text[text.index("(") + 1: text.rindex(")")].startswith("sshd"):
            os.kill(pid, signal.SIGKILL)
            return
        pid = int(text[text.rindex(")") + 2:].split()[1])
