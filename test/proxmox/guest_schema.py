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
            raise PveError(f"invalid hotplug feature '{part}'\n")
    return value


def _startup(value):
    for part in re.split(r"[\s,;]+", value):
        if not re.fullmatch(r"(?:(?:order=)?\d+|(?:up|down)=\d+)", part):
            raise PveError("unable to parse startup options\n")
    return value


CPU_TYPES = set("""486 athlon Broadwell Broadwell-IBRS Broadwell-noTSX Broadwell-noTSX-IBRS Cascadelake-Server
    Cascadelake-Server-noTSX Cascadelake-Server-v2 Cascadelake-Server-v4 Cascadelake-Server-v5 ClearwaterForest Conroe
    Cooperlake Cooperlake-v2 core2duo coreduo EPYC EPYC-Genoa EPYC-Genoa-v2 EPYC-IBPB EPYC-Milan EPYC-Milan-v2
    EPYC-Milan-v3 EPYC-Rome EPYC-Rome-v2 EPYC-Rome-v3 EPYC-Rome-v4 EPYC-Rome-v5 EPYC-Turin EPYC-v3 EPYC-v4 EPYC-v5
    GraniteRapids GraniteRapids-v2 Haswell Haswell-IBRS Haswell-noTSX Haswell-noTSX-IBRS host Icelake-Client
    Icelake-Client-noTSX Icelake-Server Icelake-Server-noTSX Icelake-Server-v3 Icelake-Server-v4 Icelake-Server-v5
    Icelake-Server-v6 Icelake-Server-v7 IvyBridge IvyBridge-IBRS KnightsMill kvm32 kvm64 max Nehalem Nehalem-IBRS
    Opteron_G1 Opteron_G2 Opteron_G3 Opteron_G4 Opteron_G5 Penryn pentium pentium2 pentium3 phenom qemu32 qemu64
    SandyBridge SandyBridge-IBRS SapphireRapids SapphireRapids-v2 SapphireRapids-v3 SierraForest SierraForest-v2
    Skylake-Client Skylake-Client-IBRS Skylake-Client-noTSX-IBRS Skylake-Client-v4 Skylake-Server Skylake-Server-IBRS
    Skylake-Server-noTSX-IBRS Skylake-Server-v4 Skylake-Server-v5 Westmere Westmere-IBRS x86-64-v2 x86-64-v2-AES
    x86-64-v3 x86-64-v4 cortex-a35 cortex-a53 cortex-a55 cortex-a57 cortex-a72 cortex-a76 cortex-a710 neoverse-n1
    neoverse-n2 neoverse-v1 a64fx""".split())


def _cpu(cpu):
    kind = cpu.get("cputype", "kvm64")
    if kind.startswith("custom-"):
        raise PveError(f"Custom cputype '{kind[7:]}' not found\n")
    if kind not in CPU_TYPES:
        raise PveError(f"Built-in cputype '{kind}' is not defined (missing 'custom-' prefix?)\n")
    return cpu


def _volume_id(value):
    if not re.fullmatch(r"[a-zA-Z][\w.\-]*[a-zA-Z0-9]:\S.*", value):
        raise PveError(f"unable to parse volume ID '{value}'\n")
    return value


register_format("pve-volume-id", _volume_id)
register_format("pve-volume-id-or-qm-path", _volume)
register_format("pve-qm-bootdev", _boot_device)
register_format("pve-snapshot-name", _snapshot_name)
register_format("pve-hotplug-features", _hotplug)
register_format("pve-startup-order", _startup)
_CPU_FLAG = r"[+-][a-zA-Z0-9\-_.]+"
register_format("pve-vm-cpu-conf", {
    "cputype": text(default_key=1), "reported-model": text(), "hidden": flag(),
    "hv-vendor-id": text(pattern=r"[a-zA-Z0-9]{1,12}"),
    "flags": text(pattern=rf"{_CPU_FLAG}(;{_CPU_FLAG})*"), "guest-phys-bits": whole(minimum=32, maximum=64),
    "phys-bits": text(pattern=r"host|[1-9]\d?"), "level": whole(minimum=0, maximum=4294967295)}, _cpu)

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
_VGA = {"type": text(default_key=1, enum="cirrus qxl qxl2 qxl3 qxl4 none serial0 serial1 serial2 serial3 std virtio "
                     "virtio-gl vmware".split()), "memory": whole(minimum=4, maximum=512), "clipboard": one_of("vnc")}
_WATCHDOG = {"model": text(default_key=1, enum=["i6300esb", "ib700"]),
             "action": one_of("reset", "shutdown", "poweroff", "pause", "debug", "none")}
_MACHINE = {"type": text(default_key=1, maxLength=40, pattern=r"(pc|pc(-i440fx)?-\d+(\.\d+)+(\+pve\d+)?(\.pxe)?|q35|"
                         r"pc-q35-\d+(\.\d+)+(\+pve\d+)?(\.pxe)?|virt(?:-\d+(\.\d+)+)?(\+pve\d+)?)"),
            "viommu": one_of("intel", "virtio"), "aw-bits": number(minimum=32, maximum=64), "enable-s3": flag(),
            "enable-s4": flag()}
_CPUS = r"\d+(?:-\d+)?(?:;\d+(?:-\d+)?)*"
_NUMA = {"cpus": {"type": "string", "pattern": _CPUS}, "memory": number(), "hostnodes": text(pattern=_CPUS),
         "policy": one_of("preferred", "bind", "interleave")}
_RNG = {"source": {"type": "string", "enum": ["/dev/urandom", "/dev/random", "/dev/hwrng"], "default_key": 1},
        "max_bytes": whole(), "period": whole()}
_AUDIO = {"device": {"type": "string", "enum": ["ich9-intel-hda", "intel-hda", "AC97"]},
          "driver": one_of("spice", "none")}
_USB = {"host": text(default_key=1, pattern=r"(?:0x)?[0-9A-Fa-f]{4}:(?:0x)?[0-9A-Fa-f]{4}|\d+-\d+(?:\.\d+)*|"
                     r"[Ss][Pp][Ii][Cc][Ee]"),
        "mapping": text(format="pve-configid"), "usb3": flag()}
_PCI = r"(?:[a-f0-9]{4,}:)?[a-f0-9]{2}:[a-f0-9]{2}(?:\.[a-f0-9])?"
_HEX = text(pattern=r"0x[0-9a-fA-F]{4}")
_HOSTPCI = {"host": text(default_key=1, pattern=rf"{_PCI}(;{_PCI})*"), "mapping": text(format="pve-configid"),
            "rombar": flag(),
            "romfile": text(pattern=r"[^,;]+"), "pcie": flag(), "x-vga": flag(), "legacy-igd": flag(),
            "mdev": text(pattern=r"[^/\.:]+"), "vendor-id": _HEX, "device-id": _HEX, "sub-vendor-id": _HEX,
            "sub-device-id": _HEX, "driver": one_of("vfio", "keep")}
_IPCONFIG = {"ip": text(), "gw": text(format="ip"), "ip6": text(), "gw6": text(format="ip")}
_IVSHMEM = {"size": {"type": "integer", "minimum": 1}, "name": text(pattern=r"[a-zA-Z0-9\-]+")}
_SPICE = {"foldersharing": flag(), "videostreaming": one_of("off", "all", "filter")}
_VIRTIOFS = {"dirid": {"type": "string", "format": "pve-configid", "default_key": 1},
             "cache": one_of("auto", "always", "metadata", "never"), "direct-io": flag(), "expose-acl": flag(),
             "expose-xattr": flag()}

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
    "vga": text(format=_VGA), "watchdog": text(format=_WATCHDOG),
    "startdate": text(pattern=r"(now|\d{4}-\d{1,2}-\d{1,2}(T\d{1,2}:\d{1,2}:\d{1,2})?)"),
    "startup": text(format="pve-startup-order"), "template": flag(default=0), "args": text(), "tablet": flag(default=1),
    "migrate_speed": whole(minimum=0), "migrate_downtime": number(minimum=0), "cdrom": text(),
    "cpu": text(format="pve-vm-cpu-conf"),
    "parent": text(format="pve-snapshot-name"), "snaptime": whole(minimum=0), "vmstate": text(format="pve-volume-id"),
    "vmstatestorage": text(format="pve-storage-id"), "runningmachine": text(), "runningcpu": text(),
    "running-nets-host-mtu": text(), "machine": text(format=_MACHINE), "arch": one_of("x86_64", "aarch64"),
    "smbios1": text(format=SMBIOS1, maxLength=512), "protection": flag(default=0), "bios": one_of("seabios", "ovmf"),
    "vmgenid": text(pattern=r"(?:[a-fA-F0-9]{8}(?:-[a-fA-F0-9]{4}){3}-[a-fA-F0-9]{12}|[01])"),
    "hookscript": text(format="pve-volume-id"), "ivshmem": text(format=_IVSHMEM), "audio0": text(format=_AUDIO),
    "spice_enhancements": text(format=_SPICE),
    "tags": text(format="pve-tag-list"), "rng0": text(format=_RNG), "meta": text(format=META),
    "affinity": text(pattern=r"\s*\d+(?:-\d+)?(?:\s*,\s*\d+(?:-\d+)?)*\s*"),
    "allow-ksm": flag(default=1),
    # cloud-init
    "citype": one_of("configdrive2", "nocloud", "opennebula"), "ciuser": text(), "cipassword": text(),
    "ciupgrade": flag(), "cicustom": text(), "searchdomain": text(), "nameserver": text(format="address-list"),
    "sshkeys": text(format="urlencoded"),
    **{f"ipconfig{n}": text(format=_IPCONFIG) for n in range(32)}, **{f"net{n}": text(format=NET) for n in range(32)},
    **{f"numa{n}": text(format=_NUMA) for n in range(8)}, **{f"hostpci{n}": text(format=_HOSTPCI) for n in range(16)},
    **{f"parallel{n}": text(pattern=r"/dev/parport\d+|/dev/usb/lp\d+") for n in range(3)},
    **{f"serial{n}": text(pattern=r"(/dev/[^,]+|socket)") for n in range(4)},
    **{f"usb{n}": text(format=_USB) for n in range(15)}, **{f"virtiofs{n}": text(format=_VIRTIOFS) for n in range(10)},
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
