// The lab itself: what every other test of real hosts takes for granted.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { useHosts, useStore, useVolumeGroup } from "./lab.js";

const shared = mkdtempSync(join(tmpdir(), "vmbackup-lab-"));
writeFileSync(join(shared, "seed"), "from the machine\n");
afterAll(() => rmSync(shared, { recursive: true, force: true }));

describe("containers", () => {
  const { left, right } = useHosts({
    left: { bindRw: { [shared]: "/srv/shared" } },
    right: { bindRw: { [shared]: "/srv/shared" }, bind: { [shared]: "/srv/look" } },
  });

  it("are machines of their own", async () => {
    const id = async (host: typeof left) => (await host.ssh("hostname; cat /etc/machine-id")).stdout.split("\n");
    const [a, b] = await Promise.all([id(left), id(right)]);
    expect(a[0]).toBe(left.name);
    expect(a[1]).toMatch(/^[0-9a-f]{32}$/);
    expect(b[1]).not.toBe(a[1]);
  });

  it("share a folder, as two nodes share an export", async () => {
    await left.ssh(["sh", "-c", 'echo "it\'s $1" >/srv/shared/note', "sh", "here; rm"]);
    expect((await right.ssh(["cat", "/srv/shared/note", "/srv/look/seed"])).stdout).toBe(
      "it's here; rm\nfrom the machine",
    );
    expect(readFileSync(join(shared, "note"), "utf8")).toBe("it's here; rm\n");
    expect((await right.ssh("touch /srv/look/x", { reject: false })).stderr).toMatch("Read-only file system");
  });

  it("see each other, and have a user who may use sudo", async () => {
    await left.ssh(["ping", "-c1", "-W2", right.address]);
    expect((await left.ssh("id -un; sudo -n id -un", { user: "deploy" })).stdout).toBe("deploy\nroot");
  });

  it("keep their disks when the plug is pulled", async () => {
    await left.ssh("echo kept >/root/note; sync /root/note");
    await left.crash();
    expect((await left.ssh("true", { reject: false })).exitCode).toBe(255);
    await left.up();
    expect((await left.ssh("cat /root/note /srv/shared/seed")).stdout).toBe("kept\nfrom the machine");
  });
});

describe("the uml host", () => {
  const store = useStore();
  const group = useVolumeGroup(store, "vglabtest");

  it("has a kernel with LVM", async () => {
    await store.ssh(["lvcreate", "-y", "-L", "32M", "-n", "vm1", group]);
    await store.ssh(["lvcreate", "-y", "-s", "-L", "16M", "-n", "snap", `${group}/vm1`]);
    const { stdout } = await store.ssh(["lvs", "--noheadings", "-o", "lv_name,origin", "--separator", "|", group]);
    expect(stdout.split("\n").map((line) => line.trim())).toEqual(["snap|vm1", "vm1|"]);
  });
});
