"""Tests of the model of time.

    python3 benches/test_time_model.py
"""

import unittest

import time_model as model


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


if __name__ == "__main__":
    unittest.main()
