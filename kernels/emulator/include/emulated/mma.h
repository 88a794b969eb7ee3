// What the tensor core instructions of include/mma.cuh mean on the CPU.
#pragma once

// Instruction: bf16 f16 mma.sync.aligned.m16n8k16.row.col.f32. .f32 {%0,%1,%2,%3}, {%4,%5,%6,%7},
//   {%8,%9}, {%0,%1,%2,%3};
template <class T>
DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Lane {
        float* c;
        const uint32_t *a, *b;
    } mine = {c, a, b};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            float a[16][16], b[8][16];
            for (int lane = 0; lane < 32; lane++) {
                const Lane* l = static_cast<const Lane*>(data[lane]);
                int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; i++) {
                    a[g + i % 2 * 8][2 * t + i / 2 * 8] = low<T>(l->a[i]);
                    a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = high<T>(l->a[i]);
                }
                for (int i = 0; i < 2; i++) {
                    b[g][2 * t + i * 8] = low<T>(l->b[i]);
                    b[g][2 * t + i * 8 + 1] = high<T>(l->b[i]);
                }
            }
            for (int lane = 0; lane < 32; lane++) {
                const Lane* l = static_cast<const Lane*>(data[lane]);
                int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; i++) {
                    float sum = 0;
                    for (int k = 0; k < 16; k++) sum += a[g + i / 2 * 8][k] * b[2 * t + i % 2][k];
                    l->c[i] += sum;
                }
            }
        },
        &mine, "mma_m16n8k16");
}

// Instruction: ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];
DEVICE void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
    struct Lane {
        Pack16B row;
        uint32_t* out;
    } mine = {*static_cast<const Pack16B*>(row), out};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            for (int lane = 0; lane < 32; lane++)
                for (int m = 0; m < 4; m++)
                    static_cast<Lane*>(data[lane])->out[m] =
                        static_cast<Lane*>(data[m * 8 + lane / 4])->row.pairs[lane % 4];
        },
        &mine, "ldmatrix_x4");
}

// Instruction: ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];
DEVICE void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
    struct Lane {
        Pack16B row;
        uint32_t* out;
    } mine = {*static_cast<const Pack16B*>(row), out};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            for (int lane = 0; lane < 32; lane++)
                for (int m = 0; m < 4; m++) {
                    uint32_t pair = 0;
                    for (int i = 0; i < 2; i++) {
                        uint32_t word = static_cast<Lane*>(data[m * 8 + 2 * (lane % 4) + i])
                                            ->row.pairs[lane / 8];
                        pair |= (word >> (lane / 4 % 2 * 16) & 0xffff) << (16 * i);
                    }
                    static_cast<Lane*>(data[lane])->out[m] = pair;
                }
        },
        &mine, "ldmatrix_x4_trans");
}
