// npm run check: types, lint and format, and the package as its users get it.
import { execa } from "execa";
import { root } from "./cache.mts";

const steps: { what: string; argv: [string, ...string[]] }[] = [
  { what: "types", argv: ["tsc", "--noEmit"] },
  { what: "lint and format", argv: ["biome", "check", "--error-on-warnings", "."] },
  { what: "build", argv: ["tsc", "-p", "tsconfig.build.json"] },
  { what: "package", argv: ["publint", "--strict"] },
  // The package is CommonJS, also for ESM programs, and Node below 16 reads no `exports`.
  { what: "package's types", argv: ["attw", "--pack", ".", "--profile", "node16", "--format", "ascii"] },
];

const failed: string[] = [];
for (const { what, argv } of steps) {
  const started = Date.now();
  const [command, ...rest] = argv;
  const run = await execa(command, rest, { cwd: root, preferLocal: true, localDir: root, all: true, reject: false });
  console.log(
    `${run.failed ? "FAILED" : "ok    "} ${what} (${argv.join(" ")}), ${((Date.now() - started) / 1000).toFixed(1)} s`,
  );
  if (!run.failed) continue;
  failed.push(what);
  console.log(run.all);
}
if (failed.length > 0) {
  console.log(`check: ${failed.join(", ")} failed`);
  process.exitCode = 1;
}
