// What a stored code is on the device: reference.py's `encode`, and bindings/codes.inl.h.
//
// Numbers of a row, then a float scale, in words of 4 bytes. Numbers of 8 bits are signed bytes. Of 4 bits, two share a byte: of each
// 32 numbers the first 16 in the lower halves of 16 bytes, the others in the upper ones; at the end, halves of what is left. Each
// names a level, and the row is rotated.
#pragma once
#include "prims.cuh"

constexpr int kRunOfNumbers = 32;
constexpr u32 kBias = 0x80808080u;  // bytes are read as whole numbers from 0 on, 128 more than they are

// The dim of the k-th number of a word, in the order that `numbers` gives them.
template <int bits, int dim>
SAAP_PRIM int dim_of(int word, int k) {
  if constexpr (bits == 8) return word * 4 + k;
  const int byte = word * 4 + k / 2, start = byte / 16 * kRunOfNumbers, left = dim - start;
  const int half = (left < kRunOfNumbers ? left : kRunOfNumbers) / 2;
  return start + byte - start / 2 + k % 2 * half;
}

// Four numbers of a word, biased, a byte each: those of its `part`-th half, of 4 bits; all, of 8.
template <int bits>
SAAP_PRIM u32 numbers(u32 word, int part) {
  if constexpr (bits == 8) return word ^ kBias;
  // Levels 6, 18, 31, 44, 58, 75, 96, 127 by the lower three bits of each nibble; the upper one, spread to a bit of each byte, makes
  // 127 - level of a level, and takes 127 off.
  const u32 four = part ? word >> 16 : word, upper = four >> 3;
  const u32 pairs = (upper & 0x11u) | (upper & 0x1100u) << 8, spread = (pairs & 0x10001u) | (pairs & 0x100010u) << 4;
  const u32 level = __byte_perm(0x2c1f1206u, 0x7f604b3au, four & 0x7777u), negative = spread * 0x7fu;
  return ((level ^ negative) | kBias) - negative;
}

// Two biased numbers, bytes 2 * pair and 2 * pair + 1 of `four`, as fp16: exact.
SAAP_PRIM u32 halves(u32 four, int pair) {
  // 0x6400 is 1024, and the lowest bit of its fraction 1
  return sub_f16x2(__byte_perm(four, 0x64646464u, pair ? 0x4342 : 0x4140), 0x64806480u);
}
