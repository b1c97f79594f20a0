const WORDS = [
  /(^|\s|["'])--force(\s|["']|=|$)/,
  /--purge\b/,
  /--skiplock\b/,
  /--destroy-unreferenced-disks\b/,
  /\bumount\b[^;|&\n]*\s(-[a-z]*[lf][a-z]*|--lazy|--force)(\s|$)/,
  /\brm\s+(-[a-zA-Z]*[rR][a-zA-Z]*|--recursive)\b/,
  /StrictHostKeyChecking[= ](?!yes\b)/,
  /(^|[\s;&|(])sync\s*($|[;&|)])/, // without a file it flushes everything, and hangs for minutes on one dead mount
];

/** The forbidden word in a command line, or undefined. */
export function forbidden(text: string): string | undefined {
  return WORDS.map((word) => word.exec(text)?.[0]).find((found) => found !== undefined);
}
