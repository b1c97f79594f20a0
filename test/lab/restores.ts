// What the tests of restores do on a node of stand-ins, and see there: Proxmox's own files and tools, never our own read.
import { setTimeout as sleep } from "node:timers/promises";
import type { LabHost } from "./lab.js";

export const DUMPS = "/var/lib/vz/dump";
export const A = "local:backup/vzdump-qemu-101-2026_11_20-10_00_00.vma.zst";
export const B = "local:backup/vzdump-qemu-102-2026_11_20-11_00_00.vma.zst";

export interface Archive {
  vmId: number;
  stamp?: string;
  /** MiB of data, and the whole size of the one disk. */
  data: number;
  size?: number;
  /** Random, or the same byte again and again. */
  random?: boolean;
  /** More lines of the configuration. */
  config?: string;
  name?: string | null;
  firewall?: boolean;
  /** How it is compressed; `zstd FILE` knows the size of what it packs, a stream of zstd does not. */
  by?: "plain" | "zstd" | "zstd FILE";
}

const MAKE = `import json, os, subprocess, sys
sys.path.insert(0, "/usr/lib/pve-stand-ins")
import vma
s = json.loads(sys.argv[1])
id, disk, plain = s["vmId"], "/var/tmp/made.raw", "/var/tmp/made.vma"
with open(disk, "wb") as file:
    for _ in range(s["data"]):
        file.write(os.urandom(1 << 20) if s.get("random") else b"A" * (1 << 20))
    file.truncate(s.get("size", s["data"]) << 20)
name = s.get("name", f"made{id}")
conf = (f"name: {name}\\n" if name else "") + f"memory: 64\\nscsi0: local:{id}/vm-{id}-disk-0.raw,size={s.get('size', s['data'])}M\\n" \\
    + f"vmgenid: 66666666-7777-8888-9999-aaaaaaaaaaaa\\n{s.get('config', '')}#qmdump#map:scsi0:drive-scsi0:local:raw:\\n"
configs = [("qemu-server.conf", conf.encode())] + ([("qemu-server.fw", b"[RULES]\\n\\nIN ACCEPT\\n")] if s.get("firewall") else [])
with open(plain, "wb") as file:
    vma.write(file, configs, [("drive-scsi0", disk)])
by = s.get("by", "zstd")
target = sys.argv[2] + ("" if by == "plain" else ".zst")
if by == "zstd FILE":
    subprocess.run(["zstd", "-q", "-f", plain, "-o", target], check=True)
else:
    with open(plain, "rb") as source, open(target, "wb") as file:
        subprocess.run(["cat"] if by == "plain" else ["zstd", "-q", "-c"], stdin=source, stdout=file, check=True)
os.unlink(disk); os.unlink(plain)
`;

export async function until(what: () => Promise<boolean>): Promise<void> {
  for (const end = Date.now() + 60_000; !(await what()); await sleep(200))
    if (Date.now() > end) throw new Error("it never came");
}

export function restoresOn(node: LabHost) {
  let made: Promise<unknown> | undefined;
  const setUp = () =>
    (made ??= node.ssh(
      `python3 /usr/lib/pve-stand-ins/recorded_archives.py ${DUMPS}
     mkdir -p /run/pve-misbehave /var/lib/second /var/lib/pve-lvm/vg0
     pvesm add dir second --path /var/lib/second --content images,backup
     pvesm add lvmthin thin --vgname vg0 --thinpool data --content images
     pvesm add dir dumps --path /var/lib/dumps --mkdir 1 --content backup
     pvesh create /pools --poolid golden; pvesh create /pools --poolid other`,
    ));
  async function conf(id: number): Promise<string | undefined> {
    await setUp();
    const { stdout, exitCode } = await node.ssh(["cat", `/etc/pve/qemu-server/${id}.conf`], { reject: false });
    return exitCode === 0 ? stdout : undefined;
  }
  /** Every volume of an id on the node. */
  async function volumes(id: number): Promise<string[]> {
    const { stdout } = await node.ssh(
      `for d in /var/lib/*/images/${id} /mnt/*/images/${id} /var/lib/pve-lvm/*/; do [ ! -d $d ] || ls $d; done`,
    );
    return stdout.split("\n").filter((name) => name.includes(`-${id}-`));
  }
  return {
    setUp,
    conf,
    volumes,
    vanish: async (id: number) =>
      void (await node.ssh(
        `qm unlock ${id}; qm set ${id} --protection 0; qm destroy ${id} --destroy-unreferenced-disks 1; rm -rf /run/qemu-server/${id}.pid`,
        { reject: false },
      )),
    order: (step: string, lines: string) => node.ssh(`cat >/run/pve-misbehave/${step}`, { input: lines }),
    slow: (seconds: number) => node.ssh(`echo ${seconds} >/run/pve-misbehave/restore-seconds`),
    behave: () => node.ssh("mkdir -p /run/pve-misbehave; rm -f /run/pve-misbehave/*"),
    unit: async () =>
      (await node.ssh("systemctl list-units --plain --no-legend 'vmbackup-*' | cut -d ' ' -f 1")).stdout.trim(),
    halfway: (id: number) => until(async () => (await conf(id)) === "memory: 128" && (await volumes(id)).length > 0),
    /** Makes an archive and tells its volume id. */
    async archive(spec: Archive): Promise<string> {
      const file = `${DUMPS}/vzdump-qemu-${spec.vmId}-${spec.stamp ?? "2026_11_21-10_00_00"}.vma`;
      await node.ssh(["python3", "-", JSON.stringify(spec), file], { input: MAKE });
      return `local:backup/${file.slice(DUMPS.length + 1)}${spec.by === "plain" ? "" : ".zst"}`;
    },
  };
}
