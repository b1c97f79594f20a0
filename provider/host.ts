// The host: the only place that spawns ssh, and the only quoting function. (Skeleton: types first.)
import type * as z from "zod";

/** A command as an array, never a shell string. */
export type Argv = readonly [string, ...string[]];

export interface Command {
  /** What it is for, as the end of "Unable to …": "take the snapshot vg0/dump". */
  why: string;
  argv: Argv;
  /** Goes to the command's standard input; never shown. Secrets travel here and nowhere else. */
  stdin?: string | undefined;
  /** Seconds until we give up waiting, whether or not the remote command can be killed. Default 120. */
  timeout?: number | undefined;
  /** What to do when it fails; the last line of the error. */
  next?: string | undefined;
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

export interface Host {
  /** As the program names it; for messages. */
  readonly name: string;
  /** Runs a command; a failure is CommandFailed, no answer is HostUnreachable. */
  run(command: Command): Promise<Answer>;
  /** Asks a question. Identical questions that have not started yet are asked once; nobody joins one that has started. */
  ask<T>(report: Report<T>): Promise<T>;
}
