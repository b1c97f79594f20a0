// Pulumi's part of the play, for the law suite: a state, and the calls in the order that the real engine makes them
// (facts: check, then create, or diff and what follows from it; the real engine itself is in test/engine).
import { type Calls, provider } from "../provider/dynamic.js";
import { type Fields, hasUnknown, same } from "../provider/engine-values.js";

export class CheckFailed extends Error {
  readonly failures: { property: string; reason: string }[];
  constructor(failures: { property: string; reason: string }[]) {
    super(failures.map(({ property, reason }) => `${property}: ${reason}`).join("\n"));
    this.failures = failures;
  }
}

interface Recorded {
  id: string;
  inputs: Fields;
  outputs: Fields;
  /** A half-made resource: the next up calls update whatever diff says. */
  unfinished: boolean;
}

const declared = (inputs: Fields) =>
  Object.fromEntries(Object.entries(inputs).filter(([key]) => !key.startsWith("__")));

/** One resource in one stack. */
export class Stack {
  recorded: Recorded | undefined;
  readonly calls: Calls;
  readonly #hidden: Fields;

  constructor(kind: string, name: string, stack = "dev") {
    this.calls = provider(kind);
    this.#hidden = {
      __owner: `organization/laws/${stack}/${kind}/${name}`,
      __provider: `exports.handler=()=>require("pulumi-vmbackup/dynamic").provider("${kind}")`,
    };
  }

  async check(inputs: Fields): Promise<Fields> {
    const checked = await this.calls.check(this.recorded?.inputs ?? {}, {
      ...structuredClone(inputs),
      ...this.#hidden,
    });
    if (checked.failures.length > 0) throw new CheckFailed(checked.failures);
    return checked.inputs;
  }

  /** What a preview says: nothing, an update, or a replacement. */
  async preview(inputs: Fields): Promise<"create" | "same" | "update" | "replace"> {
    const news = await this.check(inputs);
    if (this.recorded === undefined) return "create";
    const { changes, replaces } = await this.calls.diff(this.recorded.id, this.recorded.outputs, news);
    if (replaces.length > 0) return "replace";
    if (this.recorded.unfinished || changes === true || hasUnknown(news)) return "update";
    if (changes === false) return "same";
    return same(declared(this.recorded.inputs), declared(news)) ? "same" : "update";
  }

  async up(inputs: Fields, { replace = false } = {}): Promise<"create" | "same" | "update" | "replace"> {
    const news = await this.check(inputs);
    const act = replace && this.recorded !== undefined ? "replace" : await this.preview(inputs);
    if (act === "same" && this.recorded !== undefined) this.recorded.inputs = news;
    if (act === "replace") await this.destroy(); // the class sets deleteBeforeReplace
    if (act === "create" || act === "replace") await this.#record(news, () => this.calls.create(structuredClone(news)));
    const { recorded } = this;
    if (act === "update" && recorded !== undefined) {
      await this.#record(news, async () => {
        const { outs } = await this.calls.update(recorded.id, structuredClone(recorded.outputs), structuredClone(news));
        return { id: recorded.id, outs };
      });
    }
    return act;
  }

  async #record(inputs: Fields, work: () => Promise<{ id: string; outs: Fields }>): Promise<void> {
    try {
      const { id, outs } = await work();
      this.recorded = { id, inputs, outputs: { ...outs, __provider: inputs.__provider }, unfinished: false };
    } catch (error) {
      const partial = error as { id?: string; properties?: Fields };
      if (partial.id !== undefined && partial.properties !== undefined)
        this.recorded = { id: partial.id, inputs, outputs: partial.properties, unfinished: true };
      throw error;
    }
  }

  async refresh(): Promise<"there" | "gone"> {
    const { recorded } = this;
    if (recorded === undefined) return "gone";
    const read = await this.calls.read(recorded.id, structuredClone(recorded.outputs));
    if (read.id === undefined || read.id === "") {
      this.recorded = undefined;
      return "gone";
    }
    const { __provider } = recorded.inputs;
    recorded.outputs = { ...read.props, __provider };
    if (read.inputs !== undefined) recorded.inputs = { ...read.inputs, __provider };
    return "there";
  }

  async destroy(): Promise<void> {
    if (this.recorded === undefined) return;
    await this.calls.delete(this.recorded.id, structuredClone(this.recorded.outputs));
    this.recorded = undefined;
  }

  /** As if the run had been killed before its result was saved. */
  forget(): void {
    this.recorded = undefined;
  }
}
