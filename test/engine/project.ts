// A Pulumi project in a temporary folder and the real engine at work on it: the CLI as a user runs it, with a file backend.
import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { execa } from "execa";
import { afterAll } from "vitest";
import { pulumiCli } from "../../scripts/pulumi-cli.mts";

const root = join(__dirname, "../..");

export interface ProjectOptions {
  /** Default TypeScript; `esm` is a program with `"type": "module"`, `cjs` plain JavaScript. */
  language?: "typescript" | "esm" | "cjs";
  /** Of the project; a part of the owner mark. Default `test`. */
  name?: string;
  /** Stack configuration: `{ "vmbackup:connection": "{…}" }`. */
  config?: Record<string, string>;
  env?: Record<string, string>;
}

/** How many resources each operation was done to: create, update, same, replace, delete, read, refresh, … */
export type Summary = Partial<Record<string, number>>;

export interface Run {
  exitCode: number | undefined;
  stdout: string;
  stderr: string;
  /** As a person sees it, in order. */
  all: string;
  summary: Summary;
  /** The engine's events, in order. */
  events: EngineEvent[];
  /** Errors and warnings, by the name of the resource they belong to ("" for the program). */
  diagnostics: { severity: string; urn: string; message: string }[];
}

export interface EngineEvent {
  summaryEvent?: { resourceChanges?: Record<string, number> };
  diagnosticEvent?: { severity: string; urn?: string; message: string };
  resourcePreEvent?: { metadata: { op: string; urn: string; type: string; diffs?: string[]; keys?: string[] } };
  resOutputsEvent?: { metadata: { op: string; urn: string; type: string } };
  resOpFailedEvent?: { metadata: { op: string; urn: string; type: string } };
}

export interface StackResource {
  urn: string;
  type: string;
  id?: string;
  inputs?: Record<string, unknown>;
  outputs?: Record<string, unknown>;
  initErrors?: string[];
  protect?: boolean;
}

export interface StackState {
  version: number;
  deployment: { resources?: StackResource[]; pending_operations?: { type: string; resource: StackResource }[] };
}

const mains = { typescript: "index.ts", esm: "index.js", cjs: "index.js" } as const;

export class Project {
  readonly folder: string;
  readonly stack: string;
  readonly env: Record<string, string>;
  readonly #main: string;
  readonly #pulumi: string;
  #runs = 0;

  private constructor(folder: string, stack: string, env: Record<string, string>, main: string, pulumi: string) {
    this.folder = folder;
    this.stack = stack;
    this.env = env;
    this.#main = main;
    this.#pulumi = pulumi;
  }

  static async make(program: string, options: ProjectOptions = {}): Promise<Project> {
    const { language = "typescript", name = "test", config = {} } = options;
    const cli = await pulumiCli();
    const base = await mkdtemp(join(tmpdir(), "vmbackup-project-"));
    const folder = join(base, "project");
    await Promise.all([mkdir(join(folder, "node_modules"), { recursive: true }), mkdir(join(base, "state"))]);
    // Linked, not installed: real paths lead back to the clone, so that there is one copy of @pulumi/pulumi.
    for (const dependency of ["@pulumi", "@types", "typescript"])
      await symlink(join(root, "node_modules", dependency), join(folder, "node_modules", dependency));
    await symlink(root, join(folder, "node_modules/pulumi-vmbackup"));
    const manifest = { name, private: true, main: mains[language], ...(language === "esm" ? { type: "module" } : {}) };
    await writeFile(join(folder, "package.json"), JSON.stringify(manifest));
    await writeFile(
      join(folder, "Pulumi.yaml"),
      `name: ${name}\nruntime:\n  name: nodejs\n  options:\n    typescript: ${language === "typescript"}\n`,
    );
    if (language === "typescript")
      await writeFile(
        join(folder, "tsconfig.json"),
        JSON.stringify({
          compilerOptions: { strict: true, target: "es2022", module: "nodenext", skipLibCheck: true, types: ["node"] },
          files: ["index.ts"],
        }),
      );
    const env = {
      ...cli.env,
      PULUMI_HOME: join(base, "home"),
      PULUMI_BACKEND_URL: `file://${join(base, "state")}`,
      PULUMI_CONFIG_PASSPHRASE: "correct horse",
      // --event-log is known with this only
      PULUMI_DEBUG_COMMANDS: "true",
      // Types of the programs are checked once, by npm run check; here they would cost seconds each run.
      PULUMI_NODEJS_TRANSPILE_ONLY: "true",
      // Each run starts three Node processes, which read the same large packages.
      NODE_COMPILE_CACHE: join(tmpdir(), "vmbackup-compile-cache"),
      ...options.env,
    };
    const project = new Project(folder, "dev", env, join(folder, mains[language]), join(cli.bin, "pulumi"));
    await project.write(program);
    await project.init(config);
    return project;
  }

  /** A second stack of the same program, in the same backend. */
  async other(stack: string, config: Record<string, string> = {}): Promise<Project> {
    const project = new Project(this.folder, stack, this.env, this.#main, this.#pulumi);
    await project.init(config);
    return project;
  }

  private async init(config: Record<string, string>): Promise<void> {
    await this.pulumi(["stack", "init", this.stack]);
    await this.setConfig(config);
  }

  async setConfig(config: Record<string, string>, secret = false): Promise<void> {
    // By standard input: a value may begin with a dash
    for (const [key, value] of Object.entries(config))
      await execa(this.#pulumi, ["config", "set", "--stack", this.stack, secret ? "--secret" : "--plaintext", key], {
        cwd: this.folder,
        env: this.env,
        input: value,
      });
  }

  /** Replaces the program. */
  async write(program: string): Promise<void> {
    await writeFile(this.#main, program);
  }

  /** Any command of the CLI in the project; a failure throws. */
  async pulumi(argv: string[]): Promise<string> {
    const { stdout } = await execa(this.#pulumi, [...argv, "--non-interactive"], {
      cwd: this.folder,
      env: this.env,
      stdin: "ignore",
    });
    return stdout;
  }

  /** Starts a command and leaves it running: for tests that interrupt or kill it. */
  start(argv: string[]) {
    return execa(this.#pulumi, [...argv, "--stack", this.stack, "--non-interactive"], {
      cwd: this.folder,
      env: this.env,
      stdin: "ignore",
      all: true,
      reject: false,
    });
  }

  private async run(argv: string[]): Promise<Run> {
    const log = join(this.folder, `../events-${this.stack}-${++this.#runs}.json`);
    const result = await this.start([...argv, "--color=never", "--event-log", log]);
    const text = await readFile(log, "utf8").catch(() => "");
    const events = text
      .split("\n")
      .filter((line) => line.trim())
      .map((line) => JSON.parse(line) as EngineEvent);
    const summary = events.findLast((event) => event.summaryEvent)?.summaryEvent?.resourceChanges ?? {};
    const diagnostics = events.flatMap(({ diagnosticEvent: d }) =>
      d ? [{ severity: d.severity, urn: d.urn ?? "", message: d.message }] : [],
    );
    const { exitCode, stdout, stderr, all } = result;
    return { exitCode, stdout, stderr, all, summary, events, diagnostics };
  }

  // None of these throws when the engine reports a failure: tests look at exitCode.
  preview = (...argv: string[]) => this.run(["preview", "--diff", ...argv]);
  up = (...argv: string[]) => this.run(["up", "--yes", "--skip-preview", ...argv]);
  refresh = (...argv: string[]) => this.run(["refresh", "--yes", "--skip-preview", ...argv]);
  destroy = (...argv: string[]) => this.run(["destroy", "--yes", "--skip-preview", ...argv]);

  async export(): Promise<StackState> {
    return JSON.parse(await this.pulumi(["stack", "export", "--stack", this.stack])) as StackState;
  }

  async import(state: StackState): Promise<void> {
    const file = join(this.folder, "../import.json");
    await writeFile(file, JSON.stringify(state));
    await this.pulumi(["stack", "import", "--stack", this.stack, "--file", file]);
  }

  async outputs(): Promise<Record<string, unknown>> {
    const json = await this.pulumi(["stack", "output", "--json", "--show-secrets", "--stack", this.stack]);
    return JSON.parse(json) as Record<string, unknown>;
  }

  /** What is in the state, without stack and providers. */
  async resources(): Promise<StackResource[]> {
    const { deployment } = await this.export();
    return (deployment.resources ?? []).filter(({ type }) => !type.startsWith("pulumi:"));
  }

  async remove(): Promise<void> {
    await rm(join(this.folder, ".."), { recursive: true, force: true });
  }
}

/** Projects of one test file; their folders go in its afterAll. */
export function useProjects(): (program: string, options?: ProjectOptions) => Promise<Project> {
  const made: Project[] = [];
  afterAll(async () => {
    await Promise.all(made.map((project) => project.remove()));
  });
  return async (program, options) => {
    const project = await Project.make(program, options);
    made.push(project);
    return project;
  };
}
