"""The command lines of qm, qmrestore and vzdump."""

import sys

import guest_backup
import guest_clone
import guest_create
import guest_snapshots
import guest_status
import guests
from guest_schema import VMID, flag, text
from pve_cli import Alias, Command, Method, run, run_simple
from pve_cluster import nodename
from pve_output import err, out
from pve_schema import NotCovered
from pve_tasks import upid_exit_code


def exit_with_task(upid):
    code = upid_exit_code(upid)
    if code:
        sys.stdout.flush()
        sys.exit(code)


def show_list(rows):
    if rows:
        out("%10s %-20s %-10s %-10s %12s %-10s\n" % ("VMID", "NAME", "STATUS", "MEM(MB)", "BOOTDISK(GB)", "PID"))
    for row in sorted(rows, key=lambda r: r["vmid"]):
        out("%10s %-20s %-10s %-10s %12.2f %-10s\n" % (row["vmid"], row["name"], row["status"], row["maxmem"] // 1048576,
                                                      row["maxdisk"] / 2 ** 30, row.get("pid", 0)))


STATUS = Method("GET", "", {"vmid": VMID, "verbose": flag()}, group="PVE::CLI::qm")


@STATUS
def _(params):
    status = guest_status.STATUS.function({"vmid": params["vmid"]})
    if not params.get("verbose"):
        out(f"status: {status['status']}\n")
        return
    status.pop("ha")
    status.pop("agent", None)
    for key in sorted(status):
        if key != "cpu":
            out(f"{key}: {status[key]}\n")


def _gap(group, required="", optional="", rest=False):
    """A command whose parameters are known, so that mistakes get the real answers, but which the stand-in cannot do."""
    names = required.split()
    params = {name: VMID if name == "vmid" else {"type": "string"} for name in names}
    params.update({name: text() for name in optional.split()})
    if rest:
        params["extra-args"] = text()
    method = Method("POST", "", params, group=group)

    @method
    def _(given):
        raise NotCovered(f"this command of qm (parameters {', '.join(sorted(given))})")
    return method, names


def qm_commands():
    api, cli, agent = "PVE::API2::Qemu", "PVE::CLI::qm", "PVE::API2::Qemu::Agent"
    fixed = {"node": nodename()}

    def task(method, *args):
        return Command(method, list(args), fixed, exit_with_task)

    def gap(group, required="", optional="", named="", rest=False):
        """`named`: required, but given as an option."""
        method, names = _gap(group, f"{required} {named}", optional, rest)
        places = [name for name in names if name not in named.split()] + (["extra-args"] if rest else [])
        return Command(method, places)

    remote = Method("POST", "", {"vmid": VMID, "target-vmid": {**VMID, "optional": 1}, "target-endpoint": {"type": "string"},
                                 "target-bridge": {"type": "string"}, "target-storage": {"type": "string"},
                                 "online": flag()}, group=cli)
    return {
        "cloudinit": {"dump": gap(api, "vmid type"), "pending": gap(api, "vmid"),
                      "update": gap(api, "vmid")},
        "disk": {"move": task(guest_clone.MOVE, "vmid", "disk", "storage"),
                 "resize": Command(guest_clone.RESIZE, ["vmid", "disk", "size"], fixed),
                 "unlink": Command(guests.UNLINK, ["vmid"], fixed),
                 "import": gap(cli, "vmid source storage", "format target-disk"),
                 "rescan": Command(guests.RESCAN, [])},
        "guest": {"cmd": gap(agent, "vmid command"),
                  "exec-status": gap(agent, "vmid pid"), "passwd": gap(agent, "vmid username", "crypted"),
                  "exec": gap(cli, "vmid", "pass-stdin synchronous timeout", rest=True)},
        "list": Command(guest_status.VMLIST, [], fixed, show_list),
        "config": Command(guest_status.VM_CONFIG, ["vmid"], fixed, guest_status.print_config),
        "pending": Command(guest_status.PENDING, ["vmid"], fixed, guest_status.print_pending),
        "listsnapshot": Command(guest_snapshots.SNAPSHOTS, ["vmid"], fixed, guest_snapshots.print_snapshots),
        "create": task(guest_create.CREATE, "vmid"),
        "destroy": task(guests.DESTROY, "vmid"),
        "clone": task(guest_clone.CLONE, "vmid", "newid"),
        "template": Command(guest_clone.TEMPLATE, ["vmid"], fixed),
        "set": Command(guests.UPDATE_VM, ["vmid"], fixed),
        "start": task(guests.START, "vmid"), "stop": task(guests.STOP, "vmid"),
        "shutdown": task(guests.SHUTDOWN, "vmid"),
        "snapshot": task(guest_snapshots.SNAPSHOT, "vmid", "snapname"),
        "delsnapshot": task(guest_snapshots.DELSNAPSHOT, "vmid", "snapname"),
        "rollback": task(guest_snapshots.ROLLBACK, "vmid", "snapname"),
        "migrate": gap(api, "vmid target", "bwlimit force migration_network migration_type online targetstorage "
                       "with-conntrack-state with-local-disks"),
        "reboot": task(guests.REBOOT, "vmid"), "reset": task(guests.RESET, "vmid"),
        "resume": gap(api, "vmid", "nocheck skiplock"), "suspend": gap(api, "vmid", "skiplock statestorage todisk"),
        "sendkey": gap(api, "vmid key", "skiplock"),
        "status": Command(STATUS, ["vmid"]), "unlock": Command(guests.UNLOCK, ["vmid"]),
        "cleanup": gap(cli, "vmid clean-shutdown guest-requested"),
        "enroll-efi-keys": gap(cli, "vmid"), "import": gap(cli, "vmid source", "dryrun format live-import name", "storage"),
        "importovf": gap(cli, "vmid manifest storage", "dryrun format"), "monitor": gap(cli, "vmid"),
        "mtunnel": gap(cli), "nbdstop": gap(cli, "vmid"),
        "remote-migrate": Command(remote, ["vmid", "target-vmid", "target-endpoint"]),
        "showcmd": gap(cli, "vmid", "pretty snapshot"), "terminal": gap(cli, "vmid", "escape iface"),
        "vncproxy": gap(cli, "vmid"),
        "wait": gap(cli, "vmid", "timeout"),
        "rescan": Alias("disk rescan"), "resize": Alias("disk resize"), "unlink": Alias("disk unlink"),
        "importdisk": Alias("disk import"), "move-disk": Alias("disk move"), "move_disk": Alias("disk move"),
        "agent": Alias("guest cmd"),
    }


def qm(argv):
    run("qm", qm_commands(), argv[1:])


# The one help text that scripts may meet: `qmrestore help` instead of an archive.
QMRESTORE_HELP = """USAGE: qmrestore help
USAGE: qmrestore <archive> <vmid> [OPTIONS]
  <archive>  <string>
\t     The backup file. You can pass '-' to read from standard input.

  <vmid>     <integer> (100 - 999999999)
\t     The (unique) ID of the VM.

  --bwlimit  <number> (0 - N)
\t     Override I/O bandwidth limit (in KiB/s).

  --force    <boolean>
\t     Allow to overwrite existing VM.

  --ha-managed <boolean>   (default=0)
\t     Add the VM as a HA resource after it was restored.

  --live-restore <boolean>
\t     Start the VM immediately from the backup and restore in
\t     background. PBS only.

  --pool     <string>
\t     Add the VM to the specified pool.

  --start    <boolean>\t (default=0)
\t     Start VM after it was restored successfully.

  --storage  <storage ID>
\t     Default storage.

  --unique   <boolean>
\t     Assign a unique random ethernet address.



"""


def qmrestore(argv):
    if argv[1:] == ["help"]:
        err(QMRESTORE_HELP)
        return
    run_simple("qmrestore", Command(guest_create.QMRESTORE, ["archive", "vmid"], {}, exit_with_task), argv[1:])


def vzdump(argv):
    guest_backup.main(argv)
