// What both libraries need to run the scorer.
#pragma once

namespace misa {
alignas(16) uint32_t staged[1 << 14];
alignas(1024) uint8_t raw[256 << 10];

namespace {

Task task_of(const int32_t* starts, const int32_t* ends, int rows, int keys, int stride, const int32_t* division) {
  Task task{};
  task.starts = starts, task.ends = ends, task.rows = rows, task.keys = keys, task.division = division;
  return task.every(stride);
}

template <class Sink>
bool score(const Task& task, const uint8_t* k, const Sink& sink, int workers) {
  const CUtensorMap map{reinterpret_cast<const char*>(k) + task.phase * DIM, (task.keys - task.phase + task.stride - 1) / task.stride,
                        task.stride * DIM, TILE};
  return simt::launch(workers, THREADS, [&] { score_kernel(task, sink, map); });
}

}  // namespace
}  // namespace misa
