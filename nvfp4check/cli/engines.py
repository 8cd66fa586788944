"""The option that says where the work is done."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nvfp4check.engine import Engine


class EngineName(StrEnum):
    """Where the work is done."""

    LOCAL = "local"
    RAY = "ray"


EngineOption = Annotated[
    EngineName,
    typer.Option(
        help="Where the work is done: processes here, or a Ray cluster, the one of RAY_ADDRESS or "
        "of this machine."
    ),
]


def make_expert_engine(name: EngineName, jobs: int) -> "Engine | None":
    """Return who computes the experts of a forward run: None, this process, or a Ray cluster."""
    if name is EngineName.LOCAL:
        return None
    import torch

    from nvfp4check.engine.ray import RayEngine

    return RayEngine(jobs, threads=torch.get_num_threads())


def make_engine(name: EngineName, jobs: int) -> "Engine":
    """Return the engine of this name; a Ray cluster that has to be started gets `jobs` workers."""
    if name is EngineName.RAY:
        from nvfp4check.engine.ray import RayEngine

        return RayEngine(jobs)
    from nvfp4check.engine.local import LocalEngine

    return LocalEngine(jobs)
