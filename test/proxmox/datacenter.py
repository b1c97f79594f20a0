"""datacenter.cfg: the options of the whole datacenter, `key: value` lines below a description in comments."""

from __future__ import annotations

import re
from typing import Any

import pve_cluster as cluster
import storage as st  # noqa: F401 - registers the format of bandwidth limits
from pve_output import err
from pve_schema import (Props, PveError, check_object, parse_boolean, parse_property_string, print_property_string,
                        register_format)

FILE = "datacenter.cfg"
DEFAULT_MAC_PREFIX = "BC:24:11"

_S = {"type": "string", "optional": 1}
_B = {"type": "boolean", "optional": 1}
_TRANSFER: Props = {"type": {"type": "string", "default_key": 1, "enum": ["secure", "insecure"]},
                    "network": {**_S, "format": "CIDR"}}
_TAG = r"[a-zA-Z0-9_][a-zA-Z0-9_\-+.]*"
_COLOUR = r"[0-9a-fA-F]{6}"
_TAG_COLOUR = rf"{_TAG}:{_COLOUR}(?::{_COLOUR})?"


def _number(low: float | None = None, high: float | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "number", "optional": 1, **({} if low is None else {"minimum": low}),
            **({} if high is None else {"maximum": high}), **more}


_AUTO = {"requires": "ha-auto-rebalance"}

# Options whose value is a property string.
FORMATS: dict[str, Props] = {
    "next-id": {"lower": {"type": "integer", "optional": 1}, "upper": {"type": "integer", "optional": 1}},
    "migration": _TRANSFER, "replication": _TRANSFER,
    "ha": {"shutdown_policy": {"type": "string", "enum": ["freeze", "failover", "conditional", "migrate"]}},
    "crs": {"ha": {**_S, "enum": ["basic", "static", "dynamic"]}, "ha-rebalance-on-start": _B, "ha-auto-rebalance": _B,
            "ha-auto-rebalance-threshold": _number(0, 100, **_AUTO),
            "ha-auto-rebalance-method": {**_S, "enum": ["bruteforce", "topsis"], **_AUTO},
            "ha-auto-rebalance-hold-duration": _number(0, **_AUTO),
            "ha-auto-rebalance-margin": _number(0, 100, **_AUTO)},
    "notify": {"package-updates": {**_S, "enum": ["auto", "always", "never"]}, "target-package-updates": _S,
               "fencing": {**_S, "enum": ["always", "never"]}, "target-fencing": _S,
               "replication": {**_S, "enum": ["always", "never"]}, "target-replication": _S},
    "u2f": {"appid": _S, "origin": _S},
    "webauthn": {"rp": _S, "origin": _S, "id": _S, "allow-subdomains": _B},
    "tag-style": {"shape": {**_S, "enum": ["full", "circle", "dense", "none"]},
                  "color-map": {**_S, "pattern": f"{_TAG_COLOUR}(?:;{_TAG_COLOUR})*"},
                  "ordering": {**_S, "enum": ["config", "alphabetical"]}, "case-sensitive": _B},
    "user-tag-access": {"user-allow": {**_S, "enum": ["none", "list", "existing", "free"]},
                        "user-allow-list": {**_S, "pattern": f"{_TAG}(?:;{_TAG})*"}},
}
_LOCATION: Props = {"name": {**_S, "maxLength": 128}, "latitude": {"type": "number", "minimum": -90, "maximum": 90},
                    "longitude": {"type": "number", "minimum": -180, "maximum": 180}}
_KEYBOARDS = ("de de-ch da en-gb en-us es fi fr fr-be fr-ca fr-ch hu is it ja lt mk nl no pl pt pt-br sv sl "
              "tr").split()
_LANGUAGES = "ar ca da de en es eu fa fr hr he it ja ka kr nb nl nn pl pt_BR ru sl sv tr ukr zh_CN zh_TW".split()


def _mac_prefix(value: str) -> str:
    if not re.fullmatch(r"[a-fA-F0-9][02468aceACE](?::[a-fA-F0-9]{2}){0,2}(?::[a-fA-F0-9]?)?", value):
        raise PveError("value is not a valid unicast MAC address prefix\n")
    return value


def _cidr(value: str) -> str:
    import ipaddress
    try:
        if "/" not in value:
            raise ValueError
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise PveError("value does not look like a valid CIDR network\n") from None
    return value


register_format("mac-prefix", _mac_prefix)
register_format("CIDR", _cidr)

OPTIONS: Props = {
    **{key: {**_S, "format": fmt} for key, fmt in FORMATS.items()},
    "keyboard": {**_S, "enum": _KEYBOARDS}, "language": {**_S, "enum": _LANGUAGES},
    "http_proxy": {**_S, "pattern": "http://.*"}, "migration_unsecure": _B,
    "console": {**_S, "enum": ["applet", "vv", "html5", "xtermjs"]}, "email_from": {**_S, "format": "email-opt"},
    "max_workers": {"type": "integer", "minimum": 1, "optional": 1},
    "fencing": {**_S, "enum": ["watchdog", "hardware", "both"]}, "mac_prefix": {**_S, "format": "mac-prefix"},
    "bwlimit": {**_S, "format": "bwlimit"}, "description": {**_S, "maxLength": 65536},
    "registered-tags": {**_S, "pattern": f"(?:{_TAG};)*{_TAG}"}, "consent-text": {**_S, "maxLength": 65536},
    "location": {**_S, "format": _LOCATION},
}


def read() -> dict[str, Any]:
    """The options; what cannot be understood is complained about and left out."""
    config: dict[str, Any] = {}
    description = ""
    for line in cluster.read(FILE).split("\n"):
        if line.startswith("#"):
            description += cluster.decode_text(line[1:]) + "\n"
            continue
        line = line.strip()
        match = re.match(r"(\S+?):\s*(.*)$", line)
        if match:
            value: Any = match[2]
            if OPTIONS.get(match[1], {}).get("type") == "boolean":
                parsed = parse_boolean(value)
                value = value if parsed is None else parsed
            config[match[1]] = value
        elif line:
            err(f"ignore config line: {line}\n")
    errors: dict[str, str] = {}
    check_object("", OPTIONS, config, False, errors)
    for key, reason in errors.items():
        err(f"parse error in '{cluster.ROOT}/{FILE}' - '{key}': {reason}\n")
        config.pop(key, None)
    config["description"] = description
    config.setdefault("mac_prefix", DEFAULT_MAC_PREFIX)
    for key, fmt in FORMATS.items():
        if config.get(key):
            config[key] = parse_property_string(fmt, config[key], key)
    if "user-allow-list" in config.get("user-tag-access", {}):
        config["user-tag-access"]["user-allow-list"] = config["user-tag-access"]["user-allow-list"].split(";")
    if config.get("registered-tags"):
        config["registered-tags"] = config["registered-tags"].split(";")
    if config.get("console") == "applet":
        config["console"] = "html5"
    return config


def write(config: dict[str, Any]) -> None:
    config = dict(config)
    if str(config.get("mac_prefix", "")).upper() == DEFAULT_MAC_PREFIX:
        del config["mac_prefix"]
    if config.get("console") == "applet":
        config["console"] = "html5"
    bounds = config.get("next-id")
    if bounds is not None:
        if isinstance(bounds, str):
            config["next-id"] = bounds = parse_property_string(FORMATS["next-id"], bounds, "next-id")
        lower, upper = int(bounds.get("lower", 100)), int(bounds.get("upper", 1000000))
        if lower > upper:
            raise PveError(f"lower ({lower}) <= upper ({upper}) boundary rule broken\n")
    access = config.get("user-tag-access")
    if isinstance(access, dict) and isinstance(access.get("user-allow-list"), list):
        config["user-tag-access"] = {**access, "user-allow-list": ";".join(sorted(access["user-allow-list"]))}
    if isinstance(config.get("registered-tags"), list):
        config["registered-tags"] = ";".join(sorted(config["registered-tags"]))
    description = str(config.pop("description", "") or "")
    lines = description.rstrip("\n").split("\n") if description else []
    text = "".join(f"#{cluster.encode_text(line)}\n" for line in lines) + "\n"
    for key in sorted(config):
        value = config[key]
        if value is None:
            continue
        text += f"{key}: {print_property_string(value, FORMATS[key]) if isinstance(value, dict) else value}\n"
    cluster.write(FILE, text)


def next_id_bounds() -> tuple[str, str]:
    bounds = read().get("next-id") or {}
    return str(bounds.get("lower", 100)), str(bounds.get("upper", 1000000))
