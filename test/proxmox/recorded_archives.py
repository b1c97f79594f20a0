"""Archives like those of the recordings: recorded_archives.py FOLDER.

Two guests' dumps with disks of 64 and 16 MiB, 22 MiB of them random data, in the order in which the recordings' maker put
the clusters, as far as the recordings show it: where a cut archive ends is visible in a restore's last progress line.
"""

import os
import subprocess
import sys
import tempfile

import vma

CONFIG = """#nightly database
boot: order=scsi0
cores: 2
memory: 1024
meta: creation-qemu=10.0.2,ctime=1763600000
name: db{vmid}
net0: virtio=BC:24:11:AA:BB:01,bridge=vmbr0
onboot: 1
ostype: l26
scsi0: local:{vmid}/vm-{vmid}-disk-0.qcow2,size=64M
scsi1: local:{vmid}/vm-{vmid}-disk-1.qcow2,size=16M
scsihw: virtio-scsi-single
smbios1: uuid=11111111-2222-3333-4444-555555555555
tags: prod
vmgenid: 66666666-7777-8888-9999-aaaaaaaaaaaa
#qmdump#map:scsi0:drive-scsi0:local:qcow2:
#qmdump#map:scsi1:drive-scsi1:local:qcow2:
"""
DISKS = (("drive-scsi0", 1024, 320), ("drive-scsi1", 256, 32))  # name, clusters, of these with data
# (clusters, of these with data) of the first extents; the rest follows in full ones.
PLAIN = [(59, 35)] * 5 + [(59, 31), (46, 0), (59, 43), (1, 0)]
PACKED = [(59, 22)] * 5 + [(59, 17), (59, 33)]
DUMPS = (("101", "2026_11_01-10_00_00", None, 1795305483), ("101", "2026_11_10-10_00_00", "lzo", 1795305482),
         ("101", "2026_11_18-10_00_00", "gz", 1795305481), ("101", "2026_11_19-10_00_00", "zst", 1795305480),
         ("101", "2026_11_20-10_00_00", "zst", 1795305480), ("102", "2026_11_20-11_00_00", "zst", 1795305483))
COMPRESS = {"lzo": ["lzop"], "gz": ["gzip", "-c"], "zst": ["zstd", "-q", "-c"]}


def order(shape):
    """The clusters in extents of that shape; None ends an extent."""
    full = [(disk, n) for disk, (_, _, data) in enumerate(DISKS) for n in range(data)]
    empty = [(disk, n) for disk, (_, count, data) in enumerate(DISKS) for n in range(data, count)]
    result = []
    for count, data in shape:
        result += [full.pop(0) for _ in range(data)] + [empty.pop(0) for _ in range(count - data)] + [None]
    return result + full + empty


def main(folder):
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        drives = []
        for name, count, data in DISKS:
            path = f"{work}/{name}"
            with open(path, "wb") as file:
                file.write(os.urandom(data * vma.CLUSTER))
                file.truncate(count * vma.CLUSTER)
            drives.append((name, path))
        for vmid, stamp, extension, ctime in DUMPS:
            plain = f"{work}/plain"
            with open(plain, "wb") as file:
                vma.write(file, [("qemu-server.conf", CONFIG.format(vmid=vmid).encode())], drives, ctime,
                          order=order(PACKED if extension else PLAIN))
            target = f"{folder}/vzdump-qemu-{vmid}-{stamp}.vma" + (f".{extension}" if extension else "")
            with open(plain, "rb") as source, open(target, "wb") as file:
                subprocess.run(COMPRESS.get(extension, ["cat"]), stdin=source, stdout=file, check=True)


if __name__ == "__main__":
    main(sys.argv[1])
