// vitest's global setup of the projects that use the lab: what is missing is said before the first test, and what the tests
// started is gone when the last one has ended.
import { existsSync, mkdirSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { execa } from "execa";
import { down, folder, list } from "./lab.ts";

// One file per run of vitest in this clone. A run may not take down the hosts of another, and a killed one leaves its own behind.
const runs = join(folder, "runs");
const mine = join(runs, String(process.pid));

function alone(): boolean {
  const others = readdirSync(runs).filter((pid) => pid !== String(process.pid));
  return !others.some((pid) => {
    if (existsSync(`/proc/${pid}`)) return true;
    rmSync(join(runs, pid), { force: true });
    return false;
  });
}

export async function setup(): Promise<void> {
  if (process.getuid?.() !== 0) throw new Error("the lab needs root: sudo npm test, or npm run test:unit without it");
  const { stdout: image } = await execa(join(__dirname, "lab"), ["image"]);
  if (!existsSync(join(image, "root.img")))
    throw new Error("the lab's image is missing: npm test makes it, or test/lab/lab deps && test/lab/lab build");
  mkdirSync(runs, { recursive: true });
  writeFileSync(mine, "");
  if (!process.env.LAB_KEEP && alone() && (await list()).length > 0) await down();
}

export async function teardown(): Promise<void> {
  rmSync(mine, { force: true });
  if (!process.env.LAB_KEEP && alone()) await down();
}
