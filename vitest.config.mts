import { join } from "node:path";
import { defineConfig } from "vitest/config";

// unit: no root, no lab, seconds. lab: real hosts. engine: the real `pulumi up` against them.
// One after the other, so that a slow boot or a Go program in the back never makes a timeout of another. (Not from 0: vitest
// puts a project of one worker with that number last.)
export default defineConfig({
  test: {
    reporters: ["./scripts/skipped-reporter.mts", "default"],
    projects: [
      {
        // The examples' own files are tested with today's sources.
        resolve: { alias: { "pulumi-vmbackup": join(import.meta.dirname, "provider/index.ts") } },
        test: {
          name: "unit",
          include: ["test/unit/**/*.test.ts", "test/*.test.ts"],
          sequence: { groupOrder: 1 },
        },
      },
      {
        test: {
          name: "lab",
          include: ["test/{lab,laws,proxmox}/**/*.test.ts"],
          globalSetup: ["test/lab/setup.ts"],
          setupFiles: ["test/lab/watch.ts"],
          testTimeout: 600_000,
          hookTimeout: 600_000,
          // Hosts are processes of this machine: more files at once would only wait for its cores.
          maxWorkers: 2,
          sequence: { groupOrder: 2 },
        },
      },
      {
        test: {
          name: "engine",
          include: ["test/engine/**/*.test.ts"],
          globalSetup: ["test/lab/setup.ts", "test/engine/setup.ts"],
          testTimeout: 900_000,
          hookTimeout: 600_000,
          maxWorkers: 2,
          sequence: { groupOrder: 3 },
        },
      },
      {
        // npm run bench: no part of npm test, asserts no time, prints a table.
        test: {
          name: "bench",
          include: ["bench/**/*.bench.ts"],
          globalSetup: ["test/lab/setup.ts", "test/engine/setup.ts"],
          testTimeout: 1_800_000,
          hookTimeout: 600_000,
          maxWorkers: 1,
          disableConsoleIntercept: true,
          sequence: { groupOrder: 4 },
        },
      },
    ],
  },
});
