"""What `lvs` says of the emulated thin volumes: above all their origins, which Proxmox itself does not look at."""

import hashlib
import json
import os
import sys
import time

import thin

REAL = ("/usr/sbin/lvs", "/sbin/lvs")
DEFAULT = "lv_name,vg_name,lv_attr,lv_size,pool_lv,origin,data_percent"
UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def volumes():
    """(group, name) of everything emulated, and the pool that the group's volumes live in."""
    for group in sorted(os.listdir(thin.ROOT)) if os.path.isdir(thin.ROOT) else []:
        if not os.path.isdir(f"{thin.ROOT}/{group}"):
            continue
        for name in sorted(os.listdir(f"{thin.ROOT}/{group}")):
            if not name.endswith(".origin"):
                yield group, name


def row(group, name, pool, unit):
    path = f"{thin.ROOT}/{group}/{name}"
    stat = os.stat(path)
    try:
        with open(f"{path}.origin") as file:
            origin = file.read().strip()
    except OSError:
        origin = ""
    if origin and not os.path.exists(f"{thin.ROOT}/{group}/{origin}"):
        origin = ""
    digest = hashlib.sha256(f"{group}/{name}/{stat.st_ino}".encode()).hexdigest()[:32]
    size = stat.st_size / UNITS[unit.lower()]
    base = name.startswith("base-")
    if os.path.exists(f"{thin.ROOT}/{group}.size"):
        raise SystemExit("lvs stand-in: not covered: thick volumes")
    return {
        "lv_name": name, "vg_name": group, "lv_full_name": f"{group}/{name}", "lv_path": f"/dev/{group}/{name}",
        "lv_size": (f"{size:.0f}" if unit.lower() == "b" else f"{size:.2f}") + unit, "pool_lv": pool, "origin": origin,
        "lv_attr": f"V{'r' if base else 'w'}i---tz-k" if base else "Vwi-a-tz--", "lv_tags": "",
        "data_percent": f"{min(100, stat.st_blocks * 51200 / stat.st_size) if stat.st_size else 0:.2f}",
        "lv_uuid": "-".join(digest[a:b] for a, b in ((0, 6), (6, 10), (10, 14), (14, 18), (18, 22), (22, 26), (26, 32))),
        "lv_time": time.strftime("%F %T %z", time.localtime(stat.st_ctime)), "lv_active": "" if base else "active",
        "lv_layout": "thin,sparse", "lv_role": "public" + (",snapshot,thinsnapshot" if origin else ""), "segtype": "thin",
    }


def _pool_of(group):
    import storage
    found = (scfg["thinpool"] for scfg in storage.StorageConfig().ids.values()
             if scfg["type"] == "lvmthin" and scfg["vgname"] == group)
    return next(found, "data")


def main(argv):
    if not any(True for _ in volumes()):
        real = next((path for path in REAL if os.path.exists(path)), None)
        if real:
            os.execv(real, argv)
        return
    options = {"-o": DEFAULT, "--units": "g", "--separator": " ", "--reportformat": "basic"}
    names, flags, words = [], set(), argv[1:]
    while words:
        word, glued, value = words.pop(0).partition("=")
        word = {"--options": "-o", "--reportformat": "--reportformat"}.get(word, word)
        if word in options:
            options[word] = value if glued else words.pop(0)
        elif word in ("--noheadings", "--nosuffix", "-a", "--all", "--unbuffered", "--readonly"):
            flags.add(word)
        elif word.startswith("-"):
            sys.stderr.write(f"lvs stand-in: not covered: {word}\n")
            sys.exit(70)
        else:
            names.append(word.removeprefix("/dev/"))
    fields = (DEFAULT + "," + options["-o"][1:] if options["-o"].startswith("+") else options["-o"]).split(",")
    rows = [row(group, name, _pool_of(group), options["--units"]) for group, name in volumes()
            if not names or group in names or f"{group}/{name}" in names]
    for wanted in names:
        if not any(wanted in (r["vg_name"], r["lv_full_name"]) for r in rows):
            kind = "logical volume" if "/" in wanted else "Volume group"
            sys.stderr.write(f"  Failed to find logical volume \"{wanted}\"\n" if "/" in wanted else
                             f"  {kind} \"{wanted}\" not found\n  Cannot process volume group {wanted}\n")
            sys.exit(5)
    show(rows, fields, options, flags)


def show(rows, fields, options, flags):
    unknown = [field for field in fields if rows and field not in rows[0]]
    if unknown:
        sys.stderr.write(f"lvs stand-in: not covered: field {unknown[0]}\n")
        sys.exit(70)
    shown = [{f: r[f].rstrip(options["--units"]) if "--nosuffix" in flags and f == "lv_size" else r[f] for f in fields}
             for r in rows]
    if options["--reportformat"].startswith("json"):
        print(json.dumps({"report": [{"lv": shown}], **({"log": []} if options["--reportformat"] == "json_std" else {})}))
        return
    if "--noheadings" not in flags:
        print("  " + options["--separator"].join(fields))
    for line in shown:
        print("  " + options["--separator"].join(line.values()))
