//! `config.json` of a BLOOM checkpoint.

use crate::checkpoint::Parameter;
use crate::error::{Error, Result};
use crate::files;
use crate::ops::Heads;
use serde_json::{Map, Value, json};
use std::path::Path;

/// What is behind the layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Architecture {
    /// An LM head: `BloomForCausalLM`.
    #[default]
    CausalLm,
    /// A score of the whole text, read off its last token: `BloomForSequenceClassification` with
    /// one label, which is how reward models are stored.
    SequenceClassification,
}

/// Sizes and switches that change what the model computes.
#[derive(Clone, Debug, PartialEq)]
pub struct BloomConfig {
    /// What is behind the layers.
    pub architecture: Architecture,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Attention heads of each layer.
    pub heads: usize,
    /// Added to the variance in every layer norm.
    pub layer_norm_epsilon: f32,
    /// The residual branches off after the layer norm instead of before it.
    pub residual_post_layer_norm: bool,
    /// The LM head shares the embedding's weights.
    pub tied: bool,
    /// Maximum positions of a sequence. ALiBi itself has no limit.
    pub context: usize,
    /// Token that begins a sequence.
    pub bos_token_id: u32,
    /// Token that ends a sequence.
    pub eos_token_id: u32,
    /// Token that fills a sequence up.
    pub pad_token_id: u32,
    /// `torch_dtype` / `dtype` as written, for information.
    pub stored_dtype: Option<String>,
}

/// Largest `vocab_size` accepted. This bound and the ones below are far above every model, and
/// small enough that no count of parameters or bytes overflows and the list of all tensors stays
/// short.
pub const MAX_VOCABULARY: usize = 1 << 24;
/// Largest `hidden_size` accepted.
pub const MAX_HIDDEN: usize = 1 << 18;
/// Largest `n_layer` accepted.
pub const MAX_LAYERS: usize = 1 << 12;
/// Largest `n_head` accepted.
pub const MAX_HEADS: usize = 1 << 12;
/// Largest `seq_length` accepted.
pub const MAX_CONTEXT: usize = 1 << 24;
const MAX_HEAD_SIZE: usize = 512;

impl BloomConfig {
    /// A model of the given sizes with BLOOM's usual switches.
    pub fn new(vocab_size: usize, hidden_size: usize, layers: usize, heads: usize) -> BloomConfig {
        BloomConfig {
            architecture: Architecture::CausalLm,
            vocab_size,
            hidden_size,
            layers,
            heads,
            layer_norm_epsilon: 1e-5,
            residual_post_layer_norm: false,
            tied: true,
            context: 2048,
            bos_token_id: 1,
            eos_token_id: 2,
            pad_token_id: 3,
            stored_dtype: None,
        }
    }

    /// The shapes of the published checkpoints, by name: `bloom-560m` to `bloom-7b1`.
    pub fn published(name: &str) -> Option<BloomConfig> {
        let (hidden, layers, heads) = match name {
            "bloom-560m" => (1024, 24, 16),
            "bloom-1b1" => (1536, 24, 16),
            "bloom-1b7" => (2048, 24, 16),
            "bloom-3b" => (2560, 30, 32),
            "bloom-7b1" => (4096, 30, 32),
            _ => return None,
        };
        Some(BloomConfig::new(250_880, hidden, layers, heads))
    }

    /// Width of one attention head.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.heads
    }

    /// The heads of every layer.
    pub fn attention_heads(&self) -> Heads {
        Heads { count: self.heads, size: self.head_size(), slopes: alibi_slopes(self.heads) }
    }

    /// Reads and checks `config.json`.
    pub fn read(path: &Path) -> Result<BloomConfig> {
        let text = files::read(
            path,
            "does not exist; a model folder holds config.json beside its weights",
        )?;
        BloomConfig::parse(&text).map_err(|e| Error::file(path, e))
    }

    /// Parses the text of a `config.json`; the error says what is wrong with it.
    pub fn parse(text: &[u8]) -> std::result::Result<BloomConfig, String> {
        let value: Value = serde_json::from_slice(text).map_err(|e| format!("not JSON: {e}"))?;
        let object = value.as_object().ok_or("expected a JSON object")?;
        match object.get("model_type") {
            Some(Value::String(t)) if t == "bloom" => {}
            Some(other) => return Err(format!("model_type is {other}, expected \"bloom\"")),
            None => {
                let bloom =
                    object.get("architectures").is_some_and(|a| a.to_string().contains("Bloom"));
                if !bloom {
                    return Err("no model_type, expected \"bloom\"".into());
                }
            }
        }
        let hidden_size = size(object, &["hidden_size", "n_embed"], None, MAX_HIDDEN)?;
        let config = BloomConfig {
            architecture: architecture(object)?,
            vocab_size: size(object, &["vocab_size"], None, MAX_VOCABULARY)?,
            hidden_size,
            layers: size(object, &["n_layer", "num_hidden_layers"], None, MAX_LAYERS)?,
            heads: size(object, &["n_head", "num_attention_heads"], None, MAX_HEADS)?,
            layer_norm_epsilon: match object.get("layer_norm_epsilon") {
                None => 1e-5,
                Some(v) => match v.as_f64() {
                    Some(e) if e > 0.0 && e < 1.0 => e as f32,
                    _ => {
                        return Err(format!(
                            "layer_norm_epsilon is {v}, expected a number in (0, 1)"
                        ));
                    }
                },
            },
            residual_post_layer_norm: flag(
                object,
                "apply_residual_connection_post_layernorm",
                false,
            )?,
            tied: flag(object, "tie_word_embeddings", true)?,
            context: size(
                object,
                &["seq_length", "n_positions", "max_position_embeddings"],
                Some(2048),
                MAX_CONTEXT,
            )?,
            bos_token_id: id(object, "bos_token_id", 1)?,
            eos_token_id: id(object, "eos_token_id", 2)?,
            pad_token_id: id(object, "pad_token_id", 3)?,
            stored_dtype: ["dtype", "torch_dtype"]
                .iter()
                .find_map(|k| object.get(*k)?.as_str().map(str::to_owned)),
        };
        if !config.hidden_size.is_multiple_of(config.heads) {
            return Err(format!(
                "hidden_size {} is not divisible by n_head {}",
                config.hidden_size, config.heads
            ));
        }
        if config.head_size() > MAX_HEAD_SIZE {
            let size = config.head_size();
            return Err(format!(
                "hidden_size over n_head gives heads of {size}, expected at most {MAX_HEAD_SIZE}"
            ));
        }
        if config.eos_token_id as usize >= config.vocab_size {
            return Err(format!(
                "eos_token_id {} is outside the vocabulary of {}",
                config.eos_token_id, config.vocab_size
            ));
        }
        Ok(config)
    }

    /// Fails if the model has not the architecture that a use of it takes.
    ///
    /// # Errors
    /// With `of`, what was given, and what else it would be good for.
    pub fn expect(&self, architecture: Architecture, of: &Path) -> Result<()> {
        let text = match (self.architecture, architecture) {
            (found, expected) if found == expected => return Ok(()),
            (Architecture::SequenceClassification, _) => {
                "is a reward model, which scores texts and cannot write any; expected a language \
                model (BloomForCausalLM)"
            }
            _ => {
                "is a language model; expected a reward model (BloomForSequenceClassification), as \
                `bprompt train reward` makes"
            }
        };
        Err(Error::file(of, text))
    }

    /// `config.json` as Hugging Face writes it.
    pub fn to_json(&self, dtype: &str) -> Value {
        let mut json = self.json_of_sizes(dtype);
        if self.architecture == Architecture::SequenceClassification {
            json["architectures"] = json!(["BloomForSequenceClassification"]);
            json["id2label"] = json!({ "0": "LABEL_0" });
            json["label2id"] = json!({ "LABEL_0": 0 });
            json["problem_type"] = json!("regression");
        }
        json
    }

    fn json_of_sizes(&self, dtype: &str) -> Value {
        json!({
            "architectures": ["BloomForCausalLM"],
            "model_type": "bloom",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "n_layer": self.layers,
            "n_head": self.heads,
            "layer_norm_epsilon": self.layer_norm_epsilon as f64 as f32,
            "apply_residual_connection_post_layernorm": self.residual_post_layer_norm,
            "tie_word_embeddings": self.tied,
            "seq_length": self.context,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "pretraining_tp": 1,
            "slow_but_exact": false,
            "use_cache": true,
            "torch_dtype": dtype,
        })
    }

    /// Elements of all parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().map(Parameter::len).sum()
    }

    /// Bytes of keys and values that one token adds to the cache, with elements of `element` bytes.
    pub fn kv_bytes_per_token(&self, element: usize) -> usize {
        2 * self.layers * self.hidden_size * element
    }
}

fn size(
    object: &Map<String, Value>,
    keys: &[&str],
    default: Option<usize>,
    max: usize,
) -> std::result::Result<usize, String> {
    for key in keys {
        match object.get(*key) {
            None | Some(Value::Null) => {}
            Some(v) => match v.as_u64() {
                Some(n) if (1..=max as u64).contains(&n) => return Ok(n as usize),
                _ => return Err(format!("{key} is {v}, expected a whole number from 1 to {max}")),
            },
        }
    }
    default.ok_or_else(|| format!("{} is missing", keys.join(" or ")))
}

/// Reads which architecture it is; a score of several labels is none.
fn architecture(object: &Map<String, Value>) -> std::result::Result<Architecture, String> {
    let named =
        |name: &str| object.get("architectures").is_some_and(|a| a.to_string().contains(name));
    if !named("ForSequenceClassification") {
        return match named("ForTokenClassification") || named("ForQuestionAnswering") {
            true => Err("architectures has neither BloomForCausalLM nor \
                        BloomForSequenceClassification"
                .into()),
            false => Ok(Architecture::CausalLm),
        };
    }
    let of_ids = object.get("id2label").and_then(Value::as_object).map(Map::len);
    // transformers has two labels where nothing is said
    let labels = object.get("num_labels").and_then(Value::as_u64).map(|n| n as usize);
    match of_ids.or(labels).unwrap_or(2) {
        1 => Ok(Architecture::SequenceClassification),
        n => Err(format!("has {n} labels (id2label); expected one, the score of a reward model")),
    }
}

fn flag(
    object: &Map<String, Value>,
    key: &str,
    default: bool,
) -> std::result::Result<bool, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(b)) => Ok(*b),
        Some(v) => Err(format!("{key} is {v}, expected true or false")),
    }
}

fn id(object: &Map<String, Value>, key: &str, default: u32) -> std::result::Result<u32, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(v) => match v.as_u64() {
            Some(n) if n <= MAX_VOCABULARY as u64 => Ok(n as u32),
            _ => Err(format!("{key} is {v}, expected a token id")),
        },
    }
}

/// ALiBi slopes, one a head (arXiv 2108.12409; for head counts that are no power of two BLOOM takes
/// the slopes of the power below, then every other slope of the power above).
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let below = 1usize << heads.ilog2();
    let base = 2f64.powf(-8.0 / below as f64);
    let base_above = 2f64.powf(-8.0 / (2 * below) as f64);
    let odd = (0..heads - below).map(|i| base_above.powi(2 * i as i32 + 1));
    (1..=below).map(|i| base.powi(i as i32)).chain(odd).map(|s| s as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_of_six_heads_interpolate() {
        let slopes = alibi_slopes(6);
        let expected = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125];
        assert_eq!(slopes, expected);
        assert_eq!(alibi_slopes(16)[0], 2f32.powf(-0.5));
    }

    #[test]
    fn published_sizes() {
        let c = BloomConfig::published("bloom-1b1").unwrap();
        assert_eq!(c.parameter_count(), 1_065_314_304);
        assert_eq!(c.kv_bytes_per_token(2), 147_456);
        assert_eq!(c.head_size(), 96);
    }

    #[test]
    fn both_spellings_and_written_configs_read_back() {
        let old = br#"{"model_type":"bloom","n_embed":64,"num_hidden_layers":2,
            "num_attention_heads":3,"vocab_size":9}"#;
        let e = BloomConfig::parse(old).unwrap_err();
        assert!(e.contains("not divisible"), "{e}");
        let mut c = BloomConfig::new(100, 96, 2, 3);
        c.residual_post_layer_norm = true;
        let text = serde_json::to_vec(&c.to_json("float32")).unwrap();
        let mut back = BloomConfig::parse(&text).unwrap();
        assert_eq!(back.stored_dtype.take().as_deref(), Some("float32"));
        assert_eq!(back, c);
    }

    #[test]
    fn wrong_values_are_named() {
        for (text, word) in [
            (&b"{"[..], "JSON"),
            (br#"{"model_type":"gpt2"}"#, "gpt2"),
            (br#"{"model_type":"bloom","hidden_size":0}"#, "hidden_size"),
            (br#"{"model_type":"bloom","hidden_size":64}"#, "vocab_size"),
            (br#"{"model_type":"bloom","hidden_size":64,"vocab_size":1e30}"#, "vocab_size"),
            (
                br#"{"model_type":"bloom","hidden_size":64,"vocab_size":9,"n_layer":1000000000}"#,
                "n_layer",
            ),
            (
                br#"{"model_type":"bloom","hidden_size":64,"vocab_size":9,"n_layer":1,"n_head":0}"#,
                "n_head",
            ),
            (
                br#"{"model_type":"bloom","hidden_size":64,"vocab_size":2,"n_layer":1,"n_head":1}"#,
                "eos_token_id",
            ),
        ] {
            let e = BloomConfig::parse(text).unwrap_err();
            assert!(e.contains(word), "{e}");
        }
    }
}
