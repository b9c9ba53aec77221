"""What `python -m benchmarks.cuda_loops --write` found in the compiled kernels on 2026-11-26; not to be edited.

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
            "by_k": Counted(instructions=833, passes=1044, cycles={1: (2825, 3950), 2: (3783, 4612)}),
            "by_output": Counted(instructions=903, passes=1100, cycles={1: (3180, 4393), 2: (4044, 5114)}),
            "data_gradient": Counted(instructions=877, passes=1044, cycles={1: (2801, 3931), 2: (3753, 4748)}),
            "weight_gradient": Counted(instructions=941, passes=800, cycles={1: (3220, 4613), 2: (3963, 5083)}),
        },
        "float32": {
            "by_k": Counted(instructions=1273, passes=2344, cycles={1: (5476, 5776)}),
            "by_output": Counted(instructions=1402, passes=2408, cycles={1: (5332, 5762)}),
            "data_gradient": Counted(instructions=1318, passes=2344, cycles={1: (5556, 5910)}),
            "weight_gradient": Counted(instructions=1414, passes=2368, cycles={1: (5648, 6124)}),
        },
    },
    75: {
        "float16": {
            "by_k": Counted(instructions=409, passes=532, cycles={1: (2533, 3027), 2: (3583, 4369)}),
            "by_output": Counted(instructions=484, passes=588, cycles={1: (2871, 3462), 2: (3967, 4839)}),
            "data_gradient": Counted(instructions=459, passes=532, cycles={1: (2551, 3089), 2: (3672, 4330)}),
            "weight_gradient": Counted(instructions=526, passes=544, cycles={1: (3228, 3940), 2: (4091, 4800)}),
        },
        "float32": {
            "by_k": Counted(instructions=1246, passes=2344, cycles={1: (6375, 7015)}),
            "by_output": Counted(instructions=1384, passes=2408, cycles={1: (6417, 7254)}),
            "data_gradient": Counted(instructions=1291, passes=2344, cycles={1: (6784, 7446)}),
            "weight_gradient": Counted(instructions=1401, passes=2368, cycles={1: (5826, 6851)}),
        },
    },
    80: {
        "float16": {
            "by_k": Counted(instructions=298, passes=404, cycles={1: (1155, 1432), 2: (1583, 1939)}),
            "by_output": Counted(instructions=389, passes=484, cycles={1: (1864, 2122), 2: (2087, 2582)}),
            "data_gradient": Counted(instructions=337, passes=404, cycles={1: (1363, 1681), 2: (1783, 2099)}),
            "weight_gradient": Counted(instructions=393, passes=512, cycles={1: (1698, 2164), 2: (1961, 2678)}),
        },
        "bfloat16": {
            "by_k": Counted(instructions=298, passes=404, cycles={1: (1155, 1432), 2: (1508, 1923)}),
            "by_output": Counted(instructions=389, passes=484, cycles={1: (1850, 2103), 2: (2095, 2607)}),
            "data_gradient": Counted(instructions=339, passes=404, cycles={1: (1380, 1684), 2: (1780, 2056)}),
            "weight_gradient": Counted(instructions=388, passes=512, cycles={1: (1688, 2208), 2: (1966, 2650)}),
        },
        "tf32": {
            "by_k": Counted(instructions=602, passes=404, cycles={1: (1181, 1507), 2: (1665, 2120)}),
            "by_output": Counted(instructions=705, passes=658, cycles={1: (1982, 2449), 2: (2336, 3037)}),
            "data_gradient": Counted(instructions=634, passes=404, cycles={1: (1305, 1608), 2: (1777, 2221)}),
            "weight_gradient": Counted(instructions=696, passes=768, cycles={1: (1816, 2368), 2: (2281, 3103)}),
        },
        "float32": {
            "by_k": Counted(instructions=1251, passes=2216, cycles={1: (5322, 5574)}),
            "by_output": Counted(instructions=1386, passes=2296, cycles={1: (5396, 5872)}),
            "data_gradient": Counted(instructions=1271, passes=2216, cycles={1: (5317, 5618)}),
            "weight_gradient": Counted(instructions=1393, passes=2304, cycles={1: (5241, 5801)}),
        },
    },
    90: {
        "float16": {
            "by_k": Counted(instructions=315, passes=404, cycles={1: (1154, 1530), 2: (1415, 2105)}),
            "by_output": Counted(instructions=402, passes=484, cycles={1: (1811, 2461), 2: (2070, 2894)}),
            "data_gradient": Counted(instructions=350, passes=404, cycles={1: (1375, 1920), 2: (1651, 2502)}),
            "weight_gradient": Counted(instructions=427, passes=512, cycles={1: (1644, 2235), 2: (1928, 2713)}),
        },
        "bfloat16": {
            "by_k": Counted(instructions=315, passes=404, cycles={1: (1154, 1530), 2: (1415, 2105)}),
            "by_output": Counted(instructions=402, passes=484, cycles={1: (1814, 2464), 2: (2086, 2917)}),
            "data_gradient": Counted(instructions=350, passes=404, cycles={1: (1374, 1918), 2: (1570, 2486)}),
            "weight_gradient": Counted(instructions=418, passes=512, cycles={1: (1635, 2298), 2: (1814, 2716)}),
        },
        "tf32": {
            "by_k": Counted(instructions=616, passes=404, cycles={1: (1325, 1700), 2: (1775, 2400)}),
            "by_output": Counted(instructions=716, passes=656, cycles={1: (2119, 2740), 2: (2485, 3300)}),
            "data_gradient": Counted(instructions=643, passes=404, cycles={1: (1401, 1867), 2: (1770, 2402)}),
            "weight_gradient": Counted(instructions=723, passes=768, cycles={1: (1995, 2521), 2: (2386, 3272)}),
        },
        "float32": {
            "by_k": Counted(instructions=1266, passes=2216, cycles={1: (3739, 4106)}),
            "by_output": Counted(instructions=1398, passes=2296, cycles={1: (3898, 4432)}),
            "data_gradient": Counted(instructions=1275, passes=2216, cycles={1: (3824, 4229)}),
            "weight_gradient": Counted(instructions=1414, passes=2304, cycles={1: (3587, 4154)}),
        },
    },
}
