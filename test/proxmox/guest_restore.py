"""Restoring a VMA archive into a guest whose id is already reserved: what `qmrestore` does in its worker.

The order is the real one, for it decides what a failure leaves behind: the header is read under a 60 s alarm; when it is
there the configuration becomes the placeholder `memory: 128` and, over an existing guest, the disks that will be replaced
are destroyed; then volumes are made, then data flows. A failure removes the new volumes, never the placeholder.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import uuid

import datacenter
import guest_config as gc
import guest_volumes as gv
import guests
import misbehave
import vma
from pve_output import err, out
from pve_schema import NotCovered, PveError
from guest_api import add_to_pool
from guest_config import shell_quote
from guest_disks import each_owned, try_free
from volumes import archive_info



class Interrupted(PveError):
    pass


# ---------------------------------------------------------------- the restore

def early_checks(volid, path):
    if volid:
        try:
            vma.extract_config(path, archive_info(path)["compression"])
        except PveError as error:
            err(f"Could not extract backed up config: {error.text()}\nSkipping early checks!\n")


def restore_vma(vmid, given, override, archive):
    volid, path = archive or (None, None)
    early_checks(volid, path)
    if given["live-restore"]:
        raise PveError("live-restore is only compatible with backup images from a Proxmox Backup Server\n")
    compression = None
    if path:
        info = archive_info(path)
        if info["format"] == "tar":
            raise NotCovered("archives of containers and of Proxmox 1.x")
        compression = info["compression"]
    job = _Job(vmid, given, path, compression)
    try:
        job.run()
    except BaseException:
        job.clean_up()
        raise
    conf = gc.parse(vmid, job.new_config)
    conf.update(override)
    gc.write(vmid, conf)
    try:
        guests.rescan(vmid)
    except PveError as error:
        err(error.text())
    if given["pool"]:
        add_to_pool(vmid, given["pool"])


def bandwidth_limit(storeid, override):
    """KiB/s for restores from or to a storage; 0 is no limit."""
    if override is not None:
        return int(float(override))
    for text in (gv.storage(storeid).get("bwlimit"), datacenter.read().get("bwlimit")):
        limits = dict(part.split("=", 1) if "=" in part else ("default", part) for part in (text or "").split(",") if part)
        for key in ("restore", "default"):
            if limits.get(key):
                return int(float(limits[key]))
    return 0


class _Job:
    def __init__(self, vmid, given, path, compression):
        self.vmid, self.given, self.path, self.compression = vmid, given, path, compression
        self.tmp = f"/var/tmp/vzdumptmp{os.getpid()}"
        self.volumes, self.targets, self.new_config = {}, {}, ""
        self.process = None
        self.commands = []

    def say(self, line):
        """One line of output. Nobody reading any more (a lost connection) ends a restore like a signal does."""
        try:
            os.write(1, (line + "\n").encode("utf-8", "surrogateescape"))
        except BrokenPipeError:
            raise Interrupted("interrupted by signal\n")

    # -- reading ------------------------------------------------------------

    def _plan_pipeline(self):
        source = self.path or "-"
        self.rate = 0
        storeid = _storage_of(self.path) if self.path else None
        if storeid:
            self.rate = bandwidth_limit(storeid, self.given["bwlimit"])
        if self.rate:
            self.say(f"applying read rate limit: {self.rate}")
            self.commands.append(["cstream", "-t", str(self.rate * 1024), "--", source])
            source = "-"
        if self.compression:
            self.commands.append([*vma.DECOMPRESS[self.compression], source])
            source = "-"
        self.commands.append(["vma", "extract", "-v", "-r", f"{self.tmp}.fifo", source, self.tmp])
        self.shown = " | ".join(command_text(command) for command in self.commands)

    def _open(self):
        file = open(self.path, "rb") if self.path else open(0, "rb", closefd=False)
        source = _Paced(file, self.rate * 1024) if self.rate else file
        if not self.compression:
            return source
        decompress = vma.DECOMPRESS[self.compression]
        if not self.rate:
            self.process = subprocess.Popen([*decompress, self.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                            stdin=subprocess.DEVNULL)
        else:
            self.process = subprocess.Popen([*decompress, "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                            stdin=subprocess.PIPE)
            threading.Thread(target=_feed, args=(source, self.process.stdin), daemon=True).start()
        return self.process.stdout

    # -- the whole ----------------------------------------------------------

    def run(self):
        self._plan_pipeline()
        shutil.rmtree(self.tmp, ignore_errors=True)
        os.makedirs(self.tmp)
        os.mkfifo(f"{self.tmp}.fifo", 0o600)
        with _interruptible():
            self.say(f"restore vma archive: {self.shown}")
            try:
                self._extract()
            except PveError as error:
                raise PveError(f"command 'set -o pipefail && {self.shown}' failed: {error.text()}")
            except OSError as error:
                raise PveError(f"command 'set -o pipefail && {self.shown}' failed: {error.strerror}\n")
        shutil.rmtree(self.tmp, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(f"{self.tmp}.fifo")

    def _extract(self):
        misbehave.point("qmrestore", "header")
        started = time.time()
        stream = self._open()
        try:
            header = vma.Header.read(stream)
        except vma.VmaError:
            # The real one waits for a reader of its pipe that has already died of this, until its alarm rings.
            time.sleep(max(0, header_timeout() - (time.time() - started)))
            raise PveError("got timeout reading VMA header - corrupted?\n")
        if self.process:  # before that nobody reads what the decompressor complains about
            self.complaints = threading.Thread(target=_pass_on, args=(self.process.stderr, self.path), daemon=True)
            self.complaints.start()
        for name, data in header.configs:
            self.say(f"CFG: size: {len(data)} name: {name}")
        for number, (name, size) in sorted(header.devices.items()):
            self.say(f"DEV: dev_id={number} size: {size} devname: {name}")
        self.say(f"CTIME: {time.asctime(time.localtime(header.ctime))}")
        self._map_devices(header)
        misbehave.point("qmrestore", "data")
        seconds, begun = restore_seconds(), time.time()

        def pace(share):
            wait = begun + share * seconds - time.time()
            if wait > 0:
                time.sleep(wait)

        restore = vma.Restore(stream, header, self.targets, self.say, pace)
        try:
            restore.run()
            pace(1)
            if self.process and self.process.wait():
                raise PveError(f"exit code {self.process.returncode}\n")
            for target in self.targets.values():
                target.finish()
        except vma.VmaError as error:
            self._trap(str(error))
        except OSError as error:  # no room
            self._trap(f"blk_pwrite to  failed ({-(error.errno or 5)})")
        misbehave.point("qmrestore", "written")

    def _trap(self, reason):
        """The vma program ends with a trap; in a pipe it is the shell that tells."""
        self.say(f"vma: restore failed - {reason}")
        if len(self.commands) == 1:
            raise PveError("got signal 5\n")
        self.process.stdout.close()
        code = self.process.wait() if self.process else 0
        if self.process:
            self.complaints.join(2)
        pid = self.process.pid if self.process else os.getpid()
        lines = []
        for index, command in enumerate(self.commands):
            state = ("Trace/breakpoint trap" if command[0] == "vma" else f"Exit {code}" if code > 0 else "Done")
            pipe = "| " if index else ""
            lines.append(f"{'     ' if index else ''}{pid + index:>5} {state:<23} {pipe}{command_text(command)}")
        self.say("/bin/bash: line 1: " + "\n".join(lines))
        raise PveError("exit code 133\n")

    # -- what happens when the header has been read -----------------------------

    def _map_devices(self, header):
        raw = header.config()
        if raw is None:
            raise PveError("unable to read qemu-server.conf - No such file or directory\n")
        text = raw.decode("utf-8", "surrogateescape")
        firewall = header.config("qemu-server.fw")
        if firewall is not None:
            os.makedirs("/etc/pve/firewall", exist_ok=True)
            with open(f"/etc/pve/firewall/{self.vmid}.fw", "wb") as file:
                file.write(firewall)
        devices = {name: {"number": number, "size": size} for number, (name, size) in header.devices.items()}
        wanted = self._hints(text, devices)
        for storeid in dict.fromkeys(device["storeid"] for device in wanted.values()):
            limit = bandwidth_limit(storeid, self.given["bwlimit"])
            if limit:
                self.say(f"rate limit for storage {storeid}: {limit} KiB/s")
        for name, device in devices.items():
            if "virtdev" not in device:
                raise PveError(f"found no device mapping information for device '{name}'\n")
        old = gc.load(self.vmid)
        gc.write_raw(self.vmid, "memory: 128\n")
        self._destroy_replaced(old, wanted)
        misbehave.point("qmrestore", "placeholder")
        self._allocate(wanted)
        for virtdev in sorted(wanted):
            device = wanted[virtdev]
            storeid, volname = gv.split_volid(device["volid"])
            scfg = gv.storage(storeid)
            zeros = 0 if gv.has_feature(scfg, "sparseinit", volname) else 1
            self.say(f"map '{device['devname']}' to '{gv.path(scfg, volname)}' (write zeros = {zeros})")
            self.targets[device["number"]] = gv.RawTarget(scfg, volname, device["size"])
        self.new_config = "".join(new_line(line, self.volumes, self.given["unique"]) for line in text.splitlines(True))

    def _hints(self, text, devices):
        wanted = {}
        for match in re.finditer(r"^#qmdump#map:(\S+):(\S+):(\S*):(\S*):$", text, re.M):
            virtdev, devname, storeid, fmt = match.groups()
            if devname not in devices:
                raise PveError(f"archive does not contain data for drive '{virtdev}'\n")
            storeid = self.given["storage"] or storeid or "local"
            if "images" not in gv.content_of(gv.storage(storeid)):
                raise PveError(f"Content type 'images' is not available on storage '{storeid}'\n")
            device = devices[devname]
            device.update(devname=devname, virtdev=virtdev, format=fmt or "raw", storeid=storeid)
            wanted[virtdev] = device
        return wanted

    def _destroy_replaced(self, old, wanted):
        for key, drive, _, _ in each_owned(old, self.vmid, False):
            if key in wanted:
                try_free(drive["file"])

    def _allocate(self, wanted):
        for virtdev in sorted(wanted):
            device = wanted[virtdev]
            scfg = gv.storage(device["storeid"])
            if device["format"] not in gv.supported_formats(scfg):
                device["format"] = gv.default_format(scfg)
            gv.activate(device["storeid"])
            volid = gv.alloc(device["storeid"], scfg, self.vmid, device["format"], None, -(-device["size"] // 1024))
            device["volid"] = self.volumes[virtdev] = volid
            self.say(f"new volume ID is '{volid}'")

    # -- failures -------------------------------------------------------------

    def clean_up(self):
        """Temporary files, then the new volumes. With nobody reading any more the first message is the last act."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(f"{self.tmp}.fifo")
        if self.process:
            with contextlib.suppress(OSError):
                self.process.kill()
                self.process.wait()
        for target in self.targets.values():
            target.discard()
        for volid in self.volumes.values():
            try:
                storeid, volname = gv.split_volid(volid)
                gv.free(storeid, volname)
                out(f"temporary volume '{volid}' successfully removed\n")
            except PveError as error:
                out(f"unable to cleanup '{volid}' - {error.text()}")


def command_text(command):
    return " ".join(map(shell_quote, command))


def _storage_of(path):
    """The storage whose dump directory holds this archive."""
    real = os.path.realpath(path)
    for storeid, scfg in gv.storages().items():
        if gv.is_directory(scfg) and os.path.dirname(real) == os.path.realpath(gv.subdir(scfg, "backup")):
            return storeid
    return None


def new_line(line, volumes, unique):
    """A line of the archived configuration as it goes into the restored guest's."""
    if re.match(r"#qmdump#|#vzdump#|lock:|unused\d+:|parent:", line):
        return ""
    match = re.fullmatch(r"((?:ide|scsi|virtio|sata|efidisk|tpmstate)\d+):\s*(\S+)\s*", line)
    if match:
        drive = gc.parse_drive(match[1], match[2])
        if drive and drive.get("backup") == 0:
            return "#" + line
        if drive and match[1] in volumes:
            drive.pop("format", None)
            drive["file"] = volumes[match[1]]
            return f"{match[1]}: {gc.print_drive(match[1], drive)}\n"
        return line
    match = re.fullmatch(r"(net\d+):\s*(\S+)\s*", line)
    if match and unique:
        return f"{match[1]}: {gc.normal_net(match[2], True)}\n"
    match = re.match(r"vmgenid: (.*)", line)
    if match:
        return f"vmgenid: {match[1] if match[1] == '0' else uuid.uuid4()}\n"
    match = re.match(r"smbios1: (.*)", line)
    if match and unique:
        return f"smbios1: {gc.new_smbios_uuid(match[1])}\n"
    return line


# ---------------------------------------------------------------- time, signals

def header_timeout():
    """60 s in the real thing; a test that has no time for that writes another number."""
    return misbehave.setting("vma-header-timeout", 60)


def restore_seconds():
    """How long the data of a restore takes at least: small archives are through before anybody can look."""
    return misbehave.setting("restore-seconds", 0)


@contextlib.contextmanager
def _interruptible():
    def die(_signal, _frame):
        raise Interrupted("interrupted by signal\n")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)
    before = {number: signal.signal(number, die) for number in numbers}
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # writing says so itself: see _Job.say, and out() in the clean-up
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # always clean up


class _Paced:
    """A file that gives at most `rate` bytes a second."""

    def __init__(self, file, rate):
        self.file, self.rate, self.begun, self.given = file, rate, time.time(), 0

    def read(self, size):
        data = self.file.read(min(size, max(4096, self.rate // 10)))
        self.given += len(data)
        wait = self.begun + self.given / self.rate - time.time()
        if wait > 0:
            time.sleep(wait)
        return data


def _pass_on(stream, path):
    for raw in stream:
        line = raw.decode(errors="replace")
        name = line.split(" : ", 1)[0]
        if " : " in line and path.endswith(name):  # some versions of zstd shorten the name
            line = path + line[len(name):]
        err(line)


def _feed(source, sink):
    with contextlib.suppress(OSError):
        while True:
            data = source.read(65536)
            if not data:
                break
            sink.write(data)
    with contextlib.suppress(OSError):
        sink.close()
