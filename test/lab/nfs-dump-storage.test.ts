// NfsDumpStorage on Proxmox VE nodes (stand-ins): the laws, then bad input and bad luck. What is asserted is looked up out of band:
// storage.cfg, the mount table, the files of the export.
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import type { Fields } from "../../provider/engine-values.js";
import { hooks } from "../../provider/host-ledger.js";
import { registered } from "../../provider/nfs-export.js";
import { laws } from "../laws.js";
import { CheckFailed, Stack } from "../stack.js";
import { useHosts } from "./lab.js";

// The server is a folder that both nodes see.
const servers = mkdtempSync(join(tmpdir(), "nfs-"));
const server = (name: string) => {
  const folder = join(servers, name);
  mkdirSync(folder, { recursive: true });
  return folder;
};
const EXPORT = "/mnt/data/pve-dump";
const exported = (path = EXPORT, name = "skydev") => {
  const folder = join(server(name), path);
  mkdirSync(folder, { recursive: true });
  const list = join(server(name), ".exports");
  const lines = existsSync(list) ? readFileSync(list, "utf8").split("\n").filter(Boolean) : [];
  writeFileSync(list, `${[...new Set([...lines, `${path} *`])].join("\n")}\n`);
  return folder;
};
exported();
exported("/mnt/data/other");

const { pve1, pve2 } = useHosts({
  pve1: { pve: true, bindRw: { [servers]: "/srv/nfs" } },
  pve2: { pve: true, bindRw: { [servers]: "/srv/nfs" } },
});
afterAll(() => rmSync(servers, { recursive: true, force: true }));

/** What storage.cfg and the mount table of a node say, without the order of lists; undefined when there is neither. */
async function look(id: string, node = pve1, path = `/mnt/pve/${id}`): Promise<string | undefined> {
  const { stdout } = await node.ssh(
    `awk -v id=${id} '/^[a-z]+:/ { on = $2 == id } on' /etc/pve/storage.cfg; findmnt -n -o SOURCE --mountpoint ${path} | sed 's/^/mounted /'`,
    { reject: false },
  );
  const lines = stdout
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean);
  const sorted = lines.map((line) => {
    const [key = "", ...value] = line.split(" ");
    return `${key} ${value.join(" ").split(",").sort().join(",")}`.trim();
  });
  return sorted.length === 0 ? undefined : sorted.sort().join("\n");
}

const inputs = (storageId: string, over: Fields = {}): Fields => ({
  host: pve1.connection,
  storageId,
  server: "skydev",
  export: EXPORT,
  ...over,
});

const shell = (command: string, node = pve1) => node.ssh(command, { reject: false });

laws({
  kind: "NfsDumpStorage",
  inputs: (tag) => inputs(tag),
  look: (tag) => look(tag),
  vanish: async (tag) => void (await shell(`pvesm remove ${tag}; umount /mnt/pve/${tag}`)),
  foreign: async (tag) =>
    void (await pve1.ssh([
      "pvesm",
      "add",
      "nfs",
      tag,
      "--server",
      "skydev",
      "--export",
      EXPORT,
      "--content",
      "backup,iso",
      "--bwlimit",
      "restore=7",
    ])),
  bad: [
    ["guests' disks without ids of their own", { content: ["images"] }, "content"],
    ["containers' disks without ids of their own", { content: ["backup", "rootdir"] }, "content"],
    ["an unknown content", { content: ["backups"] }, "content[0]"],
    ["no content", { content: [] }, "content"],
    ["a typo in the retention", { retention: { keepLats: 3 } }, "retention.keepLats"],
    ["a negative retention", { retention: { keepLast: -1 } }, "retention.keepLast"],
    ["keepAll together with others", { retention: { keepAll: true, keepLast: 3 } }, "retention.keepAll"],
    ["a retention of zeros", { retention: { keepLast: 0 } }, "retention"],
    ["a storage id with a blank", { storageId: "a b" }, "storageId"],
    ["a server with a path", { server: "skydev:/x" }, "server"],
    ["a relative export", { export: "mnt/data" }, "export"],
    ["a mount point that climbs", { path: "/mnt/../etc" }, "path"],
    ["ids upside down", { vmIds: { lower: 200, upper: 100 } }, "vmIds.upper"],
    ["ids that are none", { vmIds: { lower: 1, upper: 100 } }, "vmIds.lower"],
    ["a directory outside", { contentDirs: { backup: "../x" } }, "contentDirs.backup"],
    ["an unknown limit", { bwlimit: "restor=1" }, "bwlimit"],
    ["options with a blank", { options: "vers=4.2, soft" }, "options"],
    ["a node with an underscore", { nodes: ["pve_1"] }, "nodes[0]"],
    ["fewer protected than none", { maxProtectedBackups: -2 }, "maxProtectedBackups"],
    ["a password", { host: { host: "x", password: "y" } }, "host.password"],
  ],
  badOnHost: [
    ["an id that a directory storage has", { storageId: "local" }, /taken by a storage of type dir/],
    ["a path that another storage has", { path: "/var/lib/vz" }, /belongs to the storage local/],
  ],
  mutable: [
    ["retention", { retention: { keepLast: 3, keepDaily: 7 } }, /prune-backups keep-daily=7,keep-last=3/],
    ["content", { content: ["backup", "iso"] }, /content backup,iso/],
    ["maxProtectedBackups", { maxProtectedBackups: -1 }, /max-protected-backups -1/],
    ["contentDirs", { contentDirs: { iso: "isos" } }, /content-dirs iso=isos/],
    ["options", { options: "vers=4.2,soft" }, /options soft,vers=4.2/],
    ["bwlimit", { bwlimit: "restore=102400" }, /bwlimit restore=102400/],
    ["preallocation", { preallocation: "off" }, /preallocation off/],
    ["nodes", { nodes: ["elsewhere"] }, /nodes elsewhere/],
    ["disable", { disable: true }, /disable/],
    ["export", { export: "/mnt/data/other" }, /mounted skydev:\/mnt\/data\/other/],
    ["vmIds", { vmIds: { lower: 50001, upper: 50009 } }, /nfs:/],
  ],
  optional: [
    ["retention", { retention: { keepLast: 3 } }, /prune-backups/],
    ["maxProtectedBackups", { maxProtectedBackups: 4 }, /max-protected/],
    ["options", { options: "vers=4.2" }, /options/],
    ["bwlimit", { bwlimit: "restore=1" }, /bwlimit/],
    ["nodes and disable", { nodes: ["elsewhere"], disable: true }, /nodes/],
  ],
  replacing: [
    ["storageId", (tag) => ({ storageId: `${tag}x` })],
    ["path", () => ({ path: "/mnt/elsewhere" })],
  ],
});
