// Scores in memory: what becomes of a sample, and of rows that are redone.
#pragma once
#include "scorer.cuh"

namespace misa {
namespace {

// Every score into memory, at the key's own column or from the row's start on; nothing outside the windows.
struct Logits {
  float* out;  // [rows, ld]
  int64_t ld;
  bool from_start;

  static constexpr Taking TAKING = Taking::ANY_TIME;
  static constexpr bool ALONE = false;

  struct Shared {};

  struct Lane {
    const Logits& to;
    Seat seat;
    __device__ Lane(const Logits& sink, Shared&, const Task&) : to(sink) {}
    __device__ bool begin(const Seat& at) {
      seat = at;
      return false;
    }
    __device__ void refuse(float (&)[LANE_QUERIES][2], int, const int2*) {}
    __device__ void take(const float (&score)[LANE_QUERIES][2], int key0, const int2* windows) {
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) {
        const int2 w = windows[q * 4 + seat.lane_query];
        float* row = to.out + int64_t(seat.query(q)) * to.ld - (to.from_start ? w.x : 0);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = key0 + seat.key(half);
          if (key >= w.x && key < w.y) row[key] = score[q][half];
        }
      }
    }
    __device__ void settle(int) {}
    __device__ void finish() {}
  };
};

}  // namespace
}  // namespace misa
