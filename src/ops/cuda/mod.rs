//! The CUDA backend: decides which kernel runs with what; written against [`Launcher`].
//!
//! Activations: the residual stream is f32, what GEMMs read is 16 bits wide (bf16, or f16 for
//! models stored so). A layer of a decoding step is five launches: norm + queries, keys, values
//! into the cache; attention; dense + residual; norm + up + GELU; down + residual. Beyond 16 tokens
//! the norms are the ends of the GEMMs before them on Hopper, and launches of their own
//! elsewhere. What training adds is in `train`.

mod abi;
mod attention;
mod compare;
mod decoder;
mod gemm_select;
mod graphs;
mod hopper_check;
mod linear;
mod lm_head;
mod peak;
mod persistent;
mod sampling;
mod train;
mod weights;

pub use attention::Cache;
pub use graphs::Comparison;
pub use hopper_check::CHAIN_RUNS;
pub use persistent::Persistent;
pub use train::{Flat, TrainSequences};
pub use weights::DeviceWeight;

pub(crate) use linear::LinearInput;

use super::sampling::{SampledToken, SamplingRow};
use super::{
    BLOCK, Backend, Batch, DecodeBackend, Decoder, DecoderActivations, Epilogue, Heads, LayerNorm,
    Linear, NormInput, Tensor, Weight as _,
};
use crate::device::{Args, LaunchConfig, Launcher, Memory};
use crate::error::{Error, Result};
use crate::tensor::{Bytes, DType, HostTensor};
use abi::TokenIds;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// Threads of a block of the row kernels, and rows that it takes.
const ROW_THREADS: u32 = abi::NORM_THREADS as u32;
const ROWS_PER_BLOCK: usize = abi::NORM_ROWS;

impl TokenIds {
    fn of<L: Launcher>(pass: &DeviceBatch<L>, vocabulary: usize) -> TokenIds {
        let vocabulary = vocabulary as u32;
        TokenIds {
            ids: pass.ids,
            pending: pass.pending,
            sampled: pass.sampled,
            vocabulary,
            unused: 0,
        }
    }
}

/// A token that is none of the step's before.
const NO_CHOICE: u32 = abi::ABSENT;

/// A CUDA device, or what stands in for one.
pub struct Cuda<L: Launcher> {
    launcher: Rc<L>,
    /// The 16-bit type of activations, weights and cache.
    half: DType,
    /// Whether GEMMs of any number of tokens sum in one order, so that a sequence's results do
    /// not depend on its neighbours in their last bits. Many tokens take longer then.
    batch_invariant: bool,
    /// Whether kernels with Hopper's own instructions are left alone, though the GPU has them.
    without_hopper: Cell<bool>,
    /// The first failure since results were last taken.
    failed: RefCell<Option<Error>>,
    scratch: RefCell<sampling::Scratch<L>>,
    train: RefCell<train::TrainScratch<L>>,
    /// Shares of the parts of a GEMM's inner dimension.
    gemm_partials: RefCell<Option<Memory<L>>>,
    /// Zeros, for GEMMs without a bias by kernels that add one.
    no_bias: RefCell<Option<Memory<L>>>,
    /// Whether decoding steps are captured as CUDA graphs and replayed.
    pub captures_graphs: bool,
    /// Whether decoding steps of few sequences are one kernel.
    pub persistent: Persistent,
    graphs: RefCell<graphs::Graphs<L>>,
    models: RefCell<persistent::Models<L>>,
}

/// Memory of activations.
pub struct Buffer<L: Launcher> {
    memory: Option<Memory<L>>,
}

impl<L: Launcher> Default for Buffer<L> {
    fn default() -> Self {
        Buffer { memory: None }
    }
}

impl<L: Launcher> Tensor<Cuda<L>> {
    /// The address of the first element, or 0.
    fn at(&self) -> u64 {
        self.buffer().memory.as_ref().map_or(0, |m| m.at)
    }

    /// Whether elements have 16 bits.
    fn is_half(&self) -> bool {
        self.dtype() != DType::F32
    }
}

/// Something that the host tells the device, most of the time the same: a copy is a good part of a
/// decoding step's time.
struct CachedUpload<L: Launcher> {
    memory: Option<Memory<L>>,
    /// What is there.
    bytes: Vec<u8>,
}

impl<L: Launcher> Default for CachedUpload<L> {
    fn default() -> Self {
        CachedUpload { memory: None, bytes: Vec::new() }
    }
}

/// A batch on the device.
pub struct DeviceBatch<L: Launcher> {
    memory: Option<Memory<L>>,
    /// Of each token: id, slot in the cache, span, position, choice that it is; then the spans'
    /// tables.
    ids: u64,
    slots: u64,
    spans: u64,
    positions: u64,
    /// Which choice of the step before each token is, and where those choices are; 0 if no token is
    /// one.
    pending: u64,
    sampled: u64,
    tables: u64,
    table_width: usize,
    tokens: usize,
    /// Queries that attend in tiles: first token and how many, by pairs.
    tiles: u64,
    tile_count: usize,
    /// Queries that attend one at a time, and the maximum positions that one of them sees.
    singles: u64,
    single_count: usize,
    longest_single: usize,
}

impl<L: Launcher> Default for DeviceBatch<L> {
    fn default() -> Self {
        DeviceBatch {
            memory: None,
            ids: 0,
            slots: 0,
            spans: 0,
            positions: 0,
            pending: 0,
            sampled: 0,
            tables: 0,
            table_width: 0,
            tokens: 0,
            tiles: 0,
            tile_count: 0,
            singles: 0,
            single_count: 0,
            longest_single: 0,
        }
    }
}

impl<L: Launcher> Cuda<L> {
    /// `half` is bf16 or f16.
    pub fn new(launcher: Rc<L>, half: DType, batch_invariant: bool) -> Cuda<L> {
        assert!(matches!(half, DType::Bf16 | DType::F16), "activations are bf16 or f16");
        let (failed, scratch, train, graphs, models) = Default::default();
        let (persistent, without_hopper) = (Persistent::Never, Cell::new(false));
        Cuda {
            launcher,
            half,
            batch_invariant,
            without_hopper,
            failed,
            scratch,
            train,
            gemm_partials: RefCell::default(),
            no_bias: RefCell::default(),
            captures_graphs: true,
            persistent,
            graphs,
            models,
        }
    }

    /// The device that this backend runs on.
    pub fn launcher(&self) -> &L {
        &self.launcher
    }

    /// Whether kernels with Hopper's own instructions are used.
    fn hopper(&self) -> bool {
        self.launcher.limits().hopper && !self.without_hopper.get()
    }

    /// Whether there are kernels for a model's sizes.
    pub fn supports(hidden_size: usize, heads: usize) -> Result<()> {
        let size = hidden_size / heads;
        if !attention::SIZES.contains(&size) {
            return Err(Error::Unsupported(format!(
                "there are no CUDA kernels for head size {size}, only for {:?}; use --device cpu",
                attention::SIZES
            )));
        }
        if !hidden_size.is_multiple_of(16) {
            return Err(Error::Unsupported(format!(
                "the CUDA kernels take hidden sizes that are multiples of 16, this one is {}; use \
                --device cpu",
                hidden_size
            )));
        }
        Ok(())
    }

    /// Activations from the host: rows of `width`, in the 16-bit type that linear layers read or,
    /// with `dtype` f32, as the residual stream.
    ///
    /// # Errors
    /// If there is no memory or the copy fails.
    pub fn upload(&self, x: &[f32], width: usize, dtype: DType) -> Result<Tensor<Self>> {
        let mut tensor = Tensor::default();
        self.reserve(&mut tensor, [x.len() / width, width], dtype)?;
        let bytes = match dtype {
            DType::F32 => bytemuck::cast_slice(x).to_vec(),
            half => weights::to_half(x, half),
        };
        self.launcher.write(tensor.at(), &bytes)?;
        Ok(tensor)
    }

    /// Activations in f32, on the host.
    ///
    /// # Errors
    /// What has failed since results were last taken.
    pub fn download(&self, x: &Tensor<Self>) -> Result<Vec<f32>> {
        self.check()?;
        let ([rows, width], dtype) = (x.shape(), x.dtype());
        let mut bytes = vec![0; rows * width * dtype.size()];
        self.launcher.read(x.at(), &mut bytes)?;
        let range = 0..bytes.len();
        let bytes = Bytes::Owned(Arc::new(bytes), range);
        Ok(HostTensor { dtype, shape: vec![rows, width], bytes }.to_f32())
    }

    /// The type's name in kernels.
    fn suffix(&self) -> &'static str {
        if self.half == DType::F16 { "f16" } else { "bf16" }
    }

    /// Does something that may fail, unless something has failed before.
    fn defer_error(&self, work: impl FnOnce() -> Result<()>) {
        let mut failed = self.failed.borrow_mut();
        if failed.is_none()
            && let Err(e) = work()
        {
            *failed = Some(e);
        }
    }

    /// Reports what has failed.
    fn check(&self) -> Result<()> {
        self.failed.borrow_mut().take().map_or(Ok(()), Err)
    }

    fn launch(
        &self,
        kernel: &str,
        grid: [usize; 3],
        threads: u32,
        shared_bytes: usize,
        args: Args,
    ) -> Result<()> {
        self.launcher.launch(kernel, LaunchConfig::new(grid, threads, shared_bytes), &args)
    }

    /// Makes room for what an operation writes.
    fn reserve(&self, y: &mut Tensor<Self>, shape: [usize; 2], dtype: DType) -> Result<()> {
        let bytes = shape[0] * shape[1] * dtype.size();
        self.grow(&mut y.set(shape, dtype).memory, bytes)
    }

    /// Makes room for `bytes`; the old content may be lost.
    fn grow(&self, memory: &mut Option<Memory<L>>, bytes: usize) -> Result<()> {
        if memory.as_ref().is_none_or(|m| m.bytes < bytes) {
            *memory = None;
            *memory = Some(Memory::new(&self.launcher, bytes.next_power_of_two().max(256))?);
        }
        Ok(())
    }

    /// Memory of at least `bytes`.
    fn place(&self, memory: &mut Option<Memory<L>>, bytes: usize) -> Result<u64> {
        self.grow(memory, bytes)?;
        Ok(memory.as_ref().map_or(0, |m| m.at))
    }

    /// Writes `bytes` to the device, unless they are what it was sent last.
    fn send(&self, sent: &mut CachedUpload<L>, bytes: &[u8]) -> Result<u64> {
        let at = self.place(&mut sent.memory, bytes.len())?;
        if sent.bytes != bytes {
            sent.bytes.clear(); // what is there if the write fails is anybody's guess
            self.launcher.write(at, bytes)?;
            sent.bytes.extend_from_slice(bytes);
        }
        Ok(at)
    }

    fn launch_embedding_norm(
        &self,
        y: &mut Tensor<Self>,
        batch: &DeviceBatch<L>,
        table: &DeviceWeight<L>,
        norm: &LayerNorm<Self>,
    ) -> Result<()> {
        self.reserve(y, [batch.tokens, table.cols()], DType::F32)?;
        let args = Args::new().with(y.at()).with(TokenIds::of(batch, table.rows()));
        let args = args.with(table.data.at).with(table.scales());
        let args = args.with(norm.weight.at).with(norm.bias.at);
        let args = args.with(batch.tokens as u32).with(table.cols() as u32).with(norm.eps);
        let kernel = format!("embed_norm_{}", if table.int8() { "int8" } else { self.suffix() });
        let grid = [batch.tokens.div_ceil(ROWS_PER_BLOCK), 1, 1];
        self.launch(&kernel, grid, ROW_THREADS, 0, args)
    }

    /// Normalized rows of `x` in 16 bits; `rows` (in device memory) says which, 0 takes all.
    fn launch_layer_norm(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        (rows, count): (u64, usize),
        norm: &LayerNorm<Self>,
    ) -> Result<()> {
        let width = norm.weight.bytes / 4;
        x.expect("layer_norm", [x.shape()[0], width], DType::F32);
        self.reserve(y, [count, width], self.half)?;
        let args = Args::new().with(y.at()).with(x.at()).with(rows);
        let args = args.with(norm.weight.at).with(norm.bias.at);
        let args = args.with(count as u32).with(width as u32).with(norm.eps);
        let grid = [count.div_ceil(ROWS_PER_BLOCK), 1, 1];
        self.launch(&format!("layer_norm_{}", self.suffix()), grid, ROW_THREADS, 0, args)
    }
}

/// Parameters in f32.
pub type Vector<L> = Memory<L>;

impl<L: Launcher> Backend for Cuda<L> {
    type Buffer = Buffer<L>;
    type Weight = DeviceWeight<L>;
    type Vector = Vector<L>;

    /// Weights are held in the backend's 16-bit type, or in 8 bits if `dtype` says so.
    fn weight(&self, tensor: HostTensor, dtype: Option<DType>) -> Result<DeviceWeight<L>> {
        DeviceWeight::new(&self.launcher, &tensor, self.half, dtype == Some(DType::Int8))
    }

    fn vector(&self, tensor: &HostTensor) -> Result<Vector<L>> {
        Memory::from_bytes(&self.launcher, bytemuck::cast_slice(&tensor.to_f32()))
    }

    fn linear(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        linear: &Linear<Self>,
        epilogue: Epilogue<Self>,
    ) {
        self.defer_error(|| self.launch_linear(y, LinearInput::Rows(x), linear, epilogue));
    }

    fn layer_norm_linear(
        &self,
        y: &mut Tensor<Self>,
        input: NormInput<Self>,
        linear: &Linear<Self>,
        epilogue: Epilogue<Self>,
    ) {
        self.defer_error(|| self.launch_linear(y, input.into(), linear, epilogue));
    }

    fn layer_norm(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, norm: &LayerNorm<Self>) {
        self.defer_error(|| self.launch_layer_norm(y, x, (0, x.shape()[0]), norm));
    }

    fn layer_norm_rows(
        &self,
        y: &mut Tensor<Self>,
        x: &Tensor<Self>,
        rows: &[usize],
        norm: &LayerNorm<Self>,
    ) {
        self.defer_error(|| {
            let words: Vec<u32> = rows.iter().map(|r| *r as u32).collect();
            let mut scratch = self.scratch.borrow_mut();
            let at = self.send(&mut scratch.rows, bytemuck::cast_slice(&words))?;
            self.launch_layer_norm(y, x, (at, rows.len()), norm)
        });
    }
}

impl<L: Launcher> DecodeBackend for Cuda<L> {
    type Cache = Cache<L>;
    type DeviceBatch = DeviceBatch<L>;
    type PendingSamples = L::PendingRead;

    fn cache(&self, _: DType, layers: usize, heads: &Heads, blocks: usize) -> Result<Cache<L>> {
        Cache::new(&self.launcher, layers, heads, blocks)
    }

    fn copy_block(&self, cache: &mut Cache<L>, from: u32, to: u32) {
        self.defer_error(|| {
            let args = Args::new().with(cache.memory.at).with(from).with(to);
            let args = args.with(cache.blocks as u32).with((cache.block_bytes / 16) as u32);
            self.launch("copy_cache_block", [2 * cache.layers, 1, 1], 256, 0, args)
        });
    }

    fn upload_batch(&self, batch: &Batch, to: &mut DeviceBatch<L>) {
        self.defer_error(|| {
            let n = batch.ids.len();
            let width =
                batch.spans.iter().map(|s| s.blocks.len()).max().unwrap_or(0).next_power_of_two();
            // five arrays of the tokens, the tables, tiles and single queries
            let mut words = batch.ids.clone();
            words.resize(4 * n, 0);
            words.resize(5 * n, NO_CHOICE);
            words.resize(5 * n + batch.spans.len() * width, 0);
            batch.pending.iter().for_each(|&(token, choice)| words[4 * n + token] = choice as u32);
            let (mut tiles, mut singles): (Vec<u32>, Vec<u32>) = Default::default();
            to.longest_single = 0;
            let queries = attention::tile_queries(self.hopper());
            for (number, span) in batch.spans.iter().enumerate() {
                for i in 0..span.len {
                    let (token, position) = (span.start + i, span.past + i);
                    words[n + token] =
                        span.blocks[position / BLOCK] * BLOCK as u32 + (position % BLOCK) as u32;
                    words[2 * n + token] = number as u32;
                    words[3 * n + token] = position as u32;
                }
                words[5 * n + number * width..][..span.blocks.len()].copy_from_slice(&span.blocks);
                if span.len >= attention::TILED && !self.batch_invariant {
                    for first in (0..span.len).step_by(queries) {
                        let count = queries.min(span.len - first);
                        tiles.extend([(span.start + first) as u32, count as u32]);
                    }
                } else {
                    singles.extend((span.start..span.start + span.len).map(|t| t as u32));
                    to.longest_single = to.longest_single.max(span.past + span.len);
                }
            }
            let tables_end = words.len();
            words.extend_from_slice(&tiles);
            words.extend_from_slice(&singles);
            self.grow(&mut to.memory, words.len() * 4)?;
            let at = to.memory.as_ref().map_or(0, |m| m.at);
            self.launcher.write(at, bytemuck::cast_slice(&words))?;
            let array = |i: usize| at + (i * n * 4) as u64;
            (to.ids, to.slots, to.spans, to.positions) = (array(0), array(1), array(2), array(3));
            to.pending = array(4);
            to.sampled =
                if batch.pending.is_empty() { 0 } else { self.scratch.borrow().last_sampled() };
            (to.tables, to.table_width, to.tokens) = (array(5), width, n);
            (to.tiles, to.tile_count) = (at + 4 * tables_end as u64, tiles.len() / 2);
            (to.singles, to.single_count) = (to.tiles + 4 * tiles.len() as u64, singles.len());
            Ok(())
        });
    }

    fn embedding_norm(
        &self,
        y: &mut Tensor<Self>,
        batch: &DeviceBatch<L>,
        table: &DeviceWeight<L>,
        norm: &LayerNorm<Self>,
    ) {
        self.defer_error(|| self.launch_embedding_norm(y, batch, table, norm));
    }

    fn qkv_to_cache(
        &self,
        queries: &mut Tensor<Self>,
        x: &Tensor<Self>,
        qkv: &Linear<Self>,
        batch: &DeviceBatch<L>,
        (cache, layer): (&mut Cache<L>, usize),
    ) {
        let input = LinearInput::Rows(x);
        self.defer_error(|| self.launch_qkv(queries, input, qkv, batch, (cache, layer)));
    }

    fn layer_norm_qkv_to_cache(
        &self,
        queries: &mut Tensor<Self>,
        input: NormInput<Self>,
        qkv: &Linear<Self>,
        batch: &DeviceBatch<L>,
        (cache, layer): (&mut Cache<L>, usize),
    ) {
        self.defer_error(|| self.launch_qkv(queries, input.into(), qkv, batch, (cache, layer)));
    }

    fn paged_attention(
        &self,
        y: &mut Tensor<Self>,
        queries: &Tensor<Self>,
        batch: &DeviceBatch<L>,
        cache: (&Cache<L>, usize),
    ) {
        self.defer_error(|| self.attend(y, queries, batch, cache));
    }

    fn decoder(
        &self,
        decoder: &Decoder<Self>,
        cache: &mut Cache<L>,
        a: &mut DecoderActivations<Self>,
    ) {
        self.replay_or_capture(decoder::ForwardPass { decoder, cache, a });
    }

    fn logits(
        &self,
        x: &Tensor<Self>,
        lm_head: &DeviceWeight<L>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        self.check()?;
        self.lm_head_logits(x, lm_head, out)
    }

    fn sample(
        &self,
        x: &Tensor<Self>,
        lm_head: &DeviceWeight<L>,
        rows: &[(usize, &SamplingRow)],
        scratch: &mut Vec<f32>,
    ) -> Result<Vec<SampledToken>> {
        self.check()?;
        self.sample_now(x, lm_head, rows, scratch)
    }

    fn samples_on_device(&self, row: &SamplingRow) -> bool {
        Self::on_device(row)
    }

    fn sample_async(
        &self,
        x: &Tensor<Self>,
        lm_head: &DeviceWeight<L>,
        rows: &[(usize, &SamplingRow)],
    ) -> Result<L::PendingRead> {
        self.check()?;
        self.start_sampling(x, lm_head, rows)
    }

    fn wait(&self, pending: L::PendingRead) -> Result<Vec<SampledToken>> {
        self.finish_sampling(pending)
    }
}
