"""Commands and API methods: how a line of words becomes a call, as PVE::CLIHandler does it.

    METHOD = Method("GET", "/cluster/nextid", params={...}, returns={...})(function)
    run("pvesm", {"add": Command(METHOD, ["type", "storage"]), "scan": {"nfs": ...}}, sys.argv[1:])

A Method registers itself under verb and path, so that pvesh finds it; the same
object serves any number of commands. Its function takes the dict of parameters
(path parameters included) and returns plain data.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Callable, NamedTuple, Union

import misbehave
import process_title
from pve_output import (decode_argument, err, out, print_result, warn_about_locale)
from pve_schema import (NotCovered, Props, PveError, PveException, Schema, get_options, validate)

OUTPUT_OPTIONS: Props = {
    "output-format": {"type": "string", "enum": ["text", "json", "json-pretty", "yaml"],
                      "optional": 1, "default": "text"},
    "noheader": {"type": "boolean", "optional": 1, "default": 0},
    "noborder": {"type": "boolean", "optional": 1, "default": 0},
    "quiet": {"type": "boolean", "optional": 1},
    "human-readable": {"type": "boolean", "optional": 1, "default": 1},
}

REGISTRY: dict[tuple[str, str], "Method"] = {}


class Method:
    """One API method. `group` is its Perl class: usage texts put a blank line between groups."""

    def __init__(self, verb: str, path: str, params: Props | None = None, returns: Schema | None = None,
                 group: str = "", description: str = "", proxy: str | None = None):
        self.verb, self.path, self.group = verb, path, group
        self.params = params or {}
        self.returns = returns
        self.description = description
        # The path parameter that names the node which must answer ("node", as in the real API).
        self.proxy = proxy if proxy is not None else ("node" if "{node}" in path else None)
        self.function: Callable[[dict], Any] | None = None
        if path:
            REGISTRY[(verb, path)] = self

    def __call__(self, function: Callable[[dict], Any]) -> "Method":
        self.function = function
        return self

    def handle(self, params: dict[str, Any]) -> Any:
        """Check the parameters, then do it."""
        for name, schema in self.params.items():
            if schema.get("type") == "array" and params.get(name) and not isinstance(params[name], list):
                params[name] = [params[name]]
        validate(params, self.params)
        if self.function is None:
            raise NotCovered(self.description or f"{self.verb} {self.path}")
        return self.function(params)


class Command(NamedTuple):
    method: Method
    args: Any = ()                       # positional parameters; a str for one list parameter
    fixed: dict[str, Any] = {}
    output: Callable[..., None] | None = None   # called with (result) or (result, format options)
    format_options: bool = False


class Alias(NamedTuple):
    target: str


Commands = dict[str, Union[Command, Alias, "Commands"]]


# --- usage -----------------------------------------------------------------------

def usage_line(prefix: str, method: Method, args: Any, fixed: dict[str, Any], format_options: bool) -> str:
    format_options = format_options or "output-format" in method.params
    names = [args] if isinstance(args, str) else list(args)
    parts = []
    for name in names:
        schema = method.params.get(name)
        if schema is None:
            continue
        is_list = "-list" in str(schema.get("format", ""))
        parts.append("{<%s>}" % name if is_list else f"[<{name}>]" if schema.get("optional") else f"<{name}>")
    others = {n: s for n, s in method.params.items() if n not in names and n not in fixed
              and not ("output-format" in method.params and n in OUTPUT_OPTIONS)}
    for name in sorted(others):
        if not others[name].get("optional"):
            parts.append(f"--{name} <{others[name].get('type', 'string')}>")
    line = f"{prefix} {' '.join(parts)}"
    if any(n for n in others):
        line += " [OPTIONS]"
    return line + (" [FORMAT_OPTIONS]" if format_options else "") + "\n"


def usage_list(prefix: str, commands: Commands, separator: str = "\n") -> str:
    def order(name: str) -> tuple:
        entry = commands[name]
        return (isinstance(entry, Command), entry.method.group if isinstance(entry, Command) else "", name)

    text, last_group = "", None
    for name in sorted((n for n, e in commands.items() if not isinstance(e, Alias)), key=order):
        entry = commands[name]
        if isinstance(entry, Command):
            if last_group is not None and last_group != entry.method.group:
                text += separator
            last_group = entry.method.group
            text += " " * 7 + usage_line(f"{prefix} {name}", entry.method, entry.args, entry.fixed,
                                         entry.format_options)
        else:
            text += usage_list(f"{prefix} {name}", entry, "") + separator
    return text


def _abort(prog: str, commands: Commands, reason: str, prefix: str | None = None,
           sub: Commands | None = None) -> None:
    text = f"ERROR: {reason}\nUSAGE: {prog} <COMMAND> [ARGS] [OPTIONS]\n\n"
    text += usage_list(prefix or prog, sub, "") if sub is not None else usage_list(prog, commands)
    err(text)
    sys.exit(255)


# --- running ------------------------------------------------------------------------

def call(prefix: str, command: Command, words: list[str]) -> Any:
    """PVE::RESTHandler::cli_handler: a parameter error gets the usage line added."""
    method = command.method
    props = {**method.params, **(OUTPUT_OPTIONS if command.format_options else {})}
    try:
        args = command.args if isinstance(command.args, str) else list(command.args)
        params = get_options(props, words, args, command.fixed, lambda line: err(line + "\n"))
        formats = {k: params.pop(k) for k in OUTPUT_OPTIONS
                   if command.format_options and k not in method.params and k in params}
        return method.handle(params), formats
    except PveException as error:
        if error.code != 400:
            raise
        error.usage = usage_line(prefix, method, command.args, command.fixed, command.format_options)
        if not error.exit_is_fixed:
            error.exit_code = PARAMETER_EXIT_CODE
        raise


# Perl leaves with errno, and after checking parameters that is mostly a stale ENOENT in
# pvesm and nothing (255) elsewhere. It has no meaning; the tools set what was seen.
PARAMETER_EXIT_CODE = 255

HELP = Method("GET", "", {"extra-args": {"type": "string", "optional": 1},
                          "verbose": {"type": "boolean", "optional": 1}}, group="PVE::CLIHandler")


def run_command(prog: str, commands: Commands, words: list[str]) -> None:
    commands = {**commands, "help": Command(HELP, ["extra-args"])}
    if not words:
        _abort(prog, commands, "no command specified")
    if words[0] == "verifyapi":
        return
    level, prefix, rest, resolved = commands, prog, list(words), 0
    while rest:
        if resolved > 8:
            raise PveError("alias loop detected\n")
        word = rest[0]
        if word not in level:
            matches = [n for n, e in level.items() if n.startswith(word) and not isinstance(e, Alias)]
            word = matches[0] if len(matches) == 1 else word
        prefix += f" {word}"
        entry = level.get(word)
        if entry is None:
            # An ambiguous word counts as the beginning of a command; its usage is the whole level's.
            if any(n.startswith(word) for n, e in level.items() if not isinstance(e, Alias)):
                _abort(prog, commands, f"incomplete command '{prefix}'", prefix, level)
            _abort(prog, commands, f"unknown command '{prefix}'")
        if isinstance(entry, Alias):
            prefix = prefix[: -len(word) - 1]
            rest[0:1] = entry.target.split()
            resolved += 1
            continue
        rest.pop(0)
        if isinstance(entry, Command):
            if entry.method is HELP:
                return _help(prog, commands, rest)
            misbehave.point(prefix.replace(" ", "."), "start")
            result, formats = call(prefix, entry, rest)
            if entry.output:
                if entry.format_options:
                    entry.output(result, formats)
                else:
                    entry.output(result)
            misbehave.point(prefix.replace(" ", "."), "end")
            return
        level = entry
    _abort(prog, commands, f"incomplete command '{prefix}'", prefix, level)


def _help(prog: str, commands: Commands, words: list[str]) -> None:
    options = get_options(HELP.params, words, ["extra-args"], {}, lambda line: err(line + "\n"))
    wanted = options.get("extra-args") or []
    level: Any = commands
    prefix = prog
    for word in wanted:
        if isinstance(level, dict):
            level = level.get(word)
            level = commands.get(level.target) if isinstance(level, Alias) else level
            prefix += f" {word}"
    if level is None:
        _abort(prog, commands, f"unknown command '{wanted[0]}'")
    # Naming a command, or nothing at all, asks for every description.
    if options.get("verbose", 1):
        raise NotCovered(f"{prog} help {' '.join(wanted)}: the descriptions of all parameters")
    out("USAGE: " + _plain_usage(prefix, level).lstrip() + "\n")


def _plain_usage(prefix: str, level: Command | Commands) -> str:
    if isinstance(level, Command):
        return " " * 7 + usage_line(prefix, level.method, level.args, level.fixed, level.format_options)
    return "".join(_plain_usage(f"{prefix} {name}", level[name]) for name in sorted(level)  # type: ignore[arg-type]
                   if not isinstance(level[name], Alias))


def formatted(returns_of: Method) -> Callable[..., None]:
    """An `output` that prints with the standard format options."""
    def show(result: Any, formats: dict[str, Any] | None = None) -> None:
        print_result(result, returns_of.returns, formats or {})
    return show


def guarded(prog: str, main: Callable[[], Any]) -> None:
    """Run a command's body with the real tools' surroundings and ways to die."""
    os.environ["PATH"] = "/usr/local/sbin:/sbin:/bin:/usr/sbin:/usr/bin"
    warn_about_locale()
    try:
        _check_cluster_file_system()
        main()
        code = 0
    except PveError as error:
        err(error.text())
        code = error.exit_code
    except NotCovered as gap:
        err(f"{prog} stand-in: not covered: {gap}\n")
        code = 70
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        err(f"{error.strerror or error}" + (f" - {error.filename}" if error.filename else "") + "\n")
        code = error.errno or 255
    except Exception:  # noqa: BLE001 - a fault of the stand-in must never look like an answer of the tool
        import traceback
        traceback.print_exc()
        code = 70
    os._exit(code)


def run(prog: str, commands: Commands, argv: list[str]) -> None:
    words = [decode_argument(a) for a in argv]
    process_title.look_like_perl(prog, argv)
    guarded(prog, lambda: run_command(prog, commands, words))


def run_simple(prog: str, command: Command, argv: list[str], prepare: Callable[[], None] | None = None) -> None:
    """A tool without sub-commands (qmrestore, vzdump)."""
    words = [decode_argument(a) for a in argv]
    process_title.look_like_perl(prog, argv)

    def main() -> None:
        misbehave.point(prog, "start")
        result, _ = call(prog, command, words)
        if command.output:
            command.output(result)
        misbehave.point(prog, "end")
    guarded(prog, main)


def _check_cluster_file_system() -> None:
    failure = None
    if os.geteuid() != 0:
        failure, code = "Unknown error -1", 255
    elif misbehave.is_set("pmxcfs-down"):
        failure, code = "Connection refused", 111
    if failure:
        raise PveError(f"ipcc_send_rec[1] failed: {failure}\nipcc_send_rec[2] failed: {failure}\n"
                       f"ipcc_send_rec[3] failed: {failure}\nUnable to load access control list: {failure}\n", code)


# --- finding a method by path -----------------------------------------------------------

def find_method(verb: str, path: str) -> tuple[Method | None, dict[str, str]]:
    """The method for a path; literal parts win over parameters; `{volume}` may contain slashes."""
    parts = [p for p in path.split("/") if p]
    best: tuple[int, Method, dict[str, str]] | None = None
    for (method_verb, pattern), method in REGISTRY.items():
        if method_verb != verb:
            continue
        wanted = [p for p in pattern.split("/") if p]
        found = _match(wanted, parts)
        if found is not None:
            literal = sum(not p.startswith("{") for p in wanted)
            if best is None or literal > best[0]:
                best = (literal, method, found)
    return (best[1], best[2]) if best else (None, {})


def _match(wanted: list[str], parts: list[str]) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for index, piece in enumerate(wanted):
        if piece.startswith("{*"):
            if index >= len(parts):
                return None
            found[piece[2:-1]] = "/".join(parts[index:])
            return found
        if index >= len(parts):
            return None
        if re.fullmatch(r"\{.+\}", piece):
            if re.search(r"\s", parts[index]):
                return None
            found[piece[1:-1]] = parts[index]
        elif piece != parts[index]:
            return None
    return found if len(wanted) == len(parts) else None
