//! Files that a command reads must not be those that it writes.

use anyhow::bail;
use std::path::{Path, PathBuf};

/// What tells one regular file from another, whatever names it has.
#[cfg(unix)]
type Identity = (u64, u64);
#[cfg(not(unix))]
type Identity = PathBuf;

#[cfg(unix)]
fn of_metadata(metadata: &std::fs::Metadata) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt;
    // a terminal or /dev/null may well be both read and written
    metadata.is_file().then(|| (metadata.dev(), metadata.ino()))
}

/// The identity of the file behind an open descriptor.
#[cfg(unix)]
fn of_stream(stream: &dyn std::os::fd::AsFd) -> Option<Identity> {
    let file = std::fs::File::from(stream.as_fd().try_clone_to_owned().ok()?);
    of_metadata(&file.metadata().ok()?)
}

/// The identity of a regular file, or of the one that `-` is redirected to.
#[cfg(unix)]
fn identity(path: &Path, reads: bool) -> Option<Identity> {
    if path.as_os_str() != "-" {
        return of_metadata(&std::fs::metadata(path).ok()?);
    }
    if reads { of_stream(&std::io::stdin()) } else { of_stream(&std::io::stdout()) }
}

#[cfg(not(unix))]
fn identity(path: &Path, _reads: bool) -> Option<Identity> {
    let path = path.canonicalize().ok()?;
    path.is_file().then_some(path)
}

/// Whether a path still names the file that was opened there.
#[cfg(unix)]
pub fn is_at(file: &std::fs::File, path: &Path) -> bool {
    let opened = file.metadata().ok().and_then(|m| of_metadata(&m));
    opened.is_some() && opened == identity(path, false)
}

#[cfg(not(unix))]
pub fn is_at(_file: &std::fs::File, path: &Path) -> bool {
    path.exists()
}

/// Whether a path is another name of standard output.
pub fn is_stdout(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"]
        .iter()
        .any(|name| path.as_os_str() == *name)
}

/// Refuses outputs that are among the inputs, under another name, as a link, or by redirection; `-`
/// stands for standard input or output, and a folder for the files in it.
pub fn check_distinct(outputs: &[&Path], inputs: &[&Path]) -> anyhow::Result<()> {
    let mut read: Vec<(PathBuf, Option<Identity>)> = vec![];
    for input in inputs {
        let inside = if input.is_dir() { std::fs::read_dir(input).ok() } else { None };
        match inside {
            Some(entries) => {
                read.extend(entries.flatten().map(|e| (e.path(), identity(&e.path(), true))))
            }
            None => read.push((input.to_path_buf(), identity(input, true))),
        }
    }
    for (i, output) in outputs.iter().enumerate() {
        let Some(written) = identity(output, false) else { continue };
        if let Some((input, _)) = read.iter().find(|(_, id)| id.as_ref() == Some(&written)) {
            let output = if is_stdout(output) {
                "standard output".into()
            } else {
                output.display().to_string()
            };
            let input = if input.as_os_str() == "-" {
                "standard input".into()
            } else {
                input.display().to_string()
            };
            bail!("{output}: is the same file as the input {input}; choose another output");
        }
        if outputs[..i].iter().any(|other| identity(other, false).as_ref() == Some(&written)) {
            bail!("{}: is the same file as another output; choose another name", output.display());
        }
    }
    // files that are not there yet have no identity, but one name would still be written twice
    for (i, output) in outputs.iter().enumerate() {
        if outputs[..i].contains(output) {
            bail!("{}: is the name of two outputs; choose another name for one", output.display());
        }
    }
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn links_and_other_names_are_the_same_file() {
        let f = tempfile::tempdir().unwrap();
        let at = |name: &str| f.path().join(name);
        std::fs::write(at("in"), "x").unwrap();
        std::fs::write(at("other"), "x").unwrap();
        std::fs::hard_link(at("in"), at("hard")).unwrap();
        std::os::unix::fs::symlink(at("in"), at("soft")).unwrap();
        let dotted = f.path().join(".").join("in");
        for same in [at("in"), at("hard"), at("soft"), dotted] {
            let message =
                check_distinct(&[&same], &[&at("other"), &at("in")]).unwrap_err().to_string();
            assert!(message.contains("is the same file as the input"), "{message}");
        }
        assert!(
            check_distinct(&[&at("soft")], &[f.path()]).is_err(),
            "a folder stands for its files"
        );
        assert!(check_distinct(&[&at("new"), &at("new")], &[]).is_err());
        assert!(check_distinct(&[&at("hard"), &at("soft")], &[]).is_err());
        check_distinct(&[&at("new"), &at("other")], &[&at("in")]).unwrap();
        check_distinct(&[Path::new("/dev/null")], &[Path::new("/dev/null")]).unwrap();
    }
}
