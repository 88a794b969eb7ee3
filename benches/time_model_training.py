"""Estimates how long a step of training BLOOM-1b1 takes on a GPU, operation by operation, as
time_model.py does it for inference; nothing here is a measurement, and nothing of training has been
measured on a GPU.

    python3 benches/time_model_training.py

The operations are those of src/models/bloom/training.rs in their order, divided into launches as
src/ops/cuda/train launches them, for packed sequences all of whose tokens have labels and with
nothing computed again. The host is taken to be ahead of the GPU: a step has some 630 launches.
Every kernel that is named must be in the compiler's report.
"""

import dataclasses
from collections.abc import Callable

import time_model as model
from cells import markdown, number, percent
from time_model import HEAD, HEADS, LINEARS, VOCABULARY, WIDTH, Gemm, ceil_div, constant

CHUNK = 1024  # rows of logits at a time
TILE = 64  # of attention: queries or keys of a block, and tokens of its steps
NORM_ROWS = 32  # of a block of a norm's backward pass
# how the program divides GEMMs: the fewest slices of a part and the most parts, and what it takes
# another launch, and the share of a tile on its way to memory and back, to cost, in slices
PART_SLICES, PARTS, LAUNCH_SLICES, SHARE_SLICES = 4, 8, 4, 0.25
COLUMNS = 32  # of a block of norm_gradients
BLOCK = 32768  # parameters of a block of the optimizer
WARP = 32


def kernel(name):
    """What the compiler made of a kernel."""
    return model.KERNELS[name, "sm_90a"]


def resident(name):
    """Blocks of a kernel that share a multiprocessor."""
    return round(kernel(name)["occupancy"] * 64 * WARP / kernel(name)["threads"])


def mixed(gpu):
    """The GPU with the bandwidth that it has for reads and writes in turn."""
    return dataclasses.replace(gpu, bandwidth=gpu.bandwidth * constant("mixed"))


def edges():
    """What a launch takes beside its streams."""
    return constant("launch") + constant("latency") + constant("tail")


def from_l2(total):
    return total / (constant("l2_bandwidth") * 1e6)


def kept_in_l2(total):
    return total <= constant("l2_bytes") * 1e6


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step has to do."""

    sequences: int = 16
    length: int = 384
    layers: int = model.LAYERS

    def __post_init__(self):
        assert self.tokens % CHUNK == 0, "all chunks of logits have the same size"

    @property
    def tokens(self):
        return self.sequences * self.length

    @property
    def elements(self):
        """Of a row of the hidden width for each token."""
        return self.tokens * WIDTH

    @property
    def parameters(self):
        norms_and_biases = 13 * WIDTH
        layer = sum(i * o for i, o in LINEARS.values()) + norms_and_biases
        return VOCABULARY * WIDTH + self.layers * layer + 4 * WIDTH


@dataclasses.dataclass(frozen=True)
class Operation:
    """`times` times in a step, each with the least bytes and FLOPs, and with launches that take
    time(gpu) microseconds together."""

    what: str
    kernels: list
    times: int
    bytes: float
    flops: float
    time: Callable

    def __post_init__(self):
        for name in self.kernels:
            kernel(name)

    def floor(self, gpu):
        """Milliseconds a step."""
        each = max(self.bytes / gpu.bandwidth, self.flops / (constant("peak") * 1e6))
        return self.times * each / 1e3

    def estimate(self, gpu):
        return self.times * self.time(gpu) / 1e3

    def as_measured(self, gpu):
        """The estimate, if GEMMs miss theirs by as much as that which was measured."""
        return self.estimate(gpu) / (gemm_ratio(gpu) if isinstance(self, GemmOperation) else 1)


def gemm_ratio(gpu):
    """Measured rate of a GEMM with 1536 inputs and residuals, of the estimate."""
    case = next(c for c in model.compute_cases(gpu) if c.what == "GEMM, 1536 inputs, residual")
    return min(1, case.measured / case.estimate)


def streamed(gpu, name, threads, moved, per_thread, instructions=0):
    """Microseconds of a kernel that takes each of its bytes once, without edges: memory, or the
    loads that its threads have in flight, or the instructions that its warps issue. `moved` are
    bytes read and written."""
    read, written = moved
    bandwidth = (mixed(gpu) if written else gpu).bandwidth
    row = kernel(name)
    in_work = min(threads, constant("processors") * resident(name) * row["threads"])
    schedulers = 4 * constant("processors")
    issue = threads / WARP * instructions / (schedulers * constant("issue_many") * model.clock())
    return max(
        (read + written) / bandwidth,
        read * constant("latency") / (in_work * per_thread),
        issue,
    )


def elementwise(gpu, name, count, read, written):
    """Microseconds of a kernel of which a thread takes eight elements, without a loop: none of its
    instructions is issued more than once."""
    most = kernel(name)["code_bytes"] / 16
    moved = count * read, count * written
    return edges() + streamed(gpu, name, count / 8, moved, 8 * read, most)


def norm_forward(gpu, step, y):
    """Microseconds of a layer norm whose results have `y` bytes. Warps take a row each, three
    times: for the mean, for the squares, and for the results. All rows are in work together, so
    that these do not overlap."""
    name = f"layer_norm_train_{'f32' if y == 4 else 'bf16'}"
    rows = 4 * step.elements
    in_work = resident(name) * kernel(name)["threads"] // WARP * constant("processors")
    stays = kept_in_l2(min(step.tokens, in_work) * 4 * WIDTH)
    again = from_l2(rows) if stays else rows / gpu.bandwidth
    first = streamed(gpu, name, step.tokens * WARP, (rows, 0), 16 * constant("ahead"))
    written = y * step.elements / mixed(gpu).bandwidth
    last = max(again, written) if stays else again + written
    return edges() + first + again + last


def norm_backward(gpu, step, dy, residual):
    """Microseconds of a norm's backward pass and of the kernel that adds up the gradients of its
    parameters. Blocks take their rows again for these, when all of them have moved more than L2
    holds."""
    name = f"layer_norm_backward_{'f32' if dy == 4 else 'bf16'}"
    blocks = ceil_div(step.tokens, NORM_ROWS)
    read, written = (dy + 4 + residual) * step.elements, 4 * step.elements
    per_thread = 4 * (dy + 4) * constant("ahead")
    first = streamed(gpu, name, blocks * 256, (read, written), per_thread)
    rows, partials = (dy + 4) * step.elements, blocks * 2 * WIDTH * 4
    in_work = min(1, resident(name) * constant("processors") / blocks)
    stays = kept_in_l2(in_work * (read + written))
    again = from_l2(rows) if stays else rows / mixed(gpu).bandwidth
    trips = blocks / (256 / COLUMNS) / constant("ahead")
    sums = edges() + max(from_l2(partials), trips * constant("l2_latency"))
    return edges() + first + again + sums


def tiles(rows, columns, slices, clusters):
    """How many rows of tiles are computed whole, and in how many parts those behind them, as
    src/ops/cuda/train/gemm.rs decides."""

    def time(whole, parts):
        left, each = (rows - whole) * columns * parts, ceil_div(slices, parts)
        waves = ceil_div(whole * columns, clusters) * slices + ceil_div(left, clusters) * each
        launches = (whole > 0 and left > 0) + (parts > 1)
        return waves + launches * LAUNCH_SLICES + (left * SHARE_SLICES if parts > 1 else 0)

    most = min(max(slices // PART_SLICES, 1), PARTS)
    waves = range(max(rows * columns - 1, 0) // clusters + 1)
    some = [(w * clusters // columns, p) for w in waves for p in range(1, most + 1)]
    best = min([(rows, 1)] + some, key=lambda t: time(*t))
    return best if time(*best) < 0.97 * time(rows, 1) else (rows, 1)


def divided(g):
    """The launches of a GEMM: of the rows that are computed whole, and of those behind them."""
    cluster = g.cluster()
    rows, columns = ceil_div(g.m, cluster * model.TILE_M), ceil_div(g.n, model.TILE_N)
    slices = ceil_div(g.k, model.SLICE)
    whole, parts = tiles(rows, columns, slices, int(constant("processors")) // cluster)
    whole = min(whole * cluster * model.TILE_M, g.m)
    parts = ceil_div(slices, ceil_div(slices, parts))
    launches = [dataclasses.replace(g, m=whole)] if whole else []
    if whole < g.m:
        rest = dataclasses.replace(g, m=g.m - whole)
        if parts > 1:
            rest = dataclasses.replace(rest, parts=parts, written=4, read=0)
        launches.append(rest)
    return launches


def gemm_parts(gpu, g, launches):
    """Microseconds of a GEMM by cause, with those of the sums of parts, if there are several, which
    L2 still has."""
    causes = {}
    for launch in launches:
        for cause, time in model.gemm_parts(mixed(gpu), launch).items():
            causes[cause] = causes.get(cause, 0) + time
        if launch.parts > 1:
            results = launch.m * launch.n
            written = results * (g.written + g.read) / mixed(gpu).bandwidth
            sums = edges() + max(from_l2(4 * launch.parts * results), written)
            causes["launches and last tiles"] += sums
    return causes


def filled(launches):
    """The part of the multiprocessors' time in which they have a tile to compute."""
    products = [g.main_loop()[0] for g in launches]
    even = sum(p * g.waves()[0] for p, g in zip(products, launches))
    return even / sum(p * g.waves()[1] for p, g in zip(products, launches))


@dataclasses.dataclass(frozen=True)
class GemmOperation(Operation):
    parts: Callable = None  # microseconds by cause, of a GPU
    filled: float = 1  # part of the multiprocessors' time in which they have a tile


def gemm(what, name, times, g):
    """`g` by kernel `name`, `times` times. gemm_hopper_* may divide k, linear_hopper does not."""
    launches = divided(g) if name.startswith("gemm_hopper") else [g]
    parts = lambda gpu: gemm_parts(gpu, g, launches)
    time = lambda gpu: sum(parts(gpu).values())
    kernels = [name] + ["gemm_combine_bf16"] * any(launch.parts > 1 for launch in launches)
    return GemmOperation(what, kernels, times, g.bytes, g.flops, time, parts, filled(launches))


def input_gradient(step, name):
    """dX = dY W; that of `down` is multiplied by the gradient of GELU."""
    inputs, outputs = LINEARS[name]
    g = Gemm(step.tokens, inputs, outputs, written=2, read=2 if name == "down" else 0)
    what = f"dX of {name}" + (", GELU's gradient" if name == "down" else "")
    return gemm(what, "gemm_hopper_nn_bf16", step.layers, g)


def weight_gradient(step, name):
    """dW += dY^T X, and the sums of dY for the bias."""
    inputs, outputs = LINEARS[name]
    g = Gemm(outputs, inputs, step.tokens, written=4, read=4, sums=True)
    return gemm(f"dW of {name}", "gemm_hopper_tn_sums_bf16", step.layers, g)


def linear_forward(step, name):
    inputs, outputs = LINEARS[name]
    residual = name in ["dense", "down"]
    g = Gemm(step.tokens, outputs, inputs, *((4, 4) if residual else (2, 0)))
    what = name + (" + residual" if residual else "")
    return gemm(what, "linear_hopper_bf16", step.layers, g)


def attention_kernel(pass_name):
    return f"attention_train_hopper_{pass_name}_bf16_{HEAD}"


def attention_round(name, products):
    """Microseconds in which all blocks of a multiprocessor take a step of 64 queries by 64 keys:
    their products, or their instructions, or what one block does one after the other. What the
    report counts between waits runs beside products."""
    loop = model.hot_loop(name)
    product = 2 * TILE * TILE * HEAD / constant("tensor")
    early = loop.get("instructions_between_waits", 0) / constant("issue")
    issue = loop["instructions"] / constant("issue")
    chain = 2 * product + max((products - 2) * product, early) + issue - early
    return max(resident(name) * max(products * product, issue), chain) / model.clock()


def attention_time(gpu, step, pass_name, products, moved):
    """Microseconds of a kernel of attention. Blocks with the most steps begin first."""
    name = attention_kernel(pass_name)
    each, tiles = attention_round(name, products), ceil_div(step.length, TILE)
    edge = constant("latency") + constant("tail")
    blocks = [
        edge + steps * each
        for steps in range(tiles, 0, -1)
        for _ in range(HEADS * step.sequences)
    ]
    places = constant("processors") * resident(name)
    memory = edge + moved / mixed(gpu).bandwidth
    return constant("launch") + max(model.makespan(blocks, places), memory)


def attention_operations(step):
    """Forward, and backward by two kernels, which both compute scores and gradients of
    probabilities. Backward takes at least five products, forward two."""
    e, stats = step.elements, 4 * step.tokens * HEADS
    product = step.sequences * model.attention_flops(step.length) / 2
    qkv, y = 2 * 3 * e, 2 * e
    times = step.layers
    forward = Operation(
        "attention",
        [attention_kernel("forward")],
        times,
        qkv + y + stats,
        2 * product,
        lambda gpu: attention_time(gpu, step, "forward", 2, qkv + y + stats),
    )
    inputs = qkv + y + 2 * stats
    backward = Operation(
        "attention, backward",
        [attention_kernel("dq"), attention_kernel("dkv")],
        times,
        2 * qkv + 2 * y + stats,
        5 * product,
        lambda gpu: attention_time(gpu, step, "dq", 3, inputs + y + qkv / 3)
        + attention_time(gpu, step, "dkv", 4, inputs + qkv * 2 / 3),
    )
    return forward, backward


def loss_operations(step):
    """The loss at the LM head, chunk by chunk of its rows."""
    chunks, logits = step.tokens // CHUNK, CHUNK * VOCABULARY
    g = Gemm(CHUNK, VOCABULARY, WIDTH, written=2)
    yield gemm("LM head: logits", "linear_hopper_bf16", chunks, g)

    def statistics(gpu):
        # multiprocessors with one row more than others are the last ones
        uneven = ceil_div(CHUNK, constant("processors")) * constant("processors") / CHUNK
        instructions = uneven * constant("stats") * logits / (CHUNK * 256)
        name, threads = "logit_stats_bf16", CHUNK * 256
        rows = streamed(gpu, name, threads, (2 * logits, 0), 16, instructions)
        return rows + 2 * edges()

    names = ["logit_stats_bf16", "cross_entropy"]
    yield Operation("LM head: statistics, loss", names, chunks, 2 * logits, 0, statistics)
    name = "logit_gradients_bf16"
    time = lambda gpu: elementwise(gpu, name, logits, 2, 2)
    yield Operation("LM head: gradients of logits", [name], chunks, 4 * logits, 0, time)
    g = Gemm(CHUNK, WIDTH, VOCABULARY, written=2)
    yield gemm("LM head: dX", "gemm_hopper_nn_bf16", chunks, g)
    g = Gemm(VOCABULARY, WIDTH, CHUNK, written=4, read=4)
    yield gemm("LM head: dW", "gemm_hopper_tn_bf16", chunks, g)


def optimizer_operations(step):
    count = step.parameters
    zeros = lambda gpu: edges() + 4 * count / mixed(gpu).bandwidth
    yield Operation("gradients set to zero", [], 1, 4 * count, 0, zeros)

    def norm(gpu):
        threads, per_thread = count / BLOCK * 256, 16 * constant("ahead")
        squares = streamed(gpu, "squared_norm", threads, (4 * count, 0), per_thread)
        trips = count / BLOCK / 256 / constant("ahead")  # of one block
        return squares + 2 * edges() + trips * constant("l2_latency")

    names = ["squared_norm", "clip_gradients"]
    yield Operation("norm of the gradient", names, 1, 4 * count, 0, norm)

    def adamw(gpu):
        instructions = kernel("adamw_bf16")["code_bytes"] / 16 * BLOCK / 256 / 4  # at most
        threads, moved = count / BLOCK * 256, (16 * count, 14 * count)
        return edges() + streamed(gpu, "adamw_bf16", threads, moved, 64, instructions)

    yield Operation("AdamW", ["adamw_bf16"], 1, 30 * count, 0, adamw)


def row_operations(step):
    """What is done row by row or element by element, by its name."""
    e, t, layers = step.elements, step.tokens, step.layers
    ahead = constant("ahead")

    def row(what, kernels, times, bytes_of_element, time):
        return Operation(what, kernels, times, bytes_of_element * e, 0, time)

    def embedding(gpu):
        rows = streamed(gpu, "embedding_bf16", t * WARP, (2 * e, 4 * e), 8 * ahead)
        return edges() + rows + norm_forward(gpu, step, 4)

    def embedding_backward(gpu):
        # all tokens are taken to differ; a block of 256 threads adds to a row of the table
        rows = streamed(gpu, "embedding_backward", t * 256, (8 * e, 4 * e), 32)
        return norm_backward(gpu, step, 4, 0) + edges() + rows

    def labelled(gpu):
        moved = 2 * e, 2 * e
        return edges() + streamed(gpu, "select_rows_bf16", t * WARP, moved, 16 * ahead)

    kernels = ["embedding_bf16", "layer_norm_train_f32"]
    yield row("embedding and its norm", kernels, 1, 14, embedding)
    time = lambda gpu: norm_forward(gpu, step, 2)
    yield row("layer norms", ["layer_norm_train_bf16"], 2 * layers + 1, 6, time)
    time = lambda gpu: elementwise(gpu, "gelu_bf16", 4 * e, 2, 2)
    yield row("GELU", ["gelu_bf16"], layers, 16, time)
    yield row("labelled rows, gathered and scattered", ["select_rows_bf16"], 2, 4, labelled)
    kernels = ["layer_norm_backward_bf16", "norm_gradients"]
    time = lambda gpu: norm_backward(gpu, step, 2, 0)
    yield row("final norm, backward", kernels, 1, 10, time)
    time = lambda gpu: elementwise(gpu, "narrow_bf16", e, 4, 2)
    yield row("gradients in 16 bits", ["narrow_bf16"], 2 * layers, 6, time)
    time = lambda gpu: norm_backward(gpu, step, 2, 4)
    yield row("layer norms, backward", kernels, 2 * layers, 14, time)
    kernels = ["layer_norm_backward_f32", "norm_gradients", "embedding_backward"]
    what = "embedding and its norm, backward"
    yield row(what, kernels, 1, 24, embedding_backward)


def operations(step=Step()):
    """All operations of a step, those of all layers together, in the order in which they begin."""
    rows = {o.what: o for o in row_operations(step)}
    attention, attention_backward = attention_operations(step)
    zeros, *after = optimizer_operations(step)
    fw = lambda name: linear_forward(step, name)
    dx = lambda name: input_gradient(step, name)
    dw = lambda name: weight_gradient(step, name)
    done = [zeros, rows.pop("embedding and its norm"), rows.pop("layer norms")]
    done += [fw("QKV"), attention, fw("dense"), fw("up")]
    done += [rows.pop("GELU"), fw("down"), rows.pop("labelled rows, gathered and scattered")]
    done += loss_operations(step)
    done += [rows.pop("final norm, backward"), rows.pop("gradients in 16 bits")]
    for name in ["down", "up"]:
        done += [dx(name), dw(name)]
    done += [rows.pop("layer norms, backward"), dx("dense"), dw("dense"), attention_backward]
    done += [dx("QKV"), dw("QKV"), rows.pop("embedding and its norm, backward")]
    assert not rows, "every operation has its place"
    return done + after


def linear_backward(all_operations):
    """The operations that the backward pass of linear layers consists of."""
    names = {"gradients in 16 bits"} | {f"dW of {name}" for name in LINEARS}
    return [o for o in all_operations if o.what in names or o.what.startswith("dX of ")]


def loss_forward(all_operations):
    names = ["LM head: logits", "LM head: statistics, loss"]
    return [o for o in all_operations if o.what in names]


def loss(all_operations):
    return [o for o in all_operations if o.what.startswith("LM head")]


def cublas_rate(gpu):
    """TFLOP/s of cuBLAS's forward GEMMs of a layer, measured with 64 x 128 tokens."""
    names = {"norm + QKV into cache": "QKV", "dense + residual": "dense"}
    names |= {"norm + up + GELU": "up", "down + residual": "down"}
    flops = sum(2 * 64 * 128 * inputs * outputs for inputs, outputs in LINEARS.values())
    return flops / sum(gpu.peers[operation, 64, 128] for operation in names) / 1e6


@dataclasses.dataclass(frozen=True)
class Goal:
    what: str
    unit: str
    floor: float
    estimate: float
    as_measured: float
    goal: float


def goals(gpu, step=Step()):
    """What the whole step and parts of it should reach. Floors are those that the goals were chosen
    by: FLOPs of GEMMs at the sustained rate, and AdamW's bytes."""
    done = operations(step)
    matrices = sum(o.times * o.flops for o in done if isinstance(o, GemmOperation))
    optimizer = 30 * step.parameters / gpu.bandwidth
    sustained = constant("sustained")

    def both(part, rate):
        return [rate(sum(ms)) for ms in zip(*((o.estimate(gpu), o.as_measured(gpu)) for o in part))]

    tokens = lambda ms: step.tokens * 1e3 / ms
    floor = tokens((matrices / (sustained * 1e6) + optimizer) / 1e3)
    yield Goal("SFT", "tokens/s", floor, *both(done, tokens), constant("goal SFT"))
    for what, part, goal in [
        ("LM-head loss, forward", loss_forward(done), "goal loss forward"),
        ("LM-head loss, whole", loss(done), "goal loss"),
        ("linear layers, backward", linear_backward(done), None),
    ]:
        flops = sum(o.times * o.flops for o in part)
        aim = constant(goal) if goal else constant("goal backward") * cublas_rate(gpu)
        rates = both(part, lambda ms: flops / ms / 1e9)
        yield Goal(what, "TFLOP/s", sustained, *rates, aim)
    part, bandwidth = [o for o in done if o.what == "AdamW"], gpu.bandwidth / 1e6
    rates = both(part, lambda ms: 30 * step.parameters / ms / 1e9)
    yield Goal("AdamW", "TB/s", bandwidth, *rates, constant("goal AdamW") * bandwidth)


def milliseconds(value):
    return f"{value:.2f}"


def step_rows():
    """The operations of a step, for a table."""
    gpus, done = list(model.gpus()), operations()
    rows = [["milliseconds a step, estimated", "times", "GB", "TFLOP", "waves filled"]]
    for gpu in gpus:
        rows[0] += [f"{gpu.name}: floor", "estimate", "beyond"]
    for o in done:
        filled = percent(o.filled) if isinstance(o, GemmOperation) else ""
        flops = number(o.times * o.flops / 1e12) if o.flops else ""
        rows.append([o.what, str(o.times), number(o.times * o.bytes / 1e9), flops, filled])
        for gpu in gpus:
            rows[-1] += beyond(o.floor(gpu), o.estimate(gpu))
    moved, flops = (sum(o.times * getattr(o, kind) for o in done) for kind in ["bytes", "flops"])
    rows.append(["the step", "", number(moved / 1e9), number(flops / 1e12), ""])
    for gpu in gpus:
        rows[-1] += beyond(*(sum(f(o) for o in done) for f in of_step(gpu)))
    return rows


def of_step(gpu):
    return lambda o: o.floor(gpu), lambda o: o.estimate(gpu)


def beyond(floor, estimate):
    return [milliseconds(value) for value in [floor, estimate, estimate - floor]]


def cause_rows():
    """What the GEMMs' time consists of, for a table."""
    done = [o for o in operations() if isinstance(o, GemmOperation)]
    head, backward = loss(done), linear_backward(done)
    before = [o for o in done if o not in head + backward]
    groups = {"layers, forward": before, "layers, backward": backward, "LM head": head}
    rows, causes = [["milliseconds a step in GEMMs, estimated"]], {}
    for gpu in model.gpus():
        for group, members in groups.items():
            rows[0].append(f"{group}, {gpu.name}")
            totals = {}
            for o in members:
                for cause, time in o.parts(gpu).items():
                    totals[cause] = totals.get(cause, 0) + o.times * time / 1e3
            for cause, total in totals.items():
                causes.setdefault(cause, []).append(milliseconds(total))
    return rows + [[cause, *cells] for cause, cells in causes.items()]


def goal_rows():
    rows = [["goals of training, estimated", "GPU", "unit", "floor of the goal", "estimate"]]
    rows[0] += ["with GEMMs as measured", "goal", "estimate, of the goal"]
    for gpu in model.gpus():
        for g in goals(gpu):
            figures = [g.floor, g.estimate, g.as_measured, g.goal]
            rows.append([g.what, gpu.name, g.unit, *map(number, figures)])
            rows[-1].append(percent(g.estimate / g.goal))
    return rows


def main():
    for rows in [step_rows(), cause_rows(), goal_rows()]:
        print("\n".join(markdown(rows)), end="\n\n")


if __name__ == "__main__":
    main()
