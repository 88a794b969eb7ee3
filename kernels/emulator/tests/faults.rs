//! Each kind of fault is reported, and right kernels are not.

use kernel_emulator::{Emulator, Shape, TensorMapConfig, tensor_map};

const SHAPE: Shape = Shape {
    grid: [1, 1, 1],
    threads: 32,
    shared_bytes: 0,
    cooperative: false,
    cluster: 1,
    dependent: false,
};

/// Tiles of 8 rows by 64 of a matrix of 9 rows of 16 elements.
fn tiles(address: u64) -> TensorMapConfig {
    TensorMapConfig {
        address,
        global_dim: [16, 9],
        global_stride: 32,
        box_dim: [64, 8],
        element_strides: [1, 1],
        swizzle: 3,
    }
}

/// Runs a faulty kernel on a buffer of 32 words (and more arguments) and returns the report.
fn report(kernel: &str, shape: Shape, check_order: bool, more: &[&[u8]]) -> String {
    let mut device = Emulator::new(1 << 24);
    device.check_order = check_order;
    let out = device.allocate(4 * shape.threads as usize).unwrap();
    let out = out.to_ne_bytes();
    let mut args: Vec<&[u8]> = vec![&out];
    args.extend(more);
    device.launch(kernel, shape, &args).expect_err("the kernel is wrong")
}

#[track_caller]
fn says(report: &str, words: &str) {
    assert!(report.contains(words), "the report is {report:?}, it should say {words:?}");
}

#[test]
fn a_barrier_that_one_thread_avoids() {
    let r = report("fault_divergent_barrier", Shape { threads: 64, ..SHAPE }, false, &[]);
    says(&r, "fault_divergent_barrier: block [0, 0, 0]: deadlock: 63 threads wait");
    says(&r, "barrier 0 for 64; 1 of 64 have ended");
}

#[test]
fn a_warp_in_two_operations() {
    let r = report("fault_divergent_warp", SHAPE, false, &[]);
    says(&r, "warp_sync");
    says(&r, "shuffle_xor");
}

#[test]
fn a_deadlock() {
    says(&report("fault_deadlock", Shape { threads: 64, ..SHAPE }, false, &[]), "deadlock");
}

#[test]
fn accesses_out_of_bounds() {
    // the buffer has 16 words, the kernel writes one more
    let device = Emulator::new(1 << 24);
    let out = device.allocate(64).unwrap().to_ne_bytes();
    let r = device.launch("fault_out_of_bounds", SHAPE, &[&out, &16u32.to_ne_bytes()]).unwrap_err();
    says(
        &r,
        "fault_out_of_bounds: block [0, 0, 0], thread 16: write of 4 bytes of device memory that \
        is out of bounds",
    );
    let null = 0u64.to_ne_bytes();
    says(
        &device.launch("fault_out_of_bounds", SHAPE, &[&null, &1u32.to_ne_bytes()]).unwrap_err(),
        "out of bounds",
    );
}

#[test]
fn shared_memory_out_of_bounds() {
    let r = report("fault_shared_out_of_bounds", Shape { shared_bytes: 128, ..SHAPE }, false, &[]);
    says(&r, "thread 31: write of 4 bytes");
    says(&r, "out of bounds");
}

#[test]
fn memory_that_nothing_wrote() {
    let device = Emulator::new(1 << 24);
    let (out, unwritten) = (device.allocate(128).unwrap(), device.allocate(128).unwrap());
    let args: [&[u8]; 2] = [&out.to_ne_bytes(), &unwritten.to_ne_bytes()];
    let r = device.launch("fault_unwritten", SHAPE, &args).unwrap_err();
    says(&r, "read of 4 bytes of device memory that is never written");
    // and the host may not read it either
    says(&device.read(unwritten, &mut [0; 4]).unwrap_err(), "never written");
    device.write(unwritten, &[1; 128]).unwrap();
    device.launch("fault_unwritten", SHAPE, &args).unwrap();
    device.free(unwritten);
    says(&device.launch("fault_unwritten", SHAPE, &args).unwrap_err(), "freed");
    let r = report("fault_shared_unwritten", Shape { shared_bytes: 128, ..SHAPE }, false, &[]);
    says(&r, "thread 0: read of 4 bytes at byte 0 of shared memory, which nothing wrote");
}

#[test]
fn results_that_depend_on_the_order() {
    let shape = Shape { threads: 64, shared_bytes: 256, ..SHAPE };
    says(&report("fault_missing_barrier", shape, true, &[]), "depends on the order of threads");
}

#[test]
fn a_copy_that_is_not_awaited() {
    let mut device = Emulator::new(1 << 24);
    device.check_order = true;
    let (out, data) = (device.allocate(512).unwrap(), device.allocate(512).unwrap());
    device.write(data, &(0..=255).chain(0..=255).collect::<Vec<u8>>()).unwrap();
    let args: [&[u8]; 2] = [&out.to_ne_bytes(), &data.to_ne_bytes()];
    let shape = Shape { shared_bytes: 512, ..SHAPE };
    says(
        &device.launch("fault_cp_async_not_awaited", shape, &args).unwrap_err(),
        "which nothing wrote",
    );
    device.launch("cp_async_awaited", shape, &args).unwrap();
    let mut bytes = [0; 512];
    device.read(out, &mut bytes).unwrap();
    assert_eq!(bytes[..16], (240..=255).collect::<Vec<u8>>());
}

#[test]
fn barrier_objects() {
    let shape = Shape { shared_bytes: 64, ..SHAPE };
    let r = report("fault_phase_never_ends", shape, false, &[]);
    says(&r, "deadlock: 32 threads wait as thread 0 does, for the end of a phase of parity 0");
    says(&r, "bytes: 128");
    says(&report("fault_mbarrier_not_initialized", shape, false, &[]), "not initialized");
}

#[test]
fn tiles_by_tma() {
    let mut device = Emulator::new(1 << 24);
    device.check_order = true;
    // 9 rows of 16 elements that say where they are
    let (data, out) = (device.allocate(288).unwrap(), device.allocate(128).unwrap());
    let values: Vec<u8> =
        (0..9u16).flat_map(|r| (0..16u16).flat_map(move |c| (r * 100 + c).to_le_bytes())).collect();
    device.write(data, &values).unwrap();
    let map: Vec<u8> =
        tensor_map(&tiles(data)).unwrap().iter().flat_map(|w| w.to_ne_bytes()).collect();
    let args: [&[u8]; 2] = [&map, &out.to_ne_bytes()];
    let shape = Shape { threads: 64, shared_bytes: 2048, ..SHAPE };
    let r = device.launch("fault_tile_not_awaited", shape, &args).unwrap_err();
    assert!(r.contains("nothing wrote") || r.contains("depends on the order"), "{r}");
    let r = device.launch("fault_tile_overwritten", shape, &args).unwrap_err();
    says(&r, "depends on the order");
    let own: [&[u8]; 3] = [&map, &out.to_ne_bytes(), &data.to_ne_bytes()];
    let r = device.launch("fault_tile_of_own_stores", shape, &own).unwrap_err();
    says(&r, "this launch wrote, and no fence is between the proxies");
    device.launch("tile_awaited", shape, &args).unwrap();
    let mut bytes = [0; 128];
    device.read(out, &mut bytes).unwrap();
    let row: Vec<u16> = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    // the tile begins at row 1, column 8; its first row is not swizzled, and beyond the matrix
    // there are zeros
    let expected: Vec<u16> = (108..116).chain([0; 56]).collect();
    assert_eq!(row, expected);
}

/// In the natural order wgmma happens when it is waited for: what is used before is old. In the
/// other it happens at once.
#[test]
fn wgmma_of_a_warpgroup() {
    let mut device = Emulator::new(1 << 24);
    let out = device.allocate(512).unwrap();
    let run = |device: &Emulator, mistake: u32| -> Result<Vec<f32>, String> {
        let shape = Shape { threads: 128, shared_bytes: 16384, ..SHAPE };
        let mut bytes = [0; 512];
        device.launch("wgmma_awaited", shape, &[&out.to_ne_bytes(), &mistake.to_ne_bytes()])?;
        device.read(out, &mut bytes)?;
        Ok(floats(&bytes))
    };
    assert_eq!(run(&device, 0), Ok(vec![16.0; 128]));
    assert_eq!(run(&device, 1), Ok(vec![0.0; 128]), "used before the wait");
    device.check_order = true;
    assert_eq!(run(&device, 0), Ok(vec![16.0; 128]));
    for (mistake, words) in [
        (1, "depends on the order"),
        (2, "wgmma reads an operand at byte 1024 of shared memory, which nothing wrote"),
        (3, "which was stored without a fence between the proxies"),
        (4, "it ends before its wgmma are waited for"),
        (5, "byte 0 of shared memory, which was stored without a fence between the proxies"),
        (6, "wgmma without a wgmma.fence before"),
        (7, "wgmma reads registers that were changed after the last wgmma.fence"),
        (8, "in wgmma.fence"),
        (9, "bits in reserved fields or a base offset"),
        (10, "begins within a group of 8 rows, without a base offset"),
    ] {
        says(&run(&device, mistake).unwrap_err(), words);
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[test]
fn blocks_of_a_cooperative_launch_wait_for_each_other() {
    let device = Emulator::new(1 << 24);
    let (out, counter) = (device.allocate(40).unwrap(), device.allocate(4).unwrap());
    device.write(counter, &[0; 4]).unwrap();
    let shape = Shape { grid: [5, 1, 1], cooperative: true, ..SHAPE };
    device.launch("grid_awaited", shape, &[&out.to_ne_bytes(), &counter.to_ne_bytes()]).unwrap();
    let mut bytes = [0; 40];
    device.read(out, &mut bytes).unwrap();
    let words: Vec<u32> =
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!(words, [1, 2, 3, 4, 5, 2, 3, 4, 5, 1]);
}

#[test]
fn blocks_of_a_cluster_read_each_others_shared_memory() {
    let mut device = Emulator::new(1 << 24);
    device.check_order = true;
    let out = device.allocate(6 * 32 * 4).unwrap();
    let shape = Shape { grid: [6, 1, 1], shared_bytes: 128, cluster: 3, ..SHAPE };
    let run = |mistake: u32| {
        device.launch("cluster_awaited", shape, &[&out.to_ne_bytes(), &mistake.to_ne_bytes()])
    };
    run(0).unwrap();
    says(&run(1).unwrap_err(), "of shared memory, which nothing wrote");
    says(&run(2).unwrap_err(), "which has ended");
    says(&run(3).unwrap_err(), "block 3 of a cluster of 3");
    says(&run(4).unwrap_err(), "deadlock");
    let odd = device.launch(
        "cluster_awaited",
        Shape { cluster: 4, ..shape },
        &[&out.to_ne_bytes(), &[0; 4]],
    );
    says(&odd.unwrap_err(), "no clusters of 4 in a grid of [6, 1, 1]");
    let mut bytes = [0; 6 * 32 * 4];
    device.read(out, &mut bytes).unwrap();
    let first: Vec<u32> =
        bytes.chunks_exact(128).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!(first, [1, 2, 0, 4, 5, 3], "each block gets its neighbour's number");
}

#[test]
fn tiles_that_a_cluster_shares() {
    let mut device = Emulator::new(1 << 24);
    device.check_order = true;
    let (data, out) = (device.allocate(288).unwrap(), device.allocate(8).unwrap());
    let values: Vec<u8> =
        (0..9u16).flat_map(|r| (0..16u16).flat_map(move |c| (r * 100 + c).to_le_bytes())).collect();
    device.write(data, &values).unwrap();
    let map: Vec<u8> =
        tensor_map(&tiles(data)).unwrap().iter().flat_map(|w| w.to_ne_bytes()).collect();
    let shape = Shape { grid: [4, 1, 1], shared_bytes: 3072, cluster: 2, ..SHAPE };
    let run = |mistake: u32| {
        device.launch(
            "shared_tiles_awaited",
            shape,
            &[&map, &out.to_ne_bytes(), &mistake.to_ne_bytes()],
        )
    };
    run(0).unwrap();
    let mut bytes = [0; 8];
    device.read(out, &mut bytes).unwrap();
    let sums: Vec<u16> = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    assert_eq!(sums, [145; 4], "rows 0, 1, 4, 5 in every block");
    says(&run(1).unwrap_err(), "depends on the order");
    says(&run(2).unwrap_err(), "which has ended");
    says(&run(3).unwrap_err(), "deadlock");
}

#[test]
fn launches_that_do_not_fit_the_kernel() {
    let device = Emulator::new(1 << 24);
    let out = device.allocate(4096).unwrap().to_ne_bytes();
    let launch =
        |kernel: &str, shape, args: &[&[u8]]| device.launch(kernel, shape, args).unwrap_err();
    says(&launch("no_such_kernel", SHAPE, &[&out]), "there is no kernel no_such_kernel");
    says(&launch("fault_deadlock", SHAPE, &[]), "arguments of [] bytes were given, it takes [8]");
    says(&launch("fault_deadlock", SHAPE, &[&[0; 4]]), "it takes [8]");
    says(
        &launch("fault_deadlock", Shape { threads: 96, ..SHAPE }, &[&out]),
        "96 threads a block, it is built for 64",
    );
    let much = Shape { shared_bytes: 300_000, ..SHAPE };
    says(&launch("fault_deadlock", much, &[&out]), "300000 bytes of shared memory");
}
