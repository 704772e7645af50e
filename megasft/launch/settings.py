"""The section ``launch``: where the ranks of a run are, and who starts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from megasft.errors import FlagError

HERE: Final = ("local", "torchrun")
"""Backends that start ranks on this machine."""
BACKENDS: Final = (*HERE, "slurm", "ray", "print")
NODE_RANK_VARIABLES: Final = ("NODE_RANK", "SLURM_NODEID", "PET_NODE_RANK")
"""Where a cluster says which node this is, when ``launch.node_rank`` does not."""
ENDPOINT_PORT: Final = 29500
CPU_ENV: Final = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""A run on CPU ranks: the GPUs are hidden, and the ranks share the cores."""
RESTART_ENV: Final = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""A new store for each restart. torchrun 2.5 to 2.13 shares one, whose stale addresses the ranks of
the next start connect to, and are refused (pytorch issues 135712, 167288)."""
SHUTDOWN_ENV: Final = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"}
"""Seconds in which torchrun's ranks may save when torchrun itself is told to end: longer than a
step and a save. torch 2.12 and newer read it; before, torchrun kills them after 30 s, but under
``megasft train``, which signals the ranks itself."""
SPLIT_ENV: Final = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""Megatron 0.19 asserts it with TP or CP on GPUs before Blackwell; FSDP and overlapped expert
communication want it otherwise."""
MEETING_KEYS: Final = ("node_rank", "master_addr", "local_addr", "rdzv_endpoint")
"""Keys by which nodes that a user starts find each other."""


@dataclass(kw_only=True)
class Launch:
    """Who starts the ranks, and where. OmegaConf checks the types by these annotations."""

    backend: str = field(
        default="local",
        metadata={
            "help": "local: all ranks on this machine; torchrun: the same command on each node; "
            "slurm: write a batch script and submit it; ray: one actor a rank; print: as --dry-run"
        },
    )
    nproc_per_node: int = field(
        default=0, metadata={"help": "ranks on each node (default: one for each GPU here)"}
    )
    nnodes: int = field(default=1, metadata={"help": "nodes (default: 1)"})
    node_rank: int | None = field(
        default=None,
        metadata={"help": f"which node this is (default: {', '.join(NODE_RANK_VARIABLES)} or 0)"},
    )
    master_addr: str = field(default="", metadata={"help": "host of node 0"})
    master_port: int = field(
        default=ENDPOINT_PORT, metadata={"help": f"a free port there (default: {ENDPOINT_PORT})"}
    )
    local_addr: str = field(
        default="", metadata={"help": "this node's address, where its host name is not reachable"}
    )
    rdzv_backend: str = field(default="c10d", metadata={"help": "torchrun's (default: c10d)"})
    rdzv_endpoint: str = field(
        default="", metadata={"help": "default: launch.master_addr:launch.master_port"}
    )
    rdzv_id: str = field(
        default="megasft", metadata={"help": "name of the run among others at one endpoint"}
    )
    rdzv_conf: str = field(default="", metadata={"help": "torchrun's KEY=VALUE,..."})
    max_restarts: int = field(
        default=0,
        metadata={"help": "times to start again, from the last checkpoint, after a rank failed"},
    )
    env: dict[str, str] = field(
        default_factory=dict, metadata={"help": "environment of the ranks, NCCL's for example"}
    )
    cpu: bool = field(
        default=False, metadata={"help": "run on CPU ranks with gloo also where there are GPUs"}
    )
    log_dir: str = field(
        default="",
        metadata={"help": "all that each rank prints (default: logs in checkpoint.save, or here)"},
    )
    slurm: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "options of sbatch by their long names, as partition, time, account"},
    )
    setup: list[str] = field(
        default_factory=list,
        metadata={"help": "slurm: shell lines before the run, which must put torchrun on PATH"},
    )
    ray_address: str = field(
        default="auto",
        metadata={"help": "ray: auto, local (this machine alone), or the host:port of a cluster"},
    )

    @property
    def is_alone(self) -> bool:
        """Whether all ranks are on one machine, which need no rendezvous with others."""
        return self.backend == "local" or (self.backend == "print" and self.nnodes == 1)

    @property
    def num_ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nnodes * self.nproc_per_node

    @property
    def this_node(self) -> int:
        """Which node this process is on."""
        return 0 if self.node_rank is None else self.node_rank

    @property
    def endpoint(self) -> str:
        """Where nodes meet."""
        return self.rdzv_endpoint or f"{self.master_addr}:{self.master_port}"


LAUNCH_HELP: Final = {each.name: str(each.metadata["help"]) for each in fields(Launch)}
"""Keys of the section, and their help."""


def rank_environment(launch: Launch, args: Any, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what the ranks' environment has beside this process's.

    Args:
        launch: Its ``env`` has the last word.
        args: Megatron's flags.
        environ: Of this process; what its user has chosen stays, but for GPUs that are hidden.
    """
    added = dict(CPU_ENV) if launch.cpu else {}
    if launch.backend != "ray":
        added |= SHUTDOWN_ENV
        added |= RESTART_ENV if launch.max_restarts else {}
    is_split = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    wants_many = (
        args.use_torch_fsdp2 or args.use_megatron_fsdp or args.overlap_moe_expert_parallel_comm
    )
    if is_split and not wants_many and not launch.cpu:
        added |= SPLIT_ENV
    chosen = environ.keys() - {"CUDA_VISIBLE_DEVICES"}
    return {name: value for name, value in added.items() if name not in chosen} | launch.env


def complete(launch: Launch, environ: Mapping[str, str], *, num_gpus: int) -> None:
    """Fill in what the machine knows, and refuse what does not go together.

    Args:
        launch: Changed in place.
        environ: Of this process.
        num_gpus: On this machine.

    Raises:
        FlagError: With the key and the remedy.
    """
    is_here = launch.backend in HERE
    if launch.backend not in BACKENDS:
        raise FlagError(f"launch.backend is {launch.backend}; there are: {', '.join(BACKENDS)}")
    if launch.nnodes < 1 or launch.nproc_per_node < 0 or launch.max_restarts < 0:
        raise FlagError(
            f"launch.nnodes {launch.nnodes}, nproc_per_node {launch.nproc_per_node}, max_restarts "
            f"{launch.max_restarts}: there is at least one node, and no count is negative"
        )
    if launch.nproc_per_node == 0:
        if launch.cpu or num_gpus == 0:
            where = "this machine has no GPU" if is_here and not launch.cpu else "not given"
            raise FlagError(
                f"launch.nproc_per_node: {where}; say how many ranks a node has, as "
                "launch.nproc_per_node=2"
            )
        launch.nproc_per_node = num_gpus
    given = [name for name in MEETING_KEYS if getattr(launch, name) not in (None, "")]
    if launch.backend in ("slurm", "ray") and given:
        raise FlagError(
            f"launch.{given[0]} would have no effect: with launch.backend {launch.backend} the "
            "nodes are not known before the job runs; drop it"
        )
    if launch.backend == "local" and launch.nnodes > 1:
        raise FlagError(
            f"launch.nnodes is {launch.nnodes} and launch.backend local is this machine alone; "
            "use torchrun, slurm or ray"
        )
    if launch.backend in ("torchrun", "print") and not launch.is_alone:
        _complete_node(launch, environ)


def _complete_node(launch: Launch, environ: Mapping[str, str]) -> None:
    if not launch.master_addr and not launch.rdzv_endpoint:
        if launch.nnodes > 1:
            raise FlagError(
                f"launch.master_addr is missing: the host of node 0, where {launch.nnodes} nodes "
                "meet"
            )
        launch.master_addr = "127.0.0.1"
    if launch.node_rank is None and launch.nnodes > 1:
        found = next((environ[v] for v in NODE_RANK_VARIABLES if v in environ), None)
        if found is None:
            raise FlagError(
                f"launch.node_rank is missing, and none of {', '.join(NODE_RANK_VARIABLES)} is "
                f"set; give each of the {launch.nnodes} nodes its own, from 0"
            )
        launch.node_rank = int(found)
    if not 0 <= launch.this_node < launch.nnodes:
        raise FlagError(
            f"launch.node_rank is {launch.this_node}; with launch.nnodes {launch.nnodes} it is "
            f"0 to {launch.nnodes - 1}"
        )
