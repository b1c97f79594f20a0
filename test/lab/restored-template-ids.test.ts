// Ids out of a range whose guests' store is claimed: the registry on the export remembers each that was taken.
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, expect, it } from "vitest";
import { registered } from "../../provider/nfs-export.js";
import { Stack } from "../stack.js";
import { useHosts } from "./lab.js";
import { A, restoresOn } from "./restores.js";

const servers = mkdtempSync(join(tmpdir(), "nfs-"));
const folder = join(servers, "skydev/dumps");
mkdirSync(folder, { recursive: true });
writeFileSync(join(servers, "skydev/.exports"), "/dumps *\n");

const { node } = useHosts({ node: { pve: true, bindRw: { [servers]: "/srv/nfs" } } });
const { setUp, conf, vanish } = restoresOn(node);
afterAll(() => rmSync(servers, { recursive: true, force: true }));

const stacks: Stack[] = [];
const stackOf = (kind: string, name: string) => {
  const made = new Stack(kind, name);
  stacks.unshift(made);
  return made;
};
afterEach(async () => {
  for (const stack of stacks.splice(0)) await stack.destroy().catch(() => {});
});

const range = { lower: 14001, upper: 14009 };
const used = () => registered(readFileSync(join(folder, ".pulumi-vmbackup/claims"), "utf8")).used;
const template = (over: object = {}) => ({
  host: node.connection,
  from: { archive: A },
  to: { storage: "local" },
  vmId: range,
  onDelete: "destroy",
  ...over,
});

it("an id is not given out again, whether destroy or a person removed its guest; its own resource and a number keep it", async () => {
  await setUp();
  const dumps = stackOf("NfsDumpStorage", "dumps");
  await dumps.up({ host: node.connection, storageId: "dumps1", server: "skydev", export: "/dumps", vmIds: range });
  expect(used()).toEqual([]);

  const one = stackOf("RestoredTemplate", "one");
  await one.up(template());
  expect(one.recorded?.id).toBe("14001");
  expect(used()).toEqual([14001]);
  expect(await one.preview(template())).toBe("same");
  await one.destroy();
  expect(await conf(14001)).toBeUndefined();

  const two = stackOf("RestoredTemplate", "two");
  await two.up(template());
  expect(two.recorded?.id).toBe("14002");
  expect(used()).toEqual([14001, 14002]);
  await vanish(14002);
  const three = stackOf("RestoredTemplate", "three");
  await three.up(template());
  expect(three.recorded?.id).toBe("14003");

  // Its own resource makes it anew under its id, and a program that names a number means it.
  expect(await two.refresh()).toBe("gone");
  await two.up(template());
  expect(two.recorded?.id).toBe("14002");
  const four = stackOf("RestoredTemplate", "four");
  await four.up(template({ vmId: 14001 }));
  expect(await four.up(template({ vmId: 14001 }), { replace: true })).toBe("replace");
  expect(await conf(14001)).toMatch(/template: 1/);
});

it("an export that is down stops nothing, and learns of the id when it is back", async () => {
  const dumps = stackOf("NfsDumpStorage", "dumps");
  await dumps.up({ host: node.connection, storageId: "dumps1", server: "skydev", export: "/dumps", vmIds: range });
  const before = used();
  const stack = stackOf("RestoredTemplate", "late");
  await node.ssh("pvesm set dumps1 --disable 1 && umount /mnt/pve/dumps1");
  await stack.up(template());
  expect(await conf(Number(stack.recorded?.id))).toMatch(/template: 1/);
  expect(used()).toEqual(before);
  await node.ssh("pvesm set dumps1 --disable 0; pvesm status >/dev/null; pvesm status");
  await stack.up(template({ tags: ["x"] }));
  expect(used()).toEqual([...before, Number(stack.recorded?.id)].sort());
});
