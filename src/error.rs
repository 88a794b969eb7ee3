//! The library's error: one line that names what, where, what was expected and the remedy.

use std::path::{Path, PathBuf};

/// A result whose error is this library's, unless another one is named.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in this library.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused. (`cause` is in the message, so it is not a `source` that would
    /// be shown twice.)
    #[error("{}: cannot {action}: {cause}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a verb: "read".
        action: &'static str,
        /// What the operating system answered.
        cause: std::io::Error,
    },
    /// A file's content is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A piece of work would take more memory than there is. Sizes are written out with their
    /// units.
    #[error("needs {needed} of memory ({parts}), but {available} are left here; {remedy}")]
    OutOfMemory {
        /// Memory of all parts together.
        needed: String,
        /// What the memory is for, part by part.
        parts: String,
        /// Memory that is left.
        available: String,
        /// What the user can do about it.
        remedy: String,
    },
    /// The CUDA driver or a kernel failed, or cannot be used here.
    #[error("CUDA: {0}")]
    Cuda(String),
    /// A GPU has less memory left than was asked of it.
    #[error("CUDA: {0}")]
    DeviceOutOfMemory(String),
    /// What this program, build or device cannot do, and what can be done instead.
    #[error("{0}")]
    Unsupported(String),
    /// Numbers of a tensor that cannot be computed with; who knows its name says it, by
    /// [`Error::of_tensor`].
    #[error("a tensor {0}")]
    Weights(String),
    /// A request or a value that cannot be served.
    #[error("{0}")]
    Invalid(String),
    /// Something went wrong that is not the caller's fault.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// An [`Error::File`] about `path`.
    pub fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Error {
        Error::File { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// Names the tensor that an [`Error::Weights`] is about, and where it is from.
    pub fn of_tensor(self, path: &Path, name: &str) -> Error {
        match self {
            Error::Weights(what) => Error::file(path, format!("tensor {name} {what}")),
            other => other,
        }
    }

    /// An [`Error::Invalid`] with this message.
    pub fn invalid(message: impl Into<String>) -> Error {
        Error::Invalid(message.into())
    }

    /// For `map_err` on input and output.
    pub fn io(
        path: impl AsRef<Path>,
        action: &'static str,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |cause| Error::Io { path, action, cause }
    }
}
