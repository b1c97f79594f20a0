// npm run demo, npm run demo:down: hosts of the lab, and the real `pulumi up` of the examples against them over ssh.
import { rm } from "node:fs/promises";
import { execa } from "execa";
import { cache, root } from "./cache.mts";
import * as lvm from "./demo-lvm.mts";
import * as proxmox from "./demo-proxmox.mts";
import { folder, head, hosts, lab, sshConfig } from "./demo-tools.mts";
import { pulumiCli } from "./pulumi-cli.mts";

async function up(): Promise<void> {
  await execa(lab, ["deps"], { stdio: "inherit" });
  await execa(lab, ["build"], { stdio: "inherit" });
  await pulumiCli();
  const started = Date.now();
  head(`A host with LVM and two nodes start, and the package is built (${lab} up)`);
  const [fresh] = await Promise.all([
    proxmox.start(),
    execa(lab, ["up", "--uml", lvm.host], { stdout: "ignore", stderr: "inherit" }),
    // Types are the business of npm run check.
    execa("tsc", ["-p", "tsconfig.build.json", "--noCheck"], { cwd: root, preferLocal: true, localDir: root }),
  ]);
  await lvm.show();
  await proxmox.show(fresh);
  head(`Look around (all of this took ${Math.round((Date.now() - started) / 1000)} s)`);
  console.log(`  ssh -F ${await sshConfig()} ${lvm.host}      also ${Object.keys(proxmox.nodes).join(", ")}
  edit examples/lv-snapshot/index.ts (a size of 96M?) or examples/standalone-nodes/index.ts (another schedule?)
  and run npm run demo again
  npm run demo:down takes everything down`);
}

async function down(): Promise<void> {
  const there = await hosts();
  if (there.get(lvm.host)) await lvm.project.remove();
  if (Object.keys(proxmox.nodes).every((name) => there.get(name))) await proxmox.project.remove();
  await execa(lab, ["down", lvm.host, ...Object.keys(proxmox.nodes)], { stderr: "inherit" });
  await proxmox.clear();
  await rm(folder, { recursive: true, force: true });
  console.log("The demo's hosts and their state are gone. Image and CLI are kept for the next time, in", cache);
}

const what = process.argv[2];
if (process.getuid?.() !== 0) {
  console.error("demo: root is needed for the lab's hosts: sudo npm run demo");
  process.exitCode = 1;
} else
  await (what === "down" ? down() : up()).catch((error: Error & { exitCode?: number; shortMessage?: string }) => {
    // Whatever failed has said why on the terminal already.
    console.error(`demo: ${error.shortMessage ?? error.message}`);
    process.exitCode = 1;
  });
