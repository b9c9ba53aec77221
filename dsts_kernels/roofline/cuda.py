"""What each kernel of the CUDA backend does in one launch, as :mod:`.launches` says it of the Triton backend.

Grids are those of :mod:`..backends.gpu.grids` and csrc/cuda: tiles of positions, which follow one another without
boxes, by as many outputs; a persistent convolution; gradients of one tile a CTA. A test holds the launchers to it.
Assumed as there. Main loops of products take the cycles of :mod:`.loops`. What loops of epilogues and gathers wait for
is as their SASS has it (sm_70): where loads come together, and where one is waited for before the next is asked for.
"""

from __future__ import annotations

from ..backends.gpu import grids
from ..backends.gpu.grids import GATHER_POSITIONS, MAX_CTAS, TILE, PersistentGrid, Tiles, cdiv
from ..backends.gpu.lists import PLAN
from ..backends.packing import tile_channels
from ..backends.triton.tuning import Tile
from .cases import FLOAT, SPATIAL, TEMPORAL, Case, Reduction, reduction
from .chips import DRAM_US, L2_US, START_US, Chip, Launch
from .common import busiest, library, little, stream
from .loops import step_of

# As in csrc/cuda: channels of a CTA that works gates out; bytes of a line, and of a filter tile's rows and columns;
# tiles of a CTA that lays filters out; threads of one that gathers or sums; channels whose scores are added up at
# a time.
SEMHASH_CHANNELS = 256
LINE, FILTER_TILES = 128, 4
THREADS, SCORE_CHANNELS = 256, 256
EPILOGUE_AT_ONCE = 4  # loads of a thread that are on their way together in epilogues: vectors of skip, cells of x
AT_ONCE = 8  # loads of a thread that are on their way together: parts of a tile, features that are gathered
BY_K = ("packed", "stored")  # forms of filters that lie by K


def vector(case: Case) -> int:
    """Elements of 16 bytes."""
    return 16 // case.element


def pitch(case: Case) -> int:
    """Channels of a row with its padding."""
    return cdiv(case.channels, vector(case)) * vector(case)


def tile_of(case: Case, chip: Chip) -> Tile:
    exact = case.kind == "ieee"
    resident = grids.resident_ctas(chip.capability, exact)
    stages = 2 if chip.capability < 80 else 3 if exact else 4
    return Tile(TILE, TILE, tile_channels(case.dtype), 8 if exact else 4, stages, False, resident)


def tiles_of(case: Case) -> Tiles:
    """Of a sample."""
    return grids.flat_tiles(case.positions, case.channels)


def loaded(case: Case) -> float:
    """Rows and columns of a tile that lie inside features and outputs, on average: the rest is not read."""
    along, across = tiles_of(case)
    return case.positions / along + case.channels / across


def product(launch: Launch, case: Case, chip: Chip, kernel: str, steps: int, resident: int) -> Launch:
    """Completes a launch whose longest CTA has ``steps`` of 64 bytes, with ``resident`` CTAs a multiprocessor."""
    dtype = "tf32" if case.kind == "tf32" else str(case.dtype).removeprefix("torch.")
    cost = step_of(chip.capability, dtype, kernel, resident)
    return launch._replace(
        busiest=2.0 * steps * resident * TILE * TILE * (64 // case.element),
        cycles=steps * cost.cycles,
        worst=steps * cost.worst,
    )


def conv_grid(case: Case, chip: Chip, width: int, taps: int) -> PersistentGrid:
    """Of a convolution over at most ``width`` columns by ``taps``."""
    tile = tile_of(case, chip)
    k_blocks = cdiv(width, tile.k) * taps
    return grids.persistent_grid(case.batch, tiles_of(case), k_blocks, chip.processors, tile.per_sm, MAX_CTAS)


def conv(
    case: Case, chip: Chip, form: str, samples: list[Reduction], width: int, taps: int, extra: float = 0.0
) -> Launch:
    """``extra`` bytes are read or written by the epilogue besides the output."""
    tile, per_sample, ctas = tile_of(case, chip), tiles_of(case).per_sample, conv_grid(case, chip, width, taps).num_ctas
    steps = [sample.steps for sample in samples]
    deal = grids.deal(steps, per_sample, ctas)
    resident = min(tile.per_sm, cdiv(ctas, chip.processors))
    rows = sum(steps) * tile.k if form == "packed" else sum(sample.rows for sample in samples)
    panel = sum(sample.columns for sample in samples) * case.positions * case.element
    workspace = deal.parts * TILE * TILE * FLOAT
    loads = sum(steps) * per_sample * loaded(case) * tile.k * case.element
    # An epilogue asks for four vectors of skip at once; parts of a tile are added up one by one.
    cells = TILE * TILE // (32 * tile.warps)
    rounds = cells / (vector(case) if case.channels % vector(case) == 0 else 1) / EPILOGUE_AT_ONCE
    fixup = cells / AT_ONCE * deal.parts_of_a_tile * L2_US if deal.parts else 0.0
    launch = Launch(
        f"conv {form}",
        ctas,
        panel + rows * case.channels * case.element + case.features + extra + workspace,
        loads + case.features + extra + 2 * workspace,
        flop=2.0 * sum(sample.rows for sample in samples) * case.positions * case.channels,
        waves=case.batch * per_sample / ctas,
        tile=tile,
        tail=START_US + deal.work_tiles * (2 * DRAM_US + rounds * L2_US) / resident + fixup,
    )
    return product(launch, case, chip, "by_k" if form in BY_K else "by_output", 2 * deal.longest, resident)


def plain_conv(case: Case, chip: Chip, form: str) -> Launch:
    """Mixing (``stored``) or its data gradient (``transposed``)."""
    one = Reduction(cdiv(case.channels, tile_channels(case.dtype)), case.channels, case.channels)
    return conv(case, chip, form, [one] * case.batch, case.channels, 1)


def one_tile_each(launch: Launch, case: Case, chip: Chip, kernel: str, steps: list[int], waits: float) -> Launch:
    """Completes a launch whose CTAs have ``steps`` and go, in order, to multiprocessors as they get free.

    ``launch.l2`` holds what epilogues touch, each of which waits ``waits`` microseconds.
    """
    tile, active = launch.tile, [n for n in steps if n]
    resident = min(tile.per_sm, max(1, cdiv(len(active), chip.processors)))
    places = chip.processors * resident
    rounds = cdiv(len(active), places)
    launch = product(launch, case, chip, kernel, busiest(active, places), resident)
    return launch._replace(waves=len(active) / places, tail=START_US + rounds * (2 * DRAM_US + waits) / resident)


def data_gradient(case: Case, chip: Chip) -> Launch:
    """Both operators on every channel, one after the other, with the gates' gradient.

    Either's epilogue reads ``x``; the first writes ``dx`` where the gate is not 0, the second adds where it is not 1.
    """
    tile, c = tile_of(case, chip), case.channels
    (along, across), taps = tiles_of(case), SPATIAL + TEMPORAL
    ctas, soft = case.batch * along * across, 1 - sum(map(case.is_hard, range(case.batch))) / case.batch
    ends = (3 + 2 * soft) * case.features + case.batch * along * c * FLOAT
    steps = 2 * taps * cdiv(c, tile.k)
    loads = ctas * steps * loaded(case) * 64
    launch = Launch(
        "data_gradient",
        ctas,
        ends + case.features + case.batch * taps * c**2 * case.element,
        ends + loads,
        flop=2.0 * case.batch * case.positions * taps * c**2,
        tile=tile,
    )
    # An element a thread, four of them on their way together: x from memory; for the second operator x and dx from L2.
    waits = TILE * TILE / (32 * tile.warps) / EPILOGUE_AT_ONCE * (DRAM_US + 2 * L2_US)
    return one_tile_each(launch, case, chip, "data_gradient", [steps] * ctas, waits)


def weight_gradient(case: Case, chip: Chip, gated: bool) -> Launch:
    """Of both operators, or of mixing: a CTA has a tile of one tap of one slot."""
    tile, c, depth = tile_of(case, chip), case.channels, 64 // case.element
    tile = tile._replace(k=depth)
    steps, flop, read, written = [], 0.0, 0.0, 0.0
    places = chip.processors * tile.per_sm
    for spatial, temporal, samples in case.slot_lists():
        taps = [spatial] * SPATIAL + [temporal] * TEMPORAL if gated else [c]
        each = samples * cdiv(case.positions, depth)
        of_slot = [each * (row < count) for count in taps for row in range(0, c, TILE) for _ in range(0, c, TILE)]
        columns = reduction(case, spatial, temporal).columns if gated else c
        operands = samples * case.positions * (columns + c) * case.element
        # Every wave of a slot goes over all its positions: from memory where L2 does not keep them.
        read += operands * (1 if operands < chip.l2 * 1e6 else cdiv(sum(map(bool, of_slot)), places))
        written += sum(taps) * c * case.element
        flop += 2.0 * samples * case.positions * sum(taps) * c
        steps += of_slot
    loads = sum(steps) * 2 * c / cdiv(c, TILE) * 64
    name = "weight_gradient" if gated else "weight_gradient mixing"
    launch = Launch(name, len(steps), read + written, written + loads, flop=flop, tile=tile)
    return one_tile_each(launch, case, chip, "weight_gradient", steps, DRAM_US)


def choice(case: Case, chip: Chip) -> list[Launch]:
    """Scores, choice, share and gates of a training step: torch's launches around SemHash."""
    ctas = cdiv(case.channels, SEMHASH_CHANNELS) * case.batch
    return [
        library("scores, choice, softmax", 0, 6),
        little("semhash", case, chip, ctas, 3 * case.batch, 2),
    ]


def choice_backward(case: Case, chip: Chip) -> list[Launch]:
    """Their gradients, of which that of the scoring kernels is zeroed, then written for every output."""
    ctas = cdiv(case.channels, SEMHASH_CHANNELS) * case.neurons
    matrices = case.neurons * case.channels**2 * case.element
    return [
        little("semhash_backward", case, chip, ctas, 3 * case.batch + case.neurons, 2),
        library("softmax, scores backward", 2.0 * matrices, 6),
    ]


def gate_sums(case: Case, chip: Chip) -> Launch:
    """The gates' gradient, added up over tiles."""
    return library("gate gradient summed", 0, 2)


def counters() -> list[Launch]:
    """What a convolution's counters cost before it."""
    return [library("arrival counters", 0)]


def tap_sums(case: Case, chip: Chip) -> tuple[Launch, int]:
    """The launch, and how many partial sums of a channel it writes."""
    aligned = case.channels % vector(case) == 0
    channels, rows = (8 * vector(case), THREADS // 8) if aligned else (32, THREADS // 32)
    parts = grids.tap_sum_parts(case.batch, case.positions, case.channels, grids.SUM_CHANNELS_LAST, chip.processors)
    dram = case.features + case.batch * parts * case.channels * FLOAT
    trips = cdiv(cdiv(cdiv(case.positions, parts), rows), 4) * DRAM_US  # loops by four, as compiled
    return stream("tap_sums", chip, case.batch * parts * cdiv(case.channels, channels), dram, trips), parts


def whole_positions(case: Case) -> int:
    """Positions whose channels a CTA of a gather takes whole; 0 where it goes element by element."""
    size = case.channels * case.element
    return 0 if size % 16 else grids.whole_positions(size)


def gather(
    kernel: str, case: Case, chip: Chip, lists: list[tuple[int, int]], most: int, extra: float, *, l2=0.0, tail=0.0
) -> Launch:
    """Gathers listed channels into a panel, through shared memory.

    ``extra`` bytes are touched besides features and panel, ``l2`` of them by every CTA.
    """
    block, whole = tile_channels(case.dtype), whole_positions(case)
    grid = grids.gather_grid(case.batch, case.positions, most, chip.processors, whole)
    columns = [reduction(case, *pair).columns for pair in lists]
    moved = sum(columns) * case.positions * case.element + extra
    dram, l2 = case.features + moved, moved + grid.num_ctas * l2
    if whole:
        # The lists, then positions, of which the next are asked for before a round's are written.
        trips = L2_US + cdiv(cdiv(case.positions, whole), grid.splits) * DRAM_US
        return stream(kernel, chip, grid.num_ctas, dram, trips, l2=case.features + l2, tail=tail)
    # Channels of some elements, then those elements; what one list's block took from memory, the other's finds in L2.
    rounds = cdiv(max(columns) // block, grid.splits) * (GATHER_POSITIONS * block // THREADS // AT_ONCE)
    trips = rounds * (L2_US + (L2_US + DRAM_US) / 2)
    return stream(kernel, chip, grid.num_ctas, dram, trips, l2=2 * case.features + l2, tail=tail)


def route_and_gather(case: Case, chip: Chip, parts: int) -> Launch:
    """Every CTA adds up its sample's ``parts`` and works its scores out before it gathers."""
    c, n, block = case.channels, case.neurons, tile_channels(case.dtype)
    counters = conv_grid(case, chip, c + block, SPATIAL).arrival_counters
    read = (case.batch * parts + n) * c * FLOAT + case.slots * c * 4 + (n + 1) * 8
    written = case.batch * (PLAN * 4 + 8 + n * FLOAT) + counters * 4
    tail = (cdiv(c, SCORE_CHANNELS) * (cdiv(parts, 4) + cdiv(n, THREADS // 32)) + 3) * L2_US  # a warp a neuron
    lists, most = [case.split] * case.batch, cdiv(c, block)
    return gather("route_and_gather", case, chip, lists, most, read + written, l2=(parts + n) * c * FLOAT, tail=tail)


def lay_filters(kernel: str, case: Case, chip: Chip, taps: int, stacks: int, dram: float, most: int) -> Launch:
    """Filters by channel, whose rows of outputs are padded, and back: every thread has a square of vectors in flight.

    A multiprocessor holds ``most`` CTAs by registers; each has 128 bytes of shared memory for a row of a tile.
    """
    line = LINE // case.element
    ctas = cdiv(pitch(case), line) * cdiv(case.channels * taps, FILTER_TILES * line) * stacks
    resident = max(1, min(most, chip.smem * 1024 // (FILTER_TILES * LINE * line)))
    launch = stream(kernel, chip, ctas, dram, 0.0)
    return launch._replace(chain=cdiv(ctas, resident * chip.processors) * (L2_US + DRAM_US))


def pack_filters(case: Case, chip: Chip, taps: int) -> Launch:
    """Parameters of the chosen neurons, laid out for the kernels."""
    dram = case.slots * case.channels * (case.channels + pitch(case)) * taps * case.element
    return lay_filters("pack_filters", case, chip, taps, case.slots, dram, 3)


def unpack_filters(case: Case, chip: Chip, taps: int) -> Launch:
    """The way back for gradients, whose rows are not padded: listed channels are read, and all neurons written."""
    listed = sum(lists[0 if taps == SPATIAL else 1] for lists in case.slot_lists())
    dram = (listed + case.neurons * case.channels) * case.channels * taps * case.element
    return lay_filters("unpack_filters", case, chip, taps, case.neurons, dram, 2)


def padding(case: Case, chip: Chip, *matrices: float) -> list[Launch]:
    """Copies of operands, of so many elements, whose rows are no whole 16 bytes: zeros, then the rows."""
    if case.channels % vector(case) == 0:
        return []
    return [library("rows padded", 3.0 * elements * case.element, 2) for elements in matrices]
