"""Choose the tiles of a product by time, among those the compiler makes something sound of.

Contract:
    candidates  the defaults first; then other tiles, pipeline depths and warp specialisation
    legal       those that hold every codegen check on the architecture; no GPU is needed for it
    tuned       the fastest legal one for M, N, K, timed on the GPU that the operands lie on; M is
                taken up to a power of two, for tokens come in any number
    cached      by GPU, Triton release, N, K and the power of M, in one JSON file; a file that
                cannot be read, or an entry of another form, is as good as none

`matmul` takes the result as its `config`; without one it takes its default.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from nvfp4check.kernels.arch import Architecture, architecture_of
from nvfp4check.kernels.codegen_cases import CASES
from nvfp4check.kernels.codegen_checks import check_kernel
from nvfp4check.kernels.codegen_products import matmul_tma_source
from nvfp4check.kernels.launch import power_of_two
from nvfp4check.kernels.matmul import MatmulConfig, default_tma_config, matmul

#: Above this M the best tiles do not change.
_MOST_ROWS = 1 << 15

_MANY_ROWS = CASES["matmul (many rows)"]


def candidates(arch: Architecture) -> list[MatmulConfig]:
    """Return the tiles worth trying on an architecture, the default first."""
    default = default_tma_config(arch)
    tried = [default]
    for block_n in (128, 256):
        for block_k in (128, 256):
            for stages in (2, 3, 4, 5):
                plain = replace(default, block_n=block_n, block_k=block_k, stages=stages)
                tried.append(plain)
                if arch.tensor_memory_columns:
                    tried.append(replace(plain, specialize=True))
    return list(dict.fromkeys(tried))


def legal(arch: Architecture, configs: Iterable[MatmulConfig]) -> list[MatmulConfig]:
    """Return those of the configurations that hold every codegen check on an architecture."""
    needs = _MANY_ROWS.needs(arch)
    return [
        config
        for config in configs
        if check_kernel(matmul_tma_source("candidate", config), arch, needs).holds
    ]


def default_cache() -> Path:
    """Return where tuned configurations are kept: $XDG_CACHE_HOME, else ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nvfp4check" / "tuning.json"


@dataclass(frozen=True, slots=True)
class TuningCache:
    """Tuned configurations in a JSON file."""

    path: Path

    def get(self, key: str) -> MatmulConfig | None:
        """Return the configuration of a key, or None."""
        try:
            return MatmulConfig(**self._entries()[key])
        except (KeyError, TypeError):
            return None

    def put(self, key: str, config: MatmulConfig) -> None:
        """Keep a configuration; the file is replaced whole."""
        entries = {**self._entries(), key: asdict(config)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        fresh.replace(self.path)

    def _entries(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}


def key_of(gpu: str, M: int, N: int, K: int) -> str:
    """Return the key of a product on a GPU."""
    rows = power_of_two(M, most=_MOST_ROWS)
    return f"{gpu} | triton {triton.__version__} | M<={rows} N={N} K={K}"


def tuned_config(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    alpha: torch.Tensor,
    dtype: torch.dtype,
    cache: TuningCache,
    *,
    arch: Architecture | None = None,
    seconds: Callable[[Callable[[], Any]], float],
) -> MatmulConfig:
    """Return the fastest legal configuration for `matmul` of these operands.

    Args:
        operands: Codes and scales of A, codes and scales of B.
        alpha: As `matmul` takes it.
        dtype: Of the product.
        cache: Asked first, and told the answer.
        arch: What to compile for; by default what the operands lie on.
        seconds: Times a call, as `nvfp4check.kernels.bench.seconds` does.

    Raises:
        ValueError: No configuration is legal, or the operands do not fit together.
    """
    a_codes, _, b_codes, _ = operands
    arch = arch or architecture_of(a_codes)
    on_gpu = a_codes.is_cuda
    gpu = torch.cuda.get_device_name(a_codes.device) if on_gpu else arch.name
    key = key_of(gpu, a_codes.shape[0], b_codes.shape[0], a_codes.shape[1] * 2)
    found = cache.get(key)
    if found is not None:
        return found
    sound = legal(arch, candidates(arch))
    if not sound:
        raise ValueError(f"no tiles of matmul are legal on {arch.name} with this compiler")
    times = {
        config: seconds(partial(matmul, *operands, alpha, dtype, config=config)) for config in sound
    }
    best = min(times, key=times.__getitem__)
    cache.put(key, best)
    return best
