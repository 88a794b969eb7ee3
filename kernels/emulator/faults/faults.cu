// Kernels that are wrong, one for each kind of fault that the emulator must report.
#include "cluster.cuh"
#include "memory.cuh"
#include "tensor_core.cuh"
#include "warpgroup.cuh"

// One thread does not come to the barrier.
KERNEL(fault_divergent_barrier, 64)(uint32_t* out) {
    if (threadIdx.x != 3) sync_block();
    out[threadIdx.x] = threadIdx.x;
}
EXPORT(fault_divergent_barrier)

// Half of a warp is in one operation, half in another.
KERNEL(fault_divergent_warp, 32)(float* out) {
    if (threadIdx.x < 16) {
        sync_warp();
    } else {
        out[threadIdx.x] = shuffle_xor(1.0f, 1);
    }
}
EXPORT(fault_divergent_warp)

// Two named barriers, each waiting for the other's threads.
KERNEL(fault_deadlock, 64)(uint32_t* out) {
    sync_some(threadIdx.x < 32 ? 1 : 2, 64);
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
    sync_block();
    out[threadIdx.x] = shared[threadIdx.x];
}
EXPORT(fault_shared_unwritten)

// Reads its neighbour's number without waiting for it.
KERNEL(fault_missing_barrier, 64)(uint32_t* out) {
    uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
    shared[threadIdx.x] = 0;
    sync_block();
    shared[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared[(threadIdx.x + 63) % 64];
}
EXPORT(fault_missing_barrier)

// Uses what a copy brings before it has come.
KERNEL(fault_copy_not_awaited, 32)(Eight* out, const Eight* in) {
    Eight* shared = reinterpret_cast<Eight*>(shared_memory());
    copy_async(&shared[threadIdx.x], &in[threadIdx.x], true);
    copy_commit();
    copy_wait<1>(); // one group may still be on its way: this one
    out[threadIdx.x] = shared[threadIdx.x];
}
EXPORT(fault_copy_not_awaited)

// The same kernel, right.
KERNEL(copy_awaited, 32)(Eight* out, const Eight* in) {
    Eight* shared = reinterpret_cast<Eight*>(shared_memory());
    copy_async(&shared[threadIdx.x], &in[threadIdx.x], true);
    copy_commit();
    copy_wait<0>();
    sync_block();
    out[threadIdx.x] = shared[31 - threadIdx.x];
}
EXPORT(copy_awaited)

// Waits for bytes that nobody sends.
KERNEL(fault_phase_never_ends, 32)(uint32_t* out) {
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared_memory());
    if (threadIdx.x == 0) barrier_init(barrier, 1);
    sync_block();
    if (threadIdx.x == 0) barrier_arrive_expecting(barrier, 128);
    barrier_wait(barrier, 0);
    out[threadIdx.x] = 1;
}
EXPORT(fault_phase_never_ends)

// Uses a barrier object before it is initialized.
KERNEL(fault_barrier_not_initialized, 32)(uint32_t* out) {
    barrier_arrive(reinterpret_cast<uint64_t*>(shared_memory()));
    out[threadIdx.x] = 1;
}
EXPORT(fault_barrier_not_initialized)

// Reads a tile that another thread asks for, without waiting for it.
KERNEL(fault_tile_not_awaited, 64)(const GRID_CONSTANT TensorMap map, uint16_t* out) {
    char* shared = shared_memory();
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_arrive_expecting(barrier, 1024);
        copy_tile(shared, &map, 0, 0, barrier);
    }
    out[threadIdx.x] = reinterpret_cast<uint16_t*>(shared)[threadIdx.x];
}
EXPORT(fault_tile_not_awaited)

// The same kernel, right.
KERNEL(tile_awaited, 64)(const GRID_CONSTANT TensorMap map, uint16_t* out) {
    char* shared = shared_memory();
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_done();
    }
    sync_block();
    if (threadIdx.x == 0) {
        barrier_arrive_expecting(barrier, 1024);
        copy_tile(shared, &map, 1, 8, barrier);
    }
    barrier_wait(barrier, 0);
    out[threadIdx.x] = reinterpret_cast<uint16_t*>(shared)[threadIdx.x];
}
EXPORT(tile_awaited)

// Asks for the next tile while the last one is still read.
KERNEL(fault_tile_overwritten, 64)(const GRID_CONSTANT TensorMap map, uint16_t* out) {
    char* shared = shared_memory();
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_done();
    }
    sync_block();
    for (uint32_t turn = 0; turn < 2; turn++) {
        if (threadIdx.x == 0) {
            barrier_arrive_expecting(barrier, 1024);
            copy_tile(shared, &map, 1 + turn, 8, barrier);
        }
        if (turn == 0) {
            barrier_wait(barrier, 0);
            sync_block();
        } else {
            out[threadIdx.x] = reinterpret_cast<uint16_t*>(shared)[threadIdx.x];
            barrier_wait(barrier, 1);
        }
    }
}
EXPORT(fault_tile_overwritten)

// A warpgroup's product of ones, asked for and used in the right order, or not.
enum Mistake : uint32_t { NONE, USED_EARLY, NOT_WRITTEN, OVERWRITTEN, NEVER_AWAITED };
KERNEL(product_awaited, 128)(float* out, uint32_t mistake) {
    // [64, 64] elements, of which 16 columns are used; all the same, so that swizzling does not
    // matter
    char* tile = shared_memory();
    for (int i = threadIdx.x; i < 64 * 32; i += 128) {
        if (mistake != NOT_WRITTEN || i != 8 * 32)
            reinterpret_cast<uint32_t*>(tile)[i] = pack<bf16>(1.0f, 1.0f);
    }
    sync_block();
    uint32_t a[4];
    for (int i = 0; i < 4; i++) a[i] = pack<bf16>(1.0f, 1.0f);
    float d[32] = {};
    products_begin();
    multiply_rows<bf16, 64, false>(d, a, operand(tile, 0), true);
    products_commit();
    float early = d[0];
    if (mistake == OVERWRITTEN) {
        for (int i = threadIdx.x; i < 64 * 32; i += 128) reinterpret_cast<uint32_t*>(tile)[i] = 0;
    }
    if (mistake != NEVER_AWAITED) products_wait<0>();
    products_arrived(d);
    out[threadIdx.x] = mistake == USED_EARLY ? early : d[0];
}
EXPORT(product_awaited)

// Blocks that wait for each other.
KERNEL(grid_awaited, 32)(uint32_t* out, uint32_t* counter) {
    if (threadIdx.x == 0) {
        out[blockIdx.x] = blockIdx.x + 1;
        count_up(counter);
        wait_for_count(counter, gridDim.x);
    }
    sync_block();
    if (threadIdx.x == 1) out[gridDim.x + blockIdx.x] = out[(blockIdx.x + 1) % gridDim.x];
}
EXPORT(grid_awaited)

// Blocks of a cluster that read each other's shared memory, between two barriers, or not.
enum ClusterMistake : uint32_t { READ_EARLY = 1, LEFT_EARLY, BEYOND, ONE_MISSING };
KERNEL(cluster_awaited, 32)(uint32_t* out, uint32_t mistake) {
    float* mine = reinterpret_cast<float*>(shared_memory()) + threadIdx.x;
    uint32_t rank = cluster_rank(),
             next = mistake == BEYOND ? cluster_size() : (rank + 1) % cluster_size();
    *mine = static_cast<float>(blockIdx.x);
    if (mistake == ONE_MISSING && threadIdx.x == 0) sync_some(1, 32);
    if (mistake != READ_EARLY) sync_cluster();
    if (mistake == LEFT_EARLY && rank == 1) return;
    if (mistake == LEFT_EARLY) sync_block();
    out[blockIdx.x * 32 + threadIdx.x] = static_cast<uint32_t>(*in_cluster(mine, next));
    sync_cluster();
}
EXPORT(cluster_awaited)

// Each block of a cluster brings one tile to all of them, and reads the first number of each.
enum SharingMistake : uint32_t { SECOND_AT_ONCE = 1, FIRST_LEAVES, ONE_ARRIVAL_LESS };
KERNEL(shared_tiles_awaited, 32)(const GRID_CONSTANT TensorMap map, uint16_t* out,
                                 uint32_t mistake) {
    char* shared = shared_memory();
    uint64_t *full = reinterpret_cast<uint64_t*>(shared + 2048), *empty = full + 1;
    uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init(empty, cluster_size());
        barrier_init_done();
    }
    sync_cluster();
    if (mistake == FIRST_LEAVES && rank == 0) return;
    uint32_t sum = 0;
    for (uint32_t turn = 0; turn < 2; turn++) {
        if (threadIdx.x == 0) {
            if (turn > 0 && mistake != SECOND_AT_ONCE) barrier_wait(empty, 0);
            barrier_arrive_expecting(full, cluster_size() * 1024);
            copy_tile_to((1 << cluster_size()) - 1, shared + rank * 1024, &map, rank + 4 * turn, 0,
                         full);
        }
        sync_warp();
        barrier_wait(full, turn);
        for (uint32_t i = 0; i < 8 * rank; i++) sync_warp(); // the second block is slower
        for (uint32_t i = 0; i < cluster_size(); i++)
            sum = sum * 10 + *reinterpret_cast<uint16_t*>(shared + i * 1024) / 100;
        sync_warp();
        if (threadIdx.x < cluster_size() && !(mistake == ONE_ARRIVAL_LESS && rank == 1))
            barrier_arrive_in(empty, threadIdx.x);
    }
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
    sync_cluster();
}
EXPORT(shared_tiles_awaited)
