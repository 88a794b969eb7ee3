//! Where results go: a file that nobody else may write meanwhile, standard output, or a pipe.
//!
//! A file that exists keeps its content until the results that replace it are whole: they are
//! written beside it, to `NAME.partial`, which takes its place in the end. What an interrupted run
//! leaves is whole results, in the output itself or in that file, and `--resume` goes on there.

use crate::cli::files::{is_at, is_stdout};
use crate::cli::print;
use anyhow::{Context, bail, ensure};
use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// How a run meets what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Where nothing is.
    New,
    /// Behind what an interrupted run left.
    Resume,
    /// In place of what is there.
    Replace,
}

/// How a file's name has it compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    None,
    Gzip,
    Zstd,
}

enum Place {
    /// Standard output.
    Stdout(print::Stdout),
    /// A pipe or a device.
    Stream(File),
    File(LockedFile),
}

struct LockedFile {
    file: File,
    /// The file that is written, and the name that it gets in the end.
    path: PathBuf,
    place: PathBuf,
    /// Whether the file goes again if nothing is written: this run made it, and did not come to its
    /// end.
    is_new: bool,
    /// The lock on the file that is to be replaced.
    _replaced: Option<File>,
}

pub struct Target {
    place: Place,
    name: String,
    pub packing: Packing,
}

/// The name of a file that belongs to another.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(ending);
    path.with_file_name(name)
}

/// Where results are until they are whole, if a good output is to be replaced.
pub fn partial(output: &Path) -> PathBuf {
    beside(output, ".partial")
}

/// The file that holds an output's settings.
pub fn settings_path(output: &Path) -> PathBuf {
    beside(output, ".settings.json")
}

impl Target {
    /// Opens and locks an output, so that no other process can write to it meanwhile; `-` is
    /// standard output.
    pub fn open(path: &Path, begin: Begin) -> anyhow::Result<Target> {
        let packing = match path.extension() {
            Some(e) if e.eq_ignore_ascii_case("gz") => Packing::Gzip,
            Some(e) if e.eq_ignore_ascii_case("zst") => Packing::Zstd,
            _ => Packing::None,
        };
        let name = if path.as_os_str() == "-" {
            "standard output".into()
        } else {
            path.display().to_string()
        };
        ensure!(!path.is_dir(), "{name}: is a folder; expected the name of a file");
        let is_stream = path.exists() && !path.is_file();
        let place = if is_stdout(path) || is_stream {
            ensure!(begin != Begin::Resume, "{name}: --resume needs a file as --output");
            match is_stdout(path) {
                true => Place::Stdout(print::stdout()),
                false => {
                    let file = File::options().write(true).open(path);
                    Place::Stream(file.with_context(|| format!("{name}: cannot write"))?)
                }
            }
        } else {
            Place::File(LockedFile::open(path, begin)?)
        };
        Ok(Target { place, name, packing })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Writes all of these bytes.
    pub fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let is_stdout = matches!(self.place, Place::Stdout(_));
        let out = self.writer();
        let written = out.write_all(bytes).and_then(|()| out.flush());
        // standard output names itself
        if is_stdout {
            Ok(written?)
        } else {
            written.with_context(|| format!("{}: cannot write", self.name))
        }
    }

    fn writer(&mut self) -> &mut dyn Write {
        match &mut self.place {
            Place::Stdout(out) => out,
            Place::Stream(file) => file,
            Place::File(locked) => &mut locked.file,
        }
    }

    /// The file that is written, with its path; none if it is no regular file.
    pub fn file(&mut self) -> Option<(&mut File, &Path)> {
        match &mut self.place {
            Place::File(locked) => Some((&mut locked.file, &locked.path)),
            _ => None,
        }
    }

    /// The file beside the output that holds the results until they are whole, if there is one.
    pub fn partial(&self) -> Option<&Path> {
        match &self.place {
            Place::File(locked) if locked.path != locked.place => Some(&locked.path),
            _ => None,
        }
    }

    /// Puts whole results in their place.
    pub fn complete(mut self) -> anyhow::Result<()> {
        let Place::File(locked) = &mut self.place else { return Ok(()) };
        // some file systems cannot; then the operating system writes when it likes
        let _ = locked.file.sync_all();
        if locked.path != locked.place {
            let cannot = || format!("{}: cannot replace it", self.name);
            // the settings first: where it ends between the two, --resume still goes on with the
            // partial file
            std::fs::rename(settings_path(&locked.path), settings_path(&locked.place))
                .with_context(cannot)?;
            std::fs::rename(&locked.path, &locked.place).with_context(cannot)?;
        }
        locked.is_new = false;
        Ok(())
    }
}

impl Drop for LockedFile {
    /// A run that came to nothing leaves nothing.
    fn drop(&mut self) {
        if self.is_new
            && self.file.metadata().is_ok_and(|m| m.len() == 0)
            && is_at(&self.file, &self.path)
        {
            let _ = std::fs::remove_file(settings_path(&self.path));
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl LockedFile {
    fn open(path: &Path, begin: Begin) -> anyhow::Result<LockedFile> {
        // a link stays a link: the file that it names is replaced
        let place = match (path.canonicalize(), std::fs::read_link(path)) {
            (Ok(place), Ok(_)) => place,
            // a link to what is not there yet
            (Err(_), Ok(named)) => path.parent().unwrap_or(Path::new(".")).join(named),
            _ => path.to_path_buf(),
        };
        let partial = partial(&place);
        let holds_something = std::fs::metadata(&place).is_ok_and(|m| m.len() > 0);
        let name = path.display();
        if begin == Begin::New {
            ensure!(
                !holds_something,
                "{name}: exists already; --resume goes on with it, --force replaces it"
            );
            ensure!(
                !partial.exists(),
                "{}: holds an interrupted run's results; --resume goes on with it, --force begins \
                anew",
                partial.display()
            );
        }
        let aside = partial.exists() || (begin == Begin::Replace && holds_something);
        let replaced = if aside && place.exists() { Some(lock(&place)?) } else { None };
        let path = if aside { partial } else { place.clone() };
        let is_new = aside || !path.exists();
        let file = lock(&path)?;
        if let (true, Ok(metadata)) = (aside, std::fs::metadata(&place)) {
            // whoever could read the output can read what replaces it
            let _ = file.set_permissions(metadata.permissions());
        }
        if begin == Begin::Replace {
            file.set_len(0).with_context(|| format!("{}: cannot write", path.display()))?;
        }
        let length = file.metadata().map_or(0, |m| m.len());
        ensure!(
            begin != Begin::New || length == 0,
            "{name}: was begun by another process in this moment"
        );
        Ok(LockedFile { file, path, place, is_new, _replaced: replaced })
    }
}

/// Opens a file to append to it, alone.
fn lock(path: &Path) -> anyhow::Result<File> {
    let name = path.display();
    let file = File::options().read(true).append(true).create(true).open(path);
    let file = file.with_context(|| format!("{name}: cannot write"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            bail!(
                "{name}: another process is writing to it; wait until it is done, or choose \
                another output"
            )
        }
        // some network file systems have no locks
        Err(TryLockError::Error(_)) => {}
    }
    ensure!(
        is_at(&file, path),
        "{name}: another process put a file in its place in this moment; try again"
    );
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_stays_until_the_new_one_is_whole() {
        let f = tempfile::tempdir().unwrap();
        let out = f.path().join("out.jsonl");
        let partial = f.path().join("out.jsonl.partial");
        let read = |p: &Path| std::fs::read_to_string(p).unwrap();
        std::fs::write(&out, "good\n").unwrap();
        assert!(
            Target::open(&out, Begin::New).err().unwrap().to_string().contains("exists already")
        );

        // nothing came of it
        drop(Target::open(&out, Begin::Replace).unwrap());
        assert!(read(&out) == "good\n" && !partial.exists());
        // an empty result is one, and somebody's empty file is left to him
        let empty = f.path().join("empty.jsonl");
        drop(Target::open(&empty, Begin::New).unwrap());
        assert!(!empty.exists());
        Target::open(&empty, Begin::New).unwrap().complete().unwrap();
        drop(Target::open(&empty, Begin::New).unwrap());
        assert!(empty.exists());
        // interrupted
        let mut target = Target::open(&out, Begin::Replace).unwrap();
        target.write(b"new\n").unwrap();
        let message = Target::open(&out, Begin::Resume).err().unwrap().to_string();
        assert!(message.contains("another process is writing"), "{message}");
        drop(target);
        assert_eq!((read(&out), read(&partial)), ("good\n".into(), "new\n".into()));
        // gone on with
        let mut target = Target::open(&out, Begin::Resume).unwrap();
        let (_, path) = target.file().unwrap();
        std::fs::write(settings_path(path), "{}").unwrap();
        target.write(b"more\n").unwrap();
        target.complete().unwrap();
        assert!(read(&out) == "new\nmore\n" && !partial.exists());
        assert!(settings_path(&out).exists());
    }

    #[test]
    #[cfg(unix)]
    fn links_stay_links() {
        let f = tempfile::tempdir().unwrap();
        let (real, link) = (f.path().join("real"), f.path().join("link"));
        std::fs::write(&real, "good\n").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let mut target = Target::open(&link, Begin::Replace).unwrap();
        target.write(b"new\n").unwrap();
        std::fs::write(settings_path(target.file().unwrap().1), "{}").unwrap();
        target.complete().unwrap();
        assert!(link.is_symlink() && std::fs::read_to_string(&real).unwrap() == "new\n");
    }
}
