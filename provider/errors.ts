// The errors that a user can meet. Only the message crosses to the user (the provider is another process), so it holds
// everything: what was wanted and what happened; host and command as typed; stderr; what to do next.

/** Terminal control characters in what a host says would act on the reader's terminal; only newline and tab stay. */
export function printable(text: string): string {
  return text.replace(/\u001b\[[0-9;?]*[ -/]*[@-~]/g, "").replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, "");
}

export interface Told {
  /** What was wanted and what happened, one sentence. */
  what: string;
  /** The command as a person would type it, without secrets. */
  command?: string | undefined;
  stderr?: string | undefined;
  /** What to do next, one or two sentences. */
  next: string;
}

abstract class Failure extends Error {
  constructor({ what, command, stderr, next }: Told, cause?: unknown) {
    const said = stderr === undefined ? "" : printable(stderr).trim().slice(-4000);
    super(
      printable([what, command && `$ ${command}`, said, next].filter(Boolean).join("\n")),
      cause === undefined ? {} : { cause },
    );
    this.name = new.target.name;
  }
}

/** No answer, or none in time. Never means that an object is absent. */
export class HostUnreachable extends Failure {}

/** The host ran the command and it failed. */
export class CommandFailed extends Failure {
  readonly exit: number | undefined;
  readonly stderr: string;
  readonly stdout: string;
  constructor(told: Told & { exit?: number | undefined; stdout?: string }, cause?: unknown) {
    super(told, cause);
    this.exit = told.exit;
    this.stderr = told.stderr ?? "";
    this.stdout = told.stdout ?? "";
  }
}

/** The host answered something that is not the answer to the question. Never a default. */
export class UnreadableReport extends Failure {}

/** The object exists, but it is not ours, or somebody else is at work on it. */
export class Conflict extends Failure {}

/** What is declared cannot be had on this host as it is. Nothing was changed. */
export class Refused extends Failure {}

/** Stopped midway: some steps were made, some are left. */
export class Unfinished extends Failure {}
