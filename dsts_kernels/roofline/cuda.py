"""What each kernel of the CUDA backend does in one launch, as :mod:`.launches` says it of the Triton backend.

Grids are those of backends/cuda/kernels.py and csrc/cuda: tiles of 128 positions, which follow one another without
boxes, by 128 outputs; a persistent convolution; gradients of one tile a block. A test holds the launchers to it.
Assumed as there. Main loops of products take the cycles of :mod:`.loops`. What loops of epilogues and gathers wait for
is as their SASS has it (sm_70): where loads come together, and where one is waited for before the next is asked for.
"""

from __future__ import annotations

from ..backends.cuda.kernels import GATHER, LEAST, MOST_PROGRAMS, ROWS_BYTES, TILE, block_kib
from ..backends.packing import tile_channels
from ..backends.triton.boxes import cdiv
from ..backends.triton.tuning import Tile
from .cases import FLOAT, SPATIAL, TEMPORAL, Case, Reduction, reduction
from .chips import DRAM_US, L2_US, START_US, Chip, Launch
from .common import busiest, deal, library, stream
from .loops import step_of

SEMHASH = 256  # channels of a program
SUM_POSITIONS, SUM_CHANNELS = 64, 64  # as in the launchers and kernels
LINE, FILTER_TILES = 128, 4  # bytes of a line, and of a filter tile's rows and columns; tiles of a block
THREADS = 256  # of a block that gathers or sums
CHUNK = 256  # channels whose scores are added up at a time
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
    resident = 2 if not exact and chip.shared >= 2 * block_kib(chip.capability) else 1
    stages = 2 if chip.capability < 80 else 3 if exact else 4
    return Tile(TILE, TILE, tile_channels(case.dtype), 8 if exact else 4, stages, False, resident)


def tiles_of(case: Case) -> tuple[int, int]:
    """Of a sample along positions, and of outputs."""
    return cdiv(case.positions, TILE), cdiv(case.channels, TILE)


def loaded(case: Case) -> float:
    """Rows and columns of a tile that lie inside features and outputs, on average: the rest is not read."""
    along, across = tiles_of(case)
    return case.positions / along + case.channels / across


def product(launch: Launch, case: Case, chip: Chip, kernel: str, steps: int, held: int) -> Launch:
    """Completes a launch whose longest block has ``steps`` of 64 bytes, with ``held`` blocks a multiprocessor."""
    dtype = "tf32" if case.kind == "tf32" else str(case.dtype).removeprefix("torch.")
    cost = step_of(chip.capability, dtype, kernel, held)
    return launch._replace(
        busiest=2.0 * steps * held * TILE * TILE * (64 // case.element),
        cycles=steps * cost.cycles,
        worst=steps * cost.worst,
    )


def conv_grid(case: Case, chip: Chip, width: int, taps: int) -> tuple[Tile, int, int]:
    """Tile, tiles a sample and programs of a convolution over at most ``width`` columns by ``taps``."""
    tile, (along, across) = tile_of(case, chip), tiles_of(case)
    most = case.batch * along * across * cdiv(width, tile.k) * taps
    programs = max(1, min(chip.processors * tile.per_sm, cdiv(most, LEAST), MOST_PROGRAMS))
    return tile, along * across, programs


def conv(
    case: Case, chip: Chip, form: str, samples: list[Reduction], width: int, taps: int, more: float = 0.0
) -> Launch:
    """``more`` bytes are read or written by the epilogue besides the output."""
    tile, per_sample, programs = conv_grid(case, chip, width, taps)
    steps = [sample.steps for sample in samples]
    share = deal(steps, per_sample, programs)
    held = min(tile.per_sm, cdiv(programs, chip.processors))
    rows = sum(steps) * tile.k if form == "packed" else sum(sample.rows for sample in samples)
    panel = sum(sample.columns for sample in samples) * case.positions * case.element
    scratch = share.parts * TILE * TILE * FLOAT
    loads = sum(steps) * per_sample * loaded(case) * tile.k * case.element
    # An epilogue asks for four vectors of skip at once; parts of a tile are added up one by one.
    cells = TILE * TILE // (32 * tile.warps)
    rounds = cells / (vector(case) if case.channels % vector(case) == 0 else 1) / EPILOGUE_AT_ONCE
    adding = cells / AT_ONCE * share.pieces * L2_US if share.parts else 0.0
    launch = Launch(
        f"conv {form}",
        programs,
        panel + rows * case.channels * case.element + case.features + more + scratch,
        loads + case.features + more + 2 * scratch,
        flop=2.0 * sum(sample.rows for sample in samples) * case.positions * case.channels,
        waves=case.batch * per_sample / programs,
        tile=tile,
        tail=START_US + share.items * (2 * DRAM_US + rounds * L2_US) / held + adding,
    )
    return product(launch, case, chip, "by_k" if form in BY_K else "by_output", 2 * share.longest, held)


def plain_conv(case: Case, chip: Chip, form: str) -> Launch:
    """Mixing (``rows``) or its data gradient (``columns``)."""
    one = Reduction(cdiv(case.channels, tile_channels(case.dtype)), case.channels, case.channels)
    return conv(case, chip, form, [one] * case.batch, case.channels, 1)


def one_tile_each(launch: Launch, case: Case, chip: Chip, kernel: str, steps: list[int], waits: float) -> Launch:
    """Completes a launch whose blocks have ``steps`` and go, in order, to multiprocessors as they get free.

    ``launch.l2`` holds what epilogues touch, each of which waits ``waits`` microseconds.
    """
    tile, active = launch.tile, [n for n in steps if n]
    held = min(tile.per_sm, max(1, cdiv(len(active), chip.processors)))
    slots = chip.processors * held
    rounds = cdiv(len(active), slots)
    launch = product(launch, case, chip, kernel, busiest(active, slots), held)
    return launch._replace(waves=len(active) / slots, tail=START_US + rounds * (2 * DRAM_US + waits) / held)


def data_gradient(case: Case, chip: Chip) -> Launch:
    """Both operators on every channel, one after the other, with the gates' gradient.

    Either's epilogue reads ``x``; the first writes ``dx`` where the gate is not 0, the second adds where it is not 1.
    """
    tile, c = tile_of(case, chip), case.channels
    (along, across), taps = tiles_of(case), SPATIAL + TEMPORAL
    programs, soft = case.batch * along * across, 1 - sum(map(case.is_hard, range(case.batch))) / case.batch
    ends = (3 + 2 * soft) * case.features + case.batch * along * c * FLOAT
    steps = 2 * taps * cdiv(c, tile.k)
    loads = programs * steps * loaded(case) * 64
    launch = Launch(
        "data_gradient",
        programs,
        ends + case.features + case.batch * taps * c**2 * case.element,
        ends + loads,
        flop=2.0 * case.batch * case.positions * taps * c**2,
        tile=tile,
    )
    # An element a thread, four of them on their way together: x from memory; for the second operator x and dx from L2.
    waits = TILE * TILE / (32 * tile.warps) / EPILOGUE_AT_ONCE * (DRAM_US + 2 * L2_US)
    return one_tile_each(launch, case, chip, "data_gradient", [steps] * programs, waits)


def weight_gradient(case: Case, chip: Chip, gated: bool) -> Launch:
    """Of both operators, or of mixing: a block has a tile of one tap of one slot."""
    tile, c, depth = tile_of(case, chip), case.channels, 64 // case.element
    tile = tile._replace(k=depth)
    steps, flop, read, written = [], 0.0, 0.0, 0.0
    slots = chip.processors * tile.per_sm
    for first, second, samples in case.slot_lists():
        taps = [first] * SPATIAL + [second] * TEMPORAL if gated else [c]
        each = samples * cdiv(case.positions, depth)
        own = [each * (row < count) for count in taps for row in range(0, c, TILE) for _ in range(0, c, TILE)]
        columns = reduction(case, first, second).columns if gated else c
        operands = samples * case.positions * (columns + c) * case.element
        # Every wave of a slot goes over all its positions: from memory where L2 does not keep them.
        read += operands * (1 if operands < chip.l2 * 1e6 else cdiv(sum(map(bool, own)), slots))
        written += sum(taps) * c * case.element
        flop += 2.0 * samples * case.positions * sum(taps) * c
        steps += own
    loads = sum(steps) * 2 * c / cdiv(c, TILE) * 64
    name = "weight_gradient" if gated else "weight_gradient mixing"
    launch = Launch(name, len(steps), read + written, written + loads, flop=flop, tile=tile)
    return one_tile_each(launch, case, chip, "weight_gradient", steps, DRAM_US)


def tap_sums(case: Case, chip: Chip) -> tuple[Launch, int]:
    """The launch, and how many partial sums of a channel it writes."""
    aligned = case.channels % vector(case) == 0
    channels, rows = (8 * vector(case), THREADS // 8) if aligned else (32, THREADS // 32)
    parts = cdiv(4 * chip.processors, case.batch * cdiv(case.channels, SUM_CHANNELS))
    parts = max(1, min(cdiv(case.positions, SUM_POSITIONS), parts))
    dram = case.features + case.batch * parts * case.channels * FLOAT
    trips = cdiv(cdiv(cdiv(case.positions, parts), rows), 4) * DRAM_US  # loops by four, as compiled
    return stream("tap_sums", chip, case.batch * parts * cdiv(case.channels, channels), dram, trips), parts


def rows_at_once(case: Case) -> int:
    """Positions whose channels a block of a gather takes whole; 0 where it goes element by element."""
    row = case.channels * case.element
    return 0 if row % 16 else min(GATHER, ROWS_BYTES // row)


def gather(
    kernel: str, case: Case, chip: Chip, lists: list[tuple[int, int]], most: int, more: float, *, l2=0.0, tail=0.0
) -> Launch:
    """Gathers listed channels into a panel, through shared memory.

    ``more`` bytes are touched besides features and panel, ``l2`` of them by every program.
    """
    block, rows = tile_channels(case.dtype), rows_at_once(case)
    columns = [reduction(case, *pair).columns for pair in lists]
    moved = sum(columns) * case.positions * case.element + more
    if rows:
        shares = max(1, min(cdiv(case.positions, rows), cdiv(4 * chip.processors, case.batch)))
        programs, loads = shares * case.batch, case.features
        # The lists, then rows, of which the next are asked for before a round's are written.
        trips = L2_US + cdiv(cdiv(case.positions, rows), shares) * DRAM_US
        return stream(kernel, chip, programs, loads + moved, trips, l2=loads + moved + programs * l2, tail=tail)
    along = cdiv(case.positions, GATHER)
    shares = max(1, min(most, cdiv(4 * chip.processors, along * case.batch)))
    programs = along * shares * case.batch
    # Channels of some elements, then those elements; what one list's block took from memory, the other's finds in L2.
    rounds = cdiv(max(columns) // block, shares) * (GATHER * block // THREADS // AT_ONCE)
    trips = rounds * (L2_US + (L2_US + DRAM_US) / 2)
    loads = case.features
    return stream(kernel, chip, programs, loads + moved, trips, l2=2 * loads + moved + programs * l2, tail=tail)


def route_and_gather(case: Case, chip: Chip, parts: int) -> Launch:
    """Every block adds up its sample's ``parts`` and works its scores out before it gathers."""
    c, n, block = case.channels, case.neurons, tile_channels(case.dtype)
    programs = conv_grid(case, chip, c + block, SPATIAL)[2]
    flags = programs + case.batch * tiles_of(case)[1]
    read = (case.batch * parts + n) * c * FLOAT + case.slots * c * 4 + (n + 1) * 8
    written = case.batch * (6 * 4 + 8 + n * FLOAT) + flags * 4
    tail = (cdiv(c, CHUNK) * (cdiv(parts, 4) + cdiv(n, THREADS // 32)) + 3) * L2_US  # a warp a neuron
    lists, most = [case.split] * case.batch, cdiv(c, block)
    return gather("route_and_gather", case, chip, lists, most, read + written, l2=(parts + n) * c * FLOAT, tail=tail)


def lay_filters(kernel: str, case: Case, chip: Chip, taps: int, stacks: int, dram: float, most: int) -> Launch:
    """Filters by channel, whose rows of outputs are padded, and back: every thread has a square of vectors in flight.

    A multiprocessor holds ``most`` blocks by registers; each has 128 bytes of shared memory for a row of a tile.
    """
    line = LINE // case.element
    programs = cdiv(pitch(case), line) * cdiv(case.channels * taps, FILTER_TILES * line) * stacks
    held = max(1, min(most, chip.shared * 1024 // (FILTER_TILES * LINE * line)))
    launch = stream(kernel, chip, programs, dram, 0.0)
    return launch._replace(chain=cdiv(programs, held * chip.processors) * (L2_US + DRAM_US))


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
