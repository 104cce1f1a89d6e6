// What both libraries need to run the scorer.
#pragma once

namespace misa {
namespace {

alignas(16) uint32_t staged[1 << 14];
alignas(1024) uint8_t raw[256 << 10];

Task rows_of(const int32_t* starts, const int32_t* ends, int rows, int keys, int stride, const int32_t* division) {
  Task task{};
  task.starts = starts, task.ends = ends, task.rows = rows, task.keys = keys, task.stride = stride, task.division = division;
  return task;
}

template <class Sink>
bool score(const Task& task, const uint8_t* k, const Sink& sink, int workers, std::vector<simt::Late> behind = {}) {
  const CUtensorMap map{reinterpret_cast<const char*>(k), task.scored(), DIM, TILE};
  return simt::launch(workers, THREADS, [&] { score_kernel(task, sink, map); }, 1, behind);
}

// Scores of the sampled keys, for rows of `task`.
bool score_sample(const Task& task, const uint8_t* k, const Sample& sample, const Logits& logits, int workers) {
  const Task sampling = sample.of(task);
  const int blocks = (sampling.scored() * KEY_CHUNKS + GATHER_THREADS - 1) / GATHER_THREADS;
  return simt::launch(blocks, GATHER_THREADS, [&] { gather_kernel(task, k, sample); }) &&
         score(sampling, sample.keys, logits, workers,
               {{sample.keys, int64_t(sampling.scored()) * DIM}, {sample.scale, int64_t(sampling.scored()) * 4}});
}

}  // namespace
}  // namespace misa
