"""What each kernel of the Triton backend does in one launch: FLOP, bytes, tiles, waves and dependent trips to memory.

Boxes, tiles and grids are those of the backend: :mod:`..backends.gpu.grids` and :mod:`..backends.triton.tuning`, which
its launchers ask too. Assumed throughout: a kernel finds nothing of its own in L2 when it starts; programs of one
sample advance together, so device memory delivers an operand once a sample, and L2 once a tile; features and gradients
lie channels-last.
"""

from __future__ import annotations

from ..backends.gpu import grids
from ..backends.gpu.grids import best_box, cdiv, next_power
from ..backends.gpu.lists import PLAN
from ..backends.packing import tile_channels
from ..backends.triton import tuning
from ..backends.triton.tuning import ConvGrid, Tile
from .cases import FLOAT, SPATIAL, TEMPORAL, Case, Reduction, reduction
from .chips import DRAM_US, L2_US, START_US, Chip, Launch
from .common import busiest, library, little, stream


def tile_for(kernel: str, case: Case, chip: Chip) -> Tile:
    return tuning.choose_tile(kernel, chip.architecture, case.kind, case.size, case.channels)


def box_rows(case: Case, rows: int) -> tuple[int, float]:
    """Boxes of ``rows`` positions a sample, and how many of a box's rows lie inside it: only those are read."""
    boxes = best_box(rows, *case.size).tiles(*case.size)
    return boxes, case.positions / boxes


def conv_grid(case: Case, chip: Chip, width: int, taps: int) -> ConvGrid:
    """Of a convolution over at most ``width`` columns by ``taps``."""
    return tuning.conv_grid(
        chip.architecture, chip.processors, case.kind, case.batch, case.size, case.channels, width, taps, 0
    )


def conv(
    case: Case, chip: Chip, form: str, samples: list[Reduction], width: int, taps: int, extra: float = 0.0
) -> Launch:
    """``extra`` bytes are read or written by the epilogue besides the output."""
    tile, box, (ctas, _, _) = conv_grid(case, chip, width, taps)
    per_sample = grids.box_tiles(box, case.size, case.channels, tile.n).per_sample
    steps = [sample.steps for sample in samples]
    deal = grids.deal(steps, per_sample, ctas)
    rows = sum(steps) * tile.k if form == "packed" else sum(sample.rows for sample in samples)
    panel = sum(sample.columns for sample in samples) * case.positions * case.element
    workspace = deal.parts * tile.m * tile.n * FLOAT
    loads = sum(steps) * per_sample * (box_rows(case, tile.m)[1] + tile.n) * tile.k * case.element
    # A tile fills its pipeline, reads what its epilogue needs and stores; a shared one is added up 16 rows at a time.
    fixup = tile.m / 16 * (deal.parts_of_a_tile + 1) * L2_US if deal.parts else 0.0
    return Launch(
        f"conv {form}",
        ctas,
        panel + rows * case.channels * case.element + case.features + extra + workspace,
        loads + case.features + extra + 2 * workspace,
        flop=2.0 * sum(sample.rows for sample in samples) * case.positions * case.channels,
        busiest=2.0 * deal.longest * tile.m * tile.n * tile.k * min(tile.per_sm, cdiv(ctas, chip.processors)),
        waves=case.batch * per_sample / ctas,
        tile=tile,
        tail=START_US + (2 + 3 * deal.work_tiles) * DRAM_US + fixup,
    )


def plain_conv(case: Case, chip: Chip, form: str) -> Launch:
    """Mixing (``stored``) or its data gradient (``transposed``)."""
    one = Reduction(cdiv(case.channels, tile_channels(case.dtype)), case.channels, case.channels)
    return conv(case, chip, form, [one] * case.batch, case.channels, 1)


def resident_programs(tile: Tile, case: Case, chip: Chip, accumulators: int) -> int:
    """Programs that fit on a multiprocessor by shared memory and, roughly, by registers."""
    operands = tile.stages * (tile.m + tile.n) * tile.k * case.element
    registers = accumulators * tile.m * tile.n + 100 * 32 * tile.warps
    return max(1, min(chip.smem * 1024 // operands, 65536 // registers))


def one_tile_each(launch: Launch, case: Case, chip: Chip, steps: list[int], block: float, accumulators: int) -> Launch:
    """Completes a launch whose programs have ``steps`` K blocks and go, in order, to multiprocessors as they get free.

    ``launch.l2`` holds what epilogues touch; a K block loads ``block`` elements.
    """
    tile, active = launch.tile, [n for n in steps if n]
    fits = resident_programs(tile, case, chip, accumulators)
    resident = min(fits, max(1, cdiv(len(active), chip.processors)))
    places = chip.processors * resident
    return launch._replace(
        l2=launch.l2 + sum(active) * block * case.element,
        busiest=2.0 * busiest(active, places) * resident * tile.m * tile.n * tile.k,
        waves=len(active) / places,
        tail=START_US + 3 * DRAM_US * cdiv(len(active), places) / resident,
    )


def data_gradient(case: Case, chip: Chip) -> Launch:
    """Both operators on every channel, with the gates' gradient."""
    tile, c = tile_for("data_gradient", case, chip), case.channels
    boxes, rows = box_rows(case, tile.m)
    programs, taps = case.batch * boxes * cdiv(c, tile.n), SPATIAL + TEMPORAL
    ends = 2 * case.features + case.batch * boxes * c * FLOAT
    dram = ends + case.features + case.batch * taps * c**2 * case.element
    flop = 2.0 * case.batch * case.positions * taps * c**2
    launch = Launch("data_gradient", programs, dram, ends, flop=flop, tile=tile)
    return one_tile_each(launch, case, chip, [taps * cdiv(c, tile.k)] * programs, (rows + tile.n) * tile.k, 2)


def weight_gradient(case: Case, chip: Chip, gated: bool) -> Launch:
    """Of both operators, or of mixing."""
    tile, c = tile_for("weight_gradient", case, chip), case.channels
    boxes, inside = box_rows(case, tile.k)
    steps, flop, read, written = [], 0.0, 0.0, 0.0
    for spatial, temporal, samples in case.slot_lists():
        taps = [spatial] * SPATIAL + [temporal] * TEMPORAL if gated else [c]
        of_slot = [
            samples * boxes * (row < count)
            for count in taps
            for row in range(0, c, tile.m)
            for _ in range(0, c, tile.n)
        ]
        columns = reduction(case, spatial, temporal).columns if gated else c
        operands = samples * case.positions * (columns + c) * case.element
        # Every wave of a slot goes over all its positions: from memory where L2 does not keep them.
        read += operands * (1 if operands < chip.l2 * 1e6 else cdiv(sum(map(bool, of_slot)), chip.processors))
        written += sum(taps) * c * case.element
        flop += 2.0 * samples * case.positions * sum(taps) * c
        steps += of_slot
    name = "weight_gradient" if gated else "weight_gradient mixing"
    launch = Launch(name, len(steps), read + written, written, flop=flop, tile=tile)
    return one_tile_each(launch, case, chip, steps, (tile.m + tile.n) * inside, 1)


def choice(case: Case, chip: Chip) -> list[Launch]:
    """Scores, choice, share and gates of a training step."""
    trips = 2 + cdiv(case.channels, tuning.score_channels(grids.next_power(case.neurons)))
    return [little("route", case, chip, case.batch, 5 * case.batch + case.neurons, trips)]


def choice_backward(case: Case, chip: Chip) -> list[Launch]:
    """Their gradients, of which that of the scoring kernels is zeroed, then written for every output."""
    ctas = cdiv(case.channels, tuning.route_channels(grids.next_power(case.neurons)))
    rows, matrices = 4 * case.batch + 3 * case.neurons, case.neurons * case.channels**2 * case.element
    one = little("route_backward", case, chip, ctas, rows, 2 + case.batch)
    return [one, library("scoring gradient spread", 2.0 * matrices, 2)]


def gate_sums(case: Case, chip: Chip) -> Launch:
    """The gates' gradient, added up over boxes."""
    boxes = box_rows(case, tile_for("data_gradient", case, chip).m)[0]
    ctas = case.batch * cdiv(case.channels, tuning.gate_channels(case.channels))
    return little("gate_sums", case, chip, ctas, case.batch * (boxes + 1), 1 + boxes)


def counters() -> list[Launch]:
    """What a convolution's counters cost before it: nothing on the default stream, as each leaves them zero."""
    return []


def tap_sums(case: Case, chip: Chip) -> tuple[Launch, int]:
    """The launch, and how many partial sums of a channel it writes."""
    channels = tuning.SUMS[1].channels
    parts = grids.tap_sum_parts(case.batch, case.positions, case.channels, channels, chip.processors)
    dram = case.features + case.batch * parts * case.channels * FLOAT
    trips = cdiv(cdiv(case.positions, grids.SUM_POSITIONS), parts) * DRAM_US
    return stream("tap_sums", chip, cdiv(case.channels, channels) * parts * case.batch, dram, trips), parts


def gather(
    kernel: str, case: Case, chip: Chip, lists: list[tuple[int, int]], most: int, extra: float, *, l2=0.0, tail=0.0
) -> Launch:
    """Gathers listed channels into a panel, ``most`` K blocks of either list at most.

    ``extra`` bytes are touched besides features and panel, ``l2`` of them by every program.
    """
    grid = grids.gather_grid(case.batch, case.positions, most, chip.processors)
    columns = [reduction(case, *pair).columns for pair in lists]
    panel = sum(columns) * case.positions * case.element
    # Channels-last, both lists touch every 32 bytes of a row: L2 delivers features twice, but a program takes the lists
    # block by block in turn, so memory delivers them once.
    trips = cdiv(max(columns) // tile_channels(case.dtype), grid.splits) * (L2_US + DRAM_US)
    return stream(
        kernel,
        chip,
        grid.num_ctas,
        case.features + panel + extra,
        trips,
        l2=2 * case.features + panel + extra + grid.num_ctas * l2,
        tail=tail,
    )


def route_and_gather(case: Case, chip: Chip, parts: int) -> Launch:
    """Every program adds up its sample's ``parts`` and works its scores out before it gathers."""
    c, n, block = case.channels, case.neurons, tile_channels(case.dtype)
    counters = conv_grid(case, chip, c + block, SPATIAL).arrival_counters
    read = (case.batch * parts + n) * c * FLOAT + case.slots * c * 4 + (n + 1) * 8
    written = case.batch * (PLAN * 4 + 8 + n * FLOAT) + counters * 4
    # The compiler reads four parts of so many channels at a time.
    tail = (cdiv(c, tuning.score_channels(next_power(n))) * (cdiv(parts, 4) + 1) + 3) * L2_US
    lists, most = [case.split] * case.batch, cdiv(c, block)
    return gather("route_and_gather", case, chip, lists, most, read + written, l2=(parts + n) * c * FLOAT, tail=tail)


def pack_filters(case: Case, chip: Chip, taps: int) -> Launch:
    """Parameters of the chosen neurons, laid out for the kernels."""
    dram = 2.0 * case.slots * case.channels**2 * taps * case.element
    programs = tuning.filter_tiles(case.channels, case.channels, taps) * case.slots
    return stream("pack_filters", chip, programs, dram, L2_US + DRAM_US)


def unpack_filters(case: Case, chip: Chip, taps: int) -> Launch:
    """The way back for gradients: listed channels are read, and all neurons written."""
    listed = sum(lists[0 if taps == SPATIAL else 1] for lists in case.slot_lists())
    dram = (listed + case.neurons * case.channels) * case.channels * taps * case.element
    programs = tuning.filter_tiles(case.channels, case.channels, taps) * case.neurons
    return stream("unpack_filters", chip, programs, dram, L2_US + DRAM_US)


def padding(case: Case, chip: Chip, *matrices: float) -> list[Launch]:
    """Copies of operands whose rows are no whole 16 bytes: none, kernels mask what is not there."""
    return []
