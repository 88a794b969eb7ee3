//! The CUDA backend: decides which kernel runs with what; written against [`Launcher`].
//!
//! Activations: the residual stream is f32, what products read is 16 bits wide (bf16, or f16 for
//! models stored so). A layer of a decoding step is five launches: norm + queries, keys, values
//! into the cache; attention; dense + residual; norm + up + GELU; down + residual. Beyond 16 tokens
//! the norms are the ends of the products before them on Hopper, and launches of their own
//! elsewhere.

mod attention;
mod graphs;
mod head;
mod linear;
mod measure;
mod persistent;
mod sampling;
mod trial;
mod ways;
mod weights;

pub use attention::Cache;
pub use graphs::Comparison;
pub use persistent::Persistent;
pub use weights::Matrix;

use super::{Backend, Batch, Epilogue, Forward, Heads, LayerNorm, Linear, Norm};
use crate::device::{Args, Launcher, Memory, Shape};
use crate::engine::{Chosen, SampleRow};
use crate::error::{Error, Result};
use crate::models::bloom::BloomConfig;
use crate::ops::BLOCK;
use crate::tensor::{Bytes, DType, Tensor};
use bytemuck::{Pod, Zeroable};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// Threads of a block of the row kernels, and rows that it takes.
const ROW_THREADS: u32 = 128;
const ROWS_PER_BLOCK: usize = 4;

/// `Ids` of `kernels/include/embedding.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Ids {
    ids: u64,
    fed: u64,
    choices: u64,
    vocabulary: u32,
    unused: u32,
}

impl Ids {
    fn of<L: Launcher>(pass: &Pass<L>, vocabulary: usize) -> Ids {
        let vocabulary = vocabulary as u32;
        Ids { ids: pass.ids, fed: pass.fed, choices: pass.choices, vocabulary, unused: 0 }
    }
}

/// A token that is none of the step's before.
const NO_CHOICE: u32 = u32::MAX;

/// A CUDA device, or what stands in for one.
pub struct Cuda<L: Launcher> {
    launcher: Rc<L>,
    /// The 16-bit type of activations, weights and cache.
    half: DType,
    /// Whether products of any number of tokens sum in one order, so that a sequence's results do
    /// not depend on its neighbours in their last bits. Many tokens take longer then.
    batch_invariant: bool,
    /// Whether kernels with Hopper's own instructions are left alone, though the GPU has them.
    without_hopper: Cell<bool>,
    /// Zeros between launches: how many clusters of one are done, by tiles of tokens.
    tile_counters: RefCell<Option<Memory<L>>>,
    /// The first failure since results were last taken.
    failed: RefCell<Option<Error>>,
    scratch: RefCell<sampling::Scratch<L>>,
    /// Whether decoding steps are recorded and repeated.
    pub records: bool,
    /// Whether decoding steps of few sequences are one kernel.
    pub persistent: Persistent,
    graphs: RefCell<graphs::Graphs<L>>,
    models: RefCell<persistent::Models<L>>,
}

/// A buffer's address and how often it had been written.
type Written = (u64, u64);

/// Activations.
pub struct Buffer<L: Launcher> {
    memory: Option<Memory<L>>,
    /// Elements of 2 bytes, else of 4.
    narrow: bool,
    rows: usize,
    /// How often it has been written.
    writes: u64,
    /// What these are the normalized rows of, if the norm was done along with a product.
    normed_of: Option<Written>,
}

impl<L: Launcher> Default for Buffer<L> {
    fn default() -> Self {
        Buffer { memory: None, narrow: false, rows: 0, writes: 0, normed_of: None }
    }
}

impl<L: Launcher> Buffer<L> {
    fn at(&self) -> u64 {
        self.memory.as_ref().map_or(0, |m| m.at)
    }

    fn written(&self) -> Written {
        (self.at(), self.writes)
    }
}

/// Something that the host tells the device, most of the time the same: a copy is a good part of a
/// decoding step's time.
struct Sent<L: Launcher> {
    memory: Option<Memory<L>>,
    /// What is there.
    bytes: Vec<u8>,
}

impl<L: Launcher> Default for Sent<L> {
    fn default() -> Self {
        Sent { memory: None, bytes: Vec::new() }
    }
}

/// A batch on the device.
pub struct Pass<L: Launcher> {
    memory: Option<Memory<L>>,
    /// Of each token: id, slot in the cache, span, position, choice that it is; then the spans'
    /// tables.
    ids: u64,
    slots: u64,
    spans: u64,
    positions: u64,
    /// Which choice of the step before each token is, and where those choices are; 0 if no token is
    /// one.
    fed: u64,
    choices: u64,
    tables: u64,
    table_width: usize,
    tokens: usize,
    /// Queries that attend in tiles: first token and how many, by pairs.
    tiles: u64,
    tile_count: usize,
    /// Queries that attend one at a time, and the most positions that one of them sees.
    singles: u64,
    single_count: usize,
    longest_single: usize,
}

impl<L: Launcher> Default for Pass<L> {
    fn default() -> Self {
        Pass {
            memory: None,
            ids: 0,
            slots: 0,
            spans: 0,
            positions: 0,
            fed: 0,
            choices: 0,
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
        let (failed, scratch, graphs, models, tile_counters) = Default::default();
        let (persistent, without_hopper) = (Persistent::Never, Cell::new(false));
        Cuda {
            launcher,
            half,
            batch_invariant,
            without_hopper,
            tile_counters,
            failed,
            scratch,
            records: true,
            persistent,
            graphs,
            models,
        }
    }

    pub fn launcher(&self) -> &L {
        &self.launcher
    }

    /// Whether kernels with Hopper's own instructions are used.
    fn hopper(&self) -> bool {
        self.launcher.limits().hopper && !self.without_hopper.get()
    }

    /// Whether there are kernels for a model's sizes.
    pub fn supports(config: &BloomConfig) -> Result<()> {
        let size = config.head_size();
        if !attention::SIZES.contains(&size) {
            return Err(Error::invalid(format!(
                "there are no CUDA kernels for head size {size}, only for {:?}; use --device cpu",
                attention::SIZES
            )));
        }
        if !config.hidden_size.is_multiple_of(16) {
            return Err(Error::invalid(format!(
                "the CUDA kernels take hidden sizes that are multiples of 16, this one is {}; use \
                --device cpu",
                config.hidden_size
            )));
        }
        Ok(())
    }

    /// Activations from the host: rows of `width`, in 16 bits or f32.
    pub fn upload(&self, x: &[f32], width: usize, narrow: bool) -> Result<Buffer<L>> {
        let mut buffer = Buffer::default();
        self.reserve(&mut buffer, x.len() / width, width, narrow)?;
        let bytes =
            if narrow { weights::narrow(x, self.half) } else { bytemuck::cast_slice(x).to_vec() };
        self.launcher.write(buffer.at(), &bytes)?;
        Ok(buffer)
    }

    /// Activations in f32, on the host. Reports what failed since the last call.
    pub fn download(&self, buffer: &Buffer<L>, width: usize) -> Result<Vec<f32>> {
        self.check()?;
        let dtype = if buffer.narrow { self.half } else { DType::F32 };
        let mut bytes = vec![0; buffer.rows * width * dtype.size()];
        self.launcher.read(buffer.at(), &mut bytes)?;
        let range = 0..bytes.len();
        Ok(Tensor {
            dtype,
            shape: vec![buffer.rows, width],
            bytes: Bytes::Owned(Arc::new(bytes), range),
        }
        .to_f32())
    }

    /// The type's name in kernels.
    fn suffix(&self) -> &'static str {
        if self.half == DType::F16 { "f16" } else { "bf16" }
    }

    /// Does something that may fail, unless something has failed before.
    fn attempt(&self, work: impl FnOnce() -> Result<()>) {
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
        self.launcher.launch(kernel, Shape::new(grid, threads, shared_bytes), &args)
    }

    /// Makes room for `rows` rows of `width` elements.
    fn reserve(
        &self,
        buffer: &mut Buffer<L>,
        rows: usize,
        width: usize,
        narrow: bool,
    ) -> Result<()> {
        let bytes = rows * width * if narrow { 2 } else { 4 };
        (buffer.narrow, buffer.rows, buffer.normed_of) = (narrow, rows, None);
        buffer.writes += 1;
        self.grow(&mut buffer.memory, bytes)
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
    fn send(&self, sent: &mut Sent<L>, bytes: &[u8]) -> Result<u64> {
        let at = self.place(&mut sent.memory, bytes.len())?;
        if sent.bytes != bytes {
            sent.bytes.clear(); // what is there if the write fails is anybody's guess
            self.launcher.write(at, bytes)?;
            sent.bytes.extend_from_slice(bytes);
        }
        Ok(at)
    }

    /// Normalized rows of `x` in 16 bits; `rows` (of device memory) chooses, 0 takes all.
    fn layer_norm(
        &self,
        x: &Buffer<L>,
        rows: u64,
        count: usize,
        norm: &LayerNorm<Vector<L>>,
        eps: f32,
        out: &mut Buffer<L>,
    ) -> Result<()> {
        let width = norm.weight.bytes / 4;
        self.reserve(out, count, width, true)?;
        let args = Args::new()
            .with(out.at())
            .with(x.at())
            .with(rows)
            .with(norm.weight.at)
            .with(norm.bias.at);
        let args = args.with(count as u32).with(width as u32).with(eps);
        let grid = [count.div_ceil(ROWS_PER_BLOCK), 1, 1];
        self.launch(&format!("layer_norm_{}", self.suffix()), grid, ROW_THREADS, 0, args)
    }
}

/// Parameters in f32.
pub type Vector<L> = Memory<L>;

impl<L: Launcher> Backend for Cuda<L> {
    type Matrix = Matrix<L>;
    type Vector = Vector<L>;
    type Buffer = Buffer<L>;
    type Cache = Cache<L>;
    type Pass = Pass<L>;
    type Choosing = L::Reading;

    /// Weights are held in the backend's 16-bit type, or in 8 bits if `dtype` says so.
    fn matrix(&self, tensor: Tensor, dtype: Option<DType>) -> Result<Matrix<L>> {
        Matrix::new(&self.launcher, &tensor, self.half, dtype == Some(DType::Int8))
    }

    fn stored(&self, matrix: &Matrix<L>) -> DType {
        if matrix.int8() { DType::Int8 } else { self.half }
    }

    fn vector(&self, tensor: &Tensor) -> Result<Vector<L>> {
        Memory::from_bytes(&self.launcher, bytemuck::cast_slice(&tensor.to_f32()))
    }

    fn cache(&self, _: DType, layers: usize, heads: &Heads, blocks: usize) -> Result<Cache<L>> {
        Cache::new(&self.launcher, layers, heads, blocks)
    }

    fn copy_block(&self, cache: &mut Cache<L>, from: u32, to: u32) {
        self.attempt(|| {
            let args = Args::new().with(cache.memory.at).with(from).with(to);
            let args = args.with(cache.blocks as u32).with((cache.block_bytes / 16) as u32);
            self.launch("copy_cache_block", [2 * cache.layers, 1, 1], 256, 0, args)
        });
    }

    fn begin(&self, batch: &Batch, pass: &mut Pass<L>) {
        self.attempt(|| {
            let n = batch.ids.len();
            let width =
                batch.spans.iter().map(|s| s.blocks.len()).max().unwrap_or(0).next_power_of_two();
            // five arrays of the tokens, the tables, tiles and single queries
            let mut words = batch.ids.clone();
            words.resize(4 * n, 0);
            words.resize(5 * n, NO_CHOICE);
            words.resize(5 * n + batch.spans.len() * width, 0);
            batch.fed.iter().for_each(|&(token, choice)| words[4 * n + token] = choice as u32);
            let (mut tiles, mut singles): (Vec<u32>, Vec<u32>) = Default::default();
            pass.longest_single = 0;
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
                    pass.longest_single = pass.longest_single.max(span.past + span.len);
                }
            }
            let tables_end = words.len();
            words.extend_from_slice(&tiles);
            words.extend_from_slice(&singles);
            self.grow(&mut pass.memory, words.len() * 4)?;
            let at = pass.memory.as_ref().map_or(0, |m| m.at);
            self.launcher.write(at, bytemuck::cast_slice(&words))?;
            let array = |i: usize| at + (i * n * 4) as u64;
            (pass.ids, pass.slots, pass.spans, pass.positions) =
                (array(0), array(1), array(2), array(3));
            pass.fed = array(4);
            pass.choices =
                if batch.fed.is_empty() { 0 } else { self.scratch.borrow().last_chosen() };
            (pass.tables, pass.table_width, pass.tokens) = (array(5), width, n);
            (pass.tiles, pass.tile_count) = (at + 4 * tables_end as u64, tiles.len() / 2);
            (pass.singles, pass.single_count) =
                (pass.tiles + 4 * tiles.len() as u64, singles.len());
            Ok(())
        });
    }

    fn forward(&self, pass: Forward<Self>) {
        self.repeat(pass);
    }

    fn embed_norm(
        &self,
        _: &Batch,
        pass: &Pass<L>,
        table: &Matrix<L>,
        norm: &LayerNorm<Vector<L>>,
        eps: f32,
        out: &mut Buffer<L>,
    ) {
        self.attempt(|| {
            self.reserve(out, pass.tokens, table.cols, false)?;
            let args = Args::new()
                .with(out.at())
                .with(Ids::of(pass, table.rows))
                .with(table.data.at)
                .with(table.scales());
            let args = args.with(norm.weight.at).with(norm.bias.at);
            let args = args.with(pass.tokens as u32).with(table.cols as u32).with(eps);
            let kernel =
                format!("embed_norm_{}", if table.int8() { "int8" } else { self.suffix() });
            self.launch(&kernel, [pass.tokens.div_ceil(ROWS_PER_BLOCK), 1, 1], ROW_THREADS, 0, args)
        });
    }

    fn linear(
        &self,
        x: &Buffer<L>,
        linear: &Linear<Matrix<L>, Vector<L>>,
        epilogue: Epilogue<Buffer<L>>,
        out: &mut Buffer<L>,
    ) {
        self.attempt(|| self.product(x, None, linear, epilogue, out, None));
    }

    fn linear_before_norm(
        &self,
        x: &Buffer<L>,
        linear: &Linear<Matrix<L>, Vector<L>>,
        epilogue: Epilogue<Buffer<L>>,
        out: &mut Buffer<L>,
        next: Norm<Self>,
    ) {
        self.attempt(|| self.product(x, None, linear, epilogue, out, Some(next)));
    }

    fn norm_linear(
        &self,
        x: &Buffer<L>,
        norm: Norm<Self>,
        linear: &Linear<Matrix<L>, Vector<L>>,
        epilogue: Epilogue<Buffer<L>>,
        out: &mut Buffer<L>,
    ) {
        self.attempt(|| self.product(x, Some(norm), linear, epilogue, out, None));
    }

    fn norm_qkv(
        &self,
        _: &Batch,
        pass: &Pass<L>,
        layer: usize,
        x: &Buffer<L>,
        norm: Norm<Self>,
        linear: &Linear<Matrix<L>, Vector<L>>,
        heads: &Heads,
        cache: &mut Cache<L>,
        out: &mut Buffer<L>,
    ) {
        self.attempt(|| self.qkv(pass, x, norm, linear, heads, cache.layer(layer), out));
    }

    fn attention(
        &self,
        _: &Batch,
        pass: &Pass<L>,
        layer: usize,
        heads: &Heads,
        queries: &Buffer<L>,
        cache: &Cache<L>,
        out: &mut Buffer<L>,
    ) {
        self.attempt(|| self.attend(pass, heads, queries, cache, layer, out));
    }

    fn gather_norm(
        &self,
        x: &Buffer<L>,
        rows: &[usize],
        norm: &LayerNorm<Vector<L>>,
        eps: f32,
        out: &mut Buffer<L>,
    ) {
        self.attempt(|| {
            let words: Vec<u32> = rows.iter().map(|r| *r as u32).collect();
            let mut scratch = self.scratch.borrow_mut();
            let at = self.send(&mut scratch.rows, bytemuck::cast_slice(&words))?;
            self.layer_norm(x, at, rows.len(), norm, eps, out)
        });
    }

    fn logits(&self, x: &Buffer<L>, head: &Matrix<L>, out: &mut Vec<f32>) -> Result<()> {
        self.check()?;
        self.head_logits(x, head, out)
    }

    fn sample(
        &self,
        x: &Buffer<L>,
        head: &Matrix<L>,
        rows: &[(usize, &SampleRow)],
        scratch: &mut Vec<f32>,
    ) -> Result<Vec<Chosen>> {
        self.check()?;
        self.choose(x, head, rows, scratch)
    }

    fn chooses_alone(&self, row: &SampleRow) -> bool {
        Self::alone(row)
    }

    fn start_sample(
        &self,
        x: &Buffer<L>,
        head: &Matrix<L>,
        rows: &[(usize, &SampleRow)],
    ) -> Result<L::Reading> {
        self.check()?;
        self.start(x, head, rows)
    }

    fn finish_sample(&self, choosing: L::Reading) -> Result<Vec<Chosen>> {
        self.finish(choosing)
    }
}
