//! Checkpoints: what good folders hold, and what damaged ones get.

use beautiful_prompt::models::bloom::training::TrainModel;
use beautiful_prompt::models::bloom::{Bloom, BloomConfig};
use beautiful_prompt::models::bloom::{BloomCheckpoint, save_model};
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::tensor::DType;
use beautiful_prompt::text::Tokenizer;
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bloom").join(name)
}

/// A copy of a golden folder.
fn copy(name: &str) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.path().join(entry.file_name())).unwrap();
    }
    to
}

fn error(folder: &Path) -> String {
    match BloomCheckpoint::open(folder) {
        Ok(_) => panic!("{} opened", folder.display()),
        Err(e) => e.to_string(),
    }
}

#[test]
fn saved_models_read_back_bit_for_bit() {
    let config = BloomConfig::new(60, 48, 2, 3);
    let model = TrainModel::random(config, 5);
    let folder = tempfile::tempdir().unwrap();
    save_model(folder.path(), &model.config, &model.values, DType::F32).unwrap();
    let back = BloomCheckpoint::open(folder.path()).unwrap();
    assert_eq!(back.to_f32().unwrap(), model.values);
    save_model(folder.path(), &model.config, &model.values, DType::Bf16).unwrap();
    let back = BloomCheckpoint::open(folder.path()).unwrap();
    assert_eq!(back.config.stored_dtype.as_deref(), Some("bfloat16"));
    let rounded: Vec<f32> =
        model.values.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect();
    assert_eq!(back.to_f32().unwrap(), rounded);
    // nothing but the two files is left in the folder
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn every_kind_of_damage_is_named() {
    let missing = Path::new("no/such/folder");
    assert!(error(missing).contains("does not exist"));

    let f = copy("f32_six_heads");
    std::fs::remove_file(f.path().join("model.safetensors")).unwrap();
    assert!(error(f.path()).contains("no weights"));
    std::fs::write(f.path().join("model.safetensors"), b"").unwrap();
    assert!(error(f.path()).contains("empty"));
    let whole = std::fs::read(golden("f32_six_heads").join("model.safetensors")).unwrap();
    std::fs::write(f.path().join("model.safetensors"), &whole[..whole.len() - 100]).unwrap();
    assert!(error(f.path()).contains("not a whole safetensors file"));
    std::fs::remove_file(f.path().join("config.json")).unwrap();
    assert!(error(f.path()).contains("config.json"));

    let f = copy("f32_six_heads");
    let config = std::fs::read_to_string(f.path().join("config.json")).unwrap();
    let edited = |from: &str, to: &str| {
        assert!(config.contains(from), "{from}");
        std::fs::write(f.path().join("config.json"), config.replace(from, to)).unwrap();
        error(f.path())
    };
    assert!(edited("\"vocab_size\": 160", "\"vocab_size\": 161").contains("[160, 192]"));
    assert!(edited("\"n_layer\": 1", "\"n_layer\": 2").contains("transformer.h.1"));
    assert!(edited("\"model_type\": \"bloom\"", "\"model_type\": \"llama\"").contains("llama"));

    let f = copy("bf16_sharded");
    std::fs::remove_file(f.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(error(f.path()).contains("model-00002-of-00002.safetensors"));
    let index = f.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"a": "../../etc/passwd"}}"#).unwrap();
    assert!(error(f.path()).contains("file name"));

    let f = copy("bf16_pytorch");
    let path = f.path().join("pytorch_model.bin");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(error(f.path()).contains("not a whole PyTorch zip file"));
    std::fs::write(&path, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.").unwrap();
    assert!(error(f.path()).contains("before 1.6"));
}

#[test]
fn a_pickle_that_calls_anything_is_refused() {
    // protocol 2: os.system("true"), inside the zip layout of torch.save
    let pickle = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.";
    let f = copy("bf16_pytorch");
    let file = std::fs::File::create(f.path().join("pytorch_model.bin")).unwrap();
    let mut zip = zip::ZipWriter::new(file);
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    zip.start_file("archive/data.pkl", stored).unwrap();
    std::io::Write::write_all(&mut zip, pickle).unwrap();
    zip.finish().unwrap();
    let e = error(f.path());
    assert!(e.contains("posix.system"), "{e}");
}

/// All that can be done with a checkpoint that opens: it works, or says what is wrong.
fn use_up(checkpoint: BloomCheckpoint) {
    let _ = checkpoint.to_f32();
    let cpu = Cpu::new(1, Isa::detect());
    for dtype in [None, Some(DType::F16), Some(DType::Int8)] {
        if let Ok(model) = Bloom::load(&cpu, checkpoint.clone(), dtype) {
            assert!(model.cache(&cpu, 1).is_ok());
        }
    }
}

/// Writes `element` over one of a tensor's in a safetensors file.
fn overwrite(file: &Path, tensor: &str, at: usize, element: &[u8]) {
    let mut bytes = std::fs::read(file).unwrap();
    let view = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let data = view.tensor(tensor).unwrap().data();
    let start = data.as_ptr() as usize - bytes.as_ptr() as usize + at * element.len();
    bytes[start..start + element.len()].copy_from_slice(element);
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn a_file_that_is_something_else_is_named_with_the_remedy() {
    let pointer = b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 2130731008\n";
    let kinds: [(&[u8], &str); 4] = [
        (pointer, "Git LFS pointer in place of a file of 2130731008 bytes; `git lfs pull`"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n  <html><body>Please log in</body></html>", "web page"),
        (&[0; 4096], "unfinished download"),
    ];
    let files = [
        ("f32_six_heads", "model.safetensors"),
        ("f32_six_heads", "config.json"),
        ("bf16_sharded", "model-00001-of-00002.safetensors"),
        ("bf16_sharded", "model.safetensors.index.json"),
        ("bf16_pytorch", "pytorch_model.bin"),
        ("f16_pytorch_sharded", "pytorch_model-00002-of-00002.bin"),
    ];
    for (model, file) in files {
        let f = copy(model);
        let path = f.path().join(file);
        for (content, words) in kinds {
            std::fs::write(&path, content).unwrap();
            let e = error(f.path());
            assert!(e.contains(file) && e.contains(words), "{e}");
        }
        std::fs::write(&path, "").unwrap();
        assert!(error(f.path()).contains("is empty"));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let e = error(f.path());
        assert!(e.contains(file) && e.contains("is a folder, expected a file"), "{e}");
    }
    let f = tempfile::tempdir().unwrap();
    let path = f.path().join("tokenizer.json");
    std::fs::write(&path, pointer).unwrap();
    let e = Tokenizer::open(&path).err().unwrap().to_string();
    assert!(e.contains("tokenizer.json") && e.contains("git lfs pull"), "{e}");
}

#[test]
fn numbers_that_are_none_stop_the_loading_and_name_their_tensor() {
    let isas = Isa::available();
    let cpus: Vec<Cpu> = isas
        .flat_map(|isa| {
            [false, true].map(|resident| Cpu::new(2, isa).with_resident_weights(resident))
        })
        .collect();
    let dtypes = [None, Some(DType::F32), Some(DType::F16), Some(DType::Bf16), Some(DType::Int8)];
    let load = |cpu: &Cpu, folder: &Path, dtype| {
        let loaded = Bloom::load(cpu, BloomCheckpoint::open(folder).unwrap(), dtype);
        loaded.err().map(|e| e.to_string()).unwrap_or_default()
    };
    // [576, 192]; its element at row 5, column 7
    let (weight, at) = ("transformer.h.0.self_attention.query_key_value.weight", 5 * 192 + 7);
    for (tensor, at, place) in [
        (weight, at, "[5, 7]"),
        ("transformer.word_embeddings.weight", 159 * 192 + 191, "[159, 191]"),
        ("transformer.ln_f.bias", 3, "[3]"),
    ] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let f = copy("f32_six_heads");
            overwrite(&f.path().join("model.safetensors"), tensor, at, &value.to_le_bytes());
            for cpu in &cpus {
                for dtype in dtypes {
                    let e = load(cpu, f.path(), dtype);
                    assert!(
                        e.contains(tensor) && e.contains("holds 1 number that is NaN or infinite"),
                        "{dtype:?} {e}"
                    );
                    assert!(
                        e.ends_with(&format!("first at {place}"))
                            && e.contains("model.safetensors"),
                        "{e}"
                    );
                }
            }
            let checkpoint = BloomCheckpoint::open(f.path()).unwrap();
            assert!(checkpoint.to_f32().unwrap_err().to_string().contains(tensor));
            assert!(checkpoint.check_finite(&cpus[0]).unwrap_err().to_string().contains(tensor));
        }
    }
    // half precision cannot hold it, the others can
    let f = copy("f32_six_heads");
    overwrite(&f.path().join("model.safetensors"), weight, at, &1e6f32.to_le_bytes());
    for cpu in &cpus {
        for dtype in dtypes {
            let e = load(cpu, f.path(), dtype);
            if dtype == Some(DType::F16) {
                assert!(
                    e.contains(weight) && e.contains("too large for f16; use --dtype bf16"),
                    "{e}"
                );
            } else {
                assert_eq!(e, "", "{dtype:?}");
            }
        }
    }
    // 16-bit weights that are read where they lie
    let f = copy("bf16_sharded");
    let shard = f.path().join("model-00001-of-00002.safetensors");
    let table = "word_embeddings.weight";
    overwrite(&shard, table, 1000, &[0x80, 0x7f]);
    overwrite(&shard, table, 2000, &[0xc0, 0xff]);
    for cpu in &cpus {
        for dtype in dtypes {
            let e = load(cpu, f.path(), dtype);
            assert!(e.contains(table) && e.contains("2 numbers that are NaN"), "{e}");
        }
    }
}

#[test]
fn absurd_configurations_are_refused_before_anything_is_reserved() {
    let f = copy("f32_six_heads");
    let path = f.path().join("config.json");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let sizes = ["hidden_size", "n_layer", "n_head", "vocab_size", "seq_length"];
    let values = [
        "0",
        "-1",
        "1.5",
        "1e12",
        "1000000000",
        "16777217",
        "18446744073709551615",
        "1e400",
        "\"4\"",
        "true",
        "[]",
    ];
    for key in sizes {
        for value in values {
            let text = serde_json::to_string(&config).unwrap();
            let mut object: serde_json::Map<String, serde_json::Value> =
                serde_json::from_str(&text).unwrap();
            object.insert(key.into(), "HERE".into());
            let text = serde_json::to_string(&object).unwrap().replace("\"HERE\"", value);
            std::fs::write(&path, text).unwrap();
            let e = error(f.path());
            assert!(
                e.contains("config.json") && (e.contains(key) || e.contains("not JSON")),
                "{key} {value}: {e}"
            );
        }
    }
    for (key, value) in [
        ("eos_token_id", 160),
        ("hidden_size", 262_144),
        ("n_layer", 4096),
        ("n_head", 4096),
        ("vocab_size", 1 << 24),
    ] {
        let mut config = config.clone();
        config[key] = value.into();
        std::fs::write(&path, config.to_string()).unwrap();
        assert!(!error(f.path()).is_empty());
    }
}

/// Overwrites, cuts and repeats parts of a file.
fn mutate(bytes: &mut Vec<u8>, edits: &[(usize, u8, u8)]) {
    for &(at, kind, value) in edits {
        if bytes.is_empty() {
            return;
        }
        // the first kilobytes hold the structure: aim there more often than at the numbers
        let at = if value % 4 == 0 { at % bytes.len() } else { at % bytes.len().min(2048) };
        match kind % 4 {
            0 => bytes[at] = value,
            1 => bytes[at] ^= 1 << (value % 8),
            2 => bytes.truncate(at),
            _ => {
                let piece: Vec<u8> = bytes[at..(at + value as usize).min(bytes.len())].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn mutated_files_are_read_or_refused_but_never_panic(
        which in 0usize..5,
        edits in prop::collection::vec((any::<usize>(), any::<u8>(), any::<u8>()), 1..6),
    ) {
        let (model, file) = [
            ("f16_pytorch_sharded", "config.json"),
            ("bf16_sharded", "model.safetensors.index.json"),
            ("f32_six_heads", "model.safetensors"),
            ("bf16_pytorch", "pytorch_model.bin"),
            ("f16_pytorch_sharded", "pytorch_model-00001-of-00002.bin"),
        ][which];
        let folder = copy(model);
        let path = folder.path().join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        mutate(&mut bytes, &edits);
        std::fs::write(&path, bytes).unwrap();
        if let Ok(checkpoint) = BloomCheckpoint::open(folder.path()) {
            use_up(checkpoint);
        }
    }

    /// The pickle itself, byte by byte, past the checksum of the zip file.
    #[test]
    fn mutated_pickles_never_panic(
        edits in prop::collection::vec((any::<usize>(), any::<u8>(), any::<u8>()), 1..6),
    ) {
        let folder = copy("bf16_pytorch");
        let path = folder.path().join("pytorch_model.bin");
        let whole = golden("bf16_pytorch").join("pytorch_model.bin");
        let mut zip = zip::ZipArchive::new(std::fs::File::open(whole).unwrap()).unwrap();
        let mut out = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        let stored = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        for i in 0..zip.len() {
            let mut file = zip.by_index(i).unwrap();
            let name = file.name().unwrap().into_owned();
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
            if name.ends_with("data.pkl") {
                mutate(&mut bytes, &edits);
            }
            out.start_file(name, stored).unwrap();
            std::io::Write::write_all(&mut out, &bytes).unwrap();
        }
        out.finish().unwrap();
        if let Ok(checkpoint) = BloomCheckpoint::open(folder.path()) {
            use_up(checkpoint);
        }
    }
}
