"""Types of the native module, which csrc/bindings.cpp, csrc/cpu/bindings.cpp and csrc/cuda/bindings.cpp define.

CPU kernels write to tensors that they are given and return nothing; ``threads`` is how many run. Records (an epilogue,
a panel, an operator) are named tuples, whose fields the module reads by name: of ``backends/passes.py`` and
``backends/winograd.py``.
"""

from types import ModuleType
from typing import Any, TypedDict

from torch import Tensor

from .backends.passes import Epilogue, GradientPanel
from .backends.winograd import Operator

class CudaInfo(TypedDict):
    version: str
    targets: list[int]

class BuildInfo(TypedDict):
    compiler: str
    version: str
    isas: list[str]
    openmp: bool
    cuda: CudaInfo | None
    flags: str

class Tiles(TypedDict):
    spatial: dict[int, int]
    temporal: dict[int, int]

class Units(TypedDict):
    amx_bf16: bool
    amx_fp16: bool
    amx_int8: bool
    avx512_bf16: bool
    avx512_vnni: bool
    refused: str

dtypes: dict[str, int]
winograd_tiles: Tiles

def build_info() -> BuildInfo: ...
def supported_isas() -> list[str]: ...
def units() -> Units: ...
def get_isa() -> str: ...
def set_isa(name: str) -> None: ...
def semhash_forward(
    logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None, gate: Tensor, threads: int
) -> None: ...
def semhash_backward(
    grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None, dlogits: Tensor, threads: int
) -> None: ...
def tap_sums(x: Tensor, out: Tensor, threads: int) -> None: ...
def gather_panel(
    src: Tensor,
    samples: Tensor | None,
    channels: Tensor | None,
    scale: Tensor | None,
    complement: bool,
    out: Tensor,
    threads: int,
) -> None: ...
def epilogue(spatial: Tensor | None, temporal: Tensor | None, epilogue: Epilogue, threads: int) -> None: ...
def gate_merge(
    spatial: GradientPanel,
    temporal: GradientPanel,
    samples: Tensor | None,
    gate: Tensor,
    x: Tensor,
    dx: Tensor | None,
    dgate: Tensor | None,
    threads: int,
) -> None: ...
def winograd(
    x: Tensor,
    x_samples: Tensor | None,
    spatial: Operator | None,
    temporal: Operator | None,
    epilogue: Epilogue,
    tiles: tuple[int, int, int],
    threads: int,
    stage_seconds: Tensor | None,
) -> None: ...
def winograd_weight_gradient(
    x: Tensor,
    grad: Tensor,
    samples: Tensor | None,
    spatial: Operator | None,
    temporal: Operator | None,
    add: bool,
    tiles: tuple[int, int, int],
    threads: int,
    stage_seconds: Tensor | None,
) -> None: ...

class FrozenLayer:
    def __init__(
        self,
        scoring: Tensor,
        channels: Tensor,
        starts: Tensor,
        filters: Tensor,
        bias: Tensor | None,
        mixing: Tensor | None,
        score_elements: int,
        mixing_kernel: tuple[int, int, int],
        relu: bool,
    ) -> None: ...

def frozen_layers(
    layers: list[FrozenLayer],
    x: Tensor,
    sums: Tensor | None,
    skip: Tensor | None,
    y: Tensor,
    next_sums: Tensor | None,
    neuron: Tensor | None,
    scores: Tensor | None,
    threads: int,
    stage_seconds: Tensor | None,
) -> None: ...
def tile_sizes(batch: int, t: int, h: int, w: int) -> tuple[int, int, int]: ...
def live_layer(
    x: Tensor,
    scoring: Tensor,
    divisor: float,
    logits: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    z: Tensor,
    neuron: Tensor,
    scores: Tensor,
    gate: Tensor,
    threads: int,
    stage_seconds: Tensor | None,
) -> None: ...

# Only where the build has CUDA kernels: build_info()["cuda"] says so. Arguments are addresses, sizes and strides by
# keyword, as csrc/cuda/bindings.cpp names them; launchers put them together at run time.
class Target:
    def __init__(self, device: int, capability: int, stream: int) -> None: ...

class Cuda(ModuleType):
    Target: type[Target]
    TILE: int
    K_BLOCK_BYTES: int
    MIN_K_BLOCKS: int
    MAX_CTAS: int
    MAX_NEURONS: int
    GATHER_POSITIONS: int
    GATHER_BYTES: int
    PRODUCT_SMEM_KIB: dict[int, int]
    DTYPES: dict[str, int]
    PLAN: dict[str, int]

    @staticmethod
    def semhash(**arguments: Any) -> None: ...
    @staticmethod
    def tap_sums(**arguments: Any) -> None: ...
    @staticmethod
    def group_samples(**arguments: Any) -> None: ...
    @staticmethod
    def list_channels(**arguments: Any) -> None: ...
    @staticmethod
    def gather_panel(**arguments: Any) -> None: ...
    @staticmethod
    def route_and_gather(**arguments: Any) -> None: ...
    @staticmethod
    def pack_filters(**arguments: Any) -> None: ...
    @staticmethod
    def unpack_filters(**arguments: Any) -> None: ...
    @staticmethod
    def conv(**arguments: Any) -> None: ...
    @staticmethod
    def data_gradient(**arguments: Any) -> None: ...
    @staticmethod
    def weight_gradient(**arguments: Any) -> None: ...

cuda: Cuda
