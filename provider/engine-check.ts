// check and diff: pure, and without a host. check judges the program, diff the program against the record; neither fails or
// replaces because of what a host is like (an error in diff stops the preview of everything else).
import type * as z from "zod";
import { type AnyDefinition, declaredOf, migrated, split } from "./engine.js";
import { type Fields, hasUnknown, plain, same } from "./engine-values.js";

export interface CheckFailure {
  property: string;
  reason: string;
}

/** `a.b[0]` as a program writes it. */
function path(parts: readonly PropertyKey[]): string {
  return parts.map((p, i) => (typeof p === "number" ? `[${p}]` : i === 0 ? String(p) : `.${String(p)}`)).join("");
}

function failures(issue: z.core.$ZodIssue, at: readonly PropertyKey[]): CheckFailure[] {
  const here = [...at, ...issue.path];
  // A union that fails says what each of its forms lacks; the form that got furthest is the one that was meant.
  if (issue.code === "invalid_union" && issue.errors.length > 0) {
    const depth = (issues: z.core.$ZodIssue[]) => Math.max(0, ...issues.map((i) => i.path.length));
    const meant = [...issue.errors].sort((a, b) => depth(b) - depth(a) || a.length - b.length)[0] ?? [];
    if (depth(meant) > 0) return meant.flatMap((inner) => failures(inner, here));
  }
  if (issue.code === "unrecognized_keys")
    return issue.keys.map((key) => ({ property: path([...here, key]), reason: "no such property" }));
  if (issue.code === "invalid_type" && issue.input === undefined)
    return [{ property: path(here), reason: "is required" }];
  return [{ property: path(here), reason: issue.message }];
}

/** Parses one property on its own. */
function parseField(schema: z.ZodType, key: string, value: unknown): { value?: unknown; failures: CheckFailure[] } {
  const result = schema.safeParse(value, { reportInput: true });
  if (result.success) return { value: result.data, failures: [] };
  return { failures: result.error.issues.flatMap((issue) => failures(issue, [key])) };
}

export function check(definition: AnyDefinition, news: Fields): { inputs: Fields; failures: CheckFailure[] } {
  const { inputs, hidden } = split(news);
  const shape: Record<string, z.ZodType> = definition.inputs.shape;
  const found: CheckFailure[] = [];
  const normal: Fields = {};
  const usable = new Set<string>();
  for (const key of Object.keys(inputs)) {
    if (!(key in shape) && inputs[key] !== undefined) found.push({ property: key, reason: "no such property" });
  }
  for (const [key, schema] of Object.entries(shape)) {
    const value = inputs[key] ?? undefined; // Pulumi has null where a program has undefined
    if (hasUnknown(value)) {
      normal[key] = value;
      continue;
    }
    const parsed = parseField(schema, key, value);
    found.push(...parsed.failures);
    if (parsed.failures.length > 0) continue;
    usable.add(key);
    if (parsed.value !== undefined) normal[key] = parsed.value;
  }
  for (const rule of definition.rules) {
    if (!rule.needs.every((field) => usable.has(field))) continue;
    const broken = rule.broken(normal);
    if (broken !== undefined) found.push(broken);
  }
  return { inputs: plain({ ...(found.length > 0 ? inputs : normal), ...hidden }), failures: found };
}

/** Today's normal form of what an earlier run recorded; a value that today's schema refuses stays as it is. */
function renormal(definition: AnyDefinition, declared: Fields): Fields {
  const shape: Record<string, z.ZodType> = definition.inputs.shape;
  return Object.fromEntries(
    Object.entries(declared).map(([key, value]) => {
      const schema = shape[key];
      if (schema === undefined || hasUnknown(value)) return [key, value];
      const parsed = parseField(schema, key, value);
      return [key, parsed.failures.length > 0 ? value : plain(parsed.value)];
    }),
  );
}

export interface Diff {
  /** false: nothing; undefined: the engine compares the inputs itself and shows the detail; true: other work is called for. */
  changes: boolean | undefined;
  replaces: string[];
}

export function diff(definition: AnyDefinition, olds: Fields, news: Fields, id?: string): Diff {
  const state = migrated(definition, olds);
  const before = renormal(definition, declaredOf(definition, state));
  const after = renormal(definition, declaredOf(definition, news));
  // `adopt` is read at creation only: dropping it afterwards is no change.
  const fields = Object.keys(definition.inputs.shape).filter((field) => field !== "adopt");
  const changed = fields.filter((field) => hasUnknown(after[field]) || !same(before[field], after[field]));
  const another = definition.replaceOn.filter((field) => changed.includes(field) && !hasUnknown(after[field]));
  // Renamed by hand (a refresh saw it) and declared as it was made: the same object, whose name `update` puts right.
  const made = id === undefined || another.length === 0 ? {} : definition.fromId(id);
  const replaces = another.filter((field) => !same(made[field], after[field]));
  if (changed.length > 0) return { changes: undefined, replaces };
  const status = state.status as { valid?: boolean } | undefined;
  const lost = status?.valid === false; // the one flag of a status that diff looks at
  const older = Number(olds.__v ?? 0) < definition.version; // also a half-made resource without a version
  const hidden = ["__owner", "__timeouts"].some((key) => !same(olds[key] ?? null, news[key] ?? null));
  return { changes: lost || older || hidden, replaces: [] };
}
