//! Files that appear whole or not at all.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Writes a file beside its place, flushes it to disk and renames it there. A pipe or a device
/// cannot be replaced: it is written to.
pub fn write_atomic(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        let file = File::options().write(true).open(path).map_err(Error::io(path, "write"))?;
        let mut out = BufWriter::new(file);
        return write(&mut out).and_then(|()| out.flush()).map_err(Error::io(path, "write"));
    }
    write_atomic_at(path, |temporary| {
        let file = File::options().write(true).open(temporary)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write(&mut out)?;
        out.flush()
    })
}

/// [`write_atomic`] for writers that want a path: `write` fills the file at the path it is given,
/// or puts another one there.
pub fn write_atomic_at(
    path: &Path,
    write: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<()> {
    // a link stays a link: the file that it names is replaced
    let target = if path.is_symlink() { path.canonicalize().ok() } else { None };
    let path = target.as_deref().unwrap_or(path);
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        // temporary files are private by default; this one gets what the umask leaves, as any new
        // file
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let file = builder.tempfile_in(folder).map_err(Error::io(path, "create"))?;
    let permissions = file.as_file().metadata().map_err(Error::io(path, "create"))?.permissions();
    let temporary = file.into_temp_path();
    // a writer may have renamed a file of its own to this place, so what is flushed is what lies
    // there now
    let finish = || {
        let file = File::options().read(true).write(true).open(&temporary)?;
        file.set_permissions(permissions)?;
        file.sync_all()
    };
    write(&temporary).and_then(|()| finish()).map_err(Error::io(path, "write"))?;
    temporary.persist(path).map_err(|e| Error::io(path, "write")(e.error))?;
    Ok(())
}

/// Fills a folder under a temporary name and renames it to `path`, which must not exist yet.
pub fn write_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if path.exists() {
        return Err(Error::file(path, "exists already; choose another name or remove it"));
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".partial-{}", std::process::id()));
    let partial: PathBuf = path.with_file_name(name);
    let result = std::fs::create_dir_all(&partial)
        .map_err(Error::io(&partial, "create"))
        .and_then(|()| fill(&partial))
        .and_then(|()| std::fs::rename(&partial, path).map_err(Error::io(path, "create")));
    if result.is_err() {
        let _ = std::fs::remove_dir_all(&partial);
    }
    result
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileTypeExt, symlink};

    #[test]
    fn links_stay_links_and_devices_stay_devices() {
        let f = tempfile::tempdir().unwrap();
        let (real, link) = (f.path().join("real"), f.path().join("link"));
        std::fs::write(&real, "before").unwrap();
        symlink(&real, &link).unwrap();
        write_atomic(&link, |w| w.write_all(b"after")).unwrap();
        assert!(link.is_symlink() && std::fs::read(&real).unwrap() == b"after");
        let device = f.path().join("null");
        symlink("/dev/null", &device).unwrap();
        write_atomic(&device, |w| w.write_all(b"text")).unwrap();
        assert!(std::fs::metadata(&device).unwrap().file_type().is_char_device());
        symlink("/dev/full", f.path().join("full")).unwrap();
        assert!(write_atomic(&f.path().join("full"), |w| w.write_all(b"text")).is_err());
    }
}
