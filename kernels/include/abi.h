// Every struct and constant that host and device share, in plain C. build.rs makes the Rust side of
// this file, and fails on anything but what stands here: comments, constants, and structs of 32-bit
// and 64-bit fields without padding, each followed by its size.
#pragma once
#include <stdint.h>

// Positions in a block of the KV cache.
constexpr int CACHE_BLOCK = 16;

// attention_decode_*: warps of a thread block, and positions that it takes.
constexpr int ATTENTION_DECODE_WARPS = 4;
constexpr int ATTENTION_DECODE_SPLIT = 512;
// attention_prefill_*: warps of a thread block, and queries that it takes.
constexpr int ATTENTION_PREFILL_WARPS = 4;
constexpr int ATTENTION_PREFILL_QUERIES = 64;
// attention_hopper_*: threads, queries, stages in shared memory, and columns of a tile there.
constexpr int ATTENTION_HOPPER_THREADS = 384;
constexpr int ATTENTION_HOPPER_QUERIES = 128;
constexpr int ATTENTION_HOPPER_STAGES = 4;
constexpr int ATTENTION_HOPPER_COLUMNS = 64;
// Positions that both take in a step.
constexpr int ATTENTION_STEP = 64;

typedef struct {
    // [tokens, head, size] in 16 bits
    void* out;
    // [tokens, head, size] in 16 bits
    const void* q;
    // [block, head, 16, size] in 16 bits: the layer's keys
    const void* keys;
    // [block, head, 16, size] in 16 bits: the layer's values
    const void* values;
    // [query]: its token, for kernels that take one query at a time
    const uint32_t* tokens;
    // [tile]: first token and number of tokens, for kernels that take many queries at a time
    const uint32_t* tiles;
    // [token]: the row of `tables` of its sequence
    const uint32_t* spans;
    // [token]: its position in its sequence
    const uint32_t* positions;
    // [sequence, table_width]: numbers of cache blocks
    const uint32_t* tables;
    // [head]: of ALiBi
    const float* slopes;
    // [query, head, split, size + 2]: unnormalized output, maximal score, sum of exponentials
    float* partials;
    // [query, head]: zeros before and after the launch
    uint32_t* counters;
    uint32_t heads;
    uint32_t table_width;
    uint32_t splits;
    uint32_t unused;
} AttentionArgs;
static_assert(sizeof(AttentionArgs) == 112);

// attention_train_*: warps of a thread block, queries or keys that it takes, and queries or keys
// that the backward pass takes in a step. The forward pass takes ATTENTION_STEP.
constexpr int ATTENTION_TRAIN_WARPS = 4;
constexpr int ATTENTION_TRAIN_TILE = 64;
constexpr int ATTENTION_TRAIN_STEP = 32;
// attention_train_hopper_*: stages in shared memory, each of as many tokens as a tile.
constexpr int ATTENTION_TRAIN_HOPPER_STAGES = 2;

// Neighbouring tokens of a packed sequence.
typedef struct {
    uint32_t first;
    uint32_t count;
    // first token of their sequence, and the one behind its last
    uint32_t sequence_start;
    uint32_t sequence_end;
} AttentionTrainTile;
static_assert(sizeof(AttentionTrainTile) == 16);

typedef struct {
    // [tokens, head, 3, size] in 16 bits
    const void* qkv;
    // [tokens, head, size] in 16 bits
    void* y;
    // [tokens, head]: logarithm of the sum of exponentials of the scores
    float* lse;
    // [tokens, head, size] in 16 bits: the gradient of `y`
    const void* dy;
    // [tokens, head]: dot products of `y` and `dy`, which the kernel for queries leaves to the one
    // for keys
    float* dot;
    // [tokens, head, 3, size] in 16 bits: the gradient of `qkv`
    void* dqkv;
    // [tile]
    const AttentionTrainTile* tiles;
    // [head]: of ALiBi
    const float* slopes;
    uint32_t heads;
    uint32_t unused;
} AttentionTrainArgs;
static_assert(sizeof(AttentionTrainArgs) == 72);

// linear_skinny_*, lm_head_sample_* and lm_head_logits_*: warps of a block, outputs that it
// computes, and rounds of weights in flight, where several blocks share a multiprocessor (shallow)
// and where only one does (deep).
constexpr int SKINNY_WARPS = 8;
constexpr int SKINNY_OUTPUTS = 16;
constexpr int SKINNY_SHALLOW = 6;
constexpr int SKINNY_DEEP = 12;
// Inputs in a stage of all kernels with tiles.
constexpr int LINEAR_SLICE = 64;
// linear_large_* and lm_head_*_large_*: threads, tokens and outputs of a block, and stages.
constexpr int LINEAR_LARGE_THREADS = 256;
constexpr int LINEAR_LARGE_TILE = 128;
constexpr int LINEAR_LARGE_STAGES = 3;
// linear_hopper_*: threads, tokens and outputs of a tile, stages, and bytes of shared memory in
// which half of a tile's sums are staged, with two mbarriers.
constexpr int LINEAR_HOPPER_THREADS = 384;
constexpr int LINEAR_HOPPER_TOKENS = 128;
constexpr int LINEAR_HOPPER_OUTPUTS = 256;
constexpr int LINEAR_HOPPER_STAGES = 3;
constexpr int LINEAR_HOPPER_STAGED_BYTES = 128 * (128 * 4 + 32) + 2 * 8;
// linear_cluster_* and lm_head_*_hopper_*: threads, and outputs of a tile.
constexpr int LINEAR_CLUSTER_THREADS = 288;
constexpr int LINEAR_CLUSTER_OUTPUTS = 128;

// The rows that a linear is applied to.
typedef struct {
    // [tokens, inputs] in 16 bits; in f32 if there is a norm
    const void* x;
    // of the norm; null if there is none
    const float* weight;
    const float* bias;
    // [tokens, inputs] in 16 bits, where the first block also writes the normalized rows, or null
    void* normed;
    float eps;
    uint32_t tokens;
    uint32_t inputs;
    // whether the skinny kernels copy the rows to shared memory first
    uint32_t staged;
} LinearArgs;
static_assert(sizeof(LinearArgs) == 48);

// What a linear does with its accumulators, `sum` in the following. The output is in f32:
// sum + bias
constexpr uint32_t EPILOGUE_BIAS = 0;
// The output is in 16 bits: gelu(sum + bias), in the tanh form.
constexpr uint32_t EPILOGUE_GELU = 1;
// The output is in f32: sum + bias + residual
constexpr uint32_t EPILOGUE_RESIDUAL = 2;
// Rows are [head, 3, head size]: queries go to the output in 16 bits, keys and values to their
// cache blocks.
constexpr uint32_t EPILOGUE_QKV = 3;
// The output is in 16 bits: sum + bias
constexpr uint32_t EPILOGUE_HALF = 4;
// gemm_hopper_* alone: the output is in 16 bits, sum * the gradient of gelu(residual), which is in
// 16 bits too.
constexpr uint32_t EPILOGUE_GELU_GRADIENT = 5;

typedef struct {
    // [tokens, width]; for EPILOGUE_QKV [tokens, width / 3]
    void* out;
    // [width]
    const float* bias;
    // [tokens, width] in f32 or 16 bits
    const void* residual;
    // [block, head, 16, head size] in 16 bits: the layer's keys
    void* keys;
    // [block, head, 16, head size] in 16 bits: the layer's values
    void* values;
    // [token]: block * 16 + position in the block
    const uint32_t* slots;
    uint32_t mode;
    uint32_t width;
    // whether `residual` is in 16 bits
    uint32_t half_residual;
    uint32_t heads;
    uint32_t head_size;
    uint32_t unused;
} EpilogueArgs;
static_assert(sizeof(EpilogueArgs) == 72);

// embed_norm_* and layer_norm_*: rows that a block takes, and its threads.
constexpr int NORM_ROWS = 4;
constexpr int NORM_THREADS = 128;

// No token, or no job.
constexpr uint32_t ABSENT = 0xffffffff;
// The result of a job that is left to the host.
constexpr uint32_t TOO_MANY = 0xfffffffe;

typedef struct {
    uint32_t token;
    float logprob;
} SampledToken;
static_assert(sizeof(SampledToken) == 8);

// The tokens of a pass, some of which the previous step sampled and the host does not know yet.
typedef struct {
    // [token]: its id
    const uint32_t* ids;
    // [token]: the job of the previous step that samples it, or ABSENT
    const uint32_t* pending;
    // [job]: results of the previous step; null if no token is pending
    const SampledToken* sampled;
    uint32_t vocabulary;
    uint32_t unused;
} TokenIds;
static_assert(sizeof(TokenIds) == 32);

// The LM head writes softmax statistics of every group of so many neighbouring logits.
constexpr int STATS_OUTPUTS = 16;

// The largest logit, and the sum of exp(logit - max).
typedef struct {
    float max;
    float sum_exp;
} SoftmaxStats;
static_assert(sizeof(SoftmaxStats) == 8);

// Marks a token in a LogitChange that the repetition penalty counts.
constexpr uint32_t SEEN = 0x80000000;

// A token whose logit is not taken as it is.
typedef struct {
    // with SEEN if the penalty counts it
    uint32_t token;
    // added after the penalty
    float bias;
} LogitChange;
static_assert(sizeof(LogitChange) == 8);

// One token to sample.
typedef struct {
    // of the logits
    uint32_t row;
    // 0 for the most likely token
    float inverse_temperature;
    // divides positive logits of seen tokens and multiplies negative ones
    float penalty;
    // its changes, sorted by token, in the list of all changes, and then a token of ABSENT
    uint32_t changes_start;
    uint32_t changes_count;
    // the token to take, of which only the log-probability is wanted, or ABSENT
    uint32_t forced;
    uint32_t seed_low;
    uint32_t seed_high;
    uint32_t candidate;
    uint32_t position;
    // at most so many tokens, the most likely ones; 0 for all
    uint32_t top_k;
    // of these the most likely ones that have this probability together
    float top_p;
    // of these no token that is less likely than this part of the most likely one
    float min_p;
    // the job of the previous step whose token the penalty counts too, or ABSENT
    uint32_t pending;
    // of its result
    uint32_t slot;
} SamplingJob;
static_assert(sizeof(SamplingJob) == 60);

// What a block of the LM head knows of a job.
typedef struct {
    // of the best token, with penalty, temperature and noise
    float score;
    uint32_t token;
    // of the best token, as the model gave it
    float logit;
    // of all tokens: the largest logit, and the sum of exp(logit - max)
    float max;
    float sum_exp;
} PartialSample;
static_assert(sizeof(PartialSample) == 20);

typedef struct {
    // [job]
    const SamplingJob* jobs;
    const LogitChange* changes;
    // [job]: results of the previous step
    const SampledToken* previous;
    // [job, block]
    PartialSample* partials;
    // of jobs
    uint32_t count;
    // of the LM head for each row
    uint32_t blocks;
} SamplingArgs;
static_assert(sizeof(SamplingArgs) == 40);

// A row of which the most likely tokens are wanted, and how many of them.
typedef struct {
    uint32_t row;
    uint32_t count;
} TopRequest;
static_assert(sizeof(TopRequest) == 8);

// merge_samples: threads.
constexpr int MERGE_THREADS = 256;
// sample_filtered and top_logprobs: threads, room in the list of logits, the largest list that may
// be asked for (the rest is room for ties), and bytes of shared memory before one bit for each
// token.
constexpr int FILTERED_THREADS = 512;
constexpr int FILTERED_LIST = 2048;
constexpr int FILTERED_MAX_LISTED = FILTERED_LIST / 2;
constexpr int FILTERED_SHARED_BYTES =
    FILTERED_LIST * 16 + 16 * 256 * 4 + 16 * 8 + 16 * sizeof(PartialSample) + 8 + 16 + 8;

// decode_step_*: warps of a block, tokens of a step, bytes of a chunk of weights, outputs that are
// accumulated at the same time, positions that a block attends to at a time, and elements of
// padding between rows in shared memory.
constexpr int DECODE_WARPS = 8;
constexpr int DECODE_TOKENS = 8;
constexpr int DECODE_CHUNK_BYTES = 2048;
constexpr int DECODE_GROUP_OUTPUTS = 64;
constexpr int DECODE_SPLIT = 2 * DECODE_WARPS * CACHE_BLOCK;
// The widest rows of which a thread keeps its columns of a norm's weight and bias.
constexpr int DECODE_MAX_WIDTH = 4096;
constexpr int DECODE_PADDING = 32;
// Linears of a layer: queries, keys and values; dense; up; down.
constexpr int DECODE_LINEARS = 4;

typedef struct {
    // [outputs, inputs] in 16 bits, or in 8 bits with scales
    const void* weight;
    // [outputs], or null
    const float* scales;
    // [outputs]
    const float* bias;
} DecodeLinear;
static_assert(sizeof(DecodeLinear) == 24);

typedef struct {
    DecodeLinear linears[DECODE_LINEARS];
    // weight and bias
    const float* input_norm[2];
    // weight and bias
    const float* post_norm[2];
} DecodeLayer;
static_assert(sizeof(DecodeLayer) == 128);

typedef struct {
    const DecodeLayer* layers;
    // [vocabulary, width] in 16 bits, or in 8 bits with scales
    const void* embedding;
    // [vocabulary], or null
    const float* embedding_scales;
    const float* embedding_norm_weight;
    const float* embedding_norm_bias;
    // of layers
    uint32_t count;
    uint32_t width;
    float eps;
    // whether residuals are taken from behind the norms
    uint32_t residual_post_norm;
} DecodeModel;
static_assert(sizeof(DecodeModel) == 56);

typedef struct {
    // [tokens, width] in f32: the residual stream before and after attention
    float* x;
    float* x2;
    // [tokens, width] in 16 bits
    void* normed;
    // [tokens, head, size] in 16 bits
    void* queries;
    // [tokens, head, size] in 16 bits
    void* attended;
    // [tokens, 4 * width] in 16 bits
    void* wide;
    // [token]: block * 16 + position in the block
    const uint32_t* slots;
    // how many times blocks have come to a barrier
    uint32_t* barrier;
    // of the cache
    uint64_t layer_bytes;
    uint32_t tokens;
    // the barrier's count before this launch
    uint32_t arrived;
} DecodeStep;
static_assert(sizeof(DecodeStep) == 80);

// peak_*: threads.
constexpr int PEAK_THREADS = 256;

// The kernels of training: threads of a block, where nothing else is said.
constexpr int TRAIN_THREADS = 256;
// Rows whose shares of the gradients of a norm's weight and bias a block adds up.
constexpr int NORM_BACKWARD_ROWS = 32;
// norm_gradients: columns of a block, and parts into which it divides the rows.
constexpr int NORM_GRADIENT_COLUMNS = 32;
// Elements that a block of an elementwise kernel takes.
constexpr int ELEMENTWISE_BLOCK = 8 * TRAIN_THREADS;
// Columns of the input that a block of projection_gradients_* takes.
constexpr int PROJECTION_COLUMNS = 32;
// Largest absolute difference of log-probabilities that an exponential is taken of.
constexpr int MAX_LOG_RATIO = 20;
// Elements that a block of squared_norm takes, and most that one of adamw_* takes.
constexpr int OPTIMIZER_BLOCK = 32768;

typedef struct {
    // [tokens, width] in f32: gradient of the norm's input, written
    float* dx;
    // [block, 2, width]: the block's shares of the gradients of weight and bias
    float* partials;
    // [tokens, width] in 16 bits or f32: gradient of the norm's output
    const void* dy;
    // [tokens, width] in f32: input of the norm
    const float* x;
    // [tokens, width] in f32: what else is part of the input's gradient, or null
    const float* residual;
    // [width]
    const float* weight;
    // [tokens]: statistics of the rows
    const float* mean;
    const float* rstd;
    uint32_t tokens;
    uint32_t width;
} NormBackwardArgs;
static_assert(sizeof(NormBackwardArgs) == 72);

// The rows of a chunk of logits, and what is known of each.
typedef struct {
    // [rows, stride] in 16 bits
    void* logits;
    // [row]: the token whose probability counts
    const uint32_t* targets;
    // [row]: logarithm of the sum of the exponentials
    float* lse;
    // [row]: logarithm of the target's probability
    float* log_probs;
    // [row]: entropy of the probabilities, in nats
    float* entropies;
    uint32_t rows;
    uint32_t vocabulary;
    // elements from one row to the next, a multiple of 8
    uint32_t stride;
    uint32_t unused;
} LogitRows;
static_assert(sizeof(LogitRows) == 56);

// What a step of training adds up on the device.
typedef struct {
    // losses, summed over all labels
    double loss;
    // squares of the gradient's elements, before it is clipped
    double squared_norm;
    // what the gradient is multiplied by so that its norm is allowed
    float factor;
    // whether loss and norm are numbers: the step is taken only then
    uint32_t finite;
} TrainSums;
static_assert(sizeof(TrainSums) == 24);

// clipped_ppo: a chunk of labels.
typedef struct {
    TrainSums* sums;
    // [label], written: gradient of the log-probability
    float* log_prob_gradients;
    // [label], written: gradient of the entropy
    float* entropy_gradients;
    // [label]
    const float* log_probs;
    // [label]
    const float* entropies;
    // [label]: log-probability by the policy that sampled it
    const float* old_log_probs;
    // [label]
    const float* advantages;
    // [label]: log-probability by the policy from which this one is not to move away, or null
    const float* reference_log_probs;
    uint32_t labels;
    // how far a ratio of probabilities may be from 1
    float clip;
    // factors of the estimate of the KL divergence, of the entropy, and of the gradients
    float kl;
    float entropy;
    float scale;
    uint32_t unused;
} ClippedPpoArgs;
static_assert(sizeof(ClippedPpoArgs) == 88);

// clipped_value_loss: numbers of a value head, one a row.
typedef struct {
    TrainSums* sums;
    // [row], written unless it is null: gradient of the value
    float* dy;
    // [row]: values
    const float* y;
    // [row]: value as the row was sampled
    const float* old_values;
    // [row]: what the value should be
    const float* returns;
    uint32_t rows;
    // how far a value may be from the old one
    float clip;
    // factors of the loss, and of its gradients
    float coefficient;
    float scale;
} ClippedValueArgs;
static_assert(sizeof(ClippedValueArgs) == 56);

// Neighbouring parameters that a block of adamw_* takes.
typedef struct {
    uint64_t first;
    // where the moments of the first of them are
    uint64_t moments;
    uint32_t count;
    // whether weight decay is applied to them
    uint32_t decays;
} OptimizerChunk;
static_assert(sizeof(OptimizerChunk) == 24);

typedef struct {
    // parameters in f32, updated
    float* values;
    // the same in 16 bits, written
    void* half_values;
    const float* grads;
    // moments, updated
    float* first;
    float* second;
    // [block]
    const OptimizerChunk* chunks;
    const TrainSums* sums;
    float beta1;
    float beta2;
    float epsilon;
    // learning rate over the first moment's bias correction
    float step_size;
    // root of the second moment's bias correction
    float root;
    // what parameters that decay are multiplied by first
    float keep;
} AdamWArgs;
static_assert(sizeof(AdamWArgs) == 80);

// gemm_*_bf16: threads, and rows and columns of a tile.
constexpr int GEMM_TRAIN_THREADS = 256;
constexpr int GEMM_TRAIN_TILE = 128;
// Elements of the inner dimension that are copied at a time, and how many such slices are in work.
constexpr int GEMM_TRAIN_SLICE = 64;
constexpr int GEMM_TRAIN_STAGES = 3;
// What becomes of the sums: they are written in 16 bits, added to what is there in f32, or written
// as the share of a part of the inner dimension.
constexpr uint32_t GEMM_WRITE = 0;
constexpr uint32_t GEMM_ADD = 1;
constexpr uint32_t GEMM_PARTIAL = 2;

// C [m, n] of A and B, whose strides are in elements and multiples of 8; between the columns of a
// matrix and its stride lie zeros.
typedef struct {
    // in 16 bits
    const void* a;
    const void* b;
    // 16 bits to write, f32 to add
    void* c;
    // [m, n] with the stride of c: what the input of a GELU was whose gradient c is multiplied by,
    // or null
    const void* before_gelu;
    // [m] in f32: the sums of A over the inner dimension are added here, unless null
    float* row_sums;
    // [part, m, n] and behind that [part, m]: shares of the parts
    float* partials;
    uint32_t m;
    uint32_t n;
    uint32_t k;
    uint32_t a_stride;
    uint32_t b_stride;
    uint32_t c_stride;
    uint32_t mode;
    // parts of the inner dimension, and slices of each
    uint32_t parts;
    uint32_t part_slices;
    uint32_t unused;
} GemmArgs;
static_assert(sizeof(GemmArgs) == 88);

// gemm_hopper_*: where a tile of ones begins in shared memory, behind what linear_hopper_* have
// there, and all bytes of it.
constexpr int GEMM_HOPPER_ONES_AT = 213 * 1024;
constexpr int GEMM_HOPPER_SHARED_BYTES = GEMM_HOPPER_ONES_AT + 1024;

// How gemm_hopper_* divide the inner dimension, and where the sums of A over it go.
typedef struct {
    // [part, m] in f32, or null
    float* row_sums;
    uint32_t parts;
    // slices of each part
    uint32_t part_slices;
    // whether the sums are added to what is there
    uint32_t accumulate;
    uint32_t unused;
} GemmDivision;
static_assert(sizeof(GemmDivision) == 24);
