"""Proxmox's backup archive format, VMA: reading and writing.

An archive is one header (12 KiB of tables and a buffer of names and configuration files) and then extents. An extent
describes up to 59 clusters of 64 KiB of any of the drives; each cluster has a mask of its sixteen 4 KiB blocks, and only
blocks that are not all zero follow. Every cluster of every drive occurs exactly once, so that a hole costs eight bytes.
Header and extent headers carry an MD5 of themselves; data is not summed.

The messages of `VmaError` are those of the `vma` tool (also where it misspells), because restores print them.
"""

import array
import hashlib
import os
import shlex
import struct
import subprocess
import sys
import time
import uuid as uuids

from pve_output import err
from pve_schema import PveError

CLUSTER = 65536
BLOCK = 4096
PER_EXTENT = 59
EXTENT_HEADER = 512
HEADER = 12288
HEAD = struct.Struct(">4sI16sq16sIII")  # magic version uuid ctime md5 blob-offset blob-size header-size
ZERO_BLOCK = bytes(BLOCK)
ZERO_CLUSTER = bytes(CLUSTER)


class VmaError(Exception):
    """What `vma` would have said before it ended with a trap."""


class Header:
    def __init__(self, configs, devices, ctime=None, uuid=None):
        self.configs = configs  # [(file name, bytes)]
        self.devices = devices  # {id: (device name, bytes)}
        self.ctime = int(time.time()) if ctime is None else ctime
        self.uuid = uuid or uuids.uuid4().bytes

    def encode(self):
        blobs = bytearray(1)  # offset 0 means "none"

        def put(data):
            at = len(blobs)
            blobs.extend(struct.pack("<H", len(data)) + data)
            return at

        names, datas, devs = [0] * 256, [0] * 256, bytearray(256 * 32)
        for i, (name, data) in enumerate(self.configs):
            names[i] = put(name.encode() + b"\0")
            datas[i] = put(data)
        for number, (name, size) in self.devices.items():
            struct.pack_into(">IIQ", devs, number * 32, put(name.encode() + b"\0"), 0, size)
        size = -(-(HEADER + len(blobs)) // 512) * 512

        def build(md5):
            head = HEAD.pack(b"VMA\0", 1, self.uuid, self.ctime, md5, HEADER, len(blobs), size)
            tables = struct.pack(">256I", *names) + struct.pack(">256I", *datas) + bytes(4) + bytes(devs)
            return (head.ljust(2044, b"\0") + tables + bytes(blobs)).ljust(size, b"\0")

        return build(hashlib.md5(build(bytes(16))).digest())

    @classmethod
    def read(cls, stream):
        head = _full_read(stream, HEADER)
        if len(head) != HEADER:
            raise VmaError("can't read vma header - got EOF")
        magic, version, uuid, ctime, md5, offset, length, size = HEAD.unpack_from(head)
        if magic != b"VMA\0":
            raise VmaError("not a vma file - wrong magic number")
        if size <= HEADER:
            raise VmaError(f"wrong vma header size {size}")
        rest = _full_read(stream, size - HEADER)
        if len(rest) != size - HEADER:
            raise VmaError("can't read vma header data - got EOF")
        head += rest
        if hashlib.md5(head[:32] + bytes(16) + head[48:]).digest() != md5:
            raise VmaError("wrong vma header chechsum")
        if version != 1:
            raise VmaError(f"wrong vma version {version}")
        if offset + length > size:
            raise VmaError(f"wrong vma blob buffer size {offset}/{length}")

        def blob(at):
            if not at or at + 2 > length:
                return None
            (n,) = struct.unpack_from("<H", head, offset + at)
            return head[offset + at + 2:offset + at + 2 + n]

        def text(at):
            data = blob(at)
            return data[:-1].decode() if data else None

        names = struct.unpack_from(">256I", head, 2044)
        datas = struct.unpack_from(">256I", head, 3068)
        configs = []
        for name, data in zip(names, datas):
            if not (name and data):
                continue
            if text(name) is None or blob(data) is None:
                raise VmaError("vma contains invalid data pointers")
            configs.append((text(name), blob(data)))
        devices = {}
        for number in range(1, 256):
            name, _, bytes_ = struct.unpack_from(">IIQ", head, 4096 + number * 32)
            if bytes_ and text(name):
                devices[number] = (text(name), bytes_)
        return cls(configs, devices, ctime, uuid)

    def config(self, name="qemu-server.conf"):
        return next((data for n, data in self.configs if n == name), None)


def _full_read(stream, size):
    parts, left = [], size
    while left:
        part = stream.read(left)
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


# ---------------------------------------------------------------- writing

def write(out, configs, drives, ctime=None, uuid=None, order=None, on_run=None):
    """Write an archive of `configs` [(name, bytes)] and `drives` [(device name, raw file)] to the binary stream `out`.

    `order` may give the clusters' sequence as (drive index, cluster) pairs, None ending an extent; without
    it they come drive by drive.
    """
    sizes = [os.path.getsize(path) for _, path in drives]
    header = Header(configs, {i + 1: (name, size) for i, ((name, _), size) in enumerate(zip(drives, sizes))}, ctime, uuid)
    out.write(header.encode())
    files = [open(path, "rb", buffering=0) for _, path in drives]
    extent = _Extent(out, header.uuid)
    try:
        if order is not None:
            for place in order:
                if place is None:
                    extent.flush()
                    continue
                drive, cluster = place
                extent.add(drive + 1, cluster, os.pread(files[drive].fileno(), CLUSTER, cluster * CLUSTER))
        else:
            for drive, (file, size) in enumerate(zip(files, sizes)):
                count = -(-size // CLUSTER)
                for start, end, has_data in _runs(file.fileno(), count):
                    if not has_data:
                        extent.add_hole(drive + 1, start, end)
                    else:
                        for cluster in range(start, end):
                            extent.add(drive + 1, cluster, os.pread(file.fileno(), CLUSTER, cluster * CLUSTER))
                    if on_run:
                        on_run(drive, end)
        extent.flush()
    finally:
        for file in files:
            file.close()
    return header


def _runs(fd, count):
    """The file's clusters as runs (first, end, may hold data); runs of data are cut at 1024 clusters for progress."""
    at = 0
    while at < count:
        try:
            start = max(at, os.lseek(fd, at * CLUSTER, os.SEEK_DATA) // CLUSTER)
            end = -(-os.lseek(fd, start * CLUSTER, os.SEEK_HOLE) // CLUSTER)
            if end <= start:  # the cluster starts in a hole and has data further on
                end = start + 1
        except OSError:  # nothing but a hole from here on
            start = end = count
        start, end = min(start, count), min(end, count)
        if at < start:
            yield at, start, False
        for first in range(start, end, 1024):
            yield first, min(first + 1024, end), True
        at = end


class _Extent:
    def __init__(self, out, uuid):
        self.out, self.uuid = out, uuid
        self.infos, self.data, self.blocks = array.array("Q"), [], 0

    def add(self, device, cluster, data):
        mask = 0
        if data and data != ZERO_CLUSTER[:len(data)]:
            for bit in range(0, -(-len(data) // BLOCK)):
                block = data[bit * BLOCK:(bit + 1) * BLOCK]
                if block != ZERO_BLOCK[:len(block)]:
                    mask |= 1 << bit
                    self.data.append(block.ljust(BLOCK, b"\0"))
                    self.blocks += 1
        self.infos.append(mask << 48 | device << 32 | cluster)
        if len(self.infos) == PER_EXTENT:
            self.flush()

    def add_hole(self, device, cluster, end):
        while cluster < end:
            if self.infos or end - cluster < PER_EXTENT:
                self.add(device, cluster, b"")
                cluster += 1
            else:  # a whole extent of nothing: terabytes of hole must not take minutes
                first = device << 32 | cluster
                self.infos.extend(range(first, first + PER_EXTENT))
                cluster += PER_EXTENT
                self.flush()

    def flush(self):
        if not self.infos:
            return
        if sys.byteorder == "little":
            self.infos.byteswap()
        start = struct.pack(">4sHH16s", b"VMAE", 0, self.blocks, self.uuid)
        infos = self.infos.tobytes().ljust(PER_EXTENT * 8, b"\0")
        md5 = hashlib.md5(start + bytes(16) + infos).digest()
        self.out.write(b"".join([start, md5, infos, *self.data]))
        self.infos, self.data, self.blocks = array.array("Q"), [], 0


# ---------------------------------------------------------------- reading

class Restore:
    """Brings the drives of an archive back; counts and reports as `vma extract -v` does.

    `targets` maps a device id to a raw file that is already as long as the drive and empty, or None to skip it.
    `on_line` gets the progress and summary lines; `on_extent` is called before each extent with the share that is done.
    """

    def __init__(self, stream, header, targets, on_line, on_extent=None):
        self.stream, self.header, self.targets = stream, header, targets
        self.on_line, self.on_extent = on_line, on_extent
        self.total = sum(size // CLUSTER for _, size in header.devices.values()) or 1
        self.read = self.zero = self.partial_zero = 0
        self.percent = 0
        self.seen = {n: bytearray(-(-size // CLUSTER)) for n, (_, size) in header.devices.items()}
        self.started = int(time.time())

    def run(self):
        while True:
            head = _full_read(self.stream, EXTENT_HEADER)
            if not head:
                break
            if len(head) < EXTENT_HEADER:
                raise VmaError(f"read short extent ({len(head)} bytes)")
            magic, reserved, blocks, uuid, md5 = struct.unpack_from(">4sHH16s16s", head)
            if hashlib.md5(head[:24] + bytes(16) + head[40:]).digest() != md5:
                raise VmaError("wrong vma extent header chechsum")
            if uuid != self.header.uuid:
                raise VmaError("wrong vma extent uuid")
            if magic != b"VMAE" or reserved:
                raise VmaError("wrong vma extent header magic")
            data = _full_read(self.stream, blocks * BLOCK)
            if len(data) < blocks * BLOCK:
                raise VmaError(f"short vma extent ({EXTENT_HEADER + len(data)} < {EXTENT_HEADER + blocks * BLOCK})")
            self._extent(head, data)
        for number, clusters in self.seen.items():
            missing = clusters.find(0)
            if missing >= 0 and self.targets.get(number) is not None:
                raise VmaError(f"detected missing cluster {missing} for stream {self.header.devices[number][0]}")
        self._summary()

    def _extent(self, head, data):
        infos = array.array("Q", head[40:])
        if sys.byteorder == "little":
            infos.byteswap()
        if self.on_extent:
            self.on_extent(self.read / self.total)
        if not data and self._hole(infos):
            return
        at = 0
        for info in infos:
            device = info >> 32 & 0xFF
            if not device:
                continue
            cluster, mask = info & 0xFFFFFFFF, info >> 48
            seen = self.seen.get(device)
            if seen is None or device not in self.targets:
                raise VmaError(f"got wrong dev id {device}")
            name, size = self.header.devices[device]
            if cluster >= len(seen):
                raise VmaError("got wrong block address - write beyond end")
            if seen[cluster]:
                raise VmaError(f"found duplicated cluster {cluster} for stream {name}")
            seen[cluster] = 1
            self.read += 1
            percent = self.read * 100 // self.total
            if percent != self.percent:
                self.percent = percent
                took = int(time.time()) - self.started
                self.on_line(f"progress {percent}% (read {self.read * CLUSTER} bytes, duration {took} sec)")
            at = self._cluster(self.targets[device], cluster, mask, size, data, at)
        if at != len(data):
            raise VmaError("vma extent error - missing blocks")

    def _hole(self, infos):
        """Take an extent that only tells of a hole in one piece, where that makes no visible difference."""
        device, first, count = infos[0] >> 32, infos[0] & 0xFFFFFFFF, len(infos)
        seen = self.seen.get(device)
        if (seen is None or self.targets.get(device) is None or first + count >= len(seen) or any(seen[first:first + count])
                or infos != array.array("Q", range(infos[0], infos[0] + count))
                or (self.read + count) * 100 // self.total != self.percent):
            return False
        seen[first:first + count] = b"\1" * count
        self.read += count
        self.zero += count * CLUSTER
        return True

    def _cluster(self, target, cluster, mask, size, data, at):
        base = cluster * CLUSTER
        if mask == 0:
            self.zero += min(CLUSTER, size - base)
            return at
        for bit in range(16):
            start = base + bit * BLOCK
            length = min(BLOCK, size - start)
            if mask >> bit & 1:
                if at + BLOCK > len(data):
                    raise VmaError("short vma extent - too many blocks")
                if length <= 0:
                    raise VmaError("got wrong block address - write beyond end")
                if target is not None:
                    os.pwrite(target.fileno(), data[at:at + length], start)
                at += BLOCK
            elif length > 0:
                self.zero += length
                self.partial_zero += length
        return at

    def _summary(self):
        if not self.read:
            self.on_line("vma archive contains no image data")
            return
        total = self.read * CLUSTER
        self.on_line(f"total bytes read {total}, sparse bytes {self.zero} ({100.0 * self.zero / total:.3g}%)")
        if total - self.zero:
            self.on_line(f"space reduction due to 4K zero blocks {100.0 * self.partial_zero / (total - self.zero):.3g}%")


# ---------------------------------------------------------------- the configuration inside

DECOMPRESS = {"gz": ["zcat"], "lzo": ["lzop", "-d", "-c"], "zst": ["zstd", "-q", "-d", "-c"], "bz2": ["bzcat", "-q"]}


def extract_config(path, compression):
    """The configuration in an archive, as text; failures in the words of Proxmox's extract_vzdump_config."""
    if not compression:
        with open(path, "rb") as stream:
            try:
                return _config_text(stream)
            except VmaError as error:
                err(f"vma: {error}\n")
                raise PveError(f"command 'vma config {shlex.quote(path)}' failed: got signal 5\n")
    process = subprocess.Popen([*DECOMPRESS[compression], path], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               stdin=subprocess.DEVNULL)
    try:
        return _config_text(process.stdout)
    except VmaError as error:
        failure = f"vma: {error}"
    finally:
        process.stdout.close()
        complaints = process.stderr.read().decode(errors="replace").split("\n")
        process.wait()
    first = next((line for line in complaints if line.strip() and "roken pipe" not in line), failure)
    raise PveError(f"Failed to extract config from VMA archive: {first}\n\n")


def _config_text(stream):
    data = Header.read(stream).config()
    if data is None:
        raise VmaError("unable to find configuration data")
    return data.decode("utf-8", "surrogateescape")
