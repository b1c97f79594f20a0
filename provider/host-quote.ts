// From words to one string: the only quoting function. ssh hands one string to the login shell, so it is needed once, there.

const PLAIN = /^[A-Za-z0-9_@%+:,./-][A-Za-z0-9_@%+=:,./-]*$/;
const ASSIGNMENT = /^\w+=/;

/** Words as one string that a POSIX shell reads back as exactly these words. */
export function quote(argv: readonly string[]): string {
  return argv
    .map((word) => (PLAIN.test(word) && !ASSIGNMENT.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`))
    .join(" ");
}

/** A command as a person would type it; for messages. */
export function shown(command: { argv: readonly string[]; shown?: readonly string[] | undefined }): string {
  return quote(command.shown ?? command.argv);
}
