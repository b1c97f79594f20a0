// What touches a mount, on a real NFS server and clients (kernels of their own): sources as the kernel writes them, the write
// probe, the guarded unmount, the registry from two hosts, and looks at servers that are dead.
import { join } from "node:path";
import { execa } from "execa";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import type { Fields } from "../../provider/engine-values.js";
import type { Host } from "../../provider/host.js";
import { connect } from "../../provider/host.js";
import {
  encodedOwner,
  type Looked,
  ON_MOUNT,
  parsedSource,
  probe,
  REGISTRY,
  registered,
  sourceOf,
} from "../../provider/nfs-export.js";
import { Stack } from "../stack.js";
import { type LabHost, useHosts, useStore } from "./lab.js";

const store = useStore();
const { client } = useHosts({ client: { uml: true } });
const root = "/srv/real";
const at = "/mnt/real";
// A kernel in a process is slow, and more so when the machine is busy.
const SLOW = 600_000;

async function exported(options: string): Promise<void> {
  await store.ssh(
    `printf '${root} *(${options},sync,no_subtree_check,fsid=77)\\n' >/etc/exports.d/real.exports; exportfs -ra`,
  );
}

async function on(
  host: LabHost,
  functions: string,
  ...words: string[]
): Promise<{ exit: number | undefined; said: string }> {
  const quoted = [`${ON_MOUNT}${functions}`, "x", ...words]
    .map((word) => `'${word.replaceAll("'", "'\\''")}'`)
    .join(" ");
  const { exitCode, stdout, stderr } = await host.ssh(`sh -c ${quoted}`, { reject: false });
  return { exit: exitCode, said: `${stdout}${stderr}`.trim() };
}

const mount = (host: LabHost, source: string, options = "vers=4.2,soft,timeo=30,retrans=1") =>
  host.ssh(`mkdir -p ${at}; mount -t nfs -o ${options} '${source}' ${at}`);
const source = () => sourceOf(store.address, root);

beforeAll(async () => {
  await store.ssh(
    `mkdir -p ${root}/sub/dump /etc/exports.d; echo x >${root}/sub/dump/vzdump-qemu-107-2023_07_26-02_23_55.vma`,
  );
  await exported("rw,no_root_squash");
  await store.ssh("systemctl start nfs-server; exportfs -ra");
}, SLOW);
afterEach(async () => {
  await exported("rw,no_root_squash");
  await store.ssh("systemctl start nfs-server");
  for (const host of [client, store]) await host.ssh(`while umount ${at} 2>/dev/null; do :; done`, { reject: false });
}, SLOW);

describe("a real mount", () => {
  it.each([
    ["an address", () => source(), "vers=4.2"],
    ["NFSv3", () => source(), "vers=3,nolock"],
    ["a slash at the end", () => `${source()}/`, "vers=4.2"],
    ["a directory below the export, which no server lists", () => `${source()}/sub`, "vers=4.2"],
  ])(
    "has the normal form of its source: %s",
    async (_name, from, options) => {
      await mount(client, from(), options);
      const { said } = await on(client, 'source_at "$1"', at);
      const declared = from().slice(store.address.length + 1);
      expect(parsedSource(said)).toEqual(parsedSource(sourceOf(store.address, declared)));
    },
    SLOW,
  );

  it(
    "has the normal form of its source: IPv6 in brackets",
    async () => {
      await mount(store, `[::1]:${root}`);
      const { said } = await on(store, 'source_at "$1"', at);
      expect(parsedSource(said)).toEqual({ server: "::1", export: root });
      expect((await on(store, 'writable "$@"', at, said)).exit).toBe(0);
    },
    SLOW,
  );

  it(
    "is written to once; read-only and squashed exports are told",
    async () => {
      await mount(client, source());
      expect(await on(client, 'writable "$@"', at, source())).toEqual({ exit: 0, said: "" });
      expect((await store.ssh(`ls -A ${root}`)).stdout).toBe("sub"); // the probe is gone
      await exported("ro,no_root_squash");
      expect((await on(client, 'writable "$@"', at, source())).said).toMatch(
        /Read-only file system[\s\S]*must be writable/,
      );
      await exported("rw,root_squash");
      expect((await on(client, 'writable "$@"', at, source())).said).toMatch(
        /Permission denied[\s\S]*without root_squash/,
      );
    },
    SLOW,
  );

  it(
    "is unmounted only when it is ours and nobody has it open",
    async () => {
      await mount(client, source());
      expect((await on(client, 'unmount "$@"', at, sourceOf(store.address, "/other"))).said).toMatch(/it was left/);
      const { stdout: pid } = await client.ssh(`cd ${at} && { sleep 900 >/dev/null 2>&1 & echo $!; }`);
      expect((await on(client, 'unmount "$@"', at, source())).said).toMatch(/in use:\n?.*sleep 900/);
      await client.ssh(["kill", pid]);
      expect((await on(client, 'unmount "$@"', at, source())).exit).toBe(0);
      expect((await on(client, 'source_at "$1"', at)).said).toBe("");
    },
    SLOW,
  );
});

describe("a look at a mount", () => {
  const looked = (): Looked[] => [{ path: at, source: source(), dirs: { backup: "sub/dump", iso: "template/iso" } }];
  const host = (): Host => connect(client.connection);
  /** Processes of ours that are stuck, however often somebody looked. */
  const stuck = async () => (await client.ssh("pgrep -fc '[v]zdump-.qemu.lxc' || true")).stdout.trim();

  it(
    "sees the dumps and the registry",
    async () => {
      await mount(client, source());
      expect(await host().ask(probe(looked()))).toMatchObject([
        { answers: true, dumps: 1, holds: ["backup"], dumpedIds: [107], claims: [] },
      ]);
    },
    SLOW,
  );

  it(
    "a dead server with a hard mount: ten looks, each answers within its deadline, and one process at most is stuck",
    async () => {
      await mount(client, source(), "vers=4.2,hard,timeo=30,retrans=1");
      await store.ssh("systemctl stop nfs-server");
      // What the client has cached of the directories must not answer for the server.
      await client.ssh("echo 3 >/proc/sys/vm/drop_caches");
      for (let i = 0; i < 10; i++) {
        const begin = Date.now();
        const [one] = await host().ask(probe(looked()));
        expect(Date.now() - begin).toBeLessThan(60_000);
        if (i > 0) expect(one?.answers).toBe(false);
      }
      expect(Number(await stuck())).toBeLessThanOrEqual(2); // the shell, and the command in it that waits
      await store.ssh("systemctl start nfs-server");
    },
    SLOW,
  );

  it(
    "an export that was revoked is no answer, and no absence",
    async () => {
      await mount(client, source());
      await store.ssh("rm -f /etc/exports.d/real.exports; exportfs -ra; exportfs -f");
      await client.ssh("echo 3 >/proc/sys/vm/drop_caches");
      const [one] = await host().ask(probe(looked()));
      expect(one).toMatchObject({ dumps: 0, claims: [] });
    },
    SLOW,
  );
});

describe("the registry over real NFS", () => {
  it(
    "two hosts at once for overlapping ids: one wins each time, and the loser is told who",
    async () => {
      const races = 10;
      await Promise.all([client, store].map((host) => mount(host, source())));
      // Each starts when the clock of the export says so, and not when our connections are through.
      const race = `i=0; while [ "$i" -lt ${races} ]; do i=$((i + 1)); ready=${at}/ready.$i
      : >"$ready.$(cat /etc/machine-id)"; until [ "$(ls ${at} | grep -c "^ready.$i\\.")" -ge 2 ]; do sleep 0.1; done
      ( claim ${at} "$1" /etc/machine-id /etc/machine-id "st$i" "$2" "$((i * 100 + $3))" "$((i * 100 + $3 + 60))" 0 "" 2>&1 ); echo "exit $?"; done`;
      const ended = await Promise.all([
        on(client, race, source(), encodedOwner("organization/p/one/NfsDumpStorage/d"), "0"),
        on(store, race, source(), encodedOwner("organization/p/two/NfsDumpStorage/d"), "30"),
      ]);
      const statuses = ended.map(({ said }) => [...said.matchAll(/^exit (\d+)/gm)].map((match) => match[1]));
      expect(statuses.map((list) => list.length)).toEqual([races, races]);
      for (let i = 0; i < races; i++)
        expect([statuses[0]?.[i], statuses[1]?.[i]].sort(), `race ${i}`).toEqual(["0", "3"]);
      for (const [i, { said }] of ended.entries())
        for (const line of said.split("\n").filter((text) => text.startsWith("vmIds")))
          expect(line).toContain(`are claimed by organization/p/${i === 0 ? "two" : "one"}/NfsDumpStorage/d`);
      const { stdout } = await store.ssh(`cat ${root}/${REGISTRY}/claims`);
      expect(registered(stdout).claims).toHaveLength(races);
      await store.ssh(`rm -f ${root}/ready.* ${root}/${REGISTRY}/claims`);
    },
    SLOW,
  );
});

// The resource as a whole: stand-ins for pvesm and pvesh, and below them the kernel's own NFS.
describe("a storage on a real mount", () => {
  const pvePath = "/mnt/pve/real";
  const stack = new Stack("NfsDumpStorage", "real");
  const inputs = (over: Fields = {}): Fields => ({
    host: client.connection,
    storageId: "real",
    server: store.address,
    export: root,
    options: "vers=4.2,hard,timeo=30,retrans=1",
    ...over,
  });
  const mounted = async () =>
    (await client.ssh(`findmnt -n -o SOURCE,FSTYPE --mountpoint ${pvePath}`, { reject: false })).stdout;

  beforeAll(async () => {
    const { stdout: tar } = await execa("tar", ["-C", join(__dirname, "../proxmox"), "-c", "."], {
      encoding: "base64",
    });
    await client.ssh(
      "mkdir -p /root/proxmox && base64 -d | tar -x -C /root/proxmox && sh /root/proxmox/install --real-nfs",
      {
        input: tar,
      },
    );
  }, SLOW);
  afterAll(async () => {
    await store.ssh("systemctl start nfs-server");
    await client.ssh(`pvesm remove real; umount ${pvePath}`, { reject: false });
  }, SLOW);

  it(
    "is made, moved to a directory below the export, and removed without its dumps",
    async () => {
      await stack.up(inputs());
      expect(await mounted()).toMatch(new RegExp(`^${store.address}:${root} +nfs4$`));
      expect(stack.recorded?.outputs.status).toMatchObject({ active: true, dumps: 0 });
      await stack.up(inputs({ export: `${root}/sub` }));
      expect(await mounted()).toMatch(new RegExp(`^${store.address}:${root}/sub +nfs4$`));
      expect(stack.recorded?.outputs.status).toMatchObject({ dumps: 1, newestDump: "2023-07-26T02:23:55.000Z" });
      expect(await stack.preview(inputs({ export: `${root}/sub` }))).toBe("same");
      await stack.destroy();
      expect(await mounted()).toBe("");
      expect((await store.ssh(`ls ${root}/sub/dump`)).stdout).toContain("vzdump-qemu-107");
    },
    SLOW,
  );

  it(
    "on a server that speaks only NFSv4: refused with what to declare, and made with it",
    async () => {
      // No rpcbind, no list of exports; NFSv4 needs neither.
      await store.ssh("systemctl stop rpcbind.socket rpcbind");
      try {
        const said = await stack.up(inputs({ options: "soft" })).catch(String);
        expect(said).toMatch(/vers=4\.2/);
        expect(await mounted()).toBe("");
        await stack.up(inputs());
        expect(await mounted()).toMatch(/nfs4$/);
      } finally {
        await store.ssh("systemctl start rpcbind.socket rpcbind; systemctl restart nfs-server; exportfs -ra"); // registers again
        await stack.destroy();
      }
    },
    SLOW,
  );

  it(
    "its server dies under a hard mount: ten refreshes answer, none says gone, and nothing piles up",
    async () => {
      await stack.up(inputs());
      await store.ssh("systemctl stop nfs-server");
      await client.ssh("echo 3 >/proc/sys/vm/drop_caches");
      for (let i = 0; i < 10; i++) {
        const begin = Date.now();
        expect(await stack.refresh()).toBe("there");
        expect(Date.now() - begin).toBeLessThan(120_000);
      }
      expect(stack.recorded?.outputs.status).toMatchObject({ active: false });
      const { stdout } = await client.ssh("ps -eo stat,args | grep -c '^D' || true");
      expect(Number(stdout)).toBeLessThanOrEqual(1);
      await store.ssh("systemctl start nfs-server");
      await stack.destroy();
      expect(await mounted()).toBe("");
    },
    SLOW,
  );
});
