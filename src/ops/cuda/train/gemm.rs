//! GEMMs of training: logits, and the gradients of linear layers.

use super::super::{Cuda, abi};
use crate::device::{Args, LaunchConfig, Launcher, Memory, TensorMap, TensorMapConfig};
use crate::error::Result;
use abi::{
    EPILOGUE_BIAS, EPILOGUE_GELU_GRADIENT, EPILOGUE_HALF, EPILOGUE_RESIDUAL, EpilogueArgs,
    GEMM_ADD, GEMM_PARTIAL, GEMM_WRITE, GemmArgs, GemmDivision,
};
use bytemuck::Zeroable;

const THREADS: u32 = abi::GEMM_TRAIN_THREADS as u32;
const TILE: usize = abi::GEMM_TRAIN_TILE;
const SLICE: usize = abi::GEMM_TRAIN_SLICE;
/// Both operands of all slices in work.
const SHARED: usize = abi::GEMM_TRAIN_STAGES * 2 * TILE * SLICE * 2;
/// A tile of Hopper's kernels, and their shared memory.
const HOPPER_M: usize = abi::LINEAR_HOPPER_TOKENS;
const HOPPER_N: usize = abi::LINEAR_HOPPER_OUTPUTS;
const HOPPER_THREADS: u32 = abi::LINEAR_HOPPER_THREADS as u32;
const HOPPER_SHARED: usize = abi::GEMM_HOPPER_SHARED_BYTES;
/// Minimum slices of a part: less work would not be worth the trip of its sums through memory.
const PART_SLICES: usize = 4;

/// A row-major matrix in 16 bits on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    /// Where it begins, aligned to 16 bytes.
    pub at: u64,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next, a multiple of 8. Those behind the columns are zeros.
    pub stride: usize,
}

impl Matrix {
    /// A matrix without padding, whose columns are a multiple of 8.
    pub fn new(at: u64, rows: usize, cols: usize) -> Matrix {
        assert!(cols.is_multiple_of(8), "see `Cuda::supports`");
        Matrix { at, rows, cols, stride: cols }
    }
}

/// Which operand is transposed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// A B^T
    Nt,
    /// A B
    Nn,
    /// A^T B
    Tn,
}

impl Layout {
    fn name(self) -> &'static str {
        match self {
            Layout::Nt => "nt",
            Layout::Nn => "nn",
            Layout::Tn => "tn",
        }
    }
}

/// Sizes and addresses of a GEMM; what is done with its sums is added to them.
fn operands(layout: Layout, a: Matrix, b: Matrix) -> GemmArgs {
    let (m, k) = if layout == Layout::Tn { (a.cols, a.rows) } else { (a.rows, a.cols) };
    let (n, inner) = if layout == Layout::Nt { (b.rows, b.cols) } else { (b.cols, b.rows) };
    assert_eq!(k, inner, "a GEMM of {a:?} and {b:?}");
    GemmArgs {
        a: a.at,
        b: b.at,
        m: m as u32,
        n: n as u32,
        k: k as u32,
        a_stride: a.stride as u32,
        b_stride: b.stride as u32,
        ..GemmArgs::zeroed()
    }
}

/// Blocks of a cluster on Hopper, which share B: two, unless much of the second one's work would be
/// beyond the rows.
fn cluster_of(m: usize) -> usize {
    let rows = m.div_ceil(HOPPER_M);
    if rows.is_multiple_of(2) || rows > 8 { 2 } else { 1 }
}

/// How the tiles of a GEMM on Hopper are divided.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tiles {
    /// Rows of tiles that are computed whole, by a launch of their own.
    whole: usize,
    /// Parts of the inner dimension of those behind them.
    parts: usize,
}

/// Maximum parts of the inner dimension on Hopper.
const HOPPER_PARTS: usize = 8;
/// Slices that a multiprocessor multiplies while another launch begins, and while the share of a
/// tile goes to memory and back.
const LAUNCH_SLICES: f64 = 4.0;
const SHARE_SLICES: f64 = 0.25;

/// Divides `rows` times `columns` tiles of so many slices over `clusters` of blocks, so that few
/// of these are without work while others have their last tile: as many rows as fill them whole a
/// number of times, and the others in parts.
fn tiles(rows: usize, columns: usize, slices: usize, clusters: usize) -> Tiles {
    let time = |t: &Tiles| {
        let (left, each) = ((rows - t.whole) * columns * t.parts, slices.div_ceil(t.parts));
        let waves = (t.whole * columns).div_ceil(clusters) * slices;
        let launches = (t.whole > 0 && left > 0) as u32 + (t.parts > 1) as u32;
        let shares = if t.parts > 1 { left as f64 * SHARE_SLICES } else { 0.0 };
        let waves = waves + left.div_ceil(clusters) * each;
        waves as f64 + launches as f64 * LAUNCH_SLICES + shares
    };
    let most = (slices / PART_SLICES).clamp(1, HOPPER_PARTS);
    let waves = 0..=(rows * columns).saturating_sub(1) / clusters;
    let some = waves
        .flat_map(|w| (1..=most).map(move |parts| Tiles { whole: w * clusters / columns, parts }));
    let all = Tiles { whole: rows, parts: 1 };
    let best = some.fold(all, |best, t| if time(&t) < time(&best) { t } else { best });
    // a gain so small may be none
    if time(&best) < 0.97 * time(&all) { best } else { all }
}

/// What is left of a GEMM behind `rows` rows of its results.
fn behind(layout: Layout, args: GemmArgs, rows: usize) -> GemmArgs {
    let size = if args.mode == GEMM_ADD { 4 } else { 2 };
    let elements = (rows * args.c_stride as usize) as u64;
    let row = if layout == Layout::Tn { rows } else { rows * args.a_stride as usize };
    let beyond = |at: u64, bytes: u64| if at == 0 { 0 } else { at + bytes };
    GemmArgs {
        a: args.a + 2 * row as u64,
        c: args.c + size * elements,
        before_gelu: beyond(args.before_gelu, 2 * elements),
        row_sums: beyond(args.row_sums, 4 * rows as u64),
        m: args.m - rows as u32,
        ..args
    }
}

/// Into how many parts the inner dimension is divided elsewhere: as many as leave no
/// multiprocessor without a tile.
fn parts(tiles: usize, slices: usize, processors: usize) -> usize {
    (processors / tiles).clamp(1, slices.div_ceil(PART_SLICES).max(1))
}

impl<L: Launcher> Cuda<L> {
    /// `c` = `a b^T`.
    pub(super) fn gemm_nt(&self, c: Matrix, a: Matrix, b: Matrix) -> Result<()> {
        self.gemm_write(Layout::Nt, c, operands(Layout::Nt, a, b))
    }

    /// `c` = `a b`, times the gradient of the GELU of what is at `before_gelu`, laid out as `c`.
    pub(super) fn gemm_nn(
        &self,
        c: Matrix,
        a: Matrix,
        b: Matrix,
        before_gelu: Option<u64>,
    ) -> Result<()> {
        let args = operands(Layout::Nn, a, b);
        let before_gelu = before_gelu.unwrap_or(0);
        self.gemm_write(Layout::Nn, c, GemmArgs { before_gelu, ..args })
    }

    /// Adds `a^T b` to the f32 matrix at `c`, whose rows have no padding, and the sums of the
    /// columns of `a` to what is at `row_sums`, unless that is 0.
    pub(super) fn gemm_tn_add(&self, c: u64, a: Matrix, b: Matrix, row_sums: u64) -> Result<()> {
        let args = operands(Layout::Tn, a, b);
        let c_stride = b.cols as u32;
        self.gemm(Layout::Tn, GemmArgs { c, c_stride, row_sums, mode: GEMM_ADD, ..args })
    }

    fn gemm_write(&self, layout: Layout, c: Matrix, args: GemmArgs) -> Result<()> {
        assert_eq!((c.rows as u32, c.cols as u32), (args.m, args.n), "results of a GEMM: {c:?}");
        let (at, c_stride) = (c.at, c.stride as u32);
        self.gemm(layout, GemmArgs { c: at, c_stride, mode: GEMM_WRITE, ..args })
    }

    fn gemm(&self, layout: Layout, args: GemmArgs) -> Result<()> {
        let (m, n) = (args.m as usize, args.n as usize);
        // what is added has no padding, and TMA takes rows of whole 16 bytes
        let hopper = self.hopper() && (args.mode == GEMM_WRITE || n.is_multiple_of(8));
        let slices = (args.k as usize).div_ceil(SLICE);
        let processors = self.launcher.limits().processors as usize;
        let divided = |parts: usize| {
            let each = slices.div_ceil(parts).max(1);
            let parts = slices.div_ceil(each).max(1) as u32;
            GemmArgs { parts, part_slices: each as u32, ..args }
        };
        if !hopper || layout == Layout::Nt {
            let tiles = m.div_ceil(TILE) * n.div_ceil(TILE);
            let parts = if hopper { 1 } else { parts(tiles, slices, processors) };
            return self.gemm_in_parts(hopper, layout, divided(parts));
        }
        let cluster = cluster_of(m);
        let (rows, columns) = (m.div_ceil(cluster * HOPPER_M), n.div_ceil(HOPPER_N));
        let clusters = (processors / cluster).max(1);
        let Tiles { whole, parts } = tiles(rows, columns, slices, clusters);
        let whole = (whole * cluster * HOPPER_M).min(m);
        if whole > 0 {
            let first = GemmArgs { m: whole as u32, ..divided(1) };
            self.gemm_in_parts(hopper, layout, first)?;
        }
        if whole < m {
            self.gemm_in_parts(hopper, layout, behind(layout, divided(parts), whole))?;
        }
        Ok(())
    }

    /// All of a GEMM, whose inner dimension is divided as its arguments say.
    fn gemm_in_parts(&self, hopper: bool, layout: Layout, mut args: GemmArgs) -> Result<()> {
        let (m, n, parts) = (args.m as usize, args.n as usize, args.parts as usize);
        let mode = args.mode;
        if parts > 1 {
            let bytes = 4 * parts * m * (n.next_multiple_of(8) + 1);
            args.partials = self.place(&mut self.gemm_partials.borrow_mut(), bytes)?;
            args.mode = GEMM_PARTIAL;
        }
        if hopper {
            self.launch_gemm_hopper(layout, args)?;
        } else {
            let tiles = m.div_ceil(TILE) * n.div_ceil(TILE);
            let kernel = format!("gemm_{}_bf16", layout.name());
            self.launch(&kernel, [tiles, parts, 1], THREADS, SHARED, Args::new().with(args))?;
        }
        if parts == 1 {
            return Ok(());
        }
        let threads = m * n.div_ceil(8);
        let grid = [threads.div_ceil(THREADS as usize), 1, 1];
        let args = GemmArgs { mode, ..args };
        self.launch("gemm_combine_bf16", grid, THREADS, 0, Args::new().with(args))
    }
}

/// What Hopper's kernels do with their sums. Of logits they write the padding too, as the zeros
/// that come of rows beyond the LM head.
fn hopper_epilogue(args: &GemmArgs, no_bias: u64) -> EpilogueArgs {
    let epilogue = EpilogueArgs { out: args.c, bias: no_bias, ..EpilogueArgs::zeroed() };
    match args.mode {
        GEMM_ADD => {
            EpilogueArgs { mode: EPILOGUE_RESIDUAL, residual: args.c, width: args.n, ..epilogue }
        }
        GEMM_PARTIAL => EpilogueArgs {
            mode: EPILOGUE_BIAS,
            out: args.partials,
            width: args.n.next_multiple_of(8),
            ..epilogue
        },
        _ if args.before_gelu != 0 => EpilogueArgs {
            mode: EPILOGUE_GELU_GRADIENT,
            residual: args.before_gelu,
            half_residual: 1,
            width: args.c_stride,
            ..epilogue
        },
        _ => EpilogueArgs { mode: EPILOGUE_HALF, width: args.c_stride, ..epilogue },
    }
}

impl<L: Launcher> Cuda<L> {
    fn launch_gemm_hopper(&self, layout: Layout, args: GemmArgs) -> Result<()> {
        let (m, k) = (args.m as usize, args.k as usize);
        let mut no_bias = self.no_bias.borrow_mut();
        let width = args.n.next_multiple_of(8).max(args.c_stride) as usize;
        if no_bias.as_ref().is_none_or(|zeros| zeros.bytes < 4 * width) {
            *no_bias = None;
            *no_bias = Some(Memory::zeroed(&self.launcher, (4 * width).next_power_of_two())?);
        }
        let e = hopper_epilogue(&args, no_bias.as_ref().map_or(0, |zeros| zeros.at));
        let cluster = cluster_of(m);
        let tiles = m.div_ceil(cluster * HOPPER_M) * (e.width as usize).div_ceil(HOPPER_N);
        let work = tiles * args.parts as usize;
        let blocks = work.min(self.launcher.limits().processors as usize / cluster);
        let maps = Args::new()
            .with(self.operand_map(
                args.a,
                layout == Layout::Tn,
                [m, k],
                args.a_stride,
                HOPPER_M,
            )?)
            .with(self.operand_map(
                args.b,
                layout != Layout::Nt,
                [args.n as usize, k],
                args.b_stride,
                HOPPER_N / 2,
            )?);
        let maps = maps.with(args.m).with(args.k).with(e);
        let summed = layout == Layout::Tn && args.row_sums != 0;
        let (kernel, launched) = match layout {
            Layout::Nt => ("linear_hopper_bf16".to_owned(), maps),
            _ => {
                let division = self.division(&args, summed);
                let sums = if summed { "_sums" } else { "" };
                (format!("gemm_hopper_{}{sums}_bf16", layout.name()), maps.with(division))
            }
        };
        let config = LaunchConfig {
            cluster: cluster as u32,
            ..LaunchConfig::new([cluster * blocks, 1, 1], HOPPER_THREADS, HOPPER_SHARED)
        };
        self.launcher.launch(&kernel, config, &launched)
    }

    /// A map of an operand `[outer, inner]`, or `[inner, outer]` if it is transposed, in tiles of
    /// `tile` outer by 64 inner elements or of 64 by 64.
    fn operand_map(
        &self,
        at: u64,
        transposed: bool,
        [outer, inner]: [usize; 2],
        stride: u32,
        tile: usize,
    ) -> Result<TensorMap> {
        let (rows, cols, tile) =
            if transposed { (inner, outer, SLICE) } else { (outer, inner, tile) };
        let map = TensorMapConfig::tiles(at, rows, cols, tile);
        self.launcher.tensor_map(&TensorMapConfig { global_stride: 2 * stride as u64, ..map })
    }

    /// How the inner dimension is divided, and where the sums of A go.
    fn division(&self, args: &GemmArgs, summed: bool) -> GemmDivision {
        let partial = args.mode == GEMM_PARTIAL;
        let width = args.n.next_multiple_of(8) as u64;
        // behind the shares of the results
        let shares = args.partials + 4 * args.parts as u64 * args.m as u64 * width;
        GemmDivision {
            row_sums: if !summed {
                0
            } else if partial {
                shares
            } else {
                args.row_sums
            },
            parts: args.parts,
            part_slices: args.part_slices,
            accumulate: !partial as u32,
            unused: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_leave_no_multiprocessor_without_a_tile() {
        assert_eq!(parts(144, 96, 132), 1);
        assert_eq!(parts(48, 3921, 132), 2);
        assert_eq!((parts(1, 1, 132), parts(1, 0, 132)), (1, 1));
        for (tiles, slices) in [(1, 5), (3, 17), (40, 96), (66, 100)] {
            assert!(parts(tiles, slices, 132) * tiles <= 132);
        }
    }

    #[test]
    fn the_last_tiles_are_divided_where_that_fills_the_multiprocessors() {
        let of = |rows, columns, slices| {
            let Tiles { whole, parts } = tiles(rows, columns, slices, 66);
            (whole, parts)
        };
        // BLOOM-1b1's with 6,144 tokens: dX of up and of QKV, and dW of up
        assert_eq!(of(24, 6, 96), (22, 5));
        assert_eq!(of(24, 6, 72), (22, 4));
        // dX of a chunk of logits; dW of dense
        assert_eq!(of(4, 6, 3920), (0, 8));
        assert_eq!(of(6, 6, 96), (6, 1));
        // nothing to gain: whole waves, or too little work
        assert_eq!(of(22, 6, 96), (22, 1));
        assert_eq!(of(24, 6, 4), (24, 1));
        for (rows, columns, slices) in [(1, 1, 0), (1, 1, 1), (3, 5, 17), (980, 6, 16)] {
            let t = tiles(rows, columns, slices, 66);
            assert!(t.whole <= rows && t.parts <= slices.max(1), "{t:?}");
        }
    }
}
