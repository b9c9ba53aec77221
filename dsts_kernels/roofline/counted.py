"""What `python -m benchmarks.compiled.cuda_loops --write` found in the kernels on 2026-11-26; not to be edited.

A step of each product kernel's main loop, by compute capability, dtype of products and kernel.
Compiled by ptxas 12.9.86 (sm_70); nvcc 13.0.88 (sm_75, sm_80, sm_90).
"""

from __future__ import annotations

from typing import NamedTuple


class Counted(NamedTuple):
    """Of one step."""

    instructions: int  # of a warp: branches not taken included, inner loops times their trips
    passes: int  # of a block through shared memory and L1
    cycles: dict[int, tuple[int, int]]  # by blocks on a multiprocessor: as assumed, and with all unfavourable


COUNTED: dict[int, dict[str, dict[str, Counted]]] = {
    70: {
        "float16": {
            "by_k": Counted(instructions=705, passes=776, cycles={1: (1360, 1889), 2: (2148, 2583)}),
            "by_output": Counted(instructions=722, passes=844, cycles={1: (1518, 1993), 2: (2240, 2748)}),
            "data_gradient": Counted(instructions=739, passes=776, cycles={1: (1401, 1922), 2: (2110, 2657)}),
            "weight_gradient": Counted(instructions=681, passes=784, cycles={1: (1431, 1979), 2: (2124, 2558)}),
        },
        "float32": {
            "by_k": Counted(instructions=1244, passes=2320, cycles={1: (5514, 5697)}),
            "by_output": Counted(instructions=1379, passes=2392, cycles={1: (5094, 5504)}),
            "data_gradient": Counted(instructions=1286, passes=2320, cycles={1: (5291, 5692)}),
            "weight_gradient": Counted(instructions=1336, passes=2336, cycles={1: (4947, 5562)}),
        },
    },
    75: {
        "float16": {
            "by_k": Counted(instructions=324, passes=528, cycles={1: (1762, 1918), 2: (2547, 3089)}),
            "by_output": Counted(instructions=368, passes=600, cycles={1: (2192, 2912), 2: (3403, 4119)}),
            "data_gradient": Counted(instructions=326, passes=528, cycles={1: (1822, 1998), 2: (2388, 2882)}),
            "weight_gradient": Counted(instructions=394, passes=544, cycles={1: (1846, 2154), 2: (2777, 3439)}),
        },
        "float32": {
            "by_k": Counted(instructions=1223, passes=2320, cycles={1: (6558, 7247)}),
            "by_output": Counted(instructions=1359, passes=2392, cycles={1: (6319, 7118)}),
            "data_gradient": Counted(instructions=1263, passes=2320, cycles={1: (6894, 7470)}),
            "weight_gradient": Counted(instructions=1334, passes=2336, cycles={1: (5617, 6571)}),
        },
    },
    80: {
        "float16": {
            "by_k": Counted(instructions=172, passes=392, cycles={1: (554, 867), 2: (1037, 1465)}),
            "by_output": Counted(instructions=194, passes=460, cycles={1: (592, 903), 2: (1031, 1643)}),
            "data_gradient": Counted(instructions=169, passes=392, cycles={1: (588, 899), 2: (1053, 1513)}),
            "weight_gradient": Counted(instructions=175, passes=400, cycles={1: (575, 850), 2: (1042, 1441)}),
        },
        "bfloat16": {
            "by_k": Counted(instructions=172, passes=392, cycles={1: (558, 818), 2: (1027, 1439)}),
            "by_output": Counted(instructions=194, passes=460, cycles={1: (647, 1021), 2: (1050, 1744)}),
            "data_gradient": Counted(instructions=169, passes=392, cycles={1: (588, 899), 2: (1053, 1513)}),
            "weight_gradient": Counted(instructions=175, passes=400, cycles={1: (575, 850), 2: (1042, 1441)}),
        },
        "tf32": {
            "by_k": Counted(instructions=300, passes=392, cycles={1: (767, 1023), 2: (1217, 1762)}),
            "by_output": Counted(instructions=358, passes=460, cycles={1: (1439, 1775), 2: (1934, 2135)}),
            "data_gradient": Counted(instructions=298, passes=392, cycles={1: (829, 1121), 2: (1401, 1758)}),
            "weight_gradient": Counted(instructions=411, passes=400, cycles={1: (898, 1240), 2: (1363, 1742)}),
        },
        "float32": {
            "by_k": Counted(instructions=1228, passes=2192, cycles={1: (5209, 5673)}),
            "by_output": Counted(instructions=1345, passes=2264, cycles={1: (5080, 5595)}),
            "data_gradient": Counted(instructions=1243, passes=2192, cycles={1: (5290, 5564)}),
            "weight_gradient": Counted(instructions=1336, passes=2208, cycles={1: (4967, 5271)}),
        },
    },
    90: {
        "float16": {
            "by_k": Counted(instructions=170, passes=392, cycles={1: (490, 899), 2: (840, 1494)}),
            "by_output": Counted(instructions=218, passes=460, cycles={1: (660, 1112), 2: (1064, 1930)}),
            "data_gradient": Counted(instructions=168, passes=392, cycles={1: (528, 903), 2: (888, 1579)}),
            "weight_gradient": Counted(instructions=186, passes=400, cycles={1: (545, 939), 2: (868, 1601)}),
        },
        "bfloat16": {
            "by_k": Counted(instructions=182, passes=392, cycles={1: (610, 951), 2: (916, 1599)}),
            "by_output": Counted(instructions=218, passes=460, cycles={1: (646, 1058), 2: (994, 1847)}),
            "data_gradient": Counted(instructions=168, passes=392, cycles={1: (528, 903), 2: (888, 1579)}),
            "weight_gradient": Counted(instructions=186, passes=400, cycles={1: (545, 939), 2: (868, 1601)}),
        },
        "tf32": {
            "by_k": Counted(instructions=307, passes=392, cycles={1: (700, 1087), 2: (1055, 1747)}),
            "by_output": Counted(instructions=378, passes=460, cycles={1: (1362, 1813), 2: (1551, 2291)}),
            "data_gradient": Counted(instructions=298, passes=392, cycles={1: (696, 1112), 2: (1073, 1704)}),
            "weight_gradient": Counted(instructions=388, passes=400, cycles={1: (818, 1318), 2: (1151, 1564)}),
        },
        "float32": {
            "by_k": Counted(instructions=1237, passes=2192, cycles={1: (3581, 4096)}),
            "by_output": Counted(instructions=1357, passes=2264, cycles={1: (3540, 3987)}),
            "data_gradient": Counted(instructions=1237, passes=2192, cycles={1: (3496, 4046)}),
            "weight_gradient": Counted(instructions=1352, passes=2208, cycles={1: (3306, 3619)}),
        },
    },
}
