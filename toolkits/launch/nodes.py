"""Where a launcher stands among the launchers of a job's nodes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .reading import Call

THIS_MACHINE = "127.0.0.1"
LAST_PORT = 65535
GPUS_OF_NODE = "KUBERNETES_CONTAINER_RESOURCE_GPU"
DEFAULT_GPUS = 8


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job as one of them sees it; the default is this machine alone."""

    count: int = 1
    rank: int = 0
    address: str = THIS_MACHINE  # of node 0
    port: int = 0
    join_timeout: float = 600  # seconds in which all nodes must come
    silence_timeout: float = 30  # seconds without a sign of life after which a node is given up


def is_cluster(call: "Call") -> bool:
    """Say whether ENV asks for a container job, whose variables say which node this is."""
    return call.values["ENV"] == "dlc"


def nodes_of(call: "Call") -> Nodes:
    """Return the nodes that the variables of a container job describe, as far as they could be read."""
    if not is_cluster(call):
        return Nodes()
    said, default = call.values, Nodes()
    return Nodes(
        count=said.get("WORLD_SIZE", default.count),
        rank=said.get("RANK", default.rank),
        address=said.get("MASTER_ADDR", default.address),
        port=said.get("MASTER_PORT", default.port),
        join_timeout=said.get("JOIN_TIMEOUT", default.join_timeout),
        silence_timeout=said.get("SILENCE_TIMEOUT", default.silence_timeout),
    )


def node_problems(call: "Call", nodes: Nodes, *, ranks: int, gpus: int) -> list[str]:
    """Return what the variables say against each other and against the machine's `gpus`."""
    source = "NPROC_PER_NODE" if "NPROC_PER_NODE" in call.values else GPUS_OF_NODE
    found = []
    if call.reads("RANK", "WORLD_SIZE") and nodes.rank >= nodes.count:
        found.append(f"RANK {nodes.rank} must be below WORLD_SIZE {nodes.count}: nodes are counted from 0")
    if nodes.port > LAST_PORT:
        found.append(f"MASTER_PORT {nodes.port} must be at most {LAST_PORT}")
    if gpus and ranks > gpus:
        found.append(f"{source} is {ranks}, this machine has {gpus} visible GPUs")
    # A dry run may stand on another machine than the job will.
    if not gpus and is_cluster(call) and source == GPUS_OF_NODE and not call.values.get("DRY_RUN"):
        found.append("this machine has no visible GPU; NPROC_PER_NODE says how many CPU ranks it runs instead")
    return found
