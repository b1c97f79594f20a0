// vitest's global setup of the engine's tests: they run the built package (its types are the business of npm run check), and
// the CLI, which is there before the clock of any test runs.
import { join } from "node:path";
import { execa } from "execa";
import { pulumiCli } from "../../scripts/pulumi-cli.mts";

export async function setup(): Promise<void> {
  await execa("npx", ["tsc", "-p", "tsconfig.build.json", "--noCheck"], { cwd: join(__dirname, "../..") });
  await pulumiCli();
}
