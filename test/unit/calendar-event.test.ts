import { describe, expect, it } from "vitest";
import * as z from "zod";
import {
  clockChanges,
  formatEvent,
  NoCalendarEvent,
  nextOnTheWall,
  onCalendar,
  parseEvent,
  sameEvent,
  schedule,
} from "../../provider/calendar-event.js";
import { recording } from "../captures.js";

/** What the real parser was recorded to do. */
const recorded = recording("pve/calendar-events").map((row) => {
  const option = (name: string) => row.cmd[row.cmd.indexOf(name) + 1] ?? "";
  const answer = z.array(z.object({ timestamp: z.number() }));
  return {
    text: option("--schedule"),
    from: Number(option("--starttime")),
    accepted: row.exit === 0,
    events: row.exit === 0 ? answer.parse(JSON.parse(row.stdout)).map((e) => e.timestamp) : [],
  };
});

/** Accepted by Proxmox, refused by us because it does not mean what it says: with the cure that the reason has to name. */
const misread: Record<string, string> = {
  "25:00": '"*:25"',
  "24:00": 'midnight is "00:00"',
  "25": '"*:25"',
  "22": '"22:00"',
  "59": '"*:59"',
  "mon..fri 22": '"22:00"',
  "mon..fri 8:00,12:00": '"8,12:00"',
  "*-02-30": "never comes",
};

/** As schedule-analyze goes on after the last event: with the epoch, which stands for "none". */
function following(text: string, from: number, count: number): number[] {
  const event = parseEvent(text);
  const found: number[] = [];
  for (let at = from; found.length < count; at = found.at(-1) ?? 0) found.push(nextOnTheWall(event, at) ?? 0);
  return found;
}

function reason(text: string): string {
  try {
    parseEvent(text);
  } catch (error) {
    if (error instanceof NoCalendarEvent) return error.message;
    throw error;
  }
  return "";
}

describe("every recorded row", () => {
  it("is there", () => expect(recorded.length).toBeGreaterThanOrEqual(54));

  it.each(recorded)("$text", ({ text, from, accepted, events }) => {
    const cure = misread[text];
    if (!accepted) expect(reason(text)).not.toBe("");
    else if (cure !== undefined) expect(reason(text)).toContain(cure);
    else {
      expect(following(text, from, events.length)).toEqual(events);
      expect(following(formatEvent(parseEvent(text)), from, events.length)).toEqual(events); // the normal form means the same
    }
  });
});

it.each([
  ["2:30", "02:30"],
  [" 2:30 ", "02:30"],
  ["02:30UTC", "02:30 UTC"],
  ["Mon 02:30", "mon 02:30"],
  ["monday,wednesday,tuesday 2:5", "mon..wed 02:05"],
  ["mon..sun 1:00", "01:00"],
  ["sun..mon 1:00", "mon,sun 01:00"],
  ["sat", "sat 00:00"],
  ["*", "*:*"],
  ["*/15", "*:00/15"],
  ["12,8:00", "08,12:00"],
  ["12-24", "*-12-24 00:00"],
  ["02:30:30", "02:30:30"],
  ["daily", "daily"],
  ["daily UTC", "daily UTC"],
])("%j in normal form is %j", (text, normal) => expect(schedule.parse(text)).toBe(normal));

it.each([
  ["daily", "00:00", true],
  ["weekly", "mon", true],
  ["*/15", "*:0,15,30,45", true],
  ["02:30", "2:30", true],
  ["02:30", "02:30 UTC", false],
  ["02:30", "25:00", false], // what a host may hold and we refuse
])("%j and %j mean the same: %j", (a, b, equal) => expect(sameEvent(a, b)).toBe(equal));

it.each([
  ["", "is empty"],
  ["UTC", "names no time"],
  ["Daily", '"daily"'],
  ["weekly 02:00", '"mon 02:00"'],
  ["hourly 30", '"*:30"'],
  ["@daily", '"daily" without the @'],
  ["30 2 * * *", "cron"],
  ["30 2 * * 1-5", "cron"],
  ["02:30 utc", '"UTC" in capitals'],
  ["02:30 CET", "only UTC may stand there"],
  ["2:30 mon", "weekdays come first"],
  ["mon-fri 2:00", '"mon..fri"'],
  ["mo 2:30", "no weekday"],
  ["mon,", "no weekday"],
  ["22..02:00", '"22..23,0..2"'],
  ["8:00,12:30", "one BackupSchedule for each"],
  ["9..17", '"9..17:00"'],
  ["30..45", '"*:30..45"'],
  ["61", "no time"],
  ["23:60", "0 to 59"],
  ["*:0/0", "repetition"],
  ["*:0/90", "repetition"],
  ["*,5:00", '"*" alone'],
  ["*-13-01", "1 to 12"],
  ["*-4-31", "never comes"],
  ["mon 2026-11-29", "never comes"],
  ["1:2:3:4", "hour:minute"],
  ["a".repeat(129), "128"],
])("%j is refused: %s", (text, part) => {
  const result = schedule.safeParse(text);
  expect(result.success).toBe(false);
  expect(result.error?.issues[0]?.message).toContain(part);
});

it.each([
  ["02:30", "*-*-* 02:30:00"],
  ["mon..fri,sun 8..17:0/30", "Mon,Tue,Wed,Thu,Fri,Sun *-*-* 08..17:00/30:00"],
  ["*/15", "*-*-* *:00/15:00"],
  ["monthly UTC", "*-*-01 00:00:00 UTC"],
  ["quarterly", "*-01,04,07,10-01 00:00:00"],
  ["2030-11-30 10:00", "2030-11-30 10:00:00"],
])("%j for systemd is %j", (text, calendar) => expect(onCalendar(parseEvent(text))).toBe(calendar));

describe("changes of the clock", () => {
  const now = Date.UTC(2026, 10, 30) / 1000;
  it.each([
    ["02:30", "Europe/Prague", "2027-03-28 02:30 does not exist, 2027-10-31 02:30 comes twice"],
    ["01:30", "Europe/London", "2027-03-28 01:30 does not exist"],
    ["sun 02:00", "America/New_York", "2027-03-14 02:00 does not exist"],
  ])("%j in %s", (text, zone, part) => expect(clockChanges(parseEvent(text), zone, now + 0.123)).toContain(part));

  it.each([
    ["03:30", "Europe/Prague"],
    ["02:30 UTC", "Europe/Prague"],
    ["02:30", "Etc/UTC"],
    ["02:30", "Asia/Tokyo"],
    ["*:30", "Europe/Prague"],
    ["mon 02:30", "Europe/Prague"], // the clocks change on Sundays
    ["02:30", "No/Such"],
  ])("%j in %s: nothing to say", (text, zone) => expect(clockChanges(parseEvent(text), zone, now)).toBeUndefined());
});
