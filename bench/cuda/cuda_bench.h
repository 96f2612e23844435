// What the parts of cuda_bench share: timing by graph replay, reporting, the benches.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "device_memory.h"
#include "kernels/cuda/device_page.h"

namespace zipcache::cuda {

struct Timing {
  double median = 0, p10 = 0, p90 = 0;  // seconds per launch

  Timing operator-(double seconds) const {
    return {median - seconds, p10 - seconds, p90 - seconds};
  }
};

// Captures launch(0..n_launches-1) into a graph and replays it.
Timing time_graph(int n_launches, int n_samples,
                  const std::function<void(int, cudaStream_t)>& launch);

struct Report {
  std::FILE* json = nullptr;
  std::string device;
  double read_bytes_per_s = 0, copy_bytes_per_s = 0;

  void line(const char* bench, const std::string& shape, double bytes, const Timing& t,
            const std::string& extra = "") const;
};

// A batch of equally long sequences in packed pages.
struct Shape {
  std::string name;
  int batch = 1, tokens = 0;
  std::vector<PageClass> classes;
  std::vector<double> share;  // of the tokens, per class
  int tail = 0;
  int n_heads = 32, n_kv_heads = 8, head_dim = 128;
  int block_tokens = 0;  // sealed together, with scale sets of their own; 0: all
};

void bench_ceilings(Report& report, int n_samples);  // sets the report's ceilings

// A kernel that reads more than the L2 cache holds. Behind it nothing of a launch is there, its
// code included: as in an engine, where kernels that read weights stand between two launches.
class CacheFlush {
 public:
  CacheFlush();
  void launch(cudaStream_t stream) const;

 private:
  DeviceBuffer<std::uint8_t> memory_;
  DeviceBuffer<std::uint32_t> sink_;
};

void bench_decode(const Report& report, const Shape& shape, int n_samples);
// `n_queries` tokens at the end of the sequence, in fp16 rows, after its packed tokens.
void bench_prefill(const Report& report, const Shape& shape, int n_queries, int n_samples);
// One query over fp16 rows, by the same kernel: what a cache without codes takes here.
void bench_fp16_rows(const Report& report, const std::string& name, int n_tokens, int n_samples);
void bench_pack(const Report& report, const Shape& shape, int n_samples);
void bench_probe(const Report& report, const Shape& shape, int n_probes, int n_samples);

}  // namespace zipcache::cuda
