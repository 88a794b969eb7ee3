// Kernels with one fault each, of every kind that the emulator must report.
#include "cluster.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

// One thread does not come to the barrier.
KERNEL(fault_divergent_barrier, 64)(uint32_t* out) {
    if (threadIdx.x != 3) block_sync();
    out[threadIdx.x] = threadIdx.x;
}
EXPORT(fault_divergent_barrier)

// The two halves of a warp call different functions.
KERNEL(fault_divergent_warp, 32)(float* out) {
    if (threadIdx.x < 16) {
        warp_sync();
    } else {
        out[threadIdx.x] = shuffle_xor(1.0f, 1);
    }
}
EXPORT(fault_divergent_warp)

// Two named barriers, each of which waits for threads that are at the other.
KERNEL(fault_deadlock, 64)(uint32_t* out) {
    named_barrier_sync(threadIdx.x < 32 ? 1 : 2, 64);
    out[threadIdx.x] = 1;
}
EXPORT(fault_deadlock)

KERNEL(fault_out_of_bounds, 32)(uint32_t* out, uint32_t length) {
    if (threadIdx.x <= length) out[threadIdx.x] = 1; // one too many
}
EXPORT(fault_out_of_bounds)

KERNEL(fault_shared_out_of_bounds, 32)(uint32_t* out) {
    uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
    shared[threadIdx.x + 1] = threadIdx.x;
    out[threadIdx.x] = 0;
}
EXPORT(fault_shared_out_of_bounds)

KERNEL(fault_unwritten, 32)(uint32_t* out, const uint32_t* in) {
    out[threadIdx.x] = in[threadIdx.x];
}
EXPORT(fault_unwritten)

KERNEL(fault_shared_unwritten, 32)(uint32_t* out) {
    uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
    if (threadIdx.x > 0) shared[threadIdx.x] = 1;
    block_sync();
    out[threadIdx.x] = shared[threadIdx.x];
}
EXPORT(fault_shared_unwritten)

// Reads what another thread writes, without a barrier between.
KERNEL(fault_missing_barrier, 64)(uint32_t* out) {
    uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
    shared[threadIdx.x] = 0;
    block_sync();
    shared[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared[(threadIdx.x + 63) % 64];
}
EXPORT(fault_missing_barrier)

// Reads the destination of a cp.async before it has arrived.
KERNEL(fault_cp_async_not_awaited, 32)(Pack16B* out, const Pack16B* in) {
    Pack16B* shared = reinterpret_cast<Pack16B*>(shared_memory());
    cp_async(&shared[threadIdx.x], &in[threadIdx.x], true);
    cp_async_commit_group();
    cp_async_wait_group<1>(); // allows one group to be in flight: this one
    out[threadIdx.x] = shared[threadIdx.x];
}
EXPORT(fault_cp_async_not_awaited)

// The same without the fault.
KERNEL(cp_async_awaited, 32)(Pack16B* out, const Pack16B* in) {
    Pack16B* shared = reinterpret_cast<Pack16B*>(shared_memory());
    cp_async(&shared[threadIdx.x], &in[threadIdx.x], true);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    block_sync();
    out[threadIdx.x] = shared[31 - threadIdx.x];
}
EXPORT(cp_async_awaited)

// Waits for bytes that are never written.
KERNEL(fault_phase_never_ends, 32)(uint32_t* out) {
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared_memory());
    if (threadIdx.x == 0) mbarrier_init(barrier, 1);
    block_sync();
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(barrier, 128);
    mbarrier_wait_parity(barrier, 0);
    out[threadIdx.x] = 1;
}
EXPORT(fault_phase_never_ends)

// Uses an mbarrier before it is initialized.
KERNEL(fault_mbarrier_not_initialized, 32)(uint32_t* out) {
    mbarrier_arrive(reinterpret_cast<uint64_t*>(shared_memory()));
    out[threadIdx.x] = 1;
}
EXPORT(fault_mbarrier_not_initialized)

// Reads a tile that TMA is still copying.
KERNEL(fault_tile_not_awaited, 64)(const GRID_CONSTANT TensorMap map, uint16_t* out) {
    char* shared = shared_memory();
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(barrier, 1024);
        tma_load(shared, &map, 0, 0, barrier);
    }
    out[threadIdx.x] = reinterpret_cast<uint16_t*>(shared)[threadIdx.x];
}
EXPORT(fault_tile_not_awaited)

// The same without the fault.
KERNEL(tile_awaited, 64)(const GRID_CONSTANT TensorMap map, uint16_t* out) {
    char* shared = shared_memory();
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
    }
    block_sync();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(barrier, 1024);
        tma_load(shared, &map, 1, 8, barrier);
    }
    mbarrier_wait_parity(barrier, 0);
    out[threadIdx.x] = reinterpret_cast<uint16_t*>(shared)[threadIdx.x];
}
EXPORT(tile_awaited)

// Has TMA copy what the kernel itself wrote to device memory, without a fence between.
KERNEL(fault_tile_of_own_stores, 64)(const GRID_CONSTANT TensorMap map, uint16_t* out,
                                     uint16_t* data) {
    char* shared = shared_memory();
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
    if (threadIdx.x == 0) {
        data[40] = 7;
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(barrier, 1024);
        tma_load(shared, &map, 1, 8, barrier);
    }
    block_sync();
    mbarrier_wait_parity(barrier, 0);
    out[threadIdx.x] = reinterpret_cast<uint16_t*>(shared)[threadIdx.x];
}
EXPORT(fault_tile_of_own_stores)

// Has TMA copy the next tile while the last one is still read.
KERNEL(fault_tile_overwritten, 64)(const GRID_CONSTANT TensorMap map, uint16_t* out) {
    char* shared = shared_memory();
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
    }
    block_sync();
    for (uint32_t iteration = 0; iteration < 2; iteration++) {
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect_tx(barrier, 1024);
            tma_load(shared, &map, 1 + iteration, 8, barrier);
        }
        if (iteration == 0) {
            mbarrier_wait_parity(barrier, 0);
            block_sync();
        } else {
            out[threadIdx.x] = reinterpret_cast<uint16_t*>(shared)[threadIdx.x];
            mbarrier_wait_parity(barrier, 1);
        }
    }
}
EXPORT(fault_tile_overwritten)

// A wgmma of ones, with one of several mistakes or none.
enum Mistake : uint32_t {
    NONE,
    USED_EARLY,
    NOT_WRITTEN,
    OVERWRITTEN,
    NEVER_AWAITED,
    NO_PROXY_FENCE,
    NO_WGMMA_FENCE,
    CHANGED_REGISTERS,
    DIVERGED,
    BASE_OFFSET,
    SPLIT_GROUP
};
KERNEL(wgmma_awaited, 128)(float* out, uint32_t mistake) {
    // [64, 64] elements, of which 16 columns are used; all are equal, so that swizzling makes no
    // difference
    char* tile = shared_memory();
    for (int i = threadIdx.x; i < 64 * 32; i += 128) {
        if (mistake != NOT_WRITTEN || i != 8 * 32)
            reinterpret_cast<uint32_t*>(tile)[i] = pack<bf16>(1.0f, 1.0f);
    }
    if (mistake != NO_PROXY_FENCE) fence_proxy_async();
    block_sync();
    uint32_t a[4];
    for (int i = 0; i < 4; i++) a[i] = pack<bf16>(1.0f, 1.0f);
    float d[32] = {};
    if (mistake != NO_WGMMA_FENCE) wgmma_fence();
    if (mistake == DIVERGED && lane_index() == 7) wgmma_fence();
    uint64_t b = wgmma_descriptor(tile + (mistake == SPLIT_GROUP ? 128 : 0), 0);
    if (mistake == BASE_OFFSET) b |= uint64_t(1) << 49;
    wgmma_rs<bf16, 64, false>(d, a, b, true);
    if (mistake == CHANGED_REGISTERS) {
        a[1] = 0;
        wgmma_rs<bf16, 64, false>(d, a, b, true);
    }
    wgmma_commit_group();
    float early = d[0];
    if (mistake == OVERWRITTEN) {
        for (int i = threadIdx.x; i < 64 * 32; i += 128) reinterpret_cast<uint32_t*>(tile)[i] = 0;
    }
    if (mistake != NEVER_AWAITED) wgmma_wait_group<0>();
    wgmma_fence_operand(d);
    out[threadIdx.x] = mistake == USED_EARLY ? early : d[0];
}
EXPORT(wgmma_awaited)

// Blocks of a cooperative launch that wait for each other.
KERNEL(grid_awaited, 32)(uint32_t* out, uint32_t* counter) {
    if (threadIdx.x == 0) {
        out[blockIdx.x] = blockIdx.x + 1;
        atomic_increment(counter);
        wait_for_counter(counter, gridDim.x);
    }
    block_sync();
    if (threadIdx.x == 1) out[gridDim.x + blockIdx.x] = out[(blockIdx.x + 1) % gridDim.x];
}
EXPORT(grid_awaited)

// Blocks of a cluster that read each other's shared memory between two barriers, with one of
// several mistakes or none.
enum ClusterMistake : uint32_t { READ_EARLY = 1, LEFT_EARLY, BEYOND, ONE_MISSING };
KERNEL(cluster_awaited, 32)(uint32_t* out, uint32_t mistake) {
    float* mine = reinterpret_cast<float*>(shared_memory()) + threadIdx.x;
    uint32_t rank = cluster_rank(),
             next = mistake == BEYOND ? cluster_size() : (rank + 1) % cluster_size();
    *mine = static_cast<float>(blockIdx.x);
    if (mistake == ONE_MISSING && threadIdx.x == 0) named_barrier_sync(1, 32);
    if (mistake != READ_EARLY) cluster_sync();
    if (mistake == LEFT_EARLY && rank == 1) return;
    if (mistake == LEFT_EARLY) block_sync();
    out[blockIdx.x * 32 + threadIdx.x] = static_cast<uint32_t>(*map_shared_rank(mine, next));
    cluster_sync();
}
EXPORT(cluster_awaited)

// Each block of a cluster multicasts one tile to all of them and reads the first number of each,
// with one of several mistakes or none.
enum SharingMistake : uint32_t { SECOND_AT_ONCE = 1, FIRST_LEAVES, ONE_ARRIVAL_LESS };
KERNEL(shared_tiles_awaited, 32)(const GRID_CONSTANT TensorMap map, uint16_t* out,
                                 uint32_t mistake) {
    char* shared = shared_memory();
    uint64_t *full = reinterpret_cast<uint64_t*>(shared + 2048), *empty = full + 1;
    uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(empty, cluster_size());
        fence_mbarrier_init();
    }
    cluster_sync();
    if (mistake == FIRST_LEAVES && rank == 0) return;
    uint32_t sum = 0;
    for (uint32_t iteration = 0; iteration < 2; iteration++) {
        if (threadIdx.x == 0) {
            if (iteration > 0 && mistake != SECOND_AT_ONCE) mbarrier_wait_parity(empty, 0);
            mbarrier_arrive_expect_tx(full, cluster_size() * 1024);
            tma_load_multicast((1 << cluster_size()) - 1, shared + rank * 1024, &map,
                               rank + 4 * iteration, 0, full);
        }
        warp_sync();
        mbarrier_wait_parity(full, iteration);
        for (uint32_t i = 0; i < 8 * rank; i++) warp_sync(); // makes the second block slower
        for (uint32_t i = 0; i < cluster_size(); i++)
            sum = sum * 10 + *reinterpret_cast<uint16_t*>(shared + i * 1024) / 100;
        warp_sync();
        if (threadIdx.x < cluster_size() && !(mistake == ONE_ARRIVAL_LESS && rank == 1))
            mbarrier_arrive_cluster(empty, threadIdx.x);
    }
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
    cluster_sync();
}
EXPORT(shared_tiles_awaited)
