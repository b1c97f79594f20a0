// The ledger: the one memory that lives on the host itself, and the fence around every changing step.
import { createHash, randomUUID } from "node:crypto";
import * as z from "zod";
import { CommandFailed, Conflict, UnreadableReport } from "./errors.js";
import { type Answer, type Argv, type Command, type Host, hooks, type Report } from "./host.js";

export { hooks } from "./host.js";

/** One line: /var/lib/pulumi-vmbackup/<kind>/<identity>.json */
export interface Line<P = unknown> {
  v: 1;
  kind: string;
  /** What the object is called on its host, e.g. `vg0/dump`. */
  identity: string;
  /** organization/project/stack/kind/name of the resource that owns it. */
  owner: string;
  /** Random token drawn by each create; fences what an older create left running. */
  incarnation: string;
  /** False from the first changing step until the plan was seen empty. */
  finished: boolean;
  /** What was chosen or seen once (uuid, time taken, bytes behind a percentage ...). */
  pins?: P | undefined;
  /** Fields that were not declared when the object was adopted. */
  kept: string[];
  /** What was there before us, put back at delete. */
  before?: unknown;
  /** The long work that belongs to the object. */
  job?: Job | undefined;
}

export interface Job {
  unit: string;
  argvHash: string;
  bootId: string;
  startedAt: string;
  result?: "ok" | "failed" | undefined;
}

/** What a host remembers, read in one command. */
export interface Memory {
  machineId: string;
  bootId: string;
  /** Random uuid of the ledger folder, since cloned machines share machine ids; absent before the first write. */
  ledgerId?: string | undefined;
  lines: Line[];
}

/** Where it lies. Locks lie in /run: a lock that outlives a boot would be nobody's. Changed by tests of "local" only. */
export interface Places {
  ledger: string;
  locks: string;
}

const PLACES: Places = { ledger: "/var/lib/pulumi-vmbackup", locks: "/run/pulumi-vmbackup" };

const lineSchema: z.ZodType<Line> = z.object({
  v: z.literal(1),
  kind: z.string(),
  identity: z.string(),
  owner: z.string(),
  incarnation: z.string(),
  finished: z.boolean(),
  pins: z.unknown().optional(),
  kept: z.array(z.string()),
  before: z.unknown().optional(),
  job: z
    .object({
      unit: z.string(),
      argvHash: z.string(),
      bootId: z.string(),
      startedAt: z.string(),
      result: z.enum(["ok", "failed"]).optional(),
    })
    .optional(),
});

const memorySchema: z.ZodType<Memory> = z.object({
  machineId: z.string().regex(/^[0-9a-f]{32}$/, "no machine id"),
  bootId: z.string().regex(/^[0-9a-f-]{36}$/, "no boot id"),
  ledgerId: z.string().min(1).optional(),
  lines: z.array(lineSchema),
});

/** A file's name for what may hold any character; the extension is ours, a leading dot would hide it from the shell. */
export function encoded(identity: string): string {
  const name = encodeURIComponent(identity).replace(
    /[!'()*~]/g,
    (c) => `%${c.charCodeAt(0).toString(16).toUpperCase()}`,
  );
  const visible = name.replace(/^\./, "%2E");
  // A file's name ends at 255 bytes.
  return visible.length <= 200
    ? visible
    : `${visible.slice(0, 160)}~${createHash("sha256").update(identity).digest("hex").slice(0, 32)}`;
}

/** One process for all lines, since a fork per line is what costs: awk tells a file it cannot read (RS "!") from an empty one. */
const READ = [
  "d=$1; IFS= read -r m </etc/machine-id; IFS= read -r b </proc/sys/kernel/random/boot_id; u=",
  '[ ! -e "$d/uuid" ] || IFS= read -r u <"$d/uuid"',
  'printf "%s\\n%s\\n%s\\n" "$m" "$b" "$u"',
  'set -- "$d"/*/*.json; [ -e "$1" ] || [ -h "$1" ] || exit 0',
  `exec awk 'BEGIN { for (i = 1; i < ARGC; i++) { f = ARGV[i]; printf "\\036%s\\n", f; while ((r = (getline l < f)) > 0) print l; if (r < 0) print "\\036!"; close(f) } }' "$@"`,
].join("; ");

/** Everything that the host remembers: one question for all resources and kinds. */
export async function memory(host: Host, places: Places = PLACES): Promise<Memory> {
  const report: Report<Memory> = {
    why: "read the ledger",
    argv: ["sh", "-c", READ, "vmbackup-ledger", places.ledger],
    parse: (stdout) => recalled(host.name, stdout),
    answer: memorySchema,
  };
  try {
    return await host.ask(report);
  } catch (cause) {
    // Between the list and the reading a file can go, by another run's delete: then it is not in the next list.
    if (cause instanceof Unread) return await host.ask(report, "again");
    // mawk ends at a file that opens and does not read (a folder, a bad sector); the last name it wrote is that one's.
    const [file] =
      cause instanceof CommandFailed ? (cause.stdout.split("\u001e").slice(1).at(-1)?.split("\n") ?? []) : [];
    if (cause instanceof CommandFailed && file !== undefined)
      throw new UnreadableReport(damaged(host.name, file, cause.stderr.trim()), cause);
    throw cause;
  }
}

class Unread extends UnreadableReport {}

function recalled(host: string, stdout: string): unknown {
  const [head = "", ...rest] = stdout.split("\u001e");
  const [machineId, bootId, ledgerId] = head.split("\n");
  const lines: unknown[] = [];
  for (const [i, part] of rest.entries()) {
    if (part === "!\n") continue;
    const end = part.indexOf("\n");
    const file = part.slice(0, end);
    if (rest[i + 1] === "!\n") throw new Unread(damaged(host, file, "it cannot be read"));
    const text = part.slice(end + 1);
    const line = lineOf(text);
    if (typeof line === "string") throw new UnreadableReport(damaged(host, file, line));
    if (!file.endsWith(`/${line.kind}/${encoded(line.identity)}.json`))
      throw new UnreadableReport(damaged(host, file, `it holds the line of ${line.kind} ${line.identity}`));
    lines.push(line);
  }
  return { machineId, bootId, ...(ledgerId !== "" && { ledgerId }), lines };
}

function lineOf(text: string): Line | string {
  if (text.trim() === "") return "it is empty";
  try {
    const checked = lineSchema.safeParse(JSON.parse(text));
    return checked.success ? checked.data : z.prettifyError(checked.error);
  } catch {
    return `it is no JSON: ${JSON.stringify(text.slice(0, 120))}`;
  }
}

function damaged(host: string, file: string, why: string) {
  return {
    what: `Unable to read the ledger of ${host}: ${file} is not a line of it: ${why}.`,
    next: "Put it back from a backup, or move it away: then its object counts as made by somebody else, and `adopt: true` takes it over.",
  };
}

/**
 * The fence, one process from lock to end of the tool:
 * - fd 9 holds the object's lock. The tool does not inherit it: lvcreate may start dmeventd, which would hold it for ever.
 * - When the connection is lost, HUP and PIPE are ignored and the shell waits for the tool, still holding the lock.
 * - The lock file says who holds it, its time since when; a fork less than a file beside it.
 * - Refusals leave a marked line on stderr, since every exit status can be the tool's own.
 * - `want` is the incarnation in the ledger, "" when there must be none.
 * - `line` is written unless it is what is there; "-" removes it, after the tool has ended well when there is one.
 */
const FENCE = `
n=$1 d=$2 r=$3 k=$4 f=$5 want=$6 wait=$7 who=$8 line=$9; shift 9
trap '' HUP PIPE
umask 077
say() { printf '\\036%s %s %s\\n' "$n" "$1" "$2" >&2; exit 75; }
[ -d "$d/$k" ] && [ -d "$r/$k" ] || mkdir -p "$d/$k" "$r/$k" || say write "$d/$k"
lock=$r/$k/$f.lock
exec 9>>"$lock" || say write "$lock"
if ! flock -w "$wait" 9; then
  h=; IFS= read -r h <"$lock"
  say lock "$(date -u -r "$lock" +%Y-%m-%dT%H:%M:%SZ) $h"
fi
printf '%s\\n' "$who" >"$lock"
file=$d/$k/$f.json have=
[ ! -e "$file" ] || IFS= read -r have <"$file" || [ -n "$have" ] || say fence "$have"
if [ "$line" = - ] && [ ! -e "$file" ]; then exit 0; fi
if [ -z "$want" ]; then
  [ ! -e "$file" ] || say fence "$have"
else
  case $have in *"\\"incarnation\\":\\"$want\\""*) ;; *) say fence "$have";; esac
fi
if [ ! -s "$d/uuid" ]; then
  cat /proc/sys/kernel/random/uuid >"$d/.uuid.$$" && sync "$d/.uuid.$$" || say write "$d/uuid"
  ln "$d/.uuid.$$" "$d/uuid" 2>/dev/null
  rm -f "$d/.uuid.$$"
  [ -s "$d/uuid" ] && sync "$d" || say write "$d/uuid"
fi
if [ "$line" = - ]; then
  [ $# -eq 0 ] || "$@" 9>&- || exit
  rm "$file" && sync "$d/$k" || say write "$file"
  exit 0
fi
if [ "$have" != "$line" ]; then
  t=$d/$k/.$f.new
  printf '%s\\n' "$line" >"$t" && sync "$t" && mv "$t" "$file" && sync "$d/$k" || say write "$file"
fi
[ $# -gt 0 ] || exit 0
"$@" 9>&-
exit
`.trim();

// The tool's own deadline starts when the lock was had; ours must not end before both.
const SLACK = 10;

/**
 * One changing step as ONE ssh command: take the object's flock, check that the incarnation in the ledger is `expected`
 * ("" = no line yet), write the line, run the argv. Without a command only the line is written.
 */
export async function fenced(
  host: Host,
  line: Line,
  expected: string,
  command?: Command,
  places: Places = PLACES,
): Promise<Answer> {
  return await step(host, line, expected, JSON.stringify(ordered(line)), command, places);
}

/**
 * Removes the line, under the same lock and check. With a command, the last one of a removal: runs it first, and keeps the line
 * when it fails. A line that is gone already was removed with its object, e.g. by a run whose connection was lost meanwhile.
 */
export async function forget(host: Host, line: Line, command?: Command, places: Places = PLACES): Promise<void> {
  await step(host, line, line.incarnation, "-", command, places);
}

// Whatever order a caller builds a line in, the same line is the same text, and is not written twice.
function ordered({ v, kind, identity, owner, incarnation, finished, pins, kept, before, job }: Line): Line {
  return { v, kind, identity, owner, incarnation, finished, pins, kept, before, job };
}

async function step(
  host: Host,
  line: Line,
  expected: string,
  text: string,
  command: Command | undefined,
  { ledger, locks }: Places,
): Promise<Answer> {
  const timeout = command?.timeout ?? 120;
  const object = `${line.kind} ${line.identity}`;
  const why = command?.why ?? (text === "-" ? `forget ${object}` : `write down ${object}`);
  const nonce = randomUUID();
  const who = JSON.stringify({ owner: line.owner, incarnation: line.incarnation, why });
  const name = encoded(line.identity);
  const wait = String(Math.ceil(timeout));
  const given = [nonce, ledger, locks, line.kind, name, expected, wait, who, text];
  const argv: Argv = ["sh", "-c", FENCE, "vmbackup-step", ...given, ...(command?.argv ?? [])];
  const shown: Argv = command?.shown ??
    command?.argv ?? [text === "-" ? "rm" : "write", `${ledger}/${line.kind}/${name}.json`];
  const deed = command === undefined ? "ledger" : "change";
  if (command !== undefined) await hooks.beforeStep?.(line, command);
  try {
    const answer = await host.run({ ...command, why, argv, shown, timeout: 2 * timeout + SLACK, deed });
    if (command !== undefined) await hooks.afterStep?.(line, command);
    return answer;
  } catch (cause) {
    if (!(cause instanceof CommandFailed)) throw cause;
    const [, refusal, detail = ""] = new RegExp(`\\u001e${nonce} (lock|fence|write) (.*)`).exec(cause.stderr) ?? [];
    if (refusal === "lock") throw locked(host, why, object, detail, timeout, cause);
    if (refusal === "fence") throw overtaken(host, why, object, expected, detail, cause);
    if (refusal === "write")
      throw new CommandFailed(
        {
          what: `Unable to ${why}: the ledger of ${host.name} cannot be written: ${detail}. Nothing was changed.`,
          stderr: cause.stderr.replace(/\u001e.*\n?/, ""),
          exit: cause.exit,
          next: `Make room on the file system of ${ledger}, or make it writable; \`sudo: true\` where the login is not root.`,
        },
        cause,
      );
    throw cause;
  }
}

function locked(host: Host, why: string, object: string, detail: string, timeout: number, cause: Error): Conflict {
  const [, since = "", text = ""] = /^(\S+) ?(.*)$/s.exec(detail) ?? [];
  let who = text;
  try {
    const held: unknown = JSON.parse(text);
    const { owner, why: what } = z.object({ owner: z.string(), why: z.string() }).parse(held);
    who = `${owner} (to ${what})`;
  } catch {
    // written by something else: shown as it is
  }
  return new Conflict(
    {
      what: `Unable to ${why}: ${who || "another run"} is at work on ${object} on ${host.name} since ${since}, and was still after ${timeout} s.`,
      next: "Wait until it has ended, also when its pulumi is gone: a command that was started goes on. Then run pulumi again.",
    },
    cause,
  );
}

function overtaken(host: Host, why: string, object: string, expected: string, detail: string, cause: Error): Conflict {
  const there = lineOf(detail);
  if (detail === "")
    return new Conflict(
      {
        what: `Unable to ${why}: ${object} is no longer in the ledger of ${host.name}; another run removed it.`,
        next: "Run `pulumi refresh`, then `pulumi up`.",
      },
      cause,
    );
  const owner = typeof there === "string" ? `a line that is none (${there})` : there.owner;
  return new Conflict(
    {
      what:
        expected === ""
          ? `Unable to ${why}: ${object} on ${host.name} was taken by ${owner} in the meantime.`
          : `Unable to ${why}: a newer run took over ${object} on ${host.name}, of ${owner}.`,
      next: "Nothing was changed by this step. Let the other run end, then run `pulumi refresh` and `pulumi up`.",
    },
    cause,
  );
}
