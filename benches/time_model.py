"""Estimates how long BLOOM-1b1 takes on a GPU, from bytes, FLOPs, launches, barriers and the
machine code of the kernels; nothing here is a measurement.

    python3 benches/time_model.py

It reads what the compiler made of the kernels (benches/results/kernels_static_nvcc13.0.json, which
kernels/sass_gate.py writes) and compares its estimates with what was measured on the same kind of
GPU (gpu_h200.json, gpu_h100.json). A ratio far from 1 means that a kernel waits for something that
this model does not know. Everything that is assumed stands in CONSTANTS with its source, also what
time_model_training.py assumes of a step of training.
"""

import dataclasses
import heapq

from cells import markdown, number, result


@dataclasses.dataclass(frozen=True)
class Constant:
    value: float
    unit: str
    what: str
    source: str


FITTED = "chosen to fit the linear layers of 1 sequence on the H200"
CONSTANTS = {
    "spec H200": Constant(4.8, "TB/s", "memory of an H200 as specified", "NVIDIA, H200 (SXM)"),
    "spec H100": Constant(3.35, "TB/s", "memory of an H100 as specified", "NVIDIA, H100 (SXM)"),
    "processors": Constant(132, "", "multiprocessors of an H100 or H200", "NVIDIA, H100 (SXM)"),
    "peak": Constant(989.4, "TFLOP/s", "peak in bf16, dense", "NVIDIA, H100 and H200 (SXM)"),
    "tensor": Constant(
        4096, "FLOP/cycle", "tensor cores of a multiprocessor", "NVIDIA, Hopper architecture"
    ),
    "gemm_clock": Constant(
        0.85, "", "clock under a full tensor-core load, of the peak's", "assumed: power limit"
    ),
    "latency": Constant(0.9, "us", "a load from busy memory", "assumed: 0.6 idle"),
    "l2_latency": Constant(0.25, "us", "a load from L2", "assumed: 200 to 270 cycles, far part"),
    "launch": Constant(
        0.8, "us", "from kernel to kernel in a graph", f"{FITTED}; 1.3 without dependent launch"
    ),
    "tail": Constant(1.0, "us", "sums over warps, epilogue, last writes of a launch", FITTED),
    "norm": Constant(1.5, "us", "layer norm of few rows by each block", FITTED),
    "cluster_barrier": Constant(0.7, "us", "barrier of a cluster", "assumed"),
    "grid_barrier": Constant(
        2.7, "us", "barrier of the grid, late blocks included", "sampled by a profiler on an H100"
    ),
    "issue": Constant(
        0.55, "instr./cycle", "a scheduler that has two warps", "assumed: dependent instructions"
    ),
    "goal 1": Constant(
        0.78, "", "goal of decode 1, of the specified bandwidth", "Hazy Research, May 2025"
    ),
    "goal 64": Constant(0.71, "", "goal of decode 64, of the specified bandwidth", "chosen"),
    "goal GEMM": Constant(0.95, "", "goal of the cube, of cuBLAS's measured rate", "chosen"),
    "goal prefill": Constant(0.6, "", "goal of a prompt's GEMM, of the peak", "chosen"),
    "goal attention": Constant(2, "", "goal of attention, of SDPA's measured rate", "chosen"),
    # of training
    "mixed": Constant(0.92, "", "memory read and written in turn, of reading it", "assumed"),
    "l2_bytes": Constant(50, "MB", "L2 of an H100 or H200", "NVIDIA, H100 (SXM)"),
    "l2_bandwidth": Constant(5.5, "TB/s", "reading L2", "assumed"),
    "shared": Constant(
        128, "bytes/cycle", "shared memory of a multiprocessor", "NVIDIA, Hopper architecture"
    ),
    "issue_many": Constant(0.8, "instr./cycle", "a scheduler that has many warps", "assumed"),
    "ahead": Constant(4, "", "iterations whose loads a simple loop has in flight", "assumed"),
    "stats": Constant(
        16, "instr.", "statistics of a logit", "assumed: an exponential, a maximum, two sums"
    ),
    "gelu_gradient": Constant(
        30, "instr.", "a result times a gradient of GELU", "assumed: GELU has 19 at most"
    ),
    "sustained": Constant(
        790, "TFLOP/s", "GEMMs and loss of the goals' floors", "chosen: large GEMMs under load"
    ),
    "goal SFT": Constant(70_000, "tokens/s", "goal of a step of training", "chosen"),
    "goal loss forward": Constant(
        700, "TFLOP/s", "goal of the loss's forward pass", "Liger, kernel for SM90: 706 to 738"
    ),
    "goal loss": Constant(
        670, "TFLOP/s", "goal of the loss with its gradients", "Liger, kernel for SM90: 666 to 701"
    ),
    "goal AdamW": Constant(0.9, "", "goal of AdamW, of the measured bandwidth", "chosen"),
    "goal backward": Constant(
        0.95, "", "goal of linear layers backward, of cuBLAS's measured rate forward", "chosen"
    ),
}
LAYERS, WIDTH, VOCABULARY, HEADS, HEAD = 24, 1536, 250_880, 16, 96
POSITIONS = 128  # of each sequence in the cases of decoding
LINEARS = {"QKV": (WIDTH, 3 * WIDTH), "dense": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH)}
LINEARS |= {"down": (4 * WIDTH, WIDTH)}
TILE_M, TILE_N, SLICE = 128, 256, 64  # of a GEMM, and inputs in a stage
WRITERS, CONSUMERS = 3, 8  # warps that write a tile, and that write a block's last one
KERNELS = {(row["kernel"], row["arch"]): row for row in result("kernels_static_nvcc13.0")}


def constant(name):
    return CONSTANTS[name].value


def clock():
    """Cycles a microsecond at which the tensor cores have their peak."""
    return constant("peak") * 1e6 / (constant("processors") * constant("tensor"))


def hot_loop(kernel):
    return KERNELS[kernel, "sm_90a"]["hot_loop"]


@dataclasses.dataclass(frozen=True)
class Gpu:
    name: str
    bandwidth: float  # bytes a microsecond, as `bprompt bench` measured it
    llm: dict  # rows by batch
    operations: dict  # microseconds by operation, sequences and tokens
    peers: dict  # microseconds of PyTorch, by the same


def gpus():
    for name, measured in [
        ("H100", result("gpu_h100")["epilogues_overlapped"]),
        ("H200", result("gpu_h200")),
    ]:
        ours, theirs = {}, {}
        for r in measured.get("operations", []):
            ours[r["operation"], r["sequences"], r["tokens"]] = r["microseconds"]
        for r in measured["peers"]["operations"]:
            key = r["operation"], r["sequences"], r["tokens"]
            ours[key], theirs[key] = r["ours_us"], r["theirs_us"]
        yield Gpu(name, *measured_llm(measured), ours, theirs)


def measured_llm(results):
    rows = {r["batch"]: r for r in results["llm"] if r["weights"] == "bf16"}
    return rows[1]["read_gigabytes_per_second"] * 1e3, rows


def weight_bytes(name):
    inputs, outputs = LINEARS[name]
    return 2 * inputs * outputs


def layer_bytes():
    return sum(map(weight_bytes, LINEARS))


def head_bytes():
    return 2 * WIDTH * VOCABULARY


def cache_bytes(batch):
    """Keys and values that a layer reads."""
    return batch * POSITIONS * 2 * HEADS * HEAD * 2


def step_bytes(batch):
    return LAYERS * (layer_bytes() + cache_bytes(batch)) + head_bytes()


def streaming(gpu, total, in_flight):
    """Microseconds to read `total` bytes with so many on their way at a time: Little's law, or
    memory's bandwidth if that is less."""
    return total / min(gpu.bandwidth, in_flight / constant("latency"))


def launch(gpu, total, in_flight, *extra):
    """A kernel of a graph that streams its bytes once; `extra` names constants."""
    parts = [constant(name) for name in ("launch", "latency", "tail", *extra)]
    return sum(parts) + streaming(gpu, total, min(total, in_flight))


def skinny_in_flight(name):
    """Blocks of 16 outputs with rings of 6 KB for each of 8 warps, three on a multiprocessor, or
    of 12 KB where there are few blocks with long rows."""
    inputs, outputs = LINEARS[name]
    blocks = min(outputs // 16, 3 * constant("processors"))
    deep = outputs // 16 <= constant("processors") and inputs > 6 * 256
    return blocks * 8 * (12 if deep else 6) * 1024


def cluster_in_flight(name):
    """Tiles of 128 outputs by clusters of up to 8 blocks, with four stages of 64 inputs."""
    _, outputs = LINEARS[name]
    tiles = outputs // 128
    wanted = -(-(constant("processors") * 9 // 10) // tiles)
    blocks = min(8, 1 << (int(wanted) - 1).bit_length())
    return tiles * blocks * 4 * 128 * 64 * 2


def layer_of_launches(gpu, batch):
    """Microseconds of each kernel of a layer, for 1 sequence or for 17 to 64, which are normalized
    by a launch more."""
    if batch == 1:
        in_flight, before, both = skinny_in_flight, ["norm"], []
    else:
        in_flight, both = cluster_in_flight, ["cluster_barrier"] * 2
        before = ["launch", "norm"]
    linear = lambda name, extra: launch(
        gpu, weight_bytes(name), in_flight(name), *both, *extra
    )
    return {
        "norm + QKV into cache": linear("QKV", before),
        "attention": launch(gpu, cache_bytes(batch), cache_bytes(batch), "latency"),
        "dense + residual": linear("dense", []),
        "norm + up + GELU": linear("up", before),
        "down + residual": linear("down", []),
    }


def head(gpu):
    """The LM head, the choice among its partial results, and the embedding of the next token."""
    return launch(gpu, head_bytes(), head_bytes()) + 2 * (
        constant("launch") + constant("latency")
    )


def persistent_layer(gpu):
    """The parts of a layer of the single kernel. Weights stream across barriers, but a block can
    take them from its rings only as fast as it issues instructions, and not at a barrier."""
    loop = hot_loop("decode_step_bf16_10")
    chunks = loop["counts"]["HMMA"] / 4  # of 2 KB
    each = loop["path_instructions"] / chunks
    schedulers = 4 * constant("processors")
    issue = layer_bytes() / 2048 * each / (schedulers * constant("issue") * clock())
    trips = 3 + 1 + 3  # attention; activations of dense, of down
    waits = 5 * constant("grid_barrier") + 2 * constant("norm") + constant("latency")
    return {
        "memory": layer_bytes() / gpu.bandwidth,
        "instructions": issue,
        "barriers, norms, L2": waits + trips * constant("l2_latency"),
    }


def persistent_step(gpu):
    parts = persistent_layer(gpu)
    layer = max(parts["memory"], parts["instructions"] + parts["barriers, norms, L2"])
    return constant("launch") + constant("latency") + LAYERS * layer


def ceil_div(a, b):
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Gemm:
    """A GEMM of gemm_hopper.cuh: [m, n] results of k products each, of 16-bit operands."""

    m: int
    n: int
    k: int
    written: int = 4  # bytes of a result
    read: int = 0  # bytes with which the epilogue combines it: 4 added, or 2 before a GELU
    parts: int = 1  # of k
    sums: bool = False  # whether A is summed over k too

    @property
    def flops(self):
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self):
        """Of operands and results, once each."""
        results = self.m * self.n * (self.written * self.parts + self.read)
        return 2 * self.k * (self.m + self.n) + results

    def cluster(self):
        """Blocks of a cluster, which share B."""
        rows = ceil_div(self.m, TILE_M)
        return 2 if rows % 2 == 0 or rows > 8 else 1

    def waves(self):
        """Tiles for each cluster of blocks, and of the busiest ones; and how many blocks work."""
        rows, cluster = ceil_div(self.m, TILE_M), self.cluster()
        work = ceil_div(rows, cluster) * ceil_div(self.n, TILE_N) * self.parts
        clusters = constant("processors") // cluster
        return work / clusters, ceil_div(work, clusters), min(work, clusters) * cluster

    def main_loop(self):
        """Microseconds in which the tensor cores compute a tile, and the sums beside it. An
        instruction for 64 rows and 16 inputs takes at least as long as its operands come from
        shared memory, which is what counts for the sums, of 8 columns."""
        slices = ceil_div(ceil_div(self.k, SLICE), self.parts)
        rounds = slices * SLICE // 16 * (TILE_M // 64) / (clock() * constant("gemm_clock"))

        def cycles(columns):
            products = 2 * 64 * columns * 16 / constant("tensor")
            return max(products, 2 * (64 + columns) * 16 / constant("shared"))

        return rounds * cycles(TILE_N), rounds * cycles(8) * self.sums

    def chain(self, warps, latency):
        """Microseconds that so many warps wait for what the epilogue reads of a tile: 4 KB a warp
        at a time if it is added, or 512 bytes, with as many behind them, if it is before a GELU."""
        each = TILE_M * TILE_N * self.read / warps
        if self.read != 2:
            return each / 4096 * latency
        curve = 8 * constant("gelu_gradient") / constant("issue") / clock()
        return each / 512 * max(curve, (latency + curve) / 2)


def gemm_parts(gpu, g):
    """Microseconds by cause. Tiles are written while the next ones are computed, if memory is fast
    enough; what the last ones take is added. What the epilogue reads has been brought to L2."""
    even, waves, blocks = g.waves()
    writing = TILE_M * TILE_N * (g.written + g.read) / (gpu.bandwidth / blocks)
    products, sums = g.main_loop()
    tile = max(products + sums, writing, g.chain(WRITERS, constant("l2_latency")))
    last = max(writing, g.chain(CONSUMERS, constant("latency")))
    return {
        "products": even * products,
        "multiprocessors without a tile": (waves - even) * products,
        "sums for biases": waves * sums,
        "epilogue or memory, beyond these": max(waves * tile, g.bytes / gpu.bandwidth)
        - waves * (products + sums),
        "launches and last tiles": last + constant("launch") + constant("latency"),
    }


def gemm_time(gpu, g):
    """Microseconds."""
    return sum(gemm_parts(gpu, g).values())


def gemm(gpu, tokens, inputs, outputs, residual):
    """TFLOP/s of linear_hopper with results in f32."""
    g = Gemm(tokens, outputs, inputs, read=4 * residual)
    return g.flops / gemm_time(gpu, g) / 1e6


def attention_step(size):
    """Microseconds of a multiprocessor for 128 queries by 64 positions: the products, or the
    instructions of two warps on each scheduler, or what one warpgroup does one after the other."""
    loop = hot_loop(f"attention_hopper_bf16_{size}")
    scores = sums = 2 * 64 * 64 * size / constant("tensor")  # of a warpgroup
    early = loop["instructions_between_waits"] / constant("issue")
    rest = (loop["instructions"] - loop["instructions_between_waits"]) / constant("issue")
    products = 2 * (scores + sums)
    issue = 2 * loop["instructions"] / constant("issue")
    return max(products, issue, scores + max(sums, early) + rest) / clock()


def attention(positions):
    """TFLOP/s of a prompt's attention; blocks go to the first multiprocessor that is free, in the
    order of the launch, light ones first."""
    step = attention_step(HEAD)
    edges = constant("latency") + constant("tail")
    blocks = [edges + 2 * (i // HEADS + 1) * step for i in range(positions // 128 * HEADS)]
    time = makespan(blocks, constant("processors")) + constant("launch")
    return attention_flops(positions) / time / 1e6


def makespan(times, places):
    """Until the last block ends, where each begins at the first place that is free."""
    free = [0.0] * places
    for time in times:
        heapq.heappush(free, heapq.heappop(free) + time)
    return max(free)


def attention_flops(positions):
    """Of the positions that queries attend to."""
    return 4 * HEADS * HEAD * positions * (positions + 1) / 2


@dataclasses.dataclass(frozen=True)
class Case:
    what: str
    unit: str
    floor: float
    estimate: float
    goal: float | None
    measured: float | None


def decoding(gpu, what, batch, estimate, goal, measured):
    """A case of decoding: microseconds a step become tokens a second."""
    rate = lambda time: batch * 1e6 / time
    floor = rate(step_bytes(batch) / gpu.bandwidth)
    aim = rate(step_bytes(batch) / (constant(f"spec {gpu.name}") * 1e6 * constant(goal)))
    return Case(what, "tokens/s", floor, rate(estimate), aim, measured)


def decoding_cases(gpu):
    # both ways have the same LM head, which is what the faster one takes besides the layers
    row = gpu.llm[1]
    ways = {way: row["steps"][0][f"{way}_microseconds"] for way in ["launches", "one_kernel"]}
    rest = row["decode"]["milliseconds"] * 1e3 - min(ways.values())
    step = LAYERS * sum(layer_of_launches(gpu, 1).values()) + head(gpu)
    rate = 1e6 / (ways["launches"] + rest)
    yield decoding(gpu, "decode 1, launches", 1, step, "goal 1", rate)
    step = persistent_step(gpu) + head(gpu)
    rate = 1e6 / (ways["one_kernel"] + rest)
    yield decoding(gpu, "decode 1, one kernel", 1, step, "goal 1", rate)
    step = LAYERS * sum(layer_of_launches(gpu, 64).values()) + head(gpu)
    rate = gpu.llm[64]["decode"]["tokens_per_second"]
    yield decoding(gpu, "decode 64", 64, step, "goal 64", rate)


def compute_case(gpu, what, key, flops, estimate, peak_goal=None, peer_goal=None):
    """A case in TFLOP/s. The goal is a part of the peak, or of PyTorch's rate if that is known."""
    rate = lambda times: flops / times[key] / 1e6 if key in times else None
    goal, peer = None, rate(gpu.peers)
    if peak_goal:
        goal = constant(peak_goal) * constant("peak")
    elif peer:
        goal = constant(peer_goal) * peer
    return Case(what, "TFLOP/s", constant("peak"), estimate, goal, rate(gpu.operations))


def compute_cases(gpu):
    key, flops = ("square GEMM", 1, 8192), 2 * 8192**3
    rate = gemm(gpu, 8192, 8192, 8192, 0)
    yield compute_case(gpu, "GEMM, 8192 cubed", key, flops, rate, peer_goal="goal GEMM")
    key, flops = ("dense + residual", 64, 128), 2 * 8192 * WIDTH**2
    rate, what = gemm(gpu, 8192, WIDTH, WIDTH, 1), "GEMM, 1536 inputs, residual"
    yield compute_case(gpu, what, key, flops, rate, peak_goal="goal prefill")
    for positions in [2048, 16384]:
        key, flops = ("attention", 1, positions), attention_flops(positions)
        what, rate = f"attention of {positions:,}", attention(positions)
        yield compute_case(gpu, what, key, flops, rate, peer_goal="goal attention")


def ratio(measured, estimate):
    return "" if measured is None else f"{measured / estimate:.2f}"


def optional(value):
    return "" if value is None else number(value)


def case_rows():
    """The cases of all GPUs, for a table."""
    rows = [["estimates", "GPU", "unit", "floor", "estimate", "goal", "measured", "ratio"]]
    for gpu in gpus():
        for c in [*decoding_cases(gpu), *compute_cases(gpu)]:
            rates = [number(c.floor), number(c.estimate), optional(c.goal), optional(c.measured)]
            rows.append([c.what, gpu.name, c.unit, *rates, ratio(c.measured, c.estimate)])
    return rows


def layer_rows():
    """Microseconds of a layer's kernels, and of the single kernel's layer."""
    rows = [["microseconds, estimated", "GPU", "floor", "estimate", "measured", "ratio"]]
    for gpu in gpus():
        for batch in [1, 64]:
            floors = [*map(weight_bytes, LINEARS)]
            floors.insert(1, cache_bytes(batch))
            times = layer_of_launches(gpu, batch)
            for (what, time), read in zip(times.items(), floors):
                measured = gpu.operations.get((what, batch, 1))
                rows.append(
                    [f"{what}, {batch}", gpu.name, number(read / gpu.bandwidth), number(time)]
                    + [optional(measured), ratio(measured, time)]
                )
        time, floor = persistent_step(gpu) / LAYERS, layer_bytes() / gpu.bandwidth
        measured = gpu.llm[1]["steps"][0]["one_kernel_microseconds"] / LAYERS
        rows.append(["a layer of one kernel, 1", gpu.name, number(floor), number(time)])
        rows[-1] += [number(measured), ratio(measured, time)]
    return rows


def constant_rows():
    rows = [["constant", "value", "source"]]
    for c in CONSTANTS.values():
        value = f"{c.value:,g} {c.unit}".strip()
        rows.append([c.what, value, c.source])
    for gpu in gpus():
        what = f"reading memory, {gpu.name}"
        rows.append([what, f"{gpu.bandwidth / 1e6:.2f} TB/s", "measured by `bprompt bench`"])
    return rows


def main():
    for rows in [case_rows(), layer_rows(), constant_rows()]:
        print("\n".join(markdown(rows)), end="\n\n")


if __name__ == "__main__":
    main()
