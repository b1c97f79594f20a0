// The Pulumi CLI for tests and demo: the one on PATH when it is recent enough, else one built once per machine from the Go
// module proxy (pinned by go.mod and go.sum in tools/). `node scripts/pulumi-cli.mts` prints the folder.
import { createHash } from "node:crypto";
import { access, chmod, constants, copyFile, readFile } from "node:fs/promises";
import { delimiter, dirname, join } from "node:path";
import { execa } from "execa";
import { cachedFolder, root } from "./cache.mts";

export interface PulumiCli {
  /** Holds `pulumi`, the language host for Node and the host of dynamic providers. */
  bin: string;
  version: string;
  /** What a run needs beside its own backend and project. */
  env: Record<string, string>;
}

/** Older ones do not keep the inputs that a refresh reports, and then drift cannot be seen. */
const oldest = [3, 216];

const programs = ["pulumi", "pulumi-language-nodejs", "pulumi-resource-pulumi-nodejs"] as const;

async function onPath(program: string): Promise<string | undefined> {
  for (const folder of (process.env.PATH ?? "").split(delimiter)) {
    const path = join(folder, program);
    if (
      folder &&
      (await access(path, constants.X_OK).then(
        () => true,
        () => false,
      ))
    )
      return path;
  }
  return undefined;
}

/** The user's own CLI, or why it will not do. */
async function installed(): Promise<{ bin: string; version: string } | { why: string }> {
  const paths = await Promise.all(programs.map(onPath));
  const [pulumi] = paths;
  if (!pulumi) return { why: "no pulumi on PATH" };
  const { stdout } = await execa(pulumi, ["version"], { reject: false, env: { PULUMI_SKIP_UPDATE_CHECK: "1" } });
  const version = /v(\d+)\.(\d+)\.\d+/.exec(stdout);
  const [major, minor] = oldest as [number, number];
  if (!version || Number(version[1]) !== major || Number(version[2]) < minor)
    return { why: `${pulumi} is ${stdout.trim() || "of unknown version"}, needed is v${major}.${minor} or later` };
  const missing = programs.find((_, i) => !paths[i]);
  if (missing) return { why: `${pulumi} has no ${missing} beside it` };
  return { bin: dirname(pulumi), version: version[0] };
}

/** The version that a go.mod in tools/ pins. */
function pinned(goMod: string, module: string): string {
  const line = new RegExp(`^(?:require )?\\s*${module.replaceAll(".", "\\.")} (v\\S+)$`, "m").exec(goMod);
  if (!line?.[1]) throw new Error(`no ${module} in go.mod`);
  return line[1];
}

async function goBuild(tool: "pulumi" | "langhost", module: string, command: string, out: string): Promise<void> {
  const folder = join(root, "tools", tool);
  const version = pinned(await readFile(join(folder, "go.mod"), "utf8"), module);
  const ldflags = `-s -w -X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version=${version}`;
  const argv = [
    "build",
    "-mod=readonly",
    "-trimpath",
    "-buildvcs=false",
    "-tags",
    "osusergo,grpcnotrace",
    "-ldflags",
    ldflags,
    "-o",
    out,
    `${module}/${command}`,
  ];
  await execa("go", argv, {
    cwd: folder,
    stdin: "ignore",
    all: true,
    // A Go older than go.mod asks for fetches the newer toolchain, as it does by default, from the module proxy. Flags and
    // workspaces of the machine have no business here.
    env: { GOFLAGS: "", GOWORK: "off", GOTOOLCHAIN: "auto" },
  }).catch((error) => {
    throw new Error(`go build of ${command} failed:\n${error.all || error.message}`);
  });
}

const say = (line: string) => process.stderr.write(`pulumi-cli: ${line}\n`);

async function build(folder: string, why: string): Promise<void> {
  if (!(await onPath("go"))) throw new Error(`${why}, and no Go (1.21 or later) on PATH to build one: install either`);
  say(`${why}: building one, once per machine, into ${folder.replace(/\.new$/, "")} (4 to 8 minutes)`);
  const started = Date.now();
  const minutes = () => `${((Date.now() - started) / 60_000).toFixed(1)} min`;
  const progress = setInterval(() => say(`still building, ${minutes()}`), 30_000);
  try {
    await goBuild(
      "langhost",
      "github.com/pulumi/pulumi/sdk/v3",
      "nodejs/cmd/pulumi-language-nodejs",
      join(folder, programs[1]),
    );
    await goBuild("pulumi", "github.com/pulumi/pulumi/pkg/v3", "cmd/pulumi", join(folder, programs[0]));
  } finally {
    clearInterval(progress);
  }
  const script = join(folder, programs[2]);
  await copyFile(join(root, "node_modules/@pulumi/pulumi", programs[2]), script);
  await chmod(script, 0o755);
  say(`built in ${minutes()}`);
}

let found: Promise<PulumiCli> | undefined;

export function pulumiCli(): Promise<PulumiCli> {
  found ??= find();
  return found;
}

async function find(): Promise<PulumiCli> {
  const users = await installed();
  const env = (bin: string) => ({
    // The dynamic provider's host starts the `node` of PATH: the project's own, which is recent enough.
    PATH: [bin, join(root, "node_modules/.bin"), process.env.PATH].join(delimiter),
    PULUMI_SKIP_UPDATE_CHECK: "1",
    PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION: "true",
  });
  if ("bin" in users) return { ...users, env: env(users.bin) };

  const hash = createHash("sha256");
  for (const file of ["pulumi/go.mod", "pulumi/go.sum", "langhost/go.mod", "langhost/go.sum"])
    hash.update(await readFile(join(root, "tools", file)));
  hash.update(await readFile(join(root, "node_modules/@pulumi/pulumi/package.json")));
  const bin = await cachedFolder(
    `cli-${hash.digest("hex").slice(0, 12)}`,
    (folder) => build(folder, users.why),
    (pid) => say(`process ${pid} is building the CLI, waiting for it`),
  );
  const version = pinned(await readFile(join(root, "tools/pulumi/go.mod"), "utf8"), "github.com/pulumi/pulumi/pkg/v3");
  return { bin, version, env: env(bin) };
}

if (import.meta.main)
  await pulumiCli().then(
    ({ bin }) => console.log(bin),
    (error: Error) => {
      say(error.message);
      process.exitCode = 1;
    },
  );
