// The laws that every resource keeps (docs/architecture.md), as one function that takes a resource's description. Run against real
// hosts; what is asserted is looked up out of band, never through our own read.
import { afterEach, describe, expect, it } from "vitest";
import type { Fields } from "../provider/engine-values.js";
import { Conflict, HostUnreachable } from "../provider/errors.js";
import { hooks } from "../provider/host-ledger.js";
import { CheckFailed, Stack } from "./stack.js";

export interface Described {
  kind: string;
  /** Valid inputs of an object of its own, called after `tag` (letters and digits). */
  inputs(tag: string): Fields;
  /** What the real tool says of that object, as one stable text; undefined when there is none. */
  look(tag: string): Promise<string | undefined>;
  /** Removes it by hand. */
  vanish(tag: string): Promise<void>;
  /** Makes one of that name by hand, which is not ours. */
  foreign(tag: string): Promise<void>;
  /** A point in time that cannot be made again is lost, not gone. */
  losable?: true;
  /** What check refuses: inputs over the valid ones, and the property that is named. */
  bad: readonly (readonly [name: string, over: Fields, property: string])[];
  /** What only the host knows: refused by create, before anything is changed. */
  badOnHost: readonly (readonly [name: string, over: Fields, message: RegExp])[];
  /** Mutable fields: a new value, and what `look` says then. */
  mutable: readonly (readonly [field: string, over: Fields, seen: RegExp])[];
  /** Fields that can be left out again: with it, and what `look` says with and without. */
  optional: readonly (readonly [field: string, over: Fields, seen: RegExp | undefined])[];
  /** Fields of replaceOn: inputs that call for another object. */
  replacing: readonly (readonly [field: string, over: (tag: string) => Fields])[];
  /** What differs between an object and the one that replaced it under the same name (a uuid, a time). */
  token?(tag: string): Promise<string | undefined>;
  /** Words of `--replace` under the same identity do not apply (`false`: the identity is not a point in time). */
  secret?: string;
  /** The object of a resource that was renamed in the program only. */
  renamed?(tag: string): Fields;
}

const UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9";
const DOWN = { host: "nobody.invalid", dialErrorLimit: 1, perDialTimeout: 2 };

/** Runs a piece of work and counts the changing commands in it. */
async function changing(work: () => Promise<unknown>): Promise<string[]> {
  const run: string[] = [];
  hooks.beforeStep = (_line, command) => {
    run.push((command.shown ?? command.argv).join(" "));
  };
  try {
    await work();
  } finally {
    delete hooks.beforeStep;
  }
  return run;
}

class Stopped extends Error {}

/** Stops after the k-th changing step, as a lost connection or a killed process would. */
async function stoppedAfter(k: number, work: () => Promise<unknown>): Promise<boolean> {
  let steps = 0;
  hooks.afterStep = () => {
    if (++steps === k) throw new Stopped(`stopped after step ${k}`);
  };
  try {
    await work();
    return false;
  } catch (error) {
    if (error instanceof Error && error.message.includes("stopped after step")) return true;
    throw error;
  } finally {
    delete hooks.afterStep;
  }
}

export function laws(resource: Described): void {
  let n = 0;
  const made: { stack: Stack; tag: string }[] = [];
  const fresh = (stackName?: string) => {
    const tag = `law${++n}`;
    const stack = new Stack(resource.kind, tag, stackName);
    made.push({ stack, tag });
    return { tag, stack, inputs: resource.inputs(tag) };
  };
  const another = (tag: string, stackName: string, name = tag) => {
    const stack = new Stack(resource.kind, name, stackName);
    made.push({ stack, tag });
    return stack;
  };

  describe(`the laws: ${resource.kind}`, () => {
    afterEach(async () => {
      delete hooks.beforeStep;
      delete hooks.afterStep;
      for (const { stack, tag } of made.splice(0)) {
        await stack.destroy().catch(() => {});
        if ((await resource.look(tag)) !== undefined) await resource.vanish(tag);
      }
    });

    it.each(resource.bad)(
      "1 bad input is refused before a host is contacted, naming its property: %s",
      async (_name, over, property) => {
        const { stack, inputs } = fresh();
        const failure = await stack
          .check({ ...inputs, host: "nobody.invalid", ...over })
          .catch((error: unknown) => error);
        expect(failure).toBeInstanceOf(CheckFailed);
        expect((failure as CheckFailed).failures.map((f) => f.property)).toContain(property);
      },
    );

    it.each(resource.badOnHost)(
      "1 what only the host knows is refused before anything is changed: %s",
      async (_name, over, message) => {
        const { stack, tag, inputs } = fresh();
        const before = await resource.look(tag);
        const run = await changing(() => expect(stack.up({ ...inputs, ...over })).rejects.toThrow(message));
        expect(run).toEqual([]);
        expect(await resource.look(tag)).toBe(before);
        expect(stack.recorded).toBeUndefined();
      },
    );

    it("2 and 3 after create the plan is empty, and creating again changes nothing", async () => {
      const { stack, tag, inputs } = fresh();
      const first = await changing(() => stack.up(inputs));
      expect(first.length).toBeGreaterThan(0); // the positive control of the zeros below
      const there = await resource.look(tag);
      expect(there).toBeDefined();
      expect(await stack.preview(inputs)).toBe("same");
      expect(await changing(() => stack.up(inputs))).toEqual([]);
      stack.forget(); // a run that was killed before its result was saved creates again
      expect(await changing(() => stack.up(inputs))).toEqual([]);
      expect(await resource.look(tag)).toBe(there);
    });

    it.each(resource.mutable)(
      "4 a changed field is an update, and then the plan is empty: %s",
      async (_field, over, seen) => {
        const { stack, tag, inputs } = fresh();
        await stack.up(inputs);
        expect(await stack.up({ ...inputs, ...over })).toBe("update");
        expect(await resource.look(tag)).toMatch(seen);
        expect(await stack.preview({ ...inputs, ...over })).toBe("same");
        expect(await stack.refresh()).toBe("there");
        expect(await stack.preview({ ...inputs, ...over })).toBe("same");
      },
    );

    it.each(resource.replacing)("4 a field that is fixed replaces: %s", async (_field, over) => {
      const { stack, tag, inputs } = fresh();
      await stack.up(inputs);
      expect(await stack.preview({ ...inputs, ...over(tag) })).toBe("replace");
    });

    it("4 --replace really makes a new object", async () => {
      const { stack, tag, inputs } = fresh();
      await stack.up(inputs);
      const token = resource.token ?? resource.look;
      const before = await token(tag);
      const run = await changing(() => stack.up(inputs, { replace: true }));
      expect(run.length).toBeGreaterThan(1); // removed, and made
      expect(await resource.look(tag)).toBeDefined();
      if (resource.token !== undefined) expect(await token(tag)).not.toBe(before);
      expect(await stack.preview(inputs)).toBe("same");
    });

    it.each(resource.optional)("5 leaving a field out again removes it on the host: %s", async (_field, over, seen) => {
      const { stack, tag, inputs } = fresh();
      await stack.up({ ...inputs, ...over });
      if (seen !== undefined) expect(await resource.look(tag)).toMatch(seen);
      await stack.up(inputs);
      if (seen !== undefined) expect(await resource.look(tag)).not.toMatch(seen);
      expect(await stack.preview(inputs)).toBe("same");
    });

    it("5 what adoption found and the program never declared stays", async () => {
      const { stack, tag, inputs } = fresh();
      await resource.foreign(tag);
      await stack.up({ ...inputs, adopt: true });
      expect(await stack.preview(inputs)).toBe("same"); // dropping `adopt` is no change
      expect(await stack.refresh()).toBe("there");
      expect(await stack.preview(inputs)).toBe("same");
      await stack.destroy();
      expect(await resource.look(tag)).toBeUndefined();
    });

    it("6 delete twice succeeds", async () => {
      const { stack, tag, inputs } = fresh();
      await stack.up(inputs);
      const { recorded } = stack;
      await stack.destroy();
      expect(await resource.look(tag)).toBeUndefined();
      stack.recorded = recorded;
      await stack.destroy();
      expect(await resource.look(tag)).toBeUndefined();
    });

    it("7 removed behind our back: read says so, and a host that is down is not an absent object", async () => {
      const { stack, tag, inputs } = fresh();
      await stack.up(inputs);
      const { recorded } = stack;
      if (recorded === undefined) throw new Error("nothing recorded");
      const outputs = { ...recorded.outputs, host: DOWN };
      await expect(stack.calls.read(recorded.id, outputs)).rejects.toThrow(HostUnreachable);
      await expect(stack.calls.delete(recorded.id, outputs)).rejects.toThrow(HostUnreachable);
      await resource.vanish(tag);
      if (resource.losable) {
        expect(await stack.refresh()).toBe("there");
        expect(stack.recorded?.outputs.status).toMatchObject({ valid: false });
        expect(await stack.preview(inputs)).toBe("update");
        await expect(stack.up(inputs)).rejects.toThrow(/lost/);
        expect(await resource.look(tag)).toBeUndefined();
        expect(await stack.up(inputs, { replace: true })).toBe("replace");
      } else {
        expect(await stack.refresh()).toBe("gone");
        expect(await stack.up(inputs)).toBe("create");
      }
      expect(await resource.look(tag)).toBeDefined();
    });

    it("8 stopped after each step, it converges, and nothing is made twice", async () => {
      for (const saved of [true, false]) {
        for (let k = 1; ; k++) {
          const { stack, tag, inputs } = fresh();
          const stopped = await stoppedAfter(k, () => stack.up(inputs));
          if (!saved) stack.forget(); // killed between the remote command and the saved state
          await stack.up(inputs);
          expect(await resource.look(tag)).toBeDefined();
          expect(await stack.preview(inputs)).toBe("same");
          expect(await stack.refresh()).toBe("there");
          expect(await stack.preview(inputs)).toBe("same");
          await stack.destroy();
          expect(await resource.look(tag)).toBeUndefined();
          if (!stopped) {
            expect(k).toBeGreaterThan(1); // there were steps to stop after
            break;
          }
        }
      }
    });

    it("8 a destroy stopped after each step converges", async () => {
      for (let k = 1; ; k++) {
        const { stack, tag, inputs } = fresh();
        await stack.up(inputs);
        const stopped = await stoppedAfter(k, () => stack.destroy());
        await stack.destroy();
        expect(await resource.look(tag)).toBeUndefined();
        if (!stopped) break;
      }
    });

    it("9 a foreign object of the same name is refused and stays as it is", async () => {
      const { stack, tag, inputs } = fresh();
      await resource.foreign(tag);
      const before = await resource.look(tag);
      expect(before).toBeDefined();
      const run = await changing(() => expect(stack.up(inputs)).rejects.toThrow(Conflict));
      expect(run).toEqual([]);
      expect(await resource.look(tag)).toBe(before);
    });

    it("10 an unknown in any input passes check and diff", async () => {
      const { stack, inputs } = fresh();
      await stack.up(inputs);
      const { recorded } = stack;
      for (const field of Object.keys(inputs)) {
        const news = { ...inputs, [field]: UNKNOWN };
        expect((await stack.check(news))[field]).toBe(UNKNOWN);
        expect(await stack.preview(news)).toBe("update"); // never a reason to replace
      }
      expect(await stack.check({ ...inputs, host: { host: "h", user: UNKNOWN } })).toMatchObject({
        host: { user: UNKNOWN },
      });
      stack.recorded = recorded;
    });

    it("11 no secret in argv or error", async () => {
      const secret = "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0LXNlY3JldA==\n-----END OPENSSH PRIVATE KEY-----\n";
      const { stack, inputs } = fresh();
      const argvs: string[] = [];
      hooks.argv = (_host, argv) => void argvs.push(argv.join(" "));
      const error: unknown = await stack
        .up({ ...inputs, host: { ...DOWN, privateKey: secret, privateKeyPassword: "pass-phrase-word" } })
        .catch((e: unknown) => e);
      delete hooks.argv;
      expect(error).toBeInstanceOf(Error);
      const everything = [String((error as Error).stack), JSON.stringify(error), ...argvs].join("\n");
      expect(everything).not.toContain("c2VjcmV0");
      expect(everything).not.toContain("pass-phrase-word");
    });

    it("12 two runs at once end in one object and a clear answer for the loser", async () => {
      const { tag, inputs, stack } = fresh("one");
      const rival = another(tag, "two");
      const ended = await Promise.allSettled([stack.up(inputs), rival.up(inputs)]);
      const lost = ended.filter((end) => end.status === "rejected");
      expect(lost).toHaveLength(1);
      expect(lost[0]?.reason).toBeInstanceOf(Error);
      expect(String(lost[0]?.reason)).toMatch(/organization\/laws\/(one|two)\//);
      expect(await resource.look(tag)).toBeDefined();
      const [winner, loser] = stack.recorded?.unfinished === false ? [stack, rival] : [rival, stack];
      await loser.destroy();
      expect(await resource.look(tag)).toBeDefined();
      expect(await winner.preview(inputs)).toBe("same");
      await winner.destroy();
      expect(await resource.look(tag)).toBeUndefined();
    });

    it("13 renamed without an alias: the new name is refused, and the object stays", async () => {
      const { tag, inputs, stack } = fresh();
      await stack.up(inputs);
      const renamed = another(tag, "dev", `${tag}new`);
      await expect(renamed.up(inputs)).rejects.toThrow(/aliases/);
      expect(await resource.look(tag)).toBeDefined();
      expect(await stack.preview(inputs)).toBe("same");
    });

    it("13 declared by two stacks: whoever does not own it leaves it, whoever owns it removes it", async () => {
      const { tag, inputs, stack } = fresh("one");
      await stack.up(inputs);
      const other = another(tag, "two");
      await expect(other.up(inputs)).rejects.toThrow(Conflict);
      await other.up({ ...inputs, adopt: true }); // taken over on purpose
      await expect(stack.up({ ...inputs, ...(resource.mutable[0]?.[1] ?? { adopt: true }) })).rejects.toThrow(
        /organization\/laws\/two/,
      );
      await stack.destroy();
      expect(await resource.look(tag)).toBeDefined();
      expect(await other.preview(inputs)).toBe("same");
      await other.destroy();
      expect(await resource.look(tag)).toBeUndefined();
    });

    it("13 replaced under the same identity: the old state's destroy leaves the new object", async () => {
      const { tag, inputs, stack } = fresh();
      await stack.up(inputs);
      const old = stack.recorded;
      await stack.up(inputs, { replace: true });
      const now = stack.recorded;
      stack.recorded = old;
      await stack.destroy();
      expect(await resource.look(tag)).toBeDefined();
      stack.recorded = now;
      expect(await stack.preview(inputs)).toBe("same");
      await stack.destroy();
      expect(await resource.look(tag)).toBeUndefined();
    });
  });
}
