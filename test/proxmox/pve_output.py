"""Results as Proxmox VE prints them: text tables, JSON, YAML; and Perl's way with bytes."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

from pve_schema import Props, Schema


# --- bytes --------------------------------------------------------------------

def perl_bytes(text: str) -> bytes:
    """What Perl's print does with a string: Latin-1 while it fits, else UTF-8."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")


def out(text: str) -> None:
    """Print to stdout as Perl would, at once (a killed command loses nothing already said)."""
    _write(1, perl_bytes(text))


def out_utf8(text: str) -> None:
    _write(1, text.encode("utf-8", "surrogateescape"))


def err(text: str) -> None:
    _write(2, perl_bytes(text))


def _write(fd: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(fd, data):]
        except BrokenPipeError:
            os._exit(141)


# --- JSON -----------------------------------------------------------------------

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f", "\b": "\\b"}


def _json_string(text: str) -> str:
    return '"' + re.sub(r'["\\\x00-\x1f\x7f]',
                        lambda m: _ESCAPES.get(m[0]) or "\\u%04x" % ord(m[0]), text) + '"'


def number_text(value: float) -> str:
    return "%.15g" % value


def to_json(data: Any, pretty: bool = False, depth: int = 0) -> str:
    """Canonical (sorted) JSON; numbers as Perl prints them, with 15 digits."""
    pad, end = ("\n" + "   " * (depth + 1), "\n" + "   " * depth) if pretty else ("", "")
    if data is None:
        return "null"
    if data is True or data is False:
        return "true" if data else "false"
    if isinstance(data, int):
        return str(data)
    if isinstance(data, float):
        return number_text(data)
    if isinstance(data, dict):
        if not data:
            return "{}"
        colon = " : " if pretty else ":"
        parts = [_json_string(str(k)) + colon + to_json(data[k], pretty, depth + 1) for k in sorted(data)]
        return "{" + ",".join(pad + p for p in parts) + end + "}"
    if isinstance(data, (list, tuple)):
        if not data:
            return "[]"
        return "[" + ",".join(pad + to_json(v, pretty, depth + 1) for v in data) + end + "]"
    return _json_string(str(data))


# --- YAML -------------------------------------------------------------------------

def _yaml_scalar(value: Any) -> str:
    if value is None:
        return "~"
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if "\n" in text:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    plain = re.fullmatch(r"[A-Za-z0-9_./(+][^#\n]*", text) and ": " not in text and not text.endswith((":", " "))
    if not plain or re.fullmatch(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|true|false|null|yes|no|on|off|~", text, re.I):
        return "'" + text.replace("'", "''") + "'"
    return text


def to_yaml(data: Any, depth: int = 0) -> str:
    pad = "  " * depth
    if isinstance(data, dict):
        lines = ""
        for key in sorted(data):
            value = data[key]
            if isinstance(value, dict) and value:
                lines += f"{pad}{key}:\n" + to_yaml(value, depth + 1)
            elif isinstance(value, list) and value:
                lines += f"{pad}{key}:\n" + to_yaml(value, depth)
            else:
                lines += f"{pad}{key}: {_yaml_inline(value)}\n"
        return lines
    if isinstance(data, list):
        lines = ""
        for item in data:
            if isinstance(item, (dict, list)) and item:
                body = to_yaml(item, depth + 1)
                lines += f"{pad}- " + body[len(pad) + 2:]
            else:
                lines += f"{pad}- {_yaml_inline(item)}\n"
        return lines
    return _yaml_scalar(data) + "\n"


def _yaml_inline(value: Any) -> str:
    return "{}" if value == {} else "[]" if value == [] else _yaml_scalar(value)


def dump_yaml(data: Any) -> str:
    if isinstance(data, (dict, list)) and data:
        return "---\n" + to_yaml(data)
    return "--- " + _yaml_inline(data) + "\n"


# --- text ---------------------------------------------------------------------------

def _render_bytes(value: float) -> str:
    unit = 0
    while value > 1023 and unit < 5:
        value, unit = value / 1024, unit + 1
    return "%.2f %s" % (value, ("B", "KiB", "MiB", "GiB", "TiB", "PiB")[unit])


def _render_duration(value: float) -> str:
    rest, parts = int(value + 0.5), []
    for unit, length in (("w", 604800), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if rest // length:
            parts.append(f"{rest // length}{unit}")
            rest %= length
    return " ".join(parts) or "0s"


RENDERERS = {
    "bytes": _render_bytes, "duration": _render_duration,
    "fraction_as_percentage": lambda value: "%.2f%%" % (value * 100),
    "timestamp": lambda value: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value)),
}


def _cell(value: Any, prop: Schema, human: bool) -> str:
    if value is None:
        return ""
    if human and prop.get("type") == "boolean":
        return "1" if value not in (0, "0", "") else "0"
    if human and prop.get("renderer"):
        return RENDERERS[prop["renderer"]](float(value))
    if isinstance(value, (dict, list)):
        return to_json(value)
    return number_text(value) if isinstance(value, float) else str(value)


def print_table(rows: list[dict], props: Props, columns: list[str], options: dict[str, Any]) -> None:
    utf8 = options.get("utf8", locale_is_utf8())
    border, header = not options.get("noborder"), not options.get("noheader")
    sort_key = options.get("sort_key", columns[0])
    if sort_key:
        numeric = props.get(sort_key, {}).get("type") in ("integer", "number")
        empty = -1 if numeric else ""

        def order(row: dict) -> Any:
            value = row.get(sort_key)
            if value is None:
                return (0, empty)
            return (1, float(value) if numeric else str(value))
        rows = sorted(rows, key=order)
    human = options.get("human-readable", 1)
    width_limit = _terminal_columns()
    titles, cells, widths, left = [], [], [], []
    for column in columns:
        prop = props.get(column, {})
        texts = [_cell(row.get(column), prop, bool(human)).rstrip("\n").split("\n") for row in rows]
        title = prop.get("title", column)
        longest = max([len(title)] + [len(line) for text in texts for line in text])
        cut = prop.get("print_width") or prop.get("maxLength")
        titles.append(title)
        cells.append(texts)
        widths.append(longest if cut is None or cut > longest else cut)
        left.append(prop.get("type") not in ("integer", "number"))

    def line(text: str) -> None:
        text = text[:width_limit] if width_limit else text
        (out_utf8 if utf8 else out)(text + "\n")

    def row_text(parts: list[str]) -> str:
        bar = "│" if utf8 else "|"
        padded = [p[:w].ljust(w) if lf else p[:w].rjust(w) for p, w, lf in zip(parts, widths, left)]
        if border:
            return f"{bar} " + f" {bar} ".join(padded) + f" {bar}"
        return " ".join(padded[:-1] + [parts[-1]])

    def rule(chars: str) -> str:
        start, fill, cross, stop = chars
        return start + cross.join(fill * (w + 2) for w in widths) + stop

    top, head, middle, bottom = (("┌─┬┐", "╞═╪╡", "├─┼┤", "└─┴┘") if utf8 else
                                 ("+-++", "+=++", "+-++", "+-++"))
    if border:
        line(rule(top))
    if header:
        line(row_text(titles))
    separator = rule(head) if header else rule(middle)
    for index in range(len(rows)):
        if border and (index or header):
            line(separator)
            separator = rule(middle)
        height = max(len(column[index]) for column in cells)
        for i in range(height):
            line(row_text([c[index][i] if i < len(c[index]) else "" for c in cells]))
    if border:
        line(rule(bottom))


def _columns_of(props: Props) -> list[str]:
    return (sorted(k for k, s in props.items() if not s.get("optional"))
            + sorted(k for k, s in props.items() if s.get("optional")))


def print_list(rows: list[dict], props: Props, columns: list[str] | None, options: dict[str, Any]) -> None:
    columns = columns or _columns_of(props) or sorted({k for row in rows for k in row})
    print_table(rows, props, columns, options)


def print_result(data: Any, returns: Schema | None, options: dict[str, Any],
                 columns: list[str] | None = None) -> None:
    """PVE::CLIFormatter::print_api_result. A null result prints nothing in any format."""
    if options.get("quiet"):
        return
    fmt = options.get("output-format", "text")
    if returns and returns.get("type"):
        if returns["type"] == "null" or (returns.get("optional") and data is None):
            return
    else:
        kind = ("null" if data is None else "object" if isinstance(data, dict)
                else "array" if isinstance(data, list) else "string")
        returns = {"type": kind}
        if kind == "array":
            returns["items"] = {"type": "object" if data and isinstance(data[0], dict) else "string"}
    if fmt == "json":
        return out_utf8(to_json(data) + "\n")
    if fmt == "json-pretty":
        return out_utf8(to_json(data, True) + "\n")
    if fmt == "yaml":
        return out_utf8(dump_yaml(data))
    if returns["type"] == "object":
        props = returns.get("properties", {})
        keys = columns or _columns_of(props) or sorted(data)
        rows = [{"key": k, "value": _cell(data[k], props.get(k, {}), bool(options.get("human-readable", 1)))}
                for k in keys if data.get(k) is not None]
        return print_table(rows, {}, ["key", "value"], options)
    if returns["type"] == "array":
        if not data:
            return
        item = returns.get("items", {})
        if item.get("type") == "object":
            return print_list(data, item.get("properties", {}), columns, options)
        return print_table([{"value": v} for v in data], {"value": item}, ["value"],
                           {**options, "noheader": 1})
    out_utf8(f"{'' if data is None else data}\n")


# --- locale ---------------------------------------------------------------------------

def _locale_name() -> str:
    return os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or "C"


def _locale_exists(name: str) -> bool:
    if name in ("C", "POSIX") or name.lower().replace("-", "") == "c.utf8":
        return True
    import locale
    try:
        locale.setlocale(locale.LC_CTYPE, name)
        return True
    except locale.Error:
        return False


def locale_is_utf8() -> bool:
    name = _locale_name()
    return "utf8" in name.lower().replace("-", "") and _locale_exists(name)


def warn_about_locale() -> None:
    """Perl's complaint about a locale that is not installed comes with every call."""
    if _locale_exists(_locale_name()):
        return
    show = [("LANGUAGE", os.environ.get("LANGUAGE")), ("LC_ALL", os.environ.get("LC_ALL"))]
    show += [(k, v) for k, v in sorted(os.environ.items()) if k.startswith("LC_") and k != "LC_ALL"]
    show.append(("LANG", os.environ.get("LANG")))
    body = ",\n".join(f"\t{k} = " + (f'"{v}"' if v else "(unset)") for k, v in show)
    err("perl: warning: Setting locale failed.\nperl: warning: Please check that your locale settings:\n"
        + body + "\n    are supported and installed on your system.\n"
        'perl: warning: Falling back to the standard locale ("C").\n')


def decode_argument(arg: str) -> str:
    """An argument's bytes in the caller's locale; in C every non-ASCII byte is lost."""
    raw = os.fsencode(arg)
    if locale_is_utf8():
        return raw.decode("utf-8", "replace")
    return "".join(chr(b) if b < 128 else "\ufffd" for b in raw)


def _terminal_columns() -> int:
    if not sys.stdout.isatty():
        return 0
    try:
        return os.get_terminal_size(1).columns
    except OSError:
        return 0
