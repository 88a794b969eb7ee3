//! The Rust side of what host and device share is made from a header: what the generator
//! understands, and that it refuses everything else with the line.

#[path = "../kernels/abi.rs"]
mod abi;

fn error(header: &str) -> String {
    abi::rust_of(header, "abi.h").expect_err("it is wrong")
}

const PAIR: &str = "typedef struct {\n    uint32_t a;\n    float b;\n} Pair;\n";

#[test]
fn constants_and_structs() {
    let header = format!(
        "// The file.\n#pragma once\n#include <stdint.h>\n\n// Some.\n\
         constexpr int N = 2 * (3 - 1);\n\
         {PAIR}static_assert(sizeof(Pair) == 8);\n\
         constexpr uint32_t M =\n    0xfffffff0 + N + sizeof(Pair);\n\
         typedef struct {{\n    // Where.\n    const Pair* at;\n    Pair pairs[N];\n    \
         void* other[2];\n}} Both;\nstatic_assert(sizeof(Both) == 56);\n"
    );
    let rust = abi::rust_of(&header, "abi.h").unwrap();
    for expected in [
        "/// Some.\npub const N: usize = 4;\n",
        "pub const M: u32 = 4294967292;\n",
        "#[repr(C)]\npub struct Pair {\npub a: u32,\npub b: f32,\n}\n",
        "const _: () = assert!(size_of::<Pair>() == 8);\n",
        "pub struct Both {\n/// Where.\npub at: u64,\n",
        "pub pairs: [Pair; 4],\npub other: [u64; 2],\n}\n",
    ] {
        assert!(rust.contains(expected), "{expected:?} is not in {rust:?}");
    }
    assert!(!rust.contains("The file"), "{rust}");
}

#[test]
fn anything_else_is_refused_with_its_line() {
    for (header, says) in [
        ("int x;", "abi.h:1: expected a constant or a struct: int x;"),
        ("\n#define N 4", "abi.h:2: expected a constant or a struct"),
        ("constexpr int N = 4; // four", "abi.h:1: expected ;"),
        ("constexpr long N = 4;", "unknown type long"),
        ("constexpr int N = M;", "unknown M"),
        ("constexpr int N = 4 % 3;", "unexpected %"),
        ("constexpr int N = (4;", "expected )"),
        ("constexpr int N = 4 / 0;", "division by zero"),
        ("constexpr int N = 0x80000000;", "a value of its type"),
        ("constexpr int N = 1;\nconstexpr int N = 1;", "abi.h:2: expected a new name"),
        ("typedef struct {\nuint32_t a, b;\n} P;", "abi.h:2: a, b is no name"),
        ("typedef struct {\nuint32_t a; // it\n} P;", "abi.h:2: expected ;"),
        ("typedef struct {\nint* a;\n} P;", "abi.h:2: unknown type int*"),
        ("typedef struct {\nuint32_t a;\nuint64_t b;\n} P;", "abi.h:3: padding is needed before"),
        (
            "typedef struct {\nuint64_t b;\nuint32_t a;\n} P;",
            "abi.h:4: the struct is empty or needs",
        ),
        ("typedef struct {\n} P;", "abi.h:2: the struct is empty or needs"),
        ("typedef struct {\nuint32_t a[0];\n} P;", "abi.h:2: an array needs elements"),
        ("typedef struct {\nuint32_t a;", "the last struct does not end"),
        ("} P;", "abi.h:1: no struct ends here"),
        (PAIR, "its static_assert is missing"),
        (&format!("{PAIR}\n"), "abi.h:5: expected the static_assert of the struct above"),
        (
            &format!("{PAIR}static_assert(sizeof(Pair) == 12);"),
            "abi.h:5: expected static_assert(sizeof(Pair) == 8);",
        ),
    ] {
        let e = error(header);
        assert!(e.contains(says), "{header:?} gives {e:?}, it should say {says:?}");
    }
}
