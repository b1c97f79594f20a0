"""vzdump: guests into archives, the stopped ones and, as nothing really runs here, the "running" ones alike."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
import uuid

import guest_config as gc
import guest_volumes as gv
import misbehave
import volumes as vo
import vma
from api_backup import PROPERTY_STRINGS, VZDUMP_OPTIONS, verify_parameters
from guest_api import worker
from guest_clone import human
from guest_config import shell_quote
from guest_schema import text
from pve_cli import Command, Method, run_simple
from pve_cluster import nodename, pools
from pve_cluster import guests as all_guests
from pve_output import err, out
from pve_schema import NotCovered, PveError, print_property_string, split_list
from pve_tasks import upid_exit_code
from storage import StorageConfig

LOCK, LOGS = "/var/run/vzdump.lock", "/var/log/vzdump"
HIDDEN = ("vmid", "stdout", "job-id")
VZDUMP = Method("POST", "/nodes/{node}/vzdump", {**VZDUMP_OPTIONS, "job-id": text(pattern=r"\S+", maxLength=50),
                                                "stdout": {"type": "boolean", "optional": 1}}, group="PVE::API2::VZDump")
DEFAULTS = Method("GET", "/nodes/{node}/vzdump/defaults", {"node": {"type": "string", "format": "pve-node"},
                                                          "storage": text(format="pve-storage-id")},
                  group="PVE::API2::VZDump")


def main(argv):
    def finish(answer):
        if answer != "OK" and upid_exit_code(answer):
            os._exit(255)
    run_simple("vzdump", Command(VZDUMP, "vmid", {}, finish), argv[1:])


@DEFAULTS
def _(params):
    storeid = params.get("storage") or "local"
    scfg = gv.storage(storeid)
    if "backup" not in scfg["content"]:
        raise PveError(f"can't use storage '{storeid}' for backups - wrong content type\n")
    found = {"all": 0, "bwlimit": 0, "compress": "0", "dumpdir": gv.subdir(scfg, "backup"), "fleecing": {"enabled": 0},
             "ionice": 7, "lockwait": 180, "mailnotification": "always", "mode": "snapshot", "notification-mode": "auto",
             "performance": {"max-workers": 16, "pbs-entries-max": 1048576}, "pigz": 0, "quiet": 0, "remove": 1,
             "stdexcludes": 1, "stop": 0, "stopwait": 10, "storage": storeid, "zstd": 1}
    found["prune-backups"] = vo.prune_text(vo.prune_options(scfg.get("prune-backups")))
    return found


EXTRACT = Method("GET", "/nodes/{node}/vzdump/extractconfig", {"node": {"type": "string", "format": "pve-node"},
                                                              "volume": {"type": "string"}}, group="PVE::API2::VZDump")


@EXTRACT
def _(params):
    return vo.extract_config(StorageConfig(), params["volume"])


@VZDUMP
def _(params):
    verify_parameters(params, True)
    if params.get("node") and params["node"] != nodename():
        return "OK"  # silently, also for "localhost"
    for key in ("stop", "tmpdir", "script", "exclude-path", "mailto"):
        if params.get(key):
            raise NotCovered(f"--{key}")
    shown = {key: print_property_string(value, PROPERTY_STRINGS[key]) if key in PROPERTY_STRINGS else str(value)
             for key, value in params.items() if key not in HIDDEN and value not in (None, "")}
    line = " ".join(["vzdump", *split_list(params.get("vmid") or "")]
                    + [f"--{key} {shell_quote(value)}" for key, value in shown.items()])
    ids, elsewhere = _selected(params)
    if not ids and not params.get("all"):
        return "OK"
    if params.get("stdout") and len(ids) != 1:
        raise PveError("you can only backup a single VM with option --stdout\n")
    if params.get("quiet"):
        null = os.open(os.devnull, os.O_WRONLY)
        for fd in (2,) if params.get("stdout") else (1, 2):
            os.dup2(null, fd)
    sink = None
    if params.get("stdout"):  # the archive goes there, all words to stderr
        sink = os.dup(1)
        os.dup2(2, 1)
    return worker("vzdump", ids[0] if len(ids) == 1 else "",
                         lambda upid: _Run(params, line, ids, elsewhere, sink).run(upid))


def _selected(params):
    """(ids of this node and of nobody, ids of other nodes)"""
    known = all_guests()
    if params.get("pool"):
        if params["pool"] not in pools():
            raise PveError(f"pool '{params['pool']}' does not exist\n")
        wanted = pools()[params["pool"]]["vms"]
    elif params.get("vmid"):
        wanted = [int(v) for v in split_list(params["vmid"])]
    else:
        wanted = sorted(set(known) - {int(v) for v in split_list(params.get("exclude") or "")})
    wanted = list(dict.fromkeys(wanted))
    here = [v for v in wanted if known.get(v, {}).get("node", nodename()) == nodename()]
    return here, [v for v in wanted if v not in here]


class _Run:
    def __init__(self, params, line, ids, elsewhere, sink):
        self.params, self.line, self.ids, self.elsewhere, self.sink = params, line, ids, elsewhere, sink
        self.options = {"mode": "snapshot", "ionice": 7, "compress": "0", "remove": 1, "lockwait": 180, **params}
        self.log_file = None

    def say(self, level, message, log=True):
        word = {"info": "INFO", "err": "ERROR", "warn": "WARN"}[level]
        for part in message.rstrip("\n").split("\n"):
            out(f"{word}: {part}\n")
            if log and self.log_file:
                self.log_file.write(f"{time.strftime('%F %H:%M:%S')} {word}: {part}\n")
                self.log_file.flush()

    def run(self, _upid):
        def interrupt(_signal, _frame):
            raise PveError("interrupted by signal\n")

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, interrupt)
        self._find_target()
        with self._lock():
            self.say("info", f"starting new backup job: {self.line}")
            if self.elsewhere:
                self.say("info", f"skip external VMs: {', '.join(map(str, sorted(self.elsewhere)))}")
            failed = 0
            try:
                for vmid in sorted(self.ids):
                    failed += not _Backup(self, vmid).run()
            except PveError as error:
                self.say("err", f"Backup job failed - {error.text()}")
                raise
            self.say("info", f"Backup job finished {'with errors' if failed else 'successfully'}")
        if failed:
            raise PveError("job errors\n")

    def _find_target(self):
        options = self.options
        if options.get("storage") and options.get("stdout"):
            raise PveError("cannot use options 'storage' and 'stdout' at the same time\n")
        if options.get("storage") and options.get("dumpdir"):
            raise PveError("cannot use options 'storage' and 'dumpdir' at the same time\n")
        self.prune = options.get("prune-backups")
        if options.get("dumpdir"):
            self.storeid, self.directory = None, options["dumpdir"].rstrip("/")
            if not os.path.isdir(self.directory):
                raise PveError(f"dumpdir '{self.directory}' does not exist\n")
        else:
            self.storeid = options.get("storage") or "local"
            self._use_storage()
        self.prune = {k: int(v) for k, v in (self.prune or {"keep-all": 1}).items()}
        if self.prune.get("keep-all"):
            options["remove"] = 0

    def _use_storage(self):
        problems = []
        try:
            gv.activate(self.storeid)
        except PveError as error:
            problems.append(f"could not activate storage '{self.storeid}': {error.text()}".rstrip("\n"))
        try:
            scfg = gv.storage(self.storeid)
            if "backup" not in scfg["content"]:
                raise PveError(f"can't use storage '{self.storeid}' for backups - wrong content type\n")
            if scfg["type"] == "pbs":
                raise NotCovered("backups to a Proxmox Backup Server")
            self.directory = gv.subdir(scfg, "backup")
            if self.prune is None and scfg.get("prune-backups"):
                self.prune = vo.prune_options(scfg["prune-backups"])
        except PveError as error:
            problems.append(f"could not get storage information for '{self.storeid}': {error.text()}".rstrip("\n"))
        if problems:
            raise PveError("\n".join(problems) + "\n")

    @contextlib.contextmanager
    def _lock(self):
        """One vzdump at a time on a node."""
        with open(LOCK, "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait = int(self.options["lockwait"])
                if not wait:
                    self.say("err", f"can't acquire lock '{LOCK}' (wait = 0)")
                    raise PveError(f"can't acquire lock '{LOCK}' (wait = 0)\n")
                self.say("info", "trying to get global lock - waiting...")
                try:
                    gc.wait_for(handle, fcntl.LOCK_EX, LOCK, wait * 60)
                except PveError:
                    self.say("err", f"can't acquire lock '{LOCK}' - got timeout\n")
                    raise PveError(f"can't acquire lock '{LOCK}' - got timeout\n")
                self.say("info", "got global lock")
            yield


class _Backup:
    """One guest's backup."""

    def __init__(self, job, vmid):
        self.job, self.vmid, self.options = job, vmid, job.options
        self.say = job.say
        self.base = self._name()
        while any(name.startswith(self.base) for name in os.listdir(job.directory)):
            time.sleep(0.1)  # the real tool takes over a second to start: no two backups share a name
            self.base = self._name()
        self.compressor, extension = self._compressor()
        self.target = f"{job.directory}/{self.base}.vma{extension}"
        self.partial = re.sub(r"\.[^.]+$", ".dat", self.target)
        self.tmp = f"{job.directory}/{self.base}.tmp"
        self.locked = self.running = self.paused = False
        self.name, self.disks, self.stopped_at = None, [], None

    def _name(self):
        self.started = int(time.time())
        return f"vzdump-qemu-{self.vmid}-{time.strftime('%Y_%m_%d-%H_%M_%S', time.localtime(self.started))}"

    def _compressor(self):
        kind = self.options["compress"]
        if kind in ("1", "lzo"):
            return "lzop", ".lzo"
        if kind == "gzip":
            threads = int(self.options.get("pigz") or 0)
            half = ((os.cpu_count() or 1) + 1) // 2
            return (f"pigz -p {half if threads == 1 else threads} --rsyncable" if threads > 0 else "gzip --rsyncable"), ".gz"
        if kind == "zstd":
            threads = int(self.options.get("zstd", 1))
            return f"zstd --threads={threads or ((os.cpu_count() or 1) + 1) // 2}", ".zst"
        return None, ""

    def run(self):
        error = None
        try:
            self._run()
        except PveError as caught:
            error = caught
        except OSError as caught:
            error = PveError(f"{caught.strerror}\n")
        self._clean_up()
        took = int(time.time()) - self.started
        if error:
            self.say("err", f"Backup of VM {self.vmid} failed - {error.text()}")
            self.say("info", f"Failed at {time.strftime('%F %H:%M:%S')}", False)
        else:
            clock = f"{took // 3600:02d}:{took // 60 % 60:02d}:{took % 60:02d}"
            self.say("info", f"Finished Backup of VM {self.vmid} ({clock})")
            self.say("info", f"Backup finished at {time.strftime('%F %H:%M:%S')}", False)
        if self.job.log_file:
            name = self.job.log_file.name
            self.job.log_file.close()
            self.job.log_file = None
            if not self.options.get("stdout"):
                with contextlib.suppress(OSError):
                    shutil.copyfile(name, f"{self.job.directory}/{self.base}.log")
        if error and error.message == "interrupted by signal\n":
            raise error
        return not error

    def _run(self):
        kind = all_guests().get(self.vmid, {}).get("type")
        if kind is None:
            raise PveError(f"unable to find VM '{self.vmid}'\n")
        if kind == "lxc":
            raise NotCovered("backups of containers")
        self._check_limits()
        shutil.rmtree(self.tmp, ignore_errors=True)
        os.mkdir(self.tmp)
        os.makedirs(LOGS, exist_ok=True)
        self.job.log_file = open(f"{LOGS}/qemu-{self.vmid}.log", "w")
        with contextlib.suppress(OSError):
            os.unlink(f"{self.job.directory}/{self.base}.log")
        self.say("info", f"Starting Backup of VM {self.vmid} (qemu)")
        self.say("info", f"Backup started at {time.strftime('%F %H:%M:%S')}", False)
        self.running = gc.is_running(self.vmid)
        self.say("info", f"status = {'running' if self.running else 'stopped'}")
        with gc.config_lock(self.vmid):
            conf = gc.load(self.vmid)
            gc.assert_unlocked(conf)
            conf["lock"] = "backup"
            gc.write(self.vmid, conf)
        self.locked = True
        misbehave.point("vzdump", "locked")
        mode = self.options["mode"] if self.running else "stop"
        if mode == "snapshot":
            self._prepare()
        self.say("info", f"backup mode: {mode}")
        if self.options.get("bwlimit"):
            self.say("info", f"bandwidth limit: {self.options['bwlimit']} KiB/s")
        self.say("info", f"ionice priority: {self.options['ionice']}")
        if mode != "snapshot":
            self._prepare()
            if self.running:
                self.say("info", "stopping virtual guest" if mode == "stop" else "suspending guest")
                self.stopped_at = time.time()
                self.paused = mode == "suspend"
        config = self._assemble()
        if self.options.get("stdout"):
            self.say("info", "sending archive to stdout")
            self._archive(config, self.job.sink)
            return
        self.say("info", f"creating vzdump archive '{self.target}'")
        with open(self.partial, "wb") as file:
            self._archive(config, file.fileno())
        misbehave.point("vzdump", "archived")
        os.rename(self.partial, self.target)
        self.say("info", f"archive file size: {_short_size(os.path.getsize(self.target))}")
        if self.job.storeid:
            self._describe()
        if self.options["remove"]:
            self._prune()

    def _check_limits(self):
        job, limit = self.job, sum(v for k, v in self.job.prune.items() if k != "keep-all")
        if not job.storeid or not ((limit and not self.options["remove"]) or self.options.get("protected")):
            return
        scfg = gv.storage(job.storeid)
        found = vo.list_volumes(job.storeid, scfg, self.vmid, ["backup"])
        protected = sum(1 for backup in found if backup.get("protected"))
        if self.options.get("protected"):
            most = int(scfg.get("max-protected-backups", -1))
            if 0 <= most <= protected:
                raise PveError(f"The number of protected backups per guest is limited to {most} on storage "
                               f"'{job.storeid}'\n")
        elif len(found) - protected >= limit:
            raise PveError(f"There is a max backup limit of {limit} enforced by the target storage or the vzdump "
                           "parameters. Either increase the limit or delete old backups.\n")

    def _prepare(self):
        conf = gc.load(self.vmid)
        self.name = conf.get("name")
        if self.name:
            self.say("info", f"VM Name: {self.name}")
        for key, drive in gc.drives(conf):
            if gc.is_cdrom(drive):
                continue
            if drive.get("backup") == 0:
                self.say("info", f"exclude disk '{key}' '{drive['file']}' (backup=no)")
            elif key == "efidisk0" and conf.get("bios") != "ovmf":
                self.say("info", f"exclude disk '{key}' '{drive['file']}' (efidisk but no OVMF BIOS)")
            else:
                size = f" {gc.format_size(drive['size'])}" if drive.get("size") is not None else ""
                self.say("info", f"include disk '{key}' '{drive['file']}'{size}")
                self.disks.append((key, drive))
        self.disks.sort(key=lambda disk: disk[0])
        for key, drive in self.disks:
            storeid, volname = gv.split_volid(drive["file"])
            gv.activate(storeid)
            if not os.path.exists(gv.real_path(gv.storage(storeid), volname)):
                raise PveError(f"volume '{drive['file']}' does not exist\n")

    def _assemble(self):
        """The configuration as it goes into the archive, with the map of its disks."""
        lines, skipped = [], set()
        for line in gc.read_raw(self.vmid).splitlines(True):
            section = re.match(r"\[(.*)\]\s*$", line)
            if section:
                skipped.add("pending" if section[1].upper() == "PENDING" else
                            "special" if section[1].startswith("special:") else "snapshot")
            unused = re.match(r"unused\d+:\s*(\S+)", line)
            if not skipped and unused:
                self.say("info", f"skip unused drive '{unused[1]}' (not included into backup)")
            elif not skipped and not re.match(r"lock:|parent:|#vzdump#|#qmdump#", line):
                lines.append(line)
        for key, drive in self.disks:
            storeid, volname = gv.split_volid(drive["file"])
            fmt = gv.parse_volname(gv.storage(storeid), volname).format
            lines.append(f"#qmdump#map:{key}:drive-{key}:{storeid}:{fmt}:\n")
        for kind, words in (("special", "special config section found"), ("snapshot", "snapshots found"),
                            ("pending", "pending configuration changes found")):
            if kind in skipped:
                self.say("info", f"{words} (not included into backup)")
        configs = [("qemu-server.conf", "".join(lines).encode("utf-8", "surrogateescape"))]
        with open(f"{self.tmp}/qemu-server.conf", "wb") as file:
            file.write(configs[0][1])
        with contextlib.suppress(FileNotFoundError):
            with open(f"/etc/pve/firewall/{self.vmid}.fw", "rb") as file:
                configs.append(("qemu-server.fw", file.read()))
        return configs

    def _archive(self, configs, sink):
        if not self.disks:
            self.say("info", "backup contains no disks")
            self.say("info", "starting diskless backup")
            words = [f"-c {self.tmp}/{name}" for name, _ in configs]
            target = "" if self.options.get("stdout") else f" > {self.partial}"
            self.say("info", f"/usr/bin/vma create -v {' '.join(words)} exec:{self.compressor or 'cat'}{target}")
            self._compress(configs, [], sink)
            return
        if not self.running or self.stopped_at and not self.paused:
            self.say("info", "starting kvm to execute backup task")
        try:
            if misbehave.is_set("no-kvm") and not self.running:
                raise PveError("KVM virtualisation configured, but not available. Either disable in VM configuration or "
                               "enable in BIOS.\n")
            self.say("info", "starting backup via QMP command")
            self.say("info", f"started backup task '{uuid.uuid4()}'")
            if self.running and not self.paused:
                since = f" after {int(time.time() - self.stopped_at)} seconds" if self.stopped_at else ""
                self.say("info", f"resuming VM again{since}")
                self.stopped_at = None
            with contextlib.ExitStack() as stack:
                drives = []
                for key, drive in self.disks:
                    storeid, volname = gv.split_volid(drive["file"])
                    drives.append((f"drive-{key}", stack.enter_context(gv.readable_raw(gv.storage(storeid), volname))))
                self._compress(configs, drives, sink)
        except PveError as error:
            self.say("err", error.text())
            self.say("info", "aborting backup job")
            if not self.running:
                self.say("err", f"VM {self.vmid} not running")
                err(f"VM {self.vmid} not running\n")
            raise
        if not self.running:
            self.say("info", "stopping kvm after backup task")

    def _compress(self, configs, drives, sink):
        process = None
        stream = open(os.dup(sink), "wb")
        if self.compressor:
            process = subprocess.Popen(self.compressor.split(), stdin=subprocess.PIPE, stdout=stream)
            stream.close()
            stream = process.stdin
        progress = _Progress(self.say, drives)
        try:
            vma.write(stream, configs, drives, on_run=progress)
            stream.close()
        except BrokenPipeError:  # the compressor ended: mostly no room for what it wrote
            raise PveError("vma_queue_write: write error - Broken pipe\n")
        except BaseException:
            if process:
                process.kill()
                process.wait()
            raise
        if process and process.wait():
            raise PveError(f"{self.compressor} failed - wrong exit status {process.returncode}\n")
        if drives:
            progress.finish()

    def _describe(self):
        if self.options.get("notes-template"):
            self.say("info", "adding notes to backup")
            with open(self.target + ".notes", "w", encoding="utf-8") as file:
                file.write(self._notes())
        if self.options.get("protected"):
            self.say("info", "marking backup as protected")
            with open(self.target + ".protected", "w"):
                pass

    def _notes(self):
        found = re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else "\\", self.options["notes-template"])
        values = {"cluster": _cluster_name(), "guestname": self.name or f"VM {self.vmid}", "node": nodename(),
                  "vmid": str(self.vmid)}
        return re.sub(r"\{\{(cluster|guestname|node|vmid)\}\}", lambda m: values[m[1]], found)

    def _prune(self):
        keep = self.job.prune
        self.say("info", f"prune older backups with retention: {', '.join(f'{k}={keep[k]}' for k in sorted(keep))}")
        if self.job.storeid:
            marked = vo.prune_backups(StorageConfig(), self.job.storeid, keep, self.vmid, "qemu", False,
                                      lambda level, line: self.say(level, line))
            gone = sum(1 for entry in marked if entry["mark"] == "remove")
        else:
            gone = self._prune_directory(keep)
        self.say("info", f"pruned {gone} backup(s){' not covered by keep-retention policy' if gone else ''}")

    def _prune_directory(self, keep):
        group, gone = [], 0
        for name in sorted(os.listdir(self.job.directory)):
            with contextlib.suppress(PveError):
                info = vo.archive_info(name)
                if info.get("vmid") == self.vmid and info["is_std_name"] and info["type"] == "qemu":
                    group.append({"ctime": info["ctime"], "path": f"{self.job.directory}/{name}"})
                    if os.path.exists(group[-1]["path"] + ".protected"):
                        group[-1]["mark"] = "protected"
        vo.mark_group(group, keep)
        for entry in group:
            if entry["mark"] == "remove":
                gone += 1
                self.say("info", f"delete old backup '{entry['path']}'")
                os.unlink(entry["path"])
                vo.remove_auxiliaries(entry["path"])
        return gone

    def _clean_up(self):
        if self.locked:
            try:
                gc.remove_lock(self.vmid, "backup")
            except PveError as error:
                err(error.text())
        if self.paused:
            self.say("info", "resume vm")
            delay = int(time.time() - self.stopped_at)
            self.say("info", f"guest is online again after {delay if delay >= 1 else '<1'} seconds")
        with contextlib.suppress(OSError):
            os.unlink(self.partial)
        shutil.rmtree(self.tmp, ignore_errors=True)


class _Progress:
    """What the status of a backup job would be polled for: a line now and then, and the sums at the end."""

    def __init__(self, say, drives):
        self.say, self.total = say, sum(os.path.getsize(path) for _, path in drives)
        self.begun = self.last = time.time()
        self.sizes = [os.path.getsize(path) for _, path in drives]
        self.blocks = sum(os.stat(path).st_blocks * 512 for _, path in drives)
        self.read = self.last_read = 0
        self.seconds = _dump_seconds()
        self.logged = -1

    def __call__(self, drive, clusters):
        self.read = sum(self.sizes[:drive]) + min(clusters * vma.CLUSTER, self.sizes[drive])
        if self.seconds and self.total:
            time.sleep(max(0, self.begun + self.seconds * self.read / self.total - time.time()))
        if time.time() - self.last > 2:
            self._line()

    def _line(self):
        now = time.time()
        percent = self.read * 100 // self.total if self.total else 100
        speed = int((self.read - self.last_read) / (int(now - self.last) or 1))
        rate = human(speed) + "/s" if speed else "0 B/s"
        self.say("info", f"{percent:3d}% ({human(self.read)} of {human(self.total)}) in "
                         f"{_duration(int(now - self.begun))}, read: {rate}, write: {rate}")
        self.last, self.last_read, self.logged = now, self.read, percent

    def finish(self):
        self.read = self.total
        if self.logged < 100:
            self._line()
        zero = max(0, self.total - self.blocks)
        if zero:
            self.say("info", f"backup is sparse: {human(zero, 2)} ({zero * 100 // self.total}%) total zero data")
        took = int(time.time() - self.begun)
        speed = f"{took} seconds ({human(self.total // took)}/s)" if took else "<1 seconds"
        self.say("info", f"transferred {human(self.total, 2)} in {speed}")


def _dump_seconds():
    return misbehave.setting("dump-seconds", 0)


def _duration(seconds):
    parts = [(seconds // 3600, "h"), (seconds // 60 % 60, "m"), (seconds % 60, "s")]
    return " ".join(f"{n}{unit}" for n, unit in parts if n) or "0s"


def _short_size(size):
    for unit in ("KB", "MB"):
        size /= 1024
        if size < 1024:
            return f"{int(size)}{unit}"
    return f"{size / 1024:.2f}GB" if size < 1048576 else f"{size / 1048576:.2f}TB"


def _cluster_name():
    with contextlib.suppress(OSError), open("/etc/pve/corosync.conf") as file:
        match = re.search(r"cluster_name:\s*(\S+)", file.read())
        if match:
            return match[1]
    return "standalone node"
