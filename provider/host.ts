// The host: the only place that spawns ssh. Runs commands, asks questions, and words what goes wrong.
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import * as z from "zod";
import { CommandFailed, HostUnreachable, Refused, UnreadableReport } from "./errors.js";
import { type Connection, completed, connectionDefaultsSchema, hostLabel, hostSchema } from "./host-connection.js";
import { memory } from "./host-ledger.js";
import { type Ended, endAll, finished } from "./host-process.js";
import { quote, shown } from "./host-quote.js";
import { destination, forgetFiles, Ssh } from "./host-ssh.js";
import { Trouble } from "./host-ssh-trouble.js";

export {
  type Connection,
  connectionDefaultsSchema,
  connectionSchema,
  hostLabel,
  hostSchema,
} from "./host-connection.js";
export { quote, shown } from "./host-quote.js";

/** A command as an array, never a shell string. */
export type Argv = readonly [string, ...string[]];

export interface Command {
  /** What it is for, as the end of "Unable to …": "take the snapshot vg0/dump". */
  why: string;
  argv: Argv;
  /** What messages show instead of `argv`: the tool's own words, where a constant script of ours is around them. */
  shown?: Argv | undefined;
  /** Goes to the command's standard input; never shown. Secrets travel here and nowhere else. */
  stdin?: string | undefined;
  /** Seconds until we give up waiting, whether or not the remote command can be killed. Default 120. */
  timeout?: number | undefined;
  /** What to do when it fails; the last line of the error. */
  next?: string | undefined;
  /** For the observer in tests. Default "run", for questions "ask". */
  deed?: Deed | undefined;
}

export interface Answer {
  stdout: string;
  stderr: string;
}

/** A question and the shape of its answer. Host-wide questions; the asker picks its row. */
export interface Report<T> extends Command {
  /** How stdout becomes the value that `answer` checks. Default: JSON.parse. */
  parse?: ((stdout: string) => unknown) | undefined;
  answer: z.ZodType<T>;
}

/** Which machine it is: a name can come to lead to another one. */
export interface Identity {
  machineId: string;
  /** Absent before the first write there. */
  ledgerId?: string | undefined;
}

export interface Host {
  /** As the program names it; for messages. */
  readonly name: string;
  /** Runs a command; a failure is CommandFailed, no answer is HostUnreachable. */
  run(command: Command): Promise<Answer>;
  /**
   * Asks a question. Identical questions that have not started yet are asked once; nobody joins one that has started. `again`: also
   * within one look, where the first answer may have come too early.
   */
  ask<T>(report: Report<T>, again?: "again"): Promise<T>;
  /** Asked once per connection. */
  identity(): Promise<Identity>;
}

/** What a command does to the host; the ledger's own writing changes nothing that anybody declared. */
export type Deed = "run" | "ask" | "change" | "ledger";

/** Where tests look and step in; empty in production. */
export const hooks: {
  /** Before and after each changing step; one that throws stops there. */
  beforeStep?: ((line: object, command: Command) => void | Promise<void>) | undefined;
  afterStep?: ((line: object, command: Command) => void | Promise<void>) | undefined;
  /** Sees the words of every command that leaves for a host, and the tool's own words among them. */
  argv?: ((hostName: string, argv: Argv, deed: Deed, tool: Argv) => void) | undefined;
} = {};

// sshd's default is 10 sessions per connection, and one of them holds the connection.
const SESSIONS = 8;

/**
 * Around every command, on the host: a fixed locale, a PATH with sbin, and the exit status as a last line on stderr.
 * ssh reports its own trouble as exit 255, and tools exit 255 too (qmrestore): with this line it is the tool's, without
 * it nobody knows how the command ended. `env` and `sudo` stay inside, so that their refusals come with the line as well.
 */
const AROUND = [
  'n=$1 s=$2; shift 2; PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"',
  'set -- env LC_ALL=C.UTF-8 LVM_SUPPRESS_FD_WARNINGS=1 "PATH=$PATH" "$@"',
  'if [ -n "$s" ]; then set -- sudo -n -- "$@"; fi',
  '"$@"; e=$?; printf "\\n\\036%s %s\\n" "$n" "$e" >&2; exit "$e"',
].join("; ");

const nothing = () => {};

interface Question {
  waiting?: Asked | undefined;
  /** Settles when the last one that started has ended. */
  running: Promise<unknown>;
}

interface Asked {
  answer: Promise<Answer>;
  /** A hundred askers of one answer parse it once. */
  parsed: Map<z.ZodType, unknown>;
}

type Started = (words: Argv, s: { stdin?: string | undefined; seconds: number; trailer: string }) => Promise<Ended>;

/** One machine as reached in one way, shared by all names that lead to it in the same way. */
class Machine {
  readonly #start: Started;
  readonly #ssh: Ssh | undefined;
  readonly #sudo: boolean;
  readonly #questions = new Map<string, Question>();
  readonly #queue: (() => void)[] = [];
  #free = SESSIONS;
  #identity: { of: number; known: Identity } | undefined;

  constructor(ssh: Ssh | undefined, sudo: boolean) {
    this.#ssh = ssh;
    this.#sudo = sudo;
    this.#start =
      ssh === undefined ? ([file, ...args], s) => finished(file, args, s) : (words, s) => ssh.session(quote(words), s);
  }

  close(): void {
    this.#ssh?.close();
  }

  async run(name: string, command: Command, starts?: () => void): Promise<Answer> {
    // Before the queue: all who wait for a connection share its failure, instead of eight of them at a time.
    await this.#ssh?.ready().catch((cause) => {
      throw unreachable(name, command, cause);
    });
    await this.#turn();
    try {
      starts?.();
      hooks.argv?.(name, command.argv, command.deed ?? "run", command.shown ?? command.argv);
      return await this.#session(name, command);
    } finally {
      this.#free++;
      this.#queue.shift()?.();
    }
  }

  async #turn(): Promise<void> {
    while (this.#free === 0) await new Promise<void>((resolve) => this.#queue.push(resolve));
    this.#free--;
  }

  async #session(name: string, command: Command): Promise<Answer> {
    const { why, timeout: seconds = 120 } = command;
    const nonce = randomUUID();
    const words: Argv = ["sh", "-c", AROUND, "vmbackup", nonce, this.#sudo ? "sudo" : "", ...command.argv];
    const ended = await this.#start(words, { stdin: command.stdin, seconds, trailer: `\u001e${nonce} ` }).catch(
      (cause) => {
        throw unreachable(name, command, cause);
      },
    );
    const trailer = new RegExp(`\\n?\\u001e${nonce} (\\d+)\\n`).exec(ended.stderr);
    const stderr = trailer === null ? ended.stderr : ended.stderr.replace(trailer[0], "");
    const exit = trailer === null ? ended.exit : Number(trailer[1]);
    if (exit === 0 && trailer !== null) return { stdout: ended.stdout, stderr };
    const told = { command: shown(command), stderr };
    if (ended.flood)
      throw new UnreadableReport({
        ...told,
        what: `Unable to ${why}: ${name} answered with more than 64 MiB.`,
        next: "Run the command by hand on the host.",
      });
    if (ended.late && trailer === null)
      throw new HostUnreachable({
        ...told,
        what: `Unable to ${why}: ${name} did not answer within ${seconds} s.`,
        next: "The command may still be running there. When the host answers again, run pulumi once more: it looks first.",
      });
    if (trailer === null && (exit === undefined || exit === 255))
      throw new HostUnreachable({
        ...told,
        what: `Unable to ${why}: the connection to ${name} was lost while the command ran; how it ended is not known.`,
        next: "When the host answers again, run pulumi once more: it looks first and finishes what is left.",
      });
    throw failed(name, command, { ...told, exit, stdout: ended.stdout });
  }

  ask(name: string, report: Command): Asked {
    const key = `${quote(report.argv)}\0${report.stdin ?? ""}`;
    const question = this.#questions.get(key) ?? { running: Promise.resolve() };
    this.#questions.set(key, question);
    if (question.waiting !== undefined) return question.waiting;
    const answer = (async () => {
      // A burst comes over some milliseconds; whoever waits anyway may be joined.
      await Promise.all([sleep(5), question.running]);
      return await this.run(name, { deed: "ask", ...report }, () => {
        question.waiting = undefined;
        question.running = answer.then(nothing, nothing);
      });
    })();
    const asked = { answer, parsed: new Map() };
    question.waiting = asked;
    // It can fail before it starts only by a hook that throws.
    answer.catch(() => {
      if (question.waiting === asked) question.waiting = undefined;
    });
    return asked;
  }

  async identity(host: Host): Promise<Identity> {
    const known = this.#identity;
    if (known !== undefined && known.of === (this.#ssh?.opened ?? 0)) return known.known;
    const { machineId, ledgerId } = await memory(host);
    // A ledger that is not there yet may be there at the next look.
    if (ledgerId !== undefined) this.#identity = { of: this.#ssh?.opened ?? 0, known: { machineId, ledgerId } };
    return { machineId, ledgerId };
  }
}

function unreachable(name: string, { why }: { why: string }, cause: unknown): unknown {
  if (!(cause instanceof Trouble)) return cause;
  const what = `Unable to ${why}: ${name} cannot be reached: ${cause.message}.`;
  return new HostUnreachable({ what, stderr: cause.stderr, next: cause.next }, cause);
}

// biome-ignore format: a table
const PACKAGES: Record<string, string> = {
  lvs: "lvm2", vgs: "lvm2", pvs: "lvm2", lvcreate: "lvm2", lvextend: "lvm2", lvremove: "lvm2", lvchange: "lvm2", lvconvert: "lvm2",
  virsh: "libvirt-clients", "virt-xml-validate": "libvirt-clients", "qemu-img": "qemu-utils", "qemu-nbd": "qemu-utils",
  "nbd-server": "nbd-server", "nbd-client": "nbd-client", nbdcopy: "libnbd-bin", nbdinfo: "libnbd-bin", nbdkit: "nbdkit",
  zstd: "zstd", pigz: "pigz", python3: "python3", flock: "util-linux", findmnt: "util-linux", blockdev: "util-linux",
  "mount.nfs": "nfs-common", showmount: "nfs-common", rpcinfo: "rpcbind", fuser: "psmisc", lsof: "lsof", sudo: "sudo",
  systemctl: "systemd", "systemd-run": "systemd", journalctl: "systemd",
};
const PROXMOX = new Set(["pvesh", "pvesm", "qm", "pct", "qmrestore", "vzdump", "pveversion", "pve-firewall"]);

function failed(
  name: string,
  { why, argv, shown, next }: Command,
  told: { command: string; exit: number | undefined; stdout: string; stderr: string },
): CommandFailed {
  const tool = (shown ?? argv)[0];
  const missing = /^(?:env|sudo): ['‘]?([^'’:\n]+)['’]?: (?:No such file or directory|command not found)$/m.exec(
    told.stderr,
  )?.[1];
  if (told.exit === 127 || (missing !== undefined && told.exit === 1)) {
    const absent = missing?.split("/").pop() ?? tool;
    const install = PROXMOX.has(absent)
      ? `${name} is not a Proxmox VE node, or its packages are damaged: name another host.`
      : `Install the package ${PACKAGES[absent] ?? `that holds ${absent}`} on ${name}.`;
    return new CommandFailed({ ...told, what: `Unable to ${why}: ${name} has no command ${absent}.`, next: install });
  }
  if (
    /^sudo: (a password is required|a terminal is required|no tty present|sorry, you must have a tty)/m.test(
      told.stderr,
    )
  )
    return new CommandFailed({
      ...told,
      what: `Unable to ${why}: sudo on ${name} wants a password, and nobody is there to type it.`,
      next: "Allow it without one: a line `USER ALL=(ALL) NOPASSWD: ALL` in a file of /etc/sudoers.d there; or log in as root.",
    });
  return new CommandFailed({
    ...told,
    what: `Unable to ${why}: ${tool} exited ${told.exit ?? "by a signal"} on ${name}.`,
    next: next ?? "Run the command by hand on the host to see more.",
  });
}

const machines = new Map<string, Machine>();
const handles = new Map<string, Host>();

async function machineOf(connection: Connection, cwd: string): Promise<Machine> {
  const sudo = connection.sudo === true;
  const to = connection.host === "local" ? undefined : await destination(connection, cwd);
  const key = `${to?.key ?? "local"} ${sudo}`;
  const machine = machines.get(key) ?? new Machine(to && new Ssh(to), sudo);
  machines.set(key, machine);
  return machine;
}

/**
 * The host that the program names, completed from stack config `vmbackup:connection`. Nothing is opened yet. Relative
 * paths start at `cwd`, the folder of the project.
 */
export function connect(host: unknown, config?: unknown, cwd = process.cwd()): Host {
  const declared = valid("host", hostSchema, host);
  const defaults = config === undefined ? {} : valid("vmbackup:connection", connectionDefaultsSchema, config);
  const connection = completed(declared, defaults);
  const name = hostLabel(declared);
  const key = JSON.stringify([name, cwd, Object.entries(connection).sort()]);
  const made = handles.get(key) ?? handle(name, connection, cwd);
  handles.set(key, made);
  return made;
}

// zod's issues name the property and what it must be, never the value: it may be a key.
function valid<T>(property: string, schema: z.ZodType<T>, value: unknown): T {
  const checked = schema.safeParse(value);
  if (checked.success) return checked.data;
  const issues = checked.error.issues.map(({ path, message }) => `${[property, ...path].join(".")} ${message}`);
  throw new Refused({ what: `${issues.join("; ")}.`, next: `Correct \`${property}\`.` });
}

function handle(name: string, connection: Connection, cwd: string): Host {
  let found: Promise<Machine> | undefined;
  const machine = (why: string) => {
    found ??= machineOf(connection, cwd);
    return found.catch((cause) => {
      found = undefined;
      throw unreachable(name, { why }, cause);
    });
  };
  const host: Host = {
    name,
    run: async (command) => (await machine(command.why)).run(name, command),
    ask: async (report) => readable(name, report, (await machine(report.why)).ask(name, report)),
    identity: async () => (await machine("see which machine it is")).identity(host),
  };
  return host;
}

/** The host for the time of one look: the same question has one answer, however many parts of the look ask it. */
export function oneLook(host: Host): Host {
  const answers = new Map<string, Promise<unknown>>();
  return {
    ...host,
    ask<T>(report: Report<T>, again?: "again"): Promise<T> {
      const key = [report.why, quote(report.argv), report.stdin].join("\0");
      const known = again === undefined ? answers.get(key) : undefined;
      if (known !== undefined) return known as Promise<T>;
      const answer = host.ask(report);
      answers.set(key, answer);
      return answer;
    },
  };
}

async function readable<T>(name: string, report: Report<T>, asked: Asked): Promise<T> {
  const { stdout } = await asked.answer;
  const known = asked.parsed.get(report.answer);
  if (known !== undefined) return known as T;
  const unreadable = (why: string, cause: unknown) =>
    new UnreadableReport(
      {
        what: `Unable to ${report.why}: ${name} answered, but not what was asked.`,
        command: shown(report),
        stderr: `It begins: ${JSON.stringify(stdout.slice(0, 120))}\n${why}`,
        next: "Run the command by hand on the host. Output of its shell's start-up files would also be in the way.",
      },
      cause,
    );
  let value: unknown;
  try {
    value = report.parse === undefined ? JSON.parse(stdout) : report.parse(stdout);
  } catch (cause) {
    if (cause instanceof UnreadableReport) throw cause;
    throw unreadable(cause instanceof Error ? cause.message : String(cause), cause);
  }
  const checked = report.answer.safeParse(value);
  if (!checked.success)
    throw unreadable(z.prettifyError(checked.error).split("\n").slice(0, 12).join("\n"), checked.error);
  asked.parsed.set(report.answer, checked.data);
  return checked.data;
}

/** Closes every connection and ends the private agents; done by itself at exit. */
export function closeAll(): void {
  for (const machine of machines.values()) machine.close();
  machines.clear();
  handles.clear();
  forgetFiles();
  endAll();
}
