// The kernel but for its arithmetic, which a Core does on one tile at a time:
//   begin(p, at, pass)                a new pair: loads the queries, forgets everything. All warps of a block call it at once.
//   tile(stage, bias, index, masked)  adds the tile whose first entry has that index in the list of the pair; bias is the
//                                     lane's, for token lane % kTile; masked: not every query sees every token of it.
//   deposit(group, count, values, masses)  writes the state of the first vectors: values (8, kStride), masses (8).
//
// A warp takes every kWarps-th tile of its block and keeps kStages of them in flight, across the ends of pairs; the numbers of
// the tiles after those are on their way too. Warps meet only where a pair ends. The code of each step stands in one place, for
// it is cold at every launch.
#pragma once
#include "scan_merge.cuh"

template <class Core>
SAAP_PRIM void scan_tiles(const ScanParams& p) {
  SAAP_SHARED(char, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pass = blockIdx.y;
  char* const stages = shared + warp * kStages * kStageBytes;
  const Exchange area(shared);
  Work& work = *area.work;
  note(p, kBegan);
  grid_dependency_wait();
  grid_dependency_launch();
  note(p, kWaited);
  Core core(shared + kStagesBytes + kCoreOffset);
#pragma unroll 1
  for (bool first = true;; first = false) {
    if (warp == 0) {
      const Task task = first ? plan(p, work) : Task{work.until, work.last, work.total, work.pair, work.before, false, Span{}, 0};
      if (task.begin < task.last) fill_places(p, work, task);
    }
    __syncthreads();
    if (!work.count) break;
    if (!SAAP_PAGED && p.runs) {
      load_runs(p, work);
      __syncthreads();
    }
    if (first) note(p, kPlanned);
    const int mine = work.begin + warp, until = work.until, count = work.count;
    Numbers numbers{-1, -1}, ahead{-1, -1};
    float bias[kStages];
    Place here;
    Parts parts;
    int at = 0, stage = 0, places = 0, end = 0, seen_by_all = 0;
    // turn t starts the copies of the warp's t-th tile and adds the one kStages - 1 before it
#pragma unroll 1
    for (int turn = -kTogether;; turn++) {
      if (turn % kTogether == 0) {
        numbers = ahead;
        ahead = number_tile(p, work, at, mine + (turn + kTogether + lane / kTile) * kWarps, until);
      }
      if (turn < 0) continue;
#pragma unroll
      for (int s = 0; s < kStages - 1; s++) bias[s] = bias[s + 1];
      bias[kStages - 1] = copy_tile(p, numbers, turn % kTogether, stages + stage * kStageBytes);
      if (turn == 0) note(p, kCopying);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      if (turn < kStages - 1) continue;
      const int tile = mine + (turn - kStages + 1) * kWarps;
      while (tile >= end) {
        if (places) note(p, kAdded);
        if (places) finish_pair(p, core, area, here, parts, pass);
        if (places == count) break;
        here = work.places[places++];
        end = here.end < until ? here.end : until;
        parts = parts_of(work, here);
        seen_by_all = seen_entries(p, here.span, 0);
        core.begin(p, here, pass);
      }
      if (tile >= end) break;
      cp_async_wait<kStages - 1>();
      __syncwarp();
      if (turn == kStages - 1) note(p, kArrived);
      const int index = (tile - here.begin) * kTile;
      core.tile(stages + stage * kStageBytes, bias[0], index, index < here.span.rows && index + kTile > seen_by_all);
      __syncwarp();  // all lanes have read the stage before it is filled again
    }
    if (until >= work.last) break;
    __syncthreads();
  }
  note(p, kEnded);
  if (!work.empty) return;
  finish_empty_pairs(p, pass);
}
