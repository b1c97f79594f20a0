"""Parameters as Proxmox VE treats them: errors, formats, schema checks, options.

Everything here mirrors the behaviour (not the code) of PVE::Exception,
PVE::JSONSchema and Getopt::Long as the real commands use them: what is accepted,
what is refused, and the exact sentence of every refusal.

A schema is a plain dict: type, format, optional, default, enum, minimum, maximum,
minLength, maxLength, pattern, requires, description, typetext, format_description.
`format` is the name of a registered format, or a dict (a property string).
Values are str, except booleans, which are 0 or 1.
"""

from __future__ import annotations

import re
from typing import Any, Callable

Schema = dict[str, Any]
Props = dict[str, Schema]


class PveError(Exception):
    """A plain `die`: the message goes to stderr as it is.

    The exit code of a dying Perl program is errno, else 255: `exit_code` is what
    was seen, and means nothing beyond "not zero".
    """

    def __init__(self, message: str, exit_code: int = 255):
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code

    def text(self) -> str:
        return self.message if self.message.endswith("\n") else self.message + "\n"


class PveException(PveError):
    """An error with an HTTP code and, often, one reason per parameter."""

    def __init__(self, message: str, code: int = 400, errors: dict[str, str] | None = None,
                 usage: str | None = None, exit_code: int | None = None):
        super().__init__(message, 255 if exit_code is None else exit_code)
        self.exit_is_fixed = exit_code is not None
        self.code = code
        self.errors = errors or {}
        self.usage = usage

    def text(self) -> str:
        out = f"{self.code} {self.message}" if self.code else self.message
        if not out.endswith("\n"):
            out += "\n"
        for key, reason in self.errors.items():
            out += f"{key}: {reason}\n"
        if self.usage:
            out += self.usage if self.usage.endswith("\n") else self.usage + "\n"
        return out


class NotCovered(Exception):
    """The real tool can do this, the stand-in cannot: exit 70, never success."""


def param_error(errors: dict[str, str], exit_code: int | None = None) -> PveException:
    return PveException("Parameter verification failed.", errors=errors, exit_code=exit_code)


def permission_error(what: str) -> PveException:
    return PveException(f"Permission check failed ({what})", code=403)


# --- formats -----------------------------------------------------------------

_formats: dict[str, Callable[[str], Any] | Props] = {}
_validators: dict[str, Callable[[dict], dict]] = {}


def register_format(name: str, check: Callable[[str], Any] | Props,
                    validator: Callable[[dict], dict] | None = None) -> None:
    """`check` is a function that raises PveError, or the dict of a property string."""
    _formats[name] = check
    if validator:
        _validators[name] = validator


def split_list(text: str) -> list[str]:
    """PVE::Tools::split_list: comma, semicolon, blank or NUL; empty parts vanish."""
    return [part for part in re.split(r"[\s,;\0]+", text) if part != ""]


def regex_format(pattern: str, complaint: str, flags: int = 0) -> Callable[[str], str]:
    compiled = re.compile(pattern, flags | re.ASCII)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise PveError(complaint.replace("%s", value) + "\n")
        return value
    return check


def parse_id(value: str, kind: str) -> str:
    if len(value) < 2:
        raise PveError(f"{kind} ID '{value}' cannot be shorter than 2 characters\n")
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9\-_.]*[a-zA-Z0-9]", value):
        raise PveError(f"{kind} ID '{value}' contains illegal characters\n")
    return value


_DNS_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9\-]*[a-zA-Z0-9])?"
_IPV4 = r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"


def is_ip(value: str) -> bool:
    import ipaddress
    try:
        ipaddress.ip_address(value)
        return True
    except ValueError:
        return False


def _check_server(value: str) -> str:
    if not is_ip(value) and not re.fullmatch(rf"{_DNS_LABEL}(?:\.{_DNS_LABEL})*", value):
        raise PveError("value does not look like a valid server name or IP address\n")
    return value


def _check_ip(value: str) -> str:
    if not is_ip(value):
        raise PveError("value does not look like a valid IP address\n")
    return value


def _check_pool(value: str) -> str:
    parts = value.split("/")
    if not all(re.fullmatch(r"[A-Za-z0-9.\-_]+", part) for part in parts):
        raise PveError(f"pool name '{value}' contains invalid characters\n")
    if len(parts) > 3:
        raise PveError(f"pool name '{value}' nested too deeply (max levels = 3)\n")
    return value


def verify_dns_name(value: str) -> str:
    return _formats["dns-name"](value)  # type: ignore[operator]


for _name, _pattern, _text in (
    ("pve-vmid", r"[1-9][0-9]{2,8}", "value does not look like a valid VM ID"),
    ("pve-node", _DNS_LABEL, "value does not look like a valid node name"),
    ("pve-configid", r"[a-zA-Z][a-zA-Z0-9_\-]+", "invalid configuration ID '%s'"),
    ("dns-name", rf"{_DNS_LABEL}(?:\.{_DNS_LABEL})*", "value does not look like a valid DNS name"),
    ("pve-storage-path", r"/[^;\(\)](?s:.*)", "value does not look like a valid absolute path"),
    ("mac-addr", r"[a-fA-F0-9][02468aceACE](?::[a-fA-F0-9]{2}){5}",
     "value does not look like a valid unicast MAC address"),
    ("email", r"[\w+~-]+(?:\.[\w+~-]+)*@[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)*",
     "value does not look like a valid email address"),
    ("email-or-username", r"[\w+~-]+(?:\.[\w+~-]+)*(?:@[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)*)?",
     "value does not look like a valid email address or user name"),
    ("disk-size", r"\d+(?:\.\d+)?[KMGT]?", "value does not look like a valid disk size: %s"),
    ("pve-day-of-week", r"(?:mon|tue|wed|thu|fri|sat|sun)", "invalid day '%s'"),
    ("pve-tag", r"[a-zA-Z0-9_][a-zA-Z0-9_\-+.]*", "invalid characters in tag"),
    ("pve-iface", r"[a-zA-Z][a-zA-Z0-9_]{1,20}(?:[:.]\d+)?", "invalid network interface name '%s'"),
):
    register_format(_name, regex_format(_pattern, _text))
register_format("string", lambda value: value)
register_format("pve-storage-id", lambda value: parse_id(value, "storage"))
register_format("pve-storage-server", _check_server)
register_format("address", _check_server)
register_format("ip", _check_ip)
register_format("pve-poolid", _check_pool)
register_format("urlencoded", regex_format(r"[-%a-zA-Z0-9_.!~*'()]*", "invalid urlencoded string: %s"))


def parse_boolean(value: str) -> int | None:
    word = str(value).lower()
    if word in ("1", "on", "yes", "true"):
        return 1
    if word in ("0", "off", "no", "false"):
        return 0
    return None


def check_format(name: str | Props, value: str, path: str) -> Any:
    if isinstance(name, dict):
        return parse_property_string(name, value, path)
    base, kind = name, None
    for suffix in ("-list", "-opt"):
        if name.endswith(suffix):
            base, kind = name[: -len(suffix)], suffix
    if base not in _formats:
        raise PveError(f"undefined format '{name}'\n")
    check = _formats[base]
    if kind == "-list":
        return [check(part) for part in split_list(value)]  # type: ignore[operator]
    if kind == "-opt":
        return check(value) if value else None  # type: ignore[operator]
    if isinstance(check, dict):
        return parse_property_string(base, value, path)
    return check(value)


# --- property strings ("a=1,b=2") ---------------------------------------------

def _named(fmt: str | Props) -> tuple[Props, Callable[[dict], dict] | None]:
    if isinstance(fmt, dict):
        return fmt, None
    return _formats[fmt], _validators.get(fmt)  # type: ignore[return-value]


def parse_property_string(fmt: str | Props, text: str, path: str = "") -> dict[str, Any]:
    """Values stay text, as the real ones do; only booleans become 0 or 1."""
    schema, validator = _named(fmt)
    default_key = next((k for k, s in schema.items() if s.get("default_key")), None)
    result: dict[str, Any] = {}
    default_seen = False
    for part in text.split(","):
        if not part.strip():
            continue
        match = re.fullmatch(r"([^=]+)=(.+)", part, re.S)
        if match:
            key, value = match.group(1), match.group(2)
            if key in result:
                raise PveError(f"duplicate key in comma-separated list property: {key}\n")
            prop = schema.get(key)
            if prop and prop.get("alias"):
                if prop.get("keyAlias"):
                    result[prop["keyAlias"]] = key
                key = prop["alias"]
                prop = schema.get(key)
            if prop is None:
                # Reported by the check below, together with whatever else is wrong.
                result[key] = value
                continue
            if prop.get("type") == "boolean":
                parsed = parse_boolean(value)
                result[key] = value if parsed is None else parsed
            else:
                result[key] = value
        elif "=" not in part:
            if default_key is None:
                raise PveError("value without key, but schema does not define a default key\n")
            if default_seen or default_key in result:
                raise PveError(f"duplicate key in comma-separated list property: {default_key}\n")
            default_seen = True
            parsed = parse_boolean(part) if schema[default_key].get("type") == "boolean" else None
            result[default_key] = part if parsed is None else parsed
        else:
            raise PveError("missing key in comma-separated list property\n")
    errors: dict[str, str] = {}
    check_object(path, schema, result, False, errors)
    if errors:
        raise PveException("format error", code=0, errors=errors)
    return validator(result) if validator else result


def print_property_string(data: dict[str, Any], fmt: str | Props) -> str:
    """The default key first and bare, then required keys, then the rest, each sorted."""
    schema, _ = _named(fmt)
    default_key = next((k for k, s in schema.items() if s.get("default_key")), None)
    out: list[str] = []
    done = set()

    def add(key: str, bare: bool = False) -> None:
        if key in done or data.get(key) is None:
            return
        done.add(key)
        alias_of = next((s.get("keyAlias") for s in schema.values()
                         if s.get("keyAlias") and s.get("alias") == key), None)
        if alias_of and data.get(alias_of) is not None:
            done.add(alias_of)
            out.append(f"{data[alias_of]}={data[key]}")
            return
        out.append(str(data[key]) if bare else f"{key}={data[key]}")

    if default_key:
        add(default_key, True)
    for key in sorted(k for k in data if not schema.get(k, {}).get("optional")):
        add(key)
    for key in sorted(data):
        add(key)
    return ",".join(out)


# --- checks ---------------------------------------------------------------------

def _is_integer(value: Any) -> bool:
    return re.fullmatch(r"[+-]?\d+", str(value)) is not None


def _is_number(value: Any) -> bool:
    return re.fullmatch(r"[+-]?(?=\d|\.\d)\d*(\.\d*)?([eE][+-]?\d+)?", str(value)) is not None


def check_prop(value: Any, schema: Schema, path: str, errors: dict[str, str]) -> None:
    def fail(reason: str) -> None:
        key = path or "_root"
        errors[key] = errors[key] + "\\n" + reason if key in errors else reason

    if value is None:
        if not schema.get("optional") and schema.get("type") != "null":
            fail("property is missing and it is not optional")
        return
    kind = schema.get("type")
    if kind == "boolean" and str(value) not in ("0", "1"):
        return fail(f"type check ('boolean') failed - got '{value}'")
    if kind == "integer" and not _is_integer(value):
        return fail(f"type check ('integer') failed - got '{value}'")
    if kind == "number" and not _is_number(value):
        return fail(f"type check ('number') failed - got '{value}'")
    if kind == "array":
        if not isinstance(value, list):
            return fail("type check ('array') failed")
        for index, item in enumerate(value):
            check_prop(item, schema.get("items", {}), f"{path}[{index}]", errors)
        return
    if schema.get("format"):
        try:
            check_format(schema["format"], str(value), path)
        except PveError as error:
            return fail("invalid format - " + error.text())
    text = str(value)
    if schema.get("pattern") and not re.fullmatch(schema["pattern"], text):
        return fail("value does not match the regex pattern")
    if "maxLength" in schema and len(text) > schema["maxLength"]:
        return fail(f"value may only be {schema['maxLength']} characters long")
    if "minLength" in schema and len(text) < schema["minLength"]:
        return fail(f"value must be at least {schema['minLength']} characters long")
    if _is_number(value):
        if "maximum" in schema and float(value) > schema["maximum"]:
            return fail(f"value must have a maximum value of {schema['maximum']}")
        if "minimum" in schema and float(value) < schema["minimum"]:
            return fail(f"value must have a minimum value of {schema['minimum']}")
    if schema.get("enum") and text not in schema["enum"]:
        return fail(f"value '{text}' does not have a value in the enumeration '{', '.join(schema['enum'])}'")


def check_object(path: str, props: Props, value: dict[str, Any], additional: bool,
                 errors: dict[str, str]) -> None:
    def join(key: str) -> str:
        return f"{path}.{key}" if path else key

    for key, schema in props.items():
        if not schema.get("alias"):
            check_prop(value.get(key), schema, join(key), errors)
    for key in value:
        if key in props:
            needed = props[key].get("requires")
            if needed and value.get(needed) is None:
                errors[join(needed)] = f"missing property required by '{join(key)}'"
        elif not additional:
            errors[join(key)] = ("property is not defined in schema and the schema "
                                 "does not allow additional properties")


def validate(params: dict[str, Any], props: Props) -> None:
    errors: dict[str, str] = {}
    check_object("", props, params, False, errors)
    if errors:
        raise param_error(errors)


# --- options ----------------------------------------------------------------------

def _is_list(schema: Schema) -> bool:
    fmt = schema.get("format")
    return isinstance(fmt, str) and "-list" in fmt


def get_options(props: Props, args: list[str], arg_param: list[str] | str | None,
                fixed: dict[str, Any] | None = None,
                warn: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Getopt::Long as Proxmox configures it, then positional arguments, then booleans.

    Kept on purpose: option names may be shortened and ignore case; a boolean takes
    the following word as its value unless that begins with a dash; a string option
    takes whatever follows, even `--other`; `extra-args` takes the rest.
    """
    fixed = fixed or {}
    list_param = arg_param if isinstance(arg_param, str) else None
    known = {name: schema for name, schema in props.items() if name not in fixed and name != list_param}
    lower = {name.lower(): name for name in known}
    options: dict[str, Any] = {}
    rest: list[str] = []
    failed = False
    queue = list(args)
    while queue:
        word = queue.pop(0)
        if word == "--":
            rest += queue
            break
        match = re.fullmatch(r"(--|-)(.+)", word, re.S)
        if not match:
            rest.append(word)
            continue
        name, glued = match.group(2), None
        equals = name.find("=", 1)
        if equals > 0:
            name, glued = name[:equals], name[equals + 1:]
        wanted = name.lower()
        candidates = [wanted] if wanted in lower else sorted(k for k in lower if k.startswith(wanted))
        if not candidates:
            warn(f"Unknown option: {name}")
            failed = True
            continue
        if len(candidates) > 1:
            warn(f"Option {name} is ambiguous ({', '.join(lower[c] for c in candidates)})")
            failed = True
            continue
        name = lower[candidates[0]]
        schema = known[name]
        if schema.get("type") == "boolean":
            if glued is not None:
                options[name] = glued
            elif queue and not re.fullmatch(r"(--|-).+|--", queue[0], re.S):
                options[name] = queue.pop(0)
            else:
                options[name] = ""
            continue
        if glued == "" or (glued is None and not queue):
            warn(f"Option {name} requires an argument")
            failed = True
            continue
        value = queue.pop(0) if glued is None else glued
        if _is_list(schema) or schema.get("type") == "array":
            options.setdefault(name, []).append(value)
        else:
            options[name] = value
    if failed:
        raise PveException("unable to parse option")

    if list_param:
        if rest:
            options[list_param] = rest
    elif arg_param:
        for index, name in enumerate(arg_param):
            if name == "extra-args":
                options[name], rest = rest, []
                break
            if not rest:
                if any(not props[n].get("optional") for n in arg_param[index:] if n != "extra-args" and n in props):
                    raise PveException("not enough arguments")
                if arg_param[-1] == "extra-args":
                    options["extra-args"] = []
                break
            options[name] = rest.pop(0)
        if rest:
            raise PveException("too many arguments")
    elif rest:
        raise PveException("too many arguments")

    for name, value in options.items():
        schema = props.get(name, {})
        if schema.get("type") == "boolean":
            parsed = 1 if value == "" else parse_boolean(value)
            if parsed is None:
                raise PveException("unable to parse boolean option")
            options[name] = parsed
        elif _is_list(schema) and isinstance(value, list):
            options[name] = ",".join(value)
    options.update(fixed)
    return options
