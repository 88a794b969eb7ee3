//! Kernels with a mistake put into them: what the emulator is tested with.

use crate::registry;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A change to a kernel's text: in this file of `kernels` or `kernels/include`, all occurrences of
/// a text are replaced.
#[derive(Clone, Copy, Debug)]
pub struct Patch {
    pub file: &'static str,
    pub from: &'static str,
    pub to: &'static str,
}

/// Compiles `source`, a file of `kernels`, with patches, and loads it into this process. Its
/// kernels are then known by the names `prefix` + their own.
///
/// # Errors
/// If a text to be replaced is not there, or if what comes out does not compile.
pub fn load(prefix: &str, source: &str, patches: &[Patch]) -> Result<(), String> {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("it lies in kernels");
    // a library is known by its path: the same one would not be loaded again
    let name = format!("kernel-mutant-{}-{prefix}{source}", std::process::id());
    let folder = std::env::temp_dir().join(name);
    let made = compile(kernels, &folder, prefix, source, patches);
    let loaded = made.and_then(|library| open(&library));
    let removed = std::fs::remove_dir_all(&folder);
    loaded?;
    removed.map_err(|e| format!("{}: {e}", folder.display()))
}

/// What `load` does, without loading it.
fn compile(
    kernels: &Path,
    folder: &Path,
    prefix: &str,
    source: &str,
    patches: &[Patch],
) -> Result<PathBuf, String> {
    let failed = |e: std::io::Error| format!("{}: {e}", folder.display());
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut files = vec![kernels.join(source)];
    for f in std::fs::read_dir(kernels.join("include")).map_err(failed)? {
        files.push(f.map_err(failed)?.path());
    }
    let mut left: Vec<&Patch> = patches.iter().collect();
    for file in files {
        let name = file.file_name().expect("a file has a name").to_string_lossy().into_owned();
        let mut text = std::fs::read_to_string(&file).map_err(failed)?;
        left.retain(|p| {
            let here = p.file == name && text.contains(p.from);
            if here {
                text = text.replace(p.from, p.to);
            }
            !here
        });
        std::fs::write(folder.join(name), text).map_err(failed)?;
    }
    if let Some(p) = left.first() {
        return Err(format!("{} has no {:?} that could be replaced", p.file, p.from));
    }
    let library = folder.join("kernels.so");
    let out = Command::new(env!("EMULATOR_COMPILER"))
        .args(env!("EMULATOR_FLAGS").split(' '))
        .args(["-O1", "-xc++", "-shared", "-fPIC", "-fvisibility=hidden"])
        .arg(format!("-DKERNEL_PREFIX=\"{prefix}\""))
        .arg("-I")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include"))
        .arg(folder.join(source))
        .arg("-o")
        .arg(&library)
        .output()
        .map_err(failed)?;
    if out.status.success() {
        Ok(library)
    } else {
        Err(format!("{source} does not compile: {}", String::from_utf8_lossy(&out.stderr)))
    }
}

/// Loads a library, whose kernels register themselves, for as long as the process lives.
fn open(library: &Path) -> Result<(), String> {
    let path = CString::new(library.as_os_str().as_encoded_bytes()).expect("no zero in a path");
    let before = registry::names().len();
    // SAFETY: the library's constructors only register kernels.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        // SAFETY: there was an error, so there is a message.
        let why = unsafe { std::ffi::CStr::from_ptr(libc::dlerror()) };
        return Err(why.to_string_lossy().into_owned());
    }
    if registry::names().len() == before {
        return Err("it has no kernels".to_owned());
    }
    Ok(())
}
