// The kernel but for its arithmetic, which a Core does on one tile at a time:
//   begin(p, at, pass)                a new pair: loads the queries, forgets everything. All warps of a block call it at once.
//   tile(stage, bias, index, masked)  adds the tile whose first entry has that index in the list of the pair; bias is the
//                                     lane's, for token lane % kTile; masked: not every query sees every token of it.
//   deposit(group, values, masses)    writes the state: values (8, kStride), masses (8).
//
// A warp takes every kWarps-th tile of its block and keeps kStages of them in flight, across the ends of pairs; the numbers of
// the tile after those are on their way too. Warps meet only where a pair ends.
#pragma once
#include "scan_merge.cuh"

template <class Core>
SAAP_PRIM void scan_tiles(const ScanParams& p) {
  SAAP_SHARED(char, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.x, grid = gridDim.x, pass = blockIdx.y;
  char* const stages = shared + warp * kStages * kStageBytes;

  int total = 0;
  for (int pair = lane; pair < p.sequences * p.heads; pair += 32) total += span_of(p, pair).tiles();
  total = warp_sum(total);
  const int wanted = total > kWarps ? ceil_div(total, kWarps) : 1, blocks = wanted < grid ? wanted : grid;
  const Split split(total, blocks);
  const int last = block < blocks ? split.first(block + 1) : 0;
  int begin = block < blocks ? split.first(block) : 0;

  Place ahead;
  Numbers numbers[kStages - 1], waiting;
  float bias[kStages];
  int next = begin + warp;
#pragma unroll
  for (int s = 0; s < kStages - 1; s++, next += kWarps) numbers[s] = number_tile(p, ahead, next, last);
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) bias[s] = copy_tile(p, numbers[s], stages + s * kStageBytes);
  waiting = number_tile(p, ahead, next, last);
  finish_empty_pairs(p, pass);

  Core core(shared + kStagesBytes + kCoreOffset);
  Place here;
  int tile = begin + warp, stage = 0;
  while (begin < last) {
    seek(p, here, begin);
    if (here.end <= begin) break;  // only if lengths changed since they were summed up
    core.begin(p, here, pass);
    const Span& span = here.span;
    const int seen_by_all = seen_entries(p, span, 0), end = here.end < last ? here.end : last;
    for (; tile < end; tile += kWarps) {
      next += kWarps;
      bias[kStages - 1] = copy_tile(p, waiting, stages + (stage ? stage - 1 : kStages - 1) * kStageBytes);
      waiting = number_tile(p, ahead, next, last);
      cp_async_wait<kStages - 1>();
      __syncwarp();
      const int index = (tile - here.begin) * kTile;
      core.tile(stages + stage * kStageBytes, bias[0], index, index < span.rows && index + kTile > seen_by_all);
      __syncwarp();  // all lanes have read the stage before it is filled again
#pragma unroll
      for (int s = 0; s < kStages - 1; s++) bias[s] = bias[s + 1];
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    finish_pair(p, core, Exchange(shared), here, split, pass);
    begin = end;
  }
}
