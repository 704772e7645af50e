"""Starts the ranks on a Ray cluster: one actor a rank, which runs the entry point as a process.

The package `ray` (extra ``megasft[ray]``) is imported here and in ``ray_actor.py`` alone. A
placement group holds the actors, one for each GPU or, with ``launch.cpu``, for each CPU rank; when
it is placed, ranks are numbered node by node and rank 0's node says where they meet. The entry
point is a child of its actor and not the actor itself: Megatron's checkpoint writers import
``__main__`` again, and a rank that is killed leaves an actor that can say so. All nodes have to see
the same files.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megasft.errors import FlagError, MissingPackageError
from megasft.launch import prepare, saved
from megasft.launch.ray_actor import SECONDS_TO_STOP, Outcome, RankActor, Seat
from megasft.launch.run import MODULE, Run
from megasft.ranks import failure

logger = logging.getLogger(__name__)

LOCAL: Final = "local"
SECONDS_TO_PLACE: Final = 600.0


def run_on_ray(run: Run, environ: Mapping[str, str]) -> int:
    """Convert, train on a cluster, export; return the exit code.

    Raises:
        FlagError: No cluster answers, or it has no room for the ranks.
        MissingPackageError: Ray is not installed.
    """
    ray = _import_ray()
    saved.require_free(run)
    environ = dict(environ) | run.environment
    if run.conversion is not None:
        prepare.convert(run.conversion, environ)
    saved.save(run)
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray, run)
    try:
        code = _with_restarts(ray, run, environ)
    finally:
        if is_ours:
            ray.shutdown()
    if code == 0:
        prepare.export(run.export, environ)
    return code


def _with_restarts(ray: Any, run: Run, environ: Mapping[str, str]) -> int:
    restarts = run.launch.max_restarts
    attempt = 0
    while (failed := _attempt(ray, run, environ, attempt)) is not None:
        if attempt == restarts or failed.is_lasting:
            sys.stderr.write(f"\n{failed.message()}\n")
            code = failed.exit_code or 1
            return code if code > 0 else 128 - code
        attempt += 1
        logger.warning(
            "rank %d ended with exit code %s; restart %d of %d, from the last checkpoint",
            *(failed.rank, failed.exit_code, attempt, restarts),
        )
    return 0


def _attempt(
    ray: Any, run: Run, environ: Mapping[str, str], attempt: int
) -> failure.Failure | None:
    """Run all ranks once; return what failed first, or None when all ended well."""
    group = _place(ray, run)
    try:
        actors = _actors(ray, run, group)
        seats = ray.get([actor.seat.remote() for actor in actors])
        order = sorted(
            range(len(seats)), key=lambda i: (seats[i].node != seats[0].node, seats[i].node)
        )
        actors, seats = [actors[i] for i in order], [seats[i] for i in order]
        port = ray.get(actors[0].free_port.remote())
        environments = rank_environments(seats, environ, port=port)
        words = [sys.executable, "-u", "-m", MODULE, *run.argv]
        logs = [run.log_dir / f"ray_attempt_{attempt}" / f"{r}.log" for r in range(len(actors))]
        running = [
            actor.run.remote(words, env, os.getcwd(), str(log.absolute()))
            for actor, env, log in zip(actors, environments, logs, strict=True)
        ]
        return _first_failure(ray, actors, running, logs)
    finally:
        ray.util.remove_placement_group(group)


def _first_failure(
    ray: Any, actors: Sequence[Any], running: list[Any], logs: Sequence[Path]
) -> failure.Failure | None:
    """Wait for all ranks; when one fails, end the others."""
    place = {reference: rank for rank, reference in enumerate(running)}
    while running:
        (ready, *_), running = ray.wait(running, num_returns=1)
        rank = place[ready]
        try:
            outcome: Outcome = ray.get(ready)
        except ray.exceptions.RayError as error:
            outcome = Outcome(rank, 1, [f"[megasft] error: its actor is gone: {error}"])
        if outcome.exit_code == 0:
            continue
        ray.wait(
            [a.stop.remote() for a in actors], num_returns=len(actors), timeout=SECONDS_TO_STOP
        )
        found = failure.first_failure(
            dict(enumerate(logs)), failure.Ended(outcome.rank, outcome.exit_code)
        )
        text = "\n".join(outcome.lines[-failure.LAST_LINES :])
        return found or failure.Failure(outcome.rank, outcome.exit_code, text, logs[rank])
    return None


def rank_environments(
    seats: Sequence[Seat], environ: Mapping[str, str], *, port: int
) -> list[dict[str, str]]:
    """Return the environment of each rank: what torchrun would set, and its node's GPUs.

    Every rank sees all GPUs that its node gave to this run, and takes that of its local rank, as
    Megatron expects.

    Args:
        seats: Of the ranks in order, the ranks of a node next to each other.
        environ: That all of them have.
        port: Free on the first seat's node.
    """
    nodes = list(dict.fromkeys(seat.node for seat in seats))
    by_node = {node: [s for s in seats if s.node == node] for node in nodes}
    environments = []
    seen: dict[str, int] = dict.fromkeys(nodes, 0)
    for rank, seat in enumerate(seats):
        here = by_node[seat.node]
        gpus = [gpu for other in here for gpu in other.gpus]
        facts = {
            "RANK": rank,
            "WORLD_SIZE": len(seats),
            "LOCAL_RANK": seen[seat.node],
            "LOCAL_WORLD_SIZE": len(here),
            "GROUP_RANK": nodes.index(seat.node),
            "MASTER_ADDR": seats[0].address,
            "MASTER_PORT": port,
        } | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
        seen[seat.node] += 1
        environments.append(dict(environ) | {name: str(value) for name, value in facts.items()})
    return environments


def _place(ray: Any, run: Run) -> Any:
    launch = run.launch
    num_ranks = launch.num_ranks
    bundle = {"CPU": 1} if launch.cpu else {"CPU": 1, "GPU": 1}
    group = ray.util.placement_group([bundle] * num_ranks, strategy="PACK")
    short = {
        name: num_ranks * count
        for name, count in bundle.items()
        if ray.cluster_resources().get(name, 0) < num_ranks * count
    }
    if short:
        logger.warning(
            "the cluster has %s, and %d ranks want %s; waiting %.0f s for more",
            *({n: ray.cluster_resources().get(n, 0) for n in short}, num_ranks, short),
            SECONDS_TO_PLACE,
        )
    if not group.wait(SECONDS_TO_PLACE):
        ray.util.remove_placement_group(group)
        raise FlagError(
            f"the Ray cluster found no room for {num_ranks} ranks of {bundle} in "
            f"{SECONDS_TO_PLACE:.0f} s (`ray status` shows who holds it); lower "
            "launch.nproc_per_node x launch.nnodes, or add nodes"
        )
    return group


def _actors(ray: Any, run: Run, group: Any) -> list[Any]:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    # A second thread answers `stop` while the first is in `run`.
    actor = ray.remote(
        num_cpus=1, num_gpus=0 if run.launch.cpu else 1, max_concurrency=2, max_restarts=0
    )(RankActor)
    return [
        actor.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            )
        ).remote()
        for index in range(run.launch.num_ranks)
    ]


def _import_ray() -> Any:
    # Read when Ray is imported: it would take the losses of two steps for the same line.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    try:
        import ray
    except ImportError:
        raise MissingPackageError(
            "launch.backend ray needs the Python package ray, which is not installed; "
            "pip install 'megasft[ray]', or use launch.backend local or torchrun"
        ) from None
    return ray


def _connect(ray: Any, run: Run) -> None:
    address = run.launch.ray_address
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    if address == LOCAL:
        options |= {"include_dashboard": False}
        if run.launch.cpu:  # a laptop may have fewer cores than ranks
            options |= {"num_cpus": max(os.cpu_count() or 1, run.launch.nproc_per_node)}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise FlagError(
            f"no Ray cluster answers at {address}: {error}; start one with `ray start --head`, or "
            f"set launch.ray_address={LOCAL} to use this machine alone"
        ) from error
