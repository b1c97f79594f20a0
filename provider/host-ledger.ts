// The ledger: the one memory that lives on the host itself. (Skeleton: types first.)
import type { Answer, Command, Host } from "./host.js";

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

export declare function memory(host: Host): Promise<Memory>;

/**
 * One changing step as ONE ssh command: take the object's flock, check that the incarnation in the ledger is `expected`
 * ("" = no line yet), write the line, run the argv. Without a command only the line is written.
 */
export declare function fenced(host: Host, line: Line, expected: string, command?: Command): Promise<Answer>;

/** Removes the line, under the same lock and check. */
export declare function forget(host: Host, line: Line): Promise<void>;
