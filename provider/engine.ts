// The engine: the contract of a resource, and the one loop that serves create, update and repair.
//
//   observe -> plan -> the next step -> observe ... until the plan is empty
//
// What Pulumi calls is in engine-check.ts (check and diff: pure) and here (create, read, update, delete: on the host).
import { randomBytes } from "node:crypto";
import type * as z from "zod";
import { type Fields, plain, same } from "./engine-values.js";
import { CommandFailed, Conflict, HostUnreachable, Refused, Unfinished } from "./errors.js";
import { type Command, type Host, oneLook } from "./host.js";
import { ended, forgetJob, inTurn, jobState, joins, started } from "./host-job.js";
import { fenced, forget, type Line, type Memory, memory } from "./host-ledger.js";

/** One command with its reason in words ("take the snapshot vg0/dump"). */
export interface Step extends Command {
  /** Observe before going on to the next step of the plan. */
  look?: true;
  /** Of a removal: reads back that nothing is left, so that the ledger's line goes in the same command. */
  last?: true;
  /** Long work: a unit on the host that outlives the connection, joined by whoever plans the same; then observe. */
  job?: true;
  /** Something was removed for it: when it fails it is Unfinished. */
  halfway?: true;
}

/** A rule over several inputs, run by check as soon as all of them are known and valid. */
export interface Rule<W> {
  needs: readonly (keyof W & string)[];
  /** The property that the failure is shown at, and the reason with its cure; undefined when all is well. */
  broken(want: W): { property: string; reason: string } | undefined;
}

/** What every observation tells the engine; a resource adds its own. Absence is a field, never `undefined`. */
export interface Observed<P> {
  exists: boolean;
  /** The owner that the object itself carries (tag, comment, description), where it can. */
  owner?: string | undefined;
  /** What was chosen or seen once; goes into the ledger and, as a copy, into the state. */
  pins?: P | undefined;
  /** Why a point in time that cannot be made again is lost: read keeps such an object instead of calling it gone. */
  lost?: string | undefined;
}

export interface Definition<W extends object, H extends Observed<P>, P> {
  kind: string;
  /** Of the state. A higher one needs an entry in `migrations`. */
  version: number;
  /** Old outputs of version N -> outputs of version N + 1. */
  migrations: Readonly<Record<number, (old: Fields) => Fields>>;
  /** The inputs; each is parsed on its own, so that an unknown one does not stop the others from being checked. */
  inputs: z.ZodObject;
  rules: readonly Rule<W>[];
  /** Inputs whose change means another object. Never an input that other resources feed (see docs/architecture.md). */
  replaceOn: readonly (keyof W & string)[];
  /** The inputs that an id tells, for `.get`. */
  fromId(id: string): Partial<W>;
  /** What the object is called on its host; the id of the resource. */
  identify(want: W): string;
  /**
   * The same where the host has to be asked (the lowest free id of a range); undefined leaves it to `identify`. Asked by create
   * only. What it names may be taken by another run before we have it: then it is asked again.
   */
  choose?(want: W, host: Host, found: Memory, owner: string): Promise<string | undefined>;
  /**
   * Looks, and changes nothing. `line` is what the ledger says; `pins` of it may come from the state.
   */
  observe(want: W, line: Line<P> | undefined, host: Host, purpose?: Purpose): Promise<H>;
  /** The steps from what is there to what is wanted; [] = settled. Pure. Throws Refused or Conflict. */
  plan(want: W, have: H, line: Line<P>): Step[];
  /** The steps that remove what is ours; [] = nothing of ours is there. Pure. Throws Refused. */
  remove(have: H, line: Line<P>): Step[];
  /** What a removal has left on purpose: told to whoever asked for it. */
  left?(have: H, line: Line<P>): string | undefined;
  /** Outputs besides the inputs: facts at top level, and what moves by itself in `status`. */
  facts(want: W, have: H, line: Line<P>): Fields;
  /** The declared inputs as the host has them: where they differ, the program drifted. */
  asFound(want: W, have: H, line: Line<P>): W;
  /** What adoption leaves alone besides the inputs that are not declared: settings within one that is, as "vzdump.zstd". */
  keeps?(want: W, have: H): string[];
  /** What the reader of a successful create or update should know; not an error. */
  warnings?(want: W, have: H): string[];
}

/**
 * What an observation is for, so that no more is asked than is needed. "plan": a plan may follow, and `facts` when it is empty.
 * "tell": only `facts` follow; nothing has to be chosen. "look": neither; whether it is there, whose it is, what to remove.
 */
export type Purpose = "plan" | "tell" | "look";

// biome-ignore lint/suspicious/noExplicitAny: a list of definitions forgets what each one wants, has and pins
export type AnyDefinition = Definition<any, any, any>;

/** What Pulumi keeps beside the inputs and the facts. Names with __ are hidden in its displays. */
export interface Hidden {
  /** organization/project/stack/kind/name */
  __owner: string;
  __timeouts?: { create?: number; update?: number; delete?: number };
  __provider: string;
  /** Schema version of the state. */
  __v?: number;
  __incarnation?: string;
  __pins?: unknown;
  /** Fields that adoption left as they were. */
  __kept?: string[];
  /** Machine id / ledger uuid: a name that leads to another machine must not read as "gone". */
  __machine?: string;
}

/** A host by what the program says of it, with what the stack's configuration adds. */
export type Connect = (host: unknown) => Host;

const HIDDEN = ["__owner", "__timeouts", "__provider", "__v", "__incarnation", "__pins", "__kept", "__machine"];

/** One resource as Pulumi's calls see it. */
interface Task<W, P> {
  host: Host;
  want: W;
  hidden: Hidden;
  line: Line<P>;
  /** The incarnation that the ledger of the host holds now; "" = it has no line. */
  onHost: string;
  memory: Memory;
  deadline: number;
  /** Whether a changing step has begun: from here on an error is a partial failure. */
  began: boolean;
}

function newIncarnation(): string {
  return randomBytes(8).toString("hex");
}

function lineOf<P>(found: Memory, kind: string, identity: string): Line<P> | undefined {
  return found.lines.find((line) => line.kind === kind && line.identity === identity) as Line<P> | undefined;
}

function machineOf(found: Memory): string {
  return `${found.machineId}/${found.ledgerId ?? ""}`;
}

/** The same machine, as far as both sides can tell: the ledger's uuid exists only after the first write. */
function isMachine(before: string | undefined, found: Memory): boolean {
  if (before === undefined) return true;
  const [machineId, ledgerId] = before.split("/");
  return machineId === found.machineId && (!ledgerId || !found.ledgerId || ledgerId === found.ledgerId);
}

function checkMachine(kind: string, id: string, before: string | undefined, found: Memory, host: Host): void {
  if (isMachine(before, found)) return;
  throw new Conflict({
    what: `${kind} ${id} is on another machine: the name ${host.name} now leads to machine ${machineOf(found)}, and the state was made on ${before}.`,
    next: "Nothing was changed on either. Let the name lead to the old machine again, or move the resource there with `pulumi up --replace URN`.",
  });
}

/** Splits what Pulumi hands over into the wanted inputs and our own hidden ones. */
export function split(properties: Fields): { inputs: Fields; hidden: Hidden } {
  const inputs: Fields = {};
  const hidden: Fields = {};
  for (const [key, value] of Object.entries(properties)) (HIDDEN.includes(key) ? hidden : inputs)[key] = value;
  return { inputs, hidden: hidden as unknown as Hidden };
}

/** The declared inputs among the outputs of a state, in today's normal form, migrated from older versions. */
export function migrated(definition: AnyDefinition, state: Fields): Fields {
  let now = state;
  for (let v = Number(state.__v ?? definition.version); v < definition.version; v++) {
    const step = definition.migrations[v];
    if (step === undefined) throw new Error(`${definition.kind}: no way from state version ${v} to ${v + 1}`);
    now = step(now);
  }
  return now;
}

/** Those of the paths ("retention", "vzdump.zstd") that the program says nothing of. */
function undeclared(paths: readonly string[] | undefined, want: Fields): string[] {
  const at = (path: string) =>
    path.split(".").reduce<unknown>((value, key) => (value as Fields | undefined)?.[key], want);
  return (paths ?? []).filter((path) => at(path) === undefined);
}

/** Only the fields that the resource takes as inputs; undefined ones dropped. */
export function declaredOf(definition: AnyDefinition, properties: Fields): Fields {
  const names = Object.keys(definition.inputs.shape);
  return Object.fromEntries(names.flatMap((k) => (properties[k] === undefined ? [] : [[k, properties[k]]])));
}

export class Engine {
  readonly #definition: AnyDefinition;
  readonly #connect: Connect;

  constructor(definition: AnyDefinition, connect: Connect) {
    this.#definition = definition;
    this.#connect = connect;
  }

  async create(properties: Fields): Promise<{ id: string; outs: Fields }> {
    const { inputs, hidden } = split(properties);
    const want = declaredOf(this.#definition, inputs);
    const host = this.#connect(want.host);
    for (let last = ""; ; ) {
      const found = await memory(host);
      const chosen = await this.#definition.choose?.(want, host, found, hidden.__owner);
      if (chosen === undefined) return await this.#create(this.#definition.identify(want), want, hidden, host, found);
      try {
        return await this.#create(chosen, want, hidden, host, found);
      } catch (error) {
        // Somebody else may have been faster. Whoever chooses the same again did not fail for that.
        if (isPartial(error) || chosen === last) throw error;
        const again = await this.#definition.choose?.(want, host, await memory(host), hidden.__owner);
        if (again === chosen || again === undefined) throw error;
        last = chosen;
      }
    }
  }

  async #create(
    id: string,
    want: Fields,
    hidden: Hidden,
    host: Host,
    found: Memory,
  ): Promise<{ id: string; outs: Fields }> {
    const deadline = within(hidden.__timeouts?.create);
    const remembered = lineOf(found, this.#definition.kind, id);
    let line = remembered;
    // A definition that chooses learns from the line what was chosen.
    const blank = this.#definition.choose === undefined ? undefined : this.#lineFrom(id, {});
    let have: Observed<unknown> = await this.#look(want, line ?? blank, host, "plan");
    if ((line?.finished || have.lost !== undefined) && !have.exists) {
      // What the line tells of is gone, and no state relies on it: the name is free again.
      line = undefined;
      have = await this.#look(want, blank, host, "plan");
    }
    const adopted = this.#mayTake(id, hidden.__owner, want.adopt === true, line, have);
    const task: Task<Fields, unknown> = {
      host,
      want,
      hidden,
      memory: found,
      deadline,
      onHost: remembered?.incarnation ?? "",
      began: false,
      line: {
        ...(line ?? { v: 1, kind: this.#definition.kind, identity: id, kept: [] }),
        kept: adopted ? this.#undeclared(want, have) : undeclared(line?.kept, want),
        owner: hidden.__owner,
        incarnation: newIncarnation(),
        finished: false,
      } as Line,
    };
    // An older run of ours may still be at work there: take its lock and its place first, then look again.
    const takesOver = line !== undefined && !line.finished;
    return await this.#carryOut(id, task, takesOver ? undefined : have, takesOver);
  }

  async update(id: string, olds: Fields, news: Fields): Promise<{ outs: Fields }> {
    const before = split(migrated(this.#definition, olds)).hidden;
    const { inputs, hidden } = split(news);
    const want = declaredOf(this.#definition, inputs);
    const deadline = within(hidden.__timeouts?.update);
    const { host, found, line } = await this.#open(id, want, before);
    this.#mine(id, line, before);
    const task: Task<Fields, unknown> = {
      host,
      want,
      hidden,
      memory: found,
      deadline,
      onHost: line?.incarnation ?? "",
      began: false,
      line: {
        ...(line ?? this.#lineFrom(id, before)),
        kept: undeclared(line?.kept ?? before.__kept, want),
        owner: hidden.__owner,
      } as Line,
    };
    if (line === undefined) {
      // The ledger was lost, or the object was removed with it: only an object that still carries our mark is ours.
      const have = await this.#look(want, task.line, host, "look");
      if (have.exists && have.owner !== before.__owner && have.owner !== hidden.__owner)
        throw this.#conflict(id, have.owner);
    }
    // A command that an interrupted run left may still be at work there: wait for its lock before looking.
    const { outs } = await this.#carryOut(id, task, undefined, line?.finished === false);
    return { outs };
  }

  /** `gone` only by a successful answer. `.get` (no marker of ours in the properties) throws for what is absent. */
  async read(id: string, properties: Fields): Promise<{ id?: string; props: Fields; inputs?: Fields }> {
    const state = migrated(this.#definition, properties);
    const { inputs, hidden } = split(state);
    const isGet = hidden.__v === undefined;
    const want: Fields = isGet
      ? { host: inputs.host, ...this.#definition.fromId(id) }
      : declaredOf(this.#definition, inputs);
    const { host, found, line } = await this.#open(id, want, hidden);
    const known = line ?? this.#lineFrom(id, hidden);
    const have = await this.#look(want, isGet ? line : known, host, "tell");
    if (!have.exists && have.lost === undefined) {
      if (!isGet) return { props: {} };
      throw new Refused({
        what: `${this.#definition.kind} ${id} does not exist on ${host.name}.`,
        next: "`.get` looks at something that is there: check the id and the host, or create it.",
      });
    }
    if (have.pins !== undefined) known.pins = have.pins;
    const foundInputs = this.#definition.asFound(want, have, known);
    const props = this.#outputs(foundInputs, hidden, have, known, found);
    if (isGet) return { id, props };
    const kept = Object.fromEntries(["__owner", "__timeouts"].flatMap((k) => (k in state ? [[k, state[k]]] : [])));
    return { id, props, inputs: plain({ ...foundInputs, ...kept }) };
  }

  async remove(id: string, properties: Fields): Promise<void> {
    const state = migrated(this.#definition, properties);
    const { inputs, hidden } = split(state);
    if (hidden.__v === undefined) return; // read by `.get`: never ours
    const want = declaredOf(this.#definition, inputs);
    const deadline = within(hidden.__timeouts?.delete);
    const { host, line } = await this.#open(id, want, hidden);
    if (line === undefined || line.owner !== hidden.__owner || line.incarnation !== hidden.__incarnation) {
      const have = await this.#look(want, line ?? this.#lineFrom(id, hidden), host, "look");
      if (have.exists) {
        const whose = line?.owner ?? have.owner;
        console.log(
          `${this.#definition.kind} ${id} on ${host.name} is left where it is: it is ${whose === undefined ? "in no ledger of ours" : `now ${whose}'s`}. Remove it by hand if you mean to.`,
        );
      }
      return;
    }
    let last = "";
    // What a command that was left over is still making is not there yet: wait for its lock before looking.
    if (!line.finished) await fenced(host, line, line.incarnation);
    for (;;) {
      const have = await this.#look(want, line, host, "look");
      const steps = this.#definition.remove(have, line);
      if (steps.length === 0) {
        const left = this.#definition.left?.(have, line);
        if (left !== undefined) console.log(`${this.#definition.kind} ${id} on ${host.name}: ${left}`);
        break;
      }
      last = this.#progress(id, last, steps, host);
      for (const step of steps) {
        const timed = inTime(step, deadline, this.#definition.kind, id);
        if (step.last) return await forget(host, line, timed);
        await fenced(host, line, line.incarnation, timed);
        if (step.look) break;
      }
    }
    await forgetJob(host, line);
    await forget(host, line);
  }

  /** What the ledger of the host says of the object, once it is known to be the machine that the state was made on. */
  async #open(
    id: string,
    want: Fields,
    before: Hidden,
  ): Promise<{ host: Host; found: Memory; line: Line | undefined }> {
    const host = this.#connect(want.host);
    const found = await memory(host);
    checkMachine(this.#definition.kind, id, before.__machine, found, host);
    return { host, found, line: lineOf(found, this.#definition.kind, id) };
  }

  #look(want: Fields, line: Line | undefined, host: Host, purpose: Purpose): Promise<Observed<unknown>> {
    return this.#definition.observe(want, line, oneLook(host), purpose);
  }

  // ---------------------------------------------------------------- the loop

  async #carryOut(
    id: string,
    task: Task<Fields, unknown>,
    seen: Observed<unknown> | undefined,
    takesOver: boolean,
  ): Promise<{ id: string; outs: Fields }> {
    try {
      if (takesOver) await this.#fenced(task);
      const have = await this.#reconcile(id, task, seen);
      for (const warning of this.#definition.warnings?.(task.want, have) ?? []) console.warn(`warning: ${warning}`);
      if (task.memory.ledgerId === undefined) task.memory = await memory(task.host); // the first write gave it its uuid
      return { id, outs: this.#outputs(task.want, task.hidden, have, task.line, task.memory) };
    } catch (error) {
      if (!task.began) throw error;
      throw this.#partial(id, task, error);
    }
  }

  async #reconcile(id: string, task: Task<Fields, unknown>, seen?: Observed<unknown>): Promise<Observed<unknown>> {
    const { host, want, line } = task;
    let was: unknown = plain(lineOf(task.memory, line.kind, line.identity));
    let last = "";
    for (let next = seen; ; next = undefined) {
      const have: Observed<unknown> = next ?? (await this.#look(want, line, host, "plan"));
      if (have.pins !== undefined) line.pins = plain(have.pins);
      const steps = this.#definition.plan(want, have, line);
      if (steps.length === 0) {
        line.finished = true;
        if (!same(was, plain(line))) await this.#fenced(task);
        return have;
      }
      last = this.#progress(id, last, steps, host);
      line.finished = false;
      was = undefined; // as the steps write it
      for (const step of steps) {
        // Work that had ended before we came was none of ours: the same plan may come once more.
        if (!(await this.#step(id, task, step, have))) last = "";
        if (step.look || step.job) break;
      }
    }
  }

  /** False when it was a job that had ended already. */
  async #step(id: string, task: Task<Fields, unknown>, step: Step, had: Observed<unknown>): Promise<boolean> {
    const fresh = !task.began && !had.exists;
    const timed = inTime(step, task.deadline, this.#definition.kind, id);
    try {
      if (step.job) return await inTurn(task.host, () => this.#job(task, step));
      await this.#fenced(task, timed);
      return true;
    } catch (error) {
      // A first step that failed and left nothing is no half-made resource: nothing is owed to anybody.
      if (fresh && error instanceof CommandFailed) {
        const now = await this.#look(task.want, task.line, task.host, "look");
        if (!now.exists) {
          await forgetJob(task.host, task.line);
          await forget(task.host, task.line);
          task.began = false;
        }
      }
      throw error;
    }
  }

  async #job(task: Task<Fields, unknown>, step: Step): Promise<boolean> {
    const { host, line, hidden } = task;
    const now = await jobState(host, line);
    const joined = joins(line, step, now);
    if (!joined) await this.#fenced(task, started(line, step, task.memory.bootId));
    const since = Date.now();
    // Long work is waited for as long as it takes, unless the program says otherwise.
    await ended(host, line, step, hidden.__timeouts === undefined ? Number.POSITIVE_INFINITY : task.deadline);
    if (hidden.__timeouts === undefined) task.deadline += Date.now() - since;
    return !joined || now.state === "running";
  }

  async #fenced(task: Task<Fields, unknown>, command?: Command): Promise<void> {
    try {
      await fenced(task.host, task.line, task.onHost, command);
    } catch (error) {
      // A Conflict is the fence or the lock: no line was written, nothing ran. Anything else may have begun.
      if (!(error instanceof Conflict)) {
        task.began ||= command !== undefined;
        if (!(error instanceof HostUnreachable)) task.onHost = task.line.incarnation;
      }
      throw error;
    }
    task.began = true;
    task.onHost = task.line.incarnation;
  }

  /** The same plan twice means that a step did not do what it is for. */
  #progress(id: string, last: string, steps: Step[], host: Host): string {
    const text = JSON.stringify(steps);
    if (text !== last) return text;
    throw new Unfinished({
      what: `${this.#definition.kind} ${id} on ${host.name}: the commands ran without an error, and yet the same is left to do: ${steps.map((step) => step.why).join("; ")}.`,
      next: "Look at the host: something undoes the work or the tool does not do what it says. Then run `pulumi up` again.",
    });
  }

  // ---------------------------------------------------------------- whose is it?

  /** Whether a create may take what is there; true when it is adopted. */
  #mayTake(id: string, owner: string, adopt: boolean, line: Line | undefined, have: Observed<unknown>): boolean {
    if (line !== undefined && line.owner !== owner) {
      if (!adopt) throw this.#conflict(id, line.owner);
      return true;
    }
    if (line !== undefined || !have.exists) return false;
    if (have.owner === owner) return false; // ours by its mark: only the ledger was lost
    if (!adopt) throw this.#conflict(id, have.owner);
    return true;
  }

  #mine(id: string, line: Line | undefined, before: Hidden): void {
    if (line === undefined || line.incarnation === before.__incarnation) return;
    throw this.#conflict(id, line.owner);
  }

  #conflict(id: string, owner: string | undefined): Conflict {
    const whose =
      owner === undefined
        ? "it was made by hand or by another tool"
        : `it belongs to ${owner} (another resource or run)`;
    return new Conflict({
      what: `${this.#definition.kind} ${id} exists already and is not this resource's: ${whose}. It was left as it is.`,
      next: "If the resource was renamed or moved, add `aliases`; to take the object over, `adopt: true`; otherwise choose another name.",
    });
  }

  #undeclared(want: Fields, have: Observed<unknown>): string[] {
    const fields = Object.keys(this.#definition.inputs.shape).filter((field) => field !== "adopt");
    return undeclared([...fields, ...(this.#definition.keeps?.(want, have) ?? [])], want);
  }

  #lineFrom(id: string, hidden: Partial<Hidden>): Line {
    return {
      v: 1,
      kind: this.#definition.kind,
      identity: id,
      owner: hidden.__owner ?? "",
      incarnation: hidden.__incarnation ?? "",
      finished: true,
      kept: hidden.__kept ?? [],
      ...(hidden.__pins === undefined ? {} : { pins: hidden.__pins }),
    };
  }

  // ---------------------------------------------------------------- what goes into the state

  #outputs(want: Fields, hidden: Hidden, have: Observed<unknown>, line: Line, found: Memory): Fields {
    return plain({
      ...want,
      ...this.#definition.facts(want, have, line),
      __owner: hidden.__owner,
      __timeouts: hidden.__timeouts,
      __v: this.#definition.version,
      ...this.#names(line, found),
    });
  }

  #names(line: Line, found: Memory): Fields {
    return {
      __incarnation: line.incarnation || undefined,
      __pins: line.pins,
      __kept: line.kept.length > 0 ? line.kept : undefined,
      __machine: machineOf(found),
    };
  }

  /** Pulumi records an error with these fields as a half-made resource, and calls update the next time. */
  #partial(id: string, task: Task<Fields, unknown>, error: unknown): Error {
    const message = error instanceof Error ? error.message : String(error);
    const properties = plain({
      ...task.want,
      __provider: task.hidden.__provider, // without it the resource could never be read or deleted
      __owner: task.hidden.__owner,
      __timeouts: task.hidden.__timeouts,
      __v: this.#definition.version,
      ...this.#names(task.line, task.memory),
    });
    return Object.assign(new Error(message), { id, properties, reasons: [message] });
  }
}

/** Pulumi records it as a half-made resource. */
function isPartial(error: unknown): boolean {
  return error instanceof Error && "reasons" in error;
}

// ---------------------------------------------------------------- time

const HOUR = 3600;

/** When an operation must have ended, in milliseconds of the local clock. */
function within(seconds: number | undefined): number {
  return Date.now() + (seconds ?? HOUR) * 1000;
}

function inTime(step: Step, deadline: number, kind: string, id: string): Step {
  const left = Math.floor((deadline - Date.now()) / 1000);
  if (left <= 0)
    throw new Unfinished({
      what: `${kind} ${id}: the time given by customTimeouts is over before "${step.why}".`,
      next: "Run `pulumi up` again: it goes on where this run stopped. Raise `customTimeouts` if the host is slow.",
    });
  return { ...step, timeout: Math.min(step.timeout ?? HOUR, left) };
}
