// What both parts of the demo need: commands that are shown, hosts of the lab, Pulumi projects with their state outside the clone.
import { mkdir, rename, rm } from "node:fs/promises";
import { join } from "node:path";
import { stripVTControlCharacters } from "node:util";
import { execa } from "execa";
import { cache, exists, root } from "./cache.mts";
import { pulumiCli } from "./pulumi-cli.mts";

export const lab = join(root, "test/lab/lab");
/** Outside the clone, so that a demo leaves nothing in it. With LAB_SUFFIX (test/lab/lab) a second demo runs beside the first. */
export const folder = join(cache, ["demo", process.env.LAB_SUFFIX].filter(Boolean).join("-"));
const stack = "lab";

export const head = (text: string) => console.log(`\n\u2500\u2500 ${text}`);

/** Of a refresh only what it finds is shown, not what it looks at. */
function* found(line: unknown) {
  if (!/ (refreshing|refresh|running) *(\([0-9.]+m?s\))? *$/.test(stripVTControlCharacters(String(line)))) yield line;
}

/** Shows a command and runs it in the foreground. */
async function show(shown: string, file: string, argv: string[], cwd: string, env: Record<string, string>) {
  console.log(`$ ${shown}`);
  await execa(file, argv, { cwd, env, stdin: "ignore", stdout: [found, "inherit"], stderr: "inherit" });
}

export const sshConfig = async () => (await execa(lab, ["config"])).stdout;

export async function onHost(host: string, command: string): Promise<string> {
  return (await execa("ssh", ["-F", await sshConfig(), host, command], { stdin: "ignore" })).stdout;
}

/** Shows a command and what the host answers. */
export async function ask(host: string, command: string): Promise<void> {
  console.log(`$ ssh ${host} ${command}`);
  const answer = await onHost(host, command);
  if (answer.trim() !== "") console.log(answer);
}

/** The hosts of the demo's lab that exist: name to whether it runs. */
export async function hosts(): Promise<Map<string, boolean>> {
  const { stdout } = await execa(lab, ["list"]);
  const lines = stdout.split("\n").filter(Boolean);
  return new Map(lines.map((line) => [line.split(" ")[0] ?? "", line.endsWith(" up")]));
}

/** A Pulumi project of the clone with one stack, whose state and settings are the demo's. */
export class Project {
  readonly #cwd: string;
  readonly #folder: string;
  readonly #settings: string;

  constructor(name: string, cwd: string) {
    this.#cwd = cwd;
    this.#folder = join(folder, name);
    this.#settings = join(this.#folder, `Pulumi.${stack}.yaml`);
  }

  async #cli() {
    const cli = await pulumiCli();
    const env = {
      ...cli.env,
      PULUMI_HOME: join(folder, "home"),
      PULUMI_BACKEND_URL: `file://${join(this.#folder, "state")}`,
      PULUMI_CONFIG_PASSPHRASE: "demo",
      // Types of the examples are the business of npm run check.
      PULUMI_NODEJS_TRANSPILE_ONLY: "true",
    };
    return { file: join(cli.bin, "pulumi"), env };
  }

  exists = () => exists(this.#settings);

  /** The stack anew, with this configuration. */
  async make(config: Record<string, string>): Promise<void> {
    const { file, env } = await this.#cli();
    const run = (argv: string[]) => execa(file, [...argv, "--non-interactive"], { cwd: this.#cwd, env });
    await rm(this.#folder, { recursive: true, force: true });
    await mkdir(join(this.#folder, "state"), { recursive: true });
    await run(["stack", "init", stack, "--no-select"]);
    // `stack init` knows no other place for it
    await rename(join(this.#cwd, `Pulumi.${stack}.yaml`), this.#settings);
    const common = ["--stack", stack, "--config-file", this.#settings];
    const values = Object.entries(config).flatMap(([key, value]) => ["--plaintext", `${key}=${value}`]);
    await run(["config", "set-all", ...common, ...values]);
  }

  /** Shows a command of the CLI and runs it. */
  async pulumi(shown: string, ...more: string[]): Promise<void> {
    const { file, env } = await this.#cli();
    const common = [
      "--stack",
      stack,
      "--config-file",
      this.#settings,
      "--non-interactive",
      "--suppress-progress",
      "--color",
      "auto",
    ];
    common.push("--color", process.stdout.isTTY ? "always" : "never");
    await show(`pulumi ${shown}`, file, [...shown.split(" "), ...more, ...common], this.#cwd, env);
  }

  /** Shows a command that must fail: a check that finds what it is there to find. */
  async fails(shown: string): Promise<void> {
    const failed = await this.pulumi(shown).then(
      () => false,
      () => true,
    );
    if (!failed) throw new Error(`pulumi ${shown} was expected to fail`);
    console.log("  The error is the check's answer: it exits 1, and a run in CI turns red.");
  }

  async remove(): Promise<void> {
    // What a half-made demo cannot destroy goes with its host.
    if (await this.exists())
      await this.pulumi("destroy", "--yes", "--skip-preview").catch((error: Error) => console.error(error.message));
    await rm(this.#folder, { recursive: true, force: true });
  }
}
