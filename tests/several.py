"""Runs a function on one or several processes that talk by gloo, as a launcher would start them; imports are paid for once."""

import multiprocessing
import os
import socket
import traceback

import torch

#: processes with everything imported already: forked from one that did and has done nothing else
fresh = multiprocessing.get_context("forkserver")
fresh.set_forkserver_preload(["pytest", "crd.trainer", "crd.inference", "crd.cli", "conftest", "tiny"])

#: what `accelerate launch` makes of docs/machines.md's configuration for FSDP2
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
#: and of the one for DeepSpeed
ZERO1 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
PATIENCE = 240  # seconds, on a machine that is busy with other things


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _one(rank: int, environment: dict, function, arguments, answers) -> None:
    os.environ.update({key: value.format(rank=rank) for key, value in environment.items()})
    torch.set_num_threads(1)
    try:
        answers.put((rank, function(*arguments), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_processes(count: int, function, *arguments, environment: dict | None = None) -> list:
    """What ``function(*arguments)`` returned on each process, by rank; fails if a process fails or they wait for each other."""
    common = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(environment or {})}
    if count > 1:
        common |= {"RANK": "{rank}", "LOCAL_RANK": "{rank}"}
        common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    answers = fresh.Queue()
    started = [fresh.Process(target=_one, args=(rank, common, function, arguments, answers)) for rank in range(count)]
    for process in started:
        process.start()
    try:
        found = {}
        for _ in started:
            rank, found[rank], trouble = answers.get(timeout=PATIENCE)
            assert trouble is None, trouble
    finally:
        for process in started:
            process.join(5)
            process.kill()
    return [found[rank] for rank in range(count)]
