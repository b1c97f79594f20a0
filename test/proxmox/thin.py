"""LVM, emulated: the volumes of a group are sparse files.

No kernel here has device-mapper, so a "logical volume" is a file in ROOT/<vg>/, /dev/<vg>/<name> is a link to it, and a
clone's origin is kept in <name>.origin: the real one is known to LVM only, and Proxmox does not look at it, which is why
it lets a base volume go while clones of it exist. The group exists when its directory does.

A thick group (storage type lvm) has the size that <vg>.size tells, and gives its volumes all of theirs at once.
"""

import contextlib
import glob
import os
import re

from pve_output import out
from pve_schema import PveError

ROOT = "/var/lib/pve-lvm"
EXTENT = 4 << 20
TYPES = ("lvm", "lvmthin")


def group_exists(scfg):
    return os.path.isdir(f"{ROOT}/{scfg['vgname']}")


def parse(volname):
    """(vmid, is a base)"""
    match = re.fullmatch(r"(vm|base)-(\d+)-\S+", volname)
    if not match or not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9\-_.]*[a-zA-Z0-9]", volname):
        raise PveError(f"unable to parse lvm volume name '{volname}'\n")
    return int(match[2]), match[1] == "base"


def path(scfg, volname):
    return f"/dev/{scfg['vgname']}/{volname}"


def file_of(scfg, volname):
    return f"{ROOT}/{scfg['vgname']}/{volname}"


def images(storeid, scfg, vmid=None):
    found = []
    for file in sorted(glob.glob(f"{ROOT}/{scfg['vgname']}/*")):
        match = re.fullmatch(r"(vm|base)-(\d+)-.+", os.path.basename(file))
        if match and not file.endswith(".origin") and (vmid is None or match[2] == str(vmid)):
            found.append({"volid": f"{storeid}:{match[0]}", "format": "raw", "size": os.path.getsize(file),
                          "vmid": int(match[2]), "ctime": int(os.stat(file).st_ctime)})
    return found


def free_name(storeid, scfg, vmid):
    taken = {int(n) for image in images(storeid, scfg, vmid) for n in re.findall(r"-disk-(\d+)$", image["volid"])}
    return f"vm-{vmid}-disk-{next(i for i in range(16384) if i not in taken)}"


def alloc(storeid, scfg, vmid, fmt, name, kib):
    if fmt != "raw":
        raise PveError(f"unsupported format '{fmt}'")
    if name and not name.startswith(f"vm-{vmid}-"):
        raise PveError(f"illegal name '{name}' - should be 'vm-{vmid}-*'\n")
    if not group_exists(scfg):
        raise PveError(f"no such volume group '{scfg['vgname']}'\n")
    name = name or free_name(storeid, scfg, vmid)
    if os.path.exists(file_of(scfg, name)):
        raise PveError(f"lvcreate '{scfg['vgname']}/{name}' error:   Logical Volume \"{name}\" already exists in volume "
                       f"group \"{scfg['vgname']}\"\n")
    extents = -(-kib * 1024 // EXTENT)
    if scfg["type"] == "lvm":
        left = status(scfg)[1] // EXTENT
        if extents > left:
            raise PveError(f"lvcreate '{scfg['vgname']}/{name}' error:   Volume group \"{scfg['vgname']}\" has insufficient "
                           f"free space ({left} extents): {extents} required.\n")
    with open(file_of(scfg, name), "wb") as file:
        file.truncate(extents * EXTENT)
    _link(scfg, name)
    out(f'  Logical volume "{name}" created.\n')
    return name


def _link(scfg, name):
    with contextlib.suppress(OSError):
        os.makedirs(f"/dev/{scfg['vgname']}", exist_ok=True)
        os.symlink(file_of(scfg, name), path(scfg, name))


def resize(scfg, volname, size):
    size = -(-size // EXTENT) * EXTENT
    os.truncate(file_of(scfg, volname), size)
    out(f"  Logical volume {scfg['vgname']}/{volname} successfully resized.\n")


def status(scfg):
    """(total, available, used): of a thin pool those of the file system below."""
    if scfg["type"] == "lvm":
        with open(f"{ROOT}/{scfg['vgname']}.size") as file:
            total = int(file.read()) // EXTENT * EXTENT
        used = sum(os.path.getsize(file) for file in glob.glob(f"{ROOT}/{scfg['vgname']}/*"))
        return total, total - used, used
    stat = os.statvfs(ROOT)
    return (stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize, (stat.f_blocks - stat.f_bfree) * stat.f_frsize)


def free(scfg, volname):
    if not os.path.exists(file_of(scfg, volname)):
        return
    for gone in (file_of(scfg, volname), f"{file_of(scfg, volname)}.origin", path(scfg, volname)):
        with contextlib.suppress(OSError):
            os.unlink(gone)
    out(f'  Logical volume "{volname}" successfully removed.\n')


def create_base(scfg, volname):
    name = re.sub(r"^vm-", "base-", volname)
    old, new = file_of(scfg, volname), file_of(scfg, name)
    os.rename(old, new)
    if os.path.exists(f"{old}.origin"):
        os.rename(f"{old}.origin", f"{new}.origin")
    with contextlib.suppress(OSError):
        os.unlink(path(scfg, volname))
    _link(scfg, name)
    os.chmod(new, 0o440)
    out(f'  Renamed "{volname}" to "{name}" in volume group "{scfg["vgname"]}"\n'
        f'  Logical volume {scfg["vgname"]}/{name} changed.\n')
    return name


def clone(storeid, scfg, volname, vmid):
    name = free_name(storeid, scfg, vmid)
    copy_sparse(file_of(scfg, volname), file_of(scfg, name))
    os.chmod(file_of(scfg, name), 0o640)
    with open(f"{file_of(scfg, name)}.origin", "w") as file:
        file.write(f"{volname}\n")
    _link(scfg, name)
    out(f'  Logical volume "{name}" created.\n')
    return name


def copy_sparse(source, target):
    with open(source, "rb", buffering=0) as src, open(target, "wb", buffering=0) as dst:
        size = os.fstat(src.fileno()).st_size
        at = 0
        while at < size:
            try:
                at = os.lseek(src.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(src.fileno(), at, os.SEEK_HOLE)
            while at < end:
                data = os.pread(src.fileno(), min(4 << 20, end - at), at)
                os.pwrite(dst.fileno(), data, at)
                at += len(data)
        dst.truncate(size)
