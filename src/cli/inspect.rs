//! `bprompt inspect`: what a model folder holds, or what is wrong with it.

use super::DeviceArgs;
use super::hub::model_folder;
use super::model::ModelParts;
use super::print::{self, print_line};
use crate::models::bloom::BloomCheckpoint;
use crate::rewrite::Prompter;
use crate::tensor::DType;
use crate::text::Tokenizer;
use crate::text::template::Template;
use anyhow::Context;
use clap::Args;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Args)]
pub struct InspectArgs {
    /// Model folder, or org/name[@revision] of one in Hugging Face's cache.
    #[arg(value_name = "DIR|NAME")]
    folder: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: DeviceArgs,
}

impl InspectArgs {
    pub fn run(self) -> anyhow::Result<()> {
        // all that loading checks, with the same messages
        let folder = model_folder(&self.folder)?;
        let ModelParts { checkpoint, tokenizer, template, .. } = ModelParts::open(Some(&folder))?;
        checkpoint.check_finite(&self.compute.cpu()?)?;
        let template = template.map_or_else(|| Template::named("v1"), Ok)?;
        let tokenizer = Arc::new(tokenizer);
        Prompter { tokenizer: tokenizer.clone(), template }.encode("a cat")?;
        let mut dtypes: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        let mut element = DType::F32;
        for p in checkpoint.config.parameters() {
            let t = checkpoint.weights.parameter(&p)?;
            element = t.dtype;
            let sum = dtypes.entry(t.dtype.name()).or_default();
            *sum = (sum.0 + p.len(), sum.1 + t.bytes.len());
        }
        let special = special_tokens(&folder)?;
        let found =
            Found { checkpoint: &checkpoint, tokenizer: &tokenizer, dtypes, element, special };
        match self.json {
            true => Ok(print::json(&found.json())?),
            false => found.print(),
        }
    }
}

/// What a folder holds.
struct Found<'c> {
    checkpoint: &'c BloomCheckpoint,
    tokenizer: &'c Tokenizer,
    /// Parameters and bytes by the type that they are stored in.
    dtypes: BTreeMap<&'c str, (usize, usize)>,
    /// The type of the last parameter.
    element: DType,
    special: BTreeMap<String, String>,
}

impl Found<'_> {
    fn weight_bytes(&self) -> usize {
        self.dtypes.values().map(|d| d.1).sum()
    }

    fn kv_bytes_per_token(&self) -> usize {
        self.checkpoint.config.kv_bytes_per_token(self.element.size())
    }

    fn files(&self) -> Vec<String> {
        let name = |f: &PathBuf| Some(f.file_name()?.to_string_lossy().into_owned());
        self.checkpoint.weights.files.iter().filter_map(name).collect()
    }

    fn json(&self) -> serde_json::Value {
        let c = &self.checkpoint.config;
        let counts: BTreeMap<_, _> =
            self.dtypes.iter().map(|(k, v)| (k.to_string(), v.0)).collect();
        json!({
            "architecture": "bloom",
            "layers": c.layers,
            "hidden_size": c.hidden_size,
            "heads": c.heads,
            "head_size": c.head_size(),
            "vocab_size": c.vocab_size,
            "context": c.context,
            "tied_head": c.tied,
            "residual_post_layer_norm": c.residual_post_layer_norm,
            "layer_norm_epsilon": c.layer_norm_epsilon,
            "parameters": c.parameter_count(),
            "dtypes": counts,
            "weight_bytes": self.weight_bytes(),
            "kv_bytes_per_token": self.kv_bytes_per_token(),
            "files": self.files(),
            "unused_tensors": self.checkpoint.unused(),
            "tokenizer_vocab_size": self.tokenizer.vocab_size(),
            "special_tokens": self.special,
        })
    }

    fn print(&self) -> anyhow::Result<()> {
        let c = &self.checkpoint.config;
        print_line!(
            "architecture  BLOOM, {} layers, hidden {}, {} heads of {}",
            c.layers,
            c.hidden_size,
            c.heads,
            c.head_size()
        )?;
        print_line!(
            "vocabulary    {}, context {}, head {}",
            c.vocab_size,
            c.context,
            if c.tied { "tied" } else { "its own" }
        )?;
        if c.residual_post_layer_norm {
            print_line!("residual      after the layer norms")?;
        }
        print_line!("parameters    {}", c.parameter_count())?;
        for (name, (count, bytes)) in &self.dtypes {
            print_line!("  {name:<10}  {count} ({:.1} MB)", *bytes as f64 / 1e6)?;
        }
        print_line!(
            "memory        {:.1} MB of weights, {} bytes of KV cache a token",
            self.weight_bytes() as f64 / 1e6,
            self.kv_bytes_per_token()
        )?;
        print_line!("files         {}", self.files().join(", "))?;
        let unused = self.checkpoint.unused();
        if !unused.is_empty() {
            print_line!(
                "unused        {} tensors: {}",
                unused.len(),
                unused.iter().take(4).copied().collect::<Vec<_>>().join(", ")
            )?;
        }
        print_line!("tokenizer     {} tokens", self.tokenizer.vocab_size())?;
        for (name, token) in &self.special {
            let id = self.tokenizer.token_id(token);
            print_line!(
                "  {name:<10}  {token} = {}",
                id.map_or("not in the vocabulary".into(), |i| i.to_string())
            )?;
        }
        Ok(())
    }
}

/// The special tokens that `tokenizer_config.json` names.
fn special_tokens(folder: &std::path::Path) -> anyhow::Result<BTreeMap<String, String>> {
    let path = folder.join("tokenizer_config.json");
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let text = std::fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
    let value: serde_json::Value =
        serde_json::from_slice(&text).with_context(|| format!("{}: not JSON", path.display()))?;
    let mut found = BTreeMap::new();
    for name in ["bos_token", "eos_token", "pad_token", "unk_token"] {
        // either the text or an object that holds it
        let token = value.get(name).and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()));
        if let Some(token) = token {
            found.insert(name.to_owned(), token.to_owned());
        }
    }
    Ok(found)
}
