//! Ranks whose devices are emulated train what one does.

use crate::emulated::{Emulated, gpu};
use beautiful_prompt::checkpoint::Companions;
use beautiful_prompt::models::bloom::BloomConfig;
use beautiful_prompt::models::bloom::training::TrainModel;
use beautiful_prompt::ops::cuda::Cuda;
use beautiful_prompt::ops::train::TrainBackend;
use beautiful_prompt::tensor::DType;
use beautiful_prompt::train::parallel::host::HostCommunicator;
use beautiful_prompt::train::parallel::mesh::Mesh;
use beautiful_prompt::train::report::StepMetrics;
use beautiful_prompt::train::run::{Observer, Run};
use beautiful_prompt::train::sft::Sft;
use std::path::Path;
use std::sync::atomic::AtomicBool;

struct Losses(Vec<f64>);

impl Observer for Losses {
    fn step(&mut self, _: u64, metrics: &StepMetrics) {
        self.0.push(metrics.loss);
    }
}

/// The losses that a rank sees, and its weights in the end.
fn rank(mesh: Mesh, output: &Path) -> (Vec<f64>, Vec<f32>) {
    let backend = Cuda::<Emulated>::new(gpu(false, false), DType::Bf16, false);
    let communicator = HostCommunicator::with_buckets(mesh, 4000).unwrap();
    let config = BloomConfig::new(44, 32, 1, 1);
    let mut options = crate::model::options(output);
    options.max_steps = 4;
    let mut sft = Run {
        backend: &backend,
        communicator: &communicator,
        model: TrainModel::random(config, 1).place(&backend).unwrap(),
        companions: Companions::default(),
        task: Sft { train: crate::model::examples(0..20), validation: vec![] },
        options,
    };
    let mut losses = Losses(vec![]);
    sft.run(false, &AtomicBool::new(false), &mut losses).unwrap();
    let values = backend.values(&sft.model.values).unwrap().into_owned();
    (losses.0, values)
}

#[test]
fn ranks_have_the_losses_and_weights_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let run = |ranks: usize| {
        let output = folder.path().join(ranks.to_string());
        std::fs::create_dir_all(&output).unwrap();
        std::thread::scope(|s| {
            let output = &output;
            let start = |mesh| s.spawn(move || rank(mesh, output));
            let threads: Vec<_> = Mesh::in_process(ranks).into_iter().map(start).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
        })
    };
    let (losses, values) = run(1).remove(0);
    assert_eq!(losses.len(), 4);
    for ranks in [2, 4] {
        let all = run(ranks);
        for (ours, theirs) in all[0].0.iter().zip(&losses) {
            // weights and activations are rounded to 8 bits, after sums in another order
            assert!((ours - theirs).abs() < 2e-3 * theirs, "{ranks} ranks: {ours} for {theirs}");
        }
        assert!((all[0].0[0] - losses[0]).abs() < 1e-6 * losses[0]);
        assert!(all.iter().all(|(_, v)| *v == all[0].1), "the ranks' weights differ");
        let difference: f32 =
            all[0].1.iter().zip(&values).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        let norm = values.iter().map(|v| v * v).sum::<f32>().sqrt();
        assert!(difference < 5e-3 * norm, "{difference} of {norm}");
    }
}
