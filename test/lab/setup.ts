// vitest's global setup of the projects that use the lab: what is missing is said before the first test, and what the tests
// started is gone when the last one has ended.
import { existsSync } from "node:fs";
import { join } from "node:path";
import { execa } from "execa";
import { down } from "./lab.ts";

export async function setup(): Promise<void> {
  if (process.getuid?.() !== 0) throw new Error("the lab needs root: sudo npm test, or npm run test:unit without it");
  const { stdout: image } = await execa(join(__dirname, "lab"), ["image"]);
  if (!existsSync(join(image, "root.img")))
    throw new Error("the lab's image is missing: npm test makes it, or test/lab/lab deps && test/lab/lab build");
}

export async function teardown(): Promise<void> {
  if (!process.env.LAB_KEEP) await down();
}
