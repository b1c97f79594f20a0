// npm run conformance [-- FOLDER] [--only NAME] [--update] [--show]: do the Proxmox stand-ins answer as the recordings say?
//
// Every recording is replayed call by call, in its order, on a fresh node: a mount and host-name namespace whose
// file systems are overlays over this machine's, with test/proxmox/install run inside (needs root). Exit code, stdout
// and stderr are compared after masking only what must differ: times, ids of processes and tasks, sizes of disks,
// and the order of what the real tools print in random order.
//
// test/proxmox/conformance.json holds what a recording's node had before its first call (`before`), and which calls
// were equal the last time (`equal`); the command fails when one of those is not equal any more.
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join, resolve } from "node:path";
import { root } from "./cache.mts";

type Answer = { exit: number; stdout: string; stderr: string };
type Recorded = Answer & { cmd: string[]; note?: string | null };
type Verdict = { index: number; cmd: string[]; equal: boolean; covered: boolean; why: string; codeDiffers: boolean };
// `start` and numbers (before that call): shell lines that make the node what the recording's node was.
type Preparation = Record<string, string[]>;
// `chance`: calls whose numbers depend on who came last of several parallel ones; digits are not compared there.
// `together`: calls that ran in the background, with the number of the call they were started before.
type Memory = {
  before: Record<string, Preparation>;
  chance: Record<string, number[]>;
  together: Record<string, Record<string, number>>;
  equal: Record<string, number[]>;
};

const tools = join(root, "test", "proxmox");
const memoryFile = join(tools, "conformance.json");
const NOT_COVERED = 70;
const CALL_TIMEOUT_MS = 150_000;

// --- the node ---------------------------------------------------------------------------------------------------

const SETUP = `
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$STATE"
cp -r "$TOOLS" "$STATE/tools"
for top in etc usr var mnt srv root opt; do
  [ -d /$top ] || continue
  mkdir -p "$STATE/$top/up" "$STATE/$top/work"
  mount -t overlay overlay -o lowerdir=/$top,upperdir=$STATE/$top/up,workdir=$STATE/$top/work /$top
done
mount -t tmpfs tmpfs /run
mkdir -p /run/lock
rm -rf /etc/pve /var/lib/vz /mnt/pve /mnt/data /srv/nfs /var/log/pve /var/log/vzdump /usr/lib/pve-stand-ins
hostname pve1
printf '127.0.0.1 localhost\\n192.0.2.10 pve1\\n' > /etc/hosts
sh "$STATE/tools/install"
# Every node has the recording machine's NFS server: 127.0.0.1, its exports lying on the same machine.
mkdir -p /mnt/data/pve-dump /mnt/data/other /srv/nfs/127.0.0.1/mnt/data
/bin/mount --bind /mnt/data /srv/nfs/127.0.0.1/mnt/data
printf '/mnt/data/other *\\n/mnt/data/pve-dump 127.0.0.1,10.0.0.0/8\\n' > /srv/nfs/127.0.0.1/.exports
echo ready
# The node's first process: it takes in whoever lost its parent.
while :; do sleep 1000 & wait; done
`;

const NAMESPACES = ["--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"];

class PveNode {
  readonly #state = mkdtempSync(join(tmpdir(), "pve-node-"));
  readonly #holder = spawn("unshare", [...NAMESPACES, "sh", "-c", SETUP], {
    env: { ...process.env, STATE: this.#state, TOOLS: tools },
    stdio: ["ignore", "pipe", "inherit"],
  });

  async ready(): Promise<void> {
    await new Promise<void>((done, fail) => {
      this.#holder.stdout.once("data", () => done());
      this.#holder.once("exit", (code) => fail(new Error(`the node could not be made (exit ${code}); root is needed`)));
    });
  }

  call(argv: string[]): Promise<Answer> {
    return new Promise((done) => {
      const child = spawn("nsenter", ["-t", this.#first(), "-m", "-u", "-p", "--", ...argv], {
        cwd: "/",
        env: {
          PATH: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
          LC_ALL: "C.UTF-8",
          TZ: "UTC",
          HOME: "/root",
        },
        stdio: ["ignore", "pipe", "pipe"],
        timeout: CALL_TIMEOUT_MS,
        killSignal: "SIGKILL",
      });
      const read = { out: [] as Buffer[], err: [] as Buffer[] };
      child.stdout.on("data", (data: Buffer) => read.out.push(data));
      child.stderr.on("data", (data: Buffer) => read.err.push(data));
      child.on("error", (error) => done({ exit: 127, stdout: "", stderr: String(error) }));
      const finish = () =>
        done({
          exit: child.exitCode ?? 137,
          stdout: Buffer.concat(read.out).toString(),
          stderr: Buffer.concat(read.err).toString(),
        });
      child.on("close", finish);
      // A recorded command may leave a background process behind that keeps the pipes.
      child.on("exit", () => setTimeout(finish, 500));
    });
  }

  /** The node's first process, as this machine numbers it. */
  #first(): string {
    const pid = this.#holder.pid;
    return readFileSync(`/proc/${pid}/task/${pid}/children`, "utf8").trim();
  }

  end(): void {
    this.#holder.kill("SIGKILL");
    spawnSync("umount", ["-l", this.#state], { stdio: "ignore" });
    rmSync(this.#state, { recursive: true, force: true });
  }
}

// --- masks --------------------------------------------------------------------------------------------------------

// Numbers that belong to the machine or the moment, by their name in JSON.
const MOMENT_KEYS = new Set(
  "avail total used used_fraction next-run ctime pid pstart starttime endtime digest".split(" "),
);
const SET_KEYS = new Set(["content", "nodes"]);

const compare = (a: string, b: string): number => (a < b ? -1 : a > b ? 1 : 0);
const sortedWords = (list: string): string => list.split(",").sort().join(",");

// How small an archive becomes is the compressor's doing.
const PACKED = /\.vma\.(?:zst|gz|lzo|xz)$/;

function maskValue(value: unknown, key = "", packed = false): unknown {
  if (key === "size" && packed && typeof value === "number" && value > 0) return "*";
  if (MOMENT_KEYS.has(key) && typeof value !== "object") return value === 0 ? 0 : "*";
  if (SET_KEYS.has(key) && typeof value === "string") return sortedWords(value);
  if (Array.isArray(value)) {
    // Lists of named things come in random order; lists of moments have one.
    const ordered = value.some((item) => item !== null && typeof item === "object" && "utc" in item);
    const items = value.map((item) => maskValue(item));
    return ordered ? items : items.sort((a, b) => compare(JSON.stringify(a), JSON.stringify(b)));
  }
  if (value !== null && typeof value === "object") {
    const entries = Object.entries(value).sort(([a], [b]) => compare(a, b));
    const isPacked = Object.values(value).some((v) => typeof v === "string" && PACKED.test(v));
    return Object.fromEntries(entries.map(([k, v]) => [k, maskValue(v, k, isPacked)]));
  }
  return typeof value === "string" ? maskText(value) : value;
}

const sortedOptions = (line: string): string =>
  line
    .split(/(?:^| )(?=--)/)
    .sort()
    .join(" ");

function maskText(text: string): string {
  return (
    text
      // Several wrong parameters are named in random order.
      .replace(/(?<=Parameter verification failed\.\n)(?:[\w.[\]-]+: .*\n)+/g, (lines) =>
        lines.split("\n").sort().join("\n"),
      )
      .replace(/UPID:([\w-]+):[0-9A-F]{8}:[0-9A-F]{8}:[0-9A-F]{8}:/g, "UPID:$1:*:*:*:")
      .replace(/\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b/g, "<uuid>")
      .replace(/\b[0-9a-f]{40}\b/g, "<sha1>")
      .replace(/\bBC:24:11(:[0-9A-F]{2}){3}\b/g, "<mac>")
      .replace(/\b20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\b/g, "<time>")
      .replace(/(20\d\d_\d\d_\d\d)-\d\d_\d\d_\d\d(?=\D|$)/g, (stamp) => (isNow(stamp) ? "<stamp>" : stamp))
      .replace(/ctime=\d+/g, "ctime=*")
      .replace(/\bCTIME: .*/g, "CTIME: *")
      .replace(/vzdumptmp\d+/g, "vzdumptmp*")
      .replace(/(?:temporary volume '.*\n)+/g, (lines) => lines.split("\n").sort().join("\n"))
      .replace(/short vma extent \(\d+ < \d+\)/g, "short vma extent (* < *)")
      .replace(/^(\/bin\/bash: line 1:)? +\d+ (?=Exit|Trace)/gm, "$1 * ")
      .replace(/(starting new backup job: vzdump[\s\d]*)(.*)/g, (_, start, options) => start + sortedOptions(options))
      .replace(/(\.vma\.(?:zst|gz|lzo) +vma\.\w+ +backup +)[1-9]\d*/g, "$1*")
      .replace(/\/var\/log\/pve\/tasks\/[0-9A-F]\//g, "/var/log/pve/tasks/*/")
      // A decompressor's complaint comes when it comes, among the lines of who reads from it.
      .replace(/^([\s\S]*?)^(\/\S+ : Read error.*\n)([\s\S]*)$/gm, "$1$3$2")
      .replace(/duration \d+ sec/g, "duration * sec")
  );
}

// A time stamp of the hour the recordings were made in (around midnight of 21 November) or of today.
function isNow(stamp: string): boolean {
  const today = new Date().toISOString().slice(0, 10).replaceAll("-", "_");
  return stamp.startsWith(today) || /^2026_11_22-00|^2026_11_21-23/.test(stamp);
}

// `ls -la`: owners, dates, and the sizes and link counts of directories belong to the machine.
function maskListing(text: string): string {
  return text
    .split("\n")
    .filter((line) => !line.startsWith("total "))
    .map((line) => {
      const fields = line.split(/\s+/);
      const [mode = "", , , , size = ""] = fields;
      if (!/^[-dl][rwxst-]{9}/.test(mode) || fields.length < 8) return maskText(line);
      const at = fields.findIndex((field) => /^\d\d:\d\d/.test(field));
      const name = fields.slice(/^[+-]\d{4}$/.test(fields[at + 1] ?? "") ? at + 2 : at + 1).join(" ");
      return maskText(`${mode} ${mode.startsWith("d") || (PACKED.test(name) && size !== "0") ? "" : size} ${name}`);
    })
    .join("\n");
}

// storage.cfg: sections and the words of `content` and `nodes` are sets.
function maskSections(text: string): string {
  return text
    .split(/\n\n|\n--\n/)
    .map((part) => part.trim())
    .map((part) => part.replace(/^(\t(?:content|nodes) )(.*)$/gm, (_, key, list) => key + sortedWords(list)))
    .sort()
    .join("\n\n");
}

function maskStatus(text: string): string {
  return text.replace(/ +\d+ +\d+ +\d+ +\d+\.\d\d%$/gm, (line) =>
    / 0 +0 +0 +0\.00%$/.test(line) ? line : " N N N N%",
  );
}

function maskYaml(text: string): string {
  return text
    .split(/^- /m)
    .map((item) => maskText(item.replace(/((?:content|nodes): )(.*)/g, (_, key, list) => key + sortedWords(list))))
    .sort()
    .join("- ");
}

function mask(cmd: string[], text: string): string {
  const line = cmd.join(" ");
  if (/--output-format json/.test(line)) {
    // Only the last line is the result when a worker has talked before.
    const pretty = /json-pretty/.test(line);
    const at = pretty ? 0 : text.trimEnd().lastIndexOf("\n") + 1;
    const json = parseJson(text.slice(at));
    if (json !== undefined) {
      // Pretty JSON must also look alike: its lines, apart from their order and values.
      const layout = pretty
        ? text
            .replace(/"[^"]*"|\d[\d.]*|,/g, "")
            .split("\n")
            .sort()
            .join("\n")
        : "";
      return maskText(text.slice(0, at)) + JSON.stringify(maskValue(json)) + layout;
    }
  }
  if (/--output-format yaml/.test(line)) return maskYaml(text);
  if (cmd[0] === "ls" || /\bls -la\b/.test(line)) return maskListing(text);
  // Only whether it is immutable: the rest is the file system's.
  if (cmd[0] === "lsattr") return text.replace(/^[-a-zA-Z]+ /gm, (flags) => (flags.includes("i") ? "i " : "- "));
  if (/\/proc\/mounts/.test(line)) return text.replace(/^(\S+) (\S+) .*$/gm, "$2");
  if (/storage\.cfg|jobs\.cfg/.test(line)) return maskText(maskSections(text));
  if (cmd[0] === "pvesm" && cmd[1] === "status") return maskStatus(text);
  if (text.includes("─")) return maskText(text.replace(/\b1[78]\d{8}\b/g, "*"));
  return maskText(text);
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

// --- comparing ------------------------------------------------------------------------------------------------------

const LOCK_LINES = /^trying to acquire (?:cfs lock '[^']*' \.\.\.|lock\.\.\.)\n(?: OK\n)?/gm;

// Failing exit codes are errno left-overs; zero or not is what counts (--show tells where the number differs).
function masked(cmd: string[], answer: Answer, parallel: boolean): string {
  const clean = (text: string) => mask(cmd, parallel ? text.replace(LOCK_LINES, "") : text);
  return JSON.stringify([answer.exit === 0, clean(answer.stdout), clean(answer.stderr)]);
}

function difference(recorded: Recorded, answer: Answer): string {
  const parts: string[] = [];
  if ((recorded.exit === 0) !== (answer.exit === 0)) parts.push(`exit ${answer.exit}, recorded ${recorded.exit}`);
  for (const stream of ["stdout", "stderr"] as const) {
    const want = mask(recorded.cmd, recorded[stream]);
    const got = mask(recorded.cmd, answer[stream]);
    if (want === got) continue;
    let at = 0;
    while (at < want.length && want[at] === got[at]) at += 1;
    const from = Math.max(0, at - 40);
    const part = (text: string) => JSON.stringify(text.slice(from, from + 200));
    parts.push(`${stream} at ${from}: ${part(got)}, recorded ${part(want)}`);
  }
  return parts.join("; ");
}

const isCovered = ({ exit, stderr }: Answer): boolean =>
  exit !== NOT_COVERED &&
  !/not covered by the stand-in|stand-in: not covered/.test(stderr) &&
  !(exit === 127 && stderr.startsWith("nsenter: "));

function judge(index: number, recorded: Recorded, answer: Answer, parallel = false): Verdict {
  const { cmd } = recorded;
  const covered = isCovered(answer);
  const equal = covered && masked(cmd, recorded, parallel) === masked(cmd, answer, parallel);
  const why = equal
    ? ""
    : covered
      ? difference(recorded, answer)
      : (answer.stderr.trim().split("\n").at(-1) ?? "").replace(/^.*not covered[^:]*: /, "");
  return { index, cmd, equal, covered, why, codeDiffers: equal && answer.exit !== recorded.exit };
}

/** A call that ran beside others was recorded only in part, and its progress depends on the moment. */
function judgeCut(index: number, recorded: Recorded, answer: Answer): Verdict {
  const lines = (text: string) =>
    maskText(text)
      .split("\n")
      .filter((line) => !/^progress \d|^trying to acquire lock|^ OK$/.test(line));
  const [want, got] = [lines(recorded.stdout), lines(answer.stdout)];
  // What was cut off may have left a half line at either end.
  const isPart = got.join("\n").includes(want.slice(1, -1).join("\n"));
  const killed = recorded.exit < 0 ? answer.exit > 128 : (recorded.exit === 0) === (answer.exit === 0);
  const equal = isPart && killed && lines(recorded.stderr).join("\n") === lines(answer.stderr).join("\n");
  return { ...judge(index, recorded, answer, true), equal, codeDiffers: false };
}

/** Calls recorded in parallel run in parallel; who wins is chance, so the answers are compared as a set. */
function judgeGroup(start: number, group: Recorded[], answers: Answer[]): Verdict[] {
  const left = answers.map((answer, i) => ({ answer, text: masked(group[i]?.cmd ?? [], answer, true) }));
  return group.map((recorded, offset) => {
    const want = masked(recorded.cmd, recorded, true);
    const at = left.findIndex(({ text }) => text === want);
    const [taken] = at >= 0 ? left.splice(at, 1) : [];
    const answer = taken?.answer ?? answers[offset] ?? { exit: 127, stdout: "", stderr: "" };
    const verdict = judge(start + offset, recorded, answer, true);
    return { ...verdict, equal: taken !== undefined && verdict.covered };
  });
}

// --- replaying -------------------------------------------------------------------------------------------------------

const withoutDigits = <T extends Answer>(answer: T): T => ({ ...answer, stdout: answer.stdout.replace(/\d+/g, "N") });

type Timing = { chance: number[]; together: Record<string, number> };

async function replay(file: string, before: Preparation, { chance, together }: Timing): Promise<Verdict[]> {
  const running = new Map<number, Promise<Answer>>();
  const recorded = JSON.parse(readFileSync(file, "utf8")) as Recorded[];
  const verdicts: Verdict[] = [];
  const node = new PveNode();
  const prepare = async (key: string) => {
    const lines = before[key];
    if (!lines) return;
    const done = await node.call(["bash", "-ec", lines.join("\n")]);
    if (done.exit !== 0) throw new Error(`preparing ${basename(file)} (${key}) failed: ${done.stderr}`);
  };
  try {
    await node.ready();
    await prepare("start");
    for (let index = 0; index < recorded.length; ) {
      const call = recorded[index];
      if (!call) break;
      for (const [later, start] of Object.entries(together)) {
        if (start === index) running.set(Number(later), node.call(recorded[Number(later)]?.cmd ?? []));
      }
      await prepare(String(index));
      const beside = running.get(index);
      const noted = /\(1 of (\d+) in parallel/.exec(call.note ?? "");
      const couple = /^one of two simultaneous/.test(call.note ?? "") ? 2 : 0;
      if (beside) {
        verdicts.push(judgeCut(index, call, await beside));
        index += 1;
      } else if (couple > 0) {
        const group = recorded.slice(index, index + couple);
        const begun: Promise<Answer>[] = [];
        for (const [offset, { cmd }] of group.entries()) {
          // What must have happened before the later ones begin.
          if (offset > 0) await prepare(String(index + offset));
          begun.push(node.call(cmd));
        }
        const answers = await Promise.all(begun);
        // The winner is the one that waited for nothing, or did not fail.
        const rank = (answer: Answer) => (answer.stderr === "" ? 0 : 1);
        const ranked = (list: Answer[]) => [...list].sort((a, b) => rank(a) - rank(b));
        const order = ranked(group);
        for (const [at, answer] of ranked(answers).entries()) {
          const wanted = order[at] as Recorded;
          verdicts.push(judgeCut(index + group.indexOf(wanted), wanted, answer));
        }
        index += group.length;
      } else if (noted) {
        const group = recorded.slice(index, index + Number(noted[1]));
        const answers = await Promise.all(group.map(({ cmd }) => node.call(cmd)));
        verdicts.push(...judgeGroup(index, group, answers));
        index += group.length;
      } else {
        const answer = await node.call(call.cmd);
        const byChance = chance.includes(index);
        verdicts.push(judge(index, byChance ? withoutDigits(call) : call, byChance ? withoutDigits(answer) : answer));
        index += 1;
      }
    }
  } finally {
    node.end();
  }
  return verdicts;
}

const row = (name: string, ...counts: (number | string)[]) =>
  console.log(name.padEnd(40) + counts.map((count) => String(count).padStart(12)).join(""));

const words = process.argv.slice(2);
const [update, show] = [words.includes("--update"), words.includes("--show")];
const onlyAt = words.indexOf("--only");
const only = onlyAt >= 0 ? words[onlyAt + 1] : undefined;
const folder =
  words.find((word, at) => !word.startsWith("--") && (onlyAt < 0 || at !== onlyAt + 1)) ??
  join(root, "test/captures/pve");
const isOurs = resolve(folder) === resolve(join(root, "test/captures/pve"));

const memory: Memory = existsSync(memoryFile)
  ? JSON.parse(readFileSync(memoryFile, "utf8"))
  : { before: {}, chance: {}, together: {}, equal: {} };
// Recordings from elsewhere may bring their own preparation.
const ownBefore = join(folder, "before.json");
const before: Memory["before"] = existsSync(ownBefore) ? JSON.parse(readFileSync(ownBefore, "utf8")) : memory.before;

const lost: string[] = [];
const totals = { calls: 0, covered: 0, equal: 0 };
const files = readdirSync(folder)
  .sort()
  .filter((file) => file.endsWith(".json") && file !== "before.json" && (!only || basename(file, ".json") === only));
// Each recording has a node of its own, and waits most of its time: some at once.
const AT_ONCE = 3;
const replays: Promise<Verdict[]>[] = [];
for (const [i, file] of files.entries()) {
  const name = basename(file, ".json");
  const timing = {
    chance: (isOurs && memory.chance[name]) || [],
    together: (isOurs && memory.together[name]) || {},
  };
  const turn = replays[i - AT_ONCE] ?? Promise.resolve();
  replays.push(turn.then(() => replay(join(folder, file), before[name] ?? {}, timing)));
}
row("recording", "calls", "covered", "equal", "not covered");
for (const [i, file] of files.entries()) {
  const name = basename(file, ".json");
  const verdicts = (await replays[i]) ?? [];
  const covered = verdicts.filter((v) => v.covered).length;
  const equal = verdicts.filter((v) => v.equal);
  totals.calls += verdicts.length;
  totals.covered += covered;
  totals.equal += equal.length;
  row(name, verdicts.length, covered, equal.length, verdicts.length - covered);
  for (const v of verdicts) {
    const call = `    #${v.index} ${v.cmd.join(" ").slice(0, 150)}`;
    if (!v.equal) console.log(`${call}\n        ${v.covered ? "differs" : "not covered"}: ${v.why.slice(0, 900)}`);
    else if (show && v.codeDiffers) console.log(`${call}: equal but for the failing exit code`);
  }
  if (isOurs) {
    const now = new Set(equal.map((v) => v.index));
    lost.push(...(memory.equal[name] ?? []).filter((index) => !now.has(index)).map((index) => `${name} #${index}`));
    if (update) memory.equal[name] = [...now];
  }
}
row("all", totals.calls, totals.covered, totals.equal, totals.calls - totals.covered);
if (update) {
  writeFileSync(memoryFile, `${JSON.stringify(memory, null, 2)}\n`);
  spawnSync(join(root, "node_modules", ".bin", "biome"), ["format", "--write", memoryFile], { stdio: "ignore" });
} else if (lost.length > 0) {
  console.log(`no longer equal: ${lost.join(", ")}`);
  process.exitCode = 1;
}
