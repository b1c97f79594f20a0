"""Proxmox VE's calendar events: the grammar with all its surprises, and the next date.

    [WEEKDAYS] [[YEAR-]MONTH-DAY] [[HOUR:]MINUTE[:SECOND]] [UTC]

Errors say, as the real parser does, where reading stopped and what was expected there.
A field is the list of its allowed values; an empty field allows all.
"""

from __future__ import annotations

import calendar
import re
import time
from typing import NamedTuple

from pve_schema import PveError, register_format

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
LAST_YEAR = 2200


class Event(NamedTuple):
    days: list[int]
    year: list[int]
    month: list[int]
    day: list[int]
    hour: list[int]
    minute: list[int]
    second: list[int]
    utc: bool


WORDS = {   # (month, day, weekday, hour, minute)
    "minutely": ([], [], [], [], []),
    "hourly": ([], [], [], [], [0]),
    "daily": ([], [], [], [0], [0]),
    "weekly": ([], [], [0], [0], [0]),
    "monthly": ([], [1], [], [0], [0]),
    "quarterly": ([1, 4, 7, 10], [1], [], [0], [0]),
    "semiannually": ([1, 7], [1], [], [0], [0]),
    "yearly": ([1], [1], [], [0], [0]),
}
WORDS["semi-annually"] = WORDS["semiannually"]
WORDS["annually"] = WORDS["yearly"]


class _Stop(Exception):
    """Reading failed here: the text that could not be read, and what was wanted."""

    def __init__(self, rest: str, reason: str):
        self.rest, self.reason = rest, reason


def _weekday(text: str) -> tuple[int, str]:
    word = re.match(r"[A-Za-z]*", text)[0]  # type: ignore[index]
    for number, name in enumerate(DAYS):
        if word.lower() in (name, name[:3]):
            return number, text[len(word):]
    raise _Stop(word, 'Context("weekday")')


def _weekday_range(text: str) -> tuple[list[int], str]:
    first, rest = _weekday(text)
    if rest.startswith(".."):
        try:
            last, rest = _weekday(rest[2:])
            return [(first + i) % 7 for i in range((last - first) % 7 + 1)], rest
        except _Stop:
            pass
    return [first], rest


def _number(text: str, end: int) -> tuple[int, str] | None:
    match = re.match(r"\d+", text)
    if not match or int(match[0]) >= end:
        return None
    return int(match[0]), text[len(match[0]):]


def _component(text: str, end: int) -> tuple[list[int], str] | None:
    got = _number(text, end)
    if got is None:
        return None
    first, rest = got
    last = first
    is_range = False
    if rest.startswith(".."):
        upper = _number(rest[2:], end)
        if upper is not None:
            last, rest = upper
            is_range = True
            if first > last:
                return None
    if rest.startswith("/"):
        step = _number(rest[1:], end)
        if step is None:
            return None
        stop = last if is_range else end - 1
        return (list(range(first, stop + 1, step[0])) if step[0] else [first]), step[1]
    return list(range(first, last + 1)), rest


def _field(text: str, start: int, end: int) -> tuple[list[int], str] | None:
    """One field; None when it cannot be read. `*` is the empty list: everything."""
    if text.startswith("*"):
        if text[1:].startswith("/"):
            step = _number(text[2:], end)
            if step is None:
                return None
            if step[0] > 0:
                return list(range(start, end, step[0])), step[1]
        return [], text[1:]
    got = _component(text, end)
    if got is None:
        return None
    values, rest = got
    while rest.startswith(","):
        more = _component(rest[1:], end)
        if more is None:
            break
        values, rest = values + more[0], more[1]
    return sorted(set(values)), rest


def _fields(text: str, wanted: list[tuple[int, int]], separator: str) -> tuple[list[list[int]], str] | None:
    values = []
    for index, (start, end) in enumerate(wanted):
        if index:
            if not text.startswith(separator):
                return None
            text = text[1:]
        got = _field(text, start, end)
        if got is None:
            return None
        values.append(got[0])
        text = got[1]
    return values, text


def _time(text: str) -> tuple[list[list[int]], str] | None:
    hour: list[int] = []
    got = _field(text, 0, 24)
    if got is not None and got[1].startswith(":") and _field(got[1][1:], 0, 60) is not None:
        hour, text = got[0], got[1][1:]
    got = _field(text, 0, 60)
    if got is None:
        return None
    minute, rest = got
    second = [0]
    if rest.startswith(":"):
        more = _field(rest[1:], 0, 60)
        if more is not None:
            second, rest = more
    return [hour, minute, second], rest


def parse(text: str) -> Event:
    text = text.strip()
    if not text:
        raise PveError("unable to parse calendar event - event is empty\n\n")
    try:
        event, rest = _parse(text)
        if rest:
            raise _Stop(rest, "Nom(Eof)")
        return event
    except _Stop as stop:
        raise PveError(f"unable to parse calendar event at '{stop.rest}' - {stop.reason}\n\n", 2) from None


def _parse(text: str) -> tuple[Event, str]:
    word = re.fullmatch(r"([a-z-]+)(\s*UTC)?", text)
    if word and word[1] in WORDS:
        month, day, days, hour, minute = WORDS[word[1]]
        return Event(days, [], month, day, hour, minute, [0], bool(word[2])), ""
    days: list[int] = []
    rest = text
    found = False
    if re.match(r"[A-Za-z]", rest):
        days, rest = _weekday_range(rest)
        while True:
            comma = re.match(r"\s*,\s*", rest)
            if not comma:
                break
            try:
                more, rest = _weekday_range(rest[len(comma[0]):])
            except _Stop:
                break
            days += more
        found = True
        rest = rest.lstrip(" \t") if re.match(r"\s*\S", rest) else rest
    year: list[int] = []
    month: list[int] = []
    day: list[int] = []
    date = _fields(rest, [(1970, LAST_YEAR), (1, 13), (1, 32)], "-") or _fields(rest, [(1, 13), (1, 32)], "-")
    if date:
        values, rest = date
        year, month, day = values if len(values) == 3 else [[], *values]
        found = True
        rest = rest.lstrip(" \t")
    hour, minute, second = [0], [0], [0]
    clock = _time(rest)
    if clock:
        (hour, minute, second), rest = clock
        found = True
    if not found:
        raise _Stop(rest, 'Context("date or time specification")')
    utc = re.fullmatch(r"\s*UTC", rest)
    return Event(sorted(set(days)), year, month, day, hour, minute, second, bool(utc)), "" if utc else rest


def verify(text: str) -> str:
    try:
        parse(text)
    except PveError as error:
        raise PveError(f"invalid calendar event '{text}' - {error.message}") from None
    return text


def next_event(event: Event, last: int) -> int | None:
    """The first matching moment after `last`; None when there is none."""
    split, join = (time.gmtime, calendar.timegm) if event.utc else (time.localtime, lambda t: int(time.mktime(t)))
    now = split(last + 1)
    years = [y for y in (event.year or range(now.tm_year, LAST_YEAR)) if y >= now.tm_year]
    for year in years:
        for month in event.month or range(1, 13):
            if not 1 <= month <= 12 or (year, month) < (now.tm_year, now.tm_mon):
                continue
            for day in range(1, calendar.monthrange(year, month)[1] + 1):
                if (year, month, day) < (now.tm_year, now.tm_mon, now.tm_mday) or (event.day and day not in event.day):
                    continue
                if event.days and calendar.weekday(year, month, day) not in event.days:
                    continue
                today = (year, month, day) == (now.tm_year, now.tm_mon, now.tm_mday)
                for hour in event.hour or range(24):
                    if today and hour < now.tm_hour:
                        continue
                    for minute in event.minute or range(60):
                        if today and (hour, minute) < (now.tm_hour, now.tm_min):
                            continue
                        for second in event.second or range(60):
                            moment = join((year, month, day, hour, minute, second, 0, 0, -1))
                            if moment > last:
                                return moment
    return None


register_format("pve-calendar-event", verify)
