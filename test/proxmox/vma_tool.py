"""The `vma` program, as far as tests and people use it: config, list, verify, create."""

import os
import subprocess
import sys
import time

import vma


def _trap(message):
    sys.stdout.flush()
    sys.stderr.write(f"vma: {message}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), 5)


def _open(name):
    return sys.stdin.buffer if name == "-" else open(name, "rb")


def main(argv):
    if len(argv) < 3:
        sys.exit("usage: vma command [command options]\n\nvma config <filename> [-c config]\nvma list <filename>\n"
                 "vma create <filename> [-c config] pathname ...\nvma verify <filename> [-v]")
    words = argv[2:]
    try:
        {"config": _config, "list": _list, "verify": _verify, "create": _create}[argv[1]](words)
    except KeyError:
        sys.stderr.write(f"vma stand-in: not covered: vma {argv[1]}\n")
        sys.exit(70)
    except vma.VmaError as error:
        _trap(str(error))


def _config(words):
    data = vma.Header.read(_open(words[0])).config(words[2] if words[1:2] == ["-c"] else "qemu-server.conf")
    if data is None:
        raise vma.VmaError("unable to find configuration data")
    sys.stdout.buffer.write(data)


def _list(words):
    header = vma.Header.read(_open(words[0]))
    print(f"CTIME: {time.asctime(time.localtime(header.ctime))}")
    for name, data in header.configs:
        print(f"CFG: size: {len(data)} name: {name}")
    for number, (name, size) in sorted(header.devices.items()):
        print(f"DEV: dev_id={number} size: {size} devname: {name}")


def _verify(words):
    verbose = "-v" in words
    stream = _open(next(word for word in words if word != "-v"))
    header = vma.Header.read(stream)
    vma.Restore(stream, header, {number: None for number in header.devices}, print if verbose else lambda line: None).run()


def _create(words):
    configs, drives, target = [], [], None
    while words:
        word = words.pop(0)
        if word == "-v":
            continue
        if word == "-c":
            path = words.pop(0)
            with open(path, "rb") as file:
                configs.append((os.path.basename(path), file.read()))
        elif target is None:
            target = word
        else:
            name, _, path = word.rpartition("=")
            drives.append((name or f"drive{len(drives)}", path))
    if target.startswith("exec:"):
        process = subprocess.Popen(target[5:], shell=True, stdin=subprocess.PIPE)
        vma.write(process.stdin, configs, drives)
        process.stdin.close()
        sys.exit(process.wait())
    with open(target, "xb") as file:
        vma.write(file, configs, drives)
