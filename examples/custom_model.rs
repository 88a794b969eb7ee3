//! A model of one's own, written in the operations that BLOOM is written in: layer norm, a linear
//! layer with GELU, another with a residual. `cargo run --release --example custom_model`.

use beautiful_prompt::Result;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::{Backend, Epilogue, LayerNorm, Linear, Tensor};
use beautiful_prompt::random::Normal;
use beautiful_prompt::tensor::{DType, HostTensor};

/// A residual MLP: y = x + down(gelu(up(norm(x)))). It runs on every backend.
struct Mlp<B: Backend> {
    norm: LayerNorm<B>,
    up: Linear<B>,
    down: Linear<B>,
}

/// What a forward pass needs between its operations, kept from pass to pass.
struct Activations<B: Backend> {
    normed: Tensor<B>,
    wide: Tensor<B>,
}

impl<B: Backend> Mlp<B> {
    fn random(backend: &B, width: usize, dtype: DType) -> Result<Mlp<B>> {
        let mut normal = Normal::new(1, 0);
        let mut linear = |outputs: usize, inputs: usize| -> Result<Linear<B>> {
            let std = 1.0 / (inputs as f32).sqrt();
            let weight: Vec<f32> = (0..outputs * inputs).map(|_| normal.sample() * std).collect();
            let bias = HostTensor::of_rows(&vec![0.0; outputs], outputs);
            Ok(Linear {
                weight: backend.weight(HostTensor::of_rows(&weight, inputs), Some(dtype))?,
                bias: backend.vector(&bias)?,
            })
        };
        let vector = |value: f32| backend.vector(&HostTensor::of_rows(&vec![value; width], width));
        Ok(Mlp {
            norm: LayerNorm { weight: vector(1.0)?, bias: vector(0.0)?, eps: 1e-5 },
            up: linear(4 * width, width)?,
            down: linear(width, 4 * width)?,
        })
    }

    fn forward(&self, b: &B, y: &mut Tensor<B>, x: &Tensor<B>, a: &mut Activations<B>) {
        b.layer_norm(&mut a.normed, x, &self.norm);
        b.linear(&mut a.wide, &a.normed, &self.up, Epilogue::BiasGelu);
        b.linear(y, &a.wide, &self.down, Epilogue::BiasResidual(x));
    }
}

fn main() -> Result<()> {
    let cpu = Cpu::new(0, Isa::detect());
    let width = 256;
    let input: Vec<f32> = (0..3 * width).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let x = cpu.upload(&input, width);
    for dtype in [DType::F32, DType::Bf16, DType::Int8] {
        let mlp = Mlp::random(&cpu, width, dtype)?;
        let mut a = Activations { normed: Tensor::default(), wide: Tensor::default() };
        let mut y = Tensor::default();
        mlp.forward(&cpu, &mut y, &x, &mut a);
        let [rows, columns] = y.shape();
        let first = &y.buffer()[..4];
        println!("{:>4}: [{rows}, {columns}], first numbers {first:.4?}", dtype.name());
    }
    Ok(())
}
