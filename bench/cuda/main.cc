// The CUDA kernels beside a read-only and a copy kernel in the same run.
// Usage: cuda_bench [--quick] [--filter PART | --filter =NAME] [--json FILE]
//
// Cold: each launch of a graph reads another copy of the cache, and the copies exceed the L2 many
// times. Codes and parameters are random. Times are per launch: the median over graph replays,
// with the 10th and 90th percentile.
#include <cstring>
#include <tuple>

#include "cuda_bench.h"

int main(int argc, char** argv) {
  using namespace zipcache::cuda;  // NOLINT(google-build-using-namespace)
  Report report;
  int n_samples = 40;
  std::string filter;
  for (int at = 1; at < argc; ++at) {
    if (std::strcmp(argv[at], "--quick") == 0) {
      n_samples = 10;
    } else if (std::strcmp(argv[at], "--filter") == 0 && at + 1 < argc) {
      filter = argv[++at];
    } else if (std::strcmp(argv[at], "--json") == 0 && at + 1 < argc) {
      report.json = std::fopen(argv[++at], "w");
    } else {
      std::fprintf(stderr, "usage: %s [--quick] [--filter PART | =NAME] [--json FILE]\n", argv[0]);
      return 2;
    }
  }
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    std::fprintf(stderr, "no CUDA device\n");
    return 1;
  }
  report.device = device.name;
  std::printf("%s, %d SMs, L2 %d MB\n", device.name, device.multiProcessorCount,
              device.l2CacheSize >> 20);
  const auto wanted = [&](const std::string& name) {
    return filter.starts_with('=') ? name == filter.substr(1)
                                   : name.find(filter) != std::string::npos;
  };
  if (wanted("ceilings")) {
    bench_ceilings(report, n_samples);
  }

  using Classes = std::vector<PageClass>;
  const Classes mixed{{4, 4}, {2, 2}}, low{{2, 2}}, high{{4, 4}}, three{{4, 3}, {3, 3}, {3, 2}};
  // Keys 4 bits for 20 % of the tokens and half of the channels, else 2; values 3 bits for half.
  const auto usual = [](int head_dim) {
    const auto wide = static_cast<std::uint8_t>(head_dim / 2 / kChunkChannels);
    return Classes{{4, 3}, {2, 3, wide, 4}, {2, 2, wide, 4}};
  };
  const std::vector<double> usual_share{0.2, 0.3, 0.5};
  const Shape shapes[] = {
      {"B8 32k mixed", 8, 32768, mixed, {0.6, 0.4}},
      {"B8 32k mixed tail 64", 8, 32768, mixed, {0.6, 0.4}, 64},
      {"B8 32k 2-bit", 8, 32768, low, {1}},
      {"B8 32k 4-bit", 8, 32768, high, {1}},
      {"B8 32k default", 8, 32768, usual(128), usual_share},
      {"B8 32k K 4,3 V 3,2", 8, 32768, three, {0.3, 0.2, 0.5}},
      {"B64 4k default", 64, 4096, usual(128), usual_share},
      {"B1 32k default", 1, 32768, usual(128), usual_share},
      {"B64 4k mixed", 64, 4096, mixed, {0.6, 0.4}},
      {"B64 4k mixed tail 64", 64, 4096, mixed, {0.6, 0.4}, 64},
      {"B1 128k mixed", 1, 131072, mixed, {0.6, 0.4}},
      {"B1 32k mixed", 1, 32768, mixed, {0.6, 0.4}},
      {"B1 32k mixed tail 64", 1, 32768, mixed, {0.6, 0.4}, 64},
      {"B8 8k default, blocks of 512", 8, 8192, usual(128), usual_share, 0, 32, 8, 128, 512},
      {"B8 8k default, blocks of 512, tail 40", 8, 8192, usual(128), usual_share, 40, 32, 8, 128,
       512},
      {"B1 4k default, blocks of 512, tail 40", 1, 4096, usual(128), usual_share, 40, 32, 8, 128,
       512},
      {"B8 4k mixed", 8, 4096, mixed, {0.6, 0.4}},
      {"B1 4k mixed", 1, 4096, mixed, {0.6, 0.4}},
      {"B8 32k 8-bit", 8, 32768, {{8, 8}}, {1}},
      {"B8 32k mixed d64", 8, 32768, mixed, {0.6, 0.4}, 0, 32, 8, 64},
      {"B8 32k mixed d256 G2", 8, 32768, mixed, {0.6, 0.4}, 0, 16, 8, 256},
      {"B8 32k mixed G8", 8, 32768, mixed, {0.6, 0.4}, 0, 64, 8, 128},
  };
  for (const Shape& shape : shapes) {
    if (wanted(shape.name)) {
      bench_decode(report, shape, n_samples);
    }
  }
  if (wanted("fp16 rows")) {
    for (const auto& [name, tokens] :
         {std::pair{"B1 4k", 4096}, std::pair{"B1 32k", 32768}, std::pair{"B1 128k", 131072}}) {
      bench_fp16_rows(report, name, tokens, n_samples);
    }
  }
  if (wanted("prefill")) {
    for (const auto& [name, tokens, n_probes] :
         {std::tuple{"32k", 32768, 512}, std::tuple{"4k", 4096, 204}}) {
      const Shape shape{name, 1, tokens, mixed, {0.6, 0.4}};
      bench_pack(report, shape, n_samples);
      bench_probe(report, shape, n_probes, n_samples);
      bench_prefill(report, shape, 1, n_samples);
      bench_prefill(report, shape, 512, n_samples);
      const Shape of_default{std::string(name) + " default", 1, tokens, usual(128), usual_share};
      bench_pack(report, of_default, n_samples);
      bench_prefill(report, of_default, 512, n_samples);
    }
  }
  return 0;
}
