// npm run demo, npm run demo:down: a lab host with LVM, and the real `pulumi up` of the root's Pulumi.yaml against it over ssh.
import { mkdir, rename, rm } from "node:fs/promises";
import { join } from "node:path";
import { execa } from "execa";
import { cache, exists, root } from "./cache.mts";
import { pulumiCli } from "./pulumi-cli.mts";

const lab = join(root, "test/lab/lab");
const host = "demo";
const stack = "lab";
// Outside the clone, so that a demo leaves nothing in it.
const folder = join(cache, "demo");
const settings = join(folder, `Pulumi.${stack}.yaml`);

const head = (text: string) => console.log(`\n\u2500\u2500 ${text}`);

/** Shows a command and runs it in the foreground. */
async function show(shown: string, file: string, argv: string[], env: Record<string, string> = {}): Promise<void> {
  console.log(`$ ${shown}`);
  await execa(file, argv, { cwd: root, env, stdin: "ignore", stdout: "inherit", stderr: "inherit" });
}

const sshConfig = async () => (await execa(lab, ["config"])).stdout;
const onHost = async (command: string) =>
  (await execa("ssh", ["-F", await sshConfig(), host, command], { stdin: "ignore" })).stdout;

async function pulumi() {
  const cli = await pulumiCli();
  const env = {
    ...cli.env,
    PULUMI_HOME: join(folder, "home"),
    PULUMI_BACKEND_URL: `file://${join(folder, "state")}`,
    PULUMI_CONFIG_PASSPHRASE: "demo",
  };
  return { file: join(cli.bin, "pulumi"), env };
}

/** The volume group of the demo, with a guest's volume in it; true when it had to be made. */
async function makeVolumes(): Promise<boolean> {
  const answer = await onHost(`
    if vgs vgdata >/dev/null 2>&1; then echo there; exit; fi
    set -e
    vgcreate -qq -y vgdata /dev/ubdb
    lvcreate -qq -y -n vm1 -L 256M vgdata
    mkfs.ext4 -q /dev/vgdata/vm1`);
  return answer.trim() !== "there";
}

async function makeStack(): Promise<void> {
  const { file, env } = await pulumi();
  await rm(folder, { recursive: true, force: true });
  await mkdir(join(folder, "state"), { recursive: true });
  await execa(file, ["stack", "init", stack, "--no-select", "--non-interactive"], { cwd: root, env });
  // `stack init` knows no other place for it
  await rename(join(root, `Pulumi.${stack}.yaml`), settings);
  const connection = JSON.stringify({ configFile: await sshConfig() });
  await execa(file, ["config", "set", "--stack", stack, "--config-file", settings, "vmbackup:connection", connection], {
    cwd: root,
    env,
  });
}

async function up(): Promise<void> {
  await execa(lab, ["deps"], { stdio: "inherit" });
  await execa(lab, ["build"], { stdio: "inherit" });
  await pulumiCli();
  head(`A host with LVM starts, and the package is built (${lab} up --uml ${host})`);
  await Promise.all([
    execa(lab, ["up", "--uml", host], { stdout: "ignore", stderr: "inherit" }),
    // Types are the business of npm run check.
    execa("tsc", ["-p", "tsconfig.build.json", "--noCheck"], { cwd: root, preferLocal: true, localDir: root }),
  ]);
  // A new host is another machine: what is recorded about the last one does not count.
  const fresh = await makeVolumes();
  if (fresh || !(await exists(settings))) await makeStack();
  const { file, env } = await pulumi();
  const common = ["--stack", stack, "--config-file", settings, "--non-interactive", "--color", "auto"];
  head("The program is examples/lv-snapshot/index.ts, by way of Pulumi.yaml");
  await show("pulumi up", file, ["up", "--yes", ...common], env);
  head("What the host itself says");
  console.log(`$ ssh ${host} lvs\n${await onHost("lvs -o lv_name,origin,lv_size,data_percent,lv_tags vgdata")}`);
  head("Once more: nothing is left to do");
  await show("pulumi up", file, ["up", "--yes", "--skip-preview", "--expect-no-changes", ...common], env);
  head("Look around");
  console.log(`  ssh -F ${await sshConfig()} ${host}
  edit examples/lv-snapshot/index.ts (a size of 96M?) and run npm run demo again
  npm run demo:down takes everything down`);
}

async function down(): Promise<void> {
  if (
    (await execa(lab, ["list"])).stdout.split("\n").some((line) => line.startsWith(`${host} `) && line.endsWith(" up"))
  ) {
    const { file, env } = await pulumi();
    const argv = [
      "destroy",
      "--yes",
      "--skip-preview",
      "--stack",
      stack,
      "--config-file",
      settings,
      "--non-interactive",
    ];
    // What a half-made demo cannot destroy goes with its host.
    await show("pulumi destroy", file, argv, env).catch((error: Error) => console.error(error.message));
  }
  await execa(lab, ["down", host], { stderr: "inherit" });
  await rm(folder, { recursive: true, force: true });
  console.log("The demo's host and its state are gone. Image and CLI are kept for the next time, in", cache);
}

const what = process.argv[2];
if (process.getuid?.() !== 0) {
  console.error("demo: root is needed for the lab's host: sudo npm run demo");
  process.exitCode = 1;
} else
  await (what === "down" ? down() : up()).catch((error: Error & { exitCode?: number; shortMessage?: string }) => {
    // Whatever failed has said why on the terminal already.
    console.error(`demo: ${error.shortMessage ?? error.message}`);
    process.exitCode = 1;
  });
