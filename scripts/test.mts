// npm test: everything. Sets up what is missing (see the lines it prints), then runs check, the conformance of the Proxmox stand-ins,
// and all tests.
// Arguments go to vitest.
import { execa } from "execa";
import { root } from "./cache.mts";
import { pulumiCli } from "./pulumi-cli.mts";

const argv = process.argv.slice(2);
const inCi = Boolean(process.env.CI);

/** Runs a step in the foreground; its failure is ours. */
async function step(command: string, ...args: string[]): Promise<void> {
  const { exitCode, failed } = await execa(command, args, {
    cwd: root,
    preferLocal: true,
    localDir: root,
    stdio: "inherit",
    reject: false,
  });
  if (failed) process.exit(exitCode || 1);
}

await step("node", "scripts/check.mts");

const missing: string[] = [];
const projects = ["unit"];
if (process.getuid?.() !== 0) missing.push("the tests of hosts and engine: root is needed for the lab");
else {
  // One after the other: both want all cores.
  await step("test/lab/lab", "deps");
  await step("test/lab/lab", "build");
  projects.push("lab");
  // Stand-ins that have drifted from the recordings would make the tests below worthless.
  await step("node", "scripts/conformance.mts");
  await pulumiCli().then(
    () => projects.push("engine"),
    (error: Error) => missing.push(`the tests of the engine: ${error.message}`),
  );
}
if (missing.length > 0 && inCi) {
  console.error(`Cannot run ${missing.join("; ")}`);
  process.exit(1);
}
await step("vitest", "run", ...projects.flatMap((name) => ["--project", name]), ...argv);
if (missing.length > 0) console.error(`Not run: ${missing.join("; ")}`);
