// Every guest of a Proxmox VE node as Proxmox has it written down, in one question of some 20 ms: `pvesh` would want one call of
// 1.5 s for each guest. Also what stands around a configuration: running, HA, pool, firewall file, starts in the task index.
import { createHash } from "node:crypto";
import * as z from "zod";
import type { Report } from "./host.js";
import { MOUNTED, setOf } from "./pve.js";

export interface GuestFile {
  vmid: number;
  node: string;
  kind: "qemu" | "lxc";
  /** The whole file, of a guest that is a virtual machine. */
  raw: string;
  /** The options of the current state; `description` as text. */
  values: Readonly<Record<string, string>>;
  snapshots: readonly string[];
  pending: boolean;
  running: boolean;
  /** Managed by HA. */
  ha: boolean;
  firewall: boolean;
  pool: string | undefined;
  /** Starts that the task index still tells, in seconds since the epoch. */
  starts: readonly number[];
}

export interface Guests {
  /** Name of the node that was asked. */
  node: string;
  byId: ReadonlyMap<number, GuestFile>;
}

// A file can go between the list and the reading: that is a guest less. One that is there and cannot be read is no answer.
const READ = `${MOUNTED}part() { printf '\\036%s\\n' "$1"; }
part node; readlink /etc/pve/local
part running
for f in /run/qemu-server/*.pid; do
  pid=; [ ! -e "$f" ] || read -r pid <"$f"
  [ -z "$pid" ] || [ ! -d "/proc/$pid" ] || printf '%s\\n' "$f"
done
part firewall; for f in /etc/pve/firewall/*.fw; do printf '%s\\n' "$f"; done
part containers; for f in /etc/pve/nodes/*/lxc/*.conf; do printf '%s\\n' "$f"; done
part ha; [ ! -e /etc/pve/ha/resources.cfg ] || cat /etc/pve/ha/resources.cfg
part pools; grep '^pool:' /etc/pve/user.cfg
part starts; grep -hs ':qmstart:' /var/log/pve/tasks/index /var/log/pve/tasks/index.1
set -- /etc/pve/nodes/*/qemu-server/*.conf; [ -e "$1" ] || exit 0
exec awk 'BEGIN { for (i = 1; i < ARGC; i++) { f = ARGV[i]; printf "\\036conf %s\\n", f; while ((r = (getline l < f)) > 0) print l; if (r < 0) print "\\036" (system("test -e " f) ? "gone" : "unreadable"); close(f) } }' "$@"`;

/** Every virtual machine and container of the node, and of the other members of its cluster. */
export const guestFiles: Report<Guests> = {
  why: "read the configurations of the guests",
  argv: ["sh", "-c", READ, "vmbackup-guests"],
  shown: ["cat", "/etc/pve/nodes/*/qemu-server/*.conf"],
  parse: guestsOf,
  answer: z.custom<Guests>((value) => value !== undefined),
};

export function guestsOf(stdout: string): Guests {
  const parts = stdout.split("\u001e").slice(1);
  const part = (name: string) =>
    parts
      .filter((text) => text.startsWith(`${name}\n`))
      .flatMap((text) => text.slice(name.length + 1).split("\n"))
      .filter((line) => line !== "");
  const node = /^nodes\/(.+)$/.exec(part("node")[0] ?? "")?.[1];
  if (node === undefined) throw new Error("/etc/pve/local names no node");
  const running = new Set(part("running").map(idOf));
  const firewall = new Set(part("firewall").map(idOf));
  const ha = new Set(part("ha").flatMap((line) => /^vm:\s*(\d+)/.exec(line)?.slice(1, 2).map(Number) ?? []));
  const pools = poolsOf(part("pools"));
  const starts = part("starts").map((line) => line.split(":"));
  const around = (vmid: number, at: string) => ({
    vmid,
    node: /^\/etc\/pve\/nodes\/([^/]+)\//.exec(at)?.[1] ?? "",
    running: running.has(vmid),
    ha: ha.has(vmid),
    firewall: firewall.has(vmid),
    pool: pools.get(vmid),
    starts: starts.filter((fields) => fields[6] === String(vmid)).map((fields) => Number.parseInt(fields[4] ?? "", 16)),
  });
  const byId = new Map<number, GuestFile>();
  for (const at of part("containers").filter((line) => !line.includes("*")))
    byId.set(idOf(at), { ...around(idOf(at), at), kind: "lxc", ...configOf("") });
  for (const [i, text] of parts.entries()) {
    if (!text.startsWith("conf ")) continue;
    const end = text.indexOf("\n");
    const at = text.slice(5, end);
    if (parts[i + 1] === "gone\n") continue;
    if (parts[i + 1] === "unreadable\n") throw new Error(`${at} cannot be read`);
    byId.set(idOf(at), { ...around(idOf(at), at), kind: "qemu", ...configOf(text.slice(end + 1)) });
  }
  return { node, byId };
}

const idOf = (path: string) => Number(/(\d+)\.(?:conf|pid|fw)$/.exec(path)?.[1]);

/** `pool:NAME:COMMENT:VMIDS:STORAGES:` */
function poolsOf(lines: readonly string[]): Map<number, string> {
  return new Map(
    lines.flatMap((line) => {
      const [, name = "", , ids] = line.split(":");
      return setOf(ids).map((id): [number, string] => [Number(id), name]);
    }),
  );
}

/** A configuration: the options of the current state, and the names of the sections after them. */
export function configOf(raw: string): Pick<GuestFile, "raw" | "values" | "snapshots" | "pending"> {
  const values: Record<string, string> = {};
  const description: string[] = [];
  const sections: string[] = [];
  for (const line of raw.split("\n")) {
    const section = /^\[([^\]]*)\]\s*$/.exec(line)?.[1];
    if (section !== undefined) sections.push(section);
    if (sections.length > 0) continue;
    if (line.startsWith("#")) description.push(decoded(line.slice(1)));
    const [, key, value] = /^([a-z][a-z_-]*\d*):\s*(.*?)\s*$/.exec(line) ?? [];
    if (key === "description") description.push(decoded(value ?? ""));
    else if (key !== undefined) values[key] = value ?? "";
  }
  if (description.length > 0) values.description = description.join("\n").trimEnd();
  const pending = sections.some((name) => name.toUpperCase() === "PENDING");
  const snapshots = sections.filter((name) => name.toUpperCase() !== "PENDING" && !name.startsWith("special:"));
  return { raw, values, snapshots, pending };
}

/** pve-common, PVE/Tools.pm: decode_text. */
function decoded(text: string): string {
  const bytes = text.replace(/%([0-9A-Fa-f]{2})/g, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16)));
  return /[^\u0000-\u00ff]/.test(bytes) ? bytes : Buffer.from(bytes, "latin1").toString();
}

/** What Proxmox calls the digest of a configuration. */
export const digestOf = ({ raw }: GuestFile): string => createHash("sha1").update(raw).digest("hex");

export const isTemplate = ({ values }: GuestFile): boolean => values.template === "1";

const DRIVE = /^(?:ide|scsi|virtio|sata|efidisk|tpmstate|unused)\d+$/;

/** Volume ids by option; no CD drives, no devices of the host. */
export function disksOf(values: GuestFile["values"]): Record<string, string> {
  return Object.fromEntries(
    Object.entries(values).flatMap(([key, value]) => {
      const [first = "", ...rest] = value.split(",");
      const volid = first.replace(/^(?:file|volume)=/, "");
      if (!DRIVE.test(key) || rest.includes("media=cdrom") || !/^[A-Za-z][\w.-]*:./.test(volid)) return [];
      return [[key, volid]];
    }),
  );
}

/** A disk of a guest and of the template that it became have one name here. */
export const diskName = (volid: string): string => volid.replace(/(^|[:/])(?:vm|base)-(\d+)-/g, "$1vm-$2-");

/** The guest whose volume it is, by its name: of a linked clone the clone, not the template. */
export function ownerOf(volid: string): number | undefined {
  const id = /(?:^|[:/])(?:vm|base)-(\d+)-[^/]*$/.exec(volid)?.[1];
  return id === undefined ? undefined : Number(id);
}

export const storageOf = (volid: string): string => volid.slice(0, volid.indexOf(":"));

/** Options that give a guest a device of its host. */
export function hostDevices(values: GuestFile["values"]): string[] {
  return Object.entries(values)
    .filter(
      ([key, value]) =>
        /^(?:hostpci|parallel)\d+$/.test(key) ||
        (/^usb\d+$/.test(key) && /(?:^|,)(?:host=|mapping=|[0-9a-f]{4}:[0-9a-f]{4}|\d+-\d)/i.test(value)) ||
        (/^serial\d+$/.test(key) && value.startsWith("/dev/")) ||
        (DRIVE.test(key) && /^(?:file=)?\/dev\//.test(value)),
    )
    .map(([key]) => key)
    .sort();
}

const thinVolumes = z
  .object({
    report: z.tuple([
      z.object({ lv: z.array(z.object({ lv_name: z.string(), vg_name: z.string(), origin: z.string() })) }),
    ]),
  })
  .transform(({ report }) => report[0].lv);

/** Thin volumes with their origins: Proxmox does not know the clones of a base volume on LVM-thin, and would let it go. */
export const thinOrigins: Report<z.output<typeof thinVolumes>> = {
  why: "list the thin volumes and their origins",
  argv: ["lvs", "--reportformat", "json", "--options", "lv_name,vg_name,origin"],
  answer: thinVolumes,
};

/** Whether the lock of a guest is free, that a restore holds from beginning to end. */
export function guestLock(vmid: number): Report<boolean> {
  const file = `/var/lock/qemu-server/lock-${vmid}.conf`;
  return {
    why: `see whether something is at work on guest ${vmid}`,
    argv: ["sh", "-c", '[ ! -e "$1" ] || flock --nonblock "$1" true && echo free || echo held', "lock", file],
    shown: ["flock", "--nonblock", file, "true"],
    parse: (stdout) => stdout.trim() === "free",
    answer: z.boolean(),
  };
}
