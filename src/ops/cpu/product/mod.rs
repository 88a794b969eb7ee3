//! y = x W^T for inference: weights `[outputs, inputs]` in the type and place they are stored in.
//!
//! Dot-product form: lanes run along the inner dimension, so that mapped files are read as they lie. A tile
//! is 4 tokens by 6 rows of weights (24 vector sums in registers, 10 loads for 24 multiply-adds). A task
//! takes a panel of rows, whose chunk of [`CHUNK`] inner elements stays in the first-level cache while all tokens
//! pass by it from the second: each weight is read from memory once a call. An output's sum runs over lanes,
//! then chunks, in an order that depends on the inner size alone: a token's result is the same in every batch.

mod dot;
mod weights;

pub use dot::Element;
pub use weights::{Int8, Matrix};

use super::Cpu;
use super::simd::Isa;
use super::threads::Disjoint;
use dot::{Dot, Float, Int8Portable};
use half::bf16;
use std::cell::RefCell;
use std::ops::Range;

/// Inner elements that are summed before the next chunk begins: six rows of it fit the first-level cache.
const CHUNK: usize = 2048;
/// Most rows of weights of one task.
const PANEL: usize = 96;
/// Most tokens that pass a panel at once: their activations stay in the second-level cache.
const TOKENS: usize = 192;
/// Activations are padded with zeros to a multiple of this many elements.
const PAD: usize = 64;

/// Receives finished outputs: the token, the first row of the panel, and its sums.
pub type Finish<'a> = dyn Fn(usize, usize, &mut [f32]) + Sync + 'a;

/// Computes x W^T for `x` = `[tokens, inputs]`, and hands every token's outputs to `finish`, panel by panel.
pub fn product(cpu: &Cpu, x: &[f32], weights: &Matrix, finish: &Finish) {
    match weights {
        Matrix::F32(w) => float(cpu, x, w, weights, finish),
        Matrix::F16(w) => float(cpu, x, w, weights, finish),
        #[cfg(target_arch = "x86_64")]
        Matrix::Bf16(w) if cpu.isa == Isa::Avx512Bf16 => {
            let inputs = weights.cols();
            let (a, width) = prepare(cpu, x, inputs, bf16::from_f32);
            run::<dot::Bf16Avx512>(cpu, panel_bf16, &a, width, &w.data, weights, |s, _, _| s, finish);
        }
        Matrix::Bf16(w) => float(cpu, x, w, weights, finish),
        Matrix::Int8(w) => int8(cpu, x, w, weights, finish),
    }
}

fn float<E: Element>(cpu: &Cpu, x: &[f32], w: &weights::Plain<E>, shape: &Matrix, finish: &Finish)
where
    E: bytemuck::Pod,
{
    let (a, width) = prepare(cpu, x, shape.cols(), |v| v);
    let scale = |s: f32, _, _| s;
    match cpu.isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => {
            use super::simd::Avx512;
            run::<Float<Avx512, E>>(cpu, panel_avx512::<Float<Avx512, E>>, &a, width, &w.data, shape, scale, finish)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            use super::simd::Avx2;
            run::<Float<Avx2, E>>(cpu, panel_avx2::<Float<Avx2, E>>, &a, width, &w.data, shape, scale, finish)
        }
        _ => {
            use super::simd::Portable;
            run::<Float<Portable, E>>(cpu, panel::<Float<Portable, E>>, &a, width, &w.data, shape, scale, finish)
        }
    }
}

fn int8(cpu: &Cpu, x: &[f32], w: &Int8, shape: &Matrix, finish: &Finish) {
    let inputs = shape.cols();
    let tokens = x.len() / inputs;
    let width = inputs.next_multiple_of(PAD);
    // each token is scaled by its largest element; 128 is zero
    let mut scales = vec![0f32; tokens];
    let mut a = vec![128u8; tokens * width];
    {
        let (scales, a) = (Disjoint::new(&mut scales), Disjoint::new(&mut a));
        cpu.threads.run_ranges(tokens, 4, |r| {
            for t in r {
                // SAFETY: every token is one task's.
                let (scale, a) = unsafe { (scales.slice(t..t + 1), a.slice(t * width..t * width + inputs)) };
                scale[0] = weights::quantize(&x[t * inputs..(t + 1) * inputs], |i, q| a[i] = (q + 128) as u8);
            }
        });
    }
    let scale = |s: i32, t: usize, row: usize| (s - 128 * w.sums[row]) as f32 * (scales[t] * w.scales[row]);
    match cpu.isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => run::<dot::Int8Vnni>(cpu, panel_vnni, &a, width, &w.data, shape, scale, finish),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx2 => {
            run::<dot::Int8Avx2>(cpu, panel_avx2::<dot::Int8Avx2>, &a, width, &w.data, shape, scale, finish)
        }
        _ => run::<Int8Portable>(cpu, panel::<Int8Portable>, &a, width, &w.data, shape, scale, finish),
    }
}

/// Activations as the products want them, padded with zeros; returns them and their row width.
fn prepare<A: Copy + Default + Send>(cpu: &Cpu, x: &[f32], inputs: usize, convert: impl Fn(f32) -> A + Sync) -> (Vec<A>, usize) {
    let width = inputs.next_multiple_of(PAD);
    let tokens = x.len() / inputs;
    let mut a = vec![A::default(); tokens * width];
    let out = Disjoint::new(&mut a);
    cpu.threads.run_ranges(tokens, 4, |r| {
        for t in r {
            // SAFETY: every token is one task's.
            let row = unsafe { out.slice(t * width..t * width + inputs) };
            for (a, x) in row.iter_mut().zip(&x[t * inputs..(t + 1) * inputs]) {
                *a = convert(*x);
            }
        }
    });
    (a, width)
}

/// A panel's computation: `(weights, inputs, rows, activations, their width, tokens, sums [tokens, rows])`.
type Panel<D> = unsafe fn(&[<D as Dot>::W], usize, Range<usize>, &[<D as Dot>::A], usize, Range<usize>, &mut [<D as Dot>::Sum]);

thread_local! {
    static OUTPUTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

#[allow(clippy::too_many_arguments)]
fn run<D: Dot>(
    cpu: &Cpu,
    panel: Panel<D>,
    a: &[D::A],
    width: usize,
    w: &[D::W],
    shape: &Matrix,
    scale: impl Fn(D::Sum, usize, usize) -> f32 + Sync,
    finish: &Finish,
) {
    let (rows, inputs) = (shape.rows(), shape.cols());
    let tokens = a.len() / width;
    assert_eq!(w.len(), rows * inputs);
    // panels small enough that the threads end together
    let share = rows.div_ceil(cpu.threads.count() * 8).next_multiple_of(6);
    let panel_rows = share.min(PANEL);
    for first in (0..tokens).step_by(TOKENS) {
        let tokens = first..(first + TOKENS).min(tokens);
        cpu.threads.run(rows.div_ceil(panel_rows), |p| {
            let rows = p * panel_rows..((p + 1) * panel_rows).min(rows);
            let n = rows.len();
            let mut sums = [D::Sum::default(); 4 * PANEL];
            let mut large = Vec::new();
            let sums = if tokens.len() <= 4 {
                &mut sums[..tokens.len() * n]
            } else {
                large.resize(tokens.len() * n, D::Sum::default());
                &mut large[..]
            };
            // SAFETY: the instruction set was matched with `cpu.isa`; sizes were checked above.
            unsafe { panel(w, inputs, rows.clone(), a, width, tokens.clone(), sums) };
            OUTPUTS.with_borrow_mut(|outputs| {
                outputs.resize(n, 0.0);
                for (t, sums) in tokens.clone().zip(sums.chunks_exact(n)) {
                    for ((out, sum), row) in outputs.iter_mut().zip(sums).zip(rows.clone()) {
                        *out = scale(*sum, t, row);
                    }
                    finish(t, rows.start, outputs);
                }
            });
        });
    }
}

/// # Safety
/// Needs the instruction set of `D`; `rows` and `tokens` lie inside `w` and `a`, `sums` is zero.
#[inline(always)]
unsafe fn panel<D: Dot>(
    w: &[D::W],
    inputs: usize,
    rows: Range<usize>,
    a: &[D::A],
    width: usize,
    tokens: Range<usize>,
    sums: &mut [D::Sum],
) {
    let n = rows.len();
    let (tile_m, tile_n) = if D::WIDE { (4, 6) } else { (2, 2) };
    for k in (0..inputs).step_by(CHUNK) {
        let kn = CHUNK.min(inputs - k);
        let mut i = 0;
        while i < n {
            let height = if n - i >= tile_n { tile_n } else { 1 };
            let mut t = tokens.start;
            while t < tokens.end {
                let m = tile_m.min(tokens.end - t);
                // SAFETY: the caller's contract.
                unsafe {
                    let w = w.as_ptr().add((rows.start + i) * inputs + k);
                    let a = a.as_ptr().add(t * width + k);
                    let out = sums.as_mut_ptr().add((t - tokens.start) * n + i);
                    match (m, height) {
                        (4, 6) => tile::<D, 4, 6>(w, inputs, a, width, kn, out, n),
                        (3, 6) => tile::<D, 3, 6>(w, inputs, a, width, kn, out, n),
                        (2, 6) => tile::<D, 2, 6>(w, inputs, a, width, kn, out, n),
                        (1, 6) => tile::<D, 1, 6>(w, inputs, a, width, kn, out, n),
                        (2, 2) => tile::<D, 2, 2>(w, inputs, a, width, kn, out, n),
                        (1, 2) => tile::<D, 1, 2>(w, inputs, a, width, kn, out, n),
                        (4, 1) => tile::<D, 4, 1>(w, inputs, a, width, kn, out, n),
                        (3, 1) => tile::<D, 3, 1>(w, inputs, a, width, kn, out, n),
                        (2, 1) => tile::<D, 2, 1>(w, inputs, a, width, kn, out, n),
                        _ => tile::<D, 1, 1>(w, inputs, a, width, kn, out, n),
                    }
                }
                t += m;
            }
            i += height;
        }
    }
}

/// Adds the products of M tokens with N rows over `k` inner elements to `out`.
///
/// # Safety
/// As for [`panel`].
#[inline(always)]
unsafe fn tile<D: Dot, const M: usize, const N: usize>(
    w: *const D::W,
    w_stride: usize,
    a: *const D::A,
    a_stride: usize,
    k: usize,
    out: *mut D::Sum,
    out_stride: usize,
) {
    unsafe {
        let mut acc = [[D::zero(); N]; M];
        let full = k / D::STEP * D::STEP;
        let mut i = 0;
        while i < full {
            let ws: [D::Wv; N] = std::array::from_fn(|n| D::load_w(w.add(n * w_stride + i)));
            for (m, row) in acc.iter_mut().enumerate() {
                let x = D::load_a(a.add(m * a_stride + i));
                for (acc, w) in row.iter_mut().zip(ws) {
                    *acc = D::dot(*acc, w, x);
                }
            }
            i += D::STEP;
        }
        if i < k {
            let ws: [D::Wv; N] = std::array::from_fn(|n| D::load_w_partial(w.add(n * w_stride + i), k - i));
            for (m, row) in acc.iter_mut().enumerate() {
                let x = D::load_a(a.add(m * a_stride + i));
                for (acc, w) in row.iter_mut().zip(ws) {
                    *acc = D::dot(*acc, w, x);
                }
            }
        }
        // sums in groups of sixteen, what is left one by one
        let at = |j: usize| acc[j / N][j % N];
        let mut done = 0;
        while M * N - done >= 8 && M * N >= 8 {
            let count = (M * N - done).min(16);
            let group: [D::Acc; 16] = std::array::from_fn(|j| at((done + j).min(M * N - 1)));
            let sums = D::sum16(&group);
            for (j, sum) in sums.into_iter().enumerate().take(count) {
                *out.add((done + j) / N * out_stride + (done + j) % N) += sum;
            }
            done += count;
        }
        while done < M * N {
            *out.add(done / N * out_stride + done % N) += D::sum(at(done));
            done += 1;
        }
    }
}

/// Instances of [`panel`] compiled with their instruction sets.
#[cfg(target_arch = "x86_64")]
mod instances {
    use super::dot::{Bf16Avx512, Dot, Int8Vnni};
    use super::panel;
    use std::ops::Range;

    macro_rules! instance {
        ($name:ident $(<$g:ident>)?, $d:ty, $features:literal) => {
            #[target_feature(enable = $features)]
            pub unsafe fn $name $(<$g: Dot>)? (
                w: &[<$d as Dot>::W],
                inputs: usize,
                rows: Range<usize>,
                a: &[<$d as Dot>::A],
                width: usize,
                tokens: Range<usize>,
                sums: &mut [<$d as Dot>::Sum],
            ) {
                unsafe { panel::<$d>(w, inputs, rows, a, width, tokens, sums) }
            }
        };
    }
    instance!(panel_bf16, Bf16Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c");
    instance!(panel_vnni, Int8Vnni, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c");
    instance!(panel_avx512<D>, D, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");
    instance!(panel_avx2<D>, D, "avx2,fma,f16c");
}
#[cfg(target_arch = "x86_64")]
use instances::{panel_avx2, panel_avx512, panel_bf16, panel_vnni};

