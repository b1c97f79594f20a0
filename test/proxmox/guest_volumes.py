"""Guests' volumes: what templates, clones, restores and backups need beyond making and removing images.

Functions take the storage's id and its section of storage.cfg. Directories keep raw and qcow2 files; LVM-thin is emulated
by `thin`. What a tool called on the way prints comes out on stdout, its complaints on stderr.
"""

import contextlib
import os
import re
import subprocess

import misbehave
import storage as st
import thin
import volumes as vo
from pve_output import err, out
from pve_schema import NotCovered, PveError


def storage(storeid):
    return st.StorageConfig().get(storeid)


def storages():
    return st.StorageConfig().ids


def enabled_storage(storeid):
    return st.StorageConfig().check_enabled(storeid)


def activate(storeid):
    st.activate(st.StorageConfig(), storeid)


def content_of(scfg):
    return scfg["content"]


def subdir(scfg, content):
    return st.subdir(scfg, content)


def is_directory(scfg):
    return "path" in scfg


def is_lvm(scfg):
    return scfg["type"] in thin.TYPES


def split_volid(volid, quiet=False):
    if quiet and not st.is_volume_id(volid or ""):
        return None, None
    return st.parse_volume_id(volid)


def parse_volname(scfg, volname):
    if is_lvm(scfg):
        vmid, is_base = thin.parse(volname)
        return vo.Volume("images", volname, vmid, is_base=is_base)
    if not is_directory(scfg):
        raise NotCovered(f"volumes on a storage of type '{scfg['type']}'")
    return vo.parse_volname(volname)


def path(scfg, volname):
    if is_lvm(scfg):
        return thin.path(scfg, volname)
    volume = parse_volname(scfg, volname)
    owner = f"/{volume.vmid}" if volume.content == "images" else ""
    return f"{subdir(scfg, volume.content)}{owner}/{volume.name}"


def real_path(scfg, volname):
    """Where the bytes are: for LVM-thin another place than the path that is shown."""
    return thin.file_of(scfg, volname) if is_lvm(scfg) else path(scfg, volname)


def default_format(scfg):
    return scfg.get("format") or "raw"


def supported_formats(scfg):
    return ("raw", "qcow2", "vmdk") if is_directory(scfg) else ("raw",)


# ---------------------------------------------------------------- running tools

def run(argv, errmsg=None, cwd=None):
    """A failure raises with the last line of stderr, or with what became of the program."""
    try:
        if misbehave.is_set(f"no-{os.path.basename(argv[0])}"):  # a node that lacks a tool
            raise FileNotFoundError
        done = subprocess.run(argv, cwd=cwd, capture_output=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise PveError(f"{errmsg + ': ' if errmsg else ''}command '{' '.join(argv)}' failed: open3: exec of "
                       f"{' '.join(argv)} failed: No such file or directory at /usr/share/perl5/PVE/Cmd.pm line 174.\n")
    out(done.stdout.decode(errors="replace"))
    lines = done.stderr.decode(errors="replace").rstrip("\n").split("\n")
    if done.returncode == 0 or not errmsg:
        err("".join(line + "\n" for line in lines if line))
    if done.returncode == 0:
        return
    if errmsg and lines[-1]:
        err("".join(line + "\n" for line in lines[:-1]))
        raise PveError(f"{errmsg}: {lines[-1]}\n")
    what = f"got signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    raise PveError(f"{errmsg + ': ' if errmsg else ''}command '{' '.join(argv)}' failed: {what}\n")


# ---------------------------------------------------------------- volumes

def size_of(scfg, volname):
    file = real_path(scfg, volname)
    return vo.image_info(file, parse_volname(scfg, volname).format)["size"] if os.path.exists(file) else None


def list_images(storeid, scfg, vmid=None):
    if is_lvm(scfg):
        return thin.images(storeid, scfg, vmid)
    return vo.list_images(storeid, scfg, vmid) if is_directory(scfg) else []


def list_all_images(vmid=None):
    """The guest's volumes on every enabled storage that takes images."""
    config, found = st.StorageConfig(), []
    for storeid, scfg in config.ids.items():
        if "images" in scfg["content"] and config.is_enabled(storeid):
            with contextlib.suppress(PveError):
                activate(storeid)
                found += list_images(storeid, scfg, int(vmid) if vmid else None)
    return found


def alloc(storeid, scfg, vmid, fmt, name, kib):
    """Make a volume of `kib` KiB and return its id."""
    return vo.vdisk_alloc(st.StorageConfig(), storeid, vmid, fmt, name, kib)


def free(storeid, volname):
    vo.vdisk_free(st.StorageConfig(), f"{storeid}:{volname}")


def is_base_and_used(storeid, scfg, volname):
    if not is_directory(scfg):
        return False  # LVM-thin: Proxmox does not know its clones
    return vo.is_base_in_use(st.StorageConfig(), f"{storeid}:{volname}")


def has_feature(scfg, feature, volname):
    volume = parse_volname(scfg, volname)
    disk = volume.format in ("raw", "qcow2", "vmdk")
    return {
        "snapshot": not volume.is_base and (volume.format == "qcow2" or scfg["type"] == "lvmthin"),
        "clone": disk and volume.is_base,
        "template": disk and not volume.is_base and scfg["type"] != "lvm",
        "copy": disk,
        "sparseinit": disk,
    }[feature]


def create_base(storeid, scfg, volname):
    """vm-N-disk-M becomes base-N-disk-M, which nobody can write or remove by mistake."""
    def convert():
        volume = parse_volname(scfg, volname)
        if volume.content != "images":
            raise PveError(f"create_base on wrong vtype '{volume.content}'\n")
        if volume.is_base:
            raise PveError("create_base not possible with base image\n")
        if is_lvm(scfg):
            return thin.create_base(scfg, volname)
        old, name = path(scfg, volname), re.sub(r"^vm-", "base-", volume.name)
        parent = vo.image_info(old, volume.format)["parent"]
        if volume.base and parent != f"../{volume.base_vmid}/{volume.base}":
            raise PveError(f"volname '{volname}' contains wrong information about parent\n")
        new = f"{os.path.dirname(old)}/{name}"
        if os.path.isfile(new):
            raise PveError(f"file '{new}' already exists\n")
        os.rename(old, new)
        os.chmod(new, 0o444)
        try:
            run(["/usr/bin/chattr", "+i", new])
        except PveError as error:
            err(error.text())
        return f"{volume.base_vmid}/{volume.base}/{volume.vmid}/{name}" if volume.base else f"{volume.vmid}/{name}"

    return f"{storeid}:{vo.lock_storage(storeid, scfg, convert)}"


def clone(storeid, scfg, volname, vmid):
    """A linked clone; on directories always a qcow2 over the base, on LVM-thin a snapshot."""
    def link():
        volume = parse_volname(scfg, volname)
        if volume.content != "images":
            raise PveError(f"clone_image on wrong vtype '{volume.content}'\n")
        if not volume.is_base:
            raise PveError("clone_image only works on base images\n")
        if is_lvm(scfg):
            return thin.clone(storeid, scfg, volname, vmid)
        directory = f"{subdir(scfg, 'images')}/{vmid}"
        old_umask = os.umask(0o037)
        try:
            os.makedirs(directory, exist_ok=True)
            name = vo.free_disk_name(storeid, scfg, vmid, "qcow2")
            backing = f"../{volume.vmid}/{volume.name}"
            err(f"clone {volname}: images, {name}, {vmid} to {name} (base={backing})\n")
            mode = scfg.get("preallocation") or "metadata"
            if volume.format == "raw" and mode == "metadata":
                mode = "off"
            run(["/usr/bin/qemu-img", "create", "-F", volume.format, "-b", backing, "-f", "qcow2", f"{directory}/{name}",
                 "-o", f"extended_l2=on,cluster_size=128k,preallocation={mode}"],
                errmsg="unable to create image", cwd=directory)
        finally:
            os.umask(old_umask)
        return f"{volume.vmid}/{volume.name}/{vmid}/{name}"

    return f"{storeid}:{vo.lock_storage(storeid, scfg, link)}"


def resize(scfg, volname, size):
    if is_lvm(scfg):
        return thin.resize(scfg, volname, size)
    fmt = parse_volname(scfg, volname).format
    if fmt not in ("raw", "qcow2"):
        raise PveError("can't resize this image format\n")
    mode = scfg.get("preallocation")
    mode = (mode or "metadata") if fmt == "qcow2" else "off" if mode in (None, "metadata") else mode
    run(["/usr/bin/qemu-img", "resize", f"--preallocation={mode}", "-f", fmt, path(scfg, volname), str(size)])


# ---------------------------------------------------------------- raw access for archives

@contextlib.contextmanager
def readable_raw(scfg, volname):
    """A raw file with the guest's view of the volume: itself, or a sparse temporary copy of a qcow2 and its base."""
    file, fmt = real_path(scfg, volname), parse_volname(scfg, volname).format
    if fmt == "raw":
        yield file
        return
    copy = _temporary(file)
    try:
        run(["/usr/bin/qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", file, copy])
        yield copy
    finally:
        with contextlib.suppress(OSError):
            os.unlink(copy)


def _temporary(file):
    return f"/var/tmp/.pve-raw-{os.getpid()}-{os.path.basename(file)}"


class RawTarget:
    """An open raw file that ends up as the content of a freshly made volume."""

    def __init__(self, scfg, volname, size):
        self.file, self.format = real_path(scfg, volname), parse_volname(scfg, volname).format
        self.raw = self.file if self.format == "raw" else _temporary(self.file)
        self.stream = open(self.raw, "r+b" if self.format == "raw" else "w+b", buffering=0)
        if self.format != "raw":
            self.stream.truncate(size)

    def fileno(self):
        return self.stream.fileno()

    def finish(self):
        self.stream.close()
        if self.format != "raw":
            run(["/usr/bin/qemu-img", "convert", "-n", "--target-is-zero", "-f", "raw", "-O", self.format, self.raw,
                 self.file])
            os.unlink(self.raw)

    def discard(self):
        self.stream.close()
        if self.format != "raw":
            with contextlib.suppress(OSError):
                os.unlink(self.raw)
