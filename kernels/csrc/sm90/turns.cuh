// Warpgroups that multiply one after the other, a product each, so that one adds up scores while another has the tensor cores: in step,
// all would wait for those and then for issue slots.
#pragma once
#include "ptx.cuh"

namespace misa {
namespace {

// Of GROUPS warpgroups, around all products of a task; with ON false nobody waits.
template <bool ON, int GROUPS>
struct Turns {
  const int own, next;  // named barriers, behind those of the warpgroups
  const bool first;

  __device__ explicit Turns(int group) : own(1 + GROUPS + group), next(1 + GROUPS + (group + 1) % GROUPS), first(group == 0) {
    if (group == GROUPS - 1) pass();
  }

  __device__ void wait() const {
    if constexpr (ON) sm90::named_barrier(own, 256);
  }

  __device__ void pass() const {
    if constexpr (ON) sm90::named_arrive(next, 256);
  }

  // Lets others multiply so many products.
  __device__ void skip(int products) const {
    for (int i = 0; i < products; ++i) wait(), pass();
  }

  // Takes back what the constructor gave.
  __device__ void end() const {
    if (first) wait();
  }
};

}  // namespace
}  // namespace misa
