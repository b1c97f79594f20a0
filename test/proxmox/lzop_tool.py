"""A small lzop, for machines without one: it stores, and it reads what the real one compressed (LZO1X)."""

import os
import struct
import sys
import time
import zlib

MAGIC = b"\x89LZO\x00\r\n\x1a\n"
BLOCK = 256 << 10


def compress(source, target):
    head = struct.pack(">HHHBBIIIIB", 0x1040, 0x20A0, 0x0940, 1, 5, 0x03000001, 0o100644, int(time.time()), 0, 0)
    target.write(MAGIC + head + struct.pack(">I", zlib.adler32(head)))
    while data := source.read(BLOCK):
        target.write(struct.pack(">III", len(data), len(data), zlib.adler32(data)) + data)
    target.write(bytes(4))


def decompress(source, target, name):
    def take(size):
        data = source.read(size)
        if len(data) < size:
            sys.exit(f"lzop: {name}: unexpected end of file")
        return data

    if source.read(9) != MAGIC:
        sys.exit(f"lzop: {name}: not a lzop file")
    version = struct.unpack(">H", take(2))[0]
    take(2)
    if version >= 0x0940:
        take(2)
    take(1)
    if version >= 0x0940:
        take(1)
    flags = struct.unpack(">I", take(4))[0]
    if flags & 0x800:
        take(4)
    take(8 if version < 0x0940 else 12)
    take(take(1)[0] + 4)
    while True:
        size = struct.unpack(">I", take(4))[0]
        if not size:
            return
        packed = struct.unpack(">I", take(4))[0]
        sums = [struct.unpack(">I", take(4))[0] for bit in (1, 0x100) if flags & bit]
        if packed < size:
            take(4 * sum(1 for bit in (2, 0x200) if flags & bit))
        data = take(packed)
        if packed < size:
            data = expand(data, size)
        if flags & 1 and zlib.adler32(data) != sums[0]:
            sys.exit(f"lzop: {name}: Checksum error (lzop file corrupted)")
        target.write(data)


def expand(src, size):
    """LZO1X: runs of literals and copies of what was written before."""
    out, at, state = bytearray(), 0, 0

    def length(base):
        nonlocal at
        total = 0
        while not src[at]:
            total, at = total + 255, at + 1
        at += 1
        return total + src[at - 1] + base

    def literal(count):
        nonlocal at
        out.extend(src[at:at + count])
        at += count

    def copy(distance, count):
        start = len(out) - distance
        if distance >= count:
            out.extend(out[start:start + count])
        else:
            pattern = bytes(out[start:])
            out.extend((pattern * (count // distance + 1))[:count])

    if src[0] > 17:
        at = 1
        count = src[0] - 17
        literal(count)
        state = 4 if count >= 4 else count
    while True:
        code = src[at]
        at += 1
        if code < 16 and state == 0:
            count = code + 3 if code else length(15 + 3)
            literal(count)
            state = 4
            continue
        if code < 16:
            high = src[at]
            at += 1
            if state == 4:
                copy((high << 2) + (code >> 2) + 2049, 3)
            else:
                copy((high << 2) + (code >> 2) + 1, 2)
            trailing = code & 3
        elif code >= 64:
            high = src[at]
            at += 1
            count = (code >> 5) + 1 if code < 128 else 5 + (code >> 5 & 3)
            copy((high << 3) + (code >> 2 & 7) + 1, count)
            trailing = code & 3
        elif code >= 32:
            count = (code & 31) + 2 if code & 31 else length(31 + 2)
            word = src[at] | src[at + 1] << 8
            at += 2
            copy((word >> 2) + 1, count)
            trailing = word & 3
        else:
            count = (code & 7) + 2 if code & 7 else length(7 + 2)
            word = src[at] | src[at + 1] << 8
            at += 2
            distance = ((code & 8) << 11) + (word >> 2)
            if not distance:
                return bytes(out[:size])
            copy(distance + 16384, count)
            trailing = word & 3
        literal(trailing)
        state = trailing


def main(argv):
    words = [word for word in argv[1:] if not word.startswith("-") or word == "-"]
    name = words[0] if words else "-"
    source = sys.stdin.buffer if name == "-" else open(name, "rb")
    try:
        if any(word.startswith("-d") for word in argv[1:]):
            decompress(source, sys.stdout.buffer, "<stdin>" if name == "-" else name)
        else:
            compress(source, sys.stdout.buffer)
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(1)
