"""What the guests' API methods share: their registration, worker tasks, pools."""

from guest_schema import NODE, VMID
from pve_cli import Method
from pve_cluster import locked_file, pools, write_pools
from pve_schema import NotCovered, permission_error
from pve_tasks import fork_worker


GROUP = "PVE::API2::Qemu"
BASE = "/nodes/{node}/qemu"
GUEST = {"node": NODE, "vmid": VMID}


def method(verb, path, params=None, **more):
    return Method(verb, BASE + path, {**GUEST, **(params or {})}, group=GROUP, **more)


def worker(kind, ident, work):
    """Run a task; its UPID. What the stand-in cannot do must not look like one of the tool's own failures."""
    upid, code = fork_worker(kind, str(ident), work)
    if code == 70:
        raise NotCovered(f"{kind} of {ident} (see above)")
    return upid


def assert_pool(pool):
    if pool is not None and pool not in pools():
        raise permission_error(f"pool '{pool}' does not exist")


def add_to_pool(vmid, pool):
    def change():
        everything = pools()
        for entry in everything.values():
            entry["vms"] = [v for v in entry["vms"] if v != int(vmid)]
        everything[pool]["vms"].append(int(vmid))
        write_pools(everything)
    locked_file("user.cfg", change)


def remove_access(vmid):
    def change():
        everything = pools()
        if any(int(vmid) in entry["vms"] for entry in everything.values()):
            for entry in everything.values():
                entry["vms"] = [v for v in entry["vms"] if v != int(vmid)]
            write_pools(everything)
    locked_file("user.cfg", change)
