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

/// Into how many parts of how many slices the inner dimension is divided: as many as leave no
/// multiprocessor without a tile.
fn parts(tiles: usize, slices: usize, processors: usize) -> (usize, usize) {
    let wanted = (processors / tiles).clamp(1, slices.div_ceil(PART_SLICES).max(1));
    let each = slices.div_ceil(wanted).max(1);
    (slices.div_ceil(each).max(1), each)
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
        let tile = if hopper { (HOPPER_M, HOPPER_N) } else { (TILE, TILE) };
        let tiles = m.div_ceil(tile.0) * n.div_ceil(tile.1);
        let slices = (args.k as usize).div_ceil(SLICE);
        let (parts, part_slices) = match layout {
            Layout::Nt if hopper => (1, slices),
            _ => parts(tiles, slices, self.launcher.limits().processors as usize),
        };
        let mut args = GemmArgs { parts: parts as u32, part_slices: part_slices as u32, ..args };
        let mode = args.mode;
        if parts > 1 {
            let bytes = 4 * parts * m * (n.next_multiple_of(8) + 1);
            args.partials = self.place(&mut self.gemm_partials.borrow_mut(), bytes)?;
            args.mode = GEMM_PARTIAL;
        }
        if hopper {
            self.launch_gemm_hopper(layout, args)?;
        } else {
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
        let rows = m.div_ceil(HOPPER_M);
        // two blocks share B, unless much of the second one's work would be beyond the rows
        let cluster = if rows.is_multiple_of(2) || rows > 8 { 2 } else { 1 };
        let tiles = rows.div_ceil(cluster) * (e.width as usize).div_ceil(HOPPER_N);
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
    fn parts_fill_the_multiprocessors_and_cover_all_slices() {
        assert_eq!(parts(144, 96, 132), (1, 96));
        assert_eq!(parts(48, 3921, 132), (2, 1961));
        assert_eq!(parts(1, 1, 132), (1, 1));
        assert_eq!(parts(1, 0, 132), (1, 1));
        for (tiles, slices) in [(1, 5), (3, 17), (40, 96), (66, 100)] {
            let (parts, each) = parts(tiles, slices, 132);
            assert!(parts * tiles <= 132 && parts * each >= slices);
            assert!((parts - 1) * each < slices, "no part is empty");
        }
    }
}
