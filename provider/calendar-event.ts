// Calendar events: when a backup runs. Proxmox's grammar, in a parser of our own, used for both kinds of hosts:
//
//   [WEEKDAYS] [[YEAR-]MONTH-DAY] [TIME] [UTC]        mon..fri 22:00    *-*-01 03:00    sat 02:30 UTC    daily
//
// What Proxmox's parser takes means the same here, except where it reads something else than the writer meant: that is refused with
// its cure. It takes a single number as a minute ("22": every hour at :22), an hour that does not exist as a minute ("25:00": every
// hour at :25), and a second clock time as minute and second ("8:00,12:00": at 8:00 and 8:12). Dates that never come are refused too.
import * as z from "zod";
import type { Report } from "./host.js";

/** One number, range or repetition of a field: `7`, `1..5`, `0/15`, `8..17/3`. */
interface Item {
  from: number;
  to?: number;
  step?: number;
}
/** What a field allows; empty = everything. */
type Field = readonly Item[];

const FIELDS = {
  year: { low: 1970, high: 9999, width: 4 },
  month: { low: 1, high: 12, width: 2 },
  day: { low: 1, high: 31, width: 2 },
  hour: { low: 0, high: 23, width: 2 },
  minute: { low: 0, high: 59, width: 2 },
  second: { low: 0, high: 59, width: 2 },
} as const;
type FieldName = keyof typeof FIELDS;

export interface CalendarEvent extends Readonly<Record<FieldName, Field>> {
  /** Monday is 0; empty = every day. */
  weekdays: readonly number[];
  /** Whether the writer named a date: `02:30` does not. */
  dated: boolean;
  utc: boolean;
  /** The word it was written as: `daily`. */
  word?: string;
}

const DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"] as const;
const LONG_DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"];

const WORDS: Readonly<Record<string, string>> = {
  minutely: "*:*",
  hourly: "*:00",
  daily: "00:00",
  weekly: "mon 00:00",
  monthly: "*-*-01 00:00",
  quarterly: "*-01,04,07,10-01 00:00",
  semiannually: "*-01,07-01 00:00",
  "semi-annually": "*-01,07-01 00:00",
  yearly: "*-01-01 00:00",
  annually: "*-01-01 00:00",
};

/** Why a text is no calendar event, and what to write instead. */
export class NoCalendarEvent extends Error {}

const EXAMPLES = 'write e.g. "02:30", "sat 03:00", "mon..fri 22:00", "*-*-01 04:00" or "daily"';

function no(reason: string): never {
  throw new NoCalendarEvent(reason);
}

// ---------------------------------------------------------------- text -> event

export function parseEvent(text: string): CalendarEvent {
  const trimmed = text.trim();
  if (trimmed === "") no(`is empty: ${EXAMPLES}`);
  if (trimmed.length > 128) no("has more than 128 characters");
  const [, before = "", zone] = /^(.*?)[ \t]*(UTC)?$/s.exec(trimmed) ?? [];
  const word = WORDS[before];
  const parts = (word ?? before).split(/[ \t]+/).filter((part) => part !== "");
  if (word === undefined) refuseOtherGrammars(trimmed, parts);
  const weekdays = /^[a-z]/i.test(parts[0] ?? "") ? parseWeekdays(parts.shift() ?? "") : [];
  const date = parts[0]?.includes("-") ? parts.shift() : undefined;
  const time = parts.shift();
  if (parts.length > 0)
    no(`has ${JSON.stringify(parts.join(" "))} too much: the order is weekdays, date, time; ${EXAMPLES}`);
  const event: CalendarEvent = {
    weekdays,
    ...parseDate(date),
    ...parseTime(time),
    dated: date !== undefined,
    utc: zone !== undefined,
    ...(word === undefined ? {} : { word: before }),
  };
  if (!canCome(event)) no("names a date that never comes");
  return event;
}

function refuseOtherGrammars(text: string, parts: readonly string[]): void {
  const [first = ""] = parts;
  if (first === "") no(`names no time: ${EXAMPLES}`);
  if (first.startsWith("@")) no(`is cron's grammar: write ${JSON.stringify(first.slice(1))} without the @`);
  if (parts.length >= 5 && parts.every((part) => /^[0-9*,/\-a-z]+$/i.test(part)))
    no(`is cron's grammar ("minute hour day month weekday"): ${EXAMPLES}`);
  const lower = first.toLowerCase();
  if (Object.hasOwn(WORDS, lower)) {
    if (lower !== first) no(`words are lower case: write ${JSON.stringify(text.replace(first, lower))}`);
    no(`the word ${lower} stands alone and means ${WORDS[lower]}: to give a time, write e.g. "${clockOf(lower)}"`);
  }
  const zone = parts.length > 1 ? (parts.at(-1) ?? "") : "";
  if (/^[a-z]/i.test(zone))
    no(
      /^utc$/i.test(zone)
        ? 'write "UTC" in capitals'
        : `has ${JSON.stringify(zone)} at its end: only UTC may stand there (else it is the host's own time), and weekdays come first`,
    );
}

/** For who wrote "weekly 02:00". */
function clockOf(word: string): string {
  return (WORDS[word] ?? "").replace("00:00", "02:00").replace("*:00", "*:30").replace("*:*", "*:00/5");
}

function parseWeekdays(text: string): number[] {
  const found = new Set<number>();
  for (const part of text.split(",")) {
    const [first = "", last, ...more] = part.split("..");
    if (more.length > 0) no(`${JSON.stringify(part)} is no range of weekdays: write "mon..fri"`);
    const from = weekday(first, text);
    const to = last === undefined ? from : weekday(last, text);
    // As in Proxmox, a range may go over the end of the week: sun..mon.
    for (let day = from; ; day = (day + 1) % 7) {
      found.add(day);
      if (day === to) break;
    }
  }
  return found.size === 7 ? [] : [...found].sort((a, b) => a - b);
}

function weekday(text: string, all: string): number {
  const lower = text.toLowerCase();
  const index = Math.max((DAYS as readonly string[]).indexOf(lower), LONG_DAYS.indexOf(lower));
  if (index >= 0) return index;
  if (/^[a-z]+-[a-z]+$/i.test(text))
    no(`${JSON.stringify(text)}: a range of weekdays has two dots: ${JSON.stringify(all.replaceAll("-", ".."))}`);
  return no(`${JSON.stringify(text)} is no weekday: mon, tue, wed, thu, fri, sat, sun, or their full English names`);
}

function parseDate(text: string | undefined): Pick<CalendarEvent, "year" | "month" | "day"> {
  if (text === undefined) return { year: [], month: [], day: [] };
  const fields = text.split("-");
  if (fields.length > 3) no(`${JSON.stringify(text)} is no date: write year-month-day or month-day, e.g. "*-12-24"`);
  const [day = "", month = "", year = "*"] = fields.reverse();
  return { year: parseField("year", year), month: parseField("month", month), day: parseField("day", day) };
}

function parseTime(text: string | undefined): Pick<CalendarEvent, "hour" | "minute" | "second"> {
  const zero = [{ from: 0 }];
  if (text === undefined) return { hour: zero, minute: zero, second: zero };
  const [first = "", second, third, ...more] = text.split(":");
  if (second === undefined) {
    refuseBareMinute(first);
    return { hour: [], minute: parseField("minute", first), second: zero };
  }
  if (isListOfTimes(text)) {
    const times = text.split(",");
    no(
      `${JSON.stringify(text)} is no list of times: Proxmox would read the second one as a minute and a second. ${listCure(times)}`,
    );
  }
  if (more.length > 0) no(`${JSON.stringify(text)} is no time: write hour:minute, or hour:minute:second`);
  const wrong = first.split(",").find((item) => /^[0-9]+$/.test(item) && Number(item) > 23);
  if (wrong !== undefined)
    no(
      `${wrong} is no hour (0 to 23): Proxmox would take it as a minute and run ${JSON.stringify(text)} every hour. Write the hour${wrong === "24" ? ', midnight is "00:00"' : ""}, or "*:${wrong}" if every hour is meant`,
    );
  return {
    hour: parseField("hour", first),
    minute: parseField("minute", second),
    second: third === undefined ? zero : parseField("second", third),
  };
}

function refuseBareMinute(text: string): void {
  const items = text.split(",");
  if (!items.every((item) => /^[0-9]+(\.\.[0-9]+)?$/.test(item))) return; // "*/15" and "30/10" can only be minutes
  if (items.some((item) => item.split("..").some((n) => Number(n) > 59)))
    no(`${JSON.stringify(text)} is no time: ${EXAMPLES}`);
  const hours = items.every((item) => item.split("..").every((n) => Number(n) <= 23));
  no(
    `a single number is a minute: ${JSON.stringify(text)} would run every hour at minute ${text}. ${hours ? `Write "${text}:00" for the hour, or ` : "Write "}"*:${text}" if every hour is meant`,
  );
}

/** `8:00,12:00`: each part a clock time. */
function isListOfTimes(text: string): boolean {
  const parts = text.split(",");
  return parts.length > 1 && parts.every((part) => /^(?:[01]?[0-9]|2[0-3]):[0-5]?[0-9](?::[0-5]?[0-9])?$/.test(part));
}

function listCure(times: readonly string[]): string {
  const minutes = new Set(times.map((time) => Number(time.split(":")[1])));
  if (minutes.size > 1) return "Make one BackupSchedule for each time";
  return `Write "${times.map((time) => time.split(":")[0]).join(",")}:${times[0]?.split(":")[1]}"`;
}

function parseField(name: FieldName, text: string): Field {
  if (text === "*") return [];
  return text.split(",").map((item) => parseItem(name, item));
}

function parseItem(name: FieldName, text: string): Item {
  const { low, high } = FIELDS[name];
  const shown = JSON.stringify(text);
  const match = /^(?:(\*)|([0-9]+)(?:\.\.([0-9]+))?)(?:\/([0-9]+))?$/.exec(text);
  if (match === null)
    return no(
      `${shown} is no ${name}: a number, "*", a range "1..5", a repetition "0/5", or a list of these with commas`,
    );
  const [, star, first, last, every] = match;
  if (star !== undefined && every === undefined)
    no(`"*" in a list of ${name}s already means all of them: write "*" alone`);
  const inRange = (n: number) => n >= low && n <= high;
  const from = star === undefined ? Number(first) : low;
  const to = last === undefined ? undefined : Number(last);
  if (!inRange(from) || (to !== undefined && !inRange(to)))
    no(`${shown} is no ${name}: ${low} to ${name === "year" ? "9999" : high}`);
  if (to !== undefined && to < from)
    no(
      `${shown}: a range rises; ${name === "hour" ? `over midnight write "${from}..23,0..${to}"` : "write its two halves as a list"}`,
    );
  if (every !== undefined && (Number(every) < 1 || Number(every) > high))
    no(`${shown}: the repetition is from 1 to ${high}`);
  return {
    from,
    ...(to === undefined ? {} : { to }),
    ...(every === undefined ? {} : { step: Number(every) }),
  };
}

// ---------------------------------------------------------------- event -> text

/** The normal form: what means the same and is written alike; Proxmox takes it. A word stays a word. */
export function formatEvent(event: CalendarEvent): string {
  const zone = event.utc ? " UTC" : "";
  if (event.word !== undefined) return event.word + zone;
  const parts = [
    ...(event.weekdays.length === 0 ? [] : [weekdayText(event.weekdays)]),
    ...(event.dated ? [(["year", "month", "day"] as const).map((name) => fieldText(name, event[name])).join("-")] : []),
    `${fieldText("hour", event.hour)}:${fieldText("minute", event.minute)}${isZero(event.second) ? "" : `:${fieldText("second", event.second)}`}`,
  ];
  return parts.join(" ") + zone;
}

/** The meaning without the wording: "daily" and "00:00" are equal. */
export function sameEvent(a: string, b: string): boolean {
  const meaning = (text: string) => {
    const { word: _, dated: __, ...event } = parseEvent(text);
    return JSON.stringify([
      event.weekdays,
      event.utc,
      ...(Object.keys(FIELDS) as FieldName[]).map((name) =>
        name === "year" ? event.year : valuesOf(name, event[name]),
      ),
    ]);
  };
  try {
    return a === b || meaning(a) === meaning(b);
  } catch {
    return false; // a host may hold what we refuse
  }
}

/** What systemd takes as OnCalendar= (systemd.time(7)): nearly the same grammar, with the date and the seconds always written. */
export function onCalendar(event: CalendarEvent): string {
  const days = event.weekdays.map((day) => `${DAYS[day]?.charAt(0).toUpperCase()}${DAYS[day]?.slice(1)}`).join(",");
  const date = (["year", "month", "day"] as const).map((name) => fieldText(name, event[name])).join("-");
  const time = (["hour", "minute", "second"] as const).map((name) => fieldText(name, event[name])).join(":");
  return [days, date, time, event.utc ? "UTC" : ""].filter((part) => part !== "").join(" ");
}

const isZero = (field: Field) => field.length === 1 && field[0]?.from === 0 && Object.keys(field[0]).length === 1;

function fieldText(name: FieldName, field: Field): string {
  if (field.length === 0) return "*";
  const pad = (n: number) => String(n).padStart(FIELDS[name].width, "0");
  const item = ({ from, to, step }: Item) =>
    `${pad(from)}${to === undefined ? "" : `..${pad(to)}`}${step === undefined ? "" : `/${step}`}`;
  return [...new Set([...field].sort((a, b) => a.from - b.from).map(item))].join(",");
}

function weekdayText(days: readonly number[]): string {
  const runs: number[][] = [];
  for (const day of days) {
    const run = runs.at(-1);
    if (run?.at(-1) === day - 1) run.push(day);
    else runs.push([day]);
  }
  const name = (day: number | undefined) => DAYS[day ?? 0];
  return runs
    .map((run) => (run.length < 3 ? run.map(name).join(",") : `${name(run[0])}..${name(run.at(-1))}`))
    .join(",");
}

// ---------------------------------------------------------------- event -> times

function allows(field: Field, value: number): boolean {
  return (
    field.length === 0 ||
    field.some(({ from, to, step }) => {
      const last = to ?? (step === undefined ? from : Number.POSITIVE_INFINITY);
      return value >= from && value <= last && (value - from) % (step ?? 1) === 0;
    })
  );
}

function valuesOf(name: FieldName, field: Field): number[] {
  const { low, high } = FIELDS[name];
  return Array.from({ length: high - low + 1 }, (_, i) => low + i).filter((value) => allows(field, value));
}

const DAY = 86_400;

function comesOn(event: CalendarEvent, day: Date): boolean {
  return (
    allows(event.year, day.getUTCFullYear()) &&
    allows(event.month, day.getUTCMonth() + 1) &&
    allows(event.day, day.getUTCDate()) &&
    (event.weekdays.length === 0 || event.weekdays.includes((day.getUTCDay() + 6) % 7))
  );
}

/** The calendar repeats after 400 years; years that are named are looked at themselves. */
function canCome(event: CalendarEvent): boolean {
  if (!event.dated) return true;
  const named = event.year.length > 0;
  const years = named ? valuesOf("year", event.year).slice(0, 400) : Array.from({ length: 400 }, (_, i) => 2000 + i);
  return years.some((year) =>
    valuesOf("month", event.month).some((month) =>
      valuesOf("day", event.day).some((day) => {
        const date = new Date(Date.UTC(year, month - 1, day));
        return date.getUTCMonth() === month - 1 && comesOn(event, date);
      }),
    ),
  );
}

/**
 * The first event after a moment, both in seconds of the clock on the wall (as if it were UTC), whatever the zone; undefined when
 * none comes. The calendar repeats after 400 years.
 */
export function nextOnTheWall(event: CalendarEvent, after: number): number | undefined {
  const times = { hour: valuesOf("hour", event.hour), minute: valuesOf("minute", event.minute) };
  const seconds = valuesOf("second", event.second);
  const first = Math.floor((after + 1) / DAY);
  for (let day = first; day <= first + 401 * 366; day++) {
    const date = new Date(day * DAY * 1000);
    if (!allows(event.year, date.getUTCFullYear())) {
      day = Date.UTC(date.getUTCFullYear() + 1, 0, 1) / 1000 / DAY - 1;
      continue;
    }
    if (!comesOn(event, date)) continue;
    for (const hour of times.hour) {
      const startOfHour = day * DAY + hour * 3600;
      if (startOfHour + 3599 <= after) continue;
      for (const minute of times.minute) {
        const second = seconds.find((s) => startOfHour + minute * 60 + s > after);
        if (second !== undefined) return startOfHour + minute * 60 + second;
      }
    }
  }
  return undefined;
}

/** Seconds that the clock on the wall is ahead of UTC at a moment (in seconds). */
function offsetOf(zone: string): (at: number) => number {
  const format = new Intl.DateTimeFormat("en-US", {
    timeZone: zone,
    hourCycle: "h23",
    year: "numeric",
    month: "numeric",
    day: "numeric",
    hour: "numeric",
    minute: "numeric",
    second: "numeric",
  });
  return (at) => {
    const part = Object.fromEntries(format.formatToParts(at * 1000).map(({ type, value }) => [type, Number(value)]));
    const { year = 0, month = 1, day = 1, hour = 0, minute = 0, second = 0 } = part;
    return Date.UTC(year, month - 1, day, hour, minute, second) / 1000 - at;
  };
}

/**
 * What the next changes of the clock (within 400 days) do to an event: one sentence, or undefined. An event of every hour loses
 * nothing that its next run does not make good.
 */
export function clockChanges(event: CalendarEvent, zone: string, now: number): string | undefined {
  if (event.utc || event.hour.length === 0) return undefined;
  let offset: (at: number) => number;
  try {
    offset = offsetOf(zone);
  } catch {
    return undefined; // a zone that this machine does not know
  }
  const said: string[] = [];
  // Whole seconds: a fraction would be seen as a change of the offset.
  for (let from = Math.floor(now); from < now + 400 * DAY; from += DAY) {
    const [before, after] = [offset(from), offset(from + DAY)];
    if (before === after) continue;
    const at = whenItChanges(offset, from, from + DAY);
    const [start, end] = [at + Math.min(before, after), at + Math.max(before, after)];
    const hit = nextOnTheWall(event, start - 1);
    if (hit === undefined || hit >= end) continue;
    const date = new Date(hit * 1000).toISOString();
    said.push(`${date.slice(0, 10)} ${date.slice(11, 16)} ${after > before ? "does not exist" : "comes twice"}`);
  }
  if (said.length === 0) return undefined;
  return `schedule ${formatEvent(event)}: in ${zone} the clock changes and ${said.join(", ")}; the backup may then be late, left out or made twice. Choose another hour, or append "UTC".`;
}

function whenItChanges(offset: (at: number) => number, from: number, to: number): number {
  const before = offset(from);
  let [low, high] = [from, to];
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (offset(middle) === before) low = middle;
    else high = middle;
  }
  return high;
}

/** Name of a host's time zone, e.g. Europe/Prague; "" when it cannot be told (a copied file), or when there is none (UTC). */
export const timeZone: Report<string> = {
  why: "read the time zone",
  argv: ["readlink", "-f", "/etc/localtime"],
  parse: (stdout) => /\/zoneinfo\/(?:posix\/|right\/)?(.+)$/.exec(stdout.trim())?.[1] ?? "",
  answer: z.string(),
};

// ---------------------------------------------------------------- the input

/** The `schedule` of a BackupSchedule, in normal form. */
export const schedule = z
  .string({ error: (issue) => (issue.input === undefined ? "is required" : `is text: ${EXAMPLES}`) })
  .transform((text, context) => {
    try {
      return formatEvent(parseEvent(text));
    } catch (error) {
      context.addIssue(`${JSON.stringify(text)} ${error instanceof Error ? error.message : String(error)}`);
      return z.NEVER;
    }
  });
