//! Models by their names: a folder, or what the cache of Hugging Face's tools holds. Nothing is
//! downloaded.

use anyhow::bail;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The folder of a model that is given as a folder, or as `org/name` or `org/name@revision` in the
/// cache.
pub fn model_folder(model: &Path) -> anyhow::Result<PathBuf> {
    if model.exists() {
        return Ok(model.to_path_buf());
    }
    match model.to_str().and_then(Name::parse) {
        Some(name) => name.find(cache().as_deref()),
        None => Ok(model.to_path_buf()),
    }
}

/// Whether a model is given by its name, which no folder has.
pub fn is_name(model: &Path) -> bool {
    !model.exists() && model.to_str().and_then(Name::parse).is_some()
}

struct Name<'a> {
    /// `org/name`.
    id: &'a str,
    revision: Option<&'a str>,
}

impl<'a> Name<'a> {
    fn parse(text: &'a str) -> Option<Name<'a>> {
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        };
        let (org, name) = id.split_once('/')?;
        let word = |w: &str| {
            !w.is_empty()
                && !w.starts_with('.')
                && w.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        // a revision may be a branch with slashes, but no way out of the folder
        let reference = |r: &str| r.split('/').all(word);
        (word(org) && word(name) && revision.is_none_or(reference)).then_some(Name { id, revision })
    }

    fn find(&self, cache: Option<&Path>) -> anyhow::Result<PathBuf> {
        let Name { id, revision } = self;
        let wanted = revision.unwrap_or("main");
        let download = match revision {
            Some(revision) => format!("hf download {id} --revision {revision}"),
            None => format!("hf download {id}"),
        };
        let Some(cache) = cache else {
            bail!(
                "{id}: there is no such folder; `{download}` gets the model, HF_HOME says where it \
                is then"
            );
        };
        let model = cache.join(format!("models--{}", id.replace('/', "--")));
        if !model.is_dir() {
            bail!(
                "{id}: there is no such folder, nor is the model in {}; `{download}` gets it",
                cache.display()
            );
        }
        let reference = std::fs::read_to_string(model.join("refs").join(wanted)).ok();
        let commit = reference.as_deref().map_or(wanted, str::trim);
        let folder = model.join("snapshots").join(commit);
        if commit.is_empty() || !folder.is_dir() {
            let names = |folder: &str| {
                let entries = std::fs::read_dir(model.join(folder)).into_iter().flatten().flatten();
                entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
            };
            let mut there = [names("refs"), names("snapshots")].concat();
            there.sort();
            bail!(
                "{id}: {} does not hold revision {wanted} (it has: {}); `{download}` gets it",
                model.display(),
                if there.is_empty() { "none".into() } else { there.join(", ") }
            );
        }
        Ok(folder)
    }
}

/// Where Hugging Face's tools keep what they download.
fn cache() -> Option<PathBuf> {
    cache_by(|name| std::env::var_os(name))
}

fn cache_by(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let hub = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE"));
    let home = || set("HF_HOME").map(|h| h.join("hub"));
    let user = || set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|h| h.join(".cache")));
    hub.or_else(home).or_else(|| user().map(|c| c.join("huggingface/hub")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_models_are_names() {
        for (text, id, revision) in [
            ("org/name", "org/name", None),
            ("big.org/bloom-1b1_v2", "big.org/bloom-1b1_v2", None),
            ("org/name@v1.0", "org/name", Some("v1.0")),
            ("org/name@refs/pr/3", "org/name", Some("refs/pr/3")),
        ] {
            let name = Name::parse(text).unwrap();
            assert_eq!((name.id, name.revision), (id, revision));
        }
        for text in [
            "name",
            "./name",
            "/name",
            "a/b/c",
            "../name",
            "org/",
            "org/na me",
            "org/name@",
            "org/name@../../x",
        ] {
            assert!(Name::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn the_cache_is_where_the_variables_say() {
        let with = |set: &[(&str, &str)]| {
            cache_by(|name| set.iter().find(|s| s.0 == name).map(|s| s.1.into()))
                .map(|p| p.display().to_string())
        };
        assert_eq!(with(&[("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b")]).as_deref(), Some("/a"));
        assert_eq!(
            with(&[("HF_HUB_CACHE", ""), ("HF_HOME", "/b"), ("HOME", "/h")]).as_deref(),
            Some("/b/hub")
        );
        assert_eq!(with(&[("HOME", "/h")]).as_deref(), Some("/h/.cache/huggingface/hub"));
        assert_eq!(
            with(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]).as_deref(),
            Some("/x/huggingface/hub")
        );
        assert_eq!(with(&[]), None);
    }

    #[test]
    fn a_snapshot_is_found_by_its_branch_and_by_its_commit() {
        let cache = tempfile::tempdir().unwrap();
        let model = cache.path().join("models--org--name");
        let find = |text: &str| {
            Name::parse(text).unwrap().find(Some(cache.path())).map_err(|e| e.to_string())
        };
        assert!(find("org/name").unwrap_err().contains("`hf download org/name`"));
        for commit in ["0a1b", "2c3d"] {
            std::fs::create_dir_all(model.join("snapshots").join(commit)).unwrap();
        }
        std::fs::create_dir_all(model.join("refs/pr")).unwrap();
        let e = find("org/name").unwrap_err();
        assert!(e.contains("revision main") && e.contains("0a1b, 2c3d"), "{e}");
        std::fs::write(model.join("refs/main"), "2c3d\n").unwrap();
        std::fs::write(model.join("refs/pr/1"), "0a1b").unwrap();
        assert_eq!(find("org/name").unwrap(), model.join("snapshots/2c3d"));
        assert_eq!(find("org/name@0a1b").unwrap(), model.join("snapshots/0a1b"));
        assert_eq!(find("org/name@pr/1").unwrap(), model.join("snapshots/0a1b"));
        let e = find("org/name@v9").unwrap_err();
        assert!(e.contains("`hf download org/name --revision v9`"), "{e}");
        std::fs::write(model.join("refs/main"), "ffff").unwrap();
        assert!(find("org/name").is_err());
        assert!(
            Name::parse("org/name")
                .unwrap()
                .find(None)
                .unwrap_err()
                .to_string()
                .contains("HF_HOME")
        );
    }
}
