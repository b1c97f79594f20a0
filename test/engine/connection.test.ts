// How a program names its host, and what becomes of keys, with the real engine.
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { execa } from "execa";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { sshConfig, useHosts, useStore, useVolumeGroup } from "../lab/lab.js";
import { type Run, useProjects } from "./project.js";
import { changes, done, errors, literal, MiB, program, snapshots } from "./snapshots.js";

const store = useStore();
const { elsewhere } = useHosts({ elsewhere: {} });
const vg = useVolumeGroup(store, "wires", 320);
const project = useProjects();
let folder: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "vmbackup-keys-"));
  await store.ssh(
    `lvcreate -qq -y -W n -L 32M -n root ${vg} && lvcreate -qq -y -W n -L 32M -n other ${vg} && cp -p ~/.ssh/authorized_keys ~/.ssh/authorized_keys.before`,
  );
}, 300_000);
afterAll(async () => {
  await store.ssh("mv ~/.ssh/authorized_keys.before ~/.ssh/authorized_keys");
  await rm(folder, { recursive: true, force: true });
});

/** A new key, known to the host. */
async function key(name: string): Promise<string> {
  const file = join(folder, name);
  await execa("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-C", `engine-${name}`, "-f", file]);
  await store.ssh("cat >>~/.ssh/authorized_keys", { input: await readFile(`${file}.pub`, "utf8") });
  return await readFile(file, "utf8");
}
const forbid = (name: string) => store.ssh(["sed", "-i", `/engine-${name}$/d`, "/root/.ssh/authorized_keys"]);

/** A line in the middle of the key's text: to look for. */
const heart = (text: string) => text.split("\n")[2] ?? text;

describe("a private key", { timeout: 1_800_000 }, () => {
  it("given in clear is encrypted in the state, from vmbackup:connection in no resource, and shown nowhere", async () => {
    const [first, second, configured] = [await key("first"), await key("second"), await key("configured")];
    const source = (own: string) =>
      program(`const host = { host: ${literal(store.address)}, hostKey: ${literal(store.hostKey)} };
const a = new LvSnapshot("own", { host: { ...host, privateKey: ${literal(own)} }, volumeGroup: "${vg}", origin: "root", size: "4M" });
const b = new LvSnapshot("configured", { host, volumeGroup: "${vg}", origin: "other", size: "4M" });
export const paths = [a.path, b.path], uuid = a.uuid;`);
    const it = await project(source(first), { language: "esm" });
    await it.setConfig({ "vmbackup:connection": JSON.stringify({ privateKey: configured }) }, true);
    const runs = [await it.up()];
    expect(runs[0]?.exitCode).toBe(0);
    const made = await snapshots(store, vg);
    expect(Object.keys(made).sort()).toEqual(["configured", "own"]);
    const resources = await it.resources();
    const of = (name: string) => resources.find(({ id }) => id === `${vg}/${name}`);
    for (const properties of [of("own")?.inputs, of("own")?.outputs])
      expect(properties).toMatchObject({
        host: { host: store.address, privateKey: { ciphertext: expect.any(String) } },
        volumeGroup: vg,
        name: "own",
      });
    for (const properties of [of("configured")?.inputs, of("configured")?.outputs])
      expect(properties?.host).toEqual({ host: store.address, hostKey: store.hostKey });
    // Not secret by contact: readable in the state as it lies there
    const { deployment } = await it.export();
    expect(deployment.resources?.find(({ type }) => type === "pulumi:pulumi:Stack")?.outputs).toEqual({
      paths: [`/dev/${vg}/own`, `/dev/${vg}/configured`],
      uuid: made.own?.uuid,
    });

    // Rotated: an update that changes nothing there, and destroy uses the new key
    const before = await changes(store, vg);
    await it.write(source(second));
    runs.push(await it.up());
    expect(runs[1]).toMatchObject({ exitCode: 0, summary: { update: 1 } });
    expect(await changes(store, vg)).toBe(before);
    await forbid("first");
    const state = JSON.stringify(await it.export());
    runs.push(await it.destroy());
    expect(runs[2]?.exitCode).toBe(0);
    expect(await snapshots(store, vg)).toEqual({});

    // But for what the SDK itself writes with --debug: every answer as it came
    const events = (run: Run) => run.events.filter(({ diagnosticEvent: d }) => d?.severity !== "debug");
    const places = {
      state,
      ...Object.fromEntries(
        runs.flatMap((run, i) => [
          [`output ${i}`, run.all],
          [`events ${i}`, JSON.stringify(events(run))],
        ]),
      ),
    };
    const shown = { first, second, configured };
    const found = Object.entries(shown).flatMap(([name, text]) =>
      Object.entries(places).flatMap(([place, all]) => (all.includes(heart(text)) ? [`${name} in ${place}`] : [])),
    );
    expect(found).toEqual([]);
  });

  it("that is refused is not shown, and neither is a configuration that is wrong", async () => {
    const text = `-----BEGIN OPENSSH PRIVATE KEY-----\n${"A".repeat(70)}\nkeykeykeykey\n-----END OPENSSH PRIVATE KEY-----\n`;
    const host = { host: store.address, hostKey: store.hostKey, privateKey: text };
    const it = await project(
      program(
        `new LvSnapshot("a", { host: ${literal(host)}, volumeGroup: "${vg}", origin: "root", size: "4M" });
new LvSnapshot("b", { host: ${literal(store.address)}, volumeGroup: "${vg}", origin: "root", size: "4M" });`,
      ),
      { language: "esm" },
    );
    await it.setConfig({ "vmbackup:connection": `{"privateKey": "${"secret".repeat(9)}"}` }, true);
    const run = await it.up("--continue-on-error");
    expect(run.exitCode).not.toBe(0);
    expect(errors(run)).toMatch(/vmbackup:connection.*privateKey/);
    expect(run.all).not.toContain("keykeykeykey");
    expect(run.all).not.toContain("secretsecret");
    expect(await it.resources()).toEqual([]);
  });
});

describe("a host's name", { timeout: 1_800_000 }, () => {
  it("may change for the same machine; one that leads to another is refused, and nothing is touched on either", async () => {
    const source = (name: string, size: string) =>
      program(
        `new LvSnapshot("named", { host: { host: ${literal(name)}, configFile: "./ssh_config" }, volumeGroup: "${vg}", origin: "root", size: ${literal(size)} });`,
      );
    const it = await project(source("web", "4M"), { language: "esm" });
    const names = (web: string, www: string) =>
      writeFile(
        join(it.folder, "ssh_config"),
        `Host web\n  HostName ${web}\nHost www\n  HostName ${www}\nMatch all\n  Include "${sshConfig}"\n`,
      );
    await names(store.address, store.address);
    expect((await it.up()).exitCode).toBe(0);
    const before = await changes(store, vg);

    await it.write(source("www", "4M"));
    const renamed = await it.up();
    expect(renamed).toMatchObject({ exitCode: 0, summary: { update: 1 } });
    expect(await changes(store, vg)).toBe(before);
    const [recorded] = await it.resources();
    expect(recorded?.outputs).toMatchObject({ host: { host: "www" } });

    await names(store.address, elsewhere.address);
    const refused =
      /is on another machine: the name www now leads to machine [0-9a-f]{32}.*Nothing was changed on either/s;
    const refreshed = await it.refresh();
    expect(refreshed.exitCode).not.toBe(0);
    expect(errors(refreshed)).toMatch(refused);
    await it.write(source("www", "8M"));
    const updated = await it.up();
    expect(updated.exitCode).not.toBe(0);
    expect(errors(updated)).toMatch(refused);
    const destroyed = await it.destroy();
    expect(destroyed.exitCode).not.toBe(0);
    expect(errors(destroyed)).toMatch(refused);
    expect(await it.resources()).toMatchObject([{ inputs: recorded?.inputs, outputs: recorded?.outputs }]);
    expect(await changes(store, vg)).toBe(before);
    const { exitCode } = await elsewhere.ssh(["test", "-e", "/var/lib/pulumi-vmbackup"], { reject: false });
    expect(exitCode).not.toBe(0);

    await names(elsewhere.address, store.address);
    expect(done(await it.up())).toEqual({ named: "update" });
    expect((await snapshots(store, vg)).named?.bytes).toBe(8 * MiB);
    expect((await it.destroy()).exitCode).toBe(0);
    expect(await snapshots(store, vg)).toEqual({});
  });
});
