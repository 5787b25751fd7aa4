// Assigning keys to lists: the nearest centroid of each key, RoPE undone, on tensor cores with the accuracy of float32.
//
// SAAP_ROWS: keys of a block, 128 or 64 (a block is 2 SAAP_ROWS threads).
//
// A factor x is split into two fp16 numbers, high = x rounded and low = (x - high) rounded: 22 bits together. Of the four
// products of parts, low * low is left out; what is lost is 2^-22 of a product, as much as float32 loses. fp16 has the bits but
// not the range, so every key is scaled by a power of two (its own), and so are the centroids (one power per head).
#include "prims.cuh"

struct AssignParams {
  const char* keys;          // (h, n, d) of dtype type, strides below
  const char* panels;        // packed centroids (h, tiles, chunks, kPanelBytes), see Panel
  const float* panel_scales; // (h): what a product with the packed centroids is to be multiplied by
  const float *cos, *sin;    // (n, r / 2) angles of the keys; or null: inv_freq is used, if r > 0
  const float* inv_freq;     // (r / 2) radians per position
  const int* positions;      // (n) position of each key; or null: first_position, first_position + 1, ...
  int* list_nos;             // out (h, n)
  const int* jobs;           // (z, kJobInts), keys of several sequences, see AssignJob; or null: the n of `keys`
  i64 key_sequence;          // stride in bytes over sequences, with jobs
  i64 key_head, key_row;     // strides in bytes
  i64 list_head;             // stride of list_nos over h, in elements
  float scale;               // of the rotated dims, once turned back
  int type;                  // dtype of the keys
  int n, d, rotated;         // r rotated dims of d, even
  int interleaved;           // pairs are dims (2 i, 2 i + 1) instead of (i, i + r / 2)
  int first_position;
  int tiles, chunks;         // ceil(l / 128), ceil(d / 64)
  int vectors;               // whether rows can be read and written 16 bytes at a time, see read_unit
};

constexpr int kJobInts = 8;

namespace {

constexpr int kRows = SAAP_ROWS, kThreads = 2 * kRows;
constexpr int kLists = 128, kDims = 64;  // of a panel
constexpr int kRowBytes = kDims * 2;     // of one half (high or low) of a key or of a centroid in a chunk of 64 dims
constexpr int kHalfPanel = kLists * kRowBytes, kPanelBytes = 2 * kHalfPanel + kLists * 4;
constexpr int kHalfKeys = kRows * kRowBytes;
static_assert(kRows == 64 || kRows == 128, "warps cover 32 keys by 64 lists each");

// A panel is what the packed centroids consist of and what the block holds twice: high parts of 128 lists by 64 dims, their low
// parts, and -|c|^2 / 2 of the lists (-inf past the last). Keys lie in the same form, a chunk of 64 dims after the other.
// 16-byte vector v of a row is at v ^ (row % 8), so that neither reading rows nor reading columns meets bank conflicts.
__device__ __forceinline__ int place(int row, int vector) { return row * kRowBytes + (vector ^ (row & 7)) * 16; }

__device__ __forceinline__ float element(int type, const char* from, int i) {
  return type == kBF16 ? load<kBF16>(from, i) : type == kF16 ? load<kF16>(from, i) : load<kF32>(from, i);
}

template <int T>
__device__ __forceinline__ void widen8(uint4 v, float (&x)[8]) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = widen<T>(static_cast<u16>(words[i / 2] >> 16 * (i % 2)));
}

// Elements 8 v to 8 v + 7.
__device__ __forceinline__ void read8(int type, const char* from, int v, float (&x)[8]) {
  if (type == kF32) {
    const uint4 a = ld_stream16(from + v * 32), b = ld_stream16(from + v * 32 + 16);
    const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __uint_as_float(words[i]);
  } else {
    const uint4 a = ld_stream16(from + v * 16);
    if (type == kBF16) widen8<kBF16>(a, x);
    else widen8<kF16>(a, x);
  }
}

__device__ __forceinline__ u32 low_parts(float x, float y, u32 high) {
  return narrow2<kF16>(x - widen<kF16>(static_cast<u16>(high)), y - widen<kF16>(static_cast<u16>(high >> 16)));
}

__device__ __forceinline__ void write8(char* keys, int row, int v, const float (&x)[8]) {
  char* to = keys + v / 8 * 2 * kHalfKeys + place(row, v % 8);
  const u32 a = narrow2<kF16>(x[0], x[1]), b = narrow2<kF16>(x[2], x[3]);
  const u32 c = narrow2<kF16>(x[4], x[5]), d = narrow2<kF16>(x[6], x[7]);
  *reinterpret_cast<uint4*>(to) = make_uint4(a, b, c, d);
  *reinterpret_cast<uint4*>(to + kHalfKeys) =
      make_uint4(low_parts(x[0], x[1], a), low_parts(x[2], x[3], b), low_parts(x[4], x[5], c), low_parts(x[6], x[7], d));
}

__device__ __forceinline__ void write1(char* keys, int row, int dim, float x) {
  char* to = keys + dim / kDims * 2 * kHalfKeys + place(row, dim % kDims / 8) + dim % 8 * 2;
  const u16 high = narrow<kF16>(x);
  *reinterpret_cast<u16*>(to) = high;
  *reinterpret_cast<u16*>(to + kHalfKeys) = narrow<kF16>(x - widen<kF16>(high));
}

// A unit is 8 pairs of dims, all of them rotated or all of them not, unless dims come one at a time. Where rows are vectors
// (d, and r, or r / 2 if pairs are split, permitting) it is two vectors of 8 dims.
struct Unit {
  float x[8], y[8];
};

// Dims of pair i of a row: the rotated pairs come first.
__device__ __forceinline__ int2 pair_dims(const AssignParams& p, int i) {
  const int half = p.rotated / 2;
  return i < half && !p.interleaved ? make_int2(i, i + half) : make_int2(2 * i, 2 * i + 1);
}

// Whether the unit's pairs are dims apart (split halves), and its two vectors.
struct UnitVectors {
  int first, second;
  bool split;
};
__device__ __forceinline__ UnitVectors unit_vectors(const AssignParams& p, int unit) {
  const bool split = !p.interleaved && unit * 8 < p.rotated / 2;
  return split ? UnitVectors{unit, unit + p.rotated / 16, true} : UnitVectors{2 * unit, 2 * unit + 1, false};
}

__device__ __forceinline__ void read_unit(const AssignParams& p, const char* row, int unit, Unit& u) {
  if (p.vectors) {
    const UnitVectors at = unit_vectors(p, unit);
    float a[8], b[8];
    read8(p.type, row, at.first, a);
    read8(p.type, row, at.second, b);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u.x[i] = at.split ? a[i] : a[2 * i];
      u.x[i + 4] = at.split ? a[i + 4] : b[2 * i];
      u.y[i] = at.split ? b[i] : a[2 * i + 1];
      u.y[i + 4] = at.split ? b[i + 4] : b[2 * i + 1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int2 dims = pair_dims(p, unit * 8 + i);
      const bool there = unit * 8 + i < p.d / 2;
      u.x[i] = there ? element(p.type, row, dims.x) : 0.f;
      u.y[i] = there ? element(p.type, row, dims.y) : 0.f;
    }
  }
}

// Dims from d to the next multiple of 16 are written as zeros: the last matrix product reads them.
__device__ __forceinline__ void write_unit(const AssignParams& p, char* keys, int row, int unit, const Unit& u) {
  if (p.vectors) {
    const UnitVectors at = unit_vectors(p, unit);
    float a[8], b[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[i] = at.split ? u.x[i] : i % 2 ? u.y[i / 2] : u.x[i / 2];
      a[i + 4] = at.split ? u.x[i + 4] : i % 2 ? u.y[2 + i / 2] : u.x[2 + i / 2];
      b[i] = at.split ? u.y[i] : i % 2 ? u.y[4 + i / 2] : u.x[4 + i / 2];
      b[i + 4] = at.split ? u.y[i + 4] : i % 2 ? u.y[6 + i / 2] : u.x[6 + i / 2];
    }
    write8(keys, row, at.first, a);
    write8(keys, row, at.second, b);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int2 dims = pair_dims(p, unit * 8 + i);  // past the last pair (2 i, 2 i + 1), as of any pair not rotated
      write1(keys, row, dims.x, u.x[i]);
      write1(keys, row, dims.y, u.y[i]);
    }
  }
}

// The keys of a block: rows [first, first + n) of a sequence, and where their numbers are in list_nos, positions and angles.
struct AssignJob {
  int sequence, first, n, at;
  int position;  // of the first, if there are no positions
};
__device__ __forceinline__ AssignJob read_job(const AssignParams& p, int i) {
  if (!p.jobs) return {0, 0, p.n, 0, p.first_position};
  const int* from = p.jobs + i * kJobInts;
  return {from[0], from[1], from[2], from[3], from[4]};
}

__device__ __forceinline__ void unrotate(const AssignParams& p, const AssignJob& job, int key, int unit, Unit& u) {
  const int half = p.rotated / 2, position = p.positions ? p.positions[job.at + key] : job.position + key;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int pair = unit * 8 + i;
    if (pair >= half) continue;
    float cosine, sine;
    if (p.cos) {
      cosine = p.cos[static_cast<i64>(job.at + key) * half + pair];
      sine = p.sin[static_cast<i64>(job.at + key) * half + pair];
    } else {
      // The model rounds the angle to float32 before it takes its cosine.
      const float angle = static_cast<float>(position) * p.inv_freq[pair];
      sinpi_cospi(static_cast<double>(angle) * 0.318309886183790671538, &sine, &cosine);
    }
    const float x = u.x[i], y = u.y[i];
    u.x[i] = (x * cosine + y * sine) * p.scale;
    u.y[i] = (y * cosine - x * sine) * p.scale;
  }
}

// Writes keys from `first` on to shared memory: unrotated, scaled, split; zeros for keys past the last. scales (kRows) takes
// what a product with the key is to be multiplied by. A key is the work of `team` threads next to each other.
__device__ __forceinline__ void prepare_keys(
    const AssignParams& p, const AssignJob& job, int head, int first, char* keys, float* scales) {
  const int units = (p.d + 15) / 16;
  const int team = units <= 1 ? 1 : units <= 2 ? 2 : units <= 4 ? 4 : units <= 8 ? 8 : 16;
  const int unit = threadIdx.x % team;
  const char* from = p.keys + job.sequence * p.key_sequence + head * p.key_head + job.first * p.key_row;
  for (int row = threadIdx.x / team; row < kRows; row += kThreads / team) {
    const int key = first + row;
    const bool there = key < job.n && unit < units;
    Unit u = {};
    if (there) read_unit(p, from + key * p.key_row, unit, u);
    // A power of two brings a bound of the key's elements below 2^14: far from infinity, also when 256 products are summed.
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fmaxf(fabsf(u.x[i]), fabsf(u.y[i])));
    for (int distance = 1; distance < team; distance *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    const float bound = largest * fmaxf(1.f, 1.4142137f * fabsf(p.scale));
    const int exponent = max(static_cast<int>(__float_as_uint(bound) >> 23), 14);  // biased by 127, as are those below
    const float shrink = __uint_as_float(static_cast<u32>(267 - exponent) << 23);
    if (there) {
      unrotate(p, job, key, unit, u);
#pragma unroll
      for (int i = 0; i < 8; i++) u.x[i] *= shrink, u.y[i] *= shrink;
    }
    if (unit < units) write_unit(p, keys, row, unit, u);
    if (unit == 0) scales[row] = __uint_as_float(static_cast<u32>(exponent - 13) << 23) * p.panel_scales[head];
  }
}

// Starts the copy of a panel.
__device__ __forceinline__ void fetch_panel(char* to, const char* from) {
  for (int i = threadIdx.x * 16; i < kPanelBytes; i += kThreads * 16) cp_async16(to + i, from + i, true);
  cp_async_commit();
}

struct Best {
  float score;
  int list;
  __device__ __forceinline__ void offer(float other, int other_list) {
    if (other > score || (other == score && other_list < list)) score = other, list = other_list;
  }
};

}  // namespace

// list_nos of every key: argmax over lists of <k', c> - |c|^2 / 2, k' the key with its rotation undone; ties go to the lower
// list; a key that holds NaN or infinity goes to some list.
//
// Grid (ceil(n / SAAP_ROWS), h, 1), with z jobs (of the largest n, h, z); block 2 SAAP_ROWS threads; shared memory 2 panels of
// 33,280 bytes + (chunks * 256 + 4) * SAAP_ROWS. Warps stand 2 lists-wise and SAAP_ROWS / 32 keys-wise, each with 32 keys by 64
// lists of a tile of 128 lists; the next panel is on its way while the tensor cores work on one.
// Preconditions: d <= 256 a multiple of 8; panels 16-byte aligned. Deterministic.
extern "C" __global__ void __launch_bounds__(kThreads) saap_assign(const __grid_constant__ AssignParams p) {
  SAAP_SHARED(char, shared);
  char* keys = shared + 2 * kPanelBytes;
  float* scales = reinterpret_cast<float*>(keys + p.chunks * 2 * kHalfKeys);
  const int head = blockIdx.y, first = blockIdx.x * kRows;
  const AssignJob job = read_job(p, blockIdx.z);
  if (first >= job.n) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp / 2 * 32, column = warp % 2 * 64;
  const int total = p.tiles * p.chunks, steps = (p.d + 15) / 16;
  const char* panels = p.panels + static_cast<i64>(head) * total * kPanelBytes;

  fetch_panel(shared, panels);
  prepare_keys(p, job, head, first, keys, scales);

  float sums[2][8][4];  // keys 16 i + lane / 4 (+ 8), lists 8 j + 2 (lane % 4) (+ 1)
  Best best[4];         // keys 8 i + lane / 4
#pragma unroll
  for (int i = 0; i < 4; i++) best[i] = {-INFINITY, 0};
  int tile = 0, chunk = 0;
  for (int step = 0; step < total; step++) {
    cp_async_wait<0>();
    __syncthreads();  // the panel is there, and nobody reads the one before any more
    char* panel = shared + step % 2 * kPanelBytes;
    if (step + 1 < total) fetch_panel(shared + (step + 1) % 2 * kPanelBytes, panels + static_cast<i64>(step + 1) * kPanelBytes);
    if (chunk == 0) {
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int c = 0; c < 4; c++) sums[i][j][c] = 0.f;
    }
    const char* chunk_keys = keys + chunk * 2 * kHalfKeys;
    const int here = min(steps - chunk * 4, 4);
    for (int k = 0; k < here; k++) {
      u32 high[2][4], low[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int at = place(row + 16 * i + lane % 16, 2 * k + lane / 16);
        ldmatrix4(high[i], chunk_keys + at);
        ldmatrix4(low[i], chunk_keys + kHalfKeys + at);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        u32 c_high[4], c_low[4];
        const int at = place(column + 8 * j + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
        ldmatrix4(c_high, panel + at);
        ldmatrix4(c_low, panel + kHalfPanel + at);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            mma_16816<kF16>(sums[i][j + half], low[i], c_high[2 * half], c_high[2 * half + 1]);
            mma_16816<kF16>(sums[i][j + half], high[i], c_low[2 * half], c_low[2 * half + 1]);
            mma_16816<kF16>(sums[i][j + half], high[i], c_high[2 * half], c_high[2 * half + 1]);
          }
      }
    }
    if (++chunk < p.chunks) continue;
    const float* bias = reinterpret_cast<const float*>(panel + 2 * kHalfPanel);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int down = 0; down < 2; down++) {
        const float scale = scales[row + 16 * i + 8 * down + lane / 4];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const int list = column + 8 * j + lane % 4 * 2 + c;
            const float score = sums[i][j][2 * down + c] * scale + bias[list];
            // A thread meets its lists in rising order, so the first of equals stays.
            if (score > best[2 * i + down].score) best[2 * i + down] = {score, tile * kLists + list};
          }
      }
    chunk = 0;
    tile++;
  }

  // The 4 lanes of a key, then the two warps; the panels are no longer needed.
  __syncthreads();
  Best* others = reinterpret_cast<Best*>(shared);
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float score = __shfl_xor_sync(~0u, best[i].score, distance);
      best[i].offer(score, __shfl_xor_sync(~0u, best[i].list, distance));
    }
    if (warp % 2 && lane % 4 == 0) others[row + 8 * i + lane / 4] = best[i];
  }
  __syncthreads();
  if (warp % 2 || lane % 4) return;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = row + 8 * i + lane / 4;
    best[i].offer(others[at].score, others[at].list);
    if (first + at < job.n) p.list_nos[head * p.list_head + job.at + first + at] = best[i].list;
  }
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_assign() { return sizeof(AssignParams); }
#endif
