"""What may stand in a guest's configuration: names, kinds and limits of its options, without their descriptions."""

import re

from pve_schema import PveError, register_format


def text(**more):
    return {"type": "string", "optional": 1, **more}


def flag(**more):
    return {"type": "boolean", "optional": 1, **more}


def whole(**more):
    return {"type": "integer", "optional": 1, **more}


def number(**more):
    return {"type": "number", "optional": 1, **more}


def one_of(*words):
    return text(enum=list(words))


# ---------------------------------------------------------------- formats

def _volume(value):
    if value in ("none", "cdrom", "cloudinit") or value.startswith("/"):
        return value
    if re.fullmatch(r"([^/:\s]+:)?\d+(\.\d+)?", value) or re.fullmatch(r"[a-zA-Z][\w.\-]*[a-zA-Z0-9]:\S.*", value):
        return value
    raise PveError(f"unable to parse volume ID '{value}'\n")


def _boot_device(value):
    if re.fullmatch(r"(?:ide|sata|scsi|virtio|net|usb|hostpci)\d+", value):
        return value
    raise PveError(f"invalid boot device '{value}'\n")


def _snapshot_name(value):
    if value.lower() in ("current", "pending"):
        raise PveError(f"unable to use name '{value}' - reserved\n")
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_\-]+", value):
        raise PveError(f"invalid configuration ID '{value}'\n")
    return value


def _hotplug(value):
    if value in ("0", "1"):
        return value
    for part in re.split(r"[\s,;]+", value):
        if part not in ("network", "disk", "cpu", "memory", "usb", "cloudinit"):
            raise PveError(f"unknown hotplug feature '{part}'\n")
    return value


def _volume_id(value):
    if not re.fullmatch(r"[a-zA-Z][\w.\-]*[a-zA-Z0-9]:\S.*", value):
        raise PveError(f"unable to parse volume ID '{value}'\n")
    return value


register_format("pve-volume-id", _volume_id)
register_format("pve-volume-id-or-qm-path", _volume)
register_format("pve-qm-bootdev", _boot_device)
register_format("pve-snapshot-name", _snapshot_name)
register_format("pve-hotplug-features", _hotplug)

_LIMITS = {f"{kind}{way}{tail}": (whole() if kind != "mbps" else number())
           for kind in ("bps", "iops", "mbps") for way in ("", "_rd", "_wr") for tail in ("", "_max", "_max_length")
           if not (kind == "bps" and tail == "_max") and not (kind == "mbps" and tail == "_max_length")}
_DRIVE = {
    "volume": {"alias": "file"},
    "file": {"type": "string", "format": "pve-volume-id-or-qm-path", "default_key": 1},
    "media": one_of("cdrom", "disk"), "snapshot": flag(),
    "cache": one_of("none", "writethrough", "writeback", "unsafe", "directsync"),
    "format": one_of("raw", "qcow", "qed", "qcow2", "vmdk", "cloop"), "size": text(format="disk-size"),
    "backup": flag(), "replicate": flag(), "rerror": one_of("ignore", "report", "stop"),
    "werror": one_of("enospc", "ignore", "report", "stop"), "aio": one_of("native", "threads", "io_uring"),
    "discard": one_of("ignore", "on"), "detect_zeroes": flag(), "serial": text(format="urlencoded", maxLength=60),
    "shared": flag(), "import-from": text(), **_LIMITS,
}
_WWN = {"wwn": text(pattern=r"^(0x)[0-9a-fA-F]{16}")}
_THREAD, _READ_ONLY, _SSD = {"iothread": flag()}, {"ro": flag()}, {"ssd": flag()}
DRIVE_FORMATS = {
    "ide": {**_DRIVE, **_SSD, **_WWN, "model": text(format="urlencoded", maxLength=120)},
    "sata": {**_DRIVE, **_SSD, **_WWN},
    "scsi": {**_DRIVE, **_SSD, **_WWN, **_THREAD, **_READ_ONLY, "queues": whole(minimum=2), "scsiblock": flag(),
             "product": text(), "vendor": text()},
    "virtio": {**_DRIVE, **_THREAD, **_READ_ONLY},
    "efidisk": {**{k: _DRIVE[k] for k in ("volume", "file", "format", "size", "import-from")},
                "efitype": one_of("2m", "4m"), "pre-enrolled-keys": flag(), "ms-cert": text()},
    "tpmstate": {**{k: _DRIVE[k] for k in ("volume", "file", "format", "size", "import-from")},
                 "version": one_of("v1.2", "v2.0")},
    "unused": {"volume": {"alias": "file"}, "file": {"type": "string", "format": "pve-volume-id", "default_key": 1}},
}
DRIVE_COUNTS = {"ide": 4, "scsi": 31, "virtio": 16, "sata": 6}
DRIVES = [f"{kind}{n}" for kind, count in DRIVE_COUNTS.items() for n in range(count)] + ["efidisk0", "tpmstate0"]

NIC_MODELS = ("e1000", "e1000-82540em", "e1000-82544gc", "e1000-82545em", "e1000e", "i82551", "i82557b", "i82559er",
              "ne2k_isa", "ne2k_pci", "pcnet", "rtl8139", "virtio", "vmxnet3")
NET = {
    "macaddr": text(format="mac-addr"), "model": {"type": "string", "enum": list(NIC_MODELS), "default_key": 1},
    **{model: {"keyAlias": "model", "alias": "macaddr"} for model in NIC_MODELS},
    "bridge": text(pattern=r"[-_.\w\d]+"), "queues": whole(minimum=0, maximum=64), "rate": number(minimum=0),
    "tag": whole(minimum=1, maximum=4094), "trunks": text(pattern=r"\d+(?:-\d+)?(?:;\d+(?:-\d+)?)*"),
    "firewall": flag(), "link_down": flag(), "mtu": whole(minimum=1, maximum=65520), "host-tunnel": flag(),
}
_BASE64 = {name: text(pattern=r"[A-Za-z0-9+\/]+={0,2}")
           for name in ("version", "serial", "manufacturer", "product", "sku", "family")}
SMBIOS1 = {"uuid": text(pattern=r"[a-fA-F0-9]{8}(?:-[a-fA-F0-9]{4}){3}-[a-fA-F0-9]{12}"), **_BASE64, "base64": flag()}
BOOT = {"legacy": text(pattern="[acdn]{1,4}", default_key=1), "order": text(format="pve-qm-bootdev-list")}
_AGENT = {"enabled": {"type": "boolean", "default_key": 1}, "fstrim_cloned_disks": flag(), "freeze-fs": flag(),
          "freeze-fs-on-backup": {"alias": "freeze-fs"}, "type": one_of("virtio", "isa")}
_MEMORY = {"current": {"type": "integer", "default_key": 1, "minimum": 16}}
META = {"ctime": whole(minimum=0), "creation-qemu": text(pattern=r"\d+(\.\d+)+")}
_STARTUP = r"(?:(?:order=)?\d+)?(?:,?(?:up|down)=\d+)*"

CONFIG = {
    "onboot": flag(default=0), "autostart": flag(default=0), "hotplug": text(format="pve-hotplug-features"),
    "reboot": flag(default=1),
    "lock": one_of("backup", "clone", "create", "migrate", "rollback", "snapshot", "snapshot-delete", "suspending",
                   "suspended"),
    "cpulimit": number(minimum=0, maximum=128), "cpuunits": whole(minimum=1, maximum=262144),
    "memory": text(format=_MEMORY), "amd-sev": text(), "intel-tdx": text(), "balloon": whole(minimum=0),
    "shares": whole(minimum=0, maximum=50000),
    "keyboard": one_of("de", "de-ch", "da", "en-gb", "en-us", "es", "fi", "fr", "fr-be", "fr-ca", "fr-ch", "hu", "is",
                       "it", "ja", "lt", "mk", "nl", "no", "pl", "pt", "pt-br", "sv", "sl", "tr"),
    "name": text(format="dns-name"),
    "scsihw": one_of("lsi", "lsi53c810", "virtio-scsi-pci", "virtio-scsi-single", "megasas", "pvscsi"),
    "description": text(maxLength=8192),
    "ostype": one_of("other", "wxp", "w2k", "w2k3", "w2k8", "wvista", "win7", "win8", "win10", "win11", "l24", "l26",
                     "solaris"),
    "boot": text(format=BOOT), "bootdisk": text(pattern=r"(ide|sata|scsi|virtio)\d+"), "smp": whole(minimum=1),
    "sockets": whole(minimum=1), "cores": whole(minimum=1), "numa": flag(default=0),
    "hugepages": one_of("any", "2", "1024"), "keephugepages": flag(), "vcpus": whole(minimum=1), "acpi": flag(default=1),
    "agent": text(format=_AGENT), "kvm": flag(default=1), "tdf": flag(), "localtime": flag(), "freeze": flag(),
    "vga": text(), "watchdog": text(),
    "startdate": text(pattern=r"(now|\d{4}-\d{1,2}-\d{1,2}(T\d{1,2}:\d{1,2}:\d{1,2})?)"),
    "startup": text(pattern=_STARTUP), "template": flag(default=0), "args": text(), "tablet": flag(default=1),
    "migrate_speed": whole(minimum=0), "migrate_downtime": number(minimum=0), "cdrom": text(), "cpu": text(),
    "parent": text(format="pve-snapshot-name"), "snaptime": whole(minimum=0), "vmstate": text(format="pve-volume-id"),
    "vmstatestorage": text(format="pve-storage-id"), "runningmachine": text(), "runningcpu": text(),
    "running-nets-host-mtu": text(), "machine": text(), "arch": one_of("x86_64", "aarch64"),
    "smbios1": text(format=SMBIOS1, maxLength=512), "protection": flag(default=0), "bios": one_of("seabios", "ovmf"),
    "vmgenid": text(pattern=r"(?:[a-fA-F0-9]{8}(?:-[a-fA-F0-9]{4}){3}-[a-fA-F0-9]{12}|[01])"),
    "hookscript": text(format="pve-volume-id"), "ivshmem": text(), "audio0": text(), "spice_enhancements": text(),
    "tags": text(format="pve-tag-list"), "rng0": text(), "meta": text(format=META), "affinity": text(),
    "allow-ksm": flag(default=1),
    # cloud-init
    "citype": one_of("configdrive2", "nocloud", "opennebula"), "ciuser": text(), "cipassword": text(),
    "ciupgrade": flag(), "cicustom": text(), "searchdomain": text(), "nameserver": text(format="address-list"),
    "sshkeys": text(format="urlencoded"),
    **{f"ipconfig{n}": text() for n in range(32)}, **{f"net{n}": text(format=NET) for n in range(32)},
    **{f"numa{n}": text() for n in range(8)}, **{f"hostpci{n}": text() for n in range(16)},
    **{f"parallel{n}": text(pattern=r"/dev/parport\d+|/dev/usb/lp\d+") for n in range(3)},
    **{f"serial{n}": text(pattern=r"(/dev/[^,]+|socket)") for n in range(4)},
    **{f"usb{n}": text() for n in range(15)}, **{f"virtiofs{n}": text() for n in range(10)},
    **{f"unused{n}": text(format=DRIVE_FORMATS["unused"]) for n in range(256)},
    **{name: text(format=DRIVE_FORMATS[re.sub(r"\d+$", "", name)]) for name in DRIVES},
}
# Kept by Proxmox itself: no option of any command.
INTERNAL = ("parent", "snaptime", "vmstate", "runningmachine", "runningcpu", "running-nets-host-mtu", "meta")


def options(*without):
    """The options of create and set."""
    return {name: schema for name, schema in CONFIG.items() if name not in INTERNAL and name not in without}


VMID = {"type": "integer", "format": "pve-vmid"}
STORAGE_ID = {"type": "string", "format": "pve-storage-id", "optional": 1}
NODE = {"type": "string", "format": "pve-node"}
