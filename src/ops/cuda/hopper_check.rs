//! Whether the kernels with Hopper's own instructions (TMA, wgmma, clusters) do on this GPU what
//! the others do: tried on small numbers before a model uses them.

use super::gemm_select::{LinearKernel, TOKENS as SKINNY_TOKENS, tile_tokens};
use super::lm_head::LmHead;
use super::{Cuda, DeviceBatch};
use crate::device::{Launcher, Memory};
use crate::error::{Error, Result};
use crate::ops::{
    BLOCK, Backend, Batch, DecodeBackend, Epilogue, Heads, LayerNorm, Linear, NormInput, Tensor,
};
use crate::random::PhiloxStream;
use crate::tensor::{DType, HostTensor};

const OUTPUTS: usize = 304;
const INPUTS: usize = 192;
const TOKENS: [usize; 2] = [60, 200];

/// Numbers in (-1, 1).
fn noise(words: &mut PhiloxStream, n: usize) -> Vec<f32> {
    (0..n).map(|_| 2.0 * words.uniform() - 1.0).collect()
}

/// Whether two results differ by more than their rounding to 16 bits explains.
fn differ(a: &[f32], b: &[f32]) -> bool {
    let max = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).any(|(a, b)| a.is_nan() || (a - b).abs() > 0.02 * max)
}

impl<L: Launcher> Cuda<L> {
    /// Tries the kernels that Hopper alone has, if they are to be used, and compares them with
    /// those that every GPU has; leaves them alone from then on and names what is wrong if results
    /// differ.
    ///
    /// # Errors
    /// When a kernel fails: the device can do nothing more in this process then.
    pub fn try_hopper(&self, heads: &Heads) -> Result<Option<&'static str>> {
        if !self.hopper() {
            return Ok(None);
        }
        let tried = self.wrong_products().and_then(|wrong| match wrong {
            None => self.wrong_attention(heads),
            some => Ok(some),
        });
        let wrong = tried.map_err(|e| match e {
            Error::Cuda(what) => Error::Cuda(format!(
                "{what}, in the kernels with Hopper's own instructions; BPROMPT_HOPPER=0 goes \
                without them"
            )),
            other => other,
        })?;
        self.without_hopper.set(wrong.is_some());
        Ok(wrong)
    }

    fn wrong_products(&self) -> Result<Option<&'static str>> {
        let mut words = PhiloxStream::new(1, 3);
        let weight =
            self.weight(HostTensor::of_rows(&noise(&mut words, OUTPUTS * INPUTS), INPUTS), None)?;
        let linear = Linear {
            weight,
            bias: self.vector(&HostTensor::of_rows(&noise(&mut words, OUTPUTS), OUTPUTS))?,
        };
        let (mut ours, mut theirs) = (Tensor::default(), Tensor::default());
        for tokens in TOKENS {
            let x = self.upload(&noise(&mut words, tokens * INPUTS), INPUTS, self.half)?;
            let tile = tile_tokens(tokens);
            for by in [
                LinearKernel::Cluster { tokens: tile, blocks: 1 },
                LinearKernel::Cluster { tokens: tile, blocks: 2 },
                LinearKernel::Hopper,
            ] {
                for gelu in [false, true] {
                    let epilogue = || if gelu { Epilogue::BiasGelu } else { Epilogue::Bias };
                    self.launch_linear_by(
                        LinearKernel::Skinny,
                        &mut theirs,
                        &x,
                        &linear,
                        epilogue(),
                    )?;
                    self.launch_linear_by(by, &mut ours, &x, &linear, epilogue())?;
                    if differ(&self.download(&ours)?, &self.download(&theirs)?) {
                        return Ok(Some("linear layers"));
                    }
                }
            }
            let out = Memory::new(&self.launcher, tokens * OUTPUTS * 4)?;
            let logits = |by| -> Result<Vec<f32>> {
                let mut read = vec![0.0; tokens * OUTPUTS];
                let max_rows = if by == LinearKernel::Skinny { SKINNY_TOKENS } else { tokens };
                for first in (0..tokens).step_by(max_rows) {
                    let rows = first..tokens.min(first + max_rows);
                    let at = out.at + (rows.start * OUTPUTS * 4) as u64;
                    let lm_head = LmHead { x: &x, rows, weight: &linear.weight };
                    self.launch_lm_head_by(by, "lm_head_logits", lm_head, |a| {
                        a.with(at).with(0u64)
                    })?;
                }
                self.launcher.read(out.at, bytemuck::cast_slice_mut(&mut read))?;
                Ok(read)
            };
            if differ(&logits(LinearKernel::Hopper)?, &logits(LinearKernel::Skinny)?) {
                return Ok(Some("the LM head"));
            }
        }
        Ok(None)
    }

    /// A prompt, and the next part of it.
    fn wrong_attention(&self, heads: &Heads) -> Result<Option<&'static str>> {
        let heads = Heads { count: 2, size: heads.size, slopes: heads.slopes[..1].repeat(2) };
        let (width, lengths) = (2 * heads.size, [70usize, 150]);
        let blocks: Vec<u32> =
            (0..(lengths[0] + lengths[1]).div_ceil(BLOCK) as u32).rev().collect();
        let mut words = PhiloxStream::new(1, 4);
        let weight =
            self.weight(HostTensor::of_rows(&noise(&mut words, 3 * width * width), width), None)?;
        let bias = self.vector(&HostTensor::of_rows(&noise(&mut words, 3 * width), width))?;
        let qkv = Linear { weight, bias };
        // scores of about one
        let scale = 0.5 / (width as f32).sqrt();
        let mut parameters = || {
            let small: Vec<f32> = noise(&mut words, width).iter().map(|v| v * scale).collect();
            self.vector(&HostTensor::of_rows(&small, width))
        };
        let norm = LayerNorm { weight: parameters()?, bias: parameters()?, eps: 1e-5 };
        let mut cache = self.cache(self.half, 1, &heads, blocks.len())?;
        let mut start = 0;
        for length in lengths {
            let mut batch = Batch::default();
            batch.push(&vec![0; length], start, &blocks);
            start += length;
            let x = self.upload(&noise(&mut words, length * width), width, DType::F32)?;
            let (mut normed, mut queries) = Default::default();
            let mut results = Vec::new();
            for without in [true, false] {
                self.without_hopper.set(without);
                let (mut on_device, mut out) = (DeviceBatch::default(), Tensor::default());
                self.upload_batch(&batch, &mut on_device);
                if without {
                    let input = NormInput { x: &x, norm: &norm, normed: &mut normed };
                    let cache = (&mut cache, 0);
                    self.layer_norm_qkv_to_cache(&mut queries, input, &qkv, &on_device, cache);
                }
                self.paged_attention(&mut out, &queries, &on_device, (&cache, 0));
                results.push(self.download(&out)?);
            }
            if differ(&results[1], &results[0]) {
                return Ok(Some("the attention of prompts"));
            }
        }
        Ok(None)
    }
}
