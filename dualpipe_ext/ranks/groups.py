"""Which ranks belong together, and on which host this one runs."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, TypeAlias

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Group", "host_identity", "process_group"]

Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | None"


def process_group(group: Group) -> dist.ProcessGroup | None:
    """The ProcessGroup of `group`: itself, that of a 1-D DeviceMesh, or None."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    if hasattr(group, "get_group"):  # DeviceMesh
        if group.ndim != 1:
            raise ValueError(
                f"the DeviceMesh has {group.ndim} dimensions, an expert group has 1: "
                f'pass one dimension of it, such as mesh["ep"]'
            )
        return group.get_group()
    raise TypeError(f"group is a {type(group).__name__}: pass a ProcessGroup, a DeviceMesh or None")


def host_identity() -> str:
    """Names this boot of this host: containers of one host share the boot id, not the host name."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return f"{socket.gethostname()}-{os.uname().version}"
