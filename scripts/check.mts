// npm run check: types, lint and format, and the package as its users get it.
import { mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { execa } from "execa";
import { acceptancePrograms } from "./acceptance.mts";
import { root } from "./cache.mts";

const failed: string[] = [];

async function step(what: string, command: string, ...argv: string[]): Promise<void> {
  const started = Date.now();
  const run = await execa(command, argv, { cwd: root, preferLocal: true, localDir: root, all: true, reject: false });
  const seconds = ((Date.now() - started) / 1000).toFixed(1);
  console.log(`${run.failed ? "FAILED" : "ok    "} ${what} (${[command, ...argv].join(" ")}), ${seconds} s`);
  if (!run.failed) return;
  failed.push(what);
  console.log(run.all);
}

await step("types", "tsc", "--noEmit");
await step("lint and format", "biome", "check", "--error-on-warnings", ".");
await step("build", "tsc", "-p", "tsconfig.build.json");
// After the build: an example is a user's program, so its types are those of dist.
for (const example of await readdir(join(root, "examples")).catch(() => []))
  await step(`example ${example}`, "tsc", "--noEmit", "-p", `examples/${example}`);
await step("package", "publint", "--strict");
const folder = await mkdtemp(join(tmpdir(), "vmbackup-pack-"));
await step("pack", "npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", folder);
// The package is CommonJS, also for ESM programs; resolvers that know no `exports` are not supported.
for (const packed of await readdir(folder)) {
  await step("package's types", "attw", join(folder, packed), "--profile", "node16", "--format", "ascii");
  const programs = join(folder, "programs");
  await step("programs of users", "tsc", ...(await acceptancePrograms(join(folder, packed), programs)));
}
await rm(folder, { recursive: true });

if (failed.length > 0) {
  console.log(`check: ${failed.join(", ")} failed`);
  process.exitCode = 1;
}
