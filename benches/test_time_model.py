"""Tests of the models of time.

    python3 benches/test_time_model.py
"""

import unittest
from unittest import mock

import time_model as model
import time_model_training as training


class TimeModel(unittest.TestCase):
    def setUp(self):
        self.gpu = next(model.gpus())

    def test_littles_law(self):
        """Too few bytes in flight take longer; more than enough change nothing."""
        enough = self.gpu.bandwidth * model.constant("latency")
        whole = model.streaming(self.gpu, 1e7, enough)
        self.assertAlmostEqual(whole, 1e7 / self.gpu.bandwidth)
        self.assertAlmostEqual(model.streaming(self.gpu, 1e7, 4 * enough), whole)
        self.assertAlmostEqual(model.streaming(self.gpu, 1e7, enough / 4), 4 * whole)

    def test_blocks_as_the_program_launches_them(self):
        """36 tiles of QKV by clusters of 4, 12 of dense by clusters of 8; stages of 64 KB."""
        self.assertEqual(model.cluster_in_flight("QKV"), 36 * 4 << 16)
        self.assertEqual(model.cluster_in_flight("dense"), 12 * 8 << 16)
        self.assertEqual(model.skinny_in_flight("dense"), 96 * 8 * 6 << 10)
        self.assertEqual(model.skinny_in_flight("down"), 96 * 8 * 12 << 10)

    def test_no_estimate_beats_its_floor(self):
        for gpu in model.gpus():
            for case in [*model.decoding_cases(gpu), *model.compute_cases(gpu)]:
                self.assertLess(case.estimate, case.floor, f"{case.what}, {gpu.name}")

    def test_instructions_of_the_hot_path_count(self):
        row = model.KERNELS["decode_step_bf16_10", "sm_90a"]
        now = model.persistent_layer(self.gpu)["instructions"]
        loop = row["hot_loop"]
        kept, loop["path_instructions"] = loop["path_instructions"], 16 * 40
        try:
            fewer = model.persistent_layer(self.gpu)["instructions"]
        finally:
            loop["path_instructions"] = kept
        self.assertAlmostEqual(fewer / now, 16 * 40 / kept)

    def test_causes_of_a_gemm(self):
        """144 pairs of tiles on 66 pairs of multiprocessors, 24 slices of 64 inputs."""
        g = model.Gemm(6144, 1536, 1536, written=2)
        parts = model.gemm_parts(self.gpu, g)
        cycles = 24 * 4 * 2 * 128  # instructions of 16 inputs by two warpgroups
        tile = cycles / (0.85 * model.clock())
        self.assertAlmostEqual(parts["products"], 144 / 66 * tile)
        self.assertAlmostEqual(parts["multiprocessors without a tile"], (3 - 144 / 66) * tile)
        self.assertEqual(parts["sums for biases"], 0)
        self.assertEqual(parts["epilogue or memory, beyond these"], 0)

    def test_sums_for_biases_take_the_time_of_their_operands(self):
        """64 + 8 rows of 16 inputs come from shared memory in 18 cycles, products take 128."""
        products, sums = model.Gemm(1536, 1536, 6144, sums=True).main_loop()
        self.assertAlmostEqual(sums / products, 18 / 128)

    def test_blocks_begin_where_others_end(self):
        self.assertEqual(model.makespan([3, 2, 2, 1], 2), 4)


class TrainingModel(unittest.TestCase):
    def setUp(self):
        self.gpus = list(model.gpus())
        self.operations = {o.what: o for o in training.operations()}

    def test_parameters(self):
        self.assertEqual(training.Step().parameters, 1_065_314_304)

    def test_floors_by_hand(self):
        linears = 24 * 12 * 1536**2
        flops = {
            "LM head: logits": 2 * 6144 * 250_880 * 1536,
            "LM head: dX": 2 * 6144 * 250_880 * 1536,
            "dX of down, GELU's gradient": 2 * 6144 * linears * 4 / 12,
            "dW of QKV": 2 * 6144 * linears * 3 / 12,
        }
        moved = {
            "AdamW": 30 * 1_065_314_304,
            "norm of the gradient": 4 * 1_065_314_304,
            "GELU": 24 * 6144 * 6144 * 4,
            "layer norms, backward": 48 * 6144 * 1536 * 14,
            "LM head: gradients of logits": 6144 * 250_880 * 4,
            # gradients of logits, and by chunk X, and the gradient of the LM head twice
            "LM head: dW": 2 * 6144 * 250_880 + 2 * 6144 * 1536 + 6 * 8 * 250_880 * 1536,
        }
        for gpu in self.gpus:
            for what, count in flops.items():
                floor = self.operations[what].floor(gpu)
                self.assertAlmostEqual(floor, count / 989.4e9, msg=what)
            for what, count in moved.items():
                floor = self.operations[what].floor(gpu)
                self.assertAlmostEqual(floor, count / gpu.bandwidth / 1e3, msg=what)

    def test_flops_of_a_step(self):
        """Three products of each token and weight of a matrix; of attention seven of each pair of a
        query and a key, where 16 sequences have 16 heads of 384 * 385 / 2 pairs."""
        matrices = 24 * 12 * 1536**2 + 250_880 * 1536
        pairs = 24 * 16 * 16 * 384 * 385 / 2
        flops = sum(o.times * o.flops for o in self.operations.values())
        self.assertAlmostEqual(flops / (6 * 6144 * matrices + 7 * 2 * 96 * pairs), 1)

    def test_floor_of_the_goal(self):
        """39.3 TFLOP at 790 TFLOP/s and 32 GB at 4.36 TB/s."""
        sft = next(training.goals(self.gpus[1]))
        self.assertAlmostEqual(sft.floor, 6144 / (39.257 / 790 + 31.959 / 4362.6), delta=50)

    def test_no_estimate_beats_its_floor(self):
        for gpu in self.gpus:
            for what, o in self.operations.items():
                self.assertGreater(o.estimate(gpu), o.floor(gpu), f"{what}, {gpu.name}")
                self.assertGreaterEqual(o.as_measured(gpu), o.estimate(gpu))
                if isinstance(o, training.GemmOperation):
                    self.assertGreaterEqual(min(o.parts(gpu).values()), 0, what)
            for goal in training.goals(gpu):
                self.assertLess(goal.estimate, goal.floor, f"{goal.what}, {gpu.name}")
                self.assertLess(goal.goal, goal.floor, f"{goal.what}, {gpu.name}")

    def test_more_work_never_takes_less_time(self):
        steps = [training.Step(32, 384), training.Step(16, 768), training.Step(16, 384, 25)]
        for more in steps + [training.Step(64, 1024)]:
            for o in training.operations(more):
                less = self.operations[o.what]
                self.assertGreaterEqual(o.times, less.times)
                for gpu in self.gpus:
                    self.assertGreaterEqual(o.estimate(gpu), less.estimate(gpu), o.what)
                    self.assertGreaterEqual(o.floor(gpu), less.floor(gpu), o.what)

    def test_gemms_as_the_program_divides_them(self):
        """As the program's own test has it. The gradients of dense are 36 pairs of tiles for 66
        pairs of multiprocessors, those of up's input two whole waves and 12 tiles in 5 parts, those
        of the LM head's input 24 tiles in 8 parts."""
        for shape, expected in [
            ((24, 6, 96), (22, 5)),
            ((24, 6, 72), (22, 4)),
            ((4, 6, 3920), (0, 8)),
            ((6, 6, 96), (6, 1)),
            ((22, 6, 96), (22, 1)),
            ((24, 6, 4), (24, 1)),
        ]:
            self.assertEqual(training.tiles(*shape, 66), expected, shape)
        [dense] = training.divided(model.Gemm(1536, 1536, 6144, read=4, sums=True))
        self.assertEqual((dense.parts, dense.waves()), (1, (36 / 66, 1, 72)))
        whole, rest = training.divided(model.Gemm(6144, 1536, 6144, written=2))
        self.assertEqual((whole.m, whole.waves()), (5632, (2, 2, 132)))
        self.assertEqual((rest.m, rest.parts, rest.waves()), (512, 5, (60 / 66, 1, 120)))
        [head] = training.divided(model.Gemm(1024, 1536, 250_880, written=2))
        self.assertEqual((head.parts, head.waves()), (8, (192 / 66, 3, 132)))
        self.assertEqual((head.written, head.read), (4, 0))
        self.assertIn("gemm_combine_bf16", self.operations["LM head: dX"].kernels)

    def test_blocks_that_share_a_multiprocessor(self):
        """As the kernels of attention are bounded in the source."""
        blocks = [training.resident(training.attention_kernel(p)) for p in ["forward", "dq", "dkv"]]
        self.assertEqual(blocks, [3, 2, 2])

    def test_what_the_docs_say_of_bottlenecks(self):
        """The H100 reaches the goal with nothing to spare; what would help takes some 2 ms each."""
        h100, done = self.gpus[0], list(self.operations.values())
        causes = {}
        for o in training.linear_backward(done):
            for cause, time in getattr(o, "parts", lambda gpu: {})(h100).items():
                causes[cause] = causes.get(cause, 0) + o.times * time / 1e3
        step = sum(o.estimate(h100) for o in done)
        idle = causes["multiprocessors without a tile"]
        self.assertAlmostEqual(6144e3 / step / 70_000, 1, delta=0.02)
        dw = self.operations["LM head: dW"]
        waits = dw.times * dw.parts(h100)["epilogue or memory, beyond these"] / 1e3
        for next_ones in [idle, waits, causes["sums for biases"]]:
            self.assertAlmostEqual(next_ones, 2, delta=0.4)
        self.assertLess(causes["epilogue or memory, beyond these"], 0.1)

    def test_every_kernel_must_be_in_the_report(self):
        named = {name for o in self.operations.values() for name in o.kernels}
        for name in named:
            without = {key: row for key, row in model.KERNELS.items() if key[0] != name}
            with mock.patch.object(model, "KERNELS", without), self.assertRaises(KeyError):
                training.operations()


if __name__ == "__main__":
    unittest.main()
