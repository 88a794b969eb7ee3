"""The gate's own tests, on small texts as cuobjdump prints them: each kind of check passes what is
right and fails what is not.

    python3 kernels/test_sass_gate.py
"""

import pathlib
import tempfile
import unittest

import report
import sass
import sass_gate


def kernel(*lines, name="stream_bf16", registers=64, arch="sm_90a", threads=256):
    """A kernel of these instructions, 16 bytes apart from address 0 on."""
    text = [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for i, line in enumerate(lines):
        text += [f"        /*{i * 16:04x}*/    {line} ;   /* 0x00000a00ff017b82 */"]
        text += ["                                         /* 0x000ff00000000800 */"]
    code = sass.parse("\n".join(text))[name]
    assert len(code) == len(lines), "an instruction was not recognized"
    return sass.Kernel(name, arch, code, threads, {"REG": registers, "SHARED": 0, "STACK": 0})


# A loop like that of a linear layer: loads, copies, products.
STREAM = [
    "S2R R0, SR_TID.X",
    "@!P0 LD.E.128 R20, desc[UR8][R50.64]",
    "@!PT LDS RZ, [RZ]",
    "LDS.128 R40, [R61+UR4]",
    "HMMA.16816.F32.BF16 R44, R44, R40, R12",
    "HMMA.16816.F32.BF16 R48, R48, R32, R36",
    "LDGSTS.E.BYPASS.128 [R61], desc[UR8][R12.64], !P3",
    "@P0 BRA 0x10",
    "EXIT",
]
# A loop like that of attention: the softmax lies between the two waits.
OVERLAPPED = [
    "WARPGROUP.ARRIVE",
    "HGMMA.64x96x16.F32.BF16 R24, R104, gdesc[UR12], RZ, !UPT, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "MUFU.EX2 R45, R27",
    "MUFU.EX2 R46, R28",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "FMUL R1, R1, R2",
    "@!P0 BRA 0x0",
    "EXIT",
]
SERIAL = OVERLAPPED[:3] + [OVERLAPPED[5]] + OVERLAPPED[3:5] + OVERLAPPED[6:]


def entry(check, **keys):
    made = {"check": check, "kernels": ["*"], "reason": "The reason.", **keys}
    sass_gate.check_entries([made])
    return made


def lines(kernels, *entries, required=()):
    """The gate's lines, without those about required entries unless they are wanted."""
    kept, sass_gate.REQUIRED = sass_gate.REQUIRED, list(required)
    try:
        return list(sass_gate.violations(kernels, entries))
    finally:
        sass_gate.REQUIRED = kept


class Loops(unittest.TestCase):
    def loops(self, *code):
        found = kernel(*code).loops
        return sorted((loop.header, sorted(loop.body)) for loop in found)

    def test_nested(self):
        code = ["NOP", "NOP", "NOP", "@P0 BRA 0x20", "@P1 BRA 0x10", "EXIT"]
        self.assertEqual(self.loops(*code), [(1, [1, 2, 3, 4]), (2, [2, 3])])

    def test_code_out_of_line_belongs_to_its_loop(self):
        code = ["NOP", "@P0 BRA 0x40", "@P1 BRA 0x0", "EXIT", "FADD R0, R0, R1", "BRA 0x20"]
        self.assertEqual(self.loops(*code), [(0, [0, 1, 2, 4, 5])])

    def test_a_backward_branch_alone_is_no_loop(self):
        code = ["BRA 0x20", "EXIT", "NOP", "BRA 0x10"]
        self.assertEqual(self.loops(*code), [])

    def test_code_for_diverged_warps_is_left_out(self):
        code = ["BRA.DIV UR4, 0x40", "NOP", "@P0 BRA 0x0", "EXIT", "WARPSYNC R1", "BRA 0x10"]
        self.assertEqual(self.loops(*code), [(0, [0, 1, 2])])
        code = ["BRA.CONV ~URZ, 0x20", "CALL.REL.NOINC 0x40", "@P0 BRA 0x0", "EXIT", "RET R1"]
        self.assertEqual(self.loops(*code), [(0, [0, 2])])

    def test_a_loop_left_by_call(self):
        code = ["NOP", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0", "NOP", "@P1 BRA 0x30", "EXIT"]
        self.assertEqual(self.loops(*code), [(0, [0, 1, 2]), (3, [3, 4])])

    def test_the_body_begins_with_the_header(self):
        code = ["BRA 0x30", "FADD R0, R0, R1", "BRA 0x30", "NOP", "@P0 BRA 0x10", "EXIT"]
        (loop,) = kernel(*code).loops
        self.assertEqual(loop.body, [3, 4, 1, 2])

    def test_the_hot_loop_is_the_innermost_with_most_products(self):
        hmma = "HMMA.16816.F32 R0, R4, R8, R0"
        code = [hmma, "@P0 BRA 0x0", hmma, hmma, "@P0 BRA 0x20", "@P1 BRA 0x0", "EXIT"]
        self.assertEqual(kernel(*code).hot_loop.body, [2, 3, 4])
        self.assertIsNone(kernel("NOP", "@P0 BRA 0x0", "EXIT").hot_loop)


    def test_the_hot_path_does_all_work_and_little_else(self):
        hmma, copy = "HMMA.16816.F32 R0, R4, R8, R0", "LDGSTS.E.128 [R2], [R4.64]"
        # 3 and 4 begin another linear, which happens rarely; 5 asks for a copy
        code = [hmma, "@P0 BRA 0x50", "@P1 BRA 0x50", "MUFU.RCP R0, R1", "NOP", "@P2 BRA 0x70"]
        code += [copy, "@P3 BRA 0x0", "EXIT"]
        path = kernel(*code).hot_path
        self.assertEqual([i.kind for i in path], ["HMMA", "BRA", "BRA", "LDGSTS", "BRA"])
        self.assertEqual(len(kernel(*code).hot), 8)
        self.assertEqual(kernel("NOP", "EXIT").hot_path, [])


class Report(unittest.TestCase):
    def test_order(self):
        hot = kernel(*STREAM).hot
        self.assertEqual(report.order(hot, "x s C H"), "x s H2 C")
        self.assertEqual(report.order(hot, "C H"), "H2 C")

    def test_repetitions_are_written_once(self):
        self.assertEqual(report.repeated("x a b a b".split()), ["x", "2 (a b)"])
        self.assertEqual(report.repeated("a b a".split()), ["a", "b", "a"])

    def test_between_goes_on_at_the_beginning(self):
        hot = kernel(*OVERLAPPED).hot
        part = report.between(hot, report.WAIT_FOR_ALL, report.WAIT_FOR_OLDER)
        kinds = [i.kind for i in part]
        self.assertEqual(kinds, ["FMUL", "BRA", "WARPGROUP", "HGMMA"])

    def test_row(self):
        row = report.row_of(kernel(*OVERLAPPED, registers=96, threads=384))
        self.assertEqual(row["code_bytes"], 9 * 16)
        self.assertEqual(row["occupancy"], 384 / 2048)
        self.assertEqual(row["hot_loop"]["exponentials_between_waits"], 2)
        self.assertEqual(row["tensor_core"], {"HGMMA.64x96x16.F32.BF16": 1})


class Checks(unittest.TestCase):
    tested = set()

    def passes_and_fails(self, checked, right, wrong, found):
        """`right` meets the entry, `wrong` does not, and the line says what was found."""
        Checks.tested.add(checked["check"])
        self.assertEqual(lines([right], checked), [])
        (line,) = lines([wrong], checked)
        for part in [wrong.name, wrong.arch, found, "The reason."]:
            self.assertIn(part, line)

    def test_registers(self):
        few, many = kernel(*STREAM, registers=80), kernel(*STREAM, registers=81)
        self.passes_and_fails(entry("registers", max=80), few, many, "81, expected at most 80")

    def test_code_bytes(self):
        small, large = kernel(*STREAM), kernel("NOP", *STREAM)
        self.passes_and_fails(entry("code_bytes", max=9 * 16), small, large, "found 160")

    def test_spills(self):
        spills = entry("count", scope="kernel", what="^(LDL|STL)", max=0)
        for spill in ["STL.64 [R1], R2", "@P0 LDL R0, [R1+0x8]"]:
            self.passes_and_fails(spills, kernel(*STREAM), kernel(spill, "EXIT"), "found 1")

    def test_division(self):
        division = entry("count", scope="hot loop", what="^FCHK", max=0)
        outside = kernel(*STREAM[:-1], "FCHK P0, R0, R1", "EXIT")
        inside = kernel(*STREAM[:4], "FCHK P0, R0, R1", *STREAM[4:])
        self.passes_and_fails(division, outside, inside, "found 1")

    def test_barrier_in_the_hot_loop(self):
        barrier = entry("count", scope="hot loop", what=r"^BAR\.", max=0)
        inside = kernel(*STREAM[:4], "BAR.SYNC.DEFER_BLOCKING 0x0", *STREAM[4:])
        self.passes_and_fails(barrier, kernel("BAR.SYNC 0x0", *STREAM), inside, "found 1")

    def test_fences_in_loops_with_wgmma(self):
        fences = entry(
            "count", scope="loops with HGMMA", what="^(MEMBAR|ERRBAR|CGAERRBAR)", max=0
        )
        outside = kernel(*OVERLAPPED[:-1], "MEMBAR.ALL.GPU", "EXIT")
        for fence in ["MEMBAR.ALL.GPU", "ERRBAR", "CGAERRBAR"]:
            inside = kernel(*OVERLAPPED[:3], fence, *OVERLAPPED[3:])
            self.passes_and_fails(fences, outside, inside, "found 1")
        # the loop around the one with wgmma counts as well
        outer = OVERLAPPED[:-1] + ["MEMBAR.ALL.GPU", "@P1 BRA 0x0", "EXIT"]
        self.passes_and_fails(fences, outside, kernel(*outer), "found 1")

    def test_a_scope_that_is_missing_is_a_violation(self):
        barrier = entry("count", scope="hot loop", what=r"^BAR\.", max=0)
        self.passes_and_fails(barrier, kernel(*STREAM), kernel("NOP", "EXIT"), "no hot loop")

    def test_between(self):
        waits = {"start": report.WAIT_FOR_OLDER, "end": report.WAIT_FOR_ALL}
        early = entry("between", what=r"^MUFU\.EX2", min=2, **waits)
        self.passes_and_fails(early, kernel(*OVERLAPPED), kernel(*SERIAL), "found 0")
        waits = {"start": report.WAIT_FOR_ALL, "end": report.WAIT_FOR_OLDER}
        late = entry("between", what=r"^MUFU\.EX2", max=0, **waits)
        self.passes_and_fails(late, kernel(*OVERLAPPED), kernel(*SERIAL), "found 2")
        no_wait = kernel(*(i for i in OVERLAPPED if "0x1" not in i))
        self.passes_and_fails(late, kernel(*OVERLAPPED), no_wait, "no ")

    def test_order(self):
        order = {"letters": "x s C H", "is": "x s H2 C"}
        sunk = kernel(*STREAM[:3], STREAM[4], STREAM[3], *STREAM[5:])
        self.passes_and_fails(entry("order", **order), kernel(*STREAM), sunk, "x H s H C")

    def test_shapes(self):
        shapes = entry("shapes", **{"is": "64x96x16"})
        halves = [OVERLAPPED[1].replace("64x96", "64x64"), OVERLAPPED[1].replace("64x96", "64x32")]
        parted = kernel(*OVERLAPPED[:1], *halves, *OVERLAPPED[2:])
        self.passes_and_fails(shapes, kernel(*OVERLAPPED), parted, "64x32x16 64x64x16")

    def test_instructions_per_2kb(self):
        # six instructions that run in each iteration, two products of 512 bytes
        each = entry("instructions_per_2kb", what="^HMMA", bytes=512, max=12)
        padded = kernel(*STREAM[:4], "IADD3 R0, R0, R1, RZ", *STREAM[4:])
        self.passes_and_fails(each, kernel(*STREAM), padded, "found 14.0")
        self.passes_and_fails(each, kernel(*STREAM), kernel(*OVERLAPPED), "no ^HMMA")

    def test_every_kind_is_tested(self):
        names = [name for name in dir(self) if name.startswith("test_")]
        for name in names:
            if name != "test_every_kind_is_tested":
                getattr(self, name)()
        self.assertEqual(self.tested, set(sass_gate.CHECKS))


class Gate(unittest.TestCase):
    def test_a_kernel_that_nothing_names(self):
        named = entry("registers", kernels=["other_*"], max=80)
        both = [kernel(*STREAM), kernel(*STREAM, name="other_1")]
        self.assertEqual(
            lines(both, named, required=["registers"]),
            ["stream_bf16 sm_90a: no expectation of registers names this kernel"],
        )

    def test_an_entry_that_names_no_kernel(self):
        stale = entry("registers", kernels=["gone_*"], max=80)
        self.assertEqual(
            lines([kernel(*STREAM)], stale), ["registers of gone_*: there is no such kernel"]
        )

    def test_architectures(self):
        old = entry("registers", archs=["sm_80"], max=8)
        both = [kernel(*STREAM), kernel(*STREAM, arch="sm_80")]
        (line,) = lines(both, old)
        self.assertIn("sm_80", line)

    def test_entries_with_mistakes(self):
        for keys in [
            {"check": "register", "max": 1},
            {"check": "registers"},
            {"check": "registers", "max": 1, "min": 1},
            {"check": "registers", "max": 1, "what": "^BAR"},
            {"check": "count", "max": 1, "what": "^BAR", "scope": "loop"},
            {"check": "order", "is": "H"},
        ]:
            with self.assertRaises(SystemExit):
                entry(**keys)
        with self.assertRaises(SystemExit):
            sass_gate.check_entries([{"check": "registers", "kernels": ["*"], "max": 1}])

    def test_goals(self):
        both = [kernel(*STREAM, registers=n) for n in (70, 80)]
        reached = entry("registers", max=90, goal=80)
        missed = entry("registers", max=90, goal=60)
        self.assertEqual(list(sass_gate.open_goals(both, [reached])), [])
        (line,) = sass_gate.open_goals(both, [missed])
        self.assertIn("70 to 80, the goal is 60", line)
        self.assertEqual(lines(both, missed), [])

    def test_a_report_that_differs(self):
        with tempfile.TemporaryDirectory() as folder:
            kept = pathlib.Path(folder, "report.json")
            kept.write_text(report.as_json([kernel(*STREAM)]), encoding="utf-8")
            self.assertEqual(list(sass_gate.differing_rows([kernel(*STREAM)], kept)), [])
            now = list(sass_gate.differing_rows([kernel(*STREAM, registers=65)], kept))
            self.assertEqual(len(now), 3)
            self.assertIn("stream_bf16 sm_90a: is missing or old", now[0])

    def test_the_expectations_are_well_formed(self):
        entries = sass_gate.load()
        self.assertTrue(all(e["reason"].endswith(".") for e in entries))
        self.assertLessEqual(set(sass_gate.REQUIRED), {e["check"] for e in entries})


if __name__ == "__main__":
    unittest.main()
