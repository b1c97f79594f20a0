// The harness itself: a real engine, a program in each language, a resource that needs no host.
import { describe, expect, it } from "vitest";
import { useProjects } from "./project.ts";

const provider = `exports.handler = () => ({
  check: async (olds, news) => ({ inputs: news, failures: [] }),
  diff: async (id, olds, news) => ({ changes: olds.text !== news.text }),
  create: async (inputs) => { if (inputs.text === "bad") throw new Error("no such text"); return { id: "one", outs: inputs }; },
  update: async (id, olds, news) => ({ outs: news }),
  delete: async () => {},
})`;

const body = (text: string) => `
class Trivial extends pulumi.CustomResource {
  constructor(name, args) {
    super("pulumi-nodejs:dynamic/test:Trivial", name, { ...args, __provider: ${JSON.stringify(provider)} });
  }
}
new Trivial("a", { text: ${JSON.stringify(text)} });
`;

const head = {
  typescript: 'import * as pulumi from "@pulumi/pulumi";',
  esm: 'import * as pulumi from "@pulumi/pulumi";',
  cjs: 'const pulumi = require("@pulumi/pulumi");',
};
const untyped = (source: string) =>
  source.replace("constructor(name, args)", "constructor(name: string, args: object)");

describe("the engine's harness", () => {
  const project = useProjects();

  it.each(["typescript", "esm", "cjs"] as const)("runs a program in %s", async (language) => {
    const source = (text: string) => `${head[language]}${language === "typescript" ? untyped(body(text)) : body(text)}`;
    const it = await project(source("x"), { language });
    const first = await it.up();
    expect(first).toMatchObject({ exitCode: 0, summary: { create: 2 } });
    expect(await it.preview("--expect-no-changes")).toMatchObject({ exitCode: 0, summary: { same: 2 } });
    await it.write(source("y"));
    expect((await it.up()).summary).toMatchObject({ update: 1 });
    expect(await it.resources()).toMatchObject([{ id: "one", outputs: { text: "y" } }]);
    expect((await it.destroy()).exitCode).toBe(0);
    expect(await it.resources()).toEqual([]);
  });

  it("reports what failed", async () => {
    const it = await project(head.cjs + body("bad"), { language: "cjs" });
    const run = await it.up();
    expect(run.exitCode).not.toBe(0);
    expect(run.diagnostics.map(({ message }) => message).join("")).toContain("no such text");
  });
});
