//! Compiles the kernels as C++. The compiler calls the emulator before every access to memory (its
//! kernel-address instrumentation, with all checks out of line), which is how accesses out of
//! bounds and reads of unwritten memory are seen.

use std::path::{Path, PathBuf};

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|f| f.expect("a readable folder").path())
        .filter(|p| p.extension().is_some_and(|e| e == "cu"))
        .collect();
    files.sort();
    files
}

/// How kernels are compiled, here and by `src/mutant.rs`.
const FLAGS: [&str; 12] = [
    "-std=c++17",
    "-DKERNEL_EMULATOR",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    "-Wno-psabi",
    "-fsanitize=kernel-address",
    "--param=asan-instrumentation-with-call-threshold=0",
    "--param=asan-stack=0",
    "--param=asan-globals=0",
];

fn main() {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let kernels = here.parent().expect("the emulator lies in kernels").to_owned();
    let mut files = sources(&kernels);
    files.extend(sources(&here.join("faults")));
    let mut build = cc::Build::new();
    FLAGS.iter().for_each(|flag| {
        build.flag(flag);
    });
    build
        .cpp(true)
        .opt_level(2)
        .include(here.join("include"))
        .include(kernels.join("include"))
        .flag("-xc++")
        .link_lib_modifier("+whole-archive") // kernels register themselves: nobody names them
        .files(&files);
    build.compile("emulated_kernels");
    println!("cargo:rustc-env=EMULATOR_COMPILER={}", build.get_compiler().path().display());
    println!("cargo:rustc-env=EMULATOR_FLAGS={}", FLAGS.join(" "));
    println!("cargo:rerun-if-changed={}", kernels.display());
}
