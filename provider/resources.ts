// The resources by kind: a new one is its own file and a line here.
import type { AnyDefinition } from "./engine.js";
import { lvSnapshot } from "./lv-snapshot.js";
import { vmIdRange } from "./vm-id-range.js";

export const resources: Readonly<Record<string, AnyDefinition>> = { LvSnapshot: lvSnapshot, VmIdRange: vmIdRange };
