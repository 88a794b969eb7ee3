//! Compiles `kernels/*.cu` with nvcc, for each architecture, and embeds the results. Without nvcc
//! the build succeeds, and the program says what is missing when it is asked for CUDA. Makes the
//! Rust side of the structs and constants that host and device share, too.
//!
//! nvcc is `NVCC`, else that of `CUDA_HOME` or `CUDA_PATH`, else the one in `PATH`.
//! `BPROMPT_CUDA_ARCHS` lists what to compile for ("80,90a" if not set); PTX for later GPUs comes
//! with it. `BPROMPT_NVCC_FLAGS` adds flags, such as `-lineinfo` for a profiler. What was compiled
//! from the same text is not compiled again.

#[path = "kernels/abi.rs"]
mod abi;

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What nvcc makes of one file for one architecture.
struct Job {
    source: PathBuf,
    name: String,
    /// As nvcc writes it: `sm_90a` for machine code, `compute_90` for PTX.
    arch: String,
    output: PathBuf,
}

fn main() {
    println!("cargo:rerun-if-changed=kernels");
    for variable in
        ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "BPROMPT_CUDA_ARCHS", "BPROMPT_NVCC_FLAGS"]
    {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let jobs = nvcc().map(|nvcc| compile(&nvcc, &out)).unwrap_or_default();
    let mut table =
        String::from("/// The images that were built.\npub static IMAGES: &[Image] = &[\n");
    for job in &jobs {
        writeln!(
            table,
            "    Image {{ name: {:?}, arch: {:?}, bytes: include_bytes!({:?}) }},",
            job.name, job.arch, job.output
        )
        .expect("a string takes all");
    }
    table.push_str("];\n");
    std::fs::write(out.join("images.rs"), table).expect("OUT_DIR can be written");
    // kernels that tests compile and load call the emulator in the test's program
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo:rustc-link-arg-tests=-Wl,--export-dynamic");
    }
    let header = "kernels/include/abi.h";
    let text = std::fs::read_to_string(header).unwrap_or_else(|e| panic!("{header}: {e}"));
    let rust = abi::rust_of(&text, header).unwrap_or_else(|e| panic!("{e}"));
    std::fs::write(out.join("abi.rs"), rust).expect("OUT_DIR can be written");
}

fn nvcc() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(nvcc) = variable("NVCC") {
        assert!(nvcc.is_file(), "NVCC={}: there is no such file", nvcc.display());
        return Some(nvcc);
    }
    let homes =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).map(|home| home.join("bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    homes
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join("nvcc"))
        .find(|p| p.is_file())
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("a readable folder").path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == extension));
    files.sort();
    files
}

fn compile(nvcc: &Path, out: &Path) -> Vec<Job> {
    let archs = std::env::var("BPROMPT_CUDA_ARCHS").unwrap_or_else(|_| "80,90a".to_owned());
    let mut archs: Vec<String> = archs.split(',').map(|a| format!("sm_{}", a.trim())).collect();
    archs.push("compute_90".to_owned());
    let mut jobs = Vec::new();
    for source in files(Path::new("kernels"), "cu") {
        let name = source.file_stem().expect("a file").to_string_lossy().into_owned();
        for arch in &archs {
            let kind = if arch.starts_with("compute") { "ptx" } else { "cubin" };
            let output = out.join(format!("{name}.{arch}.{kind}"));
            jobs.push(Job {
                source: source.clone(),
                name: name.clone(),
                arch: arch.clone(),
                output,
            });
        }
    }
    let read = |p: &PathBuf| std::fs::read(p).unwrap_or_else(|e| panic!("{}: {e}", p.display()));
    let include = Path::new("kernels/include");
    let headers: Vec<Vec<u8>> =
        ["cuh", "h"].iter().flat_map(|e| files(include, e)).map(|f| read(&f)).collect();
    let more = std::env::var("BPROMPT_NVCC_FLAGS").unwrap_or_default();
    let failures = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let workers = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    std::thread::scope(|s| {
        for _ in 0..workers {
            s.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut hash = DefaultHasher::new();
                    (read(&job.source), &headers, nvcc, FLAGS, &more).hash(&mut hash);
                    if let Err(message) = run(nvcc, job, &more, &format!("{:x}", hash.finish())) {
                        failures.lock().expect("nothing panics with the lock").push(message);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("nothing panics with the lock");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    jobs
}

/// Warnings are errors, and so are registers spilled to memory; `-v` has the compiler speak of what
/// it had to serialize.
const FLAGS: [&str; 7] = [
    "-std=c++17",
    "-O3",
    "-Ikernels/include",
    "-Xptxas",
    "-warn-spills,-v",
    "-Werror",
    "all-warnings",
];

fn run(nvcc: &Path, job: &Job, more: &str, hash: &str) -> Result<(), String> {
    let stamp = job.output.with_extension("stamp");
    if job.output.exists() && std::fs::read_to_string(&stamp).is_ok_and(|s| s == hash) {
        return Ok(());
    }
    let kind = if job.arch.starts_with("compute") { "-ptx" } else { "-cubin" };
    let mut command = Command::new(nvcc);
    command
        .args(FLAGS)
        .args(more.split_whitespace())
        .arg(kind)
        .arg(format!("-arch={}", job.arch))
        .arg(&job.source)
        .arg("-o")
        .arg(&job.output);
    let done = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let text = [done.stdout, done.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    // the compiler does not count it as a warning, but it makes the wgmma of a warpgroup wait for
    // each other
    if !done.status.success() || text.contains("Potential Performance Loss") {
        return Err(format!("{} for {}:\n{text}", job.source.display(), job.arch));
    }
    if kind == "-ptx" {
        // the driver takes PTX as a C string
        let mut ptx = std::fs::read(&job.output).map_err(|e| e.to_string())?;
        ptx.push(0);
        std::fs::write(&job.output, ptx).map_err(|e| e.to_string())?;
    }
    std::fs::write(stamp, hash).map_err(|e| e.to_string())
}
